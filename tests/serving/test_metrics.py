"""What the controller's calls become."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from elastic_ep.serving.metrics import Metrics
from tests.serving.fakes import FakeBackend


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    text = metrics.render().decode()
    return {
        (s.name.removeprefix("elastic_ep_"), *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }


def test_recoveries() -> None:
    metrics = Metrics()
    record = FakeBackend().status()["recoveries"][0]
    metrics.event("recovery", record)
    metrics.event("recovery", {**record, "tier": 0, "detect_ms": None, "bytes_moved": {}, "experts_lost": 0})
    metrics.event("rank_failed", {"rank": 1, "cause": "exited"})
    metrics.event("something_else", {})
    found = samples(metrics)
    assert found["recoveries_total", "killed", "1"] == 1
    assert found["recoveries_total", "killed", "0"] == 1
    assert found["recovery_phase_seconds_sum", "detect"] == 0.0004
    assert found["recovery_phase_seconds_count", "stall"] == 2
    assert found["detection_seconds_count", "killed"] == 1
    assert (found["bytes_moved_total", "peer"], found["bytes_moved_total", "checkpoint"]) == (10, 20)
    assert found["experts_lost_total",] == 3
    assert found["rank_failures_total", "exited"] == 1


def test_steps() -> None:
    metrics = Metrics()
    metrics.step_committed(0.02)
    metrics.event("step_void", {"step": 1})
    found = samples(metrics)
    assert (found["step_time_seconds_sum",], found["void_steps_total",]) == (0.02, 1)


def test_status_is_read_at_each_scrape() -> None:
    metrics, status = Metrics(), {**FakeBackend().status(), "steps": 5}
    metrics.watch(lambda: status)
    assert (samples(metrics)["epoch",], samples(metrics)["steps_total",]) == (2, 5)
    status["epoch"] = 3
    assert samples(metrics)["epoch",] == 3


def test_two_servers_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.event("step_void", {"step": 1})
    assert samples(other)["void_steps_total",] == 0

"""The server's Prometheus metrics. One object, one registry: two servers in a process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_RECOVERY_S = (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_PHASES = ("detect", "agree", "plan", "move", "resume", "stall")


class Metrics:
    """Counts what happens; every method takes microseconds and never fails for a value of its documented type."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"elastic_ep_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: Sequence[float] = _LATENCY_S) -> Histogram:
            return Histogram(f"elastic_ep_{name}", text, labels, buckets=buckets, registry=registry)

        self._finished = counter("request_success", "Sequences finished, by reason.", "finished_reason")
        self._failed = counter("request_failed", "Sequences that ended with an error.")
        self._cancelled = counter("request_cancelled", "Sequences whose client went away.")
        self._rejected = counter("request_rejected", "Requests refused, by HTTP status.", "status")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted sequences.")
        self._ttft = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of a sequence, recoveries included.")
        self._step_time = histogram("step_time_seconds", "Committed steps, from the order to the last answer.")
        self._void_steps = counter("void_steps", "Steps that saw a fault and were run again.")
        self._rank_failures = counter("rank_failures", "Ranks declared dead, by cause.", "cause")
        self._recoveries = counter("recoveries", "Recoveries, by tier and kind of fault.", "tier", "kind")
        self._phases = histogram("recovery_phase_seconds", "Phases of recoveries.", "phase", buckets=_RECOVERY_S)
        self._detection = histogram("detection_seconds", "From a fault to its notice, where known.", "kind", buckets=_RECOVERY_S)
        self._bytes_moved = counter("bytes_moved", "Expert weights moved, by source.", "source")
        self._experts_lost = counter("experts_lost", "Experts that a fault left without a live replica.")

    # ---- the API layer's

    def request_accepted(self, num_prompt_tokens: int) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)

    def request_rejected(self, status: int) -> None:
        self._rejected.labels(str(status)).inc()

    def request_finished(self, reason: str) -> None:
        """`reason`: "stop" or "length"."""
        self._finished.labels(reason).inc()

    def request_failed(self) -> None:
        self._failed.inc()

    def request_cancelled(self) -> None:
        self._cancelled.inc()

    def first_token(self, latency_s: float) -> None:
        self._ttft.observe(latency_s)

    def next_token(self, latency_s: float) -> None:
        self._itl.observe(latency_s)

    # ---- the controller's

    def watch(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """Reads the object of /elastic/status at each scrape: what it counts anyway costs a step nothing. Once per server."""
        self.registry.register(_StatusCollector(status))

    def step_committed(self, step_s: float) -> None:
        self._step_time.observe(step_s)

    def event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Takes every entry of the event log; counts those that have a metric."""
        if kind == "recovery":
            self.recovered(data)
        elif kind == "step_void":
            self._void_steps.inc()
        elif kind == "rank_failed":
            self._rank_failures.labels(str(data.get("cause", "unknown"))).inc()

    def recovered(self, record: Mapping[str, Any]) -> None:
        """Takes an entry of `recoveries` of /elastic/status; times that are None or absent are not counted."""
        kind = str(record.get("kind", "unknown"))
        self._recoveries.labels(str(record.get("tier", "unknown")), kind).inc()
        for phase in _PHASES:
            if (ms := record.get(f"{phase}_ms")) is not None:
                self._phases.labels(phase).observe(ms / 1000)
        if (ms := record.get("detect_ms")) is not None:
            self._detection.labels(kind).observe(ms / 1000)
        self._experts_lost.inc(record.get("experts_lost") or 0)
        for source, num_bytes in (record.get("bytes_moved") or {}).items():
            self.bytes_moved(source, num_bytes)

    def bytes_moved(self, source: str, num_bytes: int) -> None:
        """Bytes moved outside a recovery record (`source`: "peer", "host" or "checkpoint")."""
        self._bytes_moved.labels(source).inc(num_bytes)

    # ---- the reader's

    def render(self) -> bytes:
        """The text exposition of everything."""
        return generate_latest(self.registry)


class _StatusCollector(Collector):
    """Turns a status object into metrics."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]):
        self._status = status

    def describe(self) -> Iterator[Metric]:
        return iter(())  # the status may not be ready when the collector is registered

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        requests = status["requests"]
        active = sum(1 for a in status["active_ranks"] if a)

        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily(f"elastic_ep_{name}", text, value=value)

        yield gauge("num_requests_running", "Sequences that take part in steps.", requests["running"])
        yield gauge("num_requests_waiting", "Sequences in the queue.", requests["waiting"])
        yield gauge("epoch", "Membership epoch in force.", status["epoch"])
        yield gauge("ep_size", "Ranks, the dead included.", status["ep_size"])
        yield gauge("active_ranks", "Ranks alive.", active)
        yield gauge("survives_any_ranks", "How many ranks may die now without losing an expert.", status["survives"].get("any_ranks", 0))
        yield CounterMetricFamily("elastic_ep_generation_tokens", "Tokens committed.", value=status["tokens_committed"])
        if "steps" in status:
            yield CounterMetricFamily("elastic_ep_steps", "Steps committed.", value=status["steps"])

"""The soak: it breaks a real server, and its report can fail."""

from __future__ import annotations

import json

import pytest

from elastic_ep.cli.chaos import duration
from elastic_ep.cli.main import main
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.testing.chaos import ChaosSettings, Sample, is_rank_process, make_templates, percentiles, resources
from elastic_ep.testing.server import ServerProcess
from tests.checkpoints import config_of, save_checkpoint


def test_a_short_soak(tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "model", config_of("mixtral"))
    history = tmp_path / "history.jsonl"
    arguments = ("--ep-size", "3", "--num-redundant-experts", "3", "--restart-backoff", "0.05", "--step-timeout", "5")
    with ServerProcess(checkpoint, *arguments) as server:
        soak = ("--seed", "5", "--every", "0.5s", "--for", "3s", "--clients", "4", "--max-tokens", "48")
        status = main(["chaos", "--url", server.url, *soak, "--json", "--history", str(history)])
        after = server.status()
    report = json.loads(capsys.readouterr().out)
    assert status == 0, report
    assert report["verdict"]["counts"] == {}
    assert sum(report["faults"].values()) == report["verdict"]["faults"] >= 3
    assert report["verdict"]["checked"] > 10
    assert report["recoveries"] >= 2
    assert set(report["phases_ms"]) == {"detect", "agree", "plan", "move", "resume", "stall"}
    assert report["resources"]["controller_rss"]["last"] > 1e7
    assert after["requests"]["failed"] == 0
    assert main(["verify", str(history)]) == 0


def test_requests_follow_the_seed():
    settings = ChaosSettings("http://x", 4)
    assert make_templates(settings) == make_templates(settings)
    assert make_templates(settings) != make_templates(ChaosSettings("http://x", 5))
    assert len({template.key for template in make_templates(settings)}) == settings.templates


@pytest.mark.parametrize(("text", "seconds"), [("5", 5), ("5s", 5), ("30m", 1800), ("1.5h", 5400)])
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("arguments", [["--every", "soon"], ["--for", "1d"]])
def test_a_bad_duration(arguments):
    with pytest.raises(SystemExit):
        main(["chaos", *arguments])


def test_no_time_between_faults_is_refused():
    with pytest.raises(InvalidInputError, match="every_s is 0"):
        ChaosSettings("http://x", 4, every_s=0)


def test_a_server_that_is_not_there(capsys):
    assert main(["chaos", "--url", "http://127.0.0.1:9", "--for", "1s"]) == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_other_programs_are_left_alone():
    assert not is_rank_process(1)
    assert not is_rank_process(None)


def test_figures():
    records = [{"stall_ms": float(i), "detect_ms": None} for i in range(101)]
    assert percentiles(records) == {"stall": {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}}
    samples = [Sample(60.0 * i, 1000 + 10 * i, 5, 2000.0, 7.0) for i in range(10)]
    assert resources(samples)["controller_rss"] == {"first": 1000, "last": 1090, "max": 1090, "slope_per_minute": 10.0}

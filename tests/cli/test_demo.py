"""The demo: its prompts, what its view shows, and one run of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from elastic_ep.cli.demo import CHECKPOINT, NUM_REQUESTS, texts
from elastic_ep.cli.demo_prompts import PROMPTS, encoded_prompts
from elastic_ep.cli.demo_view import printable, stream_table
from elastic_ep.cli.main import EXIT_INTERRUPTED
from elastic_ep.testing.history import Event, History, Kind
from elastic_ep.testing.server import rank_processes


def test_prompts_are_texts_of_the_models_vocabulary() -> None:
    ids = encoded_prompts(CHECKPOINT)
    assert len(ids) == NUM_REQUESTS == 16
    assert len({len(prompt) for prompt in ids}) > 6
    assert all(0 < token < 2048 for prompt in ids for token in prompt)
    assert [prompt for prompt in PROMPTS if prompt != prompt.strip("\n").rstrip()] == []


def test_texts_are_those_of_the_run_that_was_sent_last() -> None:
    history = History()
    assert texts(history) == []
    for run in ("first", "second"):
        for request in range(NUM_REQUESTS if run == "first" else 3):
            history.note(Event(Kind.SENT, 0.0, f"{run}-{request}"))
            history.note(Event(Kind.TOKENS, 0.0, f"{run}-{request}", text=f"{run} "))
            history.note(Event(Kind.TOKENS, 0.0, f"{run}-{request}", text=str(request)))
        expected = [f"{run} {request}" for request in range(NUM_REQUESTS if run == "first" else 3)]
        assert texts(history) == expected


def test_streams_are_shown_side_by_side_with_their_last_lines() -> None:
    console = Console(width=60, height=20)
    with console.capture() as capture:
        console.print(stream_table([("def f(x):\n    y = 1", "\n    return x\n"), ("The", " end\x1b[2J")], 2))
    shown = capture.get()
    assert "return x" in shown
    assert "y = 1" in shown
    assert "def f" not in shown
    assert "The end·[2J" in shown
    assert printable("a\tb\r\nc\x07") == "a·b·\nc·"


@pytest.mark.timeout(110)
def test_the_demo_loses_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "elastic_ep.cli.main", "demo", "--json"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tokens_received"] == report["tokens_expected"] == 16 * 64
    assert report["identical_to_fault_free"] is True
    assert report["lost_tokens"] == report["duplicated_tokens"] == report["failed_requests"] == 0
    failed = [rank for recovery in report["recoveries"] if recovery["kind"] in ("exited", "stopped") for rank in recovery["ranks"]]
    assert sorted(failed) == [0, 2, 3]


def test_the_demo_that_is_ended_leaves_no_server() -> None:
    """As a service manager does it, with SIGTERM to the one process that it started."""
    demo = subprocess.Popen([sys.executable, "-m", "elastic_ep.cli.main", "demo", "--json"], stdout=subprocess.DEVNULL)
    with demo:
        servers: list[int] = []
        deadline = time.monotonic() + 60
        while not servers:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            servers = [int(pid) for pid in Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()]
        demo.terminate()
        assert demo.wait(30) == EXIT_INTERRUPTED
    assert not rank_processes(servers)

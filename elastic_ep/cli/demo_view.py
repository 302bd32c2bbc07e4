"""What the demo shows: ranks, epoch, tokens per second, each recovery's timeline, some streams' text; plain lines without a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

PHASES = ("detect", "agree", "plan", "move", "resume")
_STATE_STYLE = {"active": "green", "dead": "red", "fencing": "yellow"}
_RATE_WINDOW_S = 1.0
SHOWN_STREAMS = (0, 14)
"""which streams' text is shown while it comes"""
_STREAM_LINES = 8


class DemoView:
    """A live picture of the server. With `quiet` it shows nothing."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, refresh_per_second=12, transient=True) if self._is_live else None
        self._said: deque[str] = deque(maxlen=6)
        self._samples: deque[tuple[float, int]] = deque()
        self._started = time.monotonic()

    @property
    def _is_live(self) -> bool:
        return not self._quiet and self._console.is_terminal

    def __enter__(self) -> DemoView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line of what happens."""
        line = f"{time.monotonic() - self._started:5.1f} s  {text}"
        self._said.append(line)
        if not self._quiet:
            self._console.print(line, soft_wrap=True)

    def show(self, status: dict[str, Any], streams: Sequence[tuple[str, str]] = ()) -> None:
        """The server's status now, and some of `streams`: (prompt, text so far)."""
        if self._live:
            shown = stream_table([streams[i] for i in SHOWN_STREAMS if i < len(streams)], _STREAM_LINES)
            self._live.update(Group(self._ranks(status), self._headline(status), shown, recovery_table(status["recoveries"])))

    def _rate(self, tokens: int) -> float:
        now = time.monotonic()
        self._samples.append((now, tokens))
        while self._samples[0][0] < now - _RATE_WINDOW_S:
            self._samples.popleft()
        first = self._samples[0]
        return (tokens - first[1]) / (now - first[0]) if now > first[0] else 0.0

    def _headline(self, status: dict[str, Any]) -> Text:
        requests = status["requests"]
        return Text(
            f"epoch {status['epoch']}  {status['phase']}  {self._rate(status['tokens_committed']):.0f} tokens/s  "
            f"{requests['running']} running, {requests['waiting']} waiting, {requests['finished']} finished, {requests['failed']} failed"
        )

    @staticmethod
    def _ranks(status: dict[str, Any]) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("rank", "pid", "state", "streams", "why"):
            table.add_column(column)
        for rank in status["ranks"]:
            state = Text(rank["state"], style=_STATE_STYLE.get(rank["state"], ""))
            table.add_row(str(rank["rank"]), str(rank["pid"]), state, str(rank["running_requests"]), rank["failure"])
        return table

    def line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def summary(self, report: dict[str, Any], stream: tuple[str, str]) -> None:
        """The verdict, for a person, after one stream's (prompt, text)."""
        self.line("the stream that waited longest while ranks died:")
        self._console.print(stream_table([stream], None))
        self._console.print(recovery_table(report["recoveries"]))
        same = "identical to" if report["identical_to_fault_free"] else "DIFFERENT from"
        self.line(
            f"{report['requests']} streams, {report['tokens_received']} of {report['tokens_expected']} tokens: {same} the fault-free run; "
            f"{report['lost_tokens']} lost, {report['duplicated_tokens']} duplicated, {report['failed_requests']} requests failed"
        )
        steady, longest = report["steady_itl_ms"], report["longest_gap_ms"]
        self.line(f"token to token: {steady:.1f} ms (median, no faults); longest gap with faults {longest:.0f} ms")


def recovery_table(recoveries: list[dict[str, Any]]) -> Table:
    """One row per recovery, phases in milliseconds."""
    table = Table(box=None, pad_edge=False)
    table.add_column("recovery, times in ms", no_wrap=True)
    for column in (*PHASES, "stall", "lost", "MB read"):
        table.add_column(column, justify="right", no_wrap=True)
    for recovery in recoveries:
        times = [recovery[f"{phase}_ms"] for phase in (*PHASES, "stall")]
        table.add_row(
            f"rank {','.join(map(str, recovery['ranks']))} {recovery['kind']}" if recovery["ranks"] else recovery["kind"],
            *("…" if ms is None else f"{ms:.1f}" for ms in times),
            str(recovery["experts_lost"]),
            f"{sum(recovery['bytes_moved'].values()) / 1e6:.1f}",
        )
    return table


def stream_table(streams: Sequence[tuple[str, str]], max_lines: int | None) -> Table:
    """The streams side by side, each (prompt, text) with the prompt dim; of each the last `max_lines` lines."""
    table = Table(padding=(0, 1), show_header=False)
    cells = []
    for prompt, text in streams:
        table.add_column(ratio=1, overflow="fold")
        cell = Text(prompt, style="dim") + Text(printable(text), style="not dim")
        lines = cell.split("\n")[-max_lines:] if max_lines else cell.split("\n")
        cells.append(Text("\n").join(lines))
    table.add_row(*cells)
    return table


def printable(text: str) -> str:
    """The text with a dot for each character that a terminal would obey instead of showing."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)

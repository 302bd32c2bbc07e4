"""Every fault point x what happens there x to whom, on real processes. `python -m tests.e2e.kill_matrix` runs all cells or a share of them.

One server serves many cells: its processes read each cell's faults from a file, and dead ranks come back before the next cell. A cell
passes if its faults did happen, no client noticed, every failed member has a recovery record, and the group is whole again afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from elastic_ep.core.errors import ElasticEPError
from elastic_ep.runtime.faults import AGENT_POINTS, SHELL_POINTS, FaultFile
from elastic_ep.testing.client import Recorder, stream_completion
from elastic_ep.testing.history import Event, History, judge
from elastic_ep.testing.server import ServerFailed, ServerProcess
from tests.checkpoints import config_of, save_checkpoint
from tests.e2e.kill_cells import EP_SIZE, HARMLESS, IN_STEP, JOINER, SHELL_OPERATION, Cell, Fault, Setting, all_cells, cast_of, faults_of
from tests.e2e.kill_hosts import Backup, Hosts

NUM_STREAMS = 3
"""fewer than ranks, so that one is nobody's home"""
NUM_TOKENS = 64
CELL_TIMEOUT_S = 40.0
AGENTS_TIMEOUT_S = 120.0
"""for a cell with agents: a busy machine takes long to import what the next spare agent needs"""
CELLS_PER_SERVER = 40
STEP_TIMEOUT_S = 2
LONGEST_GAP_S = 3 * STEP_TIMEOUT_S
"""between two tokens of a stream: what a group of which everyone hangs is given, and in no cell everyone does"""
ARGUMENTS = ("--ep-size", str(EP_SIZE), "--num-redundant-experts", "4", "--step-timeout", str(STEP_TIMEOUT_S))
START_TIMEOUTS_S = (6, 12, 30)
"""for a process to be ready: tried one after the other until a server starts, as imports take longer on a busy machine"""
MORE = {Setting.BACKUP: ("--host-backup", "experts"), Setting.SOCKETS: ("--peer-reads", "socket")}
QUICK_RESTART = ("--restart-backoff", "0.05", "--restart-backoff-max", "0.2")


@dataclass
class Outcome:
    """What one cell showed; `problems` is empty if all is well."""

    cell: Cell
    seconds: float
    problems: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0


class Matrix:
    """One server and the cells that run on it, one after the other.

    Args:
        hosts: the agents of other hosts, if there are any.
        backup: the memory of the host's backup, if it has one.
    """

    def __init__(self, server: ServerProcess, fault_file: Path, seed: int, hosts: Hosts | None, backup: Backup | None) -> None:
        self.server = server
        self.file = fault_file
        self.rng = random.Random(seed)
        self.hosts, self.backup = hosts, backup
        self.timeout_s = CELL_TIMEOUT_S if hosts is None else AGENTS_TIMEOUT_S
        self.prompts = [[self.rng.randrange(160) for _ in range(self.rng.randint(1, 40))] for _ in range(NUM_STREAMS)]
        self.reference: list[Event] = []
        self.cells_run = 0

    async def streams(self, history: History, reference: bool = False) -> None:
        """One request per prompt, all at once."""
        parameters = {"max_tokens": NUM_TOKENS, "temperature": 0.7, "seed": 11, "ignore_eos": True}
        async with httpx.AsyncClient(trust_env=False) as client:
            url, model = self.server.url, self.server.facts["model"]
            recorders = [Recorder(history, reference=reference) for _ in self.prompts]
            await asyncio.gather(
                *(stream_completion(client, url, model, p, r, **parameters) for p, r in zip(self.prompts, recorders, strict=True))
            )

    async def status(self) -> dict[str, Any]:
        return await asyncio.to_thread(self.server.status)

    async def when(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        return await asyncio.to_thread(self.server.wait_status, condition, timeout_s)

    async def prepare(self) -> None:
        history = History()
        await self.when(is_whole, self.timeout_s)
        await self.streams(history, reference=True)
        self.reference = history.events

    async def run(self, cell: Cell) -> Outcome:
        started = time.monotonic()
        problems: list[str] = []
        history = History()
        try:
            await asyncio.wait_for(self._run(cell, history, problems), self.timeout_s)
        except (TimeoutError, ElasticEPError, httpx.HTTPError) as error:
            problems.append(f"not over in time: {type(error).__name__}: {error or self.timeout_s}; {await self._state_of_things()}")
        problems += self.hosts.ended() if self.hosts is not None else []
        verdict = judge([*self.reference, *history.events])
        problems += [str(violation) for violation in verdict.violations]
        if verdict.longest_gap_s > LONGEST_GAP_S:
            problems.append(f"a stream waited {verdict.longest_gap_s:.1f} s for a token; {LONGEST_GAP_S} s are enough for every fault here")
        return Outcome(cell, time.monotonic() - started, problems, verdict.longest_gap_s)

    async def _state_of_things(self) -> str:
        """For whoever asks why a cell was not over."""
        file = self._fault_file()
        happened = {i: pid for i in range(len(file.faults)) if (pid := file.victim(i)) is not None}
        try:
            status = await asyncio.to_thread(self.server.status)
        except (ElasticEPError, httpx.HTTPError) as error:
            return f"faults {file.faults}, victims {happened}; no status: {error!r}"
        told = {key: status.get(key) for key in ("phase", "epoch", "ranks", "nodes", "requests")} | {
            "recoveries": status["recoveries"][-4:]
        }
        return f"whole: {is_whole(status)}; faults {file.faults}, victims {happened}; {json.dumps(told)}"

    async def _run(self, cell: Cell, history: History, problems: list[str]) -> None:
        self.cells_run += 1
        before = await self.when(is_whole, self.timeout_s)
        wave = asyncio.create_task(self.streams(history))
        running = await self.when(lambda s: len(homes_of(s)) >= NUM_STREAMS - 1 or wave.done(), 10)
        cast = cast_of(cell, homes_of(running) or [1], lives(before), self.rng)
        faults = faults_of(cell, cast, self.rng)
        self._arm(str(self.cells_run), faults)
        has_happened = asyncio.Event()
        helper = asyncio.create_task(self._help(cell, has_happened))
        wave = await self._until_happened(wave, history, faults, problems)
        has_happened.set()
        await helper
        after = await self._until_over(cell, wave, history, before, faults)
        await self._tidy(cell, faults)
        self._arm("none", [])
        problems += check_status(before, after, faults)

    async def _help(self, cell: Cell, has_happened: asyncio.Event) -> None:
        """What makes the cell's point come by, over and over. An operation that was begun is waited for."""
        if cell.setting is Setting.BACKUP:
            assert self.backup is not None
            while not has_happened.is_set():
                self.backup.empty()
                await asyncio.sleep(0.05)
        if cell.point in SHELL_OPERATION:
            async with httpx.AsyncClient(trust_env=False, base_url=self.server.url, timeout=self.timeout_s) as client:
                while not has_happened.is_set():  # what is refused, while a recovery runs or because it is so already, is asked for again
                    await client.post("/scale_elastic_ep", json={"new_ep_size": EP_SIZE + 1})
                    await client.post(f"/elastic/ranks/{JOINER}/drain", json={})
                    await asyncio.sleep(0.01)

    async def _until_happened(
        self, wave: asyncio.Task[None], history: History, faults: list[Fault], problems: list[str]
    ) -> asyncio.Task[None]:
        """Send requests until all faults have. Returns the last wave of requests, which may still run."""
        deadline = time.monotonic() + self.timeout_s / 2
        while missing := [f for i, f in enumerate(faults) if not self._fault_file().has_happened(i)]:
            if time.monotonic() > deadline:
                break
            if wave.done():
                wave = asyncio.create_task(self.streams(history))
            await asyncio.sleep(0.005)
        problems += [f"never happened: {fault}" for fault in missing]
        return wave

    async def _until_over(
        self, cell: Cell, wave: asyncio.Task[None], history: History, before: dict[str, Any], faults: list[Fault]
    ) -> dict[str, Any]:
        """Send requests until each process that was to die has been replaced."""
        if self.hosts is not None:
            self.hosts.mend(cell, self._victims(faults, AGENT_POINTS.keys() & {cell.point}))
        if cell.point in SHELL_OPERATION:
            await self._undo_operations()
        while not (await self._is_over(before, faults)):
            if wave.done() and cell.action == "wedge":  # found only while there is something to do
                wave = asyncio.create_task(self.streams(history))
            await asyncio.sleep(0.01)
        await wave
        return await self.when(is_whole, self.timeout_s / 2)

    async def _is_over(self, before: dict[str, Any], faults: list[Fault]) -> bool:
        status = await self.status()
        return is_whole(status) and has_replaced(before, status, faults) and (self.hosts is None or self.hosts.is_over(status))

    async def _undo_operations(self) -> None:
        """Back to the seats that there were: an operation may have given up another one than it was to."""
        async with httpx.AsyncClient(trust_env=False, base_url=self.server.url, timeout=self.timeout_s) as client:
            while not is_whole(status := await self.status()):
                retired = [rank["rank"] for rank in status["ranks"] if rank["state"] == "retired"]
                if any(rank < EP_SIZE for rank in retired):
                    await client.post("/scale_elastic_ep", json={"new_ep_size": len(status["ranks"])})
                elif len(status["ranks"]) > JOINER and JOINER not in retired:
                    await client.post(f"/elastic/ranks/{JOINER}/drain", json={})
                await asyncio.sleep(0.01)

    async def _tidy(self, cell: Cell, faults: list[Fault]) -> None:
        """Processes with a thread that hangs, which nobody has to notice, must not meet the next cell."""
        if (cell.point, cell.action) not in HARMLESS:
            return
        for pid in self._victims(faults, [cell.point]):
            status = await self.status()
            for rank in status["ranks"]:
                if rank["pid"] == pid:
                    self.server.signal_rank(rank["rank"])
                    life, place = rank["incarnation"], rank["rank"]
                    await self.when(lambda s, r=place, i=life: is_whole(s) and lives(s)[r] > i, self.timeout_s / 2)

    def _fault_file(self) -> FaultFile:
        file = FaultFile(str(self.file))
        file.has_changed()
        return file

    def _victims(self, faults: list[Fault], points: Any) -> list[int]:
        """The processes to which the faults at these points happened."""
        file = self._fault_file()
        return [pid for i, f in enumerate(faults) if f["point"] in points and (pid := file.victim(i)) is not None]

    def _arm(self, name: str, faults: list[Fault]) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"id": name, "faults": faults}))
        new.rename(self.file)


def homes_of(status: dict[str, Any]) -> list[int]:
    return [rank["rank"] for rank in status["ranks"] if rank["running_requests"]]


def is_whole(status: dict[str, Any]) -> bool:
    """All seats that belong there are filled, no other, and every host is here."""
    states = [rank["state"] for rank in status["ranks"]]
    is_away = any(node["absent_ranks"] for node in status.get("nodes", []))
    return (
        states[:EP_SIZE] == ["active"] * EP_SIZE and set(states[EP_SIZE:]) <= {"retired"} and status["phase"] == "serving" and not is_away
    )


def lives(status: dict[str, Any]) -> list[int]:
    """Which process sits in each seat."""
    return [rank["incarnation"] for rank in status["ranks"]]


def has_replaced(before: dict[str, Any], after: dict[str, Any], faults: list[Fault]) -> bool:
    """Whether every process that was to end has. Each fault is in another one, or after a death."""
    ends = [f for f in faults if f["point"] not in AGENT_POINTS and (f["point"], f["action"]) not in HARMLESS]
    wanted = Counter(f["rank"] for f in ends if f["rank"] >= 0)
    # of two that are whoever comes first, the second may have been in the same process
    somebody = any(f["rank"] == -1 for f in ends)
    were = lives(before)
    # a seat that was not there before had its first process since
    replaced = Counter({rank: new - (were[rank] if rank < len(were) else 0) for rank, new in enumerate(lives(after))})
    return all(replaced[rank] >= count for rank, count in wanted.items()) and sum(replaced.values()) >= wanted.total() + somebody


def check_status(before: dict[str, Any], after: dict[str, Any], faults: list[Fault]) -> list[str]:
    """Records of all members that failed, whose phases add up."""
    problems = []
    records = [record for record in after["recoveries"] if record["epoch"] > before["epoch"]]
    recorded = {rank for record in records if record["tier"] < 2 for rank in record["ranks"]}
    at_members = [f for f in faults if f["point"] in (*IN_STEP, *SHELL_POINTS) and not f["incarnation"]]
    members = {f["rank"] for f in at_members if 0 <= f["rank"] < EP_SIZE}
    if members - recorded:
        problems.append(f"no recovery record of ranks {sorted(members - recorded)}: {[(r['kind'], r['ranks']) for r in records]}")
    for record in records:
        phases = sum(record[f"{phase}_ms"] for phase in ("detect", "agree", "plan", "move", "resume"))
        if abs(phases - record["stall_ms"]) > 0.01:
            problems.append(f"phases of {record['ranks']} add up to {phases}, its stall is {record['stall_ms']}")
    return problems


def start(checkpoint: Path, timeouts_s: Sequence[int], fault_file: Path, more: Sequence[str]) -> ServerProcess:
    """A server that has started, with the first of these start timeouts that let it. Raises ServerFailed."""
    for i, timeout in enumerate(timeouts_s):
        arguments = (*ARGUMENTS, *QUICK_RESTART, "--start-timeout", str(timeout), "--fault-file", str(fault_file), *more)
        try:
            return ServerProcess(checkpoint, *arguments).__enter__()
        except ServerFailed:
            if i == len(timeouts_s) - 1:
                raise
    raise AssertionError("no timeout was given")


def last_words(server: ServerProcess) -> str:
    """What the controller has said, and where its threads are; it ends."""
    with suppress(ProcessLookupError):
        server.process.send_signal(signal.SIGABRT)
    server.stop()
    return "the controller's last words:\n" + "\n".join(server.stderr.splitlines()[-60:])


def run_cells(checkpoint: Path, folder: Path, cells: Sequence[Cell], seed: int) -> Generator[Outcome, None, None]:
    """Run cells of one setting on a server; a cell that fails costs the server its life, so that the next begins on a sound one."""
    left = list(cells)
    setting = left[0].setting
    while left:
        file = folder / f"faults-{setting.name}-{len(left)}.json"
        with ExitStack() as stack:
            hosts = stack.enter_context(Hosts(folder, file)) if setting is Setting.AGENTS else None
            more = hosts.arguments if hosts else MORE.get(setting, ())
            server = start(checkpoint, START_TIMEOUTS_S[2:] if hosts else START_TIMEOUTS_S, file, more)
            stack.callback(server.stop)
            backup = Backup(server.process.pid, server.facts) if setting is Setting.BACKUP else None
            matrix = Matrix(server, file, seed, hosts, backup)
            asyncio.run(matrix.prepare())
            while left:
                outcome = asyncio.run(matrix.run(left.pop(0)))
                if outcome.problems:
                    outcome.problems += [hosts.last_words()] if hosts is not None else []
                    outcome.problems.append(last_words(server))
                yield outcome
                if outcome.problems:
                    break


def shares_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share a server, those of each setting spread evenly: agents take long to start, others can go on meanwhile."""
    placed: list[tuple[float, list[Cell]]] = []
    for setting in (Setting.AGENTS, Setting.BACKUP, Setting.SOCKETS, Setting.PLAIN):
        mine = [cell for cell in cells if cell.setting is setting]
        placed += [(start / len(mine), mine[start : start + CELLS_PER_SERVER]) for start in range(0, len(mine), CELLS_PER_SERVER)]
    return [share for _, share in sorted(placed, key=lambda item: item[0])]


def run_all(checkpoint: Path, folder: Path, cells: Sequence[Cell], seed: int, jobs: int) -> Iterator[Outcome]:
    """Run cells of any settings, on `jobs` servers at once."""
    os.environ["PYTHONFAULTHANDLER"] = "1"  # for `last_words`
    shares: queue.Queue[list[Cell]] = queue.Queue()
    for share in shares_of(cells):
        shares.put(share)
    outcomes: queue.Queue[Outcome | BaseException | None] = queue.Queue()
    is_over = threading.Event()

    def work(job: int) -> None:
        try:
            while True:
                share = shares.get_nowait()
                mine = folder / f"job-{job}-{shares.qsize()}"
                mine.mkdir()
                with closing(run_cells(checkpoint, mine, share, seed)) as done:
                    for outcome in done:
                        outcomes.put(outcome)
                        if is_over.is_set():
                            return
        except queue.Empty:
            outcomes.put(None)
        except BaseException as error:
            outcomes.put(error)

    workers = [threading.Thread(target=work, args=(job,)) for job in range(jobs)]
    for worker in workers:
        worker.start()
    running = jobs
    try:
        while running:
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is None:
                running -= 1
            else:
                yield outcome
    finally:  # their servers must end
        is_over.set()
        for worker in workers:
            worker.join()


def main() -> int:
    parser = argparse.ArgumentParser(prog="kill_matrix", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the order, the victims and the moments")
    parser.add_argument("--cells", type=int, help="how many; all if not given")
    parser.add_argument("--only", default="", help="cells whose name contains this; several are separated by |")
    parser.add_argument("--jobs", type=int, default=2, help="servers at once")
    args = parser.parse_args()
    cells = [cell for cell in all_cells() if any(word in str(cell) for word in args.only.split("|"))]
    random.Random(args.seed).shuffle(cells)
    cells = cells[: args.cells]
    started, failed, times = time.monotonic(), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = save_checkpoint(folder / "model", config_of("qwen3_moe"))
        for i, outcome in enumerate(run_all(checkpoint, folder, cells, args.seed, args.jobs), 1):
            times[outcome.cell.setting.name] += outcome.seconds
            failed += bool(outcome.problems)
            word = "FAILED" if outcome.problems else "ok"
            print(f"{i}/{len(cells)} {word} {outcome.seconds:.1f} s, gap {outcome.longest_gap_s * 1e3:.0f} ms: {outcome.cell}", flush=True)
            for problem in outcome.problems[:5] + outcome.problems[5:][-1:]:
                print(f"    {problem}"[:6000], flush=True)
    seconds = time.monotonic() - started
    print(f"{len(cells)} cells, {failed} failed, {seconds:.0f} s, seed {args.seed}; seconds by setting: {dict(times)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

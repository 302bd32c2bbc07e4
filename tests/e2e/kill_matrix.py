"""Every fault point x what happens there x to whom, on real processes. `python -m tests.e2e.kill_matrix` runs all cells or a share of them.

One server serves many cells: ranks read each cell's faults from a file, and dead ranks come back before the next cell. A cell passes if
its faults did happen, no client noticed, every failed member has a recovery record, and the group is whole again afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from elastic_ep.runtime.faults import FRAME_POINTS, POINTS, FaultAction
from elastic_ep.testing.client import Recorder, stream_completion
from elastic_ep.testing.history import Event, History, judge
from elastic_ep.testing.server import ServerProcess
from tests.checkpoints import config_of, save_checkpoint

EP_SIZE = 4
NUM_STREAMS = 3
"""fewer than ranks, so that one is nobody's home"""
NUM_TOKENS = 64
CELL_TIMEOUT_S = 40.0
ARGUMENTS = ("--ep-size", str(EP_SIZE), "--num-redundant-experts", "4", "--step-timeout", "2", "--start-timeout", "6")
QUICK_RESTART = ("--restart-backoff", "0.05", "--restart-backoff-max", "0.2")

IN_STEP = ("step_begin", "dispatch_begin", *FRAME_POINTS, "dispatch_end", "combine_begin", "combine_end", "step_end", "step_told")
IN_INSTALL = ("install_begin", "install_connected", "install_end", "install_told")
IN_STAGE = ("stage_begin", "stage_expert", "stage_end", "stage_told")
IN_JOIN = ("hello_said", "dense_loaded", "dense_told", *IN_STAGE, "load_expert", "expert_loaded")
IN_PEER = ("serve_expert",)
WHO = ("home", "another", "rank 0", "two at once", "during the recovery of another")
HARMLESS = {("serve_expert", "wedge"), ("stage_told", "wedge")}
"""a thread that has nothing to do hangs: nobody has to notice"""


class Cell(NamedTuple):
    point: str
    action: str
    who: str

    def __str__(self) -> str:
        return f"{self.action} at {self.point}, {self.who}"


def all_cells() -> list[Cell]:
    """Every point, action and choice of victims."""
    return [Cell(point, action.value, who) for point in POINTS for action in FaultAction for who in WHO]


def sample(seed: int, count: int) -> list[Cell]:
    """`count` cells of different points, as long as there are points."""
    rng = random.Random(seed)
    points: list[str] = []
    while len(points) < count:
        points += rng.sample(list(POINTS), len(POINTS))
    return [Cell(point, rng.choice(list(FaultAction)).value, rng.choice(WHO)) for point in points[:count]]


def faults_of(cell: Cell, homes: Sequence[int], rng: random.Random) -> list[dict[str, Any]]:
    """The cell's faults, as `FaultFile` takes them. The ranks of `homes` have requests, the others none."""
    idle = [rank for rank in range(EP_SIZE) if rank not in homes] or [homes[-1]]
    home, another = rng.choice([*homes]), rng.choice(idle)
    if home == another:
        home = next(rank for rank in range(EP_SIZE) if rank != another)
    victims = {"home": [home], "rank 0": [0], "two at once": [home, another]}.get(cell.who, [another])
    bystanders = [rank for rank in range(EP_SIZE) if rank not in victims]
    rng.shuffle(bystanders)
    nested = cell.who == "during the recovery of another"
    nth = rng.randint(1, 20 if cell.point in FRAME_POINTS else 6)

    def fault(rank: int, point: str, action: str = "kill", nth: int = 1, after: int = -1) -> dict[str, Any]:
        return {"rank": rank, "point": point, "action": action, "nth": nth, "after": after}

    if cell.point in IN_STEP:
        first = [fault(bystanders[0], "step_begin", nth=2)] if nested else []
        return first + [fault(v, cell.point, cell.action, 1 if nested else nth, len(first) - 1) for v in victims]
    if cell.point in IN_INSTALL:
        first = [fault(bystanders[0], "step_begin", nth=2)]
        if nested:
            first.append(fault(bystanders[1], "install_begin", after=0))
        return first + [fault(v, cell.point, cell.action, after=len(first) - 1) for v in victims]
    if cell.point in IN_PEER:
        first = [fault(bystanders[0], "step_begin", nth=2)]
        # whichever rank is asked: who is, is the transfer plan's choice
        served = [fault(-1, cell.point, cell.action, after=0) for _ in victims]
        return first + served + ([fault(bystanders[1], "step_begin", after=1)] if nested else [])
    first = [fault(v, "step_begin", nth=2) for v in victims]
    joiners = [fault(v, cell.point, cell.action, after=i) for i, v in enumerate(victims)]
    return first + joiners + ([fault(bystanders[0], "step_begin", after=1)] if nested else [])


@dataclass
class Outcome:
    """What one cell showed; `problems` is empty if all is well."""

    cell: Cell
    seconds: float
    problems: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0


class Matrix:
    """One server and the cells that run on it, one after the other."""

    def __init__(self, server: ServerProcess, fault_file: Path, seed: int) -> None:
        self.server = server
        self.file = fault_file
        self.rng = random.Random(seed)
        vocabulary = self.rng
        self.prompts = [[vocabulary.randrange(160) for _ in range(vocabulary.randint(1, 40))] for _ in range(NUM_STREAMS)]
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

    async def when(self, condition: Any, timeout_s: float) -> dict[str, Any]:
        return await asyncio.to_thread(self.server.wait_status, condition, timeout_s)

    async def prepare(self) -> None:
        history = History()
        await self.streams(history, reference=True)
        self.reference = history.events

    async def run(self, cell: Cell) -> Outcome:
        started = time.monotonic()
        problems: list[str] = []
        history = History()
        try:
            await asyncio.wait_for(self._run(cell, history, problems), CELL_TIMEOUT_S)
        except TimeoutError as error:
            problems.append(f"not over in time: {error or CELL_TIMEOUT_S}")
        verdict = judge([*self.reference, *history.events])
        problems += [str(violation) for violation in verdict.violations]
        return Outcome(cell, time.monotonic() - started, problems, verdict.longest_gap_s)

    async def _run(self, cell: Cell, history: History, problems: list[str]) -> None:
        self.cells_run += 1
        before = await self.when(is_whole, CELL_TIMEOUT_S)
        wave = asyncio.create_task(self.streams(history))
        running = await self.when(lambda s: len(homes_of(s)) >= NUM_STREAMS - 1 or wave.done(), 10)
        homes = homes_of(running) or [1]
        faults = faults_of(cell, homes, self.rng)
        name = str(self.cells_run)
        self._arm(name, faults)
        deadline = time.monotonic() + CELL_TIMEOUT_S / 2
        while True:
            await wave
            missing = [f for i, f in enumerate(faults) if not os.path.exists(f"{self.file}.{name}.{i}")]
            if not missing or time.monotonic() > deadline:
                break
            wave = asyncio.create_task(self.streams(history))
        problems += [f"never happened: {fault}" for fault in missing]
        self._arm("none", [])
        after = await self._settled(cell, before, faults)
        problems += check_status(cell, before, after, faults)

    async def _settled(self, cell: Cell, before: dict[str, Any], faults: list[dict[str, Any]]) -> dict[str, Any]:
        """Until the group is whole again, every process that was to die replaced by another."""
        deaths = expected_deaths(cell, faults)
        after = await self.when(lambda s: is_whole(s) and starts(s) - starts(before) >= deaths, CELL_TIMEOUT_S / 2)
        if (cell.point, cell.action) in HARMLESS:  # its hung thread must not meet the next cell
            for rank in range(EP_SIZE):
                incarnation = (await self.status())["ranks"][rank]["incarnation"]
                self.server.signal_rank(rank)
                await self.when(lambda s, r=rank, i=incarnation: is_whole(s) and s["ranks"][r]["incarnation"] > i, CELL_TIMEOUT_S / 2)
        return after

    def _arm(self, name: str, faults: list[dict[str, Any]]) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"id": name, "faults": faults}))
        new.rename(self.file)


def homes_of(status: dict[str, Any]) -> list[int]:
    return [rank["rank"] for rank in status["ranks"] if rank["running_requests"]]


def is_whole(status: dict[str, Any]) -> bool:
    return sum(status["active_ranks"]) == EP_SIZE and status["phase"] == "serving"


def starts(status: dict[str, Any]) -> int:
    return sum(rank["incarnation"] for rank in status["ranks"])


def expected_deaths(cell: Cell, faults: list[dict[str, Any]]) -> int:
    """Processes that end or are ended in the cell. The same process is not counted twice: each fault is in another, or after a death."""
    harmless = sum(f["point"] == cell.point and (f["point"], f["action"]) in HARMLESS for f in faults)
    return len(faults) - harmless - (len([f for f in faults if f["rank"] == -1]) - 1 if cell.point in IN_PEER else 0)


def check_status(cell: Cell, before: dict[str, Any], after: dict[str, Any], faults: list[dict[str, Any]]) -> list[str]:
    """Records of all members that failed, whose phases add up."""
    problems = []
    records = [record for record in after["recoveries"] if record["epoch"] > before["epoch"]]
    recorded = {rank for record in records if record["kind"] not in ("rejoin", "restore") for rank in record["ranks"]}
    members = {f["rank"] for f in faults if f["rank"] >= 0 and f["point"] in IN_STEP}
    if members - recorded:
        problems.append(f"no recovery record of ranks {sorted(members - recorded)}: {[(r['kind'], r['ranks']) for r in records]}")
    for record in records:
        phases = sum(record[f"{phase}_ms"] for phase in ("detect", "agree", "plan", "move", "resume"))
        if abs(phases - record["stall_ms"]) > 0.01:
            problems.append(f"phases of {record['ranks']} add up to {phases}, its stall is {record['stall_ms']}")
    return problems


def run_cells(checkpoint: Path, folder: Path, cells: Sequence[Cell], seed: int) -> Iterator[Outcome]:
    """Run cells on a server; a cell that fails costs the server its life, so that the next begins on a sound one."""
    left = list(cells)
    while left:
        file = folder / f"faults-{len(left)}.json"
        with ServerProcess(checkpoint, *ARGUMENTS, *QUICK_RESTART, "--fault-file", str(file)) as server:
            matrix = Matrix(server, file, seed)
            asyncio.run(matrix.prepare())
            while left:
                outcome = asyncio.run(matrix.run(left.pop(0)))
                yield outcome
                if outcome.problems:
                    break


def main() -> int:
    parser = argparse.ArgumentParser(prog="kill_matrix", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the order, the victims and the moments")
    parser.add_argument("--cells", type=int, help="how many; all if not given")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    args = parser.parse_args()
    cells = [cell for cell in all_cells() if args.only in str(cell)]
    random.Random(args.seed).shuffle(cells)
    cells = cells[: args.cells]
    started, failed, times = time.monotonic(), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = save_checkpoint(folder / "model", config_of("qwen3_moe"))
        for i, outcome in enumerate(run_cells(checkpoint, folder, cells, args.seed), 1):
            times[outcome.cell.action] += outcome.seconds
            failed += bool(outcome.problems)
            word = "FAILED" if outcome.problems else "ok"
            print(f"{i}/{len(cells)} {word} {outcome.seconds:.1f} s, gap {outcome.longest_gap_s * 1e3:.0f} ms: {outcome.cell}", flush=True)
            for problem in outcome.problems[:5]:
                print(f"    {problem}"[:600], flush=True)
    seconds = time.monotonic() - started
    print(f"{len(cells)} cells, {failed} failed, {seconds:.0f} s, seed {args.seed}; seconds by action: {dict(times)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

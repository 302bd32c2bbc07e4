"""Mutation testing of the files that decide: each mutant changes one thing, and some test must notice. `python -m tests.mutants`.

A mutant runs in a fork of this process, which has imported what all have in common. Its tests run in the order of how many mutants each
has noticed per second so far, up to the first failure. Random tests draw from a seed made of their name, so a run can be repeated.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import select
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import hypothesis
import numpy  # noqa: F401
import pytest

from tests.mutations import Mutant, mutants_of, ruined, unchanged

ROOT = Path(__file__).parent.parent
BRAIN = ("tests/brain",)
TARGETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "elastic_ep.core.membership": (("tests/core/test_membership.py",), BRAIN),
    "elastic_ep.core.recovery": (("tests/core/test_recovery.py",), BRAIN),
    "elastic_ep.brain.steps": (("tests/brain/test_steps.py",), BRAIN),
    "elastic_ep.core.transfer": (("tests/core/test_transfer.py",), BRAIN),
}
"""module -> the tests to run; the next ones only if those before noticed nothing"""
EXPLAINED = {
    ("expert_bytes: int = 1,", "1 -> 2"),
    ("expert, rank = displaced, min(free, key=lambda r: draft.incoming[r])", "min -> max in min(free, key=lambda r: draft.incoming[r])"),
    ("draft.lent[index][expert] -= 1", "1 -> 2"),
    ("self.count[expert] += 1", "1 -> 2"),
}
"""(line, mutation) of the survivors that docs/testing.md explains"""
PATIENCE, GRACE_S = 5.0, 1.0
"""a test that needs more processor time than this many times what it needs without a change, and the grace, has noticed the mutant"""
MEMORY_BYTES = 4 << 30
_OPTIONS = ("-x", "-q", "-o", "timeout=0", "-p", "no:cacheprovider", "-p", "no:anyio", "-W", "ignore::pytest.PytestAssertRewriteWarning")


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.mutant.module else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source(), f"<mutant of {self.mutant.module}>", "exec"), module.__dict__)


class Watch:
    """In the fork: orders the tests, limits each, and tells which ran, how long, and which failed."""

    def __init__(self, seconds: dict[str, float], kills: Counter[str], pipe: int) -> None:
        self.seconds, self.kills, self.pipe = seconds, kills, pipe

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: -(self.kills[item.nodeid] + 0.1) / (self.seconds.get(item.nodeid, 0.0) + 0.02))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        random.seed(item.nodeid)
        limit = GRACE_S + PATIENCE * self.seconds.get(item.nodeid, 1.0) if self.seconds else 0.0
        signal.setitimer(signal.ITIMER_VIRTUAL, limit)
        self._tell("began", item.nodeid, 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self._tell("failed" if report.failed else "passed", report.nodeid, report.duration)

    def _tell(self, what: str, nodeid: str, seconds: float) -> None:
        os.write(self.pipe, json.dumps([what, nodeid, seconds]).encode() + b"\n")


class Outcome(NamedTuple):
    """What became of a mutant: `killer` is the test that noticed it (or did not end), "" if none did. seconds: of each test that passed."""

    mutant: Mutant
    killer: str
    seconds: dict[str, float]


class Run(NamedTuple):
    mutant: Mutant
    pid: int
    handle: int
    """of the process, readable when it has ended"""
    log: int


def start(mutant: Mutant, tests: Sequence[Sequence[str]], seconds: dict[str, float], kills: Counter[str]) -> Run:
    log = os.memfd_create("mutant")
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        sys.meta_path.insert(0, Finder(mutant))
        for files in tests:
            if code := int(pytest.main([*_OPTIONS, *files], plugins=[Watch(seconds, kills, log)])):
                os._exit(code)
        os._exit(0)
    return Run(mutant, pid, os.pidfd_open(pid), log)


def end(run: Run) -> Outcome:
    """Of a run whose process has ended."""
    status = os.waitpid(run.pid, 0)[1]
    lines = [json.loads(line) for line in os.pread(run.log, 1 << 24, 0).splitlines()]
    os.close(run.handle)
    os.close(run.log)
    killer = (lines[-1][1] if lines else "import") if status else ""
    return Outcome(run.mutant, killer, {nodeid: seconds for what, nodeid, seconds in lines if what == "passed"})


def run_all(
    mutants: Sequence[Mutant], targets: dict[str, tuple[tuple[str, ...], ...]], seconds: dict[str, dict[str, float]], jobs: int
) -> Iterator[Outcome]:
    """Run all, so many at once; seconds: module -> test -> how long it takes without a change."""
    kills: dict[str, Counter[str]] = defaultdict(Counter)
    todo, running = list(reversed(mutants)), dict[int, Run]()
    while todo or running:
        while todo and len(running) < jobs:
            mutant = todo.pop()
            run = start(mutant, targets[mutant.module], seconds.get(mutant.module, {}), kills[mutant.module])
            running[run.handle] = run
        for handle in select.select(list(running), [], [])[0]:
            outcome = end(running.pop(handle))
            kills[outcome.mutant.module][outcome.killer] += 1
            yield outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--count", type=int, help="how many, drawn by the seed; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="modules whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once")
    parser.add_argument("--kills", action="store_true", help="print how many mutants each test noticed first")
    parser.add_argument("--quick", action="store_true", help="run each module's own tests only")
    args = parser.parse_args()
    os.chdir(ROOT)
    hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
    hypothesis.settings.load_profile("mutants")  # a failure is enough; its smallest example is not looked for
    targets = {module: tests[:1] if args.quick else tests for module, tests in TARGETS.items() if args.only in module}
    started = time.monotonic()
    seconds = {}
    for outcome in run_all([unchanged(module, path_of(module)) for module in targets], targets, {}, 1):
        if outcome.killer:
            print(f"{outcome.killer} fails without any change")
            return 2
        seconds[outcome.mutant.module] = outcome.seconds
    for outcome in run_all([ruined(module, path_of(module)) for module in targets], targets, seconds, args.jobs):
        if not outcome.killer:
            print(f"{outcome.mutant}, and no test notices: mutants are not what is tested")
            return 2
    mutants = [mutant for module in targets for mutant in mutants_of(module, path_of(module))]
    random.Random(args.seed).shuffle(mutants)
    outcomes = _told(run_all(mutants[: args.count], targets, seconds, args.jobs), len(mutants[: args.count]))
    survivors = [outcome.mutant for outcome in outcomes if not outcome.killer]
    for killer, count in Counter(outcome.killer for outcome in outcomes).most_common() if args.kills else ():
        print(f"{count:5} {killer or 'none'}")
    unknown = [mutant for mutant in survivors if (mutant.text, mutant.what) not in EXPLAINED]
    noticed, minutes = len(outcomes) - len(survivors), (time.monotonic() - started) / 60
    share = noticed / max(1, len(outcomes))
    print(f"{noticed} of {len(outcomes)} mutants noticed ({share:.1%}), {len(unknown)} survivors unexplained, {minutes:.1f} minutes")
    return 1 if unknown else 0


def _told(outcomes: Iterator[Outcome], total: int) -> list[Outcome]:
    """All of them, survivors printed as they come."""
    done = []
    for outcome in outcomes:
        done.append(outcome)
        if not outcome.killer:
            explained = " (explained)" if (outcome.mutant.text, outcome.mutant.what) in EXPLAINED else ""
            print(f"SURVIVED{explained} {outcome.mutant} | {outcome.mutant.text}", flush=True)
        if len(done) % 50 == 0:
            print(f"{len(done)} of {total}", flush=True)
    return done


if __name__ == "__main__":
    sys.exit(main())

"""A soak of a running server of this host: mixed load, ranks killed and stopped at random, everything that clients saw noted and judged.

Each request of the load is run once before the first fault; its tokens are what every later run of it must give. Only ranks that the
status calls active are touched, and only if their process is one of elastic-ep's.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.serving.probe import fetch_status
from elastic_ep.testing.client import Recorder, complete, stream_completion
from elastic_ep.testing.history import Event, History, Kind, Verdict, judge

POLL_S = 0.25
WHOLE_TIMEOUT_S = 60.0
PHASES = ("detect", "agree", "plan", "move", "resume", "stall")
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
FIRST_ID, LAST_ID = 3, 120
"""prompts are of these token ids, which every vocabulary has"""


@dataclass(frozen=True)
class ChaosSettings:
    """One soak. Times in seconds.

    Attributes:
        clients: requests in flight at once.
        templates: different requests among which clients choose.
        stop_share, two_share: of the faults, how many are stops instead of kills, and how many take two ranks at once.
        spare: active ranks that are always left alone, so that a fault is not also the end of all.
    """

    url: str
    seed: int
    every_s: float = 5.0
    for_s: float = 1800.0
    clients: int = 8
    templates: int = 24
    max_tokens: int = 128
    stop_share: float = 0.25
    two_share: float = 0.1
    spare: int = 1

    def __post_init__(self) -> None:
        for name in ("every_s", "for_s", "clients", "templates", "max_tokens"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; give more than 0")


@dataclass(frozen=True)
class Template:
    """A request that may be asked for again and again."""

    key: str
    prompt: tuple[int, ...]
    parameters: dict[str, Any]


def make_templates(settings: ChaosSettings) -> list[Template]:
    """Short and long, greedy and sampled, by the seed."""
    rng = random.Random(settings.seed)
    out = []
    for i in range(settings.templates):
        prompt = tuple(rng.randint(FIRST_ID, LAST_ID) for _ in range(rng.choice((1, 4, 16, 64))))
        count = max(1, settings.max_tokens // rng.choice((1, 2, 4, 16)))
        sampling = rng.choice(({"temperature": 0}, {"temperature": 0.9, "seed": rng.randrange(2**31)}))
        out.append(Template(f"template {i}", prompt, {"max_tokens": count, "ignore_eos": True, **sampling}))
    return out


@dataclass
class Sample:
    """Memory and descriptors at one moment. Bytes; the ranks' are the means over those that were active."""

    at: float
    controller_rss: int
    controller_fds: int
    rank_rss: float
    rank_fds: float


@dataclass
class Report:
    """What a soak showed."""

    settings: ChaosSettings
    verdict: Verdict
    seconds: float
    faults: dict[str, int]
    recoveries: list[dict[str, Any]]
    samples: list[Sample]
    final_active: int
    ep_size: int

    def as_json(self) -> dict[str, Any]:
        failures = [record for record in self.recoveries if record["kind"] not in ("rejoin", "restore", "rebalance")]
        changes = [record for record in self.recoveries if record["kind"] in ("rejoin", "restore", "rebalance")]
        return {
            "seed": self.settings.seed,
            "seconds": round(self.seconds, 1),
            "faults": self.faults,
            "verdict": self.verdict.as_json(),
            "longest_stall_ms": round(self.verdict.longest_gap_s * 1e3, 1),
            "recoveries": len(failures),
            "phases_ms": percentiles(failures),
            "changes": len(changes),
            "change_pauses_ms": percentiles(changes).get("stall", {}),
            "resources": resources(self.samples),
            "active_at_end": self.final_active,
            "ep_size": self.ep_size,
        }


def percentiles(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """phase -> its percentiles in milliseconds."""
    out: dict[str, dict[str, float]] = {}
    for phase in PHASES:
        values = [record[f"{phase}_ms"] for record in records if record.get(f"{phase}_ms") is not None]
        if values:
            out[phase] = {name: round(float(np.percentile(values, share)), 2) for name, share in PERCENTILES.items()}
    return out


def resources(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Each figure's first and last value, and its slope per minute (least squares, without the first fifth: warming up)."""
    out: dict[str, dict[str, float]] = {}
    for name in ("controller_rss", "controller_fds", "rank_rss", "rank_fds"):
        values = np.array([getattr(sample, name) for sample in samples], dtype=float)
        if len(values):
            out[name] = {"first": values[0], "last": values[-1], "max": values.max()}
            late = len(values) // 5
            if len(values) - late > 2:
                minutes = np.array([sample.at for sample in samples])[late:] / 60
                out[name]["slope_per_minute"] = round(float(np.polyfit(minutes, values[late:], 1)[0]), 2)
    return out


@dataclass
class Soak:
    """One run against one server. `say` is told what happens."""

    settings: ChaosSettings
    history: History
    say: Callable[[str], None]
    faults: dict[str, int] = field(default_factory=lambda: {"kill": 0, "stop": 0})
    recoveries: dict[int, dict[str, Any]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    async def run(self) -> Report:
        settings = self.settings
        started = time.monotonic()
        self._rng = random.Random(settings.seed)
        self._templates = make_templates(settings)
        self._over = asyncio.Event()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(trust_env=False, limits=limits) as client:
            self._client = client
            await self._status()
            self._model = (await client.get(f"{settings.url}/v1/models")).json()["data"][0]["id"]
            self.say(f"{len(self._templates)} requests without faults")
            for i in range(0, len(self._templates), settings.clients):
                await asyncio.gather(*(self._reference(t) for t in self._templates[i : i + settings.clients]))
            self.say(f"faults every {settings.every_s:g} s for {settings.for_s:g} s, seed {settings.seed}")
            load = [asyncio.create_task(self._load(random.Random(f"{settings.seed}.{i}"))) for i in range(settings.clients)]
            watch = asyncio.create_task(self._watch())
            await self._inject(time.monotonic() + settings.for_s)
            self._over.set()
            await asyncio.gather(*load)
            status = await self._wait_whole()
            watch.cancel()
        verdict = judge(self.history.events)
        records = [self.recoveries[epoch] for epoch in sorted(self.recoveries)]
        active, size = sum(status["active_ranks"]), status["ep_size"]
        return Report(settings, verdict, time.monotonic() - started, self.faults, records, self.samples, active, size)

    # ---- load

    async def _reference(self, template: Template) -> None:
        recorder = Recorder(self.history, key=template.key, reference=True)
        await stream_completion(self._client, self.settings.url, self._model, template.prompt, recorder, **template.parameters)

    async def _load(self, rng: random.Random) -> None:
        """One client: a request, then another, until it is over. Three in five stream, one does not, one hangs up."""
        while not self._over.is_set():
            template = rng.choice(self._templates)
            way = rng.randrange(5)
            count = template.parameters["max_tokens"]
            cancel_after = rng.randint(1, count) if way == 1 and count > 1 else None
            recorder = Recorder(self.history, key=template.key, cancel_after=cancel_after)
            ask = complete if way == 0 else stream_completion
            await ask(self._client, self.settings.url, self._model, template.prompt, recorder, **template.parameters)

    # ---- faults

    async def _inject(self, until: float) -> None:
        due = time.monotonic()
        while (due := max(due + self.settings.every_s, time.monotonic())) < until:
            await asyncio.sleep(due - time.monotonic())
            status = await self._status()
            active = [rank for rank in status["ranks"] if rank["state"] == "active" and status["active_ranks"][rank["rank"]]]
            count = 2 if self._rng.random() < self.settings.two_share else 1
            self._rng.shuffle(active)
            for rank in active[: max(0, min(count, len(active) - self.settings.spare))]:
                self._fault(rank)

    def _fault(self, rank: dict[str, Any]) -> None:
        """Signal one rank's process, if it is one of ours on this host."""
        name = "stop" if self._rng.random() < self.settings.stop_share else "kill"
        if rank["host"] != socket.gethostname() or not is_rank_process(rank["pid"]):
            return
        try:
            os.kill(rank["pid"], signal.SIGSTOP if name == "stop" else signal.SIGKILL)
        except ProcessLookupError:
            return
        self.faults[name] += 1
        self.history.note(Event(Kind.FAULT, time.monotonic(), reason=f"{name} rank {rank['rank']} pid {rank['pid']}"))

    # ---- what the server says

    async def _status(self) -> dict[str, Any]:
        return await asyncio.to_thread(fetch_status, self.settings.url, 30.0)

    async def _watch(self) -> None:
        began = shown = time.monotonic()
        while True:
            status = await self._status()
            self.recoveries.update({r["epoch"]: r for r in status["recoveries"] if r["stall_ms"] is not None})
            sample = take_sample(status, time.monotonic() - began)
            if sample is not None:
                self.samples.append(sample)
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                self.say(f"{sum(self.faults.values())} faults, {len(self.recoveries)} recoveries and rejoins, {status['requests']}")
            await asyncio.sleep(POLL_S)

    async def _wait_whole(self) -> dict[str, Any]:
        """Until every rank is back, or the time for that is over."""
        deadline = time.monotonic() + WHOLE_TIMEOUT_S
        while True:
            status = await self._status()
            whole = sum(status["active_ranks"]) == status["ep_size"] and status["phase"] == "serving"
            if whole or time.monotonic() > deadline:
                return status
            await asyncio.sleep(POLL_S)


def is_rank_process(pid: int | None) -> bool:
    """Whether a process of this host runs elastic-ep's program."""
    try:
        return pid is not None and b"elastic_ep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def take_sample(status: dict[str, Any], at: float) -> Sample | None:
    """Memory and descriptors of the controller (found as the ranks' grandparent) and of the active ranks, None if none can be seen."""
    seen = []
    controller = None
    for rank in status["ranks"]:
        if rank["state"] == "active" and is_rank_process(rank["pid"]):
            try:
                seen.append(usage(rank["pid"]))
                controller = controller or usage(parent(parent(rank["pid"])))
            except (OSError, ValueError, IndexError):
                continue  # it has ended meanwhile
    if controller is None or not seen:
        return None
    return Sample(at, *controller, *(float(np.mean(values)) for values in zip(*seen, strict=True)))


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def usage(pid: int) -> tuple[int, int]:
    """(resident bytes, open descriptors) of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))

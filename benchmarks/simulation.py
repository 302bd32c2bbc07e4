"""How many schedules a second the simulator checks on all cores, and how long a year of 320 ranks takes at both published failure rates.

python benchmarks/simulation.py [--schedules 100000]
"""

from __future__ import annotations

import argparse
import os
import time

from elastic_ep.cli.plan_load import MODELS
from elastic_ep.sim.capacity.group import Group
from elastic_ep.sim.capacity.rates import FAILURE_RATES
from elastic_ep.sim.capacity.report import figures
from elastic_ep.sim.capacity.setup import Setup
from elastic_ep.sim.sweep import sweep

HOURS_OF_A_YEAR = 8766.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=4000)
    count, cores = parser.parse_args().schedules, os.cpu_count() or 1
    base = time.time_ns() // 1000
    started = time.monotonic()
    found = sweep(range(base, base + count), processes=cores)
    seconds = time.monotonic() - started
    print(f"{count} schedules from seed {base}: {found.events} events, {found.violations} violations, {count / seconds:.0f}/s")
    shape = MODELS["deepseek-v3"]
    for name, rate in FAILURE_RATES.items():
        setup = Setup(320, 2, 8, shape.num_layers, shape.num_experts, shape.expert_bytes, 1)
        started = time.monotonic()
        history = Group(setup, rate, 0).run(HOURS_OF_A_YEAR)
        year = figures(setup, history, HOURS_OF_A_YEAR)
        spent = time.monotonic() - started
        print(f"a year of 320 ranks, {name}: {year['failures']} failures, {year['paused_s']:.0f} s without a token, done in {spent:.0f} s")


if __name__ == "__main__":
    main()

"""What is promised on GPUs, measured on the GPU at hand: dispatch and combine, then ranks that serve (benchmarks/gpu_serving.py).

python benchmarks/gpu.py [--only dispatch] [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from elastic_ep.runtime.dispatch.cuda.build import find_nvcc


def why_not() -> str | None:
    """Why nothing can be measured here. Must not take hold of the GPU: the service that shares it is started later."""
    if not torch.version.cuda or not torch.cuda.device_count():
        return "torch sees no GPU"
    return None if find_nvcc() else "nvcc is not installed"


def plain(value: Any) -> Any:
    """Keys of several parts joined, for JSON."""
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, dict):
        return {" ".join(map(str, k)) if isinstance(k, tuple) else str(k): plain(v) for k, v in value.items()}
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--repeats", type=int, default=40, help="steps of 16 layers measured per size (default 40)")
    parser.add_argument("--only", choices=["dispatch", "serving"])
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"nothing measured: {reason}")
        return
    begin = time.monotonic()
    report: dict[str, Any] = {}
    if options.only in (None, "dispatch"):
        import gpu_dispatch

        report["dispatch"] = gpu_dispatch.run(options.repeats)
        if not options.json:
            gpu_dispatch.print_report(report["dispatch"])
    if options.only in (None, "serving"):
        command = [sys.executable, str(Path(__file__).with_name("gpu_serving.py")), "--json"]
        report["serving"] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        if not options.json:
            print(json.dumps(report["serving"], indent=1))
    print(json.dumps(plain(report)) if options.json else f"{time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()

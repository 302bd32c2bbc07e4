"""What is promised on GPUs, measured on the GPU at hand; one section per subject.

python benchmarks/gpu.py [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # streams of one process that wait for each other must not share a queue

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
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"nothing measured: {reason}")
        return
    import gpu_dispatch

    begin = time.monotonic()
    report = gpu_dispatch.run(options.repeats)
    if options.json:
        print(json.dumps(plain({"dispatch": report})))
        return
    gpu_dispatch.print_report(report)
    print(f"{time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()

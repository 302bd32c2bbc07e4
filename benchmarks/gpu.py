"""What is promised on GPUs, measured on the GPU at hand: dispatch and combine; ranks that serve, in two shapes; random kills.

python benchmarks/gpu.py [--only dispatch] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from elastic_ep.runtime.dispatch.cuda.build import find_nvcc

ROOT = Path(__file__).resolve().parent.parent
PARTS = "one-graphs,one-fast,transformers,throughput,replicas,lost,rejoin"
SERVING = {
    "qwen3-30b-a3b": ("--shape", "qwen3-30b-a3b", "--parts", PARTS),
    "deepseek-v3-slice": ("--shape", "deepseek-v3-slice", "--parts", PARTS),
    "random-kills": ("--checkpoint", str(ROOT / "elastic_ep" / "assets" / "demo_model"), "--parts", "random"),
}


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


def serving(arguments: tuple[str, ...]) -> Any:
    """What gpu_serving.py finds, or why not: the rest is measured all the same. Its checkpoint is in memory for as long."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="elastic-ep-", dir=memory) as folder:
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_serving.py"), "--folder", folder, *arguments, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        return {"error": f"gpu_serving.py ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--repeats", type=int, default=40, help="steps of 16 layers measured per size (default 40)")
    parser.add_argument("--only", choices=["dispatch", *SERVING])
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
    for name, arguments in SERVING.items():
        if options.only in (None, name):
            report[name] = serving(arguments)
            if not options.json:
                print(json.dumps({name: report[name]}, indent=1))
    print(json.dumps(plain(report)) if options.json else f"{time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()

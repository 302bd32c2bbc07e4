"""Compiles the kernels on first use and keeps the result, one file per source text and GPU architecture."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from elastic_ep.core.errors import InvalidInputError

SOURCE = Path(__file__).with_name("kernels.cu")
HEADERS = tuple(SOURCE.with_name(f"{name}.cuh") for name in ("common", "dispatch", "combine"))
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
_COMPILE_S = 300.0


def find_nvcc() -> str | None:
    """The CUDA compiler: on the search path, else where its installer puts it."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def build_kernels(capability: tuple[int, int], cache: Path, source: Path = SOURCE, headers: Sequence[Path] = HEADERS) -> Path:
    """The shared library of a source file for GPUs of this compute capability. Safe to call from several processes at once.

    Raises InvalidInputError without a compiler, or with the compiler's words if it fails.
    """
    flags = (*FLAGS, f"-arch=sm_{capability[0]}{capability[1]}")
    name = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *headers)) + " ".join(flags).encode()).hexdigest()[:20]
    target = cache / f"{source.stem}-{name}.so"
    if target.exists():
        return target
    nvcc = find_nvcc()
    if nvcc is None:
        raise InvalidInputError(f"{source.name} needs nvcc to be compiled; install the CUDA toolkit or put nvcc on PATH")
    cache.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(suffix=".so", dir=cache)
    os.close(handle)
    try:
        done = subprocess.run([nvcc, *flags, "-o", partial, str(source)], capture_output=True, text=True, timeout=_COMPILE_S, check=False)
        if done.returncode:
            raise InvalidInputError(f"{nvcc} {flags[-1]} cannot compile {source.name}: {done.stderr.strip()[-500:]}")
        os.chmod(partial, 0o755)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target

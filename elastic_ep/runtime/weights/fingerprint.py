"""Whether two folders on two hosts hold the same checkpoint, without reading it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from elastic_ep.core.errors import CheckpointError
from elastic_ep.runtime.weights.headers import read_headers

_SAMPLE_BYTES = 4096


def fingerprint(directory: str | Path) -> str:
    """Hex digest of the configuration, of every tensor's name, type and shape, and of the first and last bytes of each file.

    It tells another model, another training run or another split of files apart; a flipped bit in the middle is for the experts' digests
    to find. Raises CheckpointError.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {error}; give the folder that save_pretrained wrote") from None
    config.pop("_name_or_path", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    entries = read_headers(folder)
    for name, entry in sorted(entries.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape} {entry.file.name} {entry.begin}\n".encode())
    for file in sorted({entry.file for entry in entries.values()}):
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()

"""The text that the demo's model learns: the standard library of the Python that runs this, split into training and validation files.

    python3.13 -m training.corpus FOLDER

writes tokenizer.json, train.bin and val.bin (uint16 ids) and corpus.json (what they were made of) to FOLDER. Needs numpy and tokenizers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
"""the token between two documents, id 0"""
VOCAB_SIZE = 2048
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings"}  # encodings: tables of characters, no text
_VALIDATION_SHARE = 50
"""one file in this many is held out"""
_LIBRARY_REPEATS = 2
"""the library and its documentation count this often beside its tests, which are twice as long"""


class Document(NamedTuple):
    name: str
    text: str
    is_test: bool

    @property
    def is_held_out(self) -> bool:
        """By the name's digest, so that a file stays on its side whatever else is there."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4]) % _VALIDATION_SHARE == 0


def documents() -> Iterator[Document]:
    """Every Python source of the standard library, and the topics of `help()`, which are the language reference. Sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few tests are written in other encodings on purpose
        if _reads_as_text(text) and path.name != "topics.py":
            yield Document("/".join(parts), text, "test" in parts or "tests" in parts or "idle_test" in parts)
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", text, False)


def _reads_as_text(text: str) -> bool:
    """Not empty, and mostly letters: no tables of numbers."""
    letters = sum(c.isascii() and (c.isalpha() or c in " _\n") for c in text)
    return len(text) > 200 and letters > 0.7 * len(text)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE ids, END first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """uint16 ids: END, text, END, text and so on."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [0, *encoding.ids]
    return np.array(ids, dtype=np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    found = list(documents())
    training = [d for d in found if not d.is_held_out]
    held_out = [d.text for d in found if d.is_held_out]
    tokenizer = train_tokenizer([d.text for d in training if not d.is_test])
    tokenizer.save(str(folder / "tokenizer.json"))
    tests, library = (
        encode(tokenizer, [d.text for d in training if d.is_test]),
        encode(tokenizer, [d.text for d in training if not d.is_test]),
    )
    train, val = np.concatenate([tests, *[library] * _LIBRARY_REPEATS]), encode(tokenizer, held_out)
    train.tofile(folder / "train.bin")
    val.tofile(folder / "val.bin")
    num_bytes = sum(len(d.text.encode()) for d in found)
    facts = {
        "python": platform.python_version(),
        "files": len(found),
        "bytes": num_bytes,
        "sha256": hashlib.sha256("".join(d.text for d in found).encode()).hexdigest(),
        "files_held_out": len(held_out),
        "vocab_size": tokenizer.get_vocab_size(),
        "library_tokens": len(library),
        "test_tokens": len(tests),
        "train_tokens": len(train),
        "val_tokens": len(val),
        "bytes_per_val_token": round(sum(len(t.encode()) for t in held_out) / len(val), 3),
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

"""Tiny checkpoints of the four families, written once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.checkpoints import config_of, save_checkpoint

logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(family, dtype) -> folder of a tiny checkpoint. Not to be changed: copy it first."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, dtype: str = "float32") -> Path:
        key = (family, dtype)
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp("checkpoints") / f"{family}-{dtype}", config_of(family), dtype)
        return made[key]

    return get

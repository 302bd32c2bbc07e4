"""Whatever a load file or a safetensors header holds: what it says, or one error of ours with one line."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.cli.plan_load import read_load
from elastic_ep.core.errors import CheckpointError, InvalidInputError
from elastic_ep.runtime.weights.headers import read_header, read_headers
from tests.fuzz.bytes import FUZZ, check_line, mutated

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
any_json = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
loads = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=3)


def check_load(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        load = read_load(str(path))
    except InvalidInputError as error:
        check_line(str(error).splitlines()[0])
    else:
        assert load.ndim == 2
        assert np.isfinite(load).all()
        assert (load >= 0).all()


@FUZZ
@given(any_json)
def test_any_json_as_load(tmp_path: Path, value: Any) -> None:
    check_load(tmp_path / "load.json", json.dumps(value).encode())


@FUZZ
@given(st.dictionaries(st.sampled_from(["load", "weight", "0", "1", "x"]), any_json, max_size=3) | loads)
def test_almost_right_json_as_load(tmp_path: Path, value: Any) -> None:
    check_load(tmp_path / "load.json", json.dumps(value).encode())


def npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(value, dtype=float))
    return file.getvalue()


def npz(value: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, load=np.array(value, dtype=float))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("suffix", ["json", "npy", "npz", "pt"])
@FUZZ
@given(data=st.data())
def test_any_bytes_as_load(tmp_path: Path, suffix: str, data: Any) -> None:
    valid = {"npy": npy, "npz": npz}.get(suffix, lambda value: json.dumps(value).encode())
    check_load(tmp_path / f"load.{suffix}", data.draw(st.binary(max_size=100) | mutated(loads.map(valid))))


def test_a_load_file_that_is_a_bomb(tmp_path):
    path = tmp_path / "load.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("load.npy", b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 8), }")
    with pytest.raises(InvalidInputError):
        read_load(str(path))


def safetensors(header: Any, body: int = 64) -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(body)


entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "X9"]) | scalars,
        "shape": st.lists(st.integers(-2, 9) | scalars, max_size=3) | scalars,
        "data_offsets": st.lists(st.integers(-9, 99), min_size=2, max_size=2) | any_json,
    },
)
headers = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), entry | any_json, max_size=3) | any_json


def check_header(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        entries = read_header(path)
    except CheckpointError as error:
        check_line(str(error))
    else:
        for found in entries.values():
            assert 0 <= found.begin <= found.end <= len(data)
            assert all(n >= 0 for n in found.shape)


@FUZZ
@given(headers)
def test_any_header(tmp_path: Path, header: Any) -> None:
    check_header(tmp_path / "model.safetensors", safetensors(header))


@FUZZ
@given(mutated(st.just(safetensors({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}}))) | st.binary(max_size=64))
def test_any_bytes_as_checkpoint(tmp_path: Path, data: bytes) -> None:
    check_header(tmp_path / "model.safetensors", data)


def test_a_header_nested_without_end(tmp_path):
    check_header(tmp_path / "model.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000)


@FUZZ
@given(any_json | st.fixed_dictionaries({"weight_map": any_json | st.dictionaries(st.text(max_size=4), scalars, max_size=3)}))
def test_any_index(tmp_path: Path, index: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        assert read_headers(tmp_path) == {}
    except CheckpointError as error:
        check_line(str(error))

"""`elastic-ep plan` from outside: what it prints can be checked from what it writes, and bad input is one line."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from elastic_ep.cli.main import main

SMALL = ["plan", "--layers", "4", "--experts", "16", "--ranks", "8", "--slots", "40", "--nodes", "2", "--seed", "1"]
KEYS = {"balance", "balance_with_quotas", "bound", "duplicates_on_a_rank", "solve_ms", "repair", "survives", "degraded"}
REPAIR_KEYS = {"lost_experts", "mandatory_moves", "moves", "bytes_moved", "balance", "balance_with_quotas", "solve_ms"}


def answer(capsys, *arguments):
    assert main([*SMALL, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def balance(load, rows, quotas, alive):
    """Recomputed from the written arrays alone; quotas None splits evenly."""
    slots_per_rank = rows.shape[1] // len(alive)
    found = []
    for weight, row, share in zip(load, rows, quotas if quotas is not None else rows, strict=True):
        ranks = [0.0] * len(alive)
        for slot, expert in enumerate(row):
            if expert >= 0:
                part = 1 / (row == expert).sum() if quotas is None else share[slot]
                ranks[slot // slots_per_rank] += weight[expert] * part
        living = np.array(ranks)[alive]
        found.append(living.mean() / living.max())
    return float(np.mean(found))


def test_what_it_prints_follows_from_what_it_writes(capsys, tmp_path):
    out = tmp_path / "placement.npz"
    found = answer(capsys, "--kill", "2", "--drift", "0.1", "--expert-bytes", "1000", "--out", str(out))
    assert set(found) == KEYS
    assert set(found["repair"]) == REPAIR_KEYS
    assert set(found["survives"]) == {"any_ranks", "domains", "expected_lost"}
    arrays = np.load(out)
    rows, quotas, load = arrays["physical_to_logical_map"], arrays["quotas"], arrays["load"]
    everyone = np.ones(8, dtype=bool)
    assert found["balance"] == pytest.approx(balance(load, rows, None, everyone))
    assert found["balance_with_quotas"] == pytest.approx(balance(load, rows, quotas, everyone))
    after, later = arrays["repaired_physical_to_logical_map"], arrays["repaired_load"]
    alive = np.arange(8) != 2
    assert (after[:, 10:15] == -1).all()
    assert found["repair"]["balance"] == pytest.approx(balance(later, after, None, alive))
    assert found["repair"]["balance_with_quotas"] == pytest.approx(balance(later, after, arrays["repaired_quotas"], alive))
    left = np.where(np.repeat(alive, 5), rows, -1)
    lost = sum(16 - len(set(row[row >= 0])) for row in left)
    assert found["repair"]["lost_experts"] == found["repair"]["mandatory_moves"] == lost
    assert found["repair"]["moves"] >= (np.where(after >= 0, after != left, False)).sum() >= lost
    assert found["repair"]["bytes_moved"] == 1000 * found["repair"]["moves"]


def test_the_same_arguments_give_the_same_placement(capsys, tmp_path):
    for name in ("a", "b"):
        answer(capsys, "--out", str(tmp_path / f"{name}.npz"))
    first, second = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert all((first[key] == second[key]).all() for key in first.files)


def test_replicas_on_two_nodes_survive_either(capsys):
    found = answer(capsys, "--min-replicas", "2", "--spread", "node", "--kill", "node=1")
    assert found["survives"]["any_ranks"] == 1
    assert found["survives"]["domains"] == {"rank": True, "node": True}
    assert found["survives"]["expected_lost"]["1"] == 0.0
    assert found["repair"]["lost_experts"] == found["repair"]["mandatory_moves"] == 0
    assert found["degraded"] is None


def test_too_few_slots_is_a_degraded_plan(capsys):
    found = answer(capsys, "--kill", "0,1,2,3,4")
    assert found["degraded"]["missing_slots"] == 1
    assert found["degraded"]["streamed_experts"] == 4
    assert found["repair"]["lost_experts"] > 0


def test_max_moves(capsys):
    found = answer(capsys, "--kill", "3", "--max-moves", "0")
    assert found["repair"]["moves"] == found["repair"]["mandatory_moves"] == found["repair"]["lost_experts"]


def test_text_names_what_matters(capsys):
    assert main([*SMALL, "--kill", "1"]) == 0
    text = capsys.readouterr().out
    for part in ("4 layers x 16 experts, 40 slots on 8 ranks, 2 node domains", "bound", "survives", "after ranks 1 die", "moves", "|"):
        assert part in text


@pytest.mark.parametrize("spec", ["uniform", "lognormal:0.5", "zipf:1.2", "bursty"])
def test_generators(capsys, spec):
    assert answer(capsys, "--load", spec)["balance"] > 0.5


def write_load(path, load):
    if path.suffix == ".json":
        path.write_text(json.dumps({"logical_count": load.tolist()}))
    elif path.suffix == ".npy":
        np.save(path, load)
    elif path.suffix == ".npz":
        np.savez(path, load=load)
    else:
        torch = pytest.importorskip("torch")
        torch.save({"logical_count": torch.from_numpy(load)}, path)


@pytest.mark.parametrize("suffix", [".json", ".npy", ".npz", ".pt"])
def test_load_files(capsys, tmp_path, suffix):
    load = np.random.default_rng(0).integers(1, 100, (3, 2, 12)).astype(float)
    path = tmp_path / f"trace{suffix}"
    write_load(path, load)
    out = tmp_path / "out.npz"
    assert main(["plan", "--ranks", "4", "--load", str(path), "--out", str(out), "--json"]) == 0
    capsys.readouterr()
    np.testing.assert_array_equal(np.load(out)["load"], load.sum(axis=0))


def test_a_json_file_with_a_row_per_layer(capsys, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"10": [3, 1], "9": [1, 2]}))
    assert main(["plan", "--ranks", "2", "--load", str(path), "--out", str(tmp_path / "o.npz"), "--json"]) == 0
    assert np.load(tmp_path / "o.npz")["load"].tolist() == [[1, 2], [3, 1]]


@pytest.mark.parametrize(
    ("shape", "question", "slots", "bytes_per_rank"),
    [
        ("deepseek-v3", "node=1", 512, 16 * 58 * 44_040_192),
        ("qwen3-235b", "ranks=2", 384, 12 * 94 * 37_748_736),
        ("3x10", "rank=1", 32, 1 * 3 * 44_040_192),
    ],
)
def test_what_a_guarantee_takes(capsys, shape, question, slots, bytes_per_rank):
    assert main(["plan", "--model-shape", shape, "--ranks", "32", "--nodes", "4", "--survive", question, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slots"] == slots
    assert found["expert_bytes_per_rank"] == bytes_per_rank
    assert found["survives"]["domains"][found["level"]]
    assert main(["plan", "--model-shape", shape, "--ranks", "32", "--nodes", "4", "--survive", question]) == 0
    assert f"{slots} slots" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks is 0"),
        (["--slots", "41"], "41 physical slots do not divide over 8 ranks; use 40 or 48"),
        (["--nodes", "3"], "8 ranks do not divide over 3 node domains"),
        (["--domain", "rack"], "'rack' is not LEVEL=NUMBER"),
        (["--load", "nothing.npy"], "'nothing.npy' is neither a file nor one of the generators"),
        (["--load", "zipf:steep"], "'steep' is not a number"),
        (["--layers", "0"], "0 layers x 16 experts"),
        (["--kill", "8"], "cannot kill rank '8'; ranks are 0 to 7"),
        (["--kill", "node=5"], "no node is named '5'; there are 0, 1"),
        (["--kill", "0,1,2,3,4,5,6,7"], "leaves nothing to plan"),
        (["--spread", "rack"], "unknown failure domain level 'rack'"),
        (["--min-replicas", "0"], "min_replicas is 0"),
        (["--drift", "-1"], "--drift is -1.0"),
        (["--kill", "1", "--max-moves", "-1"], "max_moves is -1"),
        (["--survive", "node"], "'node' is not LEVEL=NUMBER"),
        (["--survive", "node=2"], "surviving any 2 of the node domains needs 3 of them, there are 2"),
        (["--model-shape", "gpt-9"], "unknown model shape 'gpt-9'"),
        (["--expert-bytes", "0"], "--expert-bytes is 0"),
        (["--out", "x.csv"], "cannot write 'x.csv'; give a name that ends in .npz"),
        (["--out", "/nowhere/at/all/x.npz"], "cannot write '/nowhere/at/all/x.npz'"),
        (["--plot", "x.gif"], "give a name that ends in .png or .svg"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main([*SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot read load file"),
        ("a.json", '{"weights": [[1]]}', "has weights; expected one of"),
        ("a.json", "[[1, -1]]", "layer 0, expert 1 is -1.0"),
        ("a.json", '[["x"]]', "give numbers"),
        ("a.npy", "not an array", "cannot read load file"),
        ("a.npz", "", "cannot read load file"),
        ("a.csv", "1,2", "ends in '.csv'; known are"),
    ],
)
def test_bad_load_files_are_one_line(capsys, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert main(["plan", "--ranks", "2", "--load", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_sizes_must_match_the_load_file(capsys, tmp_path):
    np.save(tmp_path / "load.npy", np.ones((2, 4)))
    assert main(["plan", "--ranks", "2", "--experts", "5", "--load", str(tmp_path / "load.npy")]) == 2
    assert "has 4 experts, not 5" in capsys.readouterr().err


def test_plots_need_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SMALL, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'elastic-ep[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(capsys, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    assert main([*SMALL, "--kill", "1", "--plot", str(tmp_path / f"x.{suffix}")]) == 0
    assert (tmp_path / f"x.{suffix}").stat().st_size > 1000

"""What the smaller commands refuse: one line that names the value and the cure, and status 2."""

from __future__ import annotations

import pytest

from elastic_ep.cli.main import main

HOURS = ["simulate", "--hours", "10"]
SEED = ["simulate", "--seed", "3"]
PLAN = ["plan", "--ranks", "4", "--experts", "8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "/dev/null"], "the history /dev/null is empty, nothing can be judged"),
        (["verify", "--json", "/nowhere"], "cannot read the history /nowhere"),
        ([*SEED, "--ranks", "0"], "--ranks is 0; give 1 to 4096"),
        (["simulate", "--seeds", "0..5", "--processes", "-2"], "--processes is -2; give 1 or more"),
        (["simulate", "--seeds", "0..5", "--trace-events"], "--trace-events shows one schedule; say which by --seed N"),
        ([*HOURS, "--expert-bytes", "0"], "--expert-bytes is 0; give 1 or more"),
        ([*HOURS, "--replace-s", "nan"], "--replace-s is nan; give 0 seconds or more"),
        ([*HOURS, "--detect-s", "inf"], "--detect-s is inf; give 0 seconds or more"),
        ([*HOURS, "--tokens-per-second", "inf"], "--tokens-per-second is inf; give more than 0"),
        ([*PLAN, "--layers", "1", "--load", "lognormal:-1"], "load lognormal:-1; give a parameter of 0 or more"),
        ([*PLAN, "--layers", "1", "--seed", "-1"], "the seed of the load is -1; give 0 or more"),
        ([*PLAN, "--layers", "99999999999"], "99999999999 layers x 8 experts are more than 100000000 loads"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out

"""The judge of histories: each kind of violation, planted, is found under its name; sound histories pass."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from elastic_ep.cli.main import main
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.testing.history import Event, History, Kind, judge, name_difference, parse_line, streams_of

TOKENS = list(range(10, 34))


def sound() -> list[Event]:
    """A fault-free run and a second one of the same request, two tokens at a time; a third client hangs up after eight."""
    events = []
    for request, reference, count in (("ref", True, 24), ("a", False, 24), ("cut", False, 8)):
        events.append(Event(Kind.SENT, 1.0, request, key="k", reference=reference, max_tokens=24))
        for i in range(0, count, 2):
            ids = tuple(TOKENS[i : i + 2])
            events.append(Event(Kind.TOKENS, 2.0 + i, request, token_ids=ids, text=str(ids)))
        end = Event(Kind.FINISHED, 30.0, request, reason="length") if count == 24 else Event(Kind.CANCELLED, 30.0, request)
        events.append(end)
    return [*events, Event(Kind.FAULT, 5.0, reason="kill 0")]


def at(events: list[Event], request: str, kind: Kind, nth: int = 0) -> int:
    return [i for i, e in enumerate(events) if e.request == request and e.kind is kind][nth]


def changed(request: str, which: Kind, nth: int = 0, **values) -> list[Event]:
    events = sound()
    i = at(events, request, which, nth)
    events[i] = replace(events[i], **values)
    return events


def without(request: str, kind: Kind, nth: int = 0) -> list[Event]:
    events = sound()
    del events[at(events, request, kind, nth)]
    return events


def doubled(request: str, kind: Kind, nth: int = 0) -> list[Event]:
    events = sound()
    i = at(events, request, kind, nth)
    return [*events[: i + 1], events[i], *events[i + 1 :]]


def swapped(request: str) -> list[Event]:
    events = sound()
    i, j = at(events, request, Kind.TOKENS, 1), at(events, request, Kind.TOKENS, 2)
    events[i], events[j] = replace(events[j], time=events[i].time), replace(events[i], time=events[j].time)
    return events


PLANTED = {
    "lost token": (without("a", Kind.TOKENS, 3), {"lost_token"}),
    "lost last tokens": (without("a", Kind.TOKENS, 11), {"lost_token"}),
    "lost token of a stream that was cut": (without("cut", Kind.TOKENS, 1), {"lost_token"}),
    "doubled tokens": (doubled("a", Kind.TOKENS, 3), {"duplicated_token", "too_many_tokens"}),
    "doubled tokens of a stream that was cut": (doubled("cut", Kind.TOKENS, 1), {"duplicated_token"}),
    "an extra token": (changed("a", Kind.TOKENS, 5, token_ids=(*TOKENS[10:12], 99)), {"extra_token", "too_many_tokens"}),
    "another token": (changed("a", Kind.TOKENS, 5, token_ids=(99, TOKENS[11])), {"differing_token"}),
    "another token in a stream that was cut": (changed("cut", Kind.TOKENS, 2, token_ids=(99, TOKENS[5])), {"differing_token"}),
    "tokens in another order": (swapped("a"), {"reordered_tokens"}),
    "the same tokens as another text": (changed("a", Kind.TOKENS, 5, text="x"), {"differing_text"}),
    "another finish": (changed("a", Kind.FINISHED, reason="stop"), {"differing_finish"}),
    "a request without end": (without("a", Kind.FINISHED), {"lost_request"}),
    "an aborted request": (changed("a", Kind.FINISHED, kind=Kind.FAILED, reason="no rank is left"), {"failed_request"}),
    "a token after the finish": ([*sound(), Event(Kind.TOKENS, 31.0, "a", token_ids=(7,))], {"token_after_end"}),
    "a token after an error": (
        [*changed("a", Kind.FINISHED, kind=Kind.FAILED), Event(Kind.TOKENS, 31.0, "a", token_ids=(7,))],
        {"failed_request", "token_after_end"},
    ),
    "two ends": (doubled("a", Kind.FINISHED), {"second_end"}),
    "an error after the finish": ([*sound(), Event(Kind.FAILED, 31.0, "a", reason="late")], {"second_end"}),
    "too many tokens in both runs": (
        [replace(e, max_tokens=23) if e.kind is Kind.SENT and e.request == "a" else e for e in sound()],
        {"too_many_tokens"},
    ),
    "no fault-free run": (changed("ref", Kind.SENT, reference=False), {"no_reference"}),
    "a clock that goes back": (changed("a", Kind.TOKENS, 5, time=1.5), {"time_backwards"}),
    "two fault-free runs that differ": (
        [replace(e, reference=True) if e.request == "a" else e for e in changed("a", Kind.TOKENS, 5, token_ids=(99, 21))],
        {"differing_token"},
    ),
}


def test_a_sound_history_has_no_violation():
    verdict = judge(sound())
    assert verdict.violations == []
    assert (verdict.requests, verdict.references, verdict.checked, verdict.cancelled, verdict.faults) == (3, 1, 2, 1, 1)
    assert verdict.tokens == 24 + 24 + 8
    assert verdict.longest_gap_s == 2.0


@pytest.mark.parametrize("name", PLANTED)
def test_planted_violations_are_found(name):
    events, names = PLANTED[name]
    assert set(judge(events).counts) == names


def test_a_refusal_before_the_first_token_is_no_violation():
    events = [*sound(), Event(Kind.SENT, 3.0, "r", key="other"), Event(Kind.REFUSED, 3.1, "r", reason="429")]
    assert judge(events).violations == []


def test_any_random_damage_is_seen():
    """Drop, double or change one token anywhere, or cut the stream: never silent."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        expected = [rng.randrange(6) for _ in range(rng.randint(2, 30))]
        got = list(expected)
        i = rng.randrange(len(got))
        damage = rng.choice(("drop", "double", "change", "cut"))
        match damage:
            case "drop":
                del got[i]
            case "double":
                got.insert(i, got[i])
            case "change":
                got[i] += 1 + rng.randrange(5)
            case "cut":
                del got[i:]
        name = name_difference(got, expected, whole=True)
        allowed = {"drop": {"lost_token"}, "cut": {"lost_token"}, "double": {"duplicated_token"}, "change": {"differing_token"}}
        assert name in allowed[damage], (damage, got, expected)


def test_lines_there_and_back():
    lines: list[str] = []
    history = History(lines.append)
    for event in sound():
        history.note(event)
    assert [parse_line(line, i) for i, line in enumerate(lines)] == sound()


@pytest.mark.parametrize("line", ["x", "[]", "{}", '{"event":"sent"}', '{"event":"eaten","time":1}', '{"event":"sent","time":1,"huh":2}'])
def test_a_line_that_is_no_event_is_named(line):
    with pytest.raises(InvalidInputError, match="line 7"):
        parse_line(line, 7)


def test_events_that_cannot_be():
    with pytest.raises(InvalidInputError, match="never sent"):
        streams_of([Event(Kind.TOKENS, 1.0, "a", token_ids=(1,))])
    with pytest.raises(InvalidInputError, match="second time"):
        streams_of([Event(Kind.SENT, 1.0, "a"), Event(Kind.SENT, 1.0, "a")])


def test_verify_command(tmp_path, capsys):
    file = tmp_path / "history.jsonl"
    file.write_text("".join(e.as_line() + "\n" for e in sound()))
    assert main(["verify", str(file)]) == 0
    assert "no violation" in capsys.readouterr().out
    file.write_text("".join(e.as_line() + "\n" for e in PLANTED["doubled tokens"][0]))
    assert main(["verify", str(file)]) == 1
    assert "duplicated_token: request a" in capsys.readouterr().out
    assert main(["verify", str(file), "--json"]) == 1
    assert '"ok": false' in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "cannot read" in capsys.readouterr().err

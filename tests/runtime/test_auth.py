"""Both ends of a control connection prove the token; nobody sends it."""

from __future__ import annotations

import socket
import threading

import pytest

from elastic_ep.runtime.control.auth import (
    ANSWER_BYTES,
    CHALLENGE_BYTES,
    VERDICT_BYTES,
    AuthError,
    Role,
    derive_token,
    judge_answer,
    make_challenge,
    prove,
)

TOKEN = "a token of some length"
TOKENS = {Role.AGENT: TOKEN, Role.RANK: derive_token(TOKEN, "run 1")}


def meet(token: str, role: Role, listener_tokens: dict[Role, str], spoil: bool = False) -> tuple[Role | None, AuthError | None, bytes]:
    """(who the listener takes the caller for, what the caller says, every byte that went over the wire)."""
    ours, theirs = socket.socketpair()
    failure: list[AuthError] = []

    def call() -> None:
        try:
            prove(theirs, token, role)
        except AuthError as error:
            failure.append(error)

    caller = threading.Thread(target=call)
    with ours, theirs:
        ours.settimeout(5)
        theirs.settimeout(5)
        caller.start()
        challenge = make_challenge()
        ours.sendall(challenge)
        answer = ours.recv(ANSWER_BYTES)
        who, verdict = judge_answer(challenge, answer, listener_tokens)
        assert len(verdict) == VERDICT_BYTES
        if spoil:
            verdict = verdict[:1] + bytes(len(verdict) - 1)
        ours.sendall(verdict)
        caller.join()
    return who, failure[0] if failure else None, challenge + answer + verdict


@pytest.mark.parametrize("role", list(Role))
def test_the_right_token_opens(role):
    who, error, said = meet(TOKENS[role], role, TOKENS)
    assert (who, error) == (role, None)
    assert TOKENS[role].encode() not in said


def test_a_wrong_token_is_refused_in_words():
    who, error, _ = meet("another token", Role.AGENT, TOKENS)
    assert who is None
    assert "refused this token" in str(error)


def test_a_rank_of_another_run_is_refused():
    who, error, _ = meet(derive_token(TOKEN, "run 2"), Role.RANK, TOKENS)
    assert who is None
    assert error is not None


def test_the_operators_token_does_not_make_a_rank():
    assert meet(TOKEN, Role.RANK, TOKENS)[0] is None


def test_a_listener_that_does_not_know_the_token_is_found_out():
    _, error, _ = meet(TOKEN, Role.AGENT, TOKENS, spoil=True)
    assert "does not know the token" in str(error)


def test_an_answer_is_good_for_one_challenge():
    _, _, said = meet(TOKEN, Role.AGENT, TOKENS)
    challenge, answer = said[:CHALLENGE_BYTES], said[CHALLENGE_BYTES : CHALLENGE_BYTES + ANSWER_BYTES]
    assert judge_answer(challenge, answer, TOKENS)[0] is Role.AGENT
    assert judge_answer(make_challenge(), answer, TOKENS)[0] is None


def test_something_else_that_listens_is_named():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\nwhatever else it says")
        with pytest.raises(AuthError, match="no elastic-ep controller"):
            prove(theirs, TOKEN, Role.AGENT)

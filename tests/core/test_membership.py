"""One record per epoch: who is a member, and that nobody can edit it."""

from __future__ import annotations

import dataclasses

import pytest

from elastic_ep.core.membership import Membership


def test_who_is_a_member():
    membership = Membership(7, (1, 0, 1))
    assert membership.ep_size == 3
    assert membership.ranks == (0, 2)
    assert [rank for rank in range(-3, 6) if membership.is_active(rank)] == [0, 2], "a rank without an entry is no member"


def test_all_are_members_at_first():
    assert Membership.all_active(2) == Membership(0, (1, 1))


def test_an_epoch_is_not_edited():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Membership.all_active(2).epoch = 1  # type: ignore[misc]

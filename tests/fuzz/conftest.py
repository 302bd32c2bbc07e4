"""Registers the profile of `make fuzz` before it is asked for."""

from tests.fuzz import bytes  # noqa: F401

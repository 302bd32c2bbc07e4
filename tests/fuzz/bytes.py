"""What the fuzz tests share: bytes that are almost right, and how often to try."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# `make fuzz` tries longer
settings.register_profile("long", max_examples=3000)
EXAMPLES = max(40, settings().max_examples - 100)
FUZZ = settings(
    max_examples=EXAMPLES,
    phases=(Phase.generate,),
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)


@st.composite
def mutated(draw: Any, valid: st.SearchStrategy[bytes]) -> bytes:
    """Valid bytes with a few changed, cut out, put in or cut off."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("change", "cut", "insert", "end"))):
            case "change" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 16))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "end":
                del data[at:]
    return bytes(data)


@st.composite
def pieces(draw: Any, data: st.SearchStrategy[bytes]) -> list[bytes]:
    """Bytes as a stream hands them over: in pieces of any size."""
    rest = draw(data)
    out = []
    while rest:
        count = draw(st.integers(1, len(rest)))
        out.append(rest[:count])
        rest = rest[count:]
    return out


def check_line(message: str) -> None:
    """An error is for people: one line that says something."""
    assert message
    assert "\n" not in message

"""What an error says can be written anywhere."""

from __future__ import annotations

from flagscale.errors import DataError


def test_what_was_found_may_hold_half_a_character() -> None:
    error = DataError("not a number", where="--seed", got="\ud800")
    assert str(error).encode().decode().splitlines()[-1] == r"  got:      \ud800"

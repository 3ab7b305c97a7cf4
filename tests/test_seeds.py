"""Seeds: every part matters, and so does its place."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv.seeds import generator, mix

PARTS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4)


@settings(derandomize=True, deadline=None)
@given(PARTS, PARTS)
def test_different_parts_give_different_seeds(left: list[int], right: list[int]) -> None:
    assert (mix(*left) == mix(*right)) == (left == right)
    assert 0 <= mix(*left) < 2**63


def test_a_generator_repeats() -> None:
    draws = [torch.rand(3, generator=generator("cpu", 1, step)) for step in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])

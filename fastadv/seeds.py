"""Randomness as a function of (seed, epoch, sample or step), never of a stream: nothing to save, nothing to lose."""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """A 63-bit seed from integers; every part and its place matters. Source: the SplitMix64 finaliser (Steele 2014)."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator(device: torch.device | str, *parts: int) -> torch.Generator:
    """A generator on ``device`` seeded with ``mix(*parts)``."""
    return torch.Generator(device).manual_seed(mix(*parts))

"""What every part of the GPU check is told."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Device, size and time of a part."""

    device: str = "cuda"
    tiny: bool = False
    """The dry run: shapes and models so small that a CPU takes seconds."""
    deadline: float = float("inf")
    """By time.time(): the parts are processes of their own."""

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

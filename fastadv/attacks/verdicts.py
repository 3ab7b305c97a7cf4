"""What AutoAttack found, and the same as the state file of the published code.

Shapes: adv (n, C, H, W) float32; robust, broken_by (n,).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

# In ``broken_by``: misclassified without an attack, and never broken.
CLEAN_WRONG, SURVIVED = -1, 100


class Verdicts(NamedTuple):
    """What AutoAttack found, per image."""

    adv: Tensor
    """The image that broke it; x where none did, or none was needed."""
    robust: Tensor
    """Whether the model is right on x and on everything tried, bool (n,)."""
    broken_by: Tensor
    """The place in ``stages`` of the one that broke it, -1: the model is wrong about x, 100: survived; int8 (n,)."""
    stages: tuple[str, ...]
    """Names of the stages that ran, in order."""
    seconds: tuple[float, ...]
    """Of each stage, added up over batches, processes and starts."""
    notes: list[str]
    """Signs that the numbers mislead, and how the stages differ from the published ones."""

    def accuracy(self, num_stages: int | None = None) -> float:
        """The share of images that survived the first ``num_stages`` stages: 0 gives clean, None robust accuracy."""
        num = len(self.stages) if num_stages is None else num_stages
        return int((self.broken_by >= num).sum()) / max(1, len(self.broken_by))


def export_state(verdicts: Verdicts, path: Path, attacks: Sequence[str] | None = None) -> None:
    """Write the verdicts to ``path`` as the published code (pyautoattack 0.2.0) writes its state: one JSON object.

    attacks: what was to run, if that is more than what did because nothing survived. Only verdicts and clean accuracy
    are in that format, neither images nor stages. Written to a temporary neighbour, then renamed.
    """
    path = Path(path)
    # As json.dump(default=str) renders a set there, but sorted.
    names = "{" + ", ".join(map(repr, sorted(attacks or verdicts.stages))) + "}"
    state = {
        "_attacks_to_run": names,
        "path": str(path),
        "_run_attacks": list(verdicts.stages),
        "_robust_flags": verdicts.robust.tolist(),
        "_last_saved": str(datetime.now()),
        "_SAVE_TIMEOUT": 60,
        "_clean_accuracy": verdicts.accuracy(0),
    }
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(state))
    os.replace(temporary, path)

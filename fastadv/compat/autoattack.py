"""AutoAttack's class (fra31/auto-attack), on our own AutoAttack.

Shapes: x_orig (B, C, H, W) float32; y_orig (B,) int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fastadv.errors import SettingsError
from fastadv.passes import untouched
from fastadv.registry import did_you_mean
from fastadv.threat import Norm, ThreatModel

if TYPE_CHECKING:
    from fastadv.attacks.verdicts import Verdicts

_NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2"}


class AutoAttack:
    """AutoAttack's class, on :mod:`fastadv.attacks.autoattack`; ``norm`` is Linf or L2.

    Different on purpose: seed None means 0, so that a number can be had again; the model's device is the one used,
    whatever ``device`` says. mode "parity" repeats the original step for step, "fast" drops finished images. What broke
    each image of the last run is in ``verdicts``.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: Literal["standard", "plus", "rand"] = "standard",
        is_tf_model: bool = False,
        device: torch.device | str | None = None,
        log_path: str | Path | None = None,
        *,
        mode: Literal["fast", "parity"] = "fast",
    ) -> None:
        if norm not in _NORMS:
            raise SettingsError(f"unknown norm {norm!r}", did_you_mean(norm, _NORMS))
        if attacks_to_run or is_tf_model:
            raise SettingsError(
                "attacks_to_run and is_tf_model are not known here", "call APGD, FAB and Square of fastadv.attacks"
            )
        self.model, self.norm, self.epsilon, self.seed, self.verbose = model, norm, eps, seed, verbose
        self.version, self.mode, self.log_path = version, mode, log_path
        self.verdicts: Verdicts | None = None

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The images, like ``x_orig`` and clean where nothing was found; with ``return_labels`` and their predictions.

        ``state_path``: where to keep what is done, and to go on from.
        """
        from fastadv.attacks import autoattack

        attack = autoattack.AutoAttack(version=self.version, mode=self.mode, seed=self.seed or 0, batch_size=bs)
        threat, state = ThreatModel(_NORMS[self.norm], self.epsilon), None if state_path is None else Path(state_path)
        verdicts = attack.run(self.model, x_orig, y_orig, threat, state=state, progress=self._say)
        self.verdicts = verdicts
        for note in verdicts.notes:
            self._say(f"note: {note}")
        if not return_labels:
            return verdicts.adv
        device = next((tensor.device for tensor in self.model.parameters()), x_orig.device)
        with untouched(self.model), torch.no_grad():
            guesses = [self.model(part.to(device)).argmax(1) for part in verdicts.adv.split(bs)]
        return verdicts.adv, torch.cat(guesses).to(y_orig.device)

    def _say(self, line: str) -> None:
        if self.verbose:
            print(line)
        if self.log_path is not None:
            with Path(self.log_path).open("a") as log:
                log.write(f"{line}\n")

"""Square: a random search that needs only logits. It recolours one square per query and keeps what raises the margin.

Shapes: x, adv (B, C, H, W) float32; y, index, success, loss (B,).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastadv.attacks.ledger import Ledger
from fastadv.attacks.member import Member
from fastadv.attacks.recolouring import Search
from fastadv.errors import DataError, SettingsError
from fastadv.losses import AttackLoss, margin
from fastadv.passes import Passes
from fastadv.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Square(Member):
    """The settings of Square as a value that is itself the attack, ``(model, x, y, threat) -> adv``.

    All images are asked about the same squares. mode="fast": squares and colours are a function of (seed, restart,
    query), the first stripes of an image also of its number; images leave when they are broken. mode="parity": the
    published code's random numbers, batches and roundings. Source: Andriushchenko et al., arXiv:1912.00049, algorithms
    1 to 3, with the margin loss; parity: pyautoattack 0.2.0 without rescaling the schedule, as AutoAttack uses it.
    """

    queries: int = 5000
    """Images shown to the model in each run, after the stripes it starts from."""
    p_init: float = 0.8
    """Share of the image that the first squares cover. It is halved after 10, 50, 200, 500, ... queries."""
    restarts: int = 1
    """Runs, for the images not broken before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("queries", "restarts")
        if not 0 < self.p_init <= 1:
            raise SettingsError(f"p_init is {self.p_init}", "give a share above 0, at most 1, as in p_init=0.8")

    def _objective(self) -> AttackLoss:
        return margin

    def _attack(self, passes: Passes, ledger: Ledger, threat: ThreatModel) -> None:
        if threat.norm == "l2" and min(ledger.x.shape[2:]) < 5:
            raise DataError(f"x has shape {tuple(ledger.x.shape)}", "Square in l2 tiles images of 5x5 pixels or more")
        Search(self, passes, threat, ledger).go()

"""FAB: the nearest image of another class, found by projections onto the linearised boundary.

Shapes: x, adv (B, C, H, W) float32; y, index, success, loss (B,).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastadv.attacks.ledger import Ledger
from fastadv.attacks.member import Member
from fastadv.attacks.nearest import Search, advantage
from fastadv.errors import SettingsError
from fastadv.losses import AttackLoss
from fastadv.passes import Passes
from fastadv.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class FAB(Member):
    """The settings of FAB as a value that is itself the attack, ``(model, x, y, threat) -> adv``.

    It looks for the nearest image of another class, whatever the radius, and succeeds where that is inside the ball.
    mode="fast": one pass through the model and back per step; an image leaves when one inside the ball is found; the
    nearest image found is drawn into the ball at the end of a run, which may fool the model too; noise is a function of
    (seed, the image's number, run). mode="parity": the published code's random numbers, batches and roundings.
    Source: Croce and Hein, arXiv:1907.02044; parity: pyautoattack 0.2.0.
    """

    targeted: bool = True
    """One run for each of the likeliest other classes; else runs towards whichever boundary seems nearest."""
    steps: int = 100
    """Projections of a run."""
    restarts: int = 1
    """Runs, all but the first from a random start, for the images not broken before; targeted: for each class."""
    targets: int = 9
    """Classes a targeted attack tries, the likeliest first; at most all but y."""
    alpha_max: float = 0.1
    """The largest share of the projection of x itself in a step."""
    eta: float = 1.05
    """How far a projection goes: 1 ends on the boundary."""
    beta: float = 0.9
    """An iterate that fools the model is drawn back to this share of its distance from x."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("steps", "restarts", "targets")
        for name, most in (("alpha_max", 1), ("eta", 2), ("beta", 1)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise SettingsError(f"{name} is {value}", f"give a number between 0 and {most}")

    def _objective(self) -> AttackLoss:
        return advantage

    def _attack(self, passes: Passes, ledger: Ledger, threat: ThreatModel) -> None:
        Search(self, passes, threat, ledger).go()

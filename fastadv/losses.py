"""One function per loss. Attack losses give one value per image, (B,); training losses give a scalar to minimise.

Shapes: logits (B, classes) float32; x (B, C, H, W) in [0, 1]; y (B,) int64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.errors import SettingsError

Forward = Callable[[Tensor], Tensor]
AttackLoss = Callable[[Tensor, Tensor], Tensor]
TrainingLoss = Callable[[Forward, Tensor, Tensor, AttackLoss], Tensor]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest logit of the other classes minus that of class y, (B,): positive where the model is wrong.

    Source: Carlini and Wagner, arXiv:1608.04644, section V-A, f6 without its constant.
    """
    return _others(logits, y).amax(1) - _own(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The margin divided by the gap between the first and the third largest logit, (B,). Needs three classes.

    Unchanged when the logits are shifted or scaled. Source: Croce and Hein, arXiv:2003.01690, equation 6.
    """
    if logits.shape[1] < 3:
        raise SettingsError(
            f"loss is 'dlr', but the model has {logits.shape[1]} classes", "use loss='margin': dlr needs three"
        )
    ranked = logits.sort(1, descending=True).values
    # The published code's constant: it keeps three equal logits from dividing by zero.
    return margin(logits, y) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


ATTACK_LOSSES: dict[str, AttackLoss] = {"ce": ce, "dlr": dlr, "margin": margin}


def attack_loss(loss: str | AttackLoss) -> AttackLoss:
    """The loss of that name, or the function itself; raises SettingsError when it gives no value per image."""
    if not callable(loss):
        return ATTACK_LOSSES[loss]

    def checked(logits: Tensor, y: Tensor) -> Tensor:
        values = loss(logits, y)
        if values.shape != y.shape:
            raise SettingsError(
                f"the loss gives shape {tuple(values.shape)} for {len(y)} images",
                'give one value per image: reduction="none"',
            )
        return values.float()

    return checked


def ce_seed(logits: Tensor, y: Tensor) -> Tensor:
    """The gradient of cross-entropy with respect to the logits, divided by 1 - p_y, (B, classes).

    That is the softmax over the other classes, and -1 at y: the direction of cross-entropy for every image, of a length
    that does not fade when the model is sure, so it needs neither loss scaling nor a mean.
    """
    return _others(logits, y).softmax(1).scatter(1, y[:, None], -1.0)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each image is not given class y, bool (B,). Logits with NaN among them count as wrong."""
    # argmax answers with the place of a NaN, which may be y itself.
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def adversarial_ce(forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy on the images ``attack(x, y)`` makes of ``x``, a scalar.

    Source: Madry et al., arXiv:1706.06083, equation 2.1, the outer minimum.
    """
    return clean_ce(forward, attack(x, y), y, attack, label_smoothing)


def clean_ce(forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy on ``x`` itself, a scalar; the attack is not called."""
    return F.cross_entropy(forward(x).float(), y, label_smoothing=label_smoothing)


def _own(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    """The logits with minus infinity at y."""
    return logits.scatter(1, y[:, None], -torch.inf)

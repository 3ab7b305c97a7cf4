"""One function per loss. Attack losses give one value per image, (B,); training losses give a scalar to minimise.

Shapes: logits (B, classes) float32; x (B, C, H, W) in [0, 1]; y (B,) int64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.errors import SettingsError
from fastadv.registry import did_you_mean

Forward = Callable[[Tensor], Tensor]
AttackLoss = Callable[[Tensor, Tensor], Tensor]
TrainingLoss = Callable[[Forward, Tensor, Tensor, AttackLoss], Tensor]

# The weight of the term beside cross-entropy: arXiv:1901.08573 (1 / lambda = 6) and MART's lambda.
BETAS = {"trades": 6.0, "mart": 5.0}


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


def trades(
    forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss, label_smoothing: float = 0.0, beta: float = 6.0
) -> Tensor:
    """Cross-entropy on ``x`` plus ``beta`` times how far the attack moves the answers, a scalar: KL(clean || adv).

    The paper's attack raises that divergence; here it is the recipe's, which raises the cross-entropy. A divergence
    would tie every step of the attack to the clean logits of its batch, which a recorded attack does not have.
    Source: Zhang et al., arXiv:1901.08573, equation 5 and algorithm 1.
    """
    adv = attack(x, y)
    clean = forward(x)
    moved = divergence(clean, forward(adv)).mean()
    return F.cross_entropy(clean, y, label_smoothing=label_smoothing) + beta * moved


def mart(forward: Forward, x: Tensor, y: Tensor, attack: AttackLoss, beta: float = 5.0) -> Tensor:
    """Cross-entropy and margin on adversarial images plus ``beta`` times KL(clean || adv), a scalar.

    The divergence counts by the probability that the clean image gives to the other classes.
    Source: Wang et al., Improving adversarial robustness requires revisiting misclassified examples, ICLR 2020
    (openreview.net rklOg6EFwS); the attack raises the cross-entropy there too.
    """
    adv = attack(x, y)
    clean, logits = forward(x), forward(adv)
    rival = _others(logits, y).argmax(1)
    # log(1 - p) of the strongest other class as the share of all classes but it: finite also where p rounds to 1.
    room = _others(logits, rival).logsumexp(1) - logits.logsumexp(1)
    doubt = 1 - _own(clean.softmax(1), y)
    return (ce(logits, y) - room + beta * doubt * divergence(clean, logits)).mean()


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(others)) of each image, (B,)."""
    return F.kl_div(others.log_softmax(1), logits.log_softmax(1), reduction="none", log_target=True).sum(1)


def training_loss(name: str, beta: float | None = None, label_smoothing: float = 0.0) -> TrainingLoss:
    """The training loss of that name: at (adversarial cross-entropy), trades or mart.

    ``beta`` None is the published one. Raises SettingsError for an unknown name, for at with a beta, which it has no
    use for, and for mart with label smoothing, which its margin has no meaning for.
    """
    if name == "at":
        if beta is not None:
            raise SettingsError(f"beta is {beta} with loss at", f"--loss {'|'.join(BETAS)}, or drop --beta")
        return partial(adversarial_ce, label_smoothing=label_smoothing)
    if name not in BETAS:
        raise SettingsError(f"unknown loss {name!r}", did_you_mean(name, ("at", *BETAS)))
    beta = BETAS[name] if beta is None else beta
    if name == "trades":
        return partial(trades, label_smoothing=label_smoothing, beta=beta)
    if label_smoothing:
        raise SettingsError(
            f"label_smoothing is {label_smoothing} with loss mart", "--label-smoothing 0, or --loss trades"
        )
    return partial(mart, beta=beta)


def _own(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    """The logits with minus infinity at y."""
    return logits.scatter(1, y[:, None], -torch.inf)

"""Is the robust accuracy true? Twelve questions to ask before believing it, most of them after arXiv:1802.00420.

A defence that hides its gradient looks robust to an attack that follows it. :func:`check` looks for the traces that
this leaves. Gradients here are those of plain float32 cross-entropy, not of the seed that fast attacks start from: the
seed cannot fade, and would hide saturated logits.

Shapes: x, adv (B, C, H, W) float32; y (B,) int64; logits (B, classes) float32; right, bad (B,).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastadv.errors import NonFiniteGradientError, SettingsError
from fastadv.findings import ALARM, Finding, beaten, beats, judged, tail
from fastadv.inputs import check_inputs
from fastadv.losses import ce, misclassified
from fastadv.passes import Passes
from fastadv.pgd import PGD
from fastadv.seeds import generator, mix
from fastadv.threat import ThreatModel

__all__ = ["NAMES", "Finding", "check"]

NAMES = (
    "labels",
    "clean accuracy",
    "logits",
    "randomness",
    "gradients",
    "saturation",
    "finite",
    "eps 0",
    "more steps",
    "unbounded eps",
    "transfer",
    "black box",
)
# Rounding in another order moves logits by 1e-6 of their length.
REPEATABLE = 1e-4
# Steps, and their length as a share of the widest radius, of attacks that may change every pixel at will. The first
# breaks all images of a sound model; the others are for what it leaves.
UNBOUNDED = ((10, 1 / 8), (20, 1 / 32), (10, 1 / 4))
# Black-box queries for each of so many survivors.
QUERIES, QUERIED = 200, 50
BATCH = 64


def check(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    attack: PGD | None = None,
    standard: nn.Module | None = None,
    seed: int = 0,
) -> list[Finding]:
    """One finding for each of ``NAMES``, in their order. Model and global random stream are left as they were.

    x: float32 (B, C, H, W) in the threat's box; y: int64 (B,). A hundred images are enough, ten say little.
    attack: the one whose number is to be believed, by default ten steps of a quarter of eps from a random start.
    standard: an undefended model with the same classes, whose adversarial images are then tried on ``model``.

    Cost per image with ten steps: 40 forward and 32 backward passes; 11 and 10 more with ``standard``; 31 and 30 more
    for images that an unbounded attack cannot break; 200 forward passes for each of the first 50 survivors.

    Raises: SettingsError or DataError for what is no classifier, no images or no labels.
    """
    x, y, *_ = check_inputs(x, y, threat, None, None)
    passes = Passes(model, ce, "eval", 0)
    # A defence may draw from the global stream; it then draws the same at every check of one seed.
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []), passes.opened(x.device):
        torch.manual_seed(mix(seed))
        logits = _batched(passes.score, x)
        first = _labels(logits, y), _clean_accuracy(logits, y), _logits(logits), _randomness(passes, x, logits)
        found = {finding.name: finding for finding in first}
        right = ~misclassified(logits, y)
        why = "no image is classified right, so there is nothing to attack"
        if right.any():
            why = "the loss is not finite, so an attack shows nothing"
            subject = _Subject(passes, x[right], y[right], logits[right], threat, attack, seed)
            try:
                for finding in subject.findings(standard):
                    found[finding.name] = finding
            except NonFiniteGradientError as error:
                found["finite"] = Finding("finite", False, f"The attack was stopped ({error.what}).")
    return [found.get(name, Finding(name, None, f"Not tried: {why}.")) for name in NAMES]


def _labels(logits: Tensor, y: Tensor) -> Finding:
    """Labels are classes of the model, and in its order: no renaming of classes would make far more images right."""
    n, classes, last = len(y), logits.shape[1], int(y.max())
    if last >= classes:
        return Finding("labels", False, f"y holds the label {last}, but the model has {classes} classes.")
    guess, each = logits.argmax(1), torch.arange(n, device=y.device)
    # Each image is renamed by what the others say its guess means; with nothing said, the guess stands.
    counts = torch.zeros(classes, classes, device=y.device).index_put_(
        (guess, y), torch.ones((), device=y.device), True
    )
    votes = counts[guess]
    votes[each, y] -= 1
    votes[each, guess] += 0.5
    own, renamed = guess == y, votes.argmax(1) == y
    told = f"{int(own.sum())} of {n} images are right, and {int(renamed.sum())} would be after renaming the classes"
    return judged("labels", not beats(renamed, own), told, "The labels follow another order of classes")


def _clean_accuracy(logits: Tensor, y: Tensor) -> Finding:
    """More images are right than by always naming the most frequent label."""
    n, hits, most = len(y), int((~misclassified(logits, y)).sum()), int(y.bincount().max())
    told = f"{hits} of {n} clean images are right, {most} would be by always naming the most frequent label"
    if tail(n, n, most / n) >= ALARM:
        return Finding("clean accuracy", None, f"Too few images or labels to tell from chance: {told}.")
    return judged("clean accuracy", tail(hits, n, most / n) < ALARM, told, "This is no better than chance")


def _logits(logits: Tensor) -> Finding:
    """The outputs are not probabilities: cross-entropy would take the softmax of a softmax, and its gradient fades."""
    low, high, off = float(logits.min()), float(logits.max()), float((logits.sum(1) - 1).abs().max())
    told = f"outputs reach from {low:.3g} to {high:.3g}, and their sums are up to {off:.2g} from 1"
    trouble = "These are probabilities, and the model is to be attacked without its softmax"
    return judged("logits", not (low >= 0 and off < 1e-4), told, trouble)


def _randomness(passes: Passes, x: Tensor, logits: Tensor) -> Finding:
    """The same images get the same logits three times."""
    lengths = logits.norm(dim=1).clamp_min(1e-12)
    apart = [((_batched(passes.score, x) - logits).norm(dim=1) / lengths).nan_to_num(0).max() for _ in range(2)]
    told = f"the same images gave logits up to {float(max(apart)):.1e} of their length apart in three passes"
    trouble = "The model is random, and the average of many passes is to be attacked (EOT)"
    return judged("randomness", float(max(apart)) <= REPEATABLE, told, trouble)


class _Subject:
    """A model and the images it gets right, under attack."""

    def __init__(
        self, passes: Passes, x: Tensor, y: Tensor, logits: Tensor, threat: ThreatModel, attack: PGD | None, seed: int
    ) -> None:
        self.passes, self.x, self.y, self.logits, self.threat, self.seed = passes, x, y, logits, threat, seed
        self.n, self.bad = len(x), torch.zeros(len(x), dtype=torch.int32, device=x.device)
        self.given, self.attack = attack, attack or PGD(step_size=threat.eps / 4, keep="success")
        try:
            passes.gradient(x[:1], y[:1])
            self.differentiable = True
        except SettingsError:
            self.differentiable = False

    def findings(self, standard: nn.Module | None) -> Iterator[Finding]:
        """What the attacks say, cheap ones first. Ends early where the loss is not finite."""
        _, grad = self.gradient(self.x, self.y)
        yield self.gradients(grad)
        yield self.saturation()
        steps, size = self.attack.steps, self.attack.step_size
        path = self.climb(
            torch.arange(self.n, device=self.x.device), self.threat, 2 * steps, size, self.attack.random_start
        )
        yield self.finite()
        if self.bad.any():
            return
        yield self.eps_0()
        single = self.x.clone()
        self.threat.ascend(single, grad, self.x, self.threat.eps)
        yield self.more_steps(path, ~misclassified(_batched(self.passes.score, single), self.y))
        yield self.unbounded()
        survived = path.all(0)
        if self.given and self.differentiable:
            survived = ~self.given.run(self.passes.model, self.x, self.y, self.threat, generator=self.noise(3)).success
        yield self.transfer(standard, survived)
        yield self.black_box(survived)

    def noise(self, number: int) -> torch.Generator:
        return generator(self.x.device, self.seed, number)

    def gradient(self, adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and gradient of plain cross-entropy at ``adv``; zeros for a model that gives none."""
        if not self.differentiable:
            return _batched(self.passes.score, adv), torch.zeros_like(adv)
        parts = [self.passes.gradient(*part) for part in zip(adv.split(BATCH), y.split(BATCH), strict=True)]
        return torch.cat([logits for logits, _ in parts]), torch.cat([grad for _, grad in parts])

    def climb(self, rows: Tensor, threat: ThreatModel, steps: int, step_size: float, random_start: bool) -> Tensor:
        """Which images of ``rows`` are right at each iterate of the plain ascent, bool (steps + 1, rows)."""
        x, y, bad, right = self.x[rows], self.y[rows], self.bad[rows], []
        adv = threat.random_start(x, None, self.noise(0)) if random_start else x.clone()
        for _ in range(steps):
            logits, grad = self.gradient(adv, y)
            threat.ascend(adv, grad, x, step_size, nonfinite=bad)
            bad |= ~logits.isfinite().all(1)
            right.append(~misclassified(logits, y))
        right.append(~misclassified(_batched(self.passes.score, adv), y))
        self.bad[rows] = bad
        return torch.stack(right)

    def gradients(self, grad: Tensor) -> Finding:
        """Every image has a gradient to follow: one without counts as robust whatever its class."""
        if not self.differentiable:
            return Finding("gradients", False, "The gradient is masked: the logits have none with respect to x.")
        zero = int((grad.flatten(1).abs().amax(1) == 0).sum())
        told = f"{zero} of {self.n} images have a gradient of exactly zero"
        return judged("gradients", not zero, told, "The gradient is masked, and no attack can follow it")

    def saturation(self) -> Finding:
        """Cross-entropy has a gradient with respect to the logits: float32 loses it where they lie about 100 apart."""
        others = self.logits.softmax(1).scatter(1, self.y[:, None], 0.0)
        lost, zero = int((others.amax(1) == 0).sum()), int((ce(self.logits, self.y) == 0).sum())
        told = f"cross-entropy is exactly 0 on {zero} of {self.n} images and its gradient on {lost}"
        return judged("saturation", not lost, told, "The logits are saturated, and loss='margin' or 'dlr' needed")

    def finite(self) -> Finding:
        """No NaN and no infinity among logits, losses and gradients on the way of an attack."""
        bad = int(self.bad.sum())
        told = f"{bad} of {self.n} images met NaN or infinity on {2 * self.attack.steps} steps of ascent"
        return judged("finite", not bad, told, "The loss surface has holes")

    def eps_0(self) -> Finding:
        """A ball of radius 0 holds x alone: nothing changes and nobody is fooled."""
        steps = min(1, self.attack.steps) if self.differentiable else 0
        attack = dataclasses.replace(self.attack, steps=steps, step_size=0.0)
        nothing = dataclasses.replace(self.threat, eps=0.0)
        adv, fooled, _ = attack.run(self.passes.model, self.x, self.y, nothing, generator=self.noise(1))
        changed = int((adv != self.x).flatten(1).any(1).sum())
        told = f"at eps 0 the attack changes {changed} and fools {int(fooled.sum())} of {self.n} images"
        return judged("eps 0", not changed and not fooled.any(), told, "Something else than the attack is counted")

    def more_steps(self, path: Tensor, single: Tensor) -> Finding:
        """Twice the steps leave no more images right than the steps, and those no more than one step of length eps."""
        steps, few, many = self.attack.steps, path[self.attack.steps], path[-1]
        told = (
            f"{int(single.sum())} of {self.n} images are right after one step of length eps, {int(few.sum())} after "
            f"{steps} steps and {int(many.sum())} after {2 * steps}"
        )
        return judged("more steps", not (beats(many, few) or beats(few, single)), told, "More steps help the model")

    def unbounded(self) -> Finding:
        """An attack that may change every pixel at will leaves no image right: only a hidden gradient can stop it."""
        low, high = self.threat.box
        widest = (high - low) * (math.sqrt(self.x[0].numel()) if self.threat.norm == "l2" else 1)
        anywhere = dataclasses.replace(self.threat, eps=widest)
        left, spent = torch.arange(self.n, device=self.x.device), 0
        for steps, share in UNBOUNDED:
            left = left[self.climb(left, anywhere, steps, share * widest, False).all(0)]
            spent += steps
            if not len(left):
                break
        told = f"{len(left)} of {self.n} images are right after {spent} steps without a bound"
        return judged("unbounded eps", not len(left), told, "The gradient leads nowhere")

    def transfer(self, standard: nn.Module | None, survived: Tensor) -> Finding:
        """Images that fool an undefended model fool this one no more than images made for it."""
        if standard is None:
            return Finding("transfer", None, "Not tried: no undefended model was given.")
        attack = dataclasses.replace(self.attack, keep="last", restarts=1)
        adv = attack(standard, self.x, self.y, self.threat, generator=self.noise(2))
        broken = misclassified(_batched(self.passes.score, adv), self.y) & survived
        return beaten("transfer", "images made on the undefended model break", int(broken.sum()), int(survived.sum()))

    def black_box(self, survived: Tensor) -> Finding:
        """An attack that sees no gradient finds no more than one that does."""
        from fastadv.attacks.square import Square

        rows = survived.nonzero().flatten()[:QUERIED]
        square, broken = Square(queries=QUERIES, seed=self.seed), 0
        if len(rows):
            broken = int(square.run(self.passes.model, self.x[rows], self.y[rows], self.threat).success.sum())
        return beaten("black box", f"{QUERIES} queries without gradients break", broken, len(rows))


def _batched(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([forward(part) for part in x.split(BATCH)])

"""The runs of FAB: step by step onto the boundary as it looks from where the image is, and back towards x.

Shapes: images (B, C, H, W) float32, inside a run rows (N, D); y, target, distance (N,).
Source: Croce and Hein, arXiv:1907.02044, algorithm 1, without its final search, as the published code.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastadv.attacks.hyperplane import published_to_hyperplane, to_hyperplane
from fastadv.attacks.ledger import Ledger
from fastadv.attacks.targets import likely_targets
from fastadv.errors import SettingsError
from fastadv.inputs import logits_of
from fastadv.losses import misclassified
from fastadv.passes import Passes
from fastadv.seeds import mix
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.attacks.fab import FAB

# Steps between two looks at whether images are finished: a look is free on the CPU and waits for the device elsewhere.
_STEPS_PER_LOOK = {"cpu": 1}
# Pixels projected at a time: a dozen tensors of them lie in a core's cache.
_PIXELS_PER_PART = {"cpu": 2**16}


class Boundary(NamedTuple):
    """The boundary to another class as it looks from each image: the hyperplane <w, z> = b."""

    logits: Tensor
    """Of the images, (N, classes)."""
    w: Tensor
    """(N, D)."""
    b: Tensor
    """(N,)."""


@dataclass
class Rows:
    """The images in a run, one row each in every tensor."""

    place: Tensor
    """Where the image is in the batch."""
    x: Tensor
    """(N, D), as z and best."""
    y: Tensor
    target: Tensor
    """The class aimed at."""
    z: Tensor
    """The iterate."""
    best: Tensor
    """The nearest iterate that fooled the model."""
    distance: Tensor
    """Of ``best`` from x; infinite where none did."""
    bad: Tensor
    """Whether logits or gradients were NaN or infinite."""

    def keep(self, rows: Tensor) -> None:
        """Only ``rows``, bool (N,), stay."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


class Search:
    """The runs of FAB on one batch; what they find goes into ``ledger``."""

    def __init__(self, attack: FAB, passes: Passes, threat: ThreatModel, ledger: Ledger) -> None:
        self.attack, self.passes, self.threat, self.ledger = attack, passes, threat, ledger
        self.parity = attack.mode == "parity"
        self.shape = ledger.x.shape[1:]
        self.layout = torch.contiguous_format if ledger.x.is_contiguous() else torch.channels_last

    def go(self) -> None:
        """All runs, each for the images that those before it left."""
        attack, ledger = self.attack, self.ledger
        noise = torch.Generator().manual_seed(attack.seed)
        ranks = min(attack.targets, ledger.clean.shape[1] - 1) if attack.targeted else 1
        for run in range(ranks * attack.restarts):
            places = ledger.left()
            if not len(places):
                return
            x, y = ledger.x[places], ledger.y[places]
            target = y
            if attack.targeted:
                # Parity ranks the classes anew for the images left, as the last digit of logits depends on the batch.
                logits = self.passes.score(x) if self.parity else ledger.clean[places]
                target = likely_targets(logits, attack.targets)[:, run // attack.restarts]
            start = self._start(x, ledger.names[places], noise, run) if run % attack.restarts else x
            self._run(
                Rows(
                    place=places,
                    x=x.flatten(1),
                    y=y,
                    target=target,
                    z=start.flatten(1),
                    best=x.flatten(1),
                    distance=x.new_full((len(x),), torch.inf),
                    bad=torch.zeros_like(places, dtype=torch.bool),
                )
            )

    def _run(self, rows: Rows) -> None:
        """One run for the images in ``rows``."""
        per_look = _STEPS_PER_LOOK.get(rows.x.device.type, 10)
        for step in range(self.attack.steps):
            boundary = self._boundary(rows)
            if self.parity:
                rows.z = self._advanced(rows, boundary)
                self._look(rows, self.passes.score(self._images(rows.z)))
                continue
            # The boundary as seen from the iterate serves the point drawn back from it too: half of the passes, and
            # the images found are nearer, by 0.2 to 0.6 % (trained CNN; the iterate is closer to the boundary).
            self._look(rows, boundary.logits)
            rows.z = self._advanced(rows, boundary)
            if step % per_look == per_look - 1 and not self._let_go(rows):
                return
        if not self.parity:
            self._look(rows, self.passes.score(self._images(rows.z)))
        self.ledger.refuse(rows.bad, rows.place)
        found = rows.distance <= (self.threat.eps if self.parity else torch.finfo(torch.float32).max)
        self._offer(rows, found)

    def _boundary(self, rows: Rows) -> Boundary:
        """The boundary as it looks from the iterates."""
        images = self._images(rows.z)
        if self.attack.targeted:
            classes = torch.stack([rows.y, rows.target], 1)
            logits, grad = self.passes.gradient(images, classes)
            ahead, w = advantage(logits, classes), grad.flatten(1)
        else:
            logits, ahead, w = self._nearest(images, rows.y)
        b = (w * rows.z).sum(1) - ahead
        rows.bad |= ~(logits.isfinite().all(1) & b.isfinite())
        return Boundary(logits, w, b)

    def _nearest(self, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and of the class whose boundary seems nearest how far it is ahead of y, and the gradient of that."""
        leaf = images.detach().requires_grad_()
        logits = logits_of(self.passes.forward, leaf, self.ledger.num_labels)
        if not logits.requires_grad:
            raise SettingsError("the model's logits have no gradient", "remove no_grad() or detach() from its forward")
        grads = torch.stack(
            [torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)[0] for k in range(logits.shape[1])], 1
        )
        logits, every = logits.detach(), torch.arange(len(y), device=y.device)
        grads = grads.flatten(2)
        grads = grads - grads[every, y].unsqueeze(1)
        ahead = (logits - logits.gather(1, y[:, None])).scatter(1, y[:, None], torch.inf)
        slope = grads.abs().sum(2) if self.threat.norm == "linf" else grads.square().sum(2).sqrt()
        nearest = (ahead.abs() / (1e-12 + slope)).argmin(1)
        return logits, ahead[every, nearest], grads[every, nearest]

    def _advanced(self, rows: Rows, boundary: Boundary) -> Tensor:
        """The next iterates, a little beyond the boundary."""
        norm, box = self.threat.norm, self.threat.box
        if self.parity:
            w, b = torch.cat([boundary.w, boundary.w]), torch.cat([boundary.b, boundary.b])
            moves = published_to_hyperplane(torch.cat([rows.z, rows.x]), w, b, norm, box)
            return self._between(rows.z, rows.x, *moves.chunk(2))
        pixels = _PIXELS_PER_PART.get(rows.x.device.type, rows.x.numel())
        parts = (part.split(max(1, pixels // rows.x.shape[1])) for part in (rows.z, rows.x, boundary.w, boundary.b))
        return torch.cat(
            [
                self._between(z, x, *to_hyperplane(torch.stack([z, x], 1), w, b, norm, box).unbind(1))
                for z, x, w, b in zip(*parts, strict=True)
            ]
        )

    def _between(self, z: Tensor, x: Tensor, move: Tensor, from_x: Tensor) -> Tensor:
        """Between the projections of z and of x: the shorter the move from z is, the less of that from x."""
        length, length_from_x = (self._length(part).clamp(min=1e-8).unsqueeze(1) for part in (move, from_x))
        share = (length / (length + length_from_x)).clamp(0, self.attack.alpha_max)
        eta = self.attack.eta
        return ((z + eta * move) * (1 - share) + (x + from_x * eta) * share).clamp_(*self.threat.box)

    def _look(self, rows: Rows, logits: Tensor) -> None:
        """Note which iterates, whose ``logits`` these are, fool the model, and draw them back towards x."""
        rows.bad |= ~logits.isfinite().all(1)
        offset = rows.z - rows.x
        distance = self._length(offset)
        fooled = misclassified(logits, rows.y) & ~rows.bad
        nearer = fooled & (distance < rows.distance)
        rows.distance = torch.where(nearer, distance, rows.distance)
        rows.best = torch.where(nearer.unsqueeze(1), rows.z, rows.best)
        rows.z = torch.where(fooled.unsqueeze(1), rows.x + offset * self.attack.beta, rows.z)

    def _let_go(self, rows: Rows) -> bool:
        """Whether images are left once those with an image inside the ball, as float32 confirms, have left."""
        claims = (rows.distance <= self.threat.eps) & ~rows.bad
        if claims.any():
            self._offer(rows, claims)
            # What was not confirmed is no find.
            rows.distance = torch.where(claims, torch.inf, rows.distance)
            rows.keep(~self.ledger.success[rows.place])
        return len(rows.place) > 0

    def _offer(self, rows: Rows, which: Tensor) -> None:
        """Offer the nearest images found for the rows ``which``, bool (N,)."""
        self.ledger.offer(rows.place[which], self._images(rows.best[which]), only_fooling=self.parity)

    def _start(self, x: Tensor, names: Tensor, noise: torch.Generator, run: int) -> Tensor:
        """A random point at half the radius for each image, cut by the box."""
        linf = self.threat.norm == "linf"
        draw = torch.rand if linf else torch.randn
        if self.parity:
            drawn = draw(x.shape, generator=noise)
        else:
            drawn = torch.empty(x.shape)
            for image, name in zip(drawn, names.tolist(), strict=True):
                noise.manual_seed(mix(self.attack.seed, name, run))
                image.copy_(draw(image.shape, generator=noise))
        drawn = (2 * drawn - 1 if linf else drawn).to(x.device)
        length = self._length(drawn.flatten(1)).view(-1, 1, 1, 1)
        return (x + self.threat.eps * drawn / length * 0.5).clamp_(*self.threat.box)

    def _images(self, rows: Tensor) -> Tensor:
        """``rows``, (N, D), as images laid out like x."""
        return rows.view(len(rows), *self.shape).contiguous(memory_format=self.layout)

    def _length(self, rows: Tensor) -> Tensor:
        """Of each row, (N,), in the threat's norm."""
        return rows.abs().amax(1) if self.threat.norm == "linf" else rows.square().sum(1).sqrt()


def advantage(logits: Tensor, classes: Tensor) -> Tensor:
    """How far the logit of the second of two ``classes``, (N, 2), is above that of the first, (N,)."""
    own, other = logits.gather(1, classes).unbind(1)
    return -(own - other)

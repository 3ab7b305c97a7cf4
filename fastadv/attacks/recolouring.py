"""The runs of Square: from stripes, or a tiling, square by square to a larger margin.

Shapes: x, adv (N, C, H, W) float32; y, loss (N,). Source: Andriushchenko et al., arXiv:1912.00049, algorithms 1 to 3.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastadv.attacks.ledger import Ledger
from fastadv.attacks.momentum import unit
from fastadv.attacks.tiles import Window, moved, pattern, tiling, window
from fastadv.errors import SettingsError
from fastadv.inputs import logits_of
from fastadv.losses import margin
from fastadv.passes import Passes
from fastadv.seeds import mix
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.attacks.square import Square

# After these queries the squares' share of the image is halved. Laid out for 10,000 queries; AutoAttack asks 5,000.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Queries between two looks at whether images are broken: a look is free on the CPU and waits for the device elsewhere.
_QUERIES_PER_LOOK = {"cpu": 1}


@dataclass
class Rows:
    """The images in a run, one row each in every tensor."""

    place: Tensor
    """Where the image is in the batch."""
    x: Tensor
    y: Tensor
    low: Tensor
    """The lowest image inside ball and box."""
    high: Tensor
    """The highest one."""
    adv: Tensor
    """The image with the largest margin so far."""
    loss: Tensor
    """Its margin."""
    bar: Tensor
    """A margin above it claims that the model is fooled."""
    bad: Tensor
    """Whether a margin was NaN or infinite."""

    def keep(self, rows: Tensor) -> None:
        """Only ``rows``, bool (N,), stay."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


def side_of(query: int, p_init: float, shape: torch.Size, norm: str) -> int:
    """The side in pixels of the square of the query of that number, counted from 0, on images of ``shape``, (C, H, W).

    In l2 it is odd and 3 or more, unless the image is smaller.
    """
    share = p_init / 2 ** sum(query > halving for halving in HALVINGS)
    channels, height, width = shape
    side = round(math.sqrt(share * shape.numel() / channels))
    side = max(side, 1) if norm == "linf" else max(side, 3) | 1
    return min(side, height, width)


class Search:
    """The runs of Square on one batch; what they find goes into ``ledger``."""

    def __init__(self, attack: Square, passes: Passes, threat: ThreatModel, ledger: Ledger) -> None:
        self.attack, self.passes, self.threat, self.ledger = attack, passes, threat, ledger
        self.parity = attack.mode == "parity"
        self.shape = ledger.x.shape[1:]
        # Of squares and colours, and in parity of everything.
        self.draws = torch.Generator().manual_seed(attack.seed)

    def go(self) -> None:
        """All runs, each for the images that those before it left."""
        for run in range(self.attack.restarts):
            places = self.ledger.left()
            if not len(places):
                return
            if not self.parity:
                self.draws.manual_seed(mix(self.attack.seed, run))
            self._run(places, run)

    def _run(self, places: Tensor, run: int) -> None:
        """One run for the images at ``places``."""
        rows = self._rows(places, run)
        per_look = _QUERIES_PER_LOOK.get(rows.x.device.type, 50)
        for query in range(self.attack.queries):
            if query % per_look == 0 and not self._let_go(rows):
                return
            side = side_of(query, self.attack.p_init, self.shape, self.threat.norm)
            if self.threat.norm == "linf":
                self._recolour(rows, side)
            else:
                self._move_mass(rows, side)
        self._let_go(rows)
        self.ledger.refuse(rows.bad, rows.place)
        if not self.parity:
            self.ledger.offer(rows.place, rows.adv)

    def _recolour(self, rows: Rows, side: int) -> None:
        """Linf: one square moves, in each channel, to the upper or to the lower end of the ball."""
        (place,) = self._windows(1, side)
        signs = self._signs(1, rows).view(-1, 1, 1)
        asked, low, high = (images[..., *place] for images in (rows.adv, rows.low, rows.high))
        before = asked.clone()
        # In place: nothing outside the square is read or written, and what does not help is written back.
        torch.clamp(before + 2 * self.threat.eps * signs, low, high, out=asked)
        better = self._ask(rows, rows.adv)
        asked.copy_(torch.where(better, asked, before))

    def _move_mass(self, rows: Rows, side: int) -> None:
        """L2: the change of one window moves to another one."""
        to, source = self._windows(2, side)
        paint = self._pattern(side, rows.x.device) * self._signs(len(rows.x) if self.parity else 1, rows)
        adv = moved(rows.adv, rows.x, to, source, paint, self.threat.eps, self.threat.box)
        rows.adv = torch.where(self._ask(rows, adv), adv, rows.adv)

    def _ask(self, rows: Rows, adv: Tensor) -> Tensor:
        """One query: which of ``adv`` have a larger margin than the best so far, bool (N, 1, 1, 1)."""
        if self.parity:
            logits = self.passes.score(adv)
        else:
            with torch.no_grad():
                logits = logits_of(self.passes.forward, adv, self.ledger.num_labels)
        loss = margin(logits, rows.y)
        rows.bad |= ~loss.isfinite()
        better = loss > rows.loss
        rows.loss = torch.where(better, loss, rows.loss)
        return better.view(-1, 1, 1, 1)

    def _let_go(self, rows: Rows) -> bool:
        """Whether images are left once those that are broken, as float32 confirms, have left."""
        claims = rows.loss >= rows.bar if self.parity else rows.loss > rows.bar
        if claims.any():
            self.ledger.refuse(rows.bad, rows.place)
            self.ledger.offer(rows.place[claims], rows.adv[claims], only_fooling=self.parity)
            rows.bar = torch.where(claims, rows.loss, rows.bar)
            rows.keep(~claims if self.parity else ~self.ledger.success[rows.place])
        return len(rows.place) > 0

    def _rows(self, places: Tensor, run: int) -> Rows:
        """The images at ``places`` where a run starts, judged."""
        x, y, eps, box = self.ledger.x[places], self.ledger.y[places], self.threat.eps, self.threat.box
        low = high = x
        if self.threat.norm == "l2":
            adv = self._tiled(x, places, run)
        else:
            if self.parity:
                low, high = (x - eps).clamp_(*box), (x + eps).clamp_(*box)
            else:
                low, high = (self.threat.project(torch.full_like(x, end), x) for end in box)
            # The stripes' strides would be those of the result.
            adv = torch.empty_like(x).copy_(torch.where(self._stripes(places, run) > 0, high, low))
        rows = Rows(
            place=places,
            x=x,
            y=y,
            low=low,
            high=high,
            adv=adv,
            loss=x.new_full((len(x),), -torch.inf),
            bar=x.new_zeros(len(x)),
            bad=torch.zeros_like(y, dtype=torch.bool),
        )
        version = adv._version
        self._ask(rows, adv)
        if adv._version != version:
            # Where a gradient is asked for, torch refuses; here the search would go on from what the model left.
            raise SettingsError(
                "the model writes into its input", "x = x.clone() before x.sub_(), x.div_() and the like"
            )
        return rows

    def _stripes(self, places: Tensor, run: int) -> Tensor:
        """A sign for each column of each channel of each image, (N, C, 1, W)."""
        channels, _, width = self.shape
        return self._own_signs(places, run, channels, 1, width)

    def _tiled(self, x: Tensor, places: Tensor, run: int) -> Tensor:
        """``x`` with a tiling of patterns of random sign, of length eps, cut by the box."""
        side, tiles = tiling(*self.shape[1:])
        change = torch.zeros_like(x)
        signs = None if self.parity else self._own_signs(places, run, len(tiles), self.shape[0], 1, 1)
        for number, tile in enumerate(tiles):
            part = change[..., *tile]
            paint = self._pattern(side, x.device)[: part.shape[2], : part.shape[3]]
            part += paint * (self._own_signs(places, run, self.shape[0], 1, 1) if signs is None else signs[:, number])
        return (x + unit(change, "l2") * self.threat.eps).clamp_(*self.threat.box)

    def _own_signs(self, places: Tensor, run: int, *shape: int) -> Tensor:
        """1 and -1 for each image at ``places``, (N, *shape)."""
        if self.parity:
            drawn = torch.rand(len(places), *shape, generator=self.draws)
        else:
            own, drawn = torch.Generator(), torch.empty(len(places), *shape)
            for image, name in zip(drawn, self.ledger.names[places].tolist(), strict=True):
                image.copy_(torch.rand(shape, generator=own.manual_seed(mix(self.attack.seed, name, run))))
        return (2 * drawn - 1).sign().to(places.device)

    def _signs(self, num: int, rows: Rows) -> Tensor:
        """1 and -1 for each channel, (num, C, 1, 1)."""
        drawn = torch.rand(num, self.shape[0], 1, 1, generator=self.draws)
        return (2 * drawn - 1).sign().to(rows.x.device)

    def _pattern(self, side: int, device: torch.device) -> Tensor:
        """The pattern, lying or standing."""
        turned = torch.rand(1, generator=self.draws) > 0.5
        return (pattern(side).T.contiguous() if turned else pattern(side)).to(device)

    def _windows(self, num: int, side: int) -> list[Window]:
        """``num`` windows of that side. The published code, and so parity, never draws the last row and column."""
        room = torch.tensor([length - side + (not self.parity) for length in self.shape[1:]])
        drawn = (torch.rand(num, 2, generator=self.draws) * room).long()
        return [window(top, left, side) for top, left in drawn.tolist()]

"""An attack that drops the images it has broken: the rest of the batch goes on without them, to the same verdict.

Shapes: x (B, C, H, W) float32; index (B,) int64, rows of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastadv.climb import AttackResult, Climber, room_like, starting_point
from fastadv.inputs import Inputs
from fastadv.passes import Health, Passes
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel


class Team(NamedTuple):
    """A climber with room for some images, and what takes all of them one step up."""

    climber: Climber
    step: Callable[[], None]


class Teams(Protocol):
    """Where teams come from."""

    def room(self, count: int) -> int:
        """The size of the team that takes ``count`` images."""

    def team(self, size: int) -> Team:
        """A team of this size; its tensors hold anything."""


class EagerTeams:
    """Teams of exactly as many images as are left."""

    def __init__(self, settings: PGD, passes: Passes, given: Inputs, threat: ThreatModel) -> None:
        self.settings, self.passes, self.given, self.threat = settings, passes, given, threat

    def room(self, count: int) -> int:
        """As many as there are."""
        return count

    def team(self, size: int) -> Team:
        """A new team."""
        climber = Climber(self.settings, room_like(self.given, size), self.threat, scored=True)
        return Team(climber, lambda: climber.step(self.passes))


def climb_survivors(
    settings: PGD,
    passes: Passes,
    given: Inputs,
    threat: ThreatModel,
    generator: torch.Generator | None,
    teams: Teams,
) -> tuple[AttackResult, Health]:
    """As :func:`fastadv.climb.climb` for keep="success", each image only until it is broken; reads the count each step.

    Every image gets the noise it would get without dropping. A success claimed in lower precision is confirmed in
    float32 at once, and the image goes on where that fails: without dropping it would keep the false claim.
    """
    with passes.opened(given.x.device):
        whole = Climber(settings, given._replace(eps=given.eps.expand(len(given.x))), threat, scored=True)
        for _ in range(settings.restarts):
            index = (~whole.kept.success).nonzero().squeeze(1)
            if not len(index):
                break
            whole.start(starting_point(settings, given, threat, generator))
            size = teams.room(len(index))
            team = teams.team(size)
            _move(whole.rows(), index, team.climber.rows())
            for _ in range(settings.steps):
                team.step()
                broken = _confirmed(team.climber, passes, len(index))
                left = len(index) - int(broken.sum())
                if not left:
                    break
                if teams.room(left) < size:
                    _report(team.climber, whole, index)
                    rows, size = (~broken).nonzero().squeeze(1), teams.room(left)
                    before, team = team, teams.team(size)
                    _move(before.climber.rows(), rows, team.climber.rows())
                    index = index[rows]
            else:
                team.climber.finish(passes)
            _report(team.climber, whole, index)
    return whole.result(), whole.health


def _confirmed(climber: Climber, passes: Passes, count: int) -> Tensor:
    """Which of the first ``count`` images are broken, bool (count,); new claims of a rounded pass are checked first."""
    kept = climber.kept
    claimed = (kept.success & ~climber.proven)[:count].nonzero().squeeze(1) if passes.rounded else ()
    if len(claimed):
        fooled, loss = kept.judge(passes.score(kept.adv[claimed]), climber.y[claimed])
        kept.success[claimed], kept.loss[claimed] = fooled, loss
    climber.proven.copy_(kept.success)
    return kept.success[:count]


def _move(source: list[Tensor], index: Tensor, target: list[Tensor]) -> None:
    """Copy the rows ``index`` into the first rows of ``target``; those left over repeat the first."""
    for there, here in zip(source, target, strict=True):
        here[: len(index)].copy_(there.index_select(0, index))
        here[len(index) :].copy_(here[:1])


def _report(climber: Climber, whole: Climber, index: Tensor) -> None:
    """Write what ``climber`` found into the rows ``index`` of the whole batch."""
    for found, collected in zip(climber.findings(), whole.findings(), strict=True):
        collected.index_copy_(0, index, found[: len(index)])

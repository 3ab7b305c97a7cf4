"""The stages of AutoAttack: which attacks, in which order, for a version and a number of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastadv.attacks.apgd import APGD
from fastadv.attacks.fab import FAB
from fastadv.attacks.member import Member
from fastadv.attacks.square import Square

Version = Literal["standard", "plus", "rand"]

# Classes that the loss of a stage needs.
NEEDS = {"apgd-dlr": 3, "apgd-t": 4}
TARGETS = 9


@dataclass(frozen=True)
class Stage:
    """One attack of the ensemble."""

    name: str
    """As the published code calls it."""
    attack: Member


def stages(version: Version, classes: int, **settings: Any) -> tuple[list[Stage], list[str]]:
    """The stages for a model with that many classes, and a note for each way they differ from the published ones.

    settings: seed, mode and precision of every attack. Source: Croce and Hein, arXiv:2003.01690, section 5; restarts
    and the order as in the published code.
    """
    targets = min(TARGETS, classes - 1)
    targeted = {"targets": targets, **settings}
    known = {
        "standard": [
            Stage("apgd-ce", APGD(**settings)),
            Stage("apgd-t", APGD(loss="dlr-targeted", **targeted)),
            Stage("fab-t", FAB(**targeted)),
            Stage("square", Square(**settings)),
        ],
        "plus": [
            Stage("apgd-ce", APGD(restarts=5, **settings)),
            Stage("apgd-dlr", APGD(loss="dlr", restarts=5, **settings)),
            Stage("fab", FAB(targeted=False, restarts=5, **settings)),
            Stage("square", Square(**settings)),
            Stage("apgd-t", APGD(loss="dlr-targeted", **targeted)),
            Stage("fab-t", FAB(**targeted)),
        ],
        "rand": [
            Stage("apgd-ce", APGD(eot=20, **settings)),
            Stage("apgd-dlr", APGD(loss="dlr", eot=20, **settings)),
        ],
    }
    chosen, notes = known[version], []
    if version == "standard" and classes == 3:
        chosen[1] = Stage("apgd-dlr", APGD(loss="dlr", **settings))
        notes.append("apgd-dlr runs in place of apgd-t: the targeted loss needs 4 classes, the model has 3")
    for stage in [stage for stage in chosen if classes < NEEDS.get(stage.name, 0)]:
        chosen.remove(stage)
        notes.append(f"{stage.name} is left out: its loss needs {NEEDS[stage.name]} classes, the model has {classes}")
    if targets < TARGETS and (aimed := [stage.name for stage in chosen if stage.name.endswith("-t")]):
        notes.append(f"{' and '.join(aimed)} aim at {targets} classes instead of {TARGETS}: there are no more")
    return chosen, notes

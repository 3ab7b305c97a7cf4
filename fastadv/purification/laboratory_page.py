"""The page of the laboratory: every claim, what was predicted and measured, and the figures of every experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from fastadv import page
from fastadv.page import Block, Caution, Claim, Claims, Data, Points, Section, Table
from fastadv.purification.lab import Settings
from fastadv.purification.laboratory import EXPERIMENTS
from fastadv.purification.marks import Mark, Outcome
from fastadv.runfolder import write_whole

LIMITS = [
    "The body of arXiv:2401.15248 was not at hand when this was written: the model and the claims are the paper's; "
    "sizes, the law of the features, losses in detail, attacks and pass marks are ours. No table of it is reproduced.",
    "Thresholds hide gradients: FGM and PGD-20 overstate robustness here, most of all after FGM training. Believe the "
    "worst case, and not even that as a bound: an attack that is not tried may break more.",
    "Every batch is fresh, so that these are risks on the population. What happens with few samples was not tried.",
    "Training depends on how it is set: without the ramp of eps, or with eps beyond 0.7/sqrt(k), all units are "
    "switched off; with a hard threshold far below the active features nothing is purified.",
    "A spread over a few seeds is a rough one, and says nothing about other sizes.",
]


def write(path: Path, settings: Settings, outcomes: Mapping[str, Outcome], command: str) -> None:
    """Write the page of these outcomes to ``path``, one HTML file that needs no other."""
    known = [(each, outcomes[each.key]) for each in EXPERIMENTS if each.key in outcomes]
    sections = [
        Section(title="", blocks=_lead(settings, outcomes)),
        Section(title="Every claim", blocks=_table(outcomes)),
    ]
    for each, outcome in known:
        blocks: list[Block] = [each.question]
        if outcome.failure:
            blocks.append(Caution(f"This experiment failed. {outcome.failure[0].upper()}{outcome.failure[1:]}."))
        else:
            blocks += [Claims([_claim(mark) for mark in outcome.marks]), *each.show(outcome.numbers)]
            numbers = {name: value for name, value in outcome.numbers.items() if name != "pictures"}
            blocks.append(Data(summary="Every number, one for each seed", value=_without_pictures(numbers)))
        took = f"Took {outcome.seconds:.1f} s, {outcome.cpu_seconds:.1f} s of CPU"
        blocks.append(f"{took}, with what other experiments had left.")
        sections.append(Section(title=f"{each.key} {each.title}", blocks=blocks))
    sections += [
        Section(title="What the numbers do not say", blocks=[Points(LIMITS)]),
        Section(title="Settings", blocks=_settings(settings)),
    ]
    environment = next((outcome.environment for outcome in outcomes.values()), {})
    text = page.build("The purification laboratory", sections, command=command, environment=environment)
    write_whole(path, text)


def verdict(outcomes: Mapping[str, Outcome]) -> str:
    """How many claims hold, in a sentence."""
    marks = [mark for outcome in outcomes.values() for mark in outcome.marks]
    held, controls = sum(mark.holds for mark in marks), [mark for mark in marks if mark.control]
    went = (
        f", {sum(mark.holds for mark in controls)} of {len(controls)} negative controls among them" if controls else ""
    )
    return f"{held} of {len(marks)} claims hold{went}."


def _lead(settings: Settings, outcomes: Mapping[str, Outcome]) -> list[Block]:
    blocks: list[Block] = [
        verdict(outcomes),
        "The claim: adversarial pre-training makes every hidden unit of a two-layer network read one feature of the "
        "data instead of a mixture of many. An attack then has nothing to gain from features that are not there, and a "
        "head that is trained on clean samples alone inherits that. After arXiv:2401.15248, at the size of a desk: "
        f"{settings.d} features of which {settings.k:g} are active, {settings.units} hidden units, attacks of l2 "
        f"length {settings.eps:g}, {settings.seeds} {'seed' if settings.seeds == 1 else 'seeds'}.",
    ]
    missed = [mark for outcome in outcomes.values() for mark in outcome.marks if not mark.holds]
    if missed:
        said = " ".join(f"{mark.claim}: predicted {mark.predicted}, measured {mark.measured}." for mark in missed)
        blocks.append(Caution(f"{len(missed)} {'mark is' if len(missed) == 1 else 'marks are'} missed. {said}"))
    failed = [key for key, outcome in outcomes.items() if outcome.failure]
    if failed:
        blocks.append(Caution(f"{', '.join(failed)} failed: training collapsed, see there."))
    left = [each.key for each in EXPERIMENTS if each.key not in outcomes]
    if left:
        blocks.append(Caution(f"Not done: {', '.join(left)}."))
    if settings != Settings(seed=settings.seed, seeds=settings.seeds):
        blocks.append(Caution("The settings are not the defaults, for which the pass marks were set."))
    return blocks


def _table(outcomes: Mapping[str, Outcome]) -> list[Block]:
    rows = [
        [key, mark.claim, mark.predicted, mark.measured, _word(mark)]
        for key, outcome in outcomes.items()
        for mark in outcome.marks
    ]
    if not rows:
        return ["Nothing was measured."]
    return [
        Table(columns=["", "claim", "predicted", "measured", "holds"], rows=rows),
        "Measured: means over seeds, behind \u00b1 their standard deviation; marks are judged on the mean. A negative "
        "control holds when what must go wrong goes wrong.",
    ]


def _word(mark: Mark) -> str:
    return ("yes" if mark.holds else "no") + (" (control)" if mark.control else "")


def _claim(mark: Mark) -> Claim:
    word = "holds" if mark.holds else "missed"
    said = f"{'Negative control. ' if mark.control else ''}Predicted: {mark.predicted}. Measured: {mark.measured}."
    return Claim(name=mark.claim, holds=mark.holds, word=word, sentence=said)


def _settings(settings: Settings) -> list[Block]:
    own = dataclasses.asdict(Settings())
    values = dataclasses.asdict(settings)
    rows = [(name, f"{value:g}", f"{own[name]:g}") for name, value in values.items()]
    return [Table(columns=("setting", "here", "default"), rows=rows)]


def _without_pictures(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_pictures(inner) for name, inner in value.items() if name != "pictures"}
    return value

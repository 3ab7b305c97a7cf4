"""The page of an evaluation: what was found, how sure it is, what it looks like, and what it does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastadv import evaluation_plots as plots
from fastadv import page
from fastadv.evaluation_plots import ClassCounts
from fastadv.examples import Example, amplification, card
from fastadv.page import Block, Caution, Claim, Claims, Data, Gallery, Points, Section, Table
from fastadv.recipe import show_pixels

if TYPE_CHECKING:
    from fastadv.findings import Finding
    from fastadv.measure import Curve, Report, Verdict

OUTCOMES = {True: "passed", False: "suspicious", None: "not applicable"}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found. Whatever is left empty has no section on the page."""

    title: str
    """The page's title: which model on which images."""
    reports: Sequence[Report]
    """The rows of the table. The verdict is about the threat of the first, under the attack that breaks most there."""
    classes: Sequence[str]
    """Names of the classes."""
    command: str
    """The command that makes this page again."""
    environment: Mapping[str, Any]
    """Versions and machine, as `environment.environment` gives them."""
    recipe: Mapping[str, Any] | None = None
    """Every setting of the run."""
    labels: Tensor | None = None
    """Class ids (n,) of the images; with ``verdict`` they make the section on classes."""
    verdict: Verdict | None = None
    """What became of every image under the headline's attack."""
    curve: Curve | None = None
    """Which images are right at growing radii of the headline's norm, best until none is left."""
    probe: str = ""
    """The attack behind curve and pictures, as PGD-10."""
    findings: Sequence[Finding] = ()
    """What the checks of `fastadv.checks` found."""
    fragile: Sequence[Example] = ()
    """Images that small changes break, from `examples.attacked`."""
    stable: Sequence[Example] = ()
    """Images that hold longest."""
    notes: Sequence[str] = ()
    """Further things that the numbers do not say, a sentence or two each; those of the reports are shown anyway."""

    @property
    def headline(self) -> Report:
        """The report that the verdict is about."""
        first = self.reports[0]
        rivals = [report for report in self.reports if (report.norm, report.eps) == (first.norm, first.eps)]
        return min(rivals, key=lambda report: report.robust)


def write(path: Path, evaluation: Evaluation) -> None:
    """Write the page of ``evaluation`` to ``path``, one HTML file that needs no other."""
    found = [
        Section(title="", blocks=_lead(evaluation)),
        Section(title="The numbers", blocks=_numbers(evaluation)),
        Section(title="Accuracy against the radius", blocks=_radii(evaluation)),
        Section(title="Class by class", blocks=_classes(evaluation)),
        Section(title="Most fragile and most stable", blocks=_examples(evaluation)),
        Section(title="Stage by stage", blocks=_stages(evaluation)),
        Section(title="Checks", blocks=_checks(evaluation)),
        Section(title="What the numbers do not say", blocks=[Points(_limits(evaluation))]),
        Section(title="Recipe", blocks=_recipe(evaluation)),
    ]
    text = page.build(
        evaluation.title,
        [section for section in found if section.blocks],
        command=evaluation.command,
        environment=evaluation.environment,
    )
    # A class may be named after a folder whose name is no text.
    path.write_text(text, encoding="utf-8", errors="replace")


def verdict(evaluation: Evaluation) -> str:
    """The evaluation in one paragraph: two shares with their intervals, and under which conditions."""
    report = evaluation.headline
    row = report.row()
    change = "every pixel" if report.norm == "linf" else "the image"
    length = "" if report.norm == "linf" else " in Euclidean length"
    return (
        f"Of {report.n:,} images {row['clean']} are classified right; {row['robust']} stay right when {report.attack} "
        f"may change {change} by up to {show_pixels(report.eps, report.norm)}{length}."
    )


def _lead(evaluation: Evaluation) -> list[Block]:
    report = evaluation.headline
    counted = {
        "worst": "An image stays right if its clean prediction and every point that the attack tries are right. ",
        "last": "An image stays right if its clean prediction and the last point of the attack are right. ",
    }.get(report.verdict, "")
    conditions = (
        f"{counted}In brackets: 95 % Wilson intervals. Computed in {report.precision} on {report.device}, seed "
        f"{report.seed}, in {report.seconds:,.1f} seconds."
    )
    suspicious = [finding.name for finding in evaluation.findings if finding.passed is False]
    applied = sum(finding.passed is not None for finding in evaluation.findings)
    blocks: list[Block] = [verdict(evaluation)]
    if suspicious:
        blocks.append(
            Caution(
                f"{len(suspicious)} of {applied} checks {'is' if len(suspicious) == 1 else 'are'} suspicious: "
                f"{', '.join(suspicious)}. Until this is explained, the model may be far less robust than measured."
            )
        )
    elif applied:
        conditions += f" All {applied} checks passed." if applied > 1 else " The one check that applies passed."
    clean, robust = (round(share * report.n) for share in (report.clean, report.robust))
    return [*blocks, plots.fates(report.n, clean, robust), conditions]


def _numbers(evaluation: Evaluation) -> list[Block]:
    rows = [report.row() for report in evaluation.reports]
    table = Table(
        columns=tuple(rows[0]),
        rows=[tuple(row.values()) for row in rows],
        caption="Shares of images with 95 % Wilson intervals.",
    )
    return [table]


def _radii(evaluation: Evaluation) -> list[Block]:
    if evaluation.curve is None:
        return []
    report, num_classes = evaluation.headline, len(evaluation.classes)
    blocks: list[Block] = [plots.against_radius(evaluation.curve, evaluation.probe, report, num_classes)]
    if evaluation.curve.survived[-1].any():
        blocks.append(
            "A curve that stays above 0 % however large the radius grows would mean that the attack fails, not that "
            "the model is robust."
        )
    return blocks


def class_counts(evaluation: Evaluation) -> list[ClassCounts]:
    """Images, right and robust ones of every class that has images; nothing where the single images are not known."""
    if evaluation.labels is None or evaluation.verdict is None:
        return []
    labels, verdict = evaluation.labels.cpu(), evaluation.verdict
    sizes, clean, robust = (
        labels[chosen].bincount(minlength=len(evaluation.classes)).tolist()
        for chosen in (slice(None), verdict.right, verdict.survived)
    )
    return [
        ClassCounts(name=name, n=sizes[index], clean=clean[index], robust=robust[index])
        for index, name in enumerate(evaluation.classes)
        if sizes[index]
    ]


def _classes(evaluation: Evaluation) -> list[Block]:
    counts = class_counts(evaluation)
    return [plots.class_bars(counts)] if counts else []


def _examples(evaluation: Evaluation) -> list[Block]:
    factor = amplification([*evaluation.fragile, *evaluation.stable])
    blocks: list[Block] = [
        Gallery(cards=[card(example, evaluation.classes, factor) for example in chosen], caption=caption)
        for caption, chosen in (
            ("Broken at the smallest radii:", evaluation.fragile),
            ("Held longest:", evaluation.stable),
        )
        if chosen
    ]
    report = evaluation.headline
    said = (
        f"{evaluation.probe} at {report.norm} {show_pixels(report.eps, report.norm)}. From left to right: the clean "
        f"image, what the attack adds to it ({factor} times as strong, about grey), and the attacked image, with the "
        "predicted class and the network's own confidence in it."
    )
    return [said, *blocks] if blocks else []


def _stages(evaluation: Evaluation) -> list[Block]:
    report = evaluation.headline
    return [plots.stage_bars(report.stages, round(report.clean * report.n))] if report.stages else []


def _checks(evaluation: Evaluation) -> list[Block]:
    claims = [
        Claim(name=finding.name, holds=finding.passed, word=OUTCOMES[finding.passed], sentence=finding.sentence)
        for finding in evaluation.findings
    ]
    said = "An attack can fail because the model hides its gradients, not because it is robust. These would show it."
    blocks: list[Block] = [said, Claims(claims)] if claims else []
    noticed = evaluation.headline.notes
    return [*blocks, f"{evaluation.headline.attack} noticed:", Points(noticed)] if noticed else blocks


def _limits(evaluation: Evaluation) -> list[str]:
    report = evaluation.headline
    limits = [
        f"Robust accuracy is an upper bound. {report.attack} found no way to turn the images that stayed right; a "
        "stronger attack may. Nothing here is a certificate.",
        f"The verdict is about {report.norm} up to {show_pixels(report.eps, report.norm)}. Blur, rotation, patches and "
        "other norms are other questions.",
        f"The intervals speak of the choice of {report.n:,} images, not of training: another seed gives another model, "
        "and images from elsewhere may be harder.",
    ]
    if all(one.attack.startswith("PGD") for one in evaluation.reports):
        limits.append(
            "PGD alone tends to overstate robustness. Numbers to compare with other work should come from AutoAttack."
        )
    if report.precision != "fp32":
        limits.append(f"The attack computed in {report.precision}, which may make it a little weaker than in fp32.")
    if not evaluation.findings:
        limits.append("No checks for hidden gradients were made.")
    counts = class_counts(evaluation)
    if counts:
        fewest = min(row.n for row in counts)
        limits.append(
            f"Some class has only {fewest:,} images, where one image is {100 / fewest:.2g} points: classes that stand "
            "next to each other may well change places."
        )
    if evaluation.fragile or evaluation.stable:
        limits.append("The images shown are the extremes among those of the curve; they are not typical.")
    return [*limits, *evaluation.notes]


def _recipe(evaluation: Evaluation) -> list[Block]:
    return [Data(summary="Every setting of the run", value=evaluation.recipe)] if evaluation.recipe is not None else []

"""What the GPU check found, as tables, and against what was promised for an H200."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from targets import Target

Row = Mapping[str, Any]
BASE = "swin_base_patch4_window7_224"
ROLI, TF32, OURS = "RoLI's loop, fp32", "RoLI's loop, TF32", "fastadv"
TORCHATTACKS, MADRY = "torchattacks, fp32", "MadryLab's loop, fp32"
# The batch that the promises are held to, if it was measured; otherwise the first that was.
BATCH = 128


def rows(document: Row) -> Iterator[Row]:
    """All rows of all parts."""
    for part in document["parts"].values():
        yield from part["rows"]


def timed(document: Row, job: str, model: str = "") -> list[Row]:
    """The rungs of a job that were timed, on any model or on one."""
    found = [row for row in rows(document) if row.get("job") == job and "images_per_s" in row]
    return [row for row in found if not model or row["model"] == model]


def targets(document: Row) -> list[dict[str, Any]]:
    """Every promise for an H200 beside what was measured, or why it was not."""
    found = []
    for what, job, other, bound in (
        ("training step, PGD-7 full swin_base, against RoLI's loop in fp32 without TF32", "training", ROLI, 8),
        ("the same against RoLI's loop in fp32 with TF32", "training", TF32, 4),
        ("PGD-10 swin_base against torchattacks in fp32", "attack", TORCHATTACKS, 8),
    ):
        value, why = speed_up(timed(document, job, BASE), other)
        if value is None and other == TORCHATTACKS:
            instead, _ = speed_up(timed(document, job, BASE), MADRY)
            if instead is not None:
                why += f"; against {MADRY}, which makes the same passes: {instead:.2f}"
        found.append(Target(what=what, bound=bound).judged(value, why))
    training = at_batch(timed(document, "training", BASE), OURS)
    rate = training["images_per_s"] if training else None
    found.append(Target(what="training step, PGD-7 full swin_base, images per second", bound=600).judged(rate))
    by_what = {row.get("what"): row for row in rows(document) if row.get("gradient", "float32") == "float32"}
    share = by_what.get("linf_step", {}).get("share_of_copy")
    found.append(Target(what="fused linf step, share of a copy's bandwidth", bound=0.85).judged(share))
    for way, bound in (("forward", 3.4), ("backward", 3.2)):
        rate = by_what.get("total", {}).get(f"{way}_tb_per_s")
        what = f"window attention {way}, TB/s over the blocks of swin_base"
        found.append(Target(what=what, bound=bound).judged(rate))
    return found


def speed_up(found: Sequence[Row], other: str) -> tuple[float | None, str]:
    """How many times as long the other rung takes, at the same batch size; or why that is not known."""
    ours, theirs = at_batch(found, OURS, other), at_batch(found, other, OURS)
    if ours is None or theirs is None:
        return None, f"not measured: {other if ours or at_batch(found, OURS) else OURS} was not timed"
    return theirs["seconds"] / ours["seconds"], ""


def at_batch(found: Sequence[Row], rung: str, beside: str | None = None) -> Row | None:
    """The row of a rung at BATCH, or at the first batch where ``beside`` was timed as well."""
    sizes = {row["batch"] for row in found if row["rung"] == (beside or rung)}
    own = [row for row in found if row["rung"] == rung and row["batch"] in sizes]
    return next((row for row in own if row["batch"] == BATCH), own[0] if own else None)


def tables(document: Row) -> list[dict[str, Any]]:
    """A ladder per model and job, and the kernels."""
    made = []
    for job, steps in (("training", "training step, PGD-7 full"), ("attack", "PGD-10")):
        for model in dict.fromkeys(row["model"] for row in timed(document, job)):
            made.append(ladder(timed(document, job, model), f"{steps}, `{model}`, random weights, images/s"))
    kernels = [row for row in rows(document) if row.get("what") in ("linf_step", "l2_step", "stage")]
    if kernels:
        made.append({"head": ["kernel", "TB/s", "against"], "rows": [kernel(row) for row in kernels]})
    return made


def ladder(found: Sequence[Row], title: str) -> dict[str, Any]:
    """Rungs by batch sizes: images per second, and how many times RoLI's in fp32; the rest at one batch size."""
    batches = sorted({row["batch"] for row in found})
    shown = BATCH if BATCH in batches else batches[0]
    head = [title, *(f"batch {batch}" for batch in batches)]
    head += [f"useful TFLOP/s at {shown}", "of an H200's limit", "peak GiB"]
    lines = []
    for rung in dict.fromkeys(row["rung"] for row in found):
        cells = []
        for batch in batches:
            own, base = (
                next((row for row in found if (row["rung"], row["batch"]) == (name, batch)), None)
                for name in (rung, ROLI)
            )
            ratio = f" ({base['seconds'] / own['seconds']:.2f}x)" if own and base else ""
            cells.append(f"{own['images_per_s']:.3g}{ratio}" if own else "-")
        row = next((row for row in found if (row["rung"], row["batch"]) == (rung, shown)), {})
        facts = (row.get("tflop_per_s"), row.get("share_of_limit"), row.get("peak_bytes"))
        forms = ("{:.0f}", "{:.0%}", "{:.1f}")
        scaled = (facts[0], facts[1], facts[2] / 2**30 if facts[2] else None)
        cells += [form.format(fact) if fact is not None else "-" for form, fact in zip(forms, scaled, strict=True)]
        lines.append([rung, *cells])
    return {"head": head, "rows": lines}


def kernel(row: Row) -> list[str]:
    """A kernel as a row of the table."""
    if row["what"] != "stage":
        against = f"{row['share_of_copy']:.0%} of a copy, plain torch takes {row['plain_over_fused']:.1f}x as long"
        return [f"{row['what']}, {row['gradient']} gradient", f"{row['tb_per_s']:.2f}", against]
    block = row["half_block_op_s"]
    against = (
        f"block: timm {row['half_block_timm_s'] / block:.2f}x, fused {row['half_block_timm_fused_s'] / block:.2f}x"
    )
    name = f"window attention {row['side']}x{row['side']}x{row['channels']}, shift {row['shift']}"
    return [name, f"{row['forward_tb_per_s']:.2f} / {row['backward_tb_per_s']:.2f}", against]

"""The parts of the GPU check: which there are, in which order, and the process that one of them runs in.

``python benchmarks/gpu_parts.py NAME --rows FILE`` writes its rows, one JSON line each, as soon as they are known.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BASE, TINY, MICRO = "swin_base_patch4_window7_224", "swin_tiny_patch4_window7_224", "swin_micro_64"
BOTH = ("attack", "training")


@dataclass(frozen=True)
class Part:
    """One part: which rows it makes, from which arguments; the seconds it needs at least and may take at most."""

    name: str
    least: float
    most: float
    job: str
    arguments: tuple[Any, ...] = ()


# In the order of what must not be missing when the time runs out.
PARTS = (
    Part("machine", 10, 40, "machine"),
    Part("step", 10, 40, "step"),
    Part("window", 15, 60, "window"),
    Part(f"ladder {BASE} 128", 60, 200, "ladder", (BASE, 128, "RUNGS", BOTH)),
    Part(f"ladder {TINY} 128", 40, 100, "ladder", (TINY, 128, "RUNGS", BOTH)),
    Part(f"ladder {BASE} 64", 45, 100, "ladder", (BASE, 64, "ENDS", BOTH)),
    Part(f"ladder {BASE} 256", 60, 120, "ladder", (BASE, 256, "ENDS", BOTH)),
    Part("strength", 30, 60, "strength", (266, 10)),
    Part(f"ladder {TINY} 64", 30, 60, "ladder", (TINY, 64, "ENDS", BOTH)),
    Part(f"ladder {TINY} 256", 40, 60, "ladder", (TINY, 256, "ENDS", BOTH)),
    Part(f"compiled {BASE} 128", 100, 200, "ladder", (BASE, 128, "COMPILED", ("attack",))),
)
# Compiled beside the tests, so that Inductor finds its files when the clock matters.
AHEAD = tuple(
    Part(f"ahead {name} {batch}", 0, 150, "ahead", (name, batch)) for name in (BASE, TINY) for batch in (128, 64, 256)
)
# The dry run.
DRY = (
    Part("machine", 0, 60, "machine"),
    Part("step", 0, 60, "step"),
    Part("window", 0, 60, "window"),
    Part(f"ladder {MICRO} 2", 0, 300, "ladder", (MICRO, 2, "RUNGS", BOTH)),
    Part("strength", 0, 300, "strength", (20, 2)),
)
NAMED = {part.name: part for part in (*PARTS, *AHEAD, *DRY)}


def rows_of(part: Part, device: str, tiny: bool, deadline: float) -> Iterator[Row]:
    """The rows of a part, one by one."""
    # Here: the process that starts the parts does without torch, and without what they may lack.
    import gpu_kernels
    import gpu_ladder
    from gpu_settings import Settings

    settings = Settings(device=device, tiny=tiny, deadline=deadline)
    if part.job == "ladder":
        name, batch, rungs, jobs = part.arguments
        yield from gpu_ladder.ladder(settings, name, batch, getattr(gpu_ladder, rungs), jobs)
    elif part.job == "ahead":
        yield from gpu_ladder.compiled(settings, *part.arguments)
    elif part.job == "strength":
        import equal

        num, steps = part.arguments
        precision = "fp32" if device == "cpu" else "bf16"
        yield equal.compared("digits", num=num, eps=8 / 255, steps=steps, precisions=[precision], device=device)
    else:
        yield from getattr(gpu_kernels, part.job)(settings)


def work(part: Part, rows: Path, device: str, tiny: bool, deadline: float) -> None:
    """Write the rows of a part into a file, each at once."""
    with rows.open("w", buffering=1) as out:
        for row in rows_of(part, device, tiny, deadline):
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=list(NAMED))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--deadline", type=float, default=float("inf"))
    args = parser.parse_args()
    work(NAMED[args.part], args.rows, args.device, args.tiny, args.deadline)

"""``python -m fastadv.pretrain --objective adversarial --data FOLDER``: a backbone, with an honest card."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from fastadv.cli import command, pick
from fastadv.errors import SettingsError

PROGRAM = "python -m fastadv.pretrain"
OBJECTIVES = ("adversarial", "standard")


def main(argv: list[str]) -> dict[str, Any] | None:
    """Pre-train, then write weights.safetensors (16 bit) and card.json; gives what card.json holds."""
    from fastadv.train import run_command

    picked, flags = pick(argv, "--objective")
    if picked.objective not in (None, *OBJECTIVES):
        raise SettingsError(f"unknown objective {picked.objective!r}", f"--objective {'|'.join(OBJECTIVES)}")
    if picked.objective is None and not any(flag.startswith("--resume") for flag in flags):
        print(f"usage: {PROGRAM} --objective {'|'.join(OBJECTIVES)} --data DATA [--out FOLDER] ...")
        print(f"       {PROGRAM} --resume FOLDER\n\nAll settings: {PROGRAM} --objective adversarial --help")
        if flags and not {"-h", "--help"} & set(flags):
            raise SettingsError("no objective given", f"--objective {'|'.join(OBJECTIVES)}")
        return None
    name = picked.objective and f"pretrain-{picked.objective}"
    report = run_command(PROGRAM, name, flags)
    return report and export(Path(report["folder"]))


def export(folder: Path) -> dict[str, Any]:
    """Write the run's best weights in 16 bit, and a card whose numbers are measured on exactly those weights."""
    import json

    from safetensors.torch import save_file

    from fastadv import assemble
    from fastadv.measure import evaluate
    from fastadv.runlog import environment

    recipe = assemble.saved_recipe(folder)
    model = assemble.trained(folder, recipe)
    # Counters, as those of BatchNorm, are no numbers to round.
    state = {name: v.half().contiguous() if v.is_floating_point() else v for name, v in model.state_dict().items()}
    model.load_state_dict(state)
    model.to(assemble.device(recipe.device))
    images = assemble.test_images(recipe)
    report, _ = evaluate(model, images, recipe.eval_attack, recipe.threat, seed=recipe.seed)
    save_file(state, folder / "weights.safetensors", metadata={"model": recipe.model, "objective": recipe.strategy})
    card = {"recipe": json.loads(recipe.to_json()), "test": dataclasses.asdict(report), "environment": environment()}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"weights: {folder}/weights.safetensors (float16), measured as rounded; card: {folder}/card.json")
    return card


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))

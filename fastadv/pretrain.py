"""``python -m fastadv.pretrain --objective adversarial --data FOLDER``: a backbone, with an honest card."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadv.cli import EVERYWHERE, command, pick, refuse_misspelt
from fastadv.errors import SettingsError

if TYPE_CHECKING:
    from fastadv.sharing import Share

PROGRAM = "python -m fastadv.pretrain"
OBJECTIVES = ("adversarial", "standard", "contrastive", "adversarial-contrastive")
USAGE = f"""\
usage: {PROGRAM} --objective {"|".join(OBJECTIVES)} --data DATA [--out FOLDER] ...
       {PROGRAM} --resume FOLDER
       torchrun --nproc-per-node N -m fastadv.pretrain ...: N processes share every batch

Writes weights.safetensors (16 bit) and card.json into the run's folder. The card's numbers are measured on exactly
those weights: the model's own head, and a linear evaluation (a new head on clean images), both clean and under PGD.

{EVERYWHERE}

All settings: {PROGRAM} --objective adversarial --help"""


def main(argv: list[str]) -> dict[str, Any] | None:
    """Pre-train, then write weights.safetensors (16 bit) and card.json; gives what card.json holds."""
    from fastadv.sharing import joined

    with joined() as share:
        return _pretrain(argv, share)


def _pretrain(argv: list[str], share: Share) -> dict[str, Any] | None:
    from fastadv.train import run_command

    picked, flags = pick(argv, "--objective")
    if picked.objective not in (None, *OBJECTIVES):
        raise SettingsError(f"unknown objective {picked.objective!r}", f"--objective {'|'.join(OBJECTIVES)}")
    folder = pick(flags, "--resume")[0].resume
    if picked.objective is None and folder is None:
        refuse_misspelt(flags, "--objective", "--resume")
        print(USAGE)
        if flags and not {"-h", "--help"} & set(flags):
            raise SettingsError("no objective given", f"--objective {'|'.join(OBJECTIVES)}")
        return None
    if picked.objective is None:
        _check_own(Path(str(folder)))
    name = picked.objective and f"pretrain-{picked.objective}"
    report = run_command(PROGRAM, name, flags, share)
    return report and export(Path(report["folder"]))


def _check_own(folder: Path) -> None:
    """Raise SettingsError for a run that is no pre-training: the card would give its classifier out as a backbone."""
    from fastadv.assemble import saved_recipe

    name = saved_recipe(folder).strategy
    if name.removeprefix("pretrain-") not in OBJECTIVES:
        raise SettingsError(f"the run in {folder} is one of {name}", f"python -m fastadv.train --resume {folder}")


def export(folder: Path) -> dict[str, Any]:
    """Write the run's best weights in 16 bit, and a card whose numbers are measured on exactly those weights."""
    import json

    from safetensors.torch import save

    from fastadv import assemble
    from fastadv.environment import environment
    from fastadv.linear_evaluation import linear_evaluation
    from fastadv.measure import evaluate
    from fastadv.runfolder import write_whole
    from fastadv.runlog import table

    recipe = assemble.saved_recipe(folder)
    model = assemble.trained(folder, recipe)
    # Counters, as those of BatchNorm, are no numbers to round.
    state = {name: v.half().contiguous() if v.is_floating_point() else v for name, v in model.state_dict().items()}
    model.load_state_dict(state)
    model.to(assemble.device(recipe.device))
    images = assemble.test_images(recipe)
    report, _ = evaluate(model, images, recipe.eval_attack, recipe.threat, seed=recipe.seed)
    _, linear = linear_evaluation(model, assemble.splits(recipe).train, images, recipe)
    # Not by safetensors' own writer: that one makes mode 0600 whatever the umask says.
    write_whole(
        folder / "weights.safetensors", save(state, metadata={"model": recipe.model, "objective": recipe.strategy})
    )
    card = {
        "recipe": json.loads(recipe.to_json()),
        "test": dataclasses.asdict(report),
        "linear": dataclasses.asdict(linear),
        "environment": environment(),
    }
    write_whole(folder / "card.json", json.dumps(card, indent=2) + "\n")
    table([{"head": "its own", **report.row()}, {"head": "linear, fitted to clean images", **linear.row()}])
    print(f"weights: {folder}/weights.safetensors (float16), measured as rounded; card: {folder}/card.json")
    return card


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))

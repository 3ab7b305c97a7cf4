"""A finished run for other tools: ``python -m fastadv.export RUN --to robustbench`` writes what RobustBench can load.

``--to peft`` writes a LoRA run's adapter instead (:mod:`fastadv.peft_layout`).

RobustBench asks timm for a model called NAME_DATASET_THREAT before it looks into its own zoo. The folder written holds
a Python file that registers one under that name, and its weights. The file needs torch, timm and safetensors alone:
RobustBench pins an older timm than this package takes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
from safetensors.torch import save_file
from torch import Tensor

from fastadv import __version__, assemble, models, peft_layout, weightfile
from fastadv.cli import command, parse
from fastadv.errors import CheckpointError, SettingsError
from fastadv.models import Classifier
from fastadv.recipe import Recipe, show_pixels
from fastadv.tuning.lora import merge

PROGRAM = "python -m fastadv.export"
# The sets RobustBench knows, and how many classes it builds a model for.
DATASETS = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
THREATS = {"linf": "Linf", "l2": "L2"}
# The radii of its leaderboards.
LEADERBOARDS = {
    ("cifar10", "linf"): 8 / 255,
    ("cifar10", "l2"): 0.5,
    ("cifar100", "linf"): 8 / 255,
    ("imagenet", "linf"): 4 / 255,
}
_MICROS = {
    "swin_micro_64": "timm.models.swin_transformer.SwinTransformer(img_size=64, patch_size=4, window_size=4, "
    "embed_dim=48, depths=(2, 2, 2), num_heads=(3, 6, 12), num_classes={classes})",
    "resnet_micro_64": "timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, layers=(1, 1, 1, 1), "
    'channels=(32, 64, 128, 256), stem_type="deep", stem_width=8, num_classes={classes})',
}
_MODULE = '''"""{title}, registered in timm as {stem}. {note}

Written by fastadv {version}.
"""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class Classifier(torch.nn.Module):
    """Logits (B, {classes}) of images (B, 3, H, W) in [0, 1]; resized to {side}x{side} and normalised inside."""

    default_cfg = {{
        "input_size": (3, {side}, {side}),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": {mean},
        "std": {std},
        "num_classes": {classes},
    }}

    def __init__(self):
        super().__init__()
        self.backbone = {backbone}
        self.head = torch.nn.Linear({features}, {classes})
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(self.default_cfg[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        if x.shape[-2:] != ({side}, {side}):
            x = F.interpolate(x, size=({side}, {side}), mode="bilinear", align_corners=False)
        return self.head(self.backbone((x - self.mean) / self.std))


@timm.models.register_model
def {stem}(pretrained=False, num_classes={classes}, **kwargs):
    if num_classes != {classes}:
        raise ValueError(f"{stem} has {classes} classes, not {{num_classes}}")
    model = Classifier()
    if pretrained:
        model.load_state_dict(load_file(Path(__file__).with_suffix(".safetensors")), strict=True)
    return model
'''
_README = """# {title}

{note}

From a Python with RobustBench, in this folder (RobustBench then completes `{info}` with what it measures):

```python
import {stem}  # registers it
from robustbench.eval import benchmark
from robustbench.utils import load_model

model = load_model("{name}", dataset="{dataset}", threat_model="{threat}")
benchmark(model, model_name="{name}", dataset="{dataset}", threat_model="{threat}", eps={eps!r}, to_disk=True)
```
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Export a finished run."""

    to: Literal["robustbench", "peft"] = "robustbench"
    """The tool that is to load it. peft: a run whose strategy ends in -lora."""
    out: str | None = None
    """Folder to write. Default: RUN/robustbench or RUN/peft."""
    name: str | None = None
    """What RobustBench calls the model: letters, digits, - and _. Default: the run's."""
    dataset: Literal["cifar10", "cifar100", "imagenet"] | None = None
    """Which of RobustBench's sets the run's data are, where --data was not cifar10 or cifar100."""


def main(argv: list[str]) -> dict[str, Any] | None:
    """Export the run named first on the command line; gives what the model's card or the adapter's settings hold."""
    about = "Export a finished run for another tool."
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            parse(Settings, None, ["--help"], f"{PROGRAM} RUN", about)
        raise SettingsError("no run given", f"{PROGRAM} runs/NAME --to robustbench --out FOLDER")
    settings = parse(Settings, None, argv[1:], f"{PROGRAM} RUN", about)
    run = Path(argv[0])
    out = Path(settings.out or run / settings.to)
    if settings.to == "robustbench":
        return robustbench(run, out, settings.name, settings.dataset)
    if settings.name or settings.dataset:
        raise SettingsError("--name and --dataset with --to peft", "leave them out: an adapter has neither")
    return peft(run, out)


def robustbench(run: Path, out: Path, name: str | None = None, dataset: str | None = None) -> dict[str, Any]:
    """Write the best model of ``run`` into the folder ``out`` as RobustBench loads it, and give its card.

    Raises SettingsError for a run that is not finished, a set RobustBench does not have, a name it cannot find, and
    files that are there already; CheckpointError for a model with modules that timm does not have.
    """
    recipe = _recipe_of_finished(run)
    name = name or run.resolve().name
    dataset, threat = dataset or recipe.data.partition(":")[0], THREATS[recipe.norm]
    stem = f"{name.lower().replace('-', '_')}_{dataset}_{recipe.norm}"
    if dataset not in DATASETS:
        raise SettingsError(
            f"RobustBench has no data {recipe.data!r}", f"--dataset {'|'.join(DATASETS)} if they are one of these"
        )
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or timm.is_model(stem):
        raise SettingsError(f"the model cannot be called {name!r}", "--name OTHER, of letters, digits, - and _")
    info = Path("model_info") / dataset / threat / f"{name}.json"
    _refuse_existing(out, f"{stem}.py", f"{stem}.safetensors", info, "README.md")
    model, state = _plain(run, recipe)
    classes = model.head.out_features
    if classes != DATASETS[dataset]:
        raise SettingsError(f"the run has {classes} classes, {dataset} {DATASETS[dataset]}", "--dataset of the run")
    note = _note(recipe, dataset, model.input_size)
    card = _card(run, recipe, dataset, note)
    texts = {
        "title": f"{name}: {recipe.model} by {recipe.strategy}",
        "name": name,
        "stem": stem,
        "note": note,
        "version": __version__,
        "classes": classes,
        "features": model.head.in_features,
        "side": model.input_size,
        "mean": tuple(round(value, 6) for value in model.mean.flatten().tolist()),
        "std": tuple(round(value, 6) for value in model.std.flatten().tolist()),
        "backbone": _backbone(recipe),
        "dataset": dataset,
        "threat": threat,
        "eps": LEADERBOARDS.get((dataset, recipe.norm), recipe.eps),
        "info": info,
    }
    (out / info).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out / f"{stem}.safetensors")
    (out / f"{stem}.py").write_text(_MODULE.format(**texts))
    (out / "README.md").write_text(_README.format(**texts))
    (out / info).write_text(json.dumps(card, indent=2) + "\n")
    print(f"{out}: {stem}.py, {stem}.safetensors, {info}, README.md")
    print(note)
    return card


def peft(run: Path, out: Path) -> dict[str, Any]:
    """Write the best model of the LoRA run ``run`` into the folder ``out`` as `peft` loads it; gives its settings.

    Raises SettingsError for a run that is not finished or has no LoRA, and for files that are there already;
    CheckpointError for a model with other modules that timm does not have.
    """
    recipe = _recipe_of_finished(run)
    files = (peft_layout.WEIGHTS, peft_layout.CONFIG, peft_layout.BASE, peft_layout.README)
    _refuse_existing(out, *files)
    model = assemble.trained(run, recipe)
    config = peft_layout.adapter(model)[1]
    classes = model.head.out_features
    _check_timms(recipe, classes, peft_layout.base(model), "backbone.")
    peft_layout.save(model, out, _backbone(recipe, classes))
    print(f"{out}: {', '.join(files)}")
    return config


def _recipe_of_finished(run: Path) -> Recipe:
    recipe = assemble.saved_recipe(run)
    if not (run / "best").exists():
        raise SettingsError(f"the run in {run} is not finished", f"finish it with --resume {run}")
    return recipe


def _refuse_existing(out: Path, *files: str | Path) -> None:
    for path in files:
        if (out / path).exists():
            raise SettingsError(f"{out / path} exists already", "--out OTHER")


def _plain(run: Path, recipe: Recipe) -> tuple[Classifier, dict[str, Tensor]]:
    """The run's best model with LoRA merged in, and its weights, which are those of timm's modules and a head alone."""
    model = assemble.trained(run, recipe)
    merge(model)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    _check_timms(recipe, model.head.out_features, state)
    return model, state


def _check_timms(recipe: Recipe, classes: int, state: dict[str, Tensor], part: str = "") -> None:
    """Raise CheckpointError unless ``state`` is that of a plain model, or of its ``part``."""
    plain = models.create(recipe.model, classes, image_size=None if recipe.resize else recipe.image_size).state_dict()
    wanted = {name.removeprefix(part): value for name, value in plain.items() if name.startswith(part)}
    try:
        weightfile.match(wanted, state)
    except CheckpointError as error:
        reason = f"{recipe.strategy} adds modules that timm does not have ({error.what})"
        raise CheckpointError(reason, "export a run whose strategy ends in -full, -linear, -bias or -lora") from error


def _backbone(recipe: Recipe, classes: int = 0) -> str:
    """The Python expression that builds the backbone, or, with classes, timm's whole model."""
    if recipe.model in _MICROS:
        return _MICROS[recipe.model].format(classes=classes)
    sized = recipe.image_size and not recipe.resize and not recipe.model.startswith("resnet")
    size = f", img_size={recipe.image_size}" if sized else ""
    return f'timm.create_model("{recipe.model}", num_classes={classes}{size})'


def _note(recipe: Recipe, dataset: str, side: int) -> str:
    """Whether RobustBench attacks the pixels that the run's own numbers are about."""
    theirs = side if dataset == "imagenet" else 32
    ours = recipe.image_size or (theirs if recipe.resize else side)
    told = (
        f"RobustBench attacks {dataset} at {theirs}x{theirs}, and this model was trained and attacked at {ours}x{ours}"
    )
    if ours == theirs:
        told += ": the same pixels."
    else:
        told += (
            " after resizing, as RoLI (arXiv:2312.05716) does: two threat models, and numbers not to be compared. "
            "Here the resize is inside the model."
        )
    usual = LEADERBOARDS.get((dataset, recipe.norm), recipe.eps)
    if recipe.eps != usual:
        radius, other = (show_pixels(eps, recipe.norm) for eps in (recipe.eps, usual))
        told += f" The run's radius is {radius}, the leaderboard's {other}."
    return told


def _card(run: Path, recipe: Recipe, dataset: str, note: str) -> dict[str, Any]:
    """RobustBench's card, as far as a run knows it; RobustBench adds what it measures and keeps the rest."""
    report = run / "report.json"
    # Without the folders of the machine it ran on.
    public = dataclasses.asdict(recipe) | {"data": dataset, "weights": Path(recipe.weights).name}
    return {
        "name": run.resolve().name,
        "additional_data": recipe.weights != "none",
        "number_forward_passes": 1,
        "dataset": dataset,
        "architecture": recipe.model,
        "eps": show_pixels(recipe.eps, recipe.norm),
        "footnote": note,
        "fastadv": {
            "version": __version__,
            "recipe": public,
            "recipe_sha256": recipe.sha256,
            "resize_inside_the_attack": recipe.resize,
            "reports": json.loads(report.read_text())["reports"] if report.exists() else [],
        },
    }


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))

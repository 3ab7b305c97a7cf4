"""Published settings as values, a table as the papers' configuration files have it; a cell is a strategy on a data set.

Where the released code contradicts its own configuration, a preset follows the configuration and says so in a note;
with ``released`` it follows the code as far as a recipe can say it, and notes what it cannot.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastadv.errors import SettingsError
from fastadv.models import MICRO, MICROS, SHIPPED
from fastadv.recipe import Recipe, show_pixels
from fastadv.registry import did_you_mean

DATASETS = ("cifar10", "cifar100", "caltech256", "cub", "dogs")

# BASE_LR and WEIGHT_DECAY of arXiv:2312.05716's released configs/, columns as in DATASETS. The peak learning rate is a
# quarter of BASE_LR: the code multiplies by batch size / 256.
RATES = {
    "linear": ((0.05, 0.01), (0.1, 0.001), (0.5, 0.01), (1.0, 0.001), (1.0, 0.01)),
    "ranli-full": ((5e-4, 0.01), (5e-4, 0.001), (5e-4, 1e-4), (5e-4, 0.001), (5e-4, 0.01)),
    "roli-full": ((1e-4, 0.01), (1e-4, 0.001), (1e-4, 1e-4), (1e-4, 0.01), (5e-5, 0.001)),
    "ranli-lora": ((0.01, 1e-4), (0.05, 0.0), (0.001, 1e-4), (0.005, 1e-4), (0.005, 1e-4)),
    "roli-lora": ((0.001, 1e-4), (0.001, 1e-4), (1e-4, 1e-4), (0.005, 1e-4), (0.001, 0.01)),
    "ranli-adapter": ((0.05, 0.01), (0.005, 1e-4), (0.005, 1e-4), (0.05, 1e-4), (0.005, 1e-4)),
    "roli-adapter": ((0.05, 0.01), (0.05, 1e-4), (5e-4, 0.0), (0.05, 0.001), (1e-4, 1e-4)),
    "ranli-bias": ((0.005, 0.001), (0.005, 0.001), (0.001, 0.01), (0.005, 0.001), (0.001, 1e-4)),
    "roli-bias": ((0.005, 0.001), (0.005, 0.01), (1e-5, 0.0), (5e-4, 1e-4), (5e-5, 1e-4)),
    "ranli-prompt": ((0.5, 0.001), (0.5, 0.01), (0.05, 0.001), (0.05, 0.001), (0.05, 1e-4)),
}
# What the configurations of a data set have in common; validation images as its published split counts them.
DATA: dict[str, dict[str, Any]] = {
    "cifar10": {"epochs": 20, "val_images": 5000, "resize": True},
    "cifar100": {"epochs": 20, "val_images": 5000, "resize": True},
    "caltech256": {"epochs": 40, "val_images": 771},
    "cub": {"epochs": 60, "val_images": 600, "prompt_tokens": 20},
    "dogs": {"epochs": 40, "val_images": 1200},
}
# No clipping anywhere: norms this large do not occur.
ATTACK: dict[str, Any] = {
    "eps": 8 / 255,
    "step_size": 2 / 255,
    "eval_steps": 10,
    "eval_step_size": 2 / 255,
    "clip": 1e9,
}
ROLI: dict[str, Any] = {
    "model": "swin_base_patch4_window7_224",
    "train_steps": 7,
    "batch_size": 64,
    "probe_optimizer": "sgd",
    "adam_eps": 1e-6,
    **ATTACK,
}
RESNET: dict[str, Any] = {
    **{"model": "resnet50", "train_steps": 10, "batch_size": 128, "epochs": 60, "optimizer": "sgd", "drop_path": 0.0},
    **ATTACK,
}
# arXiv:2303.11135: the two train.sh files; the settings of the other data sets were not published.
TWINS: dict[str, dict[str, Any]] = {
    "cifar10": {"lr": 0.003, "weight_decay": 1e-5, "frozen_weight": 1.0, "resize": True},
    "caltech256": {"lr": 0.003, "weight_decay": 1e-3, "frozen_weight": 0.4, "val_images": 771},
}
# arXiv:2310.01818, defaults of the released high-resolution code: the same everywhere, no tuning per data set. Its
# validation images are 5 % of train.
AUTOLORA: dict[str, dict[str, Any]] = {
    name: {"lr": 0.01, "weight_decay": 1e-4, "resize": name.startswith("cifar"), "val_images": number}
    for name, number in zip(DATASETS, (2500, 2500, 771, 300, 600), strict=True)
}

_CONFIGS = {"full": "finetune", "prompt": "vpt"}
# What a run here does otherwise than the released code.
_PACE = "the learning rate changes with every step; in the released code with every epoch, and the first has 0"
_AUGMENT = "images are shifted and mirrored; the released code trains on CIFAR without"
_CROP = "images are the middle square at 224, shifted by up to 14; the paper's are crops of 224 from 256"
_LAST = "the attack keeps its last iterate; the released code the best of a whole batch, in practice the last"
_DECAY = "weight decay as configured; the released code always takes 0.01"
_NORMS = "the weights of norms do not decay; in the released code they do"
_SGD = "adamw as configured; the released code takes SGD where the decay is 0"
_DEAD = {
    "lora": ["LoRA starts with one factor random; the released configuration zeroes both, and they never move"],
    "adapter": ["an adapter's first layer starts random; in the released code both are zero, and only a bias moves"],
}
_DROPOUT = "LoRA's dropout of 0.1 is active; in the released code it never is"
_PIXELS = "eps 0.0314 and step 0.00784 of the released code are taken for 8/255 and 2/255"
_NEAREST = "images are enlarged bilinearly; the released code repeats pixels"
_SAME_TEST = "validation images are taken from train; the released code selects on the test images"
_ALL_DECAY = "norms and biases do not decay; in the released code they do"
_START = "PGD of validation and test starts at a random point; in the released code at the image"
_LAST_BLOCKS = "every block runs its natural branch; in the released code only the last one of each stage"


@dataclass(frozen=True)
class Preset:
    """One published cell: the fields it sets, where from, and a line for whatever the released code does else."""

    name: str
    strategy: str
    settings: dict[str, Any]
    source: str
    notes: tuple[str, ...]

    def of(self, recipe: Recipe) -> Recipe:
        """``recipe`` with the fields of this cell."""
        return dataclasses.replace(recipe, data=self.name, **self.settings)


def strategies(name: str) -> list[str]:
    """The strategies with a published setting on data set ``name``. Raises SettingsError for an unknown name."""
    if name not in DATASETS:
        raise SettingsError(f"unknown preset {name!r}", did_you_mean(name, DATASETS))
    return [*RATES, *(["twins"] if name in TWINS else []), *(["autolora"] if name in AUTOLORA else [])]


def find(name: str, strategy: str, released: bool = False) -> Preset:
    """The cell of ``strategy`` on the data set ``name``; ``released``: as the released code runs it.

    Raises SettingsError for a cell that was not published, naming those that were.
    """
    known = strategies(name)
    if strategy not in known:
        raise SettingsError(
            f"preset {name} has no published setting for {strategy}", f"published for {name}: {', '.join(known)}"
        )
    if strategy in RATES:
        return _roli(name, strategy, released)
    if released:
        raise SettingsError(f"--as-released with --strategy {strategy}", "leave it out: it knows RoLI's code only")
    low = name.startswith("cifar")
    notes = [_PIXELS, _NEAREST if low else _CROP, _ALL_DECAY, _START, _SAME_TEST]
    if strategy == "twins":
        source = f"arXiv:2303.11135, ziquanliu/CVPR2023-TWINS, TWINS_{'cifar' if low else 'high_res_data'}/train.sh"
        return Preset(name, strategy, {**RESNET, "schedule": "drops", **TWINS[name]}, source, tuple(notes))
    notes += [_LAST_BLOCKS]
    if name == "caltech256":
        notes += ["the test images are of all classes; the released code's are of 24"]
    source = "arXiv:2310.01818, GodXuxilie/RobustSSL_Benchmark, Finetuning_Methods/AutoLoRa/high_resolution"
    return Preset(name, strategy, {**RESNET, **AUTOLORA[name]}, source, tuple(notes))


def _roli(name: str, strategy: str, released: bool) -> Preset:
    head, _, tuning = strategy.rpartition("-")
    low = name.startswith("cifar")
    base, decay = RATES[strategy][DATASETS.index(name)]
    probe_base, probe_decay = RATES["linear"][DATASETS.index(name)]
    epochs = DATA[name]["epochs"]
    settings = {**ROLI, **DATA[name], "probe_epochs": epochs, "warmup": 10 / epochs}
    settings |= {"probe_lr": probe_base / 4, "probe_weight_decay": probe_decay}
    if tuning != "linear":
        settings |= {"lr": base / 4, "weight_decay": decay}
    if tuning == "full":
        settings |= {"drop_path": 0.5}
    notes = [] if low else [_CROP]
    if released:
        settings |= {"schedule": "epoch-cosine", "augment": not low}
        notes += [_LAST]
    else:
        notes += [_PACE, *([_AUGMENT] if low else [])]
    if tuning != "linear":
        # The code's make_optimizer: no decay, no AdamW; and AdamW has one decay, whatever is configured.
        if released:
            settings |= {"weight_decay": 0.01} if decay else {"optimizer": "sgd"}
        notes += [] if released else [_DECAY if decay else _SGD]
        notes += [_NORMS] if released and decay and tuning == "full" else []
    notes += _DEAD[tuning] if tuning in _DEAD and (tuning, head) != ("lora", "ranli") else []
    notes += [_DROPOUT] if tuning == "lora" else []
    data, whose = "stanforddogs" if name == "dogs" else name, head or "ranli"
    source = f"arXiv:2312.05716, DongXzz/RoLI, configs/{_CONFIGS.get(tuning, tuning)}/{data}_{whose}.yaml"
    return Preset(name, strategy, settings, source, tuple(notes))


def check_weights(recipe: Recipe) -> None:
    """Raise SettingsError where a preset's model is to start from weights that the package ships for its small ones."""
    if recipe.weights in SHIPPED and recipe.model not in MICROS:
        wanted = {
            ROLI["model"]: "ARES_Swin_base_patch4_window7_224_AT.pth (arXiv:2302.14301)",
            RESNET["model"]: "resnet50_linf_eps4.0.ckpt (arXiv:2007.08489)",
        }
        what = f"the preset's {recipe.model} needs robust weights, and none are shipped for it"
        named = wanted.get(recipe.model, "FILE")
        raise SettingsError(what, f"--weights {named}, or --model {MICRO} for a trial without")


def listing(name: str) -> str:
    """The cells of the data set ``name``, a line each, and below what the released code does else in any of them."""
    cells = [find(name, strategy) for strategy in strategies(name)]
    lines = [f"preset {name}: linf {show_pixels(ATTACK['eps'])}, PGD-7 training (TWINS, AutoLoRa: 10), PGD-10 test", ""]
    for cell in cells:
        linear = cell.strategy == "linear"
        rate, decay, epochs = (
            cell.settings[f"probe_{key}" if linear else key] for key in ("lr", "weight_decay", "epochs")
        )
        what = f"{epochs} epochs, peak lr {rate:g}, weight decay {decay:g}, batch {cell.settings['batch_size']}"
        lines += [f"  {cell.strategy:<14} {cell.settings['model']}, {what}", f"  {'':<14} {cell.source}"]
    lines += ["", "otherwise than in the released code (RoLI's: --as-released):"]
    for note in dict.fromkeys(note for cell in cells for note in cell.notes):
        having = ", ".join(cell.strategy for cell in cells if note in cell.notes)
        lines += [f"  {note} ({having.replace(', '.join(RATES), 'RoLI: all')})"]
    return "\n".join(lines)

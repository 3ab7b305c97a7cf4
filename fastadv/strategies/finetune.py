"""Adversarial fine-tuning: five tunings from four heads, ``ranli-full`` to ``zero-prompt``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from fastadv.heads import HeadStart, ranli, zero
from fastadv.losses import clean_ce, training_loss
from fastadv.recipe import Recipe
from fastadv.strategies import Stage, strategy
from fastadv.strategies.linear import linear_probe
from fastadv.tuning import Tuning, adapter, bias, full, linear, lora, prompt


def no_probe(recipe: Recipe) -> Iterator[Stage]:
    """Nothing before fine-tuning."""
    yield from ()


def clean_probe(recipe: Recipe) -> Iterator[Stage]:
    """A linear head trained on clean images (LP-FT, arXiv:2202.10054)."""
    smoothing = recipe.label_smoothing
    yield Stage(
        name="probe",
        tuning=linear,
        loss=partial(clean_ce, label_smoothing=smoothing),
        epochs=recipe.probe_epochs,
        lr=recipe.probe_lr,
        weight_decay=recipe.probe_weight_decay,
        optimizer=recipe.probe_optimizer,
        head=ranli,
        robust=False,
    )


# What comes before fine-tuning, the head it overwrites (None: keeps the probe's), and a line for --help.
HEADS: dict[str, tuple[Callable[[Recipe], Iterator[Stage]], HeadStart | None, str]] = {
    "ranli": (no_probe, ranli, "from the paper's random head"),
    "roli": (linear_probe, None, "from the best head of an adversarial linear probe"),
    "lp": (clean_probe, None, "from the best head of a clean linear probe (a control)"),
    "zero": (no_probe, zero, "from a head of zeros (a control)"),
}
# What learns beside the head, its peak learning rate on the shipped small Swin, and a line for --help.
TUNINGS: dict[str, tuple[Tuning, float, str]] = {
    "full": (full, 5e-4, "Fine-tunes everything"),
    "lora": (lora, 5e-3, "Fine-tunes low-rank updates of queries and values"),
    "adapter": (adapter, 5e-3, "Fine-tunes a small adapter behind every MLP"),
    "bias": (bias, 5e-3, "Fine-tunes the biases and relative position tables"),
    "prompt": (prompt, 2e-2, "Fine-tunes ten prompt tokens in every block"),
}


def register(head: str, tuning: str) -> None:
    """Register the strategy ``head-tuning``."""
    before, start, whence = HEADS[head]
    learns, lr, what = TUNINGS[tuning]

    def stages(recipe: Recipe) -> Iterator[Stage]:
        yield from before(recipe)
        yield Stage(
            name="finetune",
            tuning=partial(prompt, num_tokens=recipe.prompt_tokens) if learns is prompt else learns,
            loss=training_loss(recipe.loss, recipe.beta, recipe.label_smoothing),
            epochs=recipe.epochs,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            optimizer=recipe.optimizer,
            head=start,
        )

    stages.__doc__ = f"{what}, {whence}."
    strategy(f"{head}-{tuning}", source="arXiv:2312.05716", recipe=Recipe(lr=lr))(stages)


for _head in HEADS:
    for _tuning in TUNINGS:
        register(_head, _tuning)

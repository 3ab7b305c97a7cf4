"""fit(): the training loop, one screen; what it needs around it stands below, in the order of use."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fastadv.data import Splits, shuffled, steps_per_epoch
from fastadv.errors import NumericalError, SettingsError
from fastadv.measure import measure
from fastadv.models import Classifier
from fastadv.recipe import Recipe
from fastadv.run import Run
from fastadv.seeds import generator, mix
from fastadv.shadow import holding
from fastadv.standins import window_blocks
from fastadv.strategies import Stage
from fastadv.update import Guard, Update


def fit(model: Classifier, stage: Stage, splits: Splits, recipe: Recipe, run: Run) -> None:
    """Train ``model`` through one stage, from where ``run`` stands; the best weights are then in the run's best/.

    Raises NumericalError before an update would make a weight NaN, SettingsError for a parameter that should learn and
    gets no gradient, Stopped (after saving) when a signal asked for it.
    """
    device = model.mean.device
    if run.stage_step == 0:
        # Saved at the end of the stage before, without the modules that this one's tuning adds.
        run.pick_up(model)
    # What they start from must not depend on whether the run was resumed.
    torch.manual_seed(mix(recipe.seed, run.stage, 1))
    training = stage.tuning(model)
    learners = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(learners, stage)
    run.pick_up(model, learners, optimizer)
    if stage.head and run.stage_step == 0:
        stage.head(model.head, generator("cpu", recipe.seed, run.stage))
    attack = recipe.train_attack.on(model, precision=recipe.precision, compile=recipe.compile, capture=recipe.capture)
    guard = Guard(learners, recipe.clip, run)
    update = Update(stage.loss, low_precision(model, attack.precision), attack, recipe.threat, optimizer, guard)
    epoch_steps = steps_per_epoch(splits.train, recipe.batch_size)
    run.start_stage(stage.name, stage.epochs, epoch_steps)
    run.log.event("stage", name=stage.name, learners=len(learners), precision=attack.precision, step=attack.body)

    while run.stage_step < stage.epochs * epoch_steps:
        epoch, start = divmod(run.stage_step, epoch_steps)
        set_train_mode(model, training)
        for x, y in shuffled(
            splits.train,
            batch_size=recipe.batch_size,
            seed=mix(recipe.seed, run.stage),
            epoch=epoch,
            augment=recipe.augment,
            device=device,
            start=start,
        ):
            # Dropout and drop-path draw from the global stream: seeded by step, a resumed run draws the same.
            torch.manual_seed(mix(recipe.seed, run.step))
            noise = generator(device, recipe.seed, run.step, 0)
            set_lr(optimizer, stage.lr * schedule(run.stage_step, stage.epochs * epoch_steps, recipe.warmup))
            run.advance(update(x, y, noise), len(x))
            # Not after an epoch's last step: its validation would be lost. The save below follows at once.
            if run.must_save() and run.stage_step % epoch_steps:
                guard.settle()
                run.save(model, learners, optimizer)
        guard.settle()
        guard.check_alive()
        metrics = validate(model, stage, splits, recipe, epoch)
        run.end_epoch(epoch, model, metrics, float(optimizer.param_groups[0]["lr"]))
        run.save(model, learners, optimizer)


def adamw(learners: dict[str, nn.Parameter], stage: Stage) -> torch.optim.AdamW:
    """AdamW over ``learners``, with decay on matrices only: norms, biases and position tables are left alone."""
    if not learners:
        raise SettingsError(f"stage {stage.name!r} trains no parameter", "its tuning must let some parameter learn")
    decays = {name: p.ndim >= 2 and "relative_position" not in name for name, p in learners.items()}
    groups = [
        {"params": [p for name, p in learners.items() if decays[name]], "weight_decay": stage.weight_decay},
        {"params": [p for name, p in learners.items() if not decays[name]], "weight_decay": 0.0},
    ]
    device = next(iter(learners.values())).device
    # Fused: one kernel per group, and it skips the update by itself when found_inf is set, without a host sync. The
    # rate is a tensor, so that a recorded update sees it change.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=torch.tensor(stage.lr, device=device),
        fused=True,
        capturable=device.type == "cuda",
    )


def low_precision(model: nn.Module, precision: str) -> Callable[[Tensor], Tensor]:
    """``model`` as a function that computes in ``precision``, Swin's attention fused, and gives float32 logits."""
    blocks = window_blocks(model)

    def forward(x: Tensor) -> Tensor:
        cast = torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with cast, holding(blocks):
            logits: Tensor = model(x)
        return logits.float()

    return forward


def set_train_mode(model: nn.Module, training: list[nn.Module]) -> None:
    """Train mode for the modules a tuning named, eval mode for all others."""
    model.eval()
    for module in training:
        module.train()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next update, for every group."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor in (0, 1] on the peak learning rate: a linear rise over ``warmup * total`` steps, a cosine to zero."""
    rise = int(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def validate(model: Classifier, stage: Stage, splits: Splits, recipe: Recipe, epoch: int) -> dict[str, float] | None:
    """Clean and robust accuracy on the validation split, in the fast precision; None in an epoch without validation."""
    if (epoch + 1) % recipe.val_every and epoch + 1 < stage.epochs:
        return None
    count = partial(
        measure,
        model,
        splits.val,
        threat=recipe.threat,
        seed=recipe.seed,
        batch_size=4 * recipe.batch_size,
        precision=recipe.precision,
    )
    found = count(recipe.eval_attack if stage.robust else None)
    metrics = {"clean": found.clean / found.n}
    if stage.robust:
        metrics["robust"] = found.robust / found.n
    if stage.robust and recipe.train_steps == 1:
        metrics["one_step"] = count(recipe.train_attack).robust / found.n
        check_overfitting(metrics, epoch)
    return metrics


def check_overfitting(metrics: dict[str, float], epoch: int) -> None:
    """Raise NumericalError on catastrophic overfitting: the model resists its single-step attack and nothing stronger.

    Source: arXiv:2001.03994, section 5.4.
    """
    if metrics["one_step"] - metrics["robust"] > 0.2 and metrics["robust"] < 0.5 * metrics["one_step"]:
        raise NumericalError(
            f"catastrophic overfitting in epoch {epoch + 1}: {metrics['one_step']:.1%} robust against its own single "
            f"step, {metrics['robust']:.1%} against PGD",
            "--train-steps 2, or a smaller --step-size; best/ holds the weights from before",
        )

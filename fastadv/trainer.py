"""fit(): the training loop, one screen; what it needs around it stands below, in the order of use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.average import Average
from fastadv.data import Splits, shuffled, steps_per_epoch
from fastadv.errors import NumericalError, SettingsError
from fastadv.measure import measure
from fastadv.models import Classifier
from fastadv.parallel import Parallel
from fastadv.recipe import Recipe
from fastadv.run import Run
from fastadv.schedule import factor
from fastadv.seeds import generator, mix
from fastadv.shadow import holding
from fastadv.sharing import ALONE, Share
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
    optimizer = optimizer_of(learners, stage, recipe.adam_eps)
    run.pick_up(model, learners, optimizer)
    if stage.head and run.stage_step == 0:
        stage.head(model.head, generator("cpu", recipe.seed, run.stage))
    run.share.spread(model)
    average = Average(learners, optimizer, stage.ema)
    seen = stage.through(model) if stage.through else model
    speed = {"precision": recipe.precision, "compile": recipe.compile, "capture": recipe.capture}
    attack = stage.bind(recipe.train_attack, seen, **speed)
    guard = Guard(learners, recipe.clip, run)
    forward = low_precision(seen, attack.precision)
    loss = stage.loss_on(model) if stage.loss_on else stage.loss
    parallel = Parallel(run.share, model, learners)
    update = Update(loss, forward, attack, recipe.threat, optimizer, guard, parallel)
    epoch_steps = steps_per_epoch(splits.train, recipe.batch_size)
    run.start_stage(stage.name, stage.epochs, epoch_steps)
    run.log.event("stage", name=stage.name, learners=len(learners), precision=attack.precision, step=attack.body)

    while run.stage_step < stage.epochs * epoch_steps:
        epoch, start = divmod(run.stage_step, epoch_steps)
        pace = stage.pace(run.accuracies()) if stage.pace else None
        if pace and pace.stop:
            break
        batches = partial(
            shuffled,
            splits.train,
            batch_size=recipe.batch_size,
            seed=mix(recipe.seed, run.stage),
            epoch=epoch,
            augment=recipe.augment,
            device=device,
        )
        if stage.prepare and not start:
            stage.prepare(model, forward, batches())
            run.share.spread(model)
        set_train_mode(model, training)
        for x, y in batches(start=start):
            # Dropout and drop-path draw from the global stream: seeded by step, a resumed run draws the same.
            torch.manual_seed(parallel.seed(recipe.seed, run.step))
            noise = generator(device, recipe.seed, run.step, 0)
            by_step = factor(recipe.schedule, run.stage_step, stage.epochs, epoch_steps, recipe.warmup)
            set_lr(optimizer, stage.lr * (pace.factor if pace else by_step))
            images = len(x)
            if stage.views:
                x, y = stage.views(x, y, generator(device, recipe.seed, run.step, 2), splits.train.flip)
            x, y = parallel.cut(x, y, images)
            run.advance(update(x, y, noise), images)
            average.update(run.stage_step)
            # Not after an epoch's last step: its validation would be lost. The save below follows at once.
            if run.must_save() and run.stage_step % epoch_steps:
                guard.settle()
                run.save(model, learners, optimizer)
        guard.settle()
        guard.check_alive()
        with average.in_place():
            metrics = validate(model, stage, splits, recipe, epoch, run.share)
            run.end_epoch(epoch, model, metrics, float(optimizer.param_groups[0]["lr"]))
        # Before the save: a resumed run finds the weights that the next epoch starts from.
        if stage.pace and stage.pace(run.accuracies()).back:
            run.back_to_best(model)
        run.save(model, learners, optimizer)


def optimizer_of(learners: dict[str, nn.Parameter], stage: Stage, adam_eps: float) -> torch.optim.Optimizer:
    """The stage's optimizer over ``learners``. Raises SettingsError where there is none."""
    if stage.optimizer == "adamw":
        return adamw(learners, stage, adam_eps)
    groups, lr = _groups(learners, stage)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)


def adamw(learners: dict[str, nn.Parameter], stage: Stage, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW over ``learners``, with decay on matrices only: not on norms, biases and relative position tables."""
    groups, lr = _groups(learners, stage)
    return torch.optim.AdamW(groups, lr=lr, eps=eps, fused=True, capturable=lr.device.type == "cuda")


def _groups(learners: dict[str, nn.Parameter], stage: Stage) -> tuple[list[dict[str, Any]], Tensor]:
    """What decays and what does not, for an optimizer, and the learning rate on their device.

    The optimizers are fused: one kernel per group, and they skip an update by themselves when found_inf is set, without
    a host sync. The rate is a tensor, so that a recorded update sees it change.
    """
    if not learners:
        raise SettingsError(f"stage {stage.name!r} trains no parameter", "its tuning must let some parameter learn")
    decays = {name: p.ndim >= 2 and "relative_position" not in name for name, p in learners.items()}
    groups = [
        {"params": [p for name, p in learners.items() if decays[name]], "weight_decay": stage.weight_decay},
        {"params": [p for name, p in learners.items() if not decays[name]], "weight_decay": 0.0},
    ]
    device = next(iter(learners.values())).device
    return [group for group in groups if group["params"]], torch.tensor(stage.lr, device=device)


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


def validate(
    model: Classifier, stage: Stage, splits: Splits, recipe: Recipe, epoch: int, share: Share = ALONE
) -> dict[str, float] | None:
    """Clean and robust accuracy on the validation split, in the fast precision; None in an epoch without validation.

    The same in all processes.
    """
    # A pace counts epochs: it needs them all.
    if not stage.pace and (epoch + 1) % recipe.val_every and epoch + 1 < stage.epochs:
        return None
    if stage.score:
        scored: dict[str, float] = share.tell_json(stage.score(model, splits, recipe))
        return scored
    count = partial(
        measure,
        model,
        splits.val,
        threat=recipe.threat,
        seed=recipe.seed,
        batch_size=4 * recipe.batch_size,
        precision=recipe.precision,
        share=share,
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

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
from fastadv.evaluate import measure
from fastadv.models import Classifier
from fastadv.passes import Health
from fastadv.recipe import Recipe
from fastadv.run import Run
from fastadv.seeds import generator, mix
from fastadv.strategies import Stage


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
    attack = recipe.train_attack.on(model, precision=recipe.precision)
    forward = low_precision(model, attack.precision)
    guard = Guard(learners, recipe.clip, run)
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
            loss = stage.loss(forward, x, y, partial(attack, threat=recipe.threat, generator=noise, wait=False))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            guard.clip_and_flag(loss, attack.health, optimizer)
            optimizer.step()
            attack.refresh()
            run.advance(loss, len(x))
            # Not after an epoch's last step: its validation would be lost. The save below follows at once.
            if run.must_save() and run.stage_step % epoch_steps:
                guard.settle()
                run.save(model, learners, optimizer)
        guard.settle()
        guard.check_alive()
        run.end_epoch(epoch, model, validate(model, stage, splits, recipe, epoch), optimizer.param_groups[0]["lr"])
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
    # Fused: one kernel per group, and it skips the update by itself when found_inf is set, without a host sync.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=stage.lr, fused=True)


def low_precision(model: nn.Module, precision: str) -> Callable[[Tensor], Tensor]:
    """``model`` as a function that computes in ``precision`` and gives float32 logits."""

    def forward(x: Tensor) -> Tensor:
        cast = torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with cast:
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
        group["lr"] = lr


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


class Guard:
    """Keeps bad numbers out of the weights and finds parameters that get no gradient. No host sync in a step."""

    def __init__(self, learners: dict[str, nn.Parameter], clip: float, run: Run) -> None:
        self.names, self.parameters, self.clip, self.run = list(learners), list(learners.values()), clip, run
        self.largest: Tensor | None = None
        self.steps = 0
        self.pending = False
        on_gpu = self.parameters[0].is_cuda
        self.host = torch.empty(2, pin_memory=on_gpu)
        self.arrived = torch.cuda.Event() if on_gpu else None

    def clip_and_flag(self, loss: Tensor, health: Health | None, optimizer: torch.optim.Optimizer) -> None:
        """Scale the gradients to norm <= clip; if they, loss or attack were not finite, make the update a no-op."""
        self.settle()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if len(grads) < len(self.parameters):
            unused = next(name for name, p in zip(self.names, self.parameters, strict=True) if p.grad is None)
            raise SettingsError(f"{unused} should learn but is not part of the loss", "check the stage's tuning")
        norms = torch.stack(torch._foreach_norm(grads))
        total = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, total)
        bad = ~(loss.detach().isfinite() & total.isfinite())
        if health is not None:
            bad |= health.bad.any()
        # Not in torch's annotations, but how its GradScaler tells a fused optimizer to skip an update.
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
        self.largest = norms if self.largest is None else torch.maximum(self.largest, norms)
        self.steps += 1
        self.host.copy_(torch.stack([bad.float(), loss.detach().float()]), non_blocking=True)
        self.pending = True
        if self.arrived is not None:
            # The learners' device need not be the current one.
            self.arrived.record(torch.cuda.current_stream(self.parameters[0].device))

    def settle(self) -> None:
        """Read the flag of the update before: by now it has arrived. Raises NumericalError when it is set."""
        if not self.pending:
            return
        if self.arrived is not None:
            self.arrived.synchronize()
        bad, loss = self.host.tolist()
        self.pending = False
        if bad:
            raise NumericalError(
                f"loss, gradient or attack not finite (loss {loss:g}) at {self.run.where()}; the update was skipped",
                f"lower the learning rate, or --precision fp32; last good checkpoint: {self.run.last_good()}",
            )

    def check_alive(self) -> None:
        """Raise SettingsError for a parameter whose gradient was exactly zero in every step so far (10 at least)."""
        if self.largest is None or self.steps < 10:
            return
        dead = [name for name, largest in zip(self.names, self.largest.tolist(), strict=True) if largest == 0]
        if dead:
            raise SettingsError(
                f"{len(dead)} parameters should learn but their gradient was exactly zero in all {self.steps} steps, "
                f"first {dead[0]}",
                "check how the stage's tuning initialises them (two zero factors never move)",
            )

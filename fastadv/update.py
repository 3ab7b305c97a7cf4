"""One optimiser step, and what keeps bad numbers out of the weights; replayed where the attack is.

Shapes: x (B, C, H, W) float32; y (B,) int64; losses are scalars.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.capture import WARM_UPS, CaptureError
from fastadv.engine import Fast
from fastadv.errors import NumericalError, SettingsError
from fastadv.losses import AttackLoss, Forward, TrainingLoss
from fastadv.parallel import Parallel
from fastadv.run import Run
from fastadv.sharing import ALONE
from fastadv.threat import ThreatModel


class Update:
    """``(x, y, noise) -> loss``: attack, loss, gradients, clipping, step. Nothing in it waits for the device.

    Where the attack is recorded, so is the rest, after its first steps have run as they are: one replay for the attack,
    one for forward, backward, clipping and step. That needs a loss that calls the attack with (x, y), once at most.
    """

    def __init__(
        self,
        loss: TrainingLoss,
        forward: Forward,
        attack: Fast,
        threat: ThreatModel,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        parallel: Parallel | None = None,
    ) -> None:
        self.loss_of, self.forward, self.attack, self.threat = loss, forward, attack, threat
        self.optimizer, self.guard = optimizer, guard
        self.parallel = parallel or Parallel(ALONE, nn.Module(), {})
        self.recorder = attack.recordings.recorder
        if self.recorder is not None and self.parallel.share.size > 1:
            self.recorder = None
            reason = f"{self.parallel.share.size} processes add up their gradients in the middle of a step"
            warnings.warn(f"fastadv: training steps run without capture: {reason}", stacklevel=2)
        self.loss = torch.zeros((), device=guard.device)
        self.broken = torch.zeros((), dtype=torch.bool, device=guard.device)
        """Whether the attack met NaN or infinity."""
        self.calls: list[bool] = []
        """Of the last step that was not replayed: the calls of the attack, and whether with (x, y)."""
        self.warm, self.waits = 0, False
        self.x: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._replay is not None

    def __call__(self, x: Tensor, y: Tensor, noise: torch.Generator) -> Tensor:
        """Make one step; its loss, on the device. Raises NumericalError when the step before met NaN or infinity."""
        self.broken.zero_()
        if self.recorder is not None and self._replay is None and self.warm == WARM_UPS:
            self._record(x, y)
        if self._replay is not None and self.x is not None and x.shape == self.x.shape:
            self.x.copy_(x)
            self.y.copy_(y)
            if self.calls:
                self.adv.copy_(self._attacked(x, y, noise))
            self.guard.settle()
            self._replay()
        elif self.recorder is not None:
            self.waits = self.recorder.warm(partial(self._eagerly, x, y, noise))
            self.warm += 1
        else:
            self._eagerly(x, y, noise)
        self.guard.send()
        return self.loss.clone()

    def _eagerly(self, x: Tensor, y: Tensor, noise: torch.Generator) -> None:
        self.calls = []

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            self.calls.append(images is x and labels is y)
            return self._attacked(images, labels, noise)

        self._step(x, y, attack, self.guard.settle)

    def _attacked(self, x: Tensor, y: Tensor, noise: torch.Generator) -> Tensor:
        adv = self.attack(x, y, self.parallel.threat(self.threat), noise, wait=False)
        assert self.attack.health is not None
        self.broken |= self.attack.health.bad.any()
        return adv

    def _step(self, x: Tensor, y: Tensor, attack: AttackLoss, settle: Callable[[], None]) -> None:
        """What is recorded, with a ``settle`` that does nothing: in Python it does the same every time."""
        loss = self.loss_of(self.forward, x, y, attack)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Not earlier: the device would have nothing to do while the host waits for the flags of the step before.
        settle()
        self.guard.check_parts()
        loss = self.parallel.add_up(loss.detach(), self.broken)
        self.guard.clip_and_flag(loss, self.broken, self.optimizer)
        self.optimizer.step()
        self.loss.copy_(loss)

    def _record(self, x: Tensor, y: Tensor) -> None:
        """Record a step like the ones before, on tensors that stay; where that fails, say so and go on without."""
        assert self.recorder is not None
        self.x, self.y, self.adv = x.clone(), y.clone(), x.clone()
        try:
            if self.calls not in ([], [True]):
                raise CaptureError("the loss does not call the attack once, with (x, y)")
            if self.waits:
                raise CaptureError("the loss waits for the device")
            self._replay = self.recorder.record(partial(self._step, self.x, self.y, lambda *_: self.adv, lambda: None))
        except CaptureError as error:
            self.recorder = None
            warnings.warn(f"fastadv: training steps run without capture: {error}", stacklevel=2)


class Guard:
    """Keeps bad numbers out of the weights and finds parameters that get no gradient. No host sync in a step."""

    def __init__(self, learners: dict[str, nn.Parameter], clip: float, run: Run) -> None:
        self.names, self.parameters, self.clip, self.run = list(learners), list(learners.values()), clip, run
        self.device = self.parameters[0].device
        self.largest = torch.zeros(len(learners), device=self.device)
        self.steps = 0
        self.pending = False
        self.flags = torch.zeros(2, device=self.device)
        self.host = torch.empty(2, pin_memory=self.device.type == "cuda")
        self.arrived = torch.cuda.Event() if self.device.type == "cuda" else None

    def check_parts(self) -> None:
        """Raise SettingsError for a parameter without a gradient."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if parameter.grad is None:
                raise SettingsError(f"{name} should learn but is not part of the loss", "check the stage's tuning")

    def clip_and_flag(self, loss: Tensor, broken: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Scale the gradients to norm <= clip; if they or the loss are not finite, or ``broken``, void the update.

        All on the device, into tensors that stay: this is part of what is recorded.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        total = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, total)
        bad = ~(loss.detach().isfinite() & total.isfinite()) | broken
        # Not in torch's annotations, but how its GradScaler tells a fused optimizer to skip an update.
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, bad.float()
        torch.maximum(self.largest, norms, out=self.largest)
        torch.stack([bad.float(), loss.detach().float()], out=self.flags)

    def send(self) -> None:
        """Send the flags of this update to the host, where the next one reads them."""
        self.host.copy_(self.flags, non_blocking=True)
        self.steps += 1
        self.pending = True
        if self.arrived is not None:
            # The learners' device need not be the current one.
            self.arrived.record(torch.cuda.current_stream(self.device))

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
        if self.steps < 10:
            return
        dead = [name for name, largest in zip(self.names, self.largest.tolist(), strict=True) if largest == 0]
        if dead:
            raise SettingsError(
                f"{len(dead)} parameters should learn but their gradient was exactly zero in all {self.steps} steps, "
                f"first {dead[0]}",
                "check how the stage's tuning initialises them (two zero factors never move)",
            )

"""A model as an attack uses it: two passes, and nothing in the model changed by them.

Shapes: adv (B, C, H, W) float32; y (B,) int64; logits (B, classes) float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastadv.errors import NonFiniteGradientError, SettingsError
from fastadv.inputs import logits_of
from fastadv.losses import AttackLoss, ce_seed


class Passes:
    """The forward and backward passes of one attack through ``model``, under the autocast of the caller, if any.

    seeded: start the backward pass from :func:`fastadv.losses.ce_seed` instead of from ``loss``.
    """

    def __init__(self, model: nn.Module, loss: AttackLoss, mode: str, num_labels: int, *, seeded: bool = False) -> None:
        self.model, self.mode = unwrapped(model), mode
        self.loss, self.num_labels, self.seeded = loss, num_labels, seeded
        self.precision: AbstractContextManager[object] = nullcontext()
        self.classes = 0
        """The model's number of classes, once a pass has shown it."""

    @contextmanager
    def opened(self, device: torch.device) -> Iterator[None]:
        """Inside: gradients are on, autocast is off except in the model's passes, the model is in the attack's mode.

        Works under a caller's no_grad, inference_mode and autocast; afterwards the model is as before.
        Raises: SettingsError for a model that cannot take float32 images, since its weights are of another dtype.
        """
        self.precision = _callers_autocast(device.type)
        off = torch.autocast(device.type, enabled=False)
        try:
            with untouched(self.model, self.mode), torch.inference_mode(False), torch.enable_grad(), off:
                yield
        except RuntimeError as error:
            refusal = _other_dtype(self.model, error)
            if refusal is None:
                raise
            raise refusal from error

    @property
    def rounded(self) -> bool:
        """Whether :meth:`gradient` computes in a lower precision than :meth:`score`."""
        return False

    def forward(self, adv: Tensor) -> Tensor:
        """What the model makes of ``adv`` on the way to a gradient."""
        with self.precision:
            logits: Tensor = self.model(adv)
        return logits

    def gradient(self, adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The logits at ``adv``, detached, and the gradient of the loss with respect to ``adv`` alone."""
        leaf = adv.detach().requires_grad_()
        logits = logits_of(self.forward, leaf, self.num_labels)
        self.classes = logits.shape[1]
        gradient: Tensor | None = None
        if logits.requires_grad:
            # Sum, not mean: each image sees the gradient it would see alone.
            root, seed = (logits, ce_seed(logits.detach(), y)) if self.seeded else (self.loss(logits, y).sum(), None)
            (gradient,) = torch.autograd.grad(root, leaf, seed, allow_unused=True)
        if gradient is None:
            raise SettingsError(
                "the model's logits have no gradient with respect to x", "remove no_grad() or detach() from its forward"
            )
        return logits.detach(), gradient

    def score(self, adv: Tensor) -> Tensor:
        """The logits at ``adv``, without a gradient."""
        with torch.no_grad(), self.precision:
            return logits_of(self.model, adv, self.num_labels)


class Health:
    """Notes on the device which images met NaN or infinity, and in which pass first; read once, at the end."""

    def __init__(self, x: Tensor, passes_per_run: int) -> None:
        self.passes_per_run = passes_per_run
        self.bad = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        self.good_passes = torch.zeros_like(self.bad)

    def note(self, logits: Tensor) -> None:
        """Close a pass: ``bad`` holds the verdict on its gradient already, here comes that on its logits."""
        self.bad.masked_fill_(~logits.isfinite().all(1), 1)
        self.good_passes += self.bad == 0

    def check(self) -> None:
        """Raise NonFiniteGradientError, naming step and images, if an image met NaN or infinity."""
        bad, good_passes = torch.stack([self.bad, self.good_passes]).tolist()
        images = [index for index, flag in enumerate(bad) if flag]
        if not images:
            return
        restart, step = divmod(min(good_passes[index] for index in images), self.passes_per_run)
        place = f"step {step} of restart {restart}" if restart else f"step {step}"
        named = ", ".join(map(str, images[:10])) + (", ..." if len(images) > 10 else "")
        raise NonFiniteGradientError(
            f"logits or gradients are NaN or infinite from {place} on, in {len(images)} of {len(bad)} images: {named}",
            "look for NaN or infinite weights: [n for n, p in model.named_parameters() if not p.isfinite().all()]",
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without DistributedDataParallel around it. Raises SettingsError for what is no module."""
    if not isinstance(model, nn.Module):
        raise SettingsError(
            f"model is a {type(model).__name__}, so its train and eval modes cannot be set",
            "pass an nn.Module; nn.Sequential(Normalize(...), net) joins steps",
        )
    if isinstance(model, DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return model


@contextmanager
def untouched(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Every module in eval mode inside (mode "as-is": in its own); modes and buffers afterwards as before."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone(), _version(buffer))
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        # The flags themselves, not eval() and train(): some modules merge weights or change children in those methods.
        for module, training in zip(modules, modes, strict=True):
            if training and mode == "eval":
                module.training = False
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            if module.training != training:
                module.training = training
        for holder, name, buffer, before, version in buffers:
            # Train-mode batch norm writes its statistics without counting it.
            if mode == "as-is" or _version(buffer) != version:
                with torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(before)
            if name not in holder or holder[name] is not buffer:
                holder[name] = buffer


def _other_dtype(model: nn.Module, error: RuntimeError) -> SettingsError | None:
    """What to raise for ``error`` where it says that float32 images met weights of which none is float32."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    # Asked once a pass has failed, for a model may cast the images itself; subclasses say something else.
    if not dtypes or torch.float32 in dtypes or type(error) is not RuntimeError or "type" not in str(error):
        return None
    return SettingsError(
        f"the model's weights are {', '.join(sorted(map(str, dtypes)))} and do not take float32 images",
        "pass model.float() (for speed: inside torch.autocast), or let the model's forward cast its input",
    )


def _version(tensor: Tensor) -> int:
    """How often ``tensor`` was written to, where that is counted."""
    return -1 if tensor.is_inference() else tensor._version


def _callers_autocast(device_type: str) -> AbstractContextManager[object]:
    """The autocast the caller is in, to be entered again."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type))

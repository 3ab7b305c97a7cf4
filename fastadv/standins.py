"""What stands in for a model's parameters while it is attacked: the same values without a gradient, or bf16 copies.

:mod:`fastadv.shadow` puts them in and takes them out. A layer that adds something to another one's weight (LoRA) has
one plain layer with the sum in its place.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastadv import window_attention

# Where timm defines a family: its class, and the module that takes the pixels in.
FAMILIES = {
    "timm.models.swin_transformer": ("SwinTransformer", "patch_embed"),
    "timm.models.vision_transformer": ("VisionTransformer", "patch_embed"),
    "timm.models.resnet": ("ResNet", "conv1"),
}
# In their blocks bnN takes what convN gives, and nothing else does.
RESNETS = ("timm.models.resnet", "torchvision.models.resnet")
# No handle that torch gives out has it.
_OUR_HOOK = -1


class Slot(NamedTuple):
    """A place in a model, and what belongs there."""

    holder: MutableMapping[Any, Any]
    name: Any
    value: object


class ClassOf(dict[str, Any]):
    """A module's class as a holder with the slot ``__class__``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.module, name, value)


class StandIns(NamedTuple):
    """What stands in, and where."""

    slots: list[Slot]
    update: Callable[[], None] | None
    """Brings the stand-ins' values up to date, in place; None where they share the parameters' memory."""

    def then(self, more: StandIns) -> StandIns:
        """These, and ``more``, which may be made from these."""
        updates = [update for update in (self.update, more.update) if update]

        def both() -> None:
            for update in updates:
                update()

        return StandIns(self.slots + more.slots, both if updates else None)


def merged(model: nn.Module) -> StandIns:
    """One plain layer for each module that adds to the weight of another one, in its place.

    Such a module has ``base``, the layer it adds to, and ``merged()``, the weight with which that layer alone gives the
    same in eval mode. Whatever has no such method, or hooks that wait for its call, stays.
    """
    slots: list[Slot] = []
    weights: dict[Any, Tensor] = {}
    layers: dict[Any, nn.Module] = {}
    for parent in model.modules():
        for name, module in parent._modules.items():
            if module is None or not _is_mergeable(module):
                continue
            if module not in layers:
                # A copy: the base may serve elsewhere without the addition.
                layer: Any = copy.copy(module.base)
                weights[module] = torch.empty_like(layer.weight.detach())
                layer.training, layer._parameters = False, layer._parameters | {"weight": weights[module]}
                layers[module] = layer
            slots.append(Slot(parent._modules, name, layers[module]))

    @torch.no_grad()
    def update() -> None:
        for module, weight in weights.items():
            # A caller's autocast would round the product.
            with torch.autocast(weight.device.type, enabled=False):
                weight.copy_(module.merged())

    return StandIns(slots, update if slots else None)


def detached(model: nn.Module) -> StandIns:
    """Every parameter without its gradient: the same memory, so what an optimiser changes is seen at once."""
    # A tensor that is no Parameter, as functional_call puts there too.
    slots = [
        Slot(module._parameters, name, parameter.detach())
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    return StandIns(slots, None)


def rounded(model: nn.Module) -> StandIns | None:
    """bf16 copies for the timm backbones in ``model``, everything else detached; None for a model without such one.

    What takes the pixels in and what puts the logits out stay float32, and so do batch norm's statistics; the other
    buffers (attention masks) become bf16 too.
    """
    backbones = {module: stem for module in model.modules() if (stem := _stem(module)) is not None}
    if not backbones:
        return None
    copies: dict[Tensor, Tensor] = {}
    slots = []
    for backbone, stem in backbones.items():
        exact = [part for root in (stem, *_classifiers(backbone)) for part in root.modules()]
        for module in backbone.modules():
            if module in exact or isinstance(module, _BatchNorm):
                continue
            for holder in (module._parameters, module._buffers):
                for name, tensor in holder.items():
                    if tensor is None or not tensor.is_floating_point():
                        continue
                    if tensor not in copies:
                        # Convolutions on tensor cores want the channels last; others have no 4-D weights.
                        layout = torch.channels_last if tensor.ndim == 4 and name == "weight" else torch.preserve_format
                        copies[tensor] = torch.empty_like(tensor.detach(), dtype=torch.bfloat16, memory_format=layout)
                    slots.append(Slot(holder, name, copies[tensor]))
        slots += [Slot(stem._forward_hooks, _OUR_HOOK, _round), Slot(backbone._forward_hooks, _OUR_HOOK, _widen)]
        slots += [Slot(head._forward_pre_hooks, _OUR_HOOK, _widen_input) for head in _classifiers(backbone)]
    targets, sources = list(copies.values()), [tensor.detach() for tensor in copies]

    def update() -> None:
        torch._foreach_copy_(targets, sources)

    # The last entry for a slot counts.
    return StandIns(detached(model).slots + slots, update)


def folded(model: nn.Module) -> StandIns | None:
    """Each eval-mode batch norm multiplied into the convolution before it, the rest detached; None where there is none.

    Only where the order of calls is likely: in a Sequential, and between convN and bnN of a ResNet's block or stem. A
    forward may still call a Sequential's layers in another order, or one of them twice: the shadow compares the logits.
    """
    slots: list[Slot] = []
    pairs: dict[Any, tuple[Any, Tensor, Tensor, Tensor]] = {}
    for parent in model.modules():
        for conv, name in _followed_by_norm(parent):
            norm: Any = parent._modules[name]
            if not _is_foldable(conv, norm) or conv in pairs:
                continue
            weight, bias = torch.empty_like(conv.weight.detach()), torch.empty_like(norm.running_mean)
            # The weight as it is now: in a merged layer it is no parameter, and away at an update.
            pairs[conv] = norm, conv.weight.detach(), weight, bias
            slots += [Slot(conv._parameters, "weight", weight), Slot(conv._parameters, "bias", bias)]
            slots.append(Slot(parent._modules, name, nn.Identity()))
    if not pairs:
        return None

    @torch.no_grad()
    def update() -> None:
        for conv, (norm, source, weight, bias) in pairs.items():
            scale = (norm.running_var + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight
            torch.mul(source, scale.view(-1, 1, 1, 1), out=weight)
            shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
            bias.copy_(shift * scale if norm.bias is None else norm.bias + shift * scale)

    return StandIns(detached(model).slots + slots, update)


def wants_channels_last(model: nn.Module, adv: Tensor) -> bool:
    """Whether convolutions on a CPU are faster with the channels of ``adv`` last; runs the model on one image.

    Where maps are large: 1.4x for a small network at 32x32, 1.1x for resnet50 at 224x224. On maps of 4x4 with 512
    channels it takes 1.7 times as long.
    """
    work: list[tuple[int, int]] = []

    def note(conv: Any, inputs: object, output: Tensor) -> None:
        pixels = output.shape[-2:].numel()
        work.append((pixels, pixels * conv.weight.numel()))

    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    # Not for a transformer's patches.
    if len(convs) < 3:
        return False
    hooks = [conv.register_forward_hook(note) for conv in convs]
    try:
        with torch.no_grad():
            model(adv[:1].contiguous(memory_format=torch.channels_last))
    except Exception:
        # A view() that needs the channels first, or what the attack's own pass will meet.
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return sum(done for pixels, done in work if pixels < 49) < 0.1 * sum(done for _, done in work)


def _followed_by_norm(parent: nn.Module) -> Iterator[tuple[Any, str]]:
    """Children of ``parent`` and the name of the child that takes their output, where the class tells."""
    children = list(parent._modules.items())
    if type(parent) is nn.Sequential:
        for (_, conv), (name, _) in itertools.pairwise(children):
            yield conv, name
    # Not for a class derived from theirs: its forward may be another one (a pre-activation block is).
    elif type(parent).__module__ in RESNETS:
        for name, conv in children:
            if name.startswith("conv") and parent._modules.get(f"bn{name[4:]}") is not None:
                yield conv, f"bn{name[4:]}"


def _is_foldable(conv: Any, norm: Any) -> bool:
    return (
        type(conv) is nn.Conv2d
        and type(norm) is nn.BatchNorm2d
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
        and conv.weight.dtype == norm.running_mean.dtype == torch.float32
        and not any(_is_hooked(part) for part in (conv, norm))
    )


def _is_mergeable(module: Any) -> bool:
    base = getattr(module, "base", None)
    return (
        isinstance(base, nn.Module)
        and callable(getattr(module, "merged", None))
        and isinstance(getattr(base, "weight", None), nn.Parameter)
        and not any(_is_hooked(part) for part in module.modules())
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether someone waits for a call of ``module``."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def window_blocks(model: nn.Module) -> list[Slot]:
    """The classes that make Swin blocks of ``model`` compute their attention by ``fastadv::window_attention``."""
    classes = [(module, type(module)) for module in model.modules()]
    try:
        window_attention.insert(model)
        return [Slot(ClassOf(module), "__class__", type(module)) for module, was in classes if type(module) is not was]
    finally:
        for module, was in classes:
            if type(module) is not was:
                module.__class__ = was


def _stem(module: nn.Module) -> nn.Module | None:
    """The part of a timm backbone that takes the pixels in, None for anything else."""
    for where, (family, stem) in FAMILIES.items():
        # Importing timm costs seconds; where nobody has, no model can be one of its.
        if where in sys.modules and isinstance(module, getattr(sys.modules[where], family)):
            part: nn.Module = getattr(module, stem)
            return part
    return None


def _classifiers(backbone: Any) -> list[nn.Module]:
    found = backbone.get_classifier()
    return [found] if isinstance(found, nn.Module) else list(found)


def _round(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.to(torch.bfloat16, memory_format=torch.channels_last if output.ndim == 4 else torch.preserve_format)


def _widen(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.float()


def _widen_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].float(),)

"""What an attack accepts, and the cure for what it does not. Values are read from the device once per call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.errors import DataError, SettingsError
from fastadv.losses import Forward
from fastadv.threat import ThreatModel


class Inputs(NamedTuple):
    """Checked inputs, in the form the loop wants them."""

    x: Tensor
    """Float32 (B, C, H, W), detached, inside the box; contiguous or channels_last."""
    y: Tensor
    """Int64 (B,)."""
    eps: Tensor
    """Radius, float32 (1,) or (B,)."""
    mask: Tensor | None
    """Bool, shape and strides of x."""
    num_labels: int
    """1 + the largest label: the classes the model must have. 0 where values were not read."""


@torch.inference_mode(False)
def check_inputs(
    x: Tensor, y: Tensor, threat: ThreatModel, eps: Tensor | None, mask: Tensor | None, *, values: bool = True
) -> Inputs:
    """The inputs of an attack, ready for its loop. Raises DataError or SettingsError with the cure.

    values=False reads nothing from the device, so ranges, NaN and labels are the caller's word.
    """
    if not isinstance(threat, ThreatModel):
        raise SettingsError(f"threat is {threat!r}, no ThreatModel", 'pass ThreatModel("linf", 8 / 255)')
    _check_image_kind(x)
    _check_labels_kind(y, x)
    mask = None if mask is None else _check_mask(mask, x)
    if eps is None:
        threat.check_radius(threat.eps, threat.eps, num_pixels=x.shape[1:].numel())
        radius = torch.full((1,), threat.eps, dtype=torch.float32, device=x.device)
    else:
        radius = _check_eps_kind(eps, x)
    # A tensor made in inference mode cannot be saved for a backward pass; a copy made outside it can.
    x = x.clone() if x.is_inference() else x.detach()
    y = y.clone() if y.is_inference() else y
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if mask is not None:
        mask = torch.empty_like(x, dtype=torch.bool).copy_(mask)
    num_labels = 0
    if values and len(x):
        found = torch.stack([*x.aminmax(), *y.float().aminmax(), *radius.aminmax()])
        low, high, first, last, least, most = found.tolist()
        x = _check_range(x, low, high, threat.box)
        if first < 0:
            raise DataError(
                f"y holds the label {first:.0f}", "labels are class ids from 0 on; drop such images or map them"
            )
        if eps is not None:
            threat.check_radius(least, most, num_pixels=x[0].numel())
        num_labels = int(last) + 1
    return Inputs(x, y, radius, mask, num_labels)


def logits_of(forward: Forward, adv: Tensor, num_labels: int) -> Tensor:
    """What ``forward`` makes of ``adv``, float32 (B, classes), checked against ``num_labels``.

    Raises: SettingsError for another shape, DataError for a label without a class.
    """
    logits = forward(adv)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(adv):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise SettingsError(
            f"the model answers {len(adv)} images with {found}", "wrap it so that it gives logits (B, classes)"
        )
    if logits.shape[1] < 2:
        raise SettingsError("the model has 1 output", "give it two: an attack looks for another class to win")
    if logits.shape[1] < num_labels:
        raise DataError(
            f"y holds the label {num_labels - 1}, but the model has {logits.shape[1]} classes",
            f"labels are class ids below {logits.shape[1]}; give the model a head for your classes",
        )
    return logits.float()


def _check_image_kind(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise DataError(f"x is a {type(x).__name__}", "pass a float32 tensor (B, C, H, W), as from torch.from_numpy(x)")
    if x.dtype != torch.float32:
        whole = not (x.is_floating_point() or x.is_complex())
        raise DataError(f"x has dtype {x.dtype}", "pass x.float() / 255" if whole else "pass x.float()")
    if x.ndim != 4:
        raise DataError(
            f"x has shape {tuple(x.shape)}", "pass a batch (B, C, H, W); x[None] makes one of a single image"
        )


def _check_labels_kind(y: Tensor, x: Tensor) -> None:
    if not isinstance(y, Tensor):
        raise DataError(f"y is a {type(y).__name__}", "pass an int64 tensor (B,), as from torch.tensor(y)")
    if y.shape != x.shape[:1]:
        raise DataError(f"y has shape {tuple(y.shape)} for {len(x)} images", "pass one class id per image, shape (B,)")
    if y.dtype != torch.int64:
        raise DataError(f"y has dtype {y.dtype}", "pass y.long()")
    if y.device != x.device:
        raise DataError(f"y is on {y.device}, x on {x.device}", "pass y.to(x.device)")


def _check_eps_kind(eps: Tensor, x: Tensor) -> Tensor:
    if not isinstance(eps, Tensor):
        raise SettingsError(
            f"eps is a {type(eps).__name__}", "one radius for all images belongs into ThreatModel(eps=...)"
        )
    if eps.shape != x.shape[:1] or not eps.is_floating_point() or eps.device != x.device:
        raise SettingsError(
            f"eps is {eps.dtype} of shape {tuple(eps.shape)} on {eps.device} for {len(x)} images on {x.device}",
            "pass one float per image, shape (B,), on x's device",
        )
    return eps.detach().clone().float()


def _check_mask(mask: Tensor, x: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise SettingsError(
            f"mask is a {type(mask).__name__}", "pass a tensor that broadcasts to x, 0 where nothing may change"
        )
    try:
        fits = mask.expand_as(x).shape == x.shape
    except RuntimeError:
        fits = False
    if not fits or mask.device != x.device:
        raise SettingsError(
            f"mask has shape {tuple(mask.shape)} on {mask.device}, x {tuple(x.shape)} on {x.device}",
            "pass a mask on x's device that broadcasts to x, as (B, 1, H, W) or (H, W) do",
        )
    return mask != 0


def _check_range(x: Tensor, low: float, high: float, box: tuple[float, float]) -> Tensor:
    """``x``, cut to the box where rounding left it. Raises DataError for what rounding cannot have done."""
    if low != low:
        raise DataError("x contains NaN", "find the images with x.isnan().flatten(1).any(1) and drop or repair them")
    slack = 1e-6 * (box[1] - box[0])
    if low < box[0] - slack or high > box[1] + slack:
        whole = box == (0.0, 1.0) and low >= 0 and 2 < high <= 255
        raise DataError(
            f"x reaches from {low:g} to {high:g}, outside the box [{box[0]:g}, {box[1]:g}]",
            "pass x / 255"
            if whole
            else "attack pixels, with mean and std inside the model; other ranges: ThreatModel(box=(low, high))",
        )
    return x.clamp(*box) if low < box[0] or high > box[1] else x

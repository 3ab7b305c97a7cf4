"""Every op once: C++ on the CPU, Triton on CUDA, plain PyTorch elsewhere. :func:`body` says which one runs.

``FASTADV_OPS=reference`` takes the plain PyTorch body everywhere, ``FASTADV_OPS=native`` refuses to start without the
fast one. The meaning of every op is :mod:`fastadv.reference`.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastadv import build, reference, window_reference
from fastadv.errors import SettingsError

_STEP = (
    "(Tensor(a!) adv, Tensor grad, Tensor x, Tensor step_size, Tensor eps, float lo, float hi, "
    "Tensor? mask=None, Tensor(b!)? nonfinite=None) -> ()"
)
# As in csrc, which registers them when the library is there; a test compares the two.
SCHEMAS = {"linf_step": _STEP, "l2_step": _STEP}
# The modules that say what an op means, by its name there. fastadv.window_attention registers its two.
_MEANINGS = dict.fromkeys(SCHEMAS, reference) | dict.fromkeys(window_reference.OPS, window_reference)


def linf_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
    mask: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """Move ``adv`` by ``step_size * sign(grad)``, back into the linf ball around ``x`` and into the box; in place.

    adv, x: float32 (B, ...), x in the box; grad: the same shape, float32, bfloat16 or float16, any strides.
    step_size, eps: pixel units, a number or a tensor with 1 or B values; a negative step descends, zero only projects.
    mask: broadcasts to x, False or 0 = the pixel stays at x. nonfinite: int32 (B,), set to 1 for images whose gradient
    holds NaN or infinity (their sign is 0 and +-1), never cleared.
    Returns ``adv``, with ``|adv - x| <= float32(eps)`` exactly.

    Raises: SettingsError for a wrong shape, dtype, device or memory layout.
    """
    torch.ops.fastadv.linf_step(adv, *_arguments(adv, grad, x, step_size, eps, lo, hi, mask, nonfinite))
    return _changed(adv)


def l2_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
    mask: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """Move ``adv`` by ``step_size`` along ``grad``, back into the l2 ball around ``x`` and into the box; in place.

    As :func:`linf_step`; the gradient of each image is scaled to length 1 first, masked pixels counting as 0. An image
    whose gradient is zero or has no finite length does not move. ``||adv - x||_2 <= float32(eps)`` in float64.
    """
    torch.ops.fastadv.l2_step(adv, *_arguments(adv, grad, x, step_size, eps, lo, hi, mask, nonfinite))
    return _changed(adv)


def body(name: str, device: str | torch.device = "cpu") -> str:
    """Which body of op ``name`` runs on ``device``: "cpp", "triton" or "reference".

    Raises: SettingsError for an unknown name.
    """
    if name not in _MEANINGS:
        raise SettingsError(f"op={name!r} is not an op of fastadv", f"choose one of {', '.join(_MEANINGS)}")
    kind = torch.device(device).type
    if kind == "cuda":
        return "reference" if kernels(name) is None else "triton"
    return _CPU_BODY if kind == "cpu" else "reference"


def image_after_image(images: Tensor) -> bool:
    """Whether each image of (B, ...) fills one block of memory, in any order of its axes, and the next one follows."""
    if images.numel() == 0:
        return True
    filled = 1
    for length, stride in sorted(zip(images.shape[1:], images.stride()[1:], strict=True), key=lambda axis: axis[1]):
        if length > 1 and stride != filled:
            return False
        filled *= length
    return images.shape[0] == 1 or images.stride(0) == filled


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether the pixels of ``a`` and ``b`` have the same shape and lie in the same order in memory."""
    # Axes of length 1 may carry any stride.
    axes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.shape == b.shape and all(length == 1 or here == there for length, here, there in axes)


def _arguments(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    lo: float,
    hi: float,
    mask: Tensor | None,
    nonfinite: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float, Tensor | None, Tensor | None]:
    """What follows ``adv`` in the op's call: checked, on its device, with its memory layout."""
    if adv.ndim < 2 or not image_after_image(adv):
        fix = "pass adv.contiguous(), or a channels_last batch"
        raise SettingsError(f"adv of shape {tuple(adv.shape)}, strides {adv.stride()} is not a dense batch", fix)
    for name, images in (("grad", grad), ("x", x)):
        if images.shape != adv.shape or images.device != adv.device:
            found = f"{tuple(images.shape)} on {images.device}"
            fix = "give both the same shape and device"
            raise SettingsError(f"{name} is {found}, adv is {tuple(adv.shape)} on {adv.device}", fix)
    if adv.dtype != torch.float32 or x.dtype != torch.float32:
        raise SettingsError(f"adv is {adv.dtype}, x is {x.dtype}; both must be float32", "pass adv.float(), x.float()")
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SettingsError(f"grad is {grad.dtype}, not float32, bfloat16 or float16", "pass grad.float()")
    if nonfinite is not None and (nonfinite.dtype, nonfinite.shape) != (torch.int32, adv.shape[:1]):
        found = f"{nonfinite.dtype} of shape {tuple(nonfinite.shape)}"
        fix = "pass torch.zeros(len(x), dtype=torch.int32, device=x.device)"
        raise SettingsError(f"nonfinite is {found}, not one int32 per image", fix)
    if mask is not None:
        mask = _laid_out_as(adv, mask.to(adv.device, torch.bool).expand(adv.shape))
    step_size, eps = _per_image("step_size", step_size, adv), _per_image("eps", eps, adv)
    return _laid_out_as(adv, grad), _laid_out_as(adv, x), step_size, eps, lo, hi, mask, nonfinite


def _per_image(name: str, value: float | Tensor, adv: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        # Filled on the device: no copy from the host, no sync.
        return torch.full((1,), value, dtype=torch.float32, device=adv.device)
    if value.numel() not in (1, adv.shape[0]):
        fix = "pass one value, or one per image"
        raise SettingsError(f"{name} has {value.numel()} values for {adv.shape[0]} images", fix)
    return value.to(adv.device, torch.float32).reshape(-1)


def _laid_out_as(adv: Tensor, images: Tensor) -> Tensor:
    return images if same_layout(adv, images) else torch.empty_like(adv, dtype=images.dtype).copy_(images)


def _changed(adv: Tensor) -> Tensor:
    # Ops of a library do not count as a change of their arguments, and a backward pass that saved adv would not notice.
    torch.autograd.graph.increment_version(adv)
    return adv


def _choice() -> str:
    choice = os.environ.get("FASTADV_OPS", "")
    if choice not in ("", "reference", "native"):
        fix = "set it to reference or native, or unset it"
        raise SettingsError(f"FASTADV_OPS={choice!r} is not a choice of op bodies", fix)
    return choice


def _fall_back(missing: str, cure: str) -> None:
    """Say once that the plain PyTorch body takes over, or refuse if FASTADV_OPS=native."""
    if _choice() == "native":
        raise SettingsError(f"FASTADV_OPS=native, but {missing}", f"{cure}, or unset FASTADV_OPS")
    warnings.warn(f"fastadv: {missing}; the slower plain PyTorch ops run instead. To cure: {cure}", stacklevel=3)


def _load_library() -> str:
    """Load the C++ bodies; the name of the CPU body there is afterwards."""
    if _choice() == "reference":
        return "reference"
    try:
        torch.ops.load_library(build.library())
    except (build.BuildError, OSError) as error:
        _fall_back(f"the C++ ops could not be built ({error})", "install g++ or set CXX")
        return "reference"
    return "cpp"


@functools.cache
def kernels(name: str) -> ModuleType | None:
    """The module of the op's Triton body, or None where plain PyTorch serves CUDA. Imports Triton: not before need."""
    if _choice() == "reference":
        return None
    # Triton compiles its launchers with a C compiler.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        _fall_back("Triton needs a C compiler and finds none", "install gcc or set CC")
        return None
    try:
        return importlib.import_module(f"fastadv.kernels.{name.removesuffix('_backward')}")
    except ImportError as error:
        _fall_back(f"the Triton ops cannot be imported ({error})", "pip install triton, and fastadv itself")
        return None


def register(schemas: Mapping[str, str], cuda: Mapping[str, Callable[..., Any]], fake: Mapping[str, Any]) -> None:
    """Make ops known to torch: name -> schema, CUDA body, and what comes out of tensors without values."""
    for name, schema in schemas.items():
        # The library defines its ops itself.
        if _CPU_BODY == "reference":
            LIBRARY.define(name + schema)
        # Every device without a body of its own.
        LIBRARY.impl(name, getattr(_MEANINGS[name], name), "CompositeExplicitAutograd")
        LIBRARY.impl(name, cuda[name], "CUDA")
        torch.library.register_fake(f"fastadv::{name}", fake[name], lib=LIBRARY)


def _step_on_cuda(name: str) -> Callable[..., None]:
    def step(*args: Any) -> None:
        body = kernels(name)
        (getattr(reference, name) if body is None else body.launch)(*args)

    return step


def _in_place(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: Tensor,
    eps: Tensor,
    lo: float,
    hi: float,
    mask: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """The fake body: nothing is returned, so there is no shape to tell."""


_CPU_BODY = _load_library()
LIBRARY = torch.library.Library("fastadv", "FRAGMENT")
register(SCHEMAS, {name: _step_on_cuda(name) for name in SCHEMAS}, dict.fromkeys(SCHEMAS, _in_place))

"""GPU parts about kernels: the machine's own limits, the fused step, window attention. Each yields rows for the JSON.

On the CPU, for the dry run, the same code with tiny shapes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_settings import Settings
from limits import window_bytes
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

from fastadv import ops, reference, window_attention, window_reference

Row = dict[str, Any]
EPS, STEP = 8 / 255, 2 / 255
# Of swin_base: side, channels, heads, depth, shifted or not by turns where the map is larger than a window.
STAGES = ((56, 128, 4, 2), (28, 256, 8, 2), (14, 512, 16, 18), (7, 1024, 32, 2))
TINY_STAGES = ((14, 32, 2, 2), (7, 64, 4, 2))


def machine(settings: Settings) -> Iterator[Row]:
    """The body of every op (a reference body is an error), the bandwidth of a copy, the rate of a bf16 product."""
    device = settings.device
    bodies = {name: ops.body(name, device) for name in (*ops.SCHEMAS, *window_attention.SCHEMAS)}
    yield {"what": "bodies", **bodies}
    if "reference" in bodies.values():
        raise RuntimeError(f"an op runs as plain PyTorch: {bodies}")
    size = 2**16 if settings.tiny else 2**29
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    took = seconds_of(lambda: target.copy_(source), device, repeats=5)
    yield {"what": "copy", "bytes": 2 * source.nbytes, "seconds": took, "tb_per_s": 2 * source.nbytes / took / 1e12}
    side = 64 if settings.tiny else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in "ab")
    took = seconds_of(lambda: a @ b, device, repeats=5)
    yield {"what": "bf16 product", "side": side, "seconds": took, "tflop_per_s": 2 * side**3 / took / 1e12}


def step(settings: Settings) -> Iterator[Row]:
    """The fused steps at 64x3x224x224: bytes per second against a copy's, plain PyTorch, and whether they are exact.

    Bytes: adv read and written, gradient and x read. Copy and step move the same number of bytes, in turns.
    """
    device = settings.device
    shape = (2, 3, 32, 32) if settings.tiny else (64, 3, 224, 224)
    for name, dtype in (("linf_step", torch.float32), ("linf_step", torch.bfloat16), ("l2_step", torch.float32)):
        op = getattr(ops, name)
        x = torch.rand(shape, device=device)
        grad = torch.randn(shape, device=device).to(dtype)
        adv = (x + EPS * torch.randn(shape, device=device)).clamp(0, 1)
        want = adv.clone()
        options = {"mask": None, "nonfinite": None}
        radius = [torch.full((1,), value, device=device) for value in (STEP, EPS)]
        getattr(reference, name)(want, grad, x, *radius, 0.0, 1.0, *options.values())
        got = op(adv.clone(), grad, x, STEP, EPS)
        if name == "linf_step" and not torch.equal(got, want):
            raise RuntimeError(f"{name} differs from its meaning by {(got - want).abs().max():g}")
        moved = 3 * x.nbytes + grad.nbytes
        half = torch.empty(moved // 8, device=device)
        other = torch.empty_like(half)
        # The tensors that do not fit into the cache together: 154 MB at 64x3x224x224, an H200 has 50 to 60.
        calls = {
            "fused": lambda op=op, adv=adv, grad=grad, x=x, radius=radius: op(adv, grad, x, *radius),
            "copy": lambda half=half, other=other: other.copy_(half),
            "plain": lambda adv=adv, grad=grad, x=x: plain_linf(adv, grad, x),
        }
        took = in_turns(calls, device, repeats=3 if settings.tiny else 20)
        yield {
            "what": name,
            "gradient": str(dtype).removeprefix("torch."),
            "bytes": moved,
            "seconds": took,
            "tb_per_s": moved / took["fused"] / 1e12,
            "share_of_copy": took["copy"] / took["fused"],
            "plain_over_fused": took["plain"] / took["fused"],
        }


def plain_linf(adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The step in plain PyTorch."""
    return torch.clamp(x + torch.clamp(adv + STEP * grad.sign() - x, -EPS, EPS), 0, 1)


def window(settings: Settings) -> Iterator[Row]:
    """Window attention of each stage of swin_base: bytes per second of the op, and timm's block, plain and fused.

    The block's time includes its two Linear layers, on all three sides. Sums are weighted by the depth of the stages.
    """
    device, dtype = settings.device, torch.float32 if settings.tiny else torch.bfloat16
    batch = 1 if settings.tiny else 128
    totals = {way: {"bytes": 0.0, "seconds": 0.0} for way in ("forward", "backward")}
    for side, channels, heads, depth in TINY_STAGES if settings.tiny else STAGES:
        for shift, count in ((0, depth - depth // 2), (3, depth // 2)) if side > 7 else ((0, depth),):
            row = op_row(batch, side, channels, heads, shift, device, dtype, settings)
            row |= block_row(batch, side, channels, heads, shift, device, dtype, settings)
            for way, moved in zip(totals, window_bytes(batch, side, channels, dtype.itemsize), strict=True):
                totals[way]["bytes"] += count * moved
                totals[way]["seconds"] += count * row[f"{way}_s"]
            yield {"what": "stage", "side": side, "channels": channels, "shift": shift, "batch": batch, **row}
            if settings.left() < 5:
                yield {"skipped": "no time left for the other stages"}
                return
    yield {"what": "total", **{f"{way}_tb_per_s": t["bytes"] / t["seconds"] / 1e12 for way, t in totals.items()}}


def op_row(
    batch: int, side: int, channels: int, heads: int, shift: int, device: str, dtype: torch.dtype, settings: Settings
) -> Row:
    """The op alone, forward and backward to qkv, in turns over enough inputs that none stays in the cache."""
    forward_bytes, backward_bytes = window_bytes(batch, side, channels, dtype.itemsize)
    sets = 2 if settings.tiny else max(2, -(-(2**28) // forward_bytes))
    qkvs = [torch.randn(batch, side, side, 3 * channels, device=device).to(dtype) for _ in range(sets)]
    grads = [torch.randn(batch, side, side, channels, device=device).to(dtype) for _ in range(sets)]
    table = torch.randn(13 * 13, heads, device=device) * 0.1
    sizes = (heads, 7, shift, shift, (channels // heads) ** -0.5)
    few = qkvs[0][:2].contiguous()
    want = window_reference.window_attention(few.double(), table.double(), *sizes)
    error, plain = (
        ((body(few, table, *sizes) - want).norm() / want.norm()).item()
        for body in (torch.ops.fastadv.window_attention, window_reference.window_attention)
    )
    # The house's rule for kernels: at most twice the error of plain PyTorch in the same precision.
    if not error <= 2 * plain:
        raise RuntimeError(f"window attention of {side}x{side}x{channels} is off by {error:g}, plain code by {plain:g}")

    def forward() -> None:
        for qkv in qkvs:
            torch.ops.fastadv.window_attention(qkv, table, *sizes)

    def backward() -> None:
        for qkv, grad in zip(qkvs, grads, strict=True):
            torch.ops.fastadv.window_attention_backward(grad, qkv, table, *sizes, False)

    took = in_turns({"forward": forward, "backward": backward}, device, repeats=2 if settings.tiny else 5)
    return {
        "error": error,
        "forward_s": took["forward"] / sets,
        "backward_s": took["backward"] / sets,
        "forward_tb_per_s": sets * forward_bytes / took["forward"] / 1e12,
        "backward_tb_per_s": sets * backward_bytes / took["backward"] / 1e12,
    }


def block_row(
    batch: int, side: int, channels: int, heads: int, shift: int, device: str, dtype: torch.dtype, settings: Settings
) -> Row:
    """timm's ``_attn``, plain, fused, and with the op: milliseconds of forward and input gradient, in turns."""
    block = SwinTransformerBlock(channels, (side, side), num_heads=heads, window_size=7, shift_size=shift)
    block = block.to(device, dtype).eval().requires_grad_(False)
    x = torch.randn(batch, side, side, channels, device=device).to(dtype).requires_grad_()

    def half_block(fused: bool) -> None:
        block.attn.fused_attn = fused
        out = block._attn(x)
        torch.autograd.grad(out, x, out)

    def with_op() -> None:
        window_attention.insert(block)
        half_block(False)
        window_attention.remove(block)

    if window_attention.insert(block) != 1:
        raise RuntimeError(f"the op does not serve the block of {side}x{side}x{channels}")
    window_attention.remove(block)
    calls = {"timm": lambda: half_block(False), "timm_fused": lambda: half_block(True), "op": with_op}
    took = in_turns(calls, device, repeats=2 if settings.tiny else 5)
    return {f"half_block_{name}_s": value for name, value in took.items()}


def in_turns(calls: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Seconds of each call: the median over turns, each a replay of a CUDA graph, so the host does not count."""
    runs = {name: recorded(call, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(once(run, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_of(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of one call, the median."""
    return in_turns({"it": call}, device, repeats)["it"]


def recorded(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call as a CUDA graph, after two calls that warm it up; on the CPU the call itself."""
    if device == "cpu":
        call()
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def once(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run, by the device's clock."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000

"""What arithmetic and memory of an H200 allow at best: FLOPs of a job, images per second that no code exceeds.

FLOPs (2 per multiply-add) per 224x224 image are counted with torch's flop counter on meta tensors; a test repeats it
for swin_tiny. The limit assumes 790 TFLOP/s in bf16 and 4.3 TB/s, both measured on an H200 with torch's own product and
copy, and a design in which LayerNorm, GEMM with bias, GELU and residual, and window attention are one kernel each, so
that every tensor between them is written and read once. No launch gaps, no data loading; batch 128.
"""

from __future__ import annotations

from typing import NamedTuple

SWIN_BASE, SWIN_TINY = "swin_base_patch4_window7_224", "swin_tiny_patch4_window7_224"


class Flops(NamedTuple):
    """GFLOP per image of a forward pass, a backward pass to the image alone, and one to everything."""

    forward: float
    to_image: float
    to_all: float


FLOPS = {SWIN_BASE: Flops(30.86, 31.47, 61.68), SWIN_TINY: Flops(8.98, 9.26, 17.93)}
# Images per second: one training step with PGD-7 that updates everything; PGD-10.
H200 = {
    (SWIN_BASE, "training"): 960,
    (SWIN_BASE, "attack"): 769,
    (SWIN_TINY, "training"): 2360,
    (SWIN_TINY, "attack"): 1880,
}


def gflop(model: str, job: str, steps: int) -> float | None:
    """GFLOP per image that the job needs: its steps to the image, and for training one step to everything."""
    if model not in FLOPS:
        return None
    one = FLOPS[model]
    attack = steps * (one.forward + one.to_image)
    return attack + (one.forward + one.to_all if job == "training" else 0)


def window_bytes(batch: int, side: int, channels: int, width: int) -> tuple[int, int]:
    """Bytes that window attention on a map of ``side`` x ``side`` must move: forward, and backward to qkv.

    Forward reads qkv and writes the output, 4 maps; backward reads qkv and the gradient and writes qkv's, 7 maps.
    """
    one = batch * side * side * channels * width
    return 4 * one, 7 * one

"""Arguments for the fused steps, with everything in them that a body could get wrong."""

import math

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 1), (2, 63), (2, 100), (1, 1000), (5, 3, 10, 10), (4, 3, 15, 17), (2, 3, 64, 64), (1, 2**20 + 3))


def step_case(shape, *, dtype=torch.float32, box=(0.0, 1.0), per_image=False, masked=False, seed=0):
    """Arguments of a step: adv, grad, x, step_size, eps, lo, hi, mask. The gradient holds zeros, NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    lo, hi = box
    x = (torch.rand(shape, generator=generator) * (hi - lo) + lo).clamp(lo, hi)
    adv = (x + 0.05 * torch.randn(shape, generator=generator)).clamp(lo, hi)
    grad = 1e-3 * torch.randn(shape, generator=generator)
    flat = grad.view(shape[0], -1)
    flat[:, ::7] = 0
    if shape[0] > 1 and flat.shape[1] > 12:
        flat[1, 11], flat[1, 12] = math.nan, -math.inf
    if shape[0] > 2:
        flat[2, 0] = math.inf
    eps = torch.rand(shape[0], generator=generator) * 0.1 if per_image else torch.tensor([8 / 255])
    step = torch.rand(len(eps), generator=generator) * 0.05 + 0.001
    mask = torch.rand(shape, generator=generator) < 0.7 if masked else None
    return adv, grad.to(dtype), x, step, eps, lo, hi, mask


def flags(adv):
    return torch.zeros(len(adv), dtype=torch.int32)


def assert_same_bits(a, b):
    """Equal including the sign of zero, which torch.equal does not see."""
    assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def lengths(adv, x):
    return (adv.double() - x.double()).flatten(1).norm(dim=1)

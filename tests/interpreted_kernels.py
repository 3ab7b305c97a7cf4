"""Runs the Triton launchers on the CPU through Triton's interpreter and compares them with the reference.

A program of its own, because interpreter and compiler do not share a process. With the argument ``plain-rounding`` the
edge of the ball is planted without its correction, and the program must fail.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from step_cases import DTYPES, assert_same_bits, flags, lengths, step_case

from fastadv import reference
from fastadv.kernels import l2_step, linf_step

# Odd sizes, sizes aligned to 4 and to 16 pixels, a whole number of blocks and more than one.
SHAPES = ((3, 1), (2, 63), (2, 100), (1, 1000), (4, 3, 15, 17), (2, 3, 32, 32))
VARIANTS = (
    dict(box=(0.0, 1.0), per_image=True, masked=True, seed=0),
    dict(box=(0.1, 0.9), per_image=False, masked=False, seed=1),
    dict(box=(-2.1, 2.6), per_image=True, masked=False, seed=2),
)


@triton.jit
def plain_rounding(x, offset):
    return (x + offset).to(tl.float32)


def cases():
    for shape in SHAPES:
        for variant, dtype in zip(VARIANTS, DTYPES, strict=True):
            yield step_case(shape, dtype=dtype, **variant)
    last = [t.contiguous(memory_format=torch.channels_last) for t in step_case((2, 3, 9, 8))[:3]]
    yield *last, *step_case((2, 3, 9, 8))[3:]


def compare(adv, grad, x, step, eps, lo, hi, mask, sign):
    linf = (grad, x, sign * step, eps, lo, hi, mask)
    # A wide ball for l2: lengths grow with the number of pixels.
    l2 = (grad, x, 20 * sign * step, 20 * eps, lo, hi, mask)
    bodies = []
    for launch, plain, arguments in (
        (linf_step.launch, reference.linf_step, linf),
        (l2_step.launch, reference.l2_step, l2),
    ):
        ours, theirs, our_flags, their_flags = adv.clone(), adv.clone(), flags(adv), flags(adv)
        launch(ours, *arguments, our_flags)
        plain(theirs, *arguments, their_flags)
        assert our_flags.tolist() == their_flags.tolist()
        bodies.append((ours, theirs))
    assert_same_bits(*bodies[0])
    torch.testing.assert_close(*bodies[1], rtol=2**-23, atol=1e-12)
    assert (lengths(bodies[1][0], x) <= 20 * eps.double()).all()


def refuses_what_would_read_elsewhere():
    x, size = torch.rand(2, 3, 4, 4), torch.tensor([0.1])
    for launch in (linf_step.launch, l2_step.launch):
        for bad in (
            (x, x, x, size, size),
            (x.clone(), x[:1], x, size, size),
            (x.clone(), x, x.clone(memory_format=torch.channels_last), size, size),
            (x.clone(), x.double(), x, size, size),
            (x.clone(), x, x, torch.rand(3), size),
            (x[:, :, ::2], x[:, :, ::2], x.clone()[:, :, ::2], size, size),
        ):
            try:
                launch(*bad, 0.0, 1.0)
            except ValueError:
                continue
            raise AssertionError(f"{launch.__module__} took arguments it cannot handle")


def main():
    if sys.argv[1:] == ["plain-rounding"]:
        linf_step.ball_edge = l2_step.ball_edge = plain_rounding
    compared = 0
    for case in cases():
        compare(*case, sign=1 if compared % 2 else -1)
        compared += 1
    # The interpreter takes milliseconds per program, whatever its size.
    linf_step.BLOCK = l2_step.BLOCK = 2**18
    compare(*step_case((1, 2**20 + 3)), sign=1)
    refuses_what_would_read_elsewhere()
    linf_step.launch(*(torch.zeros(0, 3, 4, 4) for _ in range(3)), torch.zeros(1), torch.zeros(1), 0.0, 1.0)
    print(f"{compared + 1} cases agree")


if __name__ == "__main__":
    main()

"""Runs the window attention kernels on the CPU through Triton's interpreter and compares them with timm's block.

A program of its own, because interpreter and compiler do not share a process. When the kernels agree, it plants one
fault after the other into a copy of them, and prints what the comparison says of each.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import importlib.util
import tempfile
from pathlib import Path

import torch
from window_truth import errors, through_timm, window_case

from fastadv.kernels import window, window_attention, window_attention_backward

FP32, FP16 = torch.float32, torch.float16
# window, head dimension, heads, map, shifts, images: every window and head dimension, plain and shifted, maps that are
# not square, that are one window, and that wrap around along one axis only.
CASES = {
    (4, 16, 2, (8, 12), (1, 3), 3): (FP32, FP16),
    (4, 32, 1, (8, 4), (0, 0), 2): (FP32,),
    (4, 64, 2, (4, 8), (2, 2), 1): (FP32,),
    (7, 32, 1, (14, 7), (3, 3), 3): (FP32, FP16),
    (7, 16, 1, (7, 14), (0, 3), 2): (FP32,),
    (7, 64, 1, (7, 7), (0, 0), 2): (FP32,),
    (8, 32, 1, (8, 16), (4, 4), 2): (FP32,),
    (8, 16, 1, (8, 8), (5, 0), 1): (FP32, FP16),
    (8, 64, 1, (16, 8), (0, 0), 1): (FP32,),
}
# Scores so large that hidden tokens are seen after all.
SATURATED = (4, 16, 1, (4, 8), (2, 2), 2, True)
# As little as shows every fault but one.
SMALL = (4, 16, 2, (4, 8), (1, 3), 3)
# File of a kernel, what to replace in it by what.
FAULTS = {
    "no mask": ("window.py", "tl.constexpr(window_reference.HIDDEN)", "tl.constexpr(0.0)"),
    "mask hides for ever": ("window.py", "tl.constexpr(window_reference.HIDDEN)", 'tl.constexpr(float("-inf"))'),
    "shifted to the other side": ("window.py", "+ shift_w\n", "+ (width - shift_w) % width\n"),
    "bias of the opposite offset": ("window.py", "steps[:, None] - steps[None, :]", "steps[None, :] - steps[:, None]"),
    "dq not scaled": ("window_attention_backward.py", 'k, input_precision="ieee") * scale', "k)"),
    "dk of transposed slopes": ("window_attention_backward.py", "tl.dot(tl.trans(slope)", "tl.dot(slope"),
    "dv of half of the softmax": ("window_attention_backward.py", "tl.trans(weight.to", "tl.trans(raised.to"),
    "table forgets images": ("window_attention_backward.py", "bias_grad += score_grad", "bias_grad = score_grad"),
    "table counts images, not entries": ("window_attention_backward.py", "entry * heads + head,", "entry + head,"),
    "a token not written": ("window_attention.py", "mask=inside)\n\n", "mask=inside & (token > 0)[:, None])\n\n"),
}


def compare(kernels, case, dtype):
    """Raises AssertionError where a kernel is further from timm's block in float64 than it has reason to be."""
    qkv, table, grad, settings = window_case(*case)
    qkv, grad = qkv.to(dtype), grad.to(dtype)
    truth = through_timm(qkv.double(), table, grad.double(), settings)
    allowed = errors(through_timm(qkv, table, grad, settings), truth)
    out = kernels.launch(qkv, table, *settings)
    qkv_grad, table_grad = kernels.launch_backward(grad, qkv, table, *settings, True)
    assert (out.dtype, qkv_grad.dtype, table_grad.dtype) == (dtype, dtype, FP32), "dtypes"
    found = errors((out, qkv_grad, table_grad), truth)
    for name, ours, plain in zip(("out", "dq", "dk", "dv", "dtable"), found, allowed, strict=True):
        # Twice the error of plain PyTorch in that dtype; NaN, from memory that nobody wrote, fails as well.
        assert ours <= 2 * plain, f"{name}: {ours:.1e} from the truth in {dtype}, plain PyTorch {plain:.1e}"


def without_a_table_that_learns(kernels):
    """The same gradients bit for bit, and no memory for the table's; no images at all are served too."""
    qkv, table, grad, settings = window_case(4, 16, 1, (8, 8), (2, 2), 3)
    learning, _ = kernels.launch_backward(grad, qkv, table, *settings, True)
    frozen, nothing = kernels.launch_backward(grad, qkv, table, *settings, False)
    assert torch.equal(learning, frozen)
    assert nothing.shape == (0,)
    assert nothing.dtype == FP32
    out = kernels.launch(qkv[:0], table, *settings)
    assert out.shape == (0, 8, 8, 16)
    qkv_grad, table_grad = kernels.launch_backward(grad[:0], qkv[:0], table, *settings, True)
    assert qkv_grad.shape == (0, 8, 8, 48)
    assert torch.equal(table_grad, torch.zeros(49, 1))
    # A table in half precision is read as it is.
    half = table.half()
    ours, same = (kernels.launch(qkv.half(), t, *settings) for t in (half, half.float()))
    assert torch.equal(ours, same)


def refuses_what_it_cannot_serve(kernels):
    qkv, table, grad, (heads, window_size, *rest) = window_case(4, 16, 2, (8, 8), (2, 2), 1)
    good = (qkv, table, heads, window_size, *rest)
    for at, bad in (
        (0, qkv.double()),
        (0, qkv[:, :, :6]),
        (0, qkv[:, :6].contiguous()),
        (0, qkv[0]),
        (1, table[:-1]),
        (1, table.half()),
        (1, table.T.contiguous().T),
        (2, 3),
        (2, 1),
        (3, 8),
        (3, 2),
        (4, 4),
        (5, -1),
    ):
        # The map divides by a window of 8, its table is of another.
        arguments = (*good[:at], bad, *good[at + 1 :])
        assert at != 3 or kernels.supports(qkv, heads, bad) == (bad == 8)
        for launch in (kernels.launch, lambda *a: kernels.launch_backward(grad, *a, False)):
            refused(launch, *arguments)
    for bad in (grad.half(), grad[..., :16], grad.transpose(1, 2)):
        refused(kernels.launch_backward, bad, *good, True)


def refused(launch, *arguments):
    try:
        launch(*arguments)
    except ValueError:
        return
    raise AssertionError("took arguments it cannot handle")


def planted(file, old, new):
    """The launchers of a copy of the kernels in which ``old`` is replaced by ``new``."""
    folder = Path(tempfile.mkdtemp())
    for module in (window, window_attention_backward, window_attention):
        path = Path(module.__file__)
        source = path.read_text()
        if path.name == file:
            assert source.count(old) == 1, f"{old!r} is not in {file} once"
            source = source.replace(old, new)
        (folder / path.name).write_text(source)
        spec = importlib.util.spec_from_file_location(module.__name__, folder / path.name)
        sys.modules[module.__name__] = copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
    one_program_two_images(sys.modules[window.__name__])
    return copy


def one_program_two_images(sizes):
    """Several images in a program, several programs, and a last one with fewer, as soon as there are 3 images."""
    sizes.images_per_program = lambda images, *_: 2


def faults():
    for name, fault in FAULTS.items():
        broken = planted(*fault)
        try:
            for case in (SMALL, SATURATED):
                compare(broken, case, FP32)
        except AssertionError as error:
            print(f"{name} -> {error}")
        else:
            print(f"{name} -> not seen")


def main():
    # New memory is NaN.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    one_program_two_images(window)
    for case, dtypes in (*CASES.items(), (SATURATED, (FP32,))):
        for dtype in dtypes:
            compare(window_attention, case, dtype)
    without_a_table_that_learns(window_attention)
    refuses_what_it_cannot_serve(window_attention)
    print(f"{len(CASES) + 1} cases agree")
    faults()


if __name__ == "__main__":
    main()

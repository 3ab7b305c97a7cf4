"""Window attention in Triton: through the interpreter on any machine, compiled where there is a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from window_truth import HALF, errors, through_timm, window_case

from fastadv import ops, window_reference
from fastadv.window_attention import window_attention

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not there (not Linux)")
# window, head dimension, heads, map, shifts, images: what the shipped network and timm's Swin run, then the rest.
CASES = (
    (4, 16, 6, (8, 8), (2, 2), 33),
    (7, 32, 4, (14, 28), (3, 3), 40),
    (7, 32, 32, (7, 7), (0, 0), 64),
    (8, 32, 3, (16, 8), (4, 0), 5),
    (4, 64, 2, (4, 12), (0, 1), 3),
    (7, 16, 3, (21, 14), (3, 3), 7),
    (8, 64, 2, (16, 16), (4, 4), 2),
    (4, 32, 3, (8, 8), (2, 2), 1),
)


@pytest.fixture(scope="module")
def interpreted():
    command = [sys.executable, str(Path(__file__).with_name("interpreted_window.py"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@needs_triton
def test_interpreted_kernels_equal_timms_block(interpreted):
    assert interpreted[0] == "10 cases agree"


@needs_triton
def test_the_comparison_sees_planted_faults(interpreted):
    # What is wrong first, in the order of the comparison.
    assert {line.split(":")[0] for line in interpreted[1:]} == {
        "no mask -> out",
        "mask hides for ever -> out",
        "shifted to the other side -> out",
        "bias of the opposite offset -> out",
        "dq not scaled -> dq",
        "dk of transposed slopes -> dk",
        "dv of half of the softmax -> dv",
        "table forgets images -> dtable",
        "table counts images, not entries -> dtable",
        "a token not written -> out",
    }


@needs_triton
def test_a_launch_fills_the_card_and_no_more():
    # Here and not above: Triton need not be there.
    from fastadv.kernels.window import images_per_program

    # 132 multiprocessors with 4 programs each. Stages 1 to 4 of swin_base at batch 64: windows x heads to serve.
    assert [images_per_program(64, tiles, 528, 3) for tiles in (64 * 4, 16 * 8, 4 * 16, 32)] == [32, 16, 8, 4]
    # Few images have a program each.
    assert images_per_program(1, 64 * 4, 528, 3) == images_per_program(3, 1, 528, 3) == 1
    for images in range(1, 70):
        assert all(1 <= images_per_program(images, tiles, 528, 3) <= images for tiles in (1, 32, 768, 10**6))


def on_cuda(qkv, table, grad, settings):
    """Output, gradient of qkv and gradient of table, by the op and autograd."""
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = window_attention(qkv, table, *settings)
    return [t.detach() for t in (out, *torch.autograd.grad(out, (qkv, table), grad))]


def cuda_case(case, dtype):
    qkv, table, grad, settings = window_case(*case)
    return qkv.cuda().to(dtype), table.cuda(), grad.cuda().to(dtype), settings


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_kernels_are_as_exact_as_plain_pytorch(case, dtype):
    assert ops.body("window_attention", device="cuda") == "triton"
    qkv, table, grad, settings = cuda_case(case, dtype)
    wide = qkv.double(), table.double(), grad.double()
    out = window_reference.window_attention(*wide[:2], *settings)
    truth = out, *window_reference.window_attention_backward(wide[2], *wide[:2], *settings, True)
    ours = errors(on_cuda(qkv, table, grad, settings), truth)
    plain = errors(through_timm(qkv, table, grad, settings), truth)
    for name, error, allowed in zip(("out", "dq", "dk", "dv", "dtable"), ours, plain, strict=True):
        assert error <= 2 * allowed, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_inputs_give_the_same_bits_captured_or_not(dtype):
    assert ops.body("window_attention", device="cuda") == "triton"
    qkv, table, grad, settings = cuda_case(CASES[1], dtype)
    expected = on_cuda(qkv, table, grad, settings)
    assert all(torch.equal(a, b) for a, b in zip(on_cuda(qkv, table, grad, settings), expected, strict=True))
    # No host sync and no surprise: the ops can be captured.
    given = [torch.zeros_like(t) for t in (qkv, table, grad)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = torch.ops.fastadv.window_attention(*given[:2], *settings)
        grads = torch.ops.fastadv.window_attention_backward(given[2], *given[:2], *settings, True)
    for place, value in zip(given, (qkv, table, grad), strict=True):
        place.copy_(value)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), expected, strict=True))


@pytest.mark.gpu
def test_ops_on_cuda_are_what_they_say():
    assert ops.body("window_attention", device="cuda") == "triton"
    qkv, table, grad, settings = cuda_case(CASES[0], torch.float32)
    forward, backward = torch.ops.fastadv.window_attention, torch.ops.fastadv.window_attention_backward
    leaves = qkv.clone().requires_grad_(), table.clone().requires_grad_()
    assert set(torch.library.opcheck(forward.default, (*leaves, *settings)).values()) == {"SUCCESS"}
    for learns in (False, True):
        results = torch.library.opcheck(backward.default, (grad, qkv, table, *settings, learns))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_a_frozen_table_gets_nothing_and_changes_nothing():
    assert ops.body("window_attention_backward", device="cuda") == "triton"
    qkv, table, grad, settings = cuda_case(CASES[1], torch.bfloat16)
    backward = torch.ops.fastadv.window_attention_backward
    learning, _ = backward(grad, qkv, table, *settings, True)
    frozen, nothing = backward(grad, qkv, table, *settings, False)
    assert nothing.shape == (0,)
    # Two kernels, and two orders of the same sums: within the rounding of bfloat16.
    torch.testing.assert_close(frozen, learning, rtol=2**-7, atol=1e-3)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """The last image of a batch of more than 2^31 values is what it is alone."""
    assert ops.body("window_attention", device="cuda") == "triton"
    needed = 2**31 * 2 * (1 + 1 / 3) * 2 + 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    qkv, table, grad, settings = cuda_case((7, 32, 4, (56, 56), (3, 3), 1), torch.bfloat16)
    images = 2**31 // qkv.numel() + 2
    many, many_grads = qkv.expand(images, -1, -1, -1).contiguous(), grad.expand(images, -1, -1, -1).contiguous()
    out = torch.ops.fastadv.window_attention(many, table, *settings)
    assert torch.equal(out[-1:], torch.ops.fastadv.window_attention(qkv, table, *settings))
    del out
    grads, _ = torch.ops.fastadv.window_attention_backward(many_grads, many, table, *settings, False)
    alone, _ = torch.ops.fastadv.window_attention_backward(grad, qkv, table, *settings, False)
    assert torch.equal(grads[-1:], alone)

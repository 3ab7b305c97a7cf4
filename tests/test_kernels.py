"""The Triton bodies: through the interpreter on any machine, compiled where there is a GPU."""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh_python import run_python
from step_cases import DTYPES, SHAPES, assert_same_bits, flags, lengths, step_case

from fastadv import build, ops, reference

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not there (not Linux)")


def interpret(*arguments):
    command = [sys.executable, str(HERE / "interpreted_kernels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@needs_triton
def test_interpreted_kernels_equal_the_reference():
    result = interpret()
    assert result.returncode == 0, result.stderr
    assert result.stdout == "20 cases agree\n"


@needs_triton
def test_the_comparison_sees_a_ball_that_is_rounded_plainly():
    result = interpret("plain-rounding")
    assert result.returncode == 1
    assert "assert_same_bits" in result.stderr


@needs_triton
def test_cuda_tensors_get_triton_or_say_why_not():
    code = (
        "import warnings\n"
        "from fastadv import ops\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    print(ops.body('linf_step', 'cuda'), ops.body('linf_step', 'cuda:1'), [str(w.message) for w in caught])"
    )
    assert run_python(code, CC="cc") == "triton triton []\n"
    # Triton needs a C compiler; the C++ library is there already and needs none.
    build.library()
    printed = run_python(code, CC="", PATH="")
    assert printed.startswith("reference reference ['fastadv: Triton needs a C compiler and finds none;")
    assert printed.count("To cure") == 1
    with pytest.raises(AssertionError, match="FASTADV_OPS=native, but Triton needs a C compiler"):
        run_python(code, CC="", PATH="", FASTADV_OPS="native")


def test_the_folder_kernels_does_not_stand_in_for_the_package_of_that_name():
    for folder, package in (("kernels", "fastadv.kernels"), ("csrc", "fastadv.csrc")):
        command = [sys.executable, "-c", f"import {folder}"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
        assert result.returncode == 1
        assert f"ImportError: the folder {folder}/ is the package {package}" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(ops.SCHEMAS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_compiled_kernels_equal_the_reference(name, dtype, masked):
    assert ops.body(name, device="cuda") == "triton"
    for shape, (seed, box) in itertools.product(SHAPES, enumerate([(0.0, 1.0), (-2.1, 2.6)])):
        case = step_case(shape, dtype=dtype, box=box, masked=masked, per_image=seed == 0, seed=seed)
        adv, grad, x, step, eps, lo, hi, mask = case
        if name == "l2_step":
            step, eps = 20 * step, 20 * eps
        expected, expected_flags = adv.clone(), flags(adv)
        getattr(reference, name)(expected, grad, x, step, eps, lo, hi, mask, expected_flags)
        adv, grad, x, step, eps = (t.cuda() for t in (adv, grad, x, step, eps))
        got_flags = flags(adv).cuda()
        mask = None if mask is None else mask.cuda()
        getattr(ops, name)(adv, grad, x, step, eps, lo, hi, mask, got_flags)
        if name == "linf_step":
            assert_same_bits(adv.cpu(), expected)
        else:
            torch.testing.assert_close(adv.cpu(), expected, rtol=2**-23, atol=1e-12)
            assert (lengths(adv, x) <= eps.double()).all()
        assert got_flags.tolist() == expected_flags.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(ops.SCHEMAS))
def test_compiled_kernels_in_every_layout_and_graph(name):
    assert ops.body(name, device="cuda") == "triton"
    adv, grad, x, step, eps, lo, hi, mask = step_case((4, 3, 15, 17), masked=True)
    adv, grad, x, step, eps, mask = (t.cuda() for t in (adv, grad, x, step, eps, mask))
    fused = getattr(ops, name)
    expected = fused(adv.clone(), grad, x, step, eps, lo, hi, mask)
    last = dict(memory_format=torch.channels_last)
    assert (fused(adv.clone(**last), grad, x, step, eps, lo, hi, mask) == expected).all()
    # A pointer that is not 16-byte aligned.
    assert (fused(adv.clone()[1:], grad[1:], x[1:], step, eps, lo, hi, mask[1:]) == expected[1:]).all()
    # No host sync: the op can be captured.
    torch.cuda.synchronize()
    captured, graph = adv.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused(captured, grad, x, step, eps, lo, hi, mask)
    graph.replay()
    assert (captured == expected).all()
    compiled = torch.compile(lambda adv: fused(adv * 1.0, grad, x, step, eps, lo, hi, mask) + 0.0, fullgraph=True)
    assert (compiled(adv) == expected).all()
    op = getattr(torch.ops.fastadv, name).default
    results = torch.library.opcheck(op, (adv.clone(), grad, x, step, eps, lo, hi, mask, flags(adv).cuda()))
    assert set(results.values()) == {"SUCCESS"}

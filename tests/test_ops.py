"""The fused steps: their meaning, equality of the bodies, the exact ball, and their life inside torch."""

import math
import os
import subprocess
import sys

import pytest
import torch
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import DTYPES, SHAPES, assert_same_bits, flags, lengths, step_case

from fastadv import ops, reference
from fastadv.errors import SettingsError


@pytest.fixture(autouse=True)
def _the_fast_body_is_tested():
    assert ops.body("linf_step") == "cpp"
    assert ops.body("l2_step") == "cpp"


@pytest.mark.parametrize("step", [ops.linf_step, reference.linf_step], ids=["cpp", "reference"])
def test_linf_step_of_four_pixels(step):
    x = torch.tensor([[0.5, 0.5, 0.0, 0.5]])
    grad = torch.tensor([[3.0, -1e-30, -2.0, 0.0]])
    adv = x.clone()
    step(adv, grad, x, torch.tensor([0.25]), torch.tensor([0.125]), 0.0, 1.0)
    assert adv.tolist() == [[0.625, 0.375, 0.0, 0.5]]


@pytest.mark.parametrize("step", [ops.l2_step, reference.l2_step], ids=["cpp", "reference"])
def test_l2_step_of_a_three_four_five_triangle(step):
    x = torch.full((1, 2), 0.5)
    adv = x.clone()
    step(adv, torch.tensor([[3e-30, -4e-30]]), x, torch.tensor([0.25]), torch.tensor([1.0]), 0.0, 1.0)
    torch.testing.assert_close(adv, torch.tensor([[0.65, 0.3]]), rtol=1e-6, atol=0)
    step(adv, torch.zeros(1, 2), x, torch.tensor([0.25]), torch.tensor([0.125]), 0.0, 1.0)
    torch.testing.assert_close(adv, torch.tensor([[0.575, 0.4]]), rtol=2e-6, atol=0)


def test_a_negative_step_descends_and_zero_only_projects():
    adv, grad, x, step, eps, lo, hi, _ = step_case((4, 3, 8, 8))
    up = ops.linf_step(adv.clone(), grad, x, -step, eps, lo, hi)
    assert_same_bits(up, ops.linf_step(adv.clone(), -grad, x, step, eps, lo, hi))
    projected = ops.linf_step(adv.clone(), grad, x, 0.0, eps, lo, hi)
    assert_same_bits(projected, reference.project_linf(adv, x, eps, lo, hi))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linf_step_is_bit_equal_to_the_reference(shape, masked, dtype):
    cases = [((-2.1, 2.6), -1, True), ((0.0, 1.0), 1, True), ((-1.0, 1.0), -1, False), ((0.1, 0.9), 1, False)]
    for number, (box, sign, many) in enumerate(cases[: 1 if math.prod(shape) > 10**6 else 4]):
        case = step_case(shape, dtype=dtype, box=box, per_image=many, masked=masked, seed=number)
        adv, grad, x, step, eps, lo, hi, mask = case
        ours, theirs, our_flags, their_flags = adv.clone(), adv.clone(), flags(adv), flags(adv)
        ops.linf_step(ours, grad, x, sign * step, eps, lo, hi, mask, our_flags)
        reference.linf_step(theirs, grad, x, sign * step, eps, lo, hi, mask, their_flags)
        assert_same_bits(ours, theirs)
        assert our_flags.tolist() == their_flags.tolist()
        assert our_flags.bool().tolist() == (~grad.isfinite().flatten(1).all(1)).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l2_step_equals_the_reference_up_to_sums(shape, masked, dtype):
    cases = [((-1.0, 1.0), -1, False), ((0.0, 1.0), 1, True)]
    for number, (box, sign, many) in enumerate(cases[: 1 if math.prod(shape) > 10**6 else 2]):
        case = step_case(shape, dtype=dtype, box=box, per_image=many, masked=masked, seed=number)
        adv, grad, x, step, eps, lo, hi, mask = case
        ours, theirs, our_flags, their_flags = adv.clone(), adv.clone(), flags(adv), flags(adv)
        arguments = grad, x, 20 * sign * step, 20 * eps, lo, hi, mask
        ops.l2_step(ours, *arguments, our_flags)
        reference.l2_step(theirs, *arguments, their_flags)
        # Lengths differ in the last bits of a float64, which moves a float32 by at most one.
        torch.testing.assert_close(ours, theirs, rtol=2**-23, atol=1e-12)
        assert (ours == theirs).double().mean() > 0.999
        assert our_flags.tolist() == their_flags.tolist()
        assert (lengths(ours, x) <= 20 * eps.double()).all()


@pytest.mark.parametrize("step", [ops.linf_step, ops.l2_step])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_memory_layout_gives_the_same_image(step, dtype):
    adv, grad, x, size, eps, lo, hi, mask = step_case((4, 3, 9, 7), dtype=dtype, masked=True)
    expected = step(adv.clone(), grad, x, size, eps, lo, hi, mask)
    last = dict(memory_format=torch.channels_last)
    everything_last = step(adv.clone(**last), grad.to(**last), x.to(**last), size, eps, lo, hi, mask.contiguous(**last))
    assert everything_last.is_contiguous(**last)
    assert (everything_last == expected).all()
    # Gradient, image and mask in another layout than adv, a gradient with holes, a mask that broadcasts.
    assert (step(adv.clone(), grad.to(**last), x.to(**last), size, eps, lo, hi, mask.to(**last)) == expected).all()
    spread = torch.zeros(8, 3, 9, 14, dtype=dtype)[::2, :, :, ::2].copy_(grad)
    assert (step(adv.clone(), spread, x, size, eps, lo, hi, mask) == expected).all()
    row = torch.tensor([True, False, True, True, False, True, False])
    broadcast = step(adv.clone(), grad, x, size, eps, lo, hi, row)
    assert (broadcast == step(adv.clone(), grad, x, size, eps, lo, hi, row.expand(4, 3, 9, 7).clone())).all()
    assert (broadcast[..., ~row] == x[..., ~row]).all()


@pytest.mark.parametrize("name", ["linf_step", "l2_step"])
def test_the_answer_does_not_depend_on_threads_or_company(name):
    adv, grad, x, step, eps, lo, hi, _ = step_case((6, 3, 40, 41), per_image=True)
    whole = getattr(ops, name)(adv.clone(), grad, x, step, eps, lo, hi)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert_same_bits(whole, getattr(ops, name)(adv.clone(), grad, x, step, eps, lo, hi))
    finally:
        torch.set_num_threads(threads)
    for i in range(6):
        one = slice(i, i + 1)
        alone = getattr(ops, name)(adv[one].clone(), grad[one], x[one], step[one], eps[one], lo, hi)
        assert_same_bits(whole[one], alone)


def test_half_gradients_keep_their_subnormals():
    # 6e-8 is the smallest float16; saturated models produce these.
    grad = torch.tensor([[6e-8, -6e-8, 0.0, 3e-6, -65504.0]], dtype=torch.float16)
    x = torch.full((1, 5), 0.5)
    adv = ops.linf_step(x.clone(), grad, x, 0.25, 0.5)
    assert adv.tolist() == [[0.75, 0.25, 0.5, 0.75, 0.25]]
    wide = ops.l2_step(x.clone(), grad.float(), x, 0.25, 0.5)
    assert_same_bits(ops.l2_step(x.clone(), grad, x, 0.25, 0.5), wide)


@pytest.mark.parametrize("eps", [8 / 255, 4 / 255, 1 / 255, 0.1, 0.3, 1e-6, 1e-30, 0.0, 1.0])
@pytest.mark.parametrize("box", [(0.0, 1.0), (-2.1179, 2.64)], ids=str)
def test_the_linf_ball_holds_in_float64_and_is_filled(eps, box):
    generator = torch.Generator().manual_seed(1)
    lo, hi = box
    x = (torch.rand((1, 200_000), generator=generator) * (hi - lo) + lo).clamp(lo, hi)
    # Small pixels too: there rounding of x + eps is worst.
    x[:, ::3] *= 2.0 ** -torch.randint(0, 60, x[:, ::3].shape, generator=generator)
    x = x.clamp(lo, hi)
    radius = torch.tensor(eps, dtype=torch.float32).double()
    for direction in (torch.ones_like(x), -torch.ones_like(x)):
        adv = ops.linf_step(x.clone(), direction, x, 2.0, eps, lo, hi)
        distance = (adv.double() - x.double()).abs()
        assert (distance <= radius).all()
        # No pixel stops earlier than it must: the next float is outside the ball or the box. (Next to a smaller pixel
        # the difference has more bits than a float64.)
        further = torch.nextafter(adv, direction * math.inf).double()
        outside = ((further - x.double()).abs() > radius) | (further > hi) | (further < lo)
        assert outside[x.abs() > 2**-20].all()


def test_plain_rounding_would_leave_the_ball():
    grey = torch.arange(256).reshape(1, 256) / 255
    eps = torch.tensor([8 / 255])
    for step, outside in ((1.0, 40), (-1.0, 11)):
        plain = grey + eps * step
        assert ((plain.double() - grey.double()).abs() > eps.double()).sum() == outside
        ours = ops.linf_step(grey.clone(), torch.ones_like(grey), grey, step, eps, -1.0, 2.0)
        assert ((ours.double() - grey.double()).abs() <= eps.double()).all()
        assert (ours != plain).sum() == outside


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    st.floats(0, 1, width=32),
    st.floats(-2, 2, width=32),
    st.integers(0, 2**31),
)
def test_projections_are_feasible_and_idempotent(pixels, eps, spread, seed):
    x = torch.tensor([pixels])
    adv = x + spread * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    linf = reference.project_linf(adv, x, eps, 0.0, 1.0)
    assert ((linf.double() - x.double()).abs() <= eps).all()
    assert_same_bits(linf, reference.project_linf(linf, x, eps, 0.0, 1.0))
    l2 = reference.project_l2(adv, x, eps, 0.0, 1.0)
    assert lengths(l2, x).item() <= eps
    assert_same_bits(l2, reference.project_l2(l2, x, eps, 0.0, 1.0))
    for projected in (linf, l2):
        assert ((projected >= 0) & (projected <= 1)).all()


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3, 0.03, 0.5, 3.0])
def test_the_l2_ball_holds_in_float64(eps):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand((8, 3, 32, 32), generator=generator)
    adv = x.clone()
    radius = torch.tensor(eps, dtype=torch.float32).double()
    for _ in range(3):
        ops.l2_step(adv, torch.randn(x.shape, generator=generator), x, 2 * eps + 0.1, eps)
        assert (lengths(adv, x) <= radius).all()
    # The box cuts a little off; far below eps would be a projection that is too strict.
    assert eps < 0.03 or (lengths(adv, x) > 0.9 * radius).all()


@pytest.mark.parametrize("step", [ops.linf_step, reference.linf_step], ids=["cpp", "reference"])
def test_nan_has_sign_zero_and_flags_are_never_cleared(step):
    x = torch.full((3, 4), 0.5)
    grad = torch.ones(3, 4)
    grad[1, 2] = math.nan
    nonfinite = torch.tensor([1, 0, 0], dtype=torch.int32)
    adv = x.clone()
    step(adv, grad, x, torch.tensor([0.25]), torch.tensor([0.5]), 0.0, 1.0, None, nonfinite)
    assert nonfinite.tolist() == [1, 1, 0]
    assert adv[1].tolist() == [0.75, 0.75, 0.5, 0.75]


@pytest.mark.parametrize("step", [ops.l2_step, reference.l2_step], ids=["cpp", "reference"])
def test_an_image_without_a_finite_gradient_length_does_not_move(step):
    x = torch.full((4, 3), 0.5)
    grad = torch.ones(4, 3)
    grad[0, 1], grad[1, 1], grad[2] = math.nan, math.inf, 0.0
    nonfinite = flags(x)
    adv = x.clone()
    step(adv, grad, x, torch.tensor([0.25]), torch.tensor([0.5]), 0.0, 1.0, None, nonfinite)
    assert nonfinite.tolist() == [1, 1, 0, 0]
    assert (adv[:3] == 0.5).all()
    assert (adv[3] > 0.5).all()


@pytest.mark.parametrize("step", [ops.linf_step, ops.l2_step])
def test_empty_batches_and_empty_images_pass_through(step):
    for shape in ((0, 3, 4, 4), (2, 0)):
        empty = torch.zeros(shape)
        assert step(empty, empty.clone(), empty.clone(), 0.1, 0.1, 0.0, 1.0, None, flags(empty)).shape == shape


def test_what_cannot_be_meant_is_refused_with_a_cure():
    x = torch.rand(2, 3, 4, 4)
    grad, adv = torch.rand_like(x), x.clone()
    for change, words in [
        (dict(adv=adv.half()), r"adv is torch\.float16.*adv\.float\(\)"),
        (dict(x=x.double()), r"x is torch\.float64"),
        (dict(grad=grad.double()), r"grad is torch\.float64.*grad\.float\(\)"),
        (dict(grad=grad[:1]), r"grad is \(1, 3, 4, 4\)"),
        (dict(adv=torch.rand(4)), "not a dense batch"),
        (dict(adv=torch.rand(2, 3, 4, 8)[..., ::2]), r"not a dense batch.*adv\.contiguous\(\)"),
        (dict(adv=torch.rand(3, 2, 4, 4).transpose(0, 1)), "not a dense batch"),
        (dict(eps=torch.rand(3)), "eps has 3 values for 2 images"),
        (dict(step_size=torch.rand(3)), "step_size has 3 values for 2 images"),
        (dict(nonfinite=torch.zeros(2)), "nonfinite is torch.float32"),
    ]:
        arguments = dict(adv=adv, grad=grad, x=x, step_size=0.1, eps=0.1) | change
        for step in (ops.linf_step, ops.l2_step):
            with pytest.raises(SettingsError, match=words):
                step(**arguments)
    with pytest.raises(SettingsError, match="linf_step, l2_step"):
        ops.body("linf_stop")


def test_the_op_itself_checks_what_it_reads():
    x, size = torch.rand(2, 3, 4, 4), torch.tensor([0.1])
    for op in (torch.ops.fastadv.linf_step, torch.ops.fastadv.l2_step):
        for bad, words in [
            ((x, x, x, size, size), "same memory"),
            ((x.clone(), x[:1], x, size, size), "same shape and strides"),
            ((x.clone(), x.clone(memory_format=torch.channels_last), x, size, size), "same shape and strides"),
            ((x.clone(), x, x, torch.rand(3), size), "3 values for 2 images"),
            ((x.clone(), x, x, size, size.double()), "float32"),
            ((x[:, :, ::2], x[:, :, ::2], x.clone()[:, :, ::2], size, size), "dense"),
        ]:
            with pytest.raises(RuntimeError, match=words):
                op(*bad, 0.0, 1.0)
        with pytest.raises(RuntimeError, match="mask must be bool"):
            op(x.clone(), x, x, size, size, 0.0, 1.0, torch.ones(2, 3, 4, 4))
        with pytest.raises(RuntimeError, match="one value per image"):
            op(x.clone(), x, x, size, size, 0.0, 1.0, None, torch.zeros(3, dtype=torch.int32))


@pytest.mark.parametrize("name", ["linf_step", "l2_step"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(name, dtype):
    op = getattr(torch.ops.fastadv, name).default
    adv, grad, x, step, eps, lo, hi, mask = step_case((3, 3, 8, 8), dtype=dtype, per_image=True, masked=True)
    for extra in ({}, {"mask": mask}, {"mask": mask, "nonfinite": flags(adv)}):
        results = torch.library.opcheck(op, (adv.clone(), grad, x, step, eps, lo, hi), extra)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend):
    adv, grad, x, step, eps, lo, hi, _ = step_case((3, 3, 8, 8), per_image=True)

    def two_steps(adv, grad, x):
        nonfinite = torch.zeros(3, dtype=torch.int32)
        adv = adv * 1.0
        ops.linf_step(adv, grad, x, step, eps, lo, hi, None, nonfinite)
        ops.l2_step(adv, grad, x, 0.5, 1.0)
        return adv + 0.0, nonfinite

    expected = two_steps(adv, grad, x)
    got = torch.compile(two_steps, fullgraph=True, backend=backend)(adv, grad, x)
    assert_same_bits(got[0], expected[0])
    assert got[1].tolist() == expected[1].tolist() == [0, 1, 1]


def test_a_change_in_place_is_seen_by_autograd():
    x = torch.rand(2, 3)
    weight = torch.rand(3, requires_grad=True)
    adv = x.clone()
    loss = (adv * weight).sum()
    ops.linf_step(adv, torch.ones(2, 3), x, 0.1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_reference_body_can_be_forced_and_is_the_same_op():
    schema = "print(torch.ops.fastadv.linf_step.default._schema, torch.ops.fastadv.l2_step.default._schema)"
    code = f"""if True:
        import sys, torch
        from fastadv import ops
        print([ops.body(name, device) for name in ops.SCHEMAS for device in ("cpu", "cuda", "meta")])
        x = torch.rand(3, 3, 8, 8)
        arguments = x.clone(), torch.randn_like(x), x, torch.tensor([0.1]), torch.tensor([0.1]), 0.0, 1.0
        for op in (torch.ops.fastadv.linf_step.default, torch.ops.fastadv.l2_step.default):
            print(set(torch.library.opcheck(op, arguments).values()))
        {schema}
    """
    printed = run_python(code, FASTADV_OPS="reference").splitlines()
    assert printed[0] == str(["reference"] * 6)
    assert printed[1:3] == ["{'SUCCESS'}"] * 2
    ours = [str(getattr(torch.ops.fastadv, name).default._schema) for name in ops.SCHEMAS]
    assert printed[3] == " ".join(ours)


def test_an_unknown_choice_of_bodies_is_refused():
    code = "import fastadv.ops"
    failed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"FASTADV_OPS": "fast"}
    )
    assert failed.returncode == 1
    assert "FASTADV_OPS='fast'" in failed.stderr
    assert "set it to reference or native" in failed.stderr


def test_import_on_a_cpu_does_not_load_triton():
    assert "[]" in run_python("import sys, fastadv.ops; print([m for m in sys.modules if m.split('.')[0] == 'triton'])")

"""Window attention on the CPU: timm's numbers, float64's within plain PyTorch's error, and its life inside models."""

import copy
import itertools
import shutil
from pathlib import Path

import pytest
import timm.layers
import torch
from fresh_python import run_python
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from window_truth import HALF, errors, through_timm, window_case

from fastadv import models, ops, window_attention, window_reference
from fastadv.errors import SettingsError
from fastadv.window_block import WindowBlock

OP, BACKWARD = torch.ops.fastadv.window_attention, torch.ops.fastadv.window_attention_backward
# window, head dimension, heads, map, shifts, images: every window and head dimension, maps that are not square, maps of
# one window, shifts of one axis, shifts that are not half a window.
CASES = [
    (4, 16, 3, (8, 12), (2, 2), 2),
    (4, 32, 1, (4, 4), (0, 0), 3),
    (4, 64, 2, (12, 8), (0, 3), 1),
    (7, 16, 2, (7, 14), (0, 3), 2),
    (7, 32, 3, (14, 21), (3, 3), 1),
    (7, 64, 1, (14, 7), (1, 0), 2),
    (8, 16, 3, (16, 16), (4, 4), 1),
    (8, 32, 2, (8, 24), (0, 0), 1),
    (8, 64, 2, (16, 8), (5, 2), 1),
    # One window, shifted all the same: four regions meet in it.
    (7, 32, 2, (7, 7), (3, 3), 2),
]


@pytest.fixture(autouse=True)
def _the_fast_body_is_tested():
    assert ops.body("window_attention") == ops.body("window_attention_backward") == "cpp"


class Calls(TorchDispatchMode):
    """Counts the calls of the two ops, as they arrive below autograd."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is OP.default
        self.backward += func is BACKWARD.default
        if func is OP.default:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def with_gradients(qkv, table, grad, settings, op=window_attention.window_attention):
    """Output, gradient of qkv and gradient of table by autograd."""
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = op(qkv, table, *settings)
    return [t.detach() for t in (out, *torch.autograd.grad(out, (qkv, table), grad))]


def truth(qkv, table, grad, settings):
    """The same in float64, by autograd through the meaning."""
    return with_gradients(qkv.double(), table.double(), grad.double(), settings, window_reference.window_attention)


def within_twice_the_error_of_timm(results, qkv, table, grad, settings):
    """For output and the gradients of q, k, v and table, whether they are."""
    exact = truth(qkv, table, grad, settings)
    plain = errors(through_timm(qkv, table, grad, settings), exact)
    return [ours <= 2 * theirs for ours, theirs in zip(errors(results, exact), plain, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_as_exact_as_plain_pytorch(case, dtype):
    qkv, table, grad, settings = window_case(*case)
    # A table as timm has it in a half-precision model would hide, by its own rounding, what is compared here.
    qkv, grad = qkv.to(dtype), grad.to(dtype)
    results = with_gradients(qkv, table, grad, settings)
    assert [t.dtype for t in results] == [dtype, dtype, torch.float32]
    assert all(within_twice_the_error_of_timm(results, qkv, table, grad, settings))


@pytest.mark.parametrize("case", CASES[3:5], ids=str)
def test_scores_far_apart(case):
    # Some scores outweigh the -100 that hides a token, most weights are far too small for a float32.
    qkv, table, grad, settings = window_case(*case, saturated=True)
    assert all(within_twice_the_error_of_timm(with_gradients(qkv, table, grad, settings), qkv, table, grad, settings))


def test_a_half_precision_table_and_its_gradient():
    qkv, table, grad, settings = window_case(*CASES[0])
    qkv, table, grad = qkv.bfloat16(), table.bfloat16(), grad.bfloat16()
    results = with_gradients(qkv, table, grad, settings)
    assert results[2].dtype == torch.bfloat16
    assert all(within_twice_the_error_of_timm(results, qkv, table, grad, settings))


FAULTS = {
    "no shift mask": {"hidden": 0.0},
    "mask not steep enough": {"hidden": -3.0},
    "bias of the mirrored offset": {"table": lambda table: table.flip(0)},
    "heads' biases swapped": {"table": lambda table: table.flip(1)},
    "rolled the other way": {
        "settings": lambda heads, window, h, w, scale: (heads, window, window - h, window - w, scale)
    },
    "shifts swapped": {"settings": lambda heads, window, h, w, scale: (heads, window, w, h, scale)},
    "not scaled": {"settings": lambda heads, window, h, w, scale: (heads, window, h, w, 1.0)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, monkeypatch):
    qkv, table, grad, settings = window_case(4, 16, 3, (8, 12), (2, 1), 2)
    change = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(window_reference, "HIDDEN", change.get("hidden", window_reference.HIDDEN))
        wrong_table, wrong_settings = change.get("table", lambda t: t)(table), settings
        if "settings" in change:
            wrong_settings = change["settings"](*settings)
        faulty = with_gradients(qkv, wrong_table, grad, wrong_settings, window_reference.window_attention)
    assert not any(within_twice_the_error_of_timm(faulty, qkv, table, grad, settings)[:4])


@pytest.mark.parametrize(
    "op", [window_attention.window_attention, window_reference.window_attention], ids=["op", "plain"]
)
def test_equal_scores_average_what_a_token_may_see(op):
    # q = 0 and an empty table: every weight is 1 / (tokens in sight). The map's 8x8 tokens, rolled by 1 and 2, make
    # four windows; the token's own region of its window is in sight and nothing else.
    values = torch.randn(8, 8, 16)
    qkv = torch.cat([torch.zeros(8, 8, 16), torch.randn(8, 8, 16), values], -1).unsqueeze(0)
    out = op(qkv, torch.zeros(49, 1), 1, 4, 1, 2, 0.25)[0]
    rows = [[0], [1, 2, 3, 4], [5, 6, 7]]
    columns = [[0, 1], [2, 3, 4, 5], [6, 7]]
    for down, across in itertools.product(rows, columns):
        region = torch.tensor(down).unsqueeze(1), torch.tensor(across)
        expected = values[region].mean((0, 1)).expand(len(down), len(across), 16)
        torch.testing.assert_close(out[region], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "op", [window_attention.window_attention, window_reference.window_attention], ids=["op", "plain"]
)
@pytest.mark.parametrize("window", [4, 7, 8])
def test_a_bias_for_one_offset_shows_each_token_that_neighbour(op, window):
    values = torch.randn(window, 2 * window, 32)
    qkv = torch.cat([torch.zeros(window, 2 * window, 64), values], -1).unsqueeze(0)
    table = torch.zeros((2 * window - 1) ** 2, 1)
    # Query minus key: one row down, one column to the left.
    table[(1 + window - 1) * (2 * window - 1) + (-1 + window - 1)] = 60.0
    out = op(qkv, table, 1, window, 0, 0, 1.0)[0]
    for left in (0, window):
        inside = out[1:, left : left + window - 1]
        torch.testing.assert_close(inside, values[:-1, left + 1 : left + window], rtol=1e-6, atol=1e-6)


def test_the_plain_backward_is_the_derivative_of_the_plain_forward():
    for case in CASES[:4]:
        qkv, table, grad, settings = (t.double() if isinstance(t, torch.Tensor) else t for t in window_case(*case))
        _, qkv_grad, table_grad = truth(qkv, table, grad, settings)
        ours = window_reference.window_attention_backward(grad, qkv, table, *settings, True)
        torch.testing.assert_close(ours, (qkv_grad, table_grad), rtol=1e-12, atol=1e-12)
        assert window_reference.window_attention_backward(grad, qkv, table, *settings, False)[1].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_come_out_where_they_went_in(dtype, where):
    qkv, table, grad, settings = window_case(4, 16, 2, (8, 8), (0, 0), 2)
    parts = dict(zip("qkv", qkv.chunk(3, -1), strict=True))
    for bad, token in ((torch.nan, 1), (torch.inf, 6)):
        parts[where][0, 1, token, 3] = bad
    qkv, grad = qkv.to(dtype), grad.to(dtype)
    out, qkv_grad, _ = with_gradients(qkv, table, grad, settings)
    expected = with_gradients(qkv.float(), table, grad.float(), settings, window_reference.window_attention)
    for ours, theirs in zip((out, qkv_grad), expected[:2], strict=True):
        assert (ours.isfinite() == theirs.isfinite()).all()
        # Two windows of the first image, and nothing else.
        assert not ours[0, :4].isfinite().all()
        assert ours[0, 4:].isfinite().all()
        assert ours[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_every_number_is_written(dtype):
    qkv, table, grad, settings = window_case(7, 32, 2, (14, 7), (3, 0), 2)
    qkv, grad = qkv.to(dtype), grad.to(dtype)
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    try:
        # Every new tensor is NaN.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert qkv.new_empty(3).isnan().all()
        results = OP(qkv, table, *settings), *BACKWARD(grad, qkv, table, *settings, True)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    assert all(t.isfinite().all() for t in results)


def test_half_precision_results_are_rounded_to_nearest():
    qkv, table, _, settings = window_case(*CASES[4])
    for dtype in HALF:
        rounded = qkv.to(dtype)
        exact = OP(rounded.float(), table, *settings)
        # Of large numbers, and of numbers so small that a float16 is subnormal.
        for size in (1.0, 3e-4, 1e-6):
            rounded.chunk(3, -1)[2].copy_(qkv.chunk(3, -1)[2] * size)
            exact = OP(rounded.float(), table, *settings)
            assert torch.equal(OP(rounded, table, *settings), exact.to(dtype))


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_the_answer_does_not_depend_on_threads_or_company(case):
    window, dim, heads, size, shifts, _ = case
    # Enough windows for several parts of the table's sum.
    qkv, table, grad, settings = window_case(window, dim, heads, size, shifts, 70 if window == 4 else 12)
    whole = OP(qkv, table, *settings), *BACKWARD(grad, qkv, table, *settings, True)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            again = OP(qkv, table, *settings), *BACKWARD(grad, qkv, table, *settings, True)
            assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(OP(qkv[3:4].clone(), table, *settings), whole[0][3:4])
    alone, nothing = BACKWARD(grad[3:4].clone(), qkv[3:4].clone(), table, *settings, False)
    assert torch.equal(alone, whole[1][3:4])
    assert (nothing.shape, nothing.dtype) == ((0,), torch.float32)


def test_any_strides_and_no_images():
    qkv, table, grad, settings = window_case(*CASES[0])
    expected = with_gradients(qkv, table, grad, settings)
    spread = torch.zeros(*qkv.shape[:-1], 2 * qkv.shape[-1])[..., ::2].copy_(qkv)
    got = with_gradients(spread, table.T.contiguous().T, grad.transpose(1, 2).contiguous().transpose(1, 2), settings)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    results = with_gradients(qkv[:0], table, grad[:0], settings)
    assert [t.shape for t in results] == [(0, 8, 12, 48), (0, 8, 12, 144), table.shape]
    assert not results[2].any()


def test_the_scale_is_that_of_the_head_dimension_unless_given():
    qkv, table, _, settings = window_case(*CASES[0])
    heads, window, *shifts, scale = settings
    assert torch.equal(window_attention.window_attention(qkv, table, heads, window, *shifts), OP(qkv, table, *settings))
    other = window_attention.window_attention(qkv, table, heads, window, *shifts, scale=2 * scale)
    assert not torch.allclose(other, OP(qkv, table, *settings), atol=1e-2)


def test_what_cannot_be_meant_is_refused_with_a_cure():
    qkv, table = torch.randn(1, 8, 8, 96), torch.zeros(49, 2)
    for change, words in [
        (dict(qkv=qkv.double()), r"qkv is torch\.float64 .*give \(B, H, W"),
        (dict(qkv=qkv[0]), r"of shape \(8, 8, 96\)"),
        (dict(heads=5), "for 5 heads"),
        (dict(heads=0), "for 0 heads"),
        (dict(heads=4), "head dimension 8 is not served.*head dimensions"),
        (dict(window=2), "window=2 .* is not served"),
        (dict(qkv=qkv[:, :, :6]), "8x6 does not divide into windows of 4"),
        (dict(shift_h=4), "shifts are 4, 0 for window=4"),
        (dict(shift_w=-1), "shifts are 0, -1"),
        (dict(table=table[1:]), r"table is torch\.float32 of shape \(48, 2\).*give \(49, 2\)"),
        (dict(table=table.double()), r"table is torch\.float64"),
        (dict(table=table.half()), r"table is torch\.float16"),
    ]:
        arguments = dict(qkv=qkv, table=table, heads=2, window=4) | change
        with pytest.raises(SettingsError, match=words):
            window_attention.window_attention(**arguments)
    with pytest.raises(SettingsError, match="window_attention_backward"):
        ops.body("window_detention")


def test_the_op_itself_checks_what_it_reads():
    qkv, table, grad = torch.randn(1, 8, 8, 96), torch.zeros(49, 2), torch.randn(1, 8, 8, 32)
    good = dict(qkv=qkv, table=table, heads=2, window=4, shift_h=2, shift_w=2, scale=0.25)
    for change, words in [
        (dict(qkv=qkv.double()), "float32, bfloat16 or float16"),
        (dict(qkv=qkv.transpose(1, 2)), "contiguous"),
        (dict(heads=5), "5 heads"),
        (dict(heads=0), "0 heads"),
        (dict(window=2), "not served"),
        (dict(window=0), "not served"),
        (dict(heads=4, table=torch.zeros(49, 4)), "head dimension 8 is not served"),
        (dict(qkv=qkv[:, :6].contiguous()), "6 x 8 does not divide"),
        (dict(shift_h=4), "below the window"),
        (dict(shift_w=-1), "below the window"),
        (dict(table=table[1:]), "table must be"),
        (dict(table=table.half()), "table must be"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            OP(**good | change)
        with pytest.raises(RuntimeError, match=words):
            BACKWARD(grad, **good | change, table_learns=True)
    for bad in (grad.half(), grad[:, :4], grad.transpose(1, 2), torch.randn(1, 8, 8, 33)):
        with pytest.raises(RuntimeError, match="grad must be"):
            BACKWARD(bad, **good, table_learns=False)


# opcheck looks at the .grad of what is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_opcheck(dtype):
    qkv, table, grad, settings = window_case(4, 16, 2, (8, 8), (2, 2), 2)
    qkv, grad = qkv.to(dtype), grad.to(dtype)
    results = torch.library.opcheck(OP.default, (qkv.requires_grad_(), table.requires_grad_(), *settings))
    assert set(results.values()) == {"SUCCESS"}
    for learns in (True, False):
        arguments = grad, qkv.detach(), table.detach(), *settings, learns
        assert set(torch.library.opcheck(BACKWARD.default, arguments).values()) == {"SUCCESS"}


def test_a_second_derivative_is_refused():
    qkv, table, _, settings = window_case(*CASES[0])
    qkv.requires_grad_()
    (grad,) = torch.autograd.grad(
        window_attention.window_attention(qkv, table, *settings).sum(), qkv, create_graph=True
    )
    with pytest.raises(SettingsError, match=r"no second derivative.*remove\(model\)"):
        torch.autograd.grad(grad.sum(), qkv)


def test_the_reference_body_can_be_forced_is_the_same_op_and_needs_no_timm():
    code = """if True:
        import sys, torch
        from fastadv import ops, window_attention
        print([ops.body(name, device) for name in window_attention.SCHEMAS for device in ("cpu", "cuda", "meta")])
        for name in window_attention.SCHEMAS:
            print(getattr(torch.ops.fastadv, name).default._schema)
        arguments = torch.randn(1, 8, 8, 96), torch.randn(49, 2), 2, 4, 2, 2, 0.25
        print(set(torch.library.opcheck(torch.ops.fastadv.window_attention.default, arguments).values()))
        net = torch.nn.Linear(2, 2)
        print(window_attention.insert(net), window_attention.remove(net), "timm" in sys.modules)
    """
    printed = run_python(code, FASTADV_OPS="reference").splitlines()
    ours = [str(getattr(torch.ops.fastadv, name).default._schema) for name in window_attention.SCHEMAS]
    assert printed == [str(["reference"] * 6), *ours, "{'SUCCESS'}", "0 0 False"]


def test_where_only_plain_pytorch_could_run_timms_own_code_does(monkeypatch):
    monkeypatch.setattr(ops, "body", lambda name, device="cpu": "reference")
    assert window_attention.insert(block()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("better", [["x86-64-v4"], ["x86-64-v4", "x86-64-v3"]], ids=["v3", "plain"])
def test_other_instruction_sets_are_as_exact(better, tmp_path):
    csrc = Path(__file__).parents[1] / "csrc"
    for header in csrc.glob("*.h"):
        shutil.copy(header, tmp_path)
    source = (csrc / "window_attention.cpp").read_text()
    for name in better:
        asked = f'__builtin_cpu_supports("{name}")'
        assert source.count(asked) == 1
        source = source.replace(asked, "false")
    (tmp_path / "window_attention.cpp").write_text(source)
    qkv, table, grad, settings = window_case(*CASES[4])
    torch.save((qkv, table, grad, *settings), tmp_path / "arguments.pt")
    # Without fastadv.ops, which would load the library there is. -O1 compiles in half of the time.
    code = f"""if True:
        import os; os.chdir({str(tmp_path)!r})
        from pathlib import Path
        import torch
        from fastadv import build
        build.FLAGS = tuple(flag if flag != "-O3" else "-O1" for flag in build.FLAGS)
        torch.ops.load_library(build.compile_library(Path(), Path("built")))
        qkv, table, grad, *settings = torch.load("arguments.pt", weights_only=True)
        results = [torch.ops.fastadv.window_attention(qkv, table, *settings)]
        results += torch.ops.fastadv.window_attention_backward(grad, qkv, table, *settings, True)
        torch.save(results, "results.pt")
    """
    run_python(code)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert all(within_twice_the_error_of_timm(results, qkv, table, grad, settings))


def block(window=4, size=(8, 12), shift=0, dim=48, heads=3, **options):
    """A timm block whose table is large enough to be seen, in eval mode."""
    found = SwinTransformerBlock(dim, size, num_heads=heads, window_size=window, shift_size=shift, **options).eval()
    nn.init.normal_(found.attn.relative_position_bias_table)
    return found


def block_results(module, x):
    """Output and the gradients of x and of every parameter, in the order of their names."""
    x = x.detach().requires_grad_()
    parameters = [p for _, p in sorted(module.named_parameters())]
    out = module(x)
    return [t.detach() for t in (out, *torch.autograd.grad(out.square().sum(), (x, *parameters)))]


BLOCKS = {
    "plain": {},
    "shifted": dict(shift=2),
    "shift of one axis, the other clipped": dict(size=(4, 12), shift=2),
    "window clipped to the map": dict(window=7, size=(4, 4)),
    "7x7": dict(window=7, size=(14, 14), shift=3, dim=64, heads=2),
    "7x7 in one window": dict(window=7, size=(7, 7), shift=3, dim=64, heads=4),
    "8x8": dict(window=8, size=(16, 8), shift=4, dim=64, heads=1),
    "always partitioned": dict(size=(4, 8), shift=2, always_partition=True),
    "dynamic mask": dict(shift=2, dynamic_mask=True),
    "head dimension of its own": dict(head_dim=32, heads=2, dim=64, shift=2),
    "no qkv bias": dict(qkv_bias=False, shift=2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_gives_what_timms_gives(name):
    module = block(**BLOCKS[name])
    x = torch.randn(3, *module.input_resolution, module.dim)
    # In float64, so that the block's own rounding is not taken for a difference.
    exact = block_results(copy.deepcopy(module).double(), x.double())
    plain = block_results(module, x)
    assert window_attention.insert(module) == 1
    with Calls() as calls:
        ours = block_results(module, x)
    assert (calls.forward, calls.backward) == (1, 1)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        # A gradient that is zero but for rounding (of the keys' bias) has no relative error.
        assert (a - truth).norm() <= 2 * (b - truth).norm() + 1e-6 * truth.norm()


def test_timm_with_its_fused_attention_gives_the_same():
    was = timm.layers.use_fused_attn(experimental=True)
    try:
        timm.layers.set_fused_attn(True, experimental=True)
        module = block(shift=2)
    finally:
        timm.layers.set_fused_attn(was, experimental=True)
    assert module.attn.fused_attn
    x = torch.randn(2, 8, 12, 48)
    plain = module(x)
    assert window_attention.insert(module) == 1
    torch.testing.assert_close(module(x), plain, rtol=1e-5, atol=1e-5)


def test_what_is_not_served_runs_timms_own_code():
    for options in (
        dict(size=(9, 12)),  # padding
        dict(window=6, size=(12, 12)),
        dict(window=(4, 8), size=(8, 16)),
        dict(dim=36),
        dict(dim=384, heads=3),
    ):
        module = block(**options)
        assert window_attention.insert(module) == 0
        assert type(module) is SwinTransformerBlock
    assert window_attention.insert(block().double()) == 0

    class Derived(SwinTransformerBlock):
        def _attn(self, x):
            return x

    assert window_attention.insert(Derived(48, (8, 8), num_heads=3, window_size=4)) == 0
    other = block()
    other.attn = nn.Identity()
    assert window_attention.insert(other) == 0


def test_inputs_that_are_not_served_run_timms_own_code():
    def calls_of(module, x, context=None):
        assert window_attention.insert(module) == 1
        with Calls() as calls, context or torch.no_grad():
            module(x)
        return calls.forward

    x = torch.randn(2, 8, 12, 48)
    assert calls_of(block(), x) == 1
    dropping = block(attn_drop=0.5)
    assert calls_of(dropping, x) == 1
    dropping.attn.attn_drop.train()
    with Calls() as calls:
        assert not torch.equal(dropping(x), dropping(x))
    assert calls.forward == 0
    # Without dropout train mode makes no difference.
    assert calls_of(block().train(), x) == 1
    # A map of another size: where there is no mask, or one is made for it.
    assert calls_of(block(), torch.randn(1, 16, 8, 48)) == 1
    assert calls_of(block(), torch.randn(1, 9, 8, 48)) == 0
    assert calls_of(block(shift=2, dynamic_mask=True), torch.randn(1, 16, 8, 48)) == 1
    shifted = block(shift=2)
    assert window_attention.insert(shifted) == 1
    with pytest.raises(RuntimeError):
        shifted(torch.randn(1, 16, 8, 48))
    # Somebody wants to see the attention's insides.
    for part in ("", ".softmax", ".attn_drop"):
        hooked, seen = block(), []
        hooked.get_submodule("attn" + part).register_forward_hook(lambda *args, seen=seen: seen.append(args))
        assert calls_of(hooked, x) == 0
        assert len(seen) == 1
    wide = block()
    assert window_attention.insert(wide) == 1
    with Calls() as calls:
        wide.double()(x.double())
    assert calls.forward == 0


def test_bfloat16_by_autocast_and_by_cast():
    x = torch.randn(2, 8, 12, 48)
    module = block(shift=2)
    assert window_attention.insert(module) == 1
    exact = module(x)
    with Calls() as calls:
        with torch.autocast("cpu", torch.bfloat16):
            by_autocast = module(x)
        by_cast = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert (calls.forward, calls.dtypes) == (2, {torch.bfloat16})
    for out in (by_autocast, by_cast):
        # 8 bits of mantissa, a few roundings deep.
        assert (out.float() - exact).norm() < 0.02 * exact.norm()


def test_wrapped_layers_stay_in_force():
    class LowRank(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(48, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    module = block(shift=2)
    module.attn.qkv, module.attn.proj = LowRank(module.attn.qkv), LowRank(module.attn.proj)
    x = torch.randn(2, 8, 12, 48)
    plain = block_results(module, x)
    assert window_attention.insert(module) == 1
    for ours, theirs in zip(block_results(module, x), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def swin_56():
    """A Swin with windows of 7: 14x14 tokens shifted, then 7x7 in one window."""
    return SwinTransformer(
        img_size=56, patch_size=4, window_size=7, embed_dim=64, depths=(2, 2), num_heads=(2, 4), num_classes=10
    )


def model_results(model, x):
    x = x.detach().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


@pytest.mark.parametrize("name", ["swin_micro_64", "swin_56"])
def test_a_model_gives_the_same_with_the_op_and_exactly_the_same_without_it(name):
    if name == "swin_56":
        model, side, blocks = swin_56().eval(), 56, 4
    else:
        model, side, blocks = models.create(name, 10).eval(), 64, 6
        models.load_backbone(model, "robust")
    keys = list(model.state_dict())
    x = torch.rand(4, 3, side, side)
    logits, grad = model_results(model, x)
    assert window_attention.insert(model) == blocks
    assert window_attention.insert(model) == 0
    with Calls() as calls:
        ours = model_results(model, x)
    assert (calls.forward, calls.backward) == (blocks, blocks)
    # Rounding errors of float32, 2^-24, a few layers deep; the signs are what an attack takes.
    assert (ours[0] - logits).norm() < 1e-5 * logits.norm()
    assert (ours[1] - grad).norm() < 1e-4 * grad.norm()
    assert (ours[1].sign() == grad.sign()).float().mean() > 0.999
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, SwinTransformerBlock) for m in model.modules() if type(m).__name__ == "WindowBlock")
    assert window_attention.remove(model) == blocks
    assert window_attention.remove(model) == 0
    with Calls() as calls:
        again = model_results(model, x)
    assert calls.forward == 0
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], grad)


def test_a_copy_has_weights_of_its_own_and_the_op():
    module = block(shift=2)
    assert window_attention.insert(module) == 1
    clone = copy.deepcopy(module)
    assert type(clone) is WindowBlock
    x = torch.randn(1, 8, 12, 48)
    before = module(x)
    with torch.no_grad():
        clone.attn.relative_position_bias_table.zero_()
    with Calls() as calls:
        assert not torch.allclose(clone(x), before)
    assert calls.forward == 1
    assert torch.equal(module(x), before)
    assert window_attention.remove(clone) == 1
    assert type(module) is WindowBlock
    plain = block(shift=2)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(plain(x), before, rtol=1e-5, atol=1e-5)


def test_a_frozen_table_costs_no_gradient(monkeypatch):
    module = block(shift=2)
    assert window_attention.insert(module) == 1
    learns = []
    op = BACKWARD.default

    class Learning(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is op:
                learns.append(args[-1])
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 8, 12, 48, requires_grad=True)
    for frozen in (True, False):
        module.attn.relative_position_bias_table.requires_grad_(not frozen)
        out = module(x)
        with Learning():
            torch.autograd.grad(out.sum(), x)
    assert learns == [False, True]


def test_compiles_as_one_graph():
    module = block(shift=2)
    assert window_attention.insert(module) == 1
    x = torch.randn(2, 8, 12, 48)
    expected = block_results(module, x)
    got = block_results(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    graphs = []
    torch.compiler.reset()
    torch.compile(module, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(x)
    assert [node.target for graph in graphs for node in graph.graph.nodes].count(OP) == 1


@pytest.mark.gpu
def test_a_model_on_cuda_uses_the_op_in_bfloat16_and_timms_code_in_float32():
    assert ops.body("window_attention", "cuda") == "triton"
    model = models.create("swin_micro_64", 10).cuda().eval()
    models.load_backbone(model, "robust")
    x = torch.rand(8, 3, 64, 64, device="cuda")
    exact, exact_grad = model_results(model, x)
    with torch.autocast("cuda", torch.bfloat16):
        plain, plain_grad = model_results(model, x)
    assert window_attention.insert(model) == 6
    with Calls() as calls:
        full, _ = model_results(model, x)
    assert calls.forward == 0
    torch.testing.assert_close(full, exact, rtol=1e-4, atol=1e-4)
    with Calls() as calls, torch.autocast("cuda", torch.bfloat16):
        ours, ours_grad = model_results(model, x)
    assert (calls.forward, calls.backward, calls.dtypes) == (6, 6, {torch.bfloat16})
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()
    assert (ours_grad - exact_grad).norm() <= 2 * (plain_grad - exact_grad).norm()


@pytest.mark.gpu
def test_on_cuda_what_the_kernels_do_not_serve_is_plain_pytorch():
    qkv = torch.randn(1, 6, 6, 72, device="cuda", dtype=torch.float16)
    table = torch.randn(25, 3, device="cuda")
    settings = 3, 3, 1, 1, 0.3
    expected = window_reference.window_attention(qkv, table, *settings)
    assert torch.equal(OP(qkv, table, *settings), expected)
    grad = torch.randn_like(expected)
    ours = BACKWARD(grad, qkv, table, *settings, True)
    theirs = window_reference.window_attention_backward(grad, qkv, table, *settings, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

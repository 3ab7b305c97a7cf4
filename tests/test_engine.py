"""The fast attack against the plain one: equal where the arithmetic is, as strong where it is not."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings

import pytest
import torch
from analytic import Affine, HalfSpace, Wavy, images, seed
from conftest import tiny_net
from torch import nn

from fastadv import ops
from fastadv.engine import Fast, accelerate, native_bf16, shadow_passes
from fastadv.errors import NonFiniteGradientError, SettingsError
from fastadv.losses import ce, margin
from fastadv.passes import Passes
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel

THREAT = ThreatModel("linf", 8 / 255)


def exact_ce(logits, y):
    return nn.functional.cross_entropy(logits.double(), y, reduction="none")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "margin"},
        {"loss": "dlr"},
        {"loss": lambda z, y: -z.gather(1, y[:, None])[:, 0]},
        {"keep": "best"},
        {"keep": "success"},
        {"targeted": True},
        {"restarts": 2},
        {"steps": 0},
    ],
)
def test_in_float32_it_is_the_plain_attack(task, norm, settings):
    model, x, y = task
    threat = ThreatModel(norm, {"linf": 8 / 255, "l2": 0.5}[norm])
    attack = PGD(**{"steps": 5, "step_size": threat.eps / 4, **settings})
    # In float64: cross-entropy's float32 gradient fades into rounding where the model is sure; the seed does not.
    plain = dataclasses.replace(attack, loss=exact_ce) if attack.loss == "ce" else attack
    fast = attack.on(model, precision="fp32")
    assert fast.precision == "fp32"
    assert fast.body == ops.body("linf_step")
    want = plain.run(model, x, y, threat, generator=seed())
    got = fast.run(x, y, threat, generator=seed())
    # Batch norm folded into a convolution rounds another way: where dlr has a kink, one l2 image of the 400 takes
    # another branch, 0.25 % of all pixels.
    assert ((got.adv - want.adv).abs() < 1e-5).float().mean() > 0.997
    assert (got.success == want.success).float().mean() > 0.99
    assert torch.isclose(got.loss, want.loss, rtol=1e-3, atol=1e-3).float().mean() > 0.997
    assert torch.equal(fast(x, y, threat, generator=seed()), got.adv)


def test_in_bf16_it_is_as_strong(task):
    model, x, y = task
    for eps in (8 / 255, 16 / 255):
        threat = ThreatModel("linf", eps)
        attack = PGD(steps=10, keep="success")
        want = attack.run(model, x, y, threat, generator=seed())
        fast = attack.on(model, precision="bf16")
        got = fast.run(x, y, threat, generator=seed())
        assert fast.precision == "bf16"
        n, robust, robust_bf16 = len(x), int((~want.success).sum()), int((~got.success).sum())
        assert 0.1 * n < robust < 0.95 * n
        # Wilson's interval around the float32 count.
        share, z = robust / n, 1.96
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        assert abs(robust_bf16 / n - middle) <= half
        # Much closer, in fact: the same noise, nearly the same signs.
        assert abs(robust_bf16 - robust) <= 0.01 * n
        assert (got.adv.double() - x.double()).abs().max() <= torch.tensor(eps).double()


@pytest.mark.parametrize("keep", ["last", "best", "success"])
def test_in_bf16_scores_are_those_of_the_float32_model(task, keep):
    model, x, y = task
    dtypes = []
    handle = model[0].register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    try:
        fast = PGD(steps=4, keep=keep).on(model, precision="bf16")
        result = fast.run(x, y, THREAT, generator=seed())
    finally:
        handle.remove()
    assert dtypes[:4] == [torch.bfloat16] * 4
    assert dtypes[4:] == [torch.float32] * (1 if keep == "last" else 2)
    with torch.no_grad():
        logits = model(result.adv)
    torch.testing.assert_close(
        result.loss, nn.functional.cross_entropy(logits, y, reduction="none"), rtol=1e-4, atol=1e-5
    )
    wrong = logits.argmax(1) != y
    assert (result.success >= wrong).all()
    assert keep == "best" or torch.equal(result.success, wrong)


@pytest.mark.parametrize("keep", ["last", "best", "success"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_success_of_one_restart_is_not_lost_in_the_next(keep, precision):
    model, x, y = Wavy(), images(200), torch.zeros(200, dtype=torch.int64)
    success = [
        PGD(steps=4, keep=keep, restarts=restarts).on(model, precision=precision).run(x, y, THREAT, seed()).success
        for restarts in (1, 2, 5)
    ]
    assert (success[0] <= success[1]).all()
    assert (success[1] <= success[2]).all()
    assert success[0].float().mean() < success[2].float().mean() < 1


def test_the_seed_moves_images_whose_cross_entropy_is_zero():
    model, x, y = HalfSpace(scale=2000.0), images(4), torch.ones(4, dtype=torch.int64)
    with torch.no_grad():
        model.b.fill_(2000.0)
    attack = PGD(steps=4, step_size=0.02, random_start=False)
    threat = ThreatModel("linf", 0.05)
    assert torch.equal(attack(model, x, y, threat), x)
    torch.testing.assert_close(
        attack.on(model, precision="fp32")(x, y, threat), model.worst(x, "linf", 0.05), rtol=0, atol=1e-6
    )


def test_noise_is_drawn_from_the_generator_or_like_rand(task):
    model, x, y = task
    fast = PGD(steps=1).on(model)
    state = torch.get_rng_state()
    fast(x, y, THREAT, seed())
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(x.shape)
    want = torch.get_rng_state()
    torch.set_rng_state(state)
    fast(x, y, THREAT)
    assert torch.equal(want, torch.get_rng_state())


def test_auto_takes_bf16_exactly_where_the_device_has_it():
    assert PGD().on(tiny_net()).precision == ("bf16" if native_bf16("cpu") else "fp32")


@pytest.mark.parametrize("flags", [{}, {"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_f": True}])
def test_native_bf16_on_a_cpu_is_avx512_bf16_or_amx(monkeypatch, flags):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert native_bf16(torch.device("cpu")) == ("avx512_bf16" in flags or "amx_bf16" in flags)
    assert PGD().on(tiny_net()).precision == ("bf16" if native_bf16("cpu") else "fp32")


def test_native_bf16_on_a_torch_that_cannot_tell_falls_back_to_its_private_flags(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for found in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=found: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert native_bf16("cpu") is found


def test_other_devices_have_no_native_bf16():
    assert not native_bf16("meta")


class NoBf16(nn.Module):
    """Works in float32 only, in its forward or in its backward pass."""

    def __init__(self, where):
        super().__init__()
        self.linear, self.where = nn.Linear(192, 10), where

    def forward(self, x):
        out = self.linear(x.flatten(1))
        if out.dtype == torch.bfloat16:
            if self.where == "forward":
                raise RuntimeError("not implemented for 'BFloat16'\nand a second line")
            out.register_hook(self.fail)
        return out

    def fail(self, grad):
        raise RuntimeError("not implemented for 'BFloat16'\nand a second line")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_bf16_fails_it_says_so_once_and_attacks_in_float32(where):
    model, x, y = NoBf16(where), images(4), torch.arange(4)
    fast = PGD(steps=3).on(model, precision="bf16")
    with pytest.warns(
        UserWarning, match=r"NoBf16 run in fp32: bf16 fails \(not implemented for 'BFloat16'\)$"
    ) as caught:
        got = fast(x, y, THREAT, generator=seed())
    assert len(caught) == 1
    assert fast.precision == "fp32"
    assert torch.equal(got, PGD(steps=3).on(model, precision="fp32")(x, y, THREAT, generator=seed()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast(x, y, THREAT, generator=seed()), got)


def test_an_error_that_is_not_about_bf16_is_the_models_own():
    fast = PGD(steps=1).on(nn.Sequential(nn.Flatten(), nn.Linear(100, 10)), precision="bf16")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(images(2), torch.zeros(2, dtype=torch.int64), THREAT)
    assert fast.precision == "bf16"


@pytest.mark.parametrize(
    ("arguments", "named", "cure"),
    [
        ({"precision": "fp16"}, "'fp16'", "known: auto, bf16, fp32"),
        ({"precision": "bf61"}, "'bf61'", "did you mean 'bf16'"),
        ({"compile": "yes"}, "unknown compile 'yes'", "known: auto, off, on"),
        ({"capture": "of"}, "'of'", "did you mean 'off'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments, named, cure):
    with pytest.raises(SettingsError) as refusal:
        PGD().on(tiny_net(), **arguments)
    assert named in refusal.value.what
    assert cure in refusal.value.fix


def test_only_pgd_on_a_module_is_accelerated():
    with pytest.raises(SettingsError, match=r"fastadv\.pgd\.PGD"):
        accelerate(lambda model, x, y, threat: x, tiny_net())
    with pytest.raises(SettingsError, match=r"nn\.Module"):
        PGD().on(lambda x: x)
    assert isinstance(PGD().on(tiny_net(), compile="off", capture="auto"), Fast)


def test_without_waiting_bad_numbers_are_left_for_later(task):
    model, x, y = task
    fast = PGD(steps=2).on(model, precision="fp32")
    waited = fast(x, y, THREAT, generator=seed())
    assert torch.equal(fast(x, y, THREAT, generator=seed(), wait=False), waited)
    fast.health.check()

    broken = Affine()
    with torch.no_grad():
        broken.weight[0, 0] = math.nan
    fast = PGD(steps=2).on(broken, precision="fp32")
    fast(x[:3], y[:3] % 5, THREAT, wait=False)
    assert fast.health.bad.tolist() == [1, 1, 1]
    with pytest.raises(NonFiniteGradientError, match="from step 0 on, in 3 of 3 images"):
        fast.health.check()


def test_a_nan_weight_is_an_error_in_bf16_too():
    model = tiny_net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteGradientError):
        PGD(steps=1).on(model, precision="bf16")(images(2), torch.arange(2), THREAT)


@pytest.mark.gpu
def test_on_cuda_it_is_as_strong_and_never_waits(task):
    model, x, y = task
    want = PGD(keep="success").run(model, x, y, THREAT, generator=seed())
    model, x, y = tiny_net().cuda(), x.cuda(), y.cuda()
    model.load_state_dict(task.model.state_dict())
    fast = PGD(keep="success").on(model)
    assert fast.body == "triton"
    assert fast.precision == "bf16"
    got = fast.run(x, y, THREAT, generator=seed())
    assert abs(int(got.success.sum()) - int(want.success.sum())) <= 0.02 * len(x)
    noise = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(x, y, THREAT, generator=noise, wait=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    fast.health.check()


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile with everything but Inductor's C++, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("capture", ["on", "off"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_passes_are_the_attack_while_weights_and_batches_change(task, quick_compile, precision, capture):
    model, x, y = tiny_net(), task.x, task.y
    model.load_state_dict(task.model.state_dict())
    attack = PGD(steps=3, keep="best")
    plain = attack.on(model, precision=precision)
    fast = attack.on(model, precision=precision, compile="on", capture=capture)
    for n in (16, 16, 9):
        want, got = plain.run(x[:n], y[:n], THREAT, seed()), fast.run(x[:n], y[:n], THREAT, seed())
        assert fast.compiled
        assert ((got.adv - want.adv).abs() < 1e-5).float().mean() > 0.99
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            model[0].weight.mul_(-1)
        model[3].weight = nn.Parameter(-model[3].weight.detach())
    assert fast.captured == (capture == "on")


def test_where_the_compiler_fails_it_says_so_once_and_goes_on_uncompiled(task, monkeypatch):
    def refuse(*inputs):
        raise RuntimeError("no C++ compiler found\nand a second line")

    model, x, y = task
    monkeypatch.setattr(torch, "compile", lambda module: refuse)
    fast = PGD(steps=2).on(model, precision="fp32", compile="on")
    with pytest.warns(UserWarning, match=r"run uncompiled: torch.compile fails \(no C\+\+ compiler found\)$") as caught:
        got = fast(x[:8], y[:8], THREAT, seed())
        fast(x[:8], y[:8], THREAT, seed())
    assert len(caught) == 1
    assert not fast.compiled
    assert torch.equal(got, PGD(steps=2).on(model, precision="fp32")(x[:8], y[:8], THREAT, seed()))


def test_an_error_of_the_model_is_no_failure_of_the_compiler(quick_compile):
    fast = PGD(steps=1).on(nn.Sequential(nn.Flatten(), nn.Linear(100, 10)), precision="fp32", compile="on")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(images(2), torch.zeros(2, dtype=torch.int64), THREAT)
    assert fast.compiled


def test_shadow_passes_serve_attacks_with_a_loop_of_their_own(task):
    model, x, y = task
    x, y = x[:16], y[:16]
    plain = Passes(model, margin, "eval", 10)
    fast = shadow_passes(model, margin, precision="fp32", num_labels=10)
    seeded = shadow_passes(model, ce, precision="bf16", seeded=True)
    with plain.opened(x.device):
        want = plain.gradient(x, y)
    with fast.opened(x.device):
        got = fast.gradient(x, y)
        # Another shadow of the same model, opened meanwhile, and the first one again.
        with seeded.opened(x.device):
            rounded = seeded.gradient(x, y)[0]
            exact = seeded.score(x)
        again = fast.gradient(x, y)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exact, want[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(rounded, exact)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert fast.rounded is False
    assert seeded.rounded is True
    with pytest.raises(SettingsError, match="unknown precision"):
        shadow_passes(model, margin, precision="fp8")

"""What an attack refuses, each time naming the value and the cure, and what it repairs."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from analytic import HalfSpace, images
from torch import nn

from fastadv.attacks.autoattack import AutoAttack
from fastadv.engine import Fast
from fastadv.errors import DataError, FastadvError, SettingsError
from fastadv.pgd import PGD, pgd
from fastadv.threat import ThreatModel

THREAT = ThreatModel("linf", 8 / 255)
X, Y = images(4), torch.tensor([1, 0, 1, 0])


def with_pixel(value: float) -> torch.Tensor:
    x = X.clone()
    x[2, 1, 3, 3] = value
    return x


@pytest.mark.parametrize(
    ("x", "named", "cure"),
    [
        ((X * 255).byte(), "torch.uint8", "x.float() / 255"),
        ((X * 255).long(), "torch.int64", "x.float() / 255"),
        (X.bfloat16(), "torch.bfloat16", "x.float()"),
        (X.half(), "torch.float16", "x.float()"),
        (X.double(), "torch.float64", "x.float()"),
        (X.numpy(), "ndarray", "torch.from_numpy"),
        (X[0], "(3, 8, 8)", "x[None]"),
        (X * 255, "outside the box [0, 1]", "x / 255"),
        ((X - 0.5) / 0.25, "outside the box [0, 1]", "inside the model"),
        (with_pixel(-1e-4), "from -0.0001", "inside the model"),
        (with_pixel(1.001), "to 1.001", "inside the model"),
        (with_pixel(math.nan), "NaN", "isnan"),
        (with_pixel(math.inf), "inf", "inside the model"),
    ],
)
def test_images_that_cannot_be_attacked_are_refused(x, named, cure):
    with pytest.raises(DataError) as refusal:
        pgd(HalfSpace(), x, Y, THREAT, steps=1)
    assert named in refusal.value.what
    assert cure in refusal.value.fix


@pytest.mark.parametrize(
    ("y", "named", "cure"),
    [
        (Y.float(), "torch.float32", "y.long()"),
        (Y.int(), "torch.int32", "y.long()"),
        (Y.tolist(), "list", "torch.tensor(y)"),
        (Y[:3], "(3,)", "(B,)"),
        (torch.eye(2)[Y], "(4, 2)", "(B,)"),
        (Y - 1, "label -1", "from 0 on"),
        (Y + 1, "label 2, but the model has 2 classes", "below 2"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(y, named, cure):
    with pytest.raises(DataError) as refusal:
        pgd(HalfSpace(), X, y, THREAT, steps=1)
    assert named in refusal.value.what
    assert cure in refusal.value.fix


@pytest.mark.parametrize(
    ("arguments", "named", "cure"),
    [
        ({"steps": -1}, "steps is -1", "0 or more"),
        ({"steps": 1.5}, "steps is 1.5", "whole number"),
        ({"step_size": -0.1}, "step_size is -0.1", "targeted=True"),
        ({"step_size": math.nan}, "step_size is nan", "0 or more"),
        ({"step_size": 2}, "step_size is 2", "did you mean 2/255"),
        ({"restarts": 0}, "restarts is 0", "1 or more"),
        ({"restarts": 2, "random_start": False}, "restarts is 2", "random_start=True"),
        ({"loss": "cw"}, "'cw'", "known: ce, dlr, margin"),
        ({"loss": "margins"}, "'margins'", "did you mean 'margin'"),
        ({"loss": nn.CrossEntropyLoss()}, "shape ()", 'reduction="none"'),
        ({"keep": "beste"}, "'beste'", "did you mean 'best'"),
        ({"mode": "train"}, "'train'", "as-is"),
        ({"eps": 0.1}, "eps is a float", "ThreatModel(eps=...)"),
        ({"eps": torch.full((3,), 0.1)}, "(3,) on cpu for 4 images", "(B,)"),
        ({"eps": torch.ones(4, dtype=torch.int64)}, "torch.int64", "float"),
        ({"eps": torch.tensor([0.1, 8.0, 0.1, 0.1])}, "eps is 8", "did you mean 8/255"),
        ({"eps": torch.tensor([0.1, -0.1, 0.1, 0.1])}, "eps is -0.1", "0 or more"),
        ({"eps": torch.tensor([0.1, math.nan, 0.1, 0.1])}, "eps is nan", "number"),
        ({"mask": torch.ones(5, 5)}, "(5, 5)", "broadcasts to x"),
        ({"mask": torch.ones(2, 4, 3, 8, 8)}, "(2, 4, 3, 8, 8)", "broadcasts to x"),
        ({"mask": True}, "mask is a bool", "broadcasts to x"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments, named, cure):
    with pytest.raises(SettingsError) as refusal:
        pgd(HalfSpace(), X, Y, THREAT, **{"steps": 1, **arguments})
    assert named in refusal.value.what
    assert cure in refusal.value.fix


@pytest.mark.parametrize(
    ("model", "named", "cure"),
    [
        (lambda x: x, "function", "nn.Sequential"),
        (nn.Conv2d(3, 2, 3), "shape (4, 2, 6, 6)", "logits (B, classes)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0)), "shape (4,)", "logits (B, classes)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), "1 output", "another class"),
    ],
)
def test_models_that_cannot_be_attacked_are_refused(model, named, cure):
    with pytest.raises(SettingsError) as refusal:
        pgd(model, X, Y, THREAT, steps=1)
    assert named in refusal.value.what
    assert cure in refusal.value.fix


class Frozen(nn.Module):
    """Logits cut off from x."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.cut, self.linear = cut, nn.Linear(192, 2)

    def forward(self, x):
        if self.cut == "no_grad":
            with torch.no_grad():
                return self.linear(x.flatten(1))
        return self.linear(x.detach().flatten(1))


@pytest.mark.parametrize("cut", ["no_grad", "detach"])
def test_a_model_cut_off_from_its_input_is_refused(cut):
    with pytest.raises(SettingsError, match="no gradient with respect to x"):
        pgd(Frozen(cut), X, Y, THREAT, steps=1)


def test_a_refusal_is_a_value_error_and_the_attack_as_a_value_refuses_when_it_is_made():
    assert issubclass(FastadvError, ValueError)
    with pytest.raises(ValueError, match="steps is -1"):
        PGD(steps=-1)


def test_an_l2_radius_no_image_can_use_is_refused_at_the_attack():
    widest = math.sqrt(3 * 8 * 8)
    pgd(HalfSpace(), X, Y, ThreatModel("l2", widest), steps=1)
    with pytest.raises(SettingsError, match="did you mean 128/255"):
        pgd(HalfSpace(), X, Y, ThreatModel("l2", 128), steps=1)


@pytest.mark.parametrize("value", [-9e-7, 1 + 9e-7])
def test_a_pixel_outside_by_rounding_is_cut_not_refused(value):
    x = with_pixel(value)
    before = x.clone()
    adv = pgd(HalfSpace(), x, Y, THREAT)
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert (adv - x.clamp(0, 1)).abs().max() <= 8 / 255
    assert torch.equal(x, before)


def test_another_box_has_its_own_range():
    threat = ThreatModel("linf", 8, box=(0, 255))
    adv = pgd(HalfSpace(), 255 * X, Y, threat, step_size=2)
    assert 7.9 < (adv - 255 * X).abs().max() <= 8
    with pytest.raises(DataError, match=r"outside the box \[0, 255\]"):
        pgd(HalfSpace(), 255 * X - 128, Y, threat, step_size=2)


@pytest.mark.parametrize("threat", [8 / 255, None])
@pytest.mark.parametrize("attack", [PGD(), PGD().on(HalfSpace()), AutoAttack()])
def test_a_threat_that_is_none_is_refused(attack, threat):
    """All three ways into an attack."""
    call = attack if isinstance(attack, Fast) else partial(getattr(attack, "run", attack), HalfSpace())
    with pytest.raises(SettingsError, match=r"threat is .*, no ThreatModel") as refusal:
        call(X, Y, threat)
    assert "ThreatModel(" in refusal.value.fix


@pytest.mark.parametrize("value", ["2/255", None, [0.1]])
def test_a_step_size_that_is_no_number_is_refused(value):
    with pytest.raises(SettingsError, match="step_size is") as refusal:
        PGD(step_size=value)
    assert "2/255" in refusal.value.fix


class Rounded(nn.Module):
    """A net in another dtype, which casts its input where asked to."""

    def __init__(self, net, dtype, *, casts):
        super().__init__()
        self.net, self.dtype = net.to(dtype), dtype if casts else torch.float32

    def forward(self, x):
        return self.net(x.to(self.dtype)).float()


def nets_of(dtype, *, casts):
    """A linear and a convolutional one: torch refuses in other words."""
    torch.manual_seed(0)
    yield Rounded(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), dtype, casts=casts)
    yield Rounded(nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten()), dtype, casts=casts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_is_refused_unless_it_casts(dtype):
    for model in nets_of(dtype, casts=False):
        ways = (
            lambda model=model: pgd(model, X, Y, THREAT, steps=1),
            lambda model=model: PGD(steps=1).on(model, precision="fp32")(X, Y, THREAT),
            lambda model=model: AutoAttack().run(model, X, Y, THREAT),
        )
        for way in ways:
            with pytest.raises(SettingsError, match=f"weights are {dtype}") as refusal:
                way()
            assert "model.float()" in refusal.value.fix
        assert pgd(model.float(), X, Y, THREAT, steps=1).shape == X.shape
    for model in nets_of(dtype, casts=True):
        assert pgd(model, X, Y, THREAT, steps=1).shape == X.shape


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, RuntimeError), (torch.float16, NotImplementedError)])
def test_another_error_about_types_is_the_models_own(dtype, kind):
    """With float32 weights, or of a class of its own, as those are that ask for a slower way."""

    class Broken(Rounded):
        def forward(self, x):
            raise kind("a type of its own")

    with pytest.raises(kind, match="a type of its own"):
        pgd(Broken(nn.Linear(2, 2), dtype, casts=True), X, Y, THREAT, steps=1)

"""Patch embeddings in a fast attack: the convolution's values, its gradient from one matrix product."""

from __future__ import annotations

import pytest
import torch
from analytic import images, seed
from torch import Tensor, nn

from fastadv import patches
from fastadv.patches import PatchConv, patch_layers
from fastadv.pgd import PGD
from fastadv.shadow import holding
from fastadv.threat import ThreatModel

THREAT = ThreatModel("linf", 8 / 255)


def gradient(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = layer(leaf)
    torch.manual_seed(1)
    return out.detach(), torch.autograd.grad(out, leaf, torch.randn(out.shape, dtype=out.dtype))[0]


@pytest.mark.parametrize("size", [(8, 8), (11, 9), (4, 8)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [4, (2, 4)], ids=str)
def test_values_and_gradient_are_the_convolutions(kernel, layout, size):
    layer = nn.Conv2d(3, 16, kernel, kernel, bias=size[0] == 8).requires_grad_(False)
    x = torch.rand(5, 3, *size).to(memory_format=layout)
    want, want_gradient = gradient(layer, x)
    with holding(patch_layers(layer)):
        assert type(layer) is PatchConv
        got, got_gradient = gradient(layer, x)
    assert type(layer) is nn.Conv2d
    assert torch.equal(got, want)
    torch.testing.assert_close(got_gradient, want_gradient)
    wide = layer.double()
    with holding(patch_layers(wide)):
        torch.autograd.gradcheck(wide, x.double().requires_grad_())


def test_under_autocast_the_gradient_is_rounded_once():
    layer = nn.Conv2d(3, 16, 4, 4).requires_grad_(False)
    x = torch.rand(5, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        want, want_gradient = gradient(layer, x)
        with holding(patch_layers(layer)):
            got, got_gradient = gradient(layer, x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    assert got_gradient.dtype == torch.float32
    torch.testing.assert_close(got_gradient, want_gradient, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 16, 4, 2),
        nn.Conv2d(3, 16, 4, 4, padding=2),
        nn.Conv2d(3, 16, 2, 2, dilation=2),
        nn.Conv2d(3, 15, 2, 2, groups=3),
        nn.Conv2d(3, 16, 1),
        nn.Conv2d(96, 16, 2, 2),
        nn.ConvTranspose2d(3, 16, 2, 2),
    ],
    ids=str,
)
def test_other_convolutions_stay(layer):
    assert patch_layers(layer) == []


def test_an_attack_goes_through_it_and_leaves_the_model_as_it_was(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(64, 10))
    x, y = images(4), torch.arange(4)
    calls = []
    backward = patches._Patches.backward
    monkeypatch.setattr(patches._Patches, "backward", lambda *args: calls.append(1) or backward(*args))
    got = PGD(steps=3).on(model, precision="fp32").run(x, y, THREAT, seed())
    assert len(calls) == 3
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(got.adv, PGD(steps=3).run(model, x, y, THREAT, generator=seed()).adv)
    assert len(calls) == 3

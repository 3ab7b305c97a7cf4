"""Classifiers: pixels in, logits out; weights strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from fastadv import models
from fastadv.errors import CheckpointError, SettingsError


def test_swin_micro_64_is_the_contracts_model() -> None:
    model = models.create("swin_micro_64", 10)
    assert sum(p.numel() for p in model.backbone.parameters()) == 1_268_154
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 10)
    assert isinstance(model.head, torch.nn.Linear)
    heads = [block.attn.num_heads for layer in model.backbone.layers for block in layer.blocks]
    assert heads == [3, 3, 6, 6, 12, 12]


def test_resnet_micro_64_is_small_has_batch_norm_and_takes_other_sizes() -> None:
    model = models.create("resnet_micro_64", 200)
    assert sum(p.numel() for p in model.backbone.parameters()) == 1_223_448
    assert (models.WEIGHTS / "resnet_micro_64_robust.safetensors").stat().st_size < 3e6
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.backbone.modules())
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 200)
    small = models.create("resnet_micro_64", 5, image_size=32)
    assert small(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(SettingsError, match="'standard' are shipped for swin_micro_64 only, not for resnet_micro_64"):
        models.load_backbone(model, "standard")


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm_families_give_logits_of_the_asked_classes(name: str) -> None:
    model = models.create(name, 7).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, model.input_size, model.input_size)).shape == (1, 7)


def test_the_pixel_statistics_are_inside() -> None:
    model = models.create("resnet18", 3).eval()
    x = torch.rand(2, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.head(model.backbone(normalised)))


def test_the_resize_is_inside_and_only_where_asked() -> None:
    x = torch.rand(2, 3, 32, 32)
    with pytest.raises(SettingsError, match=r"input size is 32x32, but swin_micro_64 takes 64x64.*--resize"):
        models.create("swin_micro_64", 10)(x)
    model = models.create("swin_micro_64", 10, resize=True).eval()
    with torch.no_grad():
        up = F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
        assert torch.equal(model(x), model(up))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_micro_46", "unknown model 'swin_micro_46'; did you mean swin_micro_64"),
        ("efficientnet_b0", "family that was not tried"),
    ],
)
def test_an_unknown_model_gets_a_hint(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        models.create(name, 10)


@pytest.mark.parametrize(
    ("name", "kind"), [*(("swin_micro_64", kind) for kind in models.SHIPPED), ("resnet_micro_64", "robust")]
)
def test_shipped_weights_load_strictly(name: str, kind: str) -> None:
    model = models.create(name, 10)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    models.load_backbone(model, kind)
    # Batch norm's counters may stand at any number.
    after = {key: value for key, value in model.backbone.state_dict().items() if value.is_floating_point()}
    assert all(value.isfinite().all() and not torch.equal(value, before[key]) for key, value in after.items())
    with pytest.raises(SettingsError, match=r"are shipped for swin_micro_64.* only, not for resnet18"):
        models.load_backbone(models.create("resnet18", 10), kind)


def test_weights_that_do_not_fit_are_refused_with_the_first_keys(tmp_path: Path) -> None:
    model = models.create("swin_micro_64", 10)
    state = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    del state["norm.weight"]
    state["stranger"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)norm\.weight.*stranger|stranger.*norm\.weight"):
        models.load_backbone(model, str(tmp_path / "w.safetensors"))
    with pytest.raises(SettingsError, match="no weights at"):
        models.load_backbone(model, str(tmp_path / "absent.pth"))


def test_a_head_in_the_file_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given, model = models.create("swin_micro_64", 200), models.create("swin_micro_64", 10)
    save_file(given.state_dict(), tmp_path / "w.safetensors")
    head = model.head.weight.clone()
    models.load_backbone(model, str(tmp_path / "w.safetensors"))
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.backbone.norm.weight, given.backbone.norm.weight)


def test_official_swin_layout_is_accepted(tmp_path: Path) -> None:
    """Published files count the downsampling to the stage before it and carry index buffers."""
    given, model = models.create("swin_micro_64", 200), models.create("swin_micro_64", 10)
    old = {}
    for key, value in given.backbone.state_dict().items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        old[f"module.{key}"] = value
    old["module.head.weight"], old["module.head.bias"] = given.head.weight.detach(), given.head.bias.detach()
    torch.save({"model": old}, tmp_path / "w.pth")
    models.load_backbone(model, str(tmp_path / "w.pth"))
    for key, value in given.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value), key

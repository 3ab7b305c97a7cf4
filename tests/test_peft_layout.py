"""A LoRA run written for peft gives the run's own logits: by peft's rule applied by hand, and in peft itself."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_export import RECIPE, finished
from torch import Tensor, nn

from fastadv import models, peft_layout
from fastadv.cli import command
from fastadv.errors import CheckpointError, SettingsError
from fastadv.export import main, peft
from fastadv.models import Classifier
from fastadv.tuning import adapter, lora

# A name, the side it is built for, what timm calls its head, and a layer with an update.
CASES = [
    ("swin_micro_64", None, "head.fc", "layers.1.blocks.0.attn.qkv"),
    ("vit_tiny_patch16_224", 64, "head", "blocks.0.attn.qkv"),
    ("resnet10t", 64, "fc", "layer2.0.conv1"),
    ("resnet_micro_64", None, "fc", "layer1.0.conv2"),
]


def tuned(name: str, side: int | None, **settings: Any) -> Classifier:
    """A classifier whose updates have learnt."""
    torch.manual_seed(0)
    model = models.create(name, 7, image_size=side)
    lora(model, **settings)
    for key, parameter in model.named_parameters():
        if "lora_b" in key:
            nn.init.normal_(parameter, std=0.05)
        elif key.endswith(("bn1.weight", "bn2.weight")):
            # timm starts each block's last batch norm at zero, and the block would be silent.
            nn.init.ones_(parameter)
    return model.eval()


def exported(folder: Path, name: str, side: int | None) -> tuple[Classifier, Path]:
    """A run's model, and the folder that the command line writes."""
    model = tuned(name, side)
    recipe = dataclasses.replace(RECIPE, strategy="roli-lora", model=name, image_size=side)
    run = finished(folder / "run", recipe, model=model)
    assert command(main, [str(run), "--to", "peft"]) == 0
    return model, run / "peft"


def plain(folder: Path) -> nn.Module:
    """timm's model as the folder's README builds it."""
    line = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("backbone = "))
    model: nn.Module = eval(line.removeprefix("backbone = "), {"timm": timm})
    missing, unexpected = model.load_state_dict(load_file(folder / "base_model.safetensors"), strict=False)
    assert not unexpected
    assert len(missing) == 2
    return model.eval()


def answers(model: nn.Module, given: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model((x - given.mean) / given.std)


def by_hand(folder: Path) -> nn.Module:
    """timm's model with the adapter in it: W + alpha / r * BA for each pair of factors, the rest put in as it is."""
    model, config = plain(folder), json.loads((folder / "adapter_config.json").read_text())
    state, given = model.state_dict(), load_file(folder / "adapter_model.safetensors")
    for key in [key for key in given if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = given.pop(key), given.pop(key.replace("lora_A", "lora_B"))
        assert name in config["target_modules"]
        assert len(a) == b.shape[1] == config["r"]
        # Convolutions have B as 1x1.
        change = (b.flatten(1) @ a.flatten(1)).view_as(state[f"{name}.weight"])
        state[f"{name}.weight"] += config["lora_alpha"] / config["r"] * change
    for key, value in given.items():
        name = key.removeprefix("base_model.model.")
        assert name.rpartition(".")[0] in config["modules_to_save"]
        state[name].copy_(value)
    return model


@pytest.mark.parametrize(("name", "side", "head", "layer"), CASES)
def test_the_adapter_on_timms_model_gives_the_runs_logits(
    tmp_path: Path, name: str, side: int | None, head: str, layer: str
) -> None:
    given, folder = exported(tmp_path, name, side)
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        want = given(x)
    # One sum of weights for two of outputs, both in float32.
    torch.testing.assert_close(answers(by_hand(folder), given, x), want, rtol=1e-4, atol=1e-5)
    assert (answers(plain(folder), given, x) - want).abs().max() > 0.05
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [head]
    assert layer in config["target_modules"]
    count = {"swin_micro_64": 6, "vit_tiny_patch16_224": 12, "resnet10t": 11, "resnet_micro_64": 12}[name]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(config["target_modules"]) == count
    assert len(tensors) == 2 * count + 2
    rank = 16 if name.startswith("resnet") else 32
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert tensors[f"base_model.model.{layer}.lora_A.weight"].shape[0] == rank


def test_a_joint_update_is_that_of_queries_and_values_alone() -> None:
    """Rank 3 becomes 6, alpha 6 becomes 12: the scale stays 2."""
    model = tuned("swin_micro_64", None, rank=3, alpha=6.0, dropout=0.25)
    weights, config = peft_layout.adapter(model)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (6, 12.0, 0.25)
    for name in config["target_modules"]:
        layer: Any = model.backbone.get_submodule(name)
        a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        width = layer.base.in_features
        assert a.shape == (6, width)
        assert b.shape == (3 * width, 6)
        assert not b[width : 2 * width].any()
        merged = layer.base.weight + config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(merged, layer.merged(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", ["alpha", "keys and values swapped", "no head"])
def test_a_wrong_adapter_is_found(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail."""
    real = peft_layout.adapter

    def wrong(model: Classifier) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights, config = real(model)
        if fault == "alpha":
            config["lora_alpha"] /= 2
        for key, value in weights.items():
            if fault == "keys and values swapped" and "lora_B" in key:
                q, k, v = value.chunk(3)
                weights[key] = torch.cat([q, v, k])
            if fault == "no head" and "head" in key:
                weights[key] = torch.zeros_like(value)
        return weights, config

    monkeypatch.setattr(peft_layout, "adapter", wrong)
    with pytest.raises(AssertionError, match="not close"):
        test_the_adapter_on_timms_model_gives_the_runs_logits(tmp_path, *CASES[0])


def test_what_is_no_adapter_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = finished(tmp_path / "full")
    with pytest.raises(SettingsError, match=r"swin_micro_64 has no LoRA layers; a run whose strategy ends in -lora"):
        peft(full, tmp_path / "out")
    added = models.create("swin_micro_64", 10)
    adapter(added)
    run = finished(tmp_path / "more", dataclasses.replace(RECIPE, strategy="roli-adapter"), model=added)
    with pytest.raises(SettingsError, match="no LoRA layers"):
        peft(run, tmp_path / "out")
    mixed = tuned("swin_micro_64", None)
    mixed.backbone.set_submodule("layers.0.blocks.0.attn.qkv.base", nn.Sequential(nn.Linear(48, 144)))
    with monkeypatch.context() as patch:
        patch.setattr("fastadv.assemble.trained", lambda *_: mixed)
        with pytest.raises(CheckpointError, match="adds modules that timm does not have"):
            peft(run, tmp_path / "out")
    several = tuned("swin_micro_64", None)
    layer: Any = several.backbone.get_submodule("layers.0.blocks.0.attn.qkv")
    layer.scale = 3.0
    with pytest.raises(SettingsError, match="alphas"):
        peft_layout.save(several, tmp_path / "out", "")
    dilated = tuned("resnet10t", 64)
    conv: Any = dilated.backbone.get_submodule("layer4.0.conv1")
    conv.base.dilation = (2, 2)
    with pytest.raises(SettingsError, match=r"layer4\.0\.conv1 is a dilated convolution"):
        peft_layout.adapter(dilated)
    assert not (tmp_path / "out").exists()
    assert command(main, [str(full), "--to", "peft", "--name", "x"]) == 2
    assert "--name and --dataset with --to peft" in capsys.readouterr().err


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, "swin_micro_64", None)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model.safetensors",
    ]
    with pytest.raises(SettingsError, match=r"adapter_model\.safetensors exists already; --out OTHER"):
        peft(folder.parent, folder)
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.fixture
def peft_itself(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # peft's transformers looks for a package called kernels, and would meet ours where the checkout is on the path.
    path = [entry for entry in sys.path if not (Path(entry) / "kernels" / "__init__.py").exists()]
    monkeypatch.setattr(sys, "path", path)
    module: ModuleType = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    return module


@pytest.mark.parametrize(("name", "side", "head", "layer"), CASES)
def test_peft_itself_loads_it(
    tmp_path: Path, peft_itself: ModuleType, name: str, side: int | None, head: str, layer: str
) -> None:
    given, folder = exported(tmp_path, name, side)
    model = peft_itself.PeftModel.from_pretrained(plain(folder), str(folder)).eval()
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        want = given(x)
    # 0 as measured: the zeros in B change no sum.
    torch.testing.assert_close(answers(model, given, x), want, rtol=0, atol=1e-6)
    inner = model.get_submodule(f"base_model.model.{layer}")
    assert inner.lora_A["default"].weight.shape[0] == (16 if name.startswith("resnet") else 32)
    assert torch.equal(model.get_submodule(f"base_model.model.{head}").weight, given.head.weight)
    torch.testing.assert_close(answers(model.merge_and_unload(), given, x), want, rtol=1e-4, atol=1e-5)

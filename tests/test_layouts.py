"""Layouts of weight files: the same random network in every one of them gives the same logits after loading."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from fastadv import foreign, layouts, models, weightfile
from fastadv.errors import CheckpointError
from fastadv.tuning.natural import natural
from fastadv.tuning.twins import twins

State = dict[str, Tensor]
IMAGENET = {"mean": torch.tensor([0.485, 0.456, 0.406]), "std": torch.tensor([0.229, 0.224, 0.225])}


@pytest.fixture(scope="module")
def swin() -> models.Classifier:
    """A small Swin of random weights, norms and biases too."""
    torch.manual_seed(0)
    return _shaken(models.create("swin_micro_64", 7))


@pytest.fixture(scope="module")
def resnet() -> models.Classifier:
    """A ResNet-18 of random weights and running statistics."""
    torch.manual_seed(0)
    return _shaken(models.create("resnet18", 7, image_size=32))


def _shaken(model: models.Classifier) -> models.Classifier:
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value), alpha=0.02)
    return model.eval()


def trunk(model: models.Classifier) -> State:
    return dict(model.backbone.state_dict())


def headed(model: models.Classifier, name: str) -> State:
    return {f"{name}.{key}": value for key, value in model.head.state_dict().items()}


def official(model: models.Classifier) -> State:
    """microsoft/Swin-Transformer: a downsampling ends the stage before; index buffers; ``head``."""
    found = headed(model, "head")
    for key, value in trunk(model).items():
        stage = int(key.split(".")[1]) if ".downsample." in key else 0
        found[key.replace(f"layers.{stage}.down", f"layers.{stage - 1}.down")] = value
    for stage in range(3):
        found[f"layers.{stage}.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
        found[f"layers.{stage}.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    return found


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def statistics(mean: str, std: str, shape: tuple[int, ...] = (1, 3, 1, 1)) -> State:
    return {mean: IMAGENET["mean"].view(shape), std: IMAGENET["std"].view(shape)}


def roli(model: models.Classifier, resize: bool) -> State:
    """DongXzz/RoLI: Sequential([Resize,] NormalizeByChannelMeanStd, Swin(enc, head))."""
    first = int(resize)
    enc = {key: value for key, value in official(model).items() if not key.startswith("head.")}
    return {
        **statistics(f"{first}.mean", f"{first}.std", (3,)),
        **prefixed(enc, f"{first + 1}.enc."),
        **prefixed(headed(model, "head.last_layer"), f"{first + 1}."),
    }


def madrylab(model: models.Classifier) -> State:
    """MadryLab/robustness under DataParallel: AttackerModel(normalizer, model, attacker(normalize, model))."""
    whole = {**trunk(model), **headed(model, "fc")}
    return prefixed(
        {
            **statistics("normalizer.new_mean", "normalizer.new_std", (3, 1, 1)),
            **prefixed(whole, "model."),
            **statistics("attacker.normalize.new_mean", "attacker.normalize.new_std", (3, 1, 1)),
            **prefixed(whole, "attacker.model."),
        },
        "module.",
    )


def scaffolded(model: models.Classifier, tuning: Callable[[models.Classifier], Any]) -> State:
    """What best/ of a run holds whose strategy adds something that only training needs."""
    trained = copy.deepcopy(model)
    tuning(trained)
    assert len(trained.state_dict()) > len(model.state_dict())
    return dict(trained.state_dict())


SWIN: dict[str, Callable[[models.Classifier], Any]] = {
    "timm": lambda m: {**trunk(m), **headed(m, "head.fc")},
    "timm without head": trunk,
    "official": official,
    "official, trained by ARES": lambda m: {"state_dict_ema": prefixed(official(m), "module."), "epoch": 300},
    "official without head under model": lambda m: {"model": {k: v for k, v in official(m).items() if "head" not in k}},
    "RobustBench": lambda m: {**prefixed(official(m), "model."), **statistics("normalize.mean", "normalize.std")},
    "RobustBench, mu and sigma": lambda m: {
        "state_dict": prefixed({**trunk(m), **headed(m, "head.fc"), **statistics("mu", "sigma")}, "module.model.")
    },
    "RoLI": lambda m: {"model": roli(m, resize=False)},
    "RoLI with resize, several GPUs": lambda m: {"model": prefixed(roli(m, resize=True), "module.")},
    "a run of this package": lambda m: dict(m.state_dict()),
    "a run of autolora": lambda m: scaffolded(m, natural),
    "beside a Namespace": lambda m: {"model_ema": official(m), "args": argparse.Namespace(lr=1.0, data={"x": [1]})},
}
RESNET: dict[str, Callable[[models.Classifier], Any]] = {
    "timm and torchvision": lambda m: {**trunk(m), **headed(m, "fc")},
    "torch before 0.4.1": lambda m: {k: v for k, v in trunk(m).items() if not k.endswith("num_batches_tracked")},
    "robustness": lambda m: {"model": madrylab(m), "epoch": 3, "optimizer": {"lr": 0.1}},
    "robustness, older": lambda m: {"state_dict": madrylab(m)},
    "a run of twins": lambda m: scaffolded(m, twins),
    "AutoLoRa": lambda m: {"state_dict": {**trunk(m), **headed(m, "fc")}, "args": argparse.Namespace(eps=0.0314)},
}


def check(tmp_path: Path, given: models.Classifier, content: Any, whole: bool) -> None:
    """Loads ``content`` into a new classifier, and where it is ``whole`` as a foreign one; logits differ by 0.0."""
    torch.save(content, tmp_path / "w.pth")
    x = torch.rand(3, 3, given.input_size, given.input_size)
    model = models.create(given.name, 7, image_size=given.input_size)
    models.load_backbone(model, str(tmp_path / "w.pth"))
    model.head.load_state_dict(given.head.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), given(x))
        if whole:
            assert torch.equal(foreign.load(given.name, tmp_path / "w.pth")(x), given(x))


@pytest.mark.parametrize("layout", SWIN)
def test_every_layout_of_a_swin_gives_the_same_logits(tmp_path: Path, swin: models.Classifier, layout: str) -> None:
    check(tmp_path, swin, SWIN[layout](swin), whole="without head" not in layout)


@pytest.mark.parametrize("layout", RESNET)
def test_every_layout_of_a_resnet_gives_the_same_logits(tmp_path: Path, resnet: models.Classifier, layout: str) -> None:
    check(tmp_path, resnet, RESNET[layout](resnet), whole=layout != "torch before 0.4.1")


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """torchvision's ViT at the size of timm's tiny one."""
    torch.manual_seed(0)
    found = torchvision.models.VisionTransformer(32, 16, 12, 3, 192, 768, num_classes=7)
    with torch.no_grad():
        for value in found.parameters():
            value.add_(0.02 * torch.rand_like(value))
    return found.eval()


def old_mlp(state: State) -> State:
    renamed = {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): state[key] for key in state
    }
    assert renamed.keys() != state.keys()
    return renamed


@pytest.mark.parametrize("older", [False, True])
def test_torchvisions_vit_becomes_timms(tmp_path: Path, vit: nn.Module, older: bool) -> None:
    state = dict(vit.state_dict())
    save_file(old_mlp(state) if older else state, tmp_path / "w.safetensors")
    model = models.create("deit_tiny_patch16_224", 7, image_size=32)
    models.load_backbone(model, str(tmp_path / "w.safetensors"))
    model.head.load_state_dict({part: state[f"heads.head.{part}"] for part in ("weight", "bias")})
    x = torch.rand(3, 3, 32, 32)
    whole = foreign.load("vit_tiny_patch16_224", tmp_path / "w.safetensors", image_size=32)
    with torch.no_grad():
        expected = vit((x - model.mean) / model.std)
        torch.testing.assert_close(model.eval()(x), expected)
        # The statistics that timm has for this name are others: torchvision's layout comes with torchvision's.
        torch.testing.assert_close(whole(x), expected)


def test_other_pixel_statistics_than_the_models_are_refused(tmp_path: Path, vit: nn.Module) -> None:
    save_file(dict(vit.state_dict()), tmp_path / "w.safetensors")
    model = models.create("vit_tiny_patch16_224", 7, image_size=32)
    before = model.backbone.norm.weight.clone()
    with pytest.raises(CheckpointError, match=r"0\.485, 0\.456.*0\.5, 0\.5, 0\.5.*deit_base_patch16_224"):
        models.load_backbone(model, str(tmp_path / "w.safetensors"))
    assert torch.equal(model.backbone.norm.weight, before)


@pytest.mark.parametrize("name", ["swin_micro_64", "resnet18"])
def test_a_file_in_no_known_layout_is_refused_with_the_first_names(tmp_path: Path, name: str) -> None:
    torch.save({f"embeddings.{i}.weight": torch.zeros(2) for i in range(7)}, tmp_path / "w.pth")
    model = models.create(name, 7)
    first = next(iter(model.backbone.state_dict()))
    with pytest.raises(CheckpointError) as caught:
        models.load_backbone(model, str(tmp_path / "w.pth"))
    assert "no known layout: the file holds embeddings.0.weight, embeddings.1.weight" in caught.value.what
    assert f"missing are {first}" in caught.value.what and "official Swin" in caught.value.fix
    assert caught.value.exit_code == 4


def test_one_missing_tensor_is_enough_for_a_refusal(tmp_path: Path, swin: models.Classifier) -> None:
    """A trunk that is random in one place is never trained from, whatever the layout."""
    for layout in ("official", "RobustBench", "timm"):
        state = SWIN[layout](swin)
        gone = next(key for key in state if key.endswith("layers.1.blocks.0.norm1.bias"))
        torch.save({key: value for key, value in state.items() if key != gone}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=r"1 missing \(layers\.1\.blocks\.0\.norm1\.bias\)"):
            models.load_backbone(models.create("swin_micro_64", 7), str(tmp_path / "w.pth"))


def test_timms_layout_without_head_is_not_shifted_twice(swin: models.Classifier) -> None:
    assert layouts.in_timm_names(trunk(swin)).keys() == trunk(swin).keys()


class RunsCode:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def test_a_namespace_is_no_way_in(tmp_path: Path) -> None:
    """What it holds is refused like anywhere else, also under names that mean something to Python."""
    canary = tmp_path / "canary"
    state = {"a": torch.zeros(1)}
    for name in ("x", "__class__", "__init__", "__setstate__"):
        namespace = argparse.Namespace()
        namespace.__dict__[name] = RunsCode(canary)
        torch.save({"model": state, "args": namespace}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=r"a Python object \(posix\.system\), which may run code"):
            weightfile.read(tmp_path / "w.pth")
    harmless = argparse.Namespace(lr=2)
    harmless.__dict__.update({"__class__": "dict", "__setstate__": 1})
    torch.save({"model": state, "args": harmless}, tmp_path / "w.pth")
    assert weightfile.read(tmp_path / "w.pth").keys() == state.keys()
    assert not canary.exists()

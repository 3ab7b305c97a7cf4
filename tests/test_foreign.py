"""Models trained elsewhere: any library's layout, the file's own head, and refusals that say what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from fastadv import foreign, layouts, models, weightfile
from fastadv.errors import CheckpointError, SettingsError

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def saved(path: Path, network: nn.Module | dict[str, Tensor]) -> Path:
    state = network.state_dict() if isinstance(network, nn.Module) else network
    save_file({key: value.contiguous() for key, value in state.items()}, path / "w.safetensors")
    return path / "w.safetensors"


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize(
    ("name", "network", "side"),
    [
        # Both libraries know the first two names, and lay the second out differently.
        ("resnet18", lambda: torchvision.models.resnet18(num_classes=7), 40),
        ("efficientnet_b0", lambda: torchvision.models.efficientnet_b0(num_classes=7), 40),
        ("efficientnet_b0", lambda: timm.create_model("efficientnet_b0", num_classes=7), 40),
        # A convolution as head.
        ("squeezenet1_1", lambda: torchvision.models.squeezenet1_1(num_classes=7), 40),
    ],
)
def test_a_network_gives_what_it_gave_with_pixels_normalised_inside(
    tmp_path: Path, name: str, network: Any, side: int
) -> None:
    given, x = network(), torch.rand(2, 3, side, side)
    model = foreign.load(name, saved(tmp_path, given))
    assert (model.num_classes, model.input_size, model.training) == (7, 224, False)
    assert torch.equal(answers(model, x), answers(given, (x - MEAN) / STD))


def test_the_librarys_own_pixel_statistics_are_used(tmp_path: Path) -> None:
    """timm's ViTs are trained on pixels from -1 to 1."""
    given = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32)
    model = foreign.load("vit_tiny_patch16_224", saved(tmp_path, given), num_classes=5, image_size=32)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(answers(model, x), answers(given, 2 * x - 1))
    with pytest.raises(SettingsError, match="input size is 40x40, but vit_tiny_patch16_224 takes 32x32"):
        model(torch.rand(1, 3, 40, 40))


@pytest.mark.parametrize("names", layouts.STATISTICS)
def test_statistics_in_the_file_go_before_the_librarys(tmp_path: Path, names: tuple[str, str]) -> None:
    given = torchvision.models.squeezenet1_1(num_classes=3)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    model = foreign.load("squeezenet1_1", saved(tmp_path, {**given.state_dict(), names[0]: mean, names[1]: std}))
    assert torch.equal(model.mean, mean)
    assert torch.equal(model.std, std)


@pytest.mark.parametrize("file", sorted(models.WEIGHTS.glob("*.safetensors")), ids=lambda file: file.stem)
def test_the_shipped_backbones_have_heads_of_their_own(file: Path) -> None:
    name, _, kind = file.stem.rpartition("_")
    model, x = foreign.load(name, kind), torch.rand(2, 3, 64, 64)
    whole = models.create(name, 200)
    given = weightfile.read(file)
    models.load_backbone(whole, kind)
    whole.head.load_state_dict({part: given[f"head.{part}"] for part in ("weight", "bias")})
    assert model.num_classes == 200
    assert torch.equal(answers(model, x), answers(whole, x))


@pytest.mark.parametrize("name", ["swin_micro_64", "resnet_micro_64", "resnet10t"])
def test_the_weights_of_a_run_of_this_package_are_accepted(tmp_path: Path, name: str) -> None:
    given = models.create(name, 4)
    model = foreign.load(name, saved(tmp_path, given))
    x = torch.rand(1, 3, given.input_size, given.input_size)
    torch.testing.assert_close(answers(model, x), answers(given, x))


def test_official_swin_files_are_accepted(tmp_path: Path) -> None:
    """They count a downsampling to the stage before it, call the head otherwise, and hold index buffers."""
    given = models.create("swin_micro_64", 4)
    old = {f"module.head.{key}": value for key, value in given.head.state_dict().items()}
    for key, value in given.backbone.state_dict().items():
        stage = int(key.split(".")[1]) if ".downsample." in key else 0
        old["module." + key.replace(f"layers.{stage}.down", f"layers.{stage - 1}.down")] = value
    old["module.layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    torch.save({"model": old}, tmp_path / "w.pth")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(answers(foreign.load("swin_micro_64", tmp_path / "w.pth"), x), answers(given, x))


def test_old_files_lack_the_count_that_eval_mode_does_not_read(tmp_path: Path) -> None:
    state = torchvision.models.shufflenet_v2_x0_5(num_classes=3).state_dict()
    kept = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(kept) < len(state)
    assert foreign.load("shufflenet_v2_x0_5", saved(tmp_path, kept)).num_classes == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet_50", r"unknown model 'resnet_50'; did you mean .*resnet50"),
        ("swin_micro_46", r"did you mean swin_micro_64"),
        ("resnet18.nobody", r"Invalid pretrained tag \(nobody\)"),
        ("xyzzy", r"a name of timm.list_models\(\) or torchvision.models"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        foreign.load(name, tmp_path / "not-even-looked-for.pth")


def test_files_that_are_missing_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    name = "shufflenet_v2_x0_5"
    with pytest.raises(CheckpointError, match=r"absent\.pth does not exist"):
        foreign.load(name, tmp_path / "absent.pth")
    state = torchvision.models.shufflenet_v2_x0_5(num_classes=3).state_dict()
    path = saved(tmp_path, state)
    with pytest.raises(CheckpointError, match="has 3 classes, not 10"):
        foreign.load(name, path, num_classes=10)
    with pytest.raises(CheckpointError, match=r"do not fit the model: \d+ of another shape \(stage2\.0\."):
        foreign.load("shufflenet_v2_x1_0", path)
    missing = {key: value for key, value in state.items() if key != "conv5.0.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing \(conv5\.0\.weight\), 1 unexpected \(stranger\)"):
        foreign.load(name, saved(tmp_path, {**missing, "stranger": torch.zeros(1)}))
    headless = {key: value for key, value in state.items() if not key.startswith("fc.")}
    with pytest.raises(CheckpointError, match=r"has no head \(fc\.weight\); give the weights of a whole classifier"):
        foreign.load(name, saved(tmp_path, headless))
    trunk = {f"backbone.{key}": value for key, value in models.swin_micro_64().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has no head \(head\.fc\.weight\); train one: .*--model swin_micro_64"):
        foreign.load("swin_micro_64", saved(tmp_path, trunk))


def test_an_attack_sees_pixels_and_leaves_the_model_alone(tmp_path: Path) -> None:
    from fastadv.pgd import PGD
    from fastadv.threat import ThreatModel

    model = foreign.load("squeezenet1_1", saved(tmp_path, torchvision.models.squeezenet1_1(num_classes=3)))
    x, y = torch.rand(2, 3, 40, 40), torch.tensor([0, 2])
    adv = PGD(steps=2, random_start=False)(model, x, y, ThreatModel(eps=4 / 255))
    assert 0 < float((adv - x).abs().max()) <= 4 / 255 + 1e-9
    assert not any(parameter.grad is not None for parameter in model.parameters())

"""AutoLoRa: one step against a transcription by hand, which branch trains what, and a schedule that survives kills."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from two_layers import answer, classifier, descend, kl, leaves, log_p

from fastadv import assemble, stopping, strategies
from fastadv.errors import SettingsError
from fastadv.models import Classifier, create
from fastadv.pgd import PGD
from fastadv.plateau import plateau
from fastadv.run import Run
from fastadv.runlog import Progress, read
from fastadv.strategies import Stage
from fastadv.strategies.autolora import AutoLoraRecipe, autolora_loss
from fastadv.threat import ThreatModel
from fastadv.trainer import fit, optimizer_of, set_train_mode
from fastadv.tuning.natural import branch_of, natural, natural_branch, score

LR, DECAY, SHARE = 0.25, 0.125, 0.375


def learners(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def two_layers(rank: int = 2) -> tuple[Classifier, list[nn.Module]]:
    """The small classifier with a branch that has an effect."""
    model = classifier()
    training = natural(model, rank=rank)
    nn.init.normal_(branch_of(model).updates[0].lora_b)
    branch_of(model).accuracy.fill_(SHARE)
    return model, training


def by_hand(model: Classifier, x: Tensor, adv: Tensor, y: Tensor, beta: float) -> dict[str, Tensor]:
    """A step in formulas; what the natural pass may not train is a constant in it."""
    p = leaves(model)
    a, b = (dict(model.named_parameters())[f"natural.updates.0.lora_{ab}"].detach().clone() for ab in "ab")
    a.requires_grad_()
    b.requires_grad_()
    resting = {name: value.detach() for name, value in p.items()}
    # Rank 2, alpha 1; (6 * 3, 2 * 3) times (2 * 3, 3 * 3), read as (6, 3, 3, 3).
    branch = {**resting, "w": resting["w"] + 0.5 * (b @ a).reshape(6, 3, 3, 3), "v": p["v"], "c": p["c"]}
    clean, attacked = answer(x, branch), answer(adv, p)
    loss = (1 - SHARE) * -log_p(clean).gather(1, y[:, None]).mean()
    loss = loss + (1 - (1 - SHARE)) * -log_p(attacked).gather(1, y[:, None]).mean()
    loss = loss + beta * SHARE * kl(clean, attacked).mean()
    every = [*p.values(), a, b]
    gradients = torch.autograd.grad(loss, every)
    names = ["backbone.layer1.weight", "backbone.norm.weight", "backbone.norm.bias", "head.weight", "head.bias"]
    names += ["natural.updates.0.lora_a", "natural.updates.0.lora_b"]
    return {name: descend(one, g, LR, DECAY) for name, one, g in zip(names, every, gradients, strict=True)}


def one_step(model: Classifier, training: list[nn.Module], x: Tensor, adv: Tensor, y: Tensor, stage: Stage) -> None:
    optimizer = optimizer_of(learners(model), stage, 1e-8)
    assert isinstance(optimizer, torch.optim.SGD) and stage.loss_on is not None
    set_train_mode(model, training)
    stage.loss_on(model)(model, x, y, lambda images, labels: adv).backward()
    optimizer.step()


@pytest.mark.parametrize("beta", [None, 1.5])
def test_a_step_is_the_transcribed_one(beta: float | None) -> None:
    recipe = AutoLoraRecipe(lr=LR, weight_decay=DECAY, rank=2, beta=beta)
    (stage,) = strategies.load_all()["autolora"].stages(recipe)
    model, training = two_layers()
    x, adv = torch.rand(2, 7, 3, 6, 6, dtype=torch.float64)
    y = torch.arange(7) % 3
    expected = by_hand(model, x, adv, y, 6.0 if beta is None else beta)
    assert expected.keys() == learners(model).keys()
    got = copy.deepcopy(model)
    one_step(got, training_of(got), x, adv, y, stage)
    for name, value in expected.items():
        # The learning rate is kept in float32.
        assert (got.get_parameter(name) - value).abs().max() < 1e-7, name
    # Red where clean and adversarial images are exchanged.
    wrong = copy.deepcopy(model)
    one_step(wrong, training_of(wrong), adv, x, y, stage)
    assert (wrong.get_parameter("head.weight") - expected["head.weight"]).abs().max() > 1e-4
    assert training == [model.backbone, model.head]


def training_of(model: Classifier) -> list[nn.Module]:
    return [model.backbone, model.head]


def test_the_natural_pass_trains_updates_and_head_the_other_all_but_the_updates() -> None:
    model, training = two_layers()
    set_train_mode(model, training)
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    with natural_branch(model):
        model(x).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    updates = {"natural.updates.0.lora_a", "natural.updates.0.lora_b"}
    assert trained == updates | {"head.weight", "head.bias"}
    model.zero_grad()
    model(x).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == set(dict(model.named_parameters())) - updates


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet_micro_64", 12), ("resnet18", 19), ("swin_micro_64", 24), ("vit_tiny_patch16_224", 48)]
)
def test_every_layer_of_every_block_has_an_update_that_works(name: str, layers: int) -> None:
    """The released code's natural pass runs those of each stage's last block alone."""
    torch.manual_seed(0)
    model = create(name, 3, image_size=None if name == "swin_micro_64" else 64).eval()
    x = torch.rand(2, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # timm starts each block's last one at zero, and hides what comes before.
            nn.init.ones_(module.weight)
    plain = model(x)
    natural(model)
    updates = branch_of(model).updates
    assert len(updates) == layers
    with natural_branch(model):
        # B is zero.
        torch.testing.assert_close(model(x), plain)
        model(x).sum().backward()
    assert all(update.lora_b.grad.abs().max() > 0 for update in updates)
    for update in updates:
        nn.init.normal_(update.lora_b)
    # The plain network, which is attacked, validated and served, is not changed by any of them.
    assert torch.equal(model(x), plain)
    with natural_branch(model):
        assert (model(x) - plain).abs().max() > 1e-3


def test_the_updates_of_a_resnet50_are_as_large_as_the_papers() -> None:
    with torch.device("meta"):
        model = create("resnet50", 1000)
        whole = sum(p.numel() for p in model.parameters()) + sum(p.numel() for p in model.head.parameters())
        natural(model)
    assert len(branch_of(model).updates) == 52
    # "less than 5 %" in arXiv:2310.01818; its released code, run: 3.17 % of a network with two heads, old and new.
    assert sum(p.numel() for p in branch_of(model).parameters()) / whole == pytest.approx(0.0317, abs=5e-5)


def test_the_share_is_the_natural_branchs_accuracy_in_eval_mode() -> None:
    model, training = two_layers()
    x, y = torch.rand(30, 3, 6, 6, dtype=torch.float64), torch.arange(30) % 3
    norm = model.backbone.norm
    p = {name: value.detach() for name, value in leaves(model).items()}
    update = branch_of(model).updates[0]
    p["w"] = p["w"] + 0.5 * (update.lora_b @ update.lora_a).detach().view_as(p["w"])
    right = answer(x, p, norm.running_mean, norm.running_var).argmax(1) == y
    set_train_mode(model, training)
    score(model, model, zip(x.split(7), y.split(7), strict=True))
    assert branch_of(model).accuracy.item() == pytest.approx(right.double().mean().item())
    assert norm.num_batches_tracked == 0
    # None right would leave the backbone without a gradient.
    score(model, lambda images: model(images).roll(1, 1) * 0 + torch.tensor([0.0, 0.0, 1.0]), [(x[:3], y[:3] * 0)])
    assert branch_of(model).accuracy.item() == pytest.approx(1 / 3)


def test_a_fast_attack_between_two_steps_sees_the_plain_network() -> None:
    torch.manual_seed(0)
    model = create("resnet_micro_64", 3, image_size=32)
    x, y, threat = torch.rand(4, 3, 32, 32), torch.arange(4) % 3, ThreatModel("linf", 8 / 255)
    training = natural(model)
    branch_of(model).accuracy.fill_(0.5)
    fast = PGD(steps=2, random_start=False).on(model, precision="fp32", capture="on")
    for _ in range(3):
        set_train_mode(model, training)
        autolora_loss(model)(model, x, y, partial(fast, threat=threat)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * (torch.zeros_like(p) if p.grad is None else p.grad)
                p.grad = None
    served = create("resnet_micro_64", 3, image_size=32)
    served.load_state_dict({key: v for key, v in model.state_dict().items() if not key.startswith("natural.")})
    attack = PGD(steps=2, random_start=False)
    assert torch.equal(fast(x, y, threat), attack.on(served, precision="fp32")(x, y, threat))
    # Norms folded into convolutions: a sign may differ where a gradient is nearly zero.
    assert (fast(x, y, threat) == attack(served, x, y, threat)).float().mean() > 0.99


RECIPE = AutoLoraRecipe(
    strategy="autolora",
    weights="none",
    image_size=32,
    per_class=2,
    val_images=10,
    train_steps=1,
    eval_steps=1,
    epochs=4,
    batch_size=5,
    val_every=3,
    checkpoint_minutes=60,
    precision="fp32",
)


def trained_in(folder: Path, *, resume: bool = False) -> tuple[dict[str, Tensor], Run]:
    """Weights after four epochs with a checkpoint after each: the rate falls and the best weights come back."""
    splits = assemble.splits(RECIPE)
    (stage,) = strategies.load_all()["autolora"].stages(RECIPE)
    model = assemble.model(RECIPE, 10)
    stage = dataclasses.replace(stage, pace=partial(plateau, lr=stage.lr, every=1))
    with Progress() as progress, Run(folder, RECIPE, progress, resume=resume) as run:
        run.begin(splits)
        fit(model, stage, splits, RECIPE, run)
    return model.state_dict(), run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Run]:
    return trained_in(tmp_path_factory.mktemp("whole") / "run")


def test_the_rate_and_the_shares_follow_what_was_measured(whole: tuple[dict[str, Tensor], Run]) -> None:
    _, run = whole
    rows = [event for event in read(run.folder / "log.jsonl") if event["event"] == "epoch"]
    # Validated after every epoch, whatever --val-every says: the pace counts them.
    robust = [row["robust"] for row in rows]
    assert len(robust) == 4 and None not in robust
    factors = [plateau(robust[:epoch], lr=RECIPE.lr, every=1).factor for epoch in range(4)]
    assert [row["lr"] for row in rows] == pytest.approx([RECIPE.lr * factor for factor in factors])
    assert min(factors) < 1


def test_a_run_stopped_inside_and_between_epochs_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[dict[str, Tensor], Run]
) -> None:
    for stops in range(20):
        # At most two steps at a time, three at an epoch's end.
        asked = iter([False, True])
        monkeypatch.setattr(stopping, "requested", lambda asked=asked: next(asked, True))
        try:
            state, run = trained_in(tmp_path / "run", resume=stops > 0)
            break
        except stopping.Stopped:
            continue
    assert 4 <= stops < 19
    assert all(torch.equal(value, state[name]) for name, value in whole[0].items())
    assert [row["robust"] for row in run.history] == [row["robust"] for row in whole[1].history]
    assert any("natural.updates" in name for name in state)


def test_what_is_served_is_a_plain_classifier(whole: tuple[dict[str, Tensor], Run]) -> None:
    folder = whole[1].folder
    model = assemble.trained(folder, RECIPE)
    assert model.state_dict().keys() == create("resnet_micro_64", 10).state_dict().keys()
    both = create("resnet_micro_64", 10, image_size=32)
    natural(both)
    both.load_state_dict(load_file(folder / "best" / "model.safetensors"))
    x = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), both.eval()(x))


def test_settings_that_cannot_be_meant() -> None:
    stages = strategies.load_all()["autolora"].stages
    with pytest.raises(SettingsError, match="schedule is drops, which autolora does not use"):
        list(stages(AutoLoraRecipe(strategy="autolora", schedule="drops")))
    with pytest.raises(SettingsError, match="LoRA rank is 0"):
        natural(create("resnet_micro_64", 3), rank=0)
    model = classifier()
    model.backbone = nn.Flatten()
    with pytest.raises(SettingsError, match="two_layers has no blocks"):
        natural(model)

"""The twins give what the originals give: against them where they are installed, against closed forms everywhere."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from analytic import DIMS, EPS, Affine, HalfSpace, images
from conftest import Task, tiny_net
from torch import Tensor, nn

from fastadv import compat
from fastadv.errors import DataError, SettingsError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def original(name: str) -> ModuleType:
    """A peer, or a skip with the reason. What it warns about while it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="the bench extra's peers are not installed")


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to 1e-6 on more than 99.9 % of pixels: a gradient of about zero may change its sign by rounding."""
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs() <= 1e-6).float().mean()) > 0.999


class Foolish:
    """What is visible of foolbox's PyTorchModel: bounds, and a call that normalises and hides the network."""

    def __init__(self, net: nn.Module, bounds: tuple[float, float] = (0.0, 1.0), scale: float = 1.0) -> None:
        self.bounds, self.scale = bounds, scale

        def _model(x: Tensor) -> Tensor:
            with torch.set_grad_enabled(x.requires_grad):
                return net(x)

        self._model = _model

    def __call__(self, x: Tensor) -> Tensor:
        return self._model(x / self.scale)


class Targets:
    """What is visible of foolbox's TargetedMisclassification."""

    def __init__(self, target_classes: Tensor) -> None:
        self.target_classes = target_classes


# --- torchattacks ---


def test_pgd_walks_alpha_per_step_to_the_closed_forms_corner() -> None:
    model, x, y = HalfSpace(), images(4), torch.ones(4, dtype=torch.int64)
    for steps, reach in ((1, 0.02), (2, 0.04), (5, EPS["linf"])):
        adv = compat.PGD(model, eps=EPS["linf"], alpha=0.02, steps=steps, random_start=False)(x, y)
        torch.testing.assert_close(adv, model.worst(x, "linf", reach), rtol=0, atol=1e-6)


def test_pgdl2_walks_alpha_per_step_to_the_closed_forms_end() -> None:
    model, x, y = HalfSpace(), images(4), torch.ones(4, dtype=torch.int64)
    for steps, reach in ((1, 0.2), (2, 0.4), (5, EPS["l2"])):
        adv = compat.PGDL2(model, eps=EPS["l2"], alpha=0.2, steps=steps, random_start=False)(x, y)
        torch.testing.assert_close(adv, model.worst(x, "l2", reach), rtol=0, atol=1e-6)


def test_settings_are_attributes_with_torchattacks_defaults() -> None:
    attack, l2 = compat.PGD(HalfSpace()), compat.PGDL2(HalfSpace())
    assert (attack.eps, attack.alpha, attack.steps, attack.random_start) == (8 / 255, 2 / 255, 10, True)
    assert (l2.eps, l2.alpha, l2.steps, l2.random_start) == (1.0, 0.2, 10, True)
    assert (attack.targeted, attack.get_mode(), attack.device) == (False, "default", torch.device("cpu"))
    assert "alpha=" in repr(attack)
    attack.eps = attack.alpha = 0.25
    x, y = images(2), torch.ones(2, dtype=torch.int64)
    assert float((attack(x, y) - x).abs().max()) == pytest.approx(0.25)


def test_targets_are_the_classes_that_the_mode_names() -> None:
    model, x = Affine(), images(16)
    y, logits = model(x).argmax(1), model(x).detach()
    attack = compat.PGD(model, eps=0.3, alpha=0.1, steps=10, random_start=False)

    def reached() -> Tensor:
        return model(attack(x, y)).argmax(1)

    attack.set_mode_targeted_by_label()
    assert (attack.targeted, attack.get_mode()) == (True, "targeted(label)")
    assert torch.equal(reached(), y)
    attack.set_mode_targeted_by_function(lambda x, y: (y + 1) % 5)
    assert torch.equal(reached(), (y + 1) % 5)
    # Second-last of all is last but one of the others, unless y itself is the last.
    attack.set_mode_targeted_least_likely(kth_min=2)
    assert torch.equal(reached(), logits.argsort(1)[:, 1])
    attack.set_mode_targeted_random()
    assert (reached() != y).all()
    attack.set_mode_default()
    assert (reached() != y).all()
    assert not attack.targeted


def test_normalised_images_go_in_and_come_out(task: Task) -> None:
    """As torchattacks does: the pixels behind them are attacked, and normalised again."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    class OfNormalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = task.model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * std + mean)

    plain = compat.PGD(task.model, random_start=False)(task.x, task.y)
    attack = compat.PGD(OfNormalised(), random_start=False)
    attack.set_normalization_used(MEAN, STD)
    assert agree(attack((task.x - mean) / std, task.y) * std + mean, plain)


@pytest.mark.parametrize(("name", "settings"), [("PGD", {}), ("PGDL2", {"eps_for_division": 0.0})])
def test_the_images_are_torchattacks_own(task: Task, name: str, settings: dict[str, float]) -> None:
    """Its eps_for_division shortens the l2 steps of images whose gradient is small, by more in larger batches."""
    theirs = getattr(original("torchattacks"), name)(task.model, random_start=False, **settings)
    ours = getattr(compat, name)(task.model, random_start=False)
    assert agree(ours(task.x, task.y), theirs(task.x, task.y))
    for mode in ("by_label", "least_likely"):
        for attack in (theirs, ours):
            # Where a target is reached, what is left of the gradient is rounding.
            attack.steps = 3
            getattr(attack, f"set_mode_targeted_{mode}")(quiet=True)
        targets = (task.y + 1) % 10
        assert agree(ours(task.x, targets), theirs(task.x, targets)), mode


def test_eps_for_division_is_all_that_differs_in_l2() -> None:
    """With its default the images are the same where no gradient is small."""
    model, x = Affine(), images(100)
    attacks = [module.PGDL2(model, eps=0.3, random_start=False) for module in (compat, original("torchattacks"))]
    ours, theirs = (attack(x, model(x).argmax(1)) for attack in attacks)
    assert agree(ours, theirs)


def test_the_same_seed_gives_torchattacks_start_and_targets(task: Task) -> None:
    found = []
    for module in (original("torchattacks"), compat):
        attack = module.PGD(task.model, steps=0)
        torch.manual_seed(3)
        found.append(attack(task.x, task.y))
        attack = module.PGD(task.model, eps=0.5, alpha=0.1, steps=20, random_start=False)
        attack.set_mode_targeted_random(quiet=True)
        torch.manual_seed(3)
        found.append(task.model(attack(task.x[:50], task.y[:50])).argmax(1))
    assert agree(found[2], found[0])
    assert (found[1] == found[3]).float().mean() > 0.98, "drawn targets differ"


def test_every_module_is_left_in_its_mode() -> None:
    net = tiny_net().train()
    net[1].eval()  # frozen by hand: torchattacks sets the whole tree to train mode afterwards
    before = net[1].running_mean.clone()
    for attack in (compat.PGD(net), compat.PGDL2(net)):
        attack.set_mode_targeted_random()
        attack(torch.rand(4, *DIMS), torch.zeros(4, dtype=torch.int64))
    assert [net.training, net[1].training, net[6].training] == [True, False, True]
    assert torch.equal(net[1].running_mean, before)


# --- foolbox ---


def test_step_sizes_are_shares_of_epsilon_or_absolute() -> None:
    model, x, y = HalfSpace(), images(4), torch.ones(4, dtype=torch.int64)
    one = compat.LinfPGD(rel_stepsize=0.25, steps=1, random_start=False)
    assert torch.allclose(one(model, x, y, epsilons=0.04)[0], model.worst(x, "linf", 0.01), atol=1e-6)
    one = compat.LinfPGD(abs_stepsize=0.03, steps=1, random_start=False)
    assert torch.allclose(one(model, x, y, epsilons=0.04)[0], model.worst(x, "linf", 0.03), atol=1e-6)
    whole = compat.L2PGD(random_start=False)
    assert torch.allclose(whole(model, x, y, epsilons=0.5)[0], model.worst(x, "l2", 0.5), atol=1e-5)
    assert (whole.rel_stepsize, whole.steps) == (0.025, 50)
    assert (compat.LinfPGD().rel_stepsize, compat.LinfPGD().steps) == (0.01 / 0.3, 40)


def test_several_epsilons_give_lists_and_a_table(task: Task) -> None:
    x, y = task.x[:20], task.y[:20]
    attack = compat.LinfPGD(steps=5, random_start=False)
    raw, clipped, success = attack(task.model, x, y, epsilons=[0.0, 0.05, 1.0])
    assert (len(raw), len(clipped), success.shape, success.dtype) == (3, 3, (3, 20), torch.bool)
    assert torch.equal(raw[0], x)
    assert success.float().mean(1).tolist() == sorted(success.float().mean(1).tolist())
    alone = attack(task.model, x, y, epsilons=0.05)
    assert torch.equal(alone[0], raw[1])
    assert torch.equal(alone[2], success[1])
    assert torch.equal(task.model(alone[1]).argmax(1) != y, success[1])


def test_a_foolbox_model_keeps_its_bounds_and_preprocessing(task: Task) -> None:
    """Pixels in [0, 255]: the same attack as in [0, 1], in other units."""
    x, y = task.x[:20], task.y[:20]
    attack = compat.LinfPGD(steps=5, random_start=False)
    small = attack(task.model, x, y, epsilons=8 / 255)[0]
    large = attack(Foolish(task.model, (0, 255), scale=255.0), x * 255, y, epsilons=8)[0]
    assert agree(large / 255, small)
    with pytest.raises(DataError, match="outside the box"):
        attack(Foolish(task.model), x * 255, y, epsilons=8 / 255)


def test_the_hidden_network_is_attacked_in_eval_mode_and_left_as_it_was() -> None:
    net = tiny_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes: list[bool] = []
    net[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    x, y = torch.rand(4, *DIMS), torch.zeros(4, dtype=torch.int64)
    compat.LinfPGD(steps=2)(Foolish(net), x, y, epsilons=0.1)
    assert modes == [False] * 3
    assert net[1].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters()), "foolbox leaves gradients here"


def test_targeted_criteria_descend_to_their_classes() -> None:
    model, x = Affine(), images(8)
    targets = (model(x).argmax(1) + 1) % 5
    attack = compat.LinfPGD(abs_stepsize=0.1, steps=10, random_start=False)
    _, clipped, success = attack(model, x, Targets(targets), epsilons=0.3)
    assert success.all()
    assert torch.equal(model(clipped).argmax(1), targets)


def test_repeating_finds_no_less(task: Task) -> None:
    x, y = task.x[:50], task.y[:50]
    attack = compat.LinfPGD(steps=3)
    torch.manual_seed(0)
    once = attack(task.model, x, y, epsilons=0.03)[2]
    torch.manual_seed(0)
    thrice = attack.repeat(3)(task.model, x, y, epsilons=0.03)[2]
    assert attack.repeat(3).repeat(2).times == 6
    assert (thrice | ~once).all()


def test_no_epsilon_is_refused() -> None:
    with pytest.raises(SettingsError, match="epsilons holds None"):
        compat.LinfPGD()(HalfSpace(), images(1), torch.ones(1, dtype=torch.int64), epsilons=[None])


@pytest.mark.parametrize("name", ["LinfPGD", "L2PGD"])
def test_the_images_are_foolboxs_own(task: Task, name: str) -> None:
    foolbox: Any = original("foolbox")
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7], "axis": -3}
    model = foolbox.PyTorchModel(task.model, bounds=(0, 1), preprocessing=preprocessing, device="cpu")
    x, y = task.x[:50], task.y[:50]
    epsilons = [0.01, 0.03] if name == "LinfPGD" else [0.2, 0.7]
    theirs = getattr(foolbox.attacks, name)(steps=20, random_start=False)(model, x, y, epsilons=epsilons)
    ours = getattr(compat, name)(steps=20, random_start=False)(model, x, y, epsilons=epsilons)
    for number in range(2):
        assert agree(ours[0][number], theirs[0][number])
        assert agree(ours[1][number], theirs[1][number])
    # An image on the boundary may fall on either side by rounding.
    assert (ours[2] == theirs[2]).float().mean() > 0.98
    wider = model.transform_bounds((0, 255), wrapper=True)
    attacks = (getattr(module, name)(steps=5, random_start=False) for module in (compat, foolbox.attacks))
    here, there = (attack(wider, x * 255, y, epsilons=255 * epsilons[1])[0] for attack in attacks)
    assert agree(here / 255, there / 255)
    criterion = foolbox.criteria.TargetedMisclassification((y + 1) % 10)
    attacks = (getattr(module, name)(steps=5, random_start=False) for module in (compat, foolbox.attacks))
    here, there = (attack(model, x, criterion, epsilons=epsilons[1])[0] for attack in attacks)
    assert agree(here, there)


# --- AutoAttack ---


def test_autoattack_is_called_as_there_and_logs_the_lines_people_parse(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = task.x[:20], task.y[:20]
    adversary = compat.AutoAttack(task.model, norm="Linf", eps=0.3, version="standard", log_path=tmp_path / "log.txt")
    adv, guesses = adversary.run_standard_evaluation(x, y, bs=10, return_labels=True)
    assert float((adv - x).abs().max()) <= 0.3 + 1e-7
    assert torch.equal(guesses, task.model(adv).argmax(1))
    assert adversary.verdicts is not None
    assert torch.equal(adversary.verdicts.robust, guesses == y)
    said = capsys.readouterr().out
    assert re.search(r"^initial accuracy: \d+\.\d\d%$", said, re.MULTILINE)
    assert re.search(r"^robust accuracy after APGD-CE: 0\.00% \(total time \d+\.\d s\)$", said, re.MULTILINE)
    assert (tmp_path / "log.txt").read_text() == said
    quiet = compat.AutoAttack(task.model, eps=0.3, verbose=False)
    assert torch.equal(quiet.run_standard_evaluation(x, y, bs=10), adv)
    assert capsys.readouterr().out == ""


def test_what_autoattack_does_not_know_is_refused(task: Task) -> None:
    for settings, message in (
        ({"norm": "L1"}, "unknown norm 'L1'"),
        ({"attacks_to_run": ["apgd-ce"], "version": "custom"}, "attacks_to_run and is_tf_model are not known here"),
        ({"is_tf_model": True}, "call APGD, FAB and Square"),
    ):
        with pytest.raises(SettingsError, match=message):
            compat.AutoAttack(task.model, **settings)


def test_autoattack_in_parity_gives_the_originals_images(task: Task) -> None:
    """A radius at which the first stage breaks everything; the others are compared in their own tests."""
    theirs = original("pyautoattack").AutoAttack(task.model, norm="Linf", eps=0.2, seed=0, version="standard")
    x, y = task.x[:20], task.y[:20]
    images, _ = theirs.run_standard_evaluation(x, y, batch_size=10)
    ours = compat.AutoAttack(task.model, norm="Linf", eps=0.2, seed=0, verbose=False, mode="parity")
    assert agree(ours.run_standard_evaluation(x, y, bs=10), images)

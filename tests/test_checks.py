"""The checks: a sound model passes them all, and each is red on a fault planted for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from analytic import Affine, images
from conftest import tiny_net
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastadv import checks
from fastadv.checks import NAMES, check
from fastadv.findings import Finding, beaten, beats, tail
from fastadv.pgd import PGD, AttackResult
from fastadv.threat import ThreatModel

THREAT = ThreatModel("linf", 0.1)


@dataclasses.dataclass(frozen=True)
class Digits:
    """A robust and a standard network on digits of 8x8 pixels, and 100 images neither has seen."""

    robust: nn.Module
    standard: nn.Module
    x: Tensor
    y: Tensor

    @property
    def few(self) -> tuple[Tensor, Tensor]:
        """Enough for a planted fault."""
        return self.x[:40], self.y[:40]


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Trained in about three seconds; the robust one is right on about 90, and at 0.1 on about 75."""
    found = load_digits()
    x, y = torch.tensor(found.images / 16, dtype=torch.float32)[:, None], torch.tensor(found.target)

    def trained(attack: PGD | None) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2), nn.GELU())
        net.extend([nn.Flatten(), nn.Linear(288, 10)])
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for rows in [rows for _ in range(4) for rows in torch.randperm(1397).split(64)]:
            batch = attack(net, x[rows], y[rows], THREAT) if attack else x[rows]
            optimizer.zero_grad()
            F.cross_entropy(net(batch), y[rows]).backward()
            optimizer.step()
        net.zero_grad()
        return net.eval()

    with torch.random.fork_rng():
        return Digits(trained(PGD(steps=2, step_size=0.07)), trained(None), x[1397:1497], y[1397:1497])


class Changed(nn.Module):
    """A network behind a change of what goes in or comes out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, logits: Tensor) -> Tensor:
        return logits


class Quantised(Changed):
    def before(self, x: Tensor) -> Tensor:
        return (x * 8).round() / 8


class Noisy(Changed):
    def before(self, x: Tensor) -> Tensor:
        return x + 0.05 * torch.randn_like(x)


class Saturated(Changed):
    def after(self, logits: Tensor) -> Tensor:
        return 1000 * logits


class Softmaxed(Changed):
    def after(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)


class Detached(Changed):
    def before(self, x: Tensor) -> Tensor:
        return x.detach()


class Holed(Changed):
    """NaN for images brighter than any clean one: an attack falls into it."""

    def after(self, logits: Tensor) -> Tensor:
        return logits

    def before(self, x: Tensor) -> Tensor:
        return x * torch.where((x * 16).round() == x * 16, 1.0, (0.9 - x).sqrt() / (0.9 - x).sqrt())


class Turned(Changed):
    """The gradient is right on the data's own 17 grey levels and points back everywhere else."""

    def before(self, x: Tensor) -> Tensor:
        off = ((x * 16).round() != x * 16).flatten(1).any(1).view(-1, 1, 1, 1)
        seen = x * torch.where(off, -1.0, 1.0)
        return seen + (x - seen).detach()


class Tired(Changed):
    """The gradient is right twelve times, and points back from then on: to ten steps, and not to twenty."""

    asked = 0

    def before(self, x: Tensor) -> Tensor:
        self.asked += x.requires_grad
        seen = x if self.asked <= 12 else -x
        return seen + (x - seen).detach()


class Constant(Changed):
    def after(self, logits: Tensor) -> Tensor:
        return logits * 0 + F.one_hot(torch.tensor(3), 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaky(PGD):
    """An attack that rounds its images to 8 bits after the projection."""

    def run(self, *args: Any, **settings: Any) -> AttackResult:
        found = super().run(*args, **settings)
        return found._replace(adv=(found.adv * 255).round() / 255)


def verdicts(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel = THREAT, **settings: Any) -> dict[str, Any]:
    """passed by name, after what every finding has to be."""
    found = check(model, x, y, threat, **settings)
    assert tuple(finding.name for finding in found) == NAMES
    for finding in found:
        assert finding.sentence.endswith(".")
        assert not finding.sentence.endswith("..")
    return {finding.name: finding.passed for finding in found}


def test_a_sound_network_passes_everything(digits: Digits) -> None:
    found = verdicts(digits.robust, digits.x, digits.y, standard=digits.standard)
    assert found == dict.fromkeys(NAMES, True)


def test_a_sound_network_passes_in_l2_with_the_users_attack(digits: Digits) -> None:
    attack = PGD(steps=10, step_size=0.1, loss="margin", keep="success")
    threat = ThreatModel("l2", 0.5)
    found = verdicts(digits.robust, digits.x, digits.y, threat, attack=attack, standard=digits.standard)
    assert found == dict.fromkeys(NAMES, True)


def test_an_undefended_network_is_weak_but_not_suspicious(digits: Digits) -> None:
    found = verdicts(digits.standard, digits.x, digits.y)
    assert found == {**dict.fromkeys(NAMES, True), "transfer": None}


def test_the_linear_model_passes_everything() -> None:
    model, x = Affine(), images(100)
    with torch.no_grad():
        model.bias.copy_(-0.5 * model.weight.sum(1))  # classes of about equal size
    found = verdicts(model, x, model(x).argmax(1), ThreatModel("linf", 0.004))
    assert found == {**dict.fromkeys(NAMES, True), "transfer": None}


def test_quantised_input_has_no_gradient(digits: Digits) -> None:
    """Every trace of a hidden gradient and none of a saturated one; without the checks 97 of 100 images look robust."""
    threat = ThreatModel("linf", 0.2)
    found = verdicts(Quantised(digits.standard), digits.x, digits.y, threat, standard=digits.standard)
    wrong = {name for name, passed in found.items() if passed is False}
    assert wrong == {"gradients", "unbounded eps", "transfer", "black box"}


def test_a_noise_layer_is_random(digits: Digits) -> None:
    found = verdicts(Noisy(digits.robust), *digits.few)
    assert found["randomness"] is False
    assert found["gradients"] is found["saturation"] is found["unbounded eps"] is True


def test_large_logits_are_saturated(digits: Digits) -> None:
    found = verdicts(Saturated(digits.robust), *digits.few)
    assert found["saturation"] is found["gradients"] is found["unbounded eps"] is False
    assert found["randomness"] is found["logits"] is True


def test_probabilities_are_not_logits(digits: Digits) -> None:
    assert verdicts(Softmaxed(digits.robust), *digits.few)["logits"] is False


def test_labels_in_another_order_or_out_of_range(digits: Digits) -> None:
    x, y = digits.few
    found = verdicts(digits.robust, x, (y + 1) % 10)
    assert found["labels"] is found["clean accuracy"] is False
    first = check(digits.robust, x, y + 1, THREAT)[0]
    assert first == Finding("labels", False, "y holds the label 10, but the model has 10 classes.")


def test_a_constant_answer_is_no_better_than_chance(digits: Digits) -> None:
    found = verdicts(Constant(digits.robust), *digits.few)
    assert found["clean accuracy"] is False
    assert found["labels"] is True


def test_where_nothing_is_right_nothing_is_attacked(digits: Digits) -> None:
    wrong = digits.y != 3
    found = verdicts(Constant(digits.robust), digits.x[wrong], digits.y[wrong])
    assert all(found[name] is None for name in NAMES[4:])


def test_a_model_without_any_gradient_is_reported_not_refused(digits: Digits) -> None:
    found = verdicts(Detached(digits.standard), *digits.few, attack=PGD(steps=2, step_size=0.05))
    assert found["gradients"] is found["unbounded eps"] is False
    assert found["eps 0"] is True


def test_nan_on_the_way_is_found(digits: Digits) -> None:
    found = verdicts(Holed(digits.robust), *digits.few)
    assert found["finite"] is False
    assert all(found[name] is None for name in NAMES[7:])


def test_nan_in_the_users_attack_alone_is_found(digits: Digits) -> None:
    def torn(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none") * torch.nan

    found = verdicts(digits.robust, *digits.few, attack=PGD(steps=2, step_size=0.05, loss=torn))
    assert found["finite"] is False


def test_an_attack_that_changes_images_at_eps_0_is_found(digits: Digits) -> None:
    attack = Leaky(steps=3, step_size=0.05)
    found = verdicts(digits.robust, *digits.few, attack=attack)
    assert {name for name, passed in found.items() if passed is False} == {"eps 0"}


def test_a_gradient_that_turns_back_is_found(digits: Digits) -> None:
    found = verdicts(Turned(digits.robust), digits.x, digits.y)
    assert found["more steps"] is False
    assert found["gradients"] is True


def test_a_gradient_that_turns_back_later_is_found(digits: Digits) -> None:
    assert verdicts(Tired(digits.standard), *digits.few)["more steps"] is False


def test_too_few_images_say_nothing(digits: Digits) -> None:
    found = verdicts(digits.robust, digits.x[:1], digits.y[:1], ThreatModel("linf", 0.01))
    assert found["clean accuracy"] is found["black box"] is None


def test_nothing_is_left_behind() -> None:
    net = tiny_net().train()
    net[1].eval()
    x = torch.rand(20, 3, 8, 8)
    y = net(x).argmax(1)
    before, stream = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    check(net, x, y, ThreatModel("linf", 0.03))
    assert torch.equal(torch.get_rng_state(), stream)
    assert [net.training, net[1].training, net[6].training] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_the_same_seed_gives_the_same_findings(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a random model, and whatever the global stream is at."""
    monkeypatch.setattr(checks, "QUERIES", 20)
    model = Noisy(digits.robust)
    first = check(model, *digits.few, THREAT, seed=1)
    stream = torch.get_rng_state()
    assert check(model, *digits.few, THREAT, seed=1) == first
    assert torch.equal(torch.get_rng_state(), stream)
    assert check(model, *digits.few, THREAT, seed=2) != first


def test_the_cost_is_what_the_docstring_says(digits: Digits) -> None:
    """Passes per image, counted: 40 forward and 32 backward, and 200 forward for each of 50 survivors among 100."""
    passes = {"forward": 0, "backward": 0}

    class Counted(Changed):
        def before(self, x: Tensor) -> Tensor:
            passes["forward"] += len(x)
            if x.requires_grad:
                x.register_hook(lambda grad: passes.update(backward=passes["backward"] + len(grad)))
            return x

    check(Counted(digits.robust), digits.x, digits.y, THREAT)
    # Images that are wrong when clean are not attacked, and those that a query breaks are not queried again.
    assert 28 * 100 <= passes["backward"] <= 32 * 100
    assert 35 * 100 + 150 * 50 <= passes["forward"] <= 40 * 100 + 202 * 50


@pytest.mark.parametrize(
    ("hits", "n", "share", "value"),
    [(8, 10, 0.5, 56 / 1024), (0, 10, 0.5, 1.0), (11, 10, 0.5, 0.0), (1, 2, 0.25, 7 / 16), (3, 3, 1.0, 1.0)],
)
def test_binomial_tails(hits: int, n: int, share: float, value: float) -> None:
    assert tail(hits, n, share) == pytest.approx(value, rel=1e-12)


def test_a_few_strays_are_no_alarm() -> None:
    """On the shipped robust Swin 200 queries broke 2 of 174 survivors of 20 steps; a fifth more in 50 is no chance."""
    assert beaten("black box", "it breaks", 2, 174).passed
    assert beaten("black box", "it breaks", 5, 50).passed
    assert beaten("black box", "it breaks", 6, 50).passed is False
    assert beaten("black box", "it breaks", 1, 1).passed is None


def test_the_sign_test_counts_the_images_that_differ() -> None:
    right, wrong = torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    assert beats(right, wrong)
    assert not beats(wrong, right)
    assert not beats(right, right)
    # Nine against none is 2 in 1,000, ten 1 in 1,000 and less.
    for differ, suspicious in ((9, False), (10, True)):
        assert beats(torch.arange(20) < differ, wrong) is suspicious

"""APGD: the schedule and the losses by hand, known optima, what fast and parity mode each promise."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from analytic import EPS, Affine, HalfSpace, Quadratic, images
from test_pgd_traces import awkward_model, picture, same
from torch import Tensor, nn

from fastadv import ops
from fastadv.attacks.adaptive import Ascent, Found, Rows, checkpoints
from fastadv.attacks.apgd import APGD
from fastadv.attacks.ledger import Ledger
from fastadv.attacks.momentum import exact_step, published_step
from fastadv.attacks.targets import dlr_targeted, likely_targets
from fastadv.errors import DataError, NonFiniteGradientError, SettingsError
from fastadv.losses import margin, misclassified
from fastadv.threat import ThreatModel

NORMS = ("linf", "l2")
MODES = ("fast", "parity")


def threat(norm: str, scale: float = 1.0) -> ThreatModel:
    return ThreatModel(norm, scale * EPS[norm])


def labelled(model: nn.Module, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with the labels the model gives them."""
    x = images(n)
    return x, model(x).argmax(1)


def inside(adv: torch.Tensor, x: torch.Tensor, norm: str, eps: float) -> bool:
    """In the ball exactly: float64, no tolerance."""
    offset = (adv.double() - x.double()).flatten(1)
    length = offset.abs().amax(1) if norm == "linf" else offset.square().sum(1).sqrt()
    return bool((length <= torch.tensor(eps, dtype=torch.float32).double()).all() and adv.min() >= 0 and adv.max() <= 1)


class Counting(nn.Module):
    """Counts passes and the images in them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes, self.images = model, 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes, self.images = self.passes + 1, self.images + len(x)
        return self.model(x)


# The schedule and the losses.


def test_checkpoints_are_the_published_ones() -> None:
    """Of 100 steps, executed from the published rule: gaps 22, 19, 16, 13, 10, 7, 6, 6."""
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert list(checkpoints(3)) == [1, 2, 3]


def test_targeted_dlr_by_hand() -> None:
    logits = torch.tensor([[5.0, 1.0, 4.0, 2.0, 0.0]])
    # Towards class 2 from class 0: (4 - 5) / (5 - (2 + 1) / 2).
    found = dlr_targeted(logits, torch.tensor([0]), torch.tensor([2]))
    assert found.item() == pytest.approx(-1 / 3.5)
    # Shifted and scaled logits give the same.
    assert dlr_targeted(3 * logits + 7, torch.tensor([0]), torch.tensor([2])).item() == pytest.approx(found.item())
    assert likely_targets(logits, 3).tolist() == [[2, 3, 1]]
    assert likely_targets(logits, 9).tolist() == [[2, 3, 1, 4]]
    with pytest.raises(SettingsError, match="3 classes"):
        dlr_targeted(logits[:, :3], torch.tensor([0]), torch.tensor([2]))


@pytest.mark.parametrize("norm", NORMS)
def test_the_two_steps_differ_by_rounding_alone(norm: str) -> None:
    x, grad = images(8), torch.randn(8, 3, 8, 8)
    ball = threat(norm)
    before = ball.random_start(x)
    adv, sizes = ball.random_start(x), torch.linspace(0.1, 2, 8) * ball.eps
    bad = torch.zeros(8, dtype=torch.int32)
    assert ops.body(f"{norm}_step") in ("cpp", "reference")
    for first in (True, False):
        exact = exact_step(adv, before, grad, x, sizes, ball, bad, first=first)
        published = published_step(adv, before, grad, x, sizes, ball, first=first)
        # 1e-6: the shortening factor 1 - 2^-20 of the exact l2 ball moves a pixel by eps / 2^20 at most.
        assert (exact - published).abs().max() < 1e-6
        assert inside(exact, x, norm, ball.eps)
    assert not bad.any()


def test_a_step_by_hand() -> None:
    """One pixel at 0.5 moving up, ball 0.1: 3/4 of the way to the projected step, 1/4 of the step before."""
    x = torch.full((1, 1, 1, 1), 0.5)
    adv, before, up = x + 0.02, x + 0.01, torch.ones_like(x)
    ball, bad = ThreatModel("linf", 0.1), torch.zeros(1, dtype=torch.int32)
    for size, moved in ((0.04, 0.06), (0.2, 0.1)):
        expected = 0.5 + 0.02 + 0.75 * (moved - 0.02) + 0.25 * 0.01
        sizes = torch.tensor([size])
        assert exact_step(adv, before, up, x, sizes, ball, bad, first=False).item() == pytest.approx(expected, abs=1e-6)
        assert published_step(adv, before, up, x, sizes, ball, first=False).item() == pytest.approx(expected, abs=1e-6)
        assert exact_step(adv, before, up, x, sizes, ball, bad, first=True).item() == pytest.approx(0.5 + moved)


def test_both_conditions_halve_the_step_size() -> None:
    """Image 0 rose in 3 of 4 steps, image 1 in all; 2 is stuck since a checkpoint that did not halve, 3 since one that
    did; 4 is not stuck."""
    one = torch.zeros(5, 1, 1, 1)
    rows = Rows(
        **dict.fromkeys((field.name for field in dataclasses.fields(Rows)), torch.zeros(5)) | {"adv": one, "grad": one}
    )
    rows.best, rows.best_grad = one + 1, one + 2
    rows.rises = torch.tensor([3.0, 4, 4, 4, 4])
    rows.best_loss, rows.checked = torch.tensor([2.0, 2, 1, 1, 2]), torch.ones(5)
    rows.halved = torch.tensor([True, True, False, True, False])
    rows.step_size = torch.ones(5)
    ascent = object.__new__(Ascent)
    ascent.attack = APGD()
    ascent._halve(rows, 4)
    assert rows.step_size.tolist() == [0.5, 1, 0.5, 1, 1]
    assert rows.halved.tolist() == [True, False, True, False, False]
    assert rows.adv.flatten().tolist() == [1, 0, 1, 0, 0] and rows.grad.flatten().tolist() == [2, 0, 2, 0, 0]
    assert rows.checked.tolist() == rows.best_loss.tolist() and not rows.rises.any()


# Known optima.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_reaches_the_worst_case_of_a_half_space(norm: str, mode: str) -> None:
    model, ball = HalfSpace(), threat(norm)
    x = images(64)
    y = torch.ones(64, dtype=torch.int64)
    worst = model.worst(x, norm, ball.eps)
    # The boundary where a third of the images can be brought across it. All lie on the right side.
    model.b.data = -model(worst)[:, 1].detach().quantile(0.35)
    fooled = misclassified(model(worst), y)
    found = APGD(steps=10, mode=mode).run(model, x, y, ball)
    assert torch.equal(found.success, fooled) and 5 < fooled.sum() < 60
    if mode == "fast":
        start, end, reached = (model(at).detach()[~fooled, 1].double() for at in (x, worst, found.adv))
        # Of the way down 2e-6 are missing: an l2 ball shortened by 2^-20, and float32.
        assert ((reached - end) / (start - end)).max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_verdicts_on_an_affine_model_are_those_of_its_worst_case(norm: str, loss: str, mode: str) -> None:
    model = Affine()
    x, y = labelled(model, 64)
    ball = threat(norm, 0.3)
    worst = model.worst_margins(x, y, norm, ball.eps).scatter(1, y[:, None], -torch.inf).amax(1)
    found = APGD(loss=loss, steps=20, mode=mode).run(model, x, y, ball)
    # 1e-4 of the logits: an l2 ball shortened by 2^-20, and float32.
    assert not found.success[worst < -1e-4].any() and 5 < found.success.sum() < 60
    # Without targets the climb may end at a class that is near and not the nearest to win.
    assert found.success[worst > 1e-4].float().mean() >= (1.0 if loss == "dlr-targeted" else 0.8)
    assert torch.equal(found.success, misclassified(model(found.adv), y))
    assert inside(found.adv, x, norm, ball.eps)
    torch.testing.assert_close(found.loss, margin(model(found.adv), y).detach())
    if mode == "parity":
        assert torch.equal(found.adv[~found.success], x[~found.success])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_finds_an_optimum_inside_the_ball_by_halving(norm: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towards the centre of a bowl, 1/5 of the radius away: the margin is minus the squared distance from it."""
    model, ball = Quadratic(), ThreatModel(norm, {"linf": 0.05, "l2": 0.5}[norm])
    offset = torch.randn(16, 3, 8, 8)
    offset = offset.sign() if norm == "linf" else offset / offset.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x, y = model.c.detach() + 0.2 * ball.eps * offset, torch.ones(16, dtype=torch.int64)
    far = (x - model.c).detach().flatten(1).square().sum(1)
    reached = []
    monkeypatch.setattr(Ledger, "offer", lambda self, rows, adv, **_: reached.append(-margin(model(adv), y)))
    attack = APGD(steps=50, mode=mode)
    monkeypatch.setattr(Ascent, "run", _best(Ascent.run))
    attack.run(model, x, y, ball)
    monkeypatch.setattr(Ascent, "_halve", lambda *_: None)
    attack.run(model, x, y, ball)
    halving, constant = (found.detach() / far for found in reached)
    assert halving.max() < 0.1 and constant.mean() > 5 * halving.mean()


def _best(run):
    """Parity offers what fooled the model only: here nothing does."""

    def all_of_it(self: Ascent, *where: torch.Tensor) -> Found:
        found = run(self, *where)
        return found._replace(success=torch.ones_like(found.success))

    return all_of_it


@pytest.mark.parametrize("mode", MODES)
def test_a_ball_test_is_red_on_the_published_rounding(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    model, ball = HalfSpace(), ThreatModel("linf", 8 / 255)
    x = (images(32) * 255).round() / 255
    y = model(x).argmax(1)
    assert inside(APGD(steps=5, mode=mode)(model, x, 1 - y, ball), x, "linf", ball.eps)
    monkeypatch.setattr(ThreatModel, "project", lambda self, adv, *_: adv)
    monkeypatch.setattr(Ascent, "_advance", _published)
    assert not inside(APGD(steps=5, mode=mode)(model, x, y, ball), x, "linf", ball.eps)


def _published(self: Ascent, rows: Rows, *, first: bool) -> None:
    where = (rows.adv, rows.before, rows.grad, rows.x, rows.step_size, self.threat)
    rows.before, rows.adv = rows.adv, published_step(*where, first=first)


# What the modes promise.


def test_fast_results_depend_on_the_images_number_not_on_its_batch(task) -> None:
    x, y, ball = task.x[:40], task.y[:40], ThreatModel("linf", 0.03)
    index = torch.arange(40)
    attack = APGD(steps=20)
    whole = attack.run(task.model, x, y, ball, index=index)
    assert 5 < whole.success.sum() < 35
    order = torch.randperm(40)
    for rows in order.split(7):
        part = attack.run(task.model, x[rows], y[rows], ball, index=index[rows])
        assert torch.equal(part.success, whole.success[rows])
        start = attack._start(x[rows], ball, index[rows], torch.Generator(), 0)
        assert torch.equal(start, attack._start(x, ball, index, torch.Generator(), 0)[rows])
    other = attack._start(x, ball, index + 1, torch.Generator(), 0)
    assert not torch.equal(other, attack._start(x, ball, index, torch.Generator(), 0))
    assert not torch.equal(start, attack._start(x[rows], ball, index[rows], torch.Generator(), 1))


def test_fast_lets_go_of_finished_images_and_parity_does_not(task) -> None:
    x, y, ball = task.x[:32], task.y[:32], ThreatModel("linf", 0.2)
    counted = {}
    for mode in MODES:
        model = Counting(task.model)
        assert APGD(steps=20, mode=mode).run(model, x, y, ball).success.all()
        counted[mode] = model.images
    right = int((~misclassified(task.model(x), y)).sum())
    # Clean and start, each step's pass, the judge's.
    assert counted["parity"] == 32 + 21 * right + right
    assert counted["fast"] < counted["parity"] / 3


def test_a_survivor_costs_what_it_must() -> None:
    """One clean pass, the start, each step, and the judge."""
    model = Counting(Affine())
    x, y = labelled(model.model, 4)
    APGD(steps=10).run(model, x, y, ThreatModel("linf", 1e-4))
    assert model.passes == 1 + 1 + 10 + 1


def test_restarts_and_targets_are_for_images_left() -> None:
    model = Counting(Affine())
    x, y = labelled(model.model, 16)
    ball = ThreatModel("linf", 1e-4)
    APGD(steps=5, restarts=3).run(model, x, y, ball)
    assert model.passes == 1 + 3 * 7
    model.passes = 0
    # Five classes: four targets, whatever is asked for.
    APGD(steps=5, loss="dlr-targeted", targets=9).run(model, x, y, ball)
    assert model.passes == 1 + 4 * 7


@pytest.mark.parametrize("mode", MODES)
def test_images_the_model_gets_wrong_come_back_as_they_are(mode: str) -> None:
    model = Affine()
    x, y = labelled(model, 8)
    found = APGD(steps=5, mode=mode).run(model, x, (y + 1) % 5, threat("linf"))
    assert found.success.all() and torch.equal(found.adv, x)


def test_parity_is_a_function_of_the_seed_and_leaves_the_global_stream_alone(task) -> None:
    x, y, ball = task.x[:16], task.y[:16], ThreatModel("l2", 0.3)
    before = torch.random.get_rng_state()
    for mode in MODES:
        one, again, other = (
            APGD(steps=10, mode=mode, seed=seed, loss="dlr").run(task.model, x, y, ball) for seed in (0, 0, 1)
        )
        assert torch.equal(one.adv, again.adv) and not torch.equal(one.adv, other.adv)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_parity_is_the_published_code(task, norm: str, loss: str) -> None:
    """Every pixel, up to the last digit that the exact ball takes; where the published package is installed."""
    published = pytest.importorskip("pyautoattack.autopgd_base", reason="pip install fastadv[bench]")
    x, y, eps = task.x[:24], task.y[:24], {"linf": 0.04, "l2": 0.45}[norm]
    # Their checkpoints after 6, 7, 8, ... of 30 steps cover all cases: the images differ in where they halve.
    kind = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": 3, "n_iter": 30}
    kind["logger"] = logging.getLogger("pyautoattack")
    if loss == "dlr-targeted":
        theirs = published.APGDAttack_targeted(task.model, **kind)
    else:
        theirs = published.APGDAttack(task.model, loss=loss, n_restarts=2, **kind)
    with torch.no_grad():
        adv = theirs.perturb(x, y)
    restarts = 1 if loss == "dlr-targeted" else 2
    attack = APGD(loss=loss, restarts=restarts, seed=3, steps=30, mode="parity")
    ours = attack.run(task.model, x, y, ThreatModel(norm, eps))
    assert torch.equal(ours.success, misclassified(task.model(adv), y)) and 0 < ours.success.sum() < 24
    # 1e-6: eps / 2^20 in l2, a unit in the last place in linf.
    assert (ours.adv - adv).abs().max() < 1e-6


def test_a_random_model_is_averaged_over(task) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.noise = task.model, torch.Generator().manual_seed(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x + 0.05 * torch.randn(x.shape, generator=self.noise))

    x, y, ball = task.x[:32], task.y[:32], ThreatModel("linf", 0.01)
    counted = Counting(Noisy())
    APGD(steps=3, eot=4).run(counted, x[:1], y[:1], ThreatModel("linf", 1e-6))
    # Clean, two that compare folded batch norms with the model's own, 4 at the start and at each step but the last,
    # which needs no gradient, and the judge.
    assert counted.passes == 1 + 2 + 4 + 2 * 4 + 1 + 1
    plain, averaged = (APGD(steps=20, eot=eot).run(task.model, x, y, ball) for eot in (1, 3))
    assert torch.equal(plain.success, averaged.success)


def test_what_bf16_claims_counts_when_float32_agrees(task) -> None:
    class Touchy(nn.Module):
        """Wrong about everything under autocast, and only there."""

        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.model(x).float()
            return -logits if torch.is_autocast_enabled("cpu") else logits

    x, y = task.x[:8], task.y[:8]
    right = ~misclassified(task.model(x), y)
    found = APGD(steps=3, precision="bf16").run(Touchy(), x, y, ThreatModel("linf", 1e-5))
    assert right.any() and not found.success[right].any()
    real = APGD(steps=30, precision="bf16").run(task.model, x, y, ThreatModel("linf", 0.1))
    assert real.success.all() and misclassified(task.model(real.adv), y).all()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_model_changes(mode: str) -> None:
    model = awkward_model()
    before = picture(model)
    APGD(steps=3, mode=mode)(model, torch.rand(4, 3, 8, 8), torch.arange(4), ThreatModel("linf", 8 / 255))
    assert same(before, picture(model))


def test_channels_last_images_stay_so(task) -> None:
    x = task.x[:4].contiguous(memory_format=torch.channels_last)
    for mode in MODES:
        adv = APGD(steps=3, mode=mode)(task.model, x, task.y[:4], ThreatModel("l2", 0.1))
        assert adv.is_contiguous(memory_format=torch.channels_last)


def test_no_images_no_answer() -> None:
    found = APGD().run(Affine(), torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), threat("linf"))
    assert found.adv.shape == (0, 3, 8, 8) and found.success.shape == (0,)


# What is refused.


class Poisoned(Affine):
    """NaN logits for one image of the batch, from the ``after``-th pass on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.passes = after, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        bad = torch.zeros(len(x), 1)
        bad[2] = torch.nan if self.passes > self.after else 0.0
        return super().forward(x) + bad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_nan_logits_name_the_image(mode: str, after: int) -> None:
    x, y = labelled(Affine(), 5)
    index = torch.tensor([10, 11, 12, 13, 14])
    with pytest.raises(NonFiniteGradientError, match=r"1 of 5 images: 12;"):
        APGD(steps=10, mode=mode).run(Poisoned(after), x, y, ThreatModel("linf", 1e-4), index=index)


def test_settings_that_cannot_be_meant() -> None:
    for wrong, words in (
        ({"steps": 0}, "steps is 0"),
        ({"restarts": 1.5}, "restarts is 1.5"),
        ({"rho": 2}, "rho is 2"),
        ({"loss": "dlr-targetted"}, "did you mean 'dlr-targeted'"),
        ({"mode": "exact"}, "unknown mode"),
        ({"precision": "fp16"}, "unknown precision"),
        ({"mode": "parity", "precision": "bf16"}, "parity"),
    ):
        with pytest.raises(SettingsError, match=words):
            APGD(**wrong)
    with pytest.raises(SettingsError, match="2 classes"):
        APGD(loss="dlr").run(HalfSpace(), images(2), torch.tensor([0, 1]), threat("linf"))
    with pytest.raises(DataError, match="label 7"):
        APGD().run(Affine(), images(2), torch.tensor([0, 7]), threat("linf"))


class Writes(nn.Module):
    """Cuts the image it is given, instead of one of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(0.2, 0.8).flatten(1)[:, :4]


@pytest.mark.parametrize("mode", ["fast", "parity"])
def test_a_model_that_writes_into_its_input_is_refused(mode) -> None:
    x, y = torch.rand(2, 3, 8, 8), torch.arange(2)
    kept = x.clone()
    with pytest.raises(SettingsError, match="writes into its input"):
        APGD(steps=1, mode=mode)(Writes(), x, y, ThreatModel("linf", 0.1))
    assert torch.equal(x, kept)

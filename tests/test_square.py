"""Square: the schedule and the paintings by hand, known optima, what a query is, and the published code."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import EPS, Affine, HalfSpace, images
from test_apgd import Counting, inside, labelled
from test_pgd_traces import awkward_model, picture, same
from torch import Tensor, nn

from fastadv.attacks.recolouring import Search, side_of
from fastadv.attacks.square import Square
from fastadv.attacks.tiles import moved, pattern, tiling, window
from fastadv.errors import DataError, NonFiniteGradientError, SettingsError
from fastadv.losses import margin, misclassified
from fastadv.threat import ThreatModel

NORMS = ("linf", "l2")
MODES = ("fast", "parity")
# Of 5,000 queries: the first query of each side in linf, on 32x32 and on 224x224 pixels. The paper's schedule, halved
# after 10, 50, 200, 500, 1000, 2000, 4000 of 10,000 queries (arXiv:1912.00049, section 5); AutoAttack asks half of them
# and does not compress it.
SIDES = {
    32: {0: 29, 11: 20, 51: 14, 201: 10, 501: 7, 1001: 5, 2001: 4, 4001: 3},
    224: {0: 200, 11: 142, 51: 100, 201: 71, 501: 50, 1001: 35, 2001: 25, 4001: 18},
}


def threat(norm: str, scale: float = 1.0) -> ThreatModel:
    return ThreatModel(norm, scale * EPS[norm])


# The schedule and the paintings.


@pytest.mark.parametrize("size", SIDES)
def test_the_sides_of_5000_queries_are_the_published_ones(size: int) -> None:
    shape = torch.Size([3, size, size])
    sides = [side_of(query, 0.8, shape, "linf") for query in range(5000)]
    assert {query: sides[query] for query in range(5000) if not query or sides[query] != sides[query - 1]} == SIDES[
        size
    ]
    # In l2 the next odd one.
    assert [side_of(query, 0.8, shape, "l2") for query in SIDES[size]] == [side | 1 for side in SIDES[size].values()]


def test_sides_end_at_the_images_and_at_one_pixel() -> None:
    assert [side_of(query, 1.0, torch.Size([1, 4, 9]), "linf") for query in (0, 9999)] == [4, 1]
    assert [side_of(query, 1.0, torch.Size([1, 7, 9]), "l2") for query in (0, 9999)] == [7, 3]


def test_a_pattern_by_hand() -> None:
    """3x3: the upper bump is 1x3, its peak 1 + 1/4 and a quarter beside it; the lower, 2x3, is the other way round."""
    peak, low = 1.25, 0.25
    upper, lower = torch.tensor([low, peak, low]), torch.tensor([[low, low, low], [low, peak, low]])
    both = torch.cat([upper[None] / upper.norm(), -lower / lower.norm()])
    torch.testing.assert_close(pattern(3), both / math.sqrt(2))
    for side in (1, 4, 9, 28):
        assert pattern(side).norm().item() == pytest.approx(1)
        assert pattern(side).argmax() < side * (side // 2) or side == 1


def test_tiles_do_not_overlap_and_lie_in_the_image() -> None:
    for height, width in ((8, 8), (32, 32), (33, 20), (7, 40)):
        side, tiles = tiling(height, width)
        painted = torch.zeros(height, width)
        for tile in tiles:
            painted[tile] += 1
        assert side == height // 5
        assert painted.max() == 1
        assert painted.mean() > 0.6


def test_moving_mass_by_hand() -> None:
    """The source is emptied, the target holds its mass, the rest of the change stays, and the length is eps."""
    x = torch.full((2, 3, 8, 8), 0.5)
    adv = x + torch.nn.functional.normalize(torch.randn(2, 192), dim=1).view_as(x) * 0.4
    to, source = window(0, 0, 3), window(4, 4, 3)
    out = moved(adv, x, to, source, pattern(3), 0.4, (0.0, 1.0))
    before, after = adv - x, out - x
    assert after.flatten(1).norm(dim=1).tolist() == pytest.approx([0.4, 0.4], rel=1e-5)
    assert not after[..., *source].any()
    elsewhere = torch.ones(8, 8)
    elsewhere[to] = elsewhere[source] = 0
    torch.testing.assert_close(after * elsewhere, before * elsewhere, rtol=1e-4, atol=1e-6)
    mass = [part.square().sum((1, 2, 3)) for part in (before[..., *to], before[..., *source], after[..., *to])]
    torch.testing.assert_close(mass[0] + mass[1], mass[2], rtol=1e-4, atol=1e-6)
    # Half of the length is unused: three quarters of the squared length go to the window as well.
    half = moved(x + before / 2, x, to, source, pattern(3), 0.4, (0.0, 1.0)) - x
    assert half.flatten(1).norm(dim=1).tolist() == pytest.approx([0.4, 0.4], rel=1e-5)
    torch.testing.assert_close(half * elsewhere, before / 2 * elsewhere, rtol=1e-4, atol=1e-6)


# Known optima.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_breaks_what_a_half_space_allows_and_nothing_else(norm: str, mode: str) -> None:
    model, ball = HalfSpace(), threat(norm, 0.5)
    x, y = images(32), torch.ones(32, dtype=torch.int64)
    w = model.w.detach()
    reach = ball.eps * (w.abs().sum() if norm == "linf" else w.norm())
    # From just beside the boundary to 1.5 and more times as far as the ball reaches.
    model.b.data = 0.05 * reach - model(x)[:, 1].detach().min()
    before = model(x)[:, 1].detach() / reach
    found = Square(queries=600, mode=mode).run(model, x, y, ball)
    # 600 queries reach 0.57 to 0.66 of the way in linf (parity never paints the last row and column), 0.39 to 0.47 in
    # l2, where the worst case is dense noise and bumps are not.
    near = 0.35 if norm == "l2" or mode == "parity" else 0.5
    assert found.success[before < near].all() and (before < near).sum() > 3
    assert not found.success[before > 1].any() and (before > 1).sum() > 3
    assert torch.equal(found.success, misclassified(model(found.adv), y))
    assert inside(found.adv, x, norm, ball.eps)
    torch.testing.assert_close(found.loss, margin(model(found.adv), y).detach(), rtol=1e-4, atol=1e-5)
    way = (before + found.loss / reach)[~found.success]
    assert (way == 0).all() if mode == "parity" else ((way > near) & (way < 1)).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("edge", [False, True])
def test_every_result_is_in_ball_and_box_exactly(norm: str, mode: str, edge: bool) -> None:
    x = torch.rand(16, 3, 8, 8)
    x = x.round() if edge else (x * 255).round() / 255
    model, ball = Affine(), ThreatModel(norm, {"linf": 8 / 255, "l2": 0.3}[norm])
    y = model(x).argmax(1)
    found = Square(queries=150, mode=mode).run(model, x, y, ball)
    assert 0 < found.success.sum() < 16
    assert inside(found.adv, x, norm, ball.eps)
    assert (found.adv != x).flatten(1).any(1)[found.success].all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_ball_test_is_red_without_the_projection(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ThreatModel.project
    monkeypatch.setattr(ThreatModel, "project", lambda self, adv, x: x + 1.0001 * (adv - x))
    with pytest.raises(AssertionError):
        test_every_result_is_in_ball_and_box_exactly(norm, "fast", False)
    monkeypatch.setattr(ThreatModel, "project", real)


def test_another_box() -> None:
    model, ball = Affine(), ThreatModel("linf", 0.1, (-1.0, 2.0))
    x = images(8, low=-1.0, high=2.0)
    y = model(x).argmax(1)
    for mode in MODES:
        adv = Square(queries=100, mode=mode)(model, x, y, ball)
        assert ((adv.double() - x.double()).abs() <= torch.tensor(0.1).double()).all()
        assert adv.min() >= -1 and adv.max() <= 2 and adv.min() < -0.5 and adv.max() > 1.5


class Black(nn.Module):
    """A defence that has no gradient: rounded logits, and an error for who asks for one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        assert not x.requires_grad and not torch.is_grad_enabled()
        logits: Tensor = self.model(x)
        return (20 * logits).round() / 20


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_a_defence_without_gradients_is_broken(task, norm: str, mode: str) -> None:
    x, y, ball = task.x[:24], task.y[:24], ThreatModel(norm, {"linf": 0.25, "l2": 3.0}[norm])
    right = ~misclassified(task.model(x), y)
    found = Square(queries=200, mode=mode).run(Black(task.model), x, y, ball)
    assert right.sum() > 20
    assert found.success.float().mean() > 0.9


# What a query is.


@pytest.mark.parametrize("norm", NORMS)
def test_a_survivor_costs_what_it_must(norm: str) -> None:
    model = Counting(Affine())
    x, y = labelled(model.model, 4)
    ball = ThreatModel(norm, 1e-5)
    for mode, judged in (("fast", 1), ("parity", 0)):
        model.passes = model.images = 0
        Square(queries=30, restarts=2, mode=mode).run(model, x, y, ball)
        # The clean images; in each run the stripes, the queries, and the judge of what is shown.
        assert model.passes == 1 + 2 * (1 + 30 + judged)
        assert model.images == 4 * model.passes


def test_images_leave_when_they_are_broken(task) -> None:
    x, y, ball = task.x[:32], task.y[:32], ThreatModel("linf", 0.16)

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.seen = task.model, []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            return self.model(x)

    for mode in MODES:
        model = Sizes()
        success = Square(queries=100, mode=mode).run(model, x, y, ball).success
        left = int((~success).sum())
        assert 0 < left < 24
        # The last query, and in fast mode the judge, are for those left.
        assert model.seen[-1] == left
        model.seen.clear()
        assert Square(queries=100, mode=mode).run(model, x, y, ThreatModel("linf", 0.5)).success.all()
        assert len(model.seen) < 60


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_the_margin_never_falls_and_what_does_not_help_is_undone(
    task, norm: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, ball = task.x[:8], task.y[:8], ThreatModel(norm, {"linf": 0.01, "l2": 0.1}[norm])
    real, seen = Search._recolour if norm == "linf" else Search._move_mass, []

    def watched(self: Search, rows, side: int) -> None:
        before = rows.place, rows.loss, rows.adv.clone()
        real(self, rows, side)
        seen.append((*before, rows.loss, rows.adv.clone()))

    monkeypatch.setattr(Search, real.__name__, watched)
    Square(queries=60, mode=mode).run(task.model, x, y, ball)
    helped = 0
    for place, before, adv_before, loss, adv in seen:
        better = loss > before
        helped += int(better.sum())
        assert (loss >= before).all()
        assert torch.equal(adv[~better], adv_before[~better])
        assert (adv[better] != adv_before[better]).flatten(1).any(1).all()
        # It is the margin of the image that is kept.
        torch.testing.assert_close(margin(task.model(adv), y[place]).detach(), loss, rtol=1e-4, atol=1e-4)
    assert len(seen) == 60
    assert helped > 20


def test_a_search_that_takes_everything_is_found(task, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Search._ask

    def everything(self: Search, rows, adv: Tensor) -> Tensor:
        return torch.ones_like(real(self, rows, adv))

    monkeypatch.setattr(Search, "_ask", everything)
    with pytest.raises(AssertionError):
        test_the_margin_never_falls_and_what_does_not_help_is_undone(task, "linf", "fast", monkeypatch)


# What the modes promise.


@pytest.mark.parametrize("norm", NORMS)
def test_fast_results_depend_on_the_images_number_not_on_its_batch(task, norm: str) -> None:
    x, y, ball = task.x[:20], task.y[:20], ThreatModel(norm, {"linf": 0.2, "l2": 2.0}[norm])
    index, attack = torch.arange(20), Square(queries=25, restarts=2)
    whole = attack.run(task.model, x, y, ball, index=index)
    assert 2 < whole.success.sum() < 18
    for rows in torch.randperm(20).split(7):
        part = attack.run(task.model, x[rows], y[rows], ball, index=index[rows])
        assert torch.equal(part.success, whole.success[rows])
        # Sums of another batch: a last digit of the logits.
        torch.testing.assert_close(part.loss, whole.loss[rows], rtol=1e-4, atol=1e-4)
        assert torch.equal(part.adv, whole.adv[rows])
    assert not torch.equal(attack.run(task.model, x, y, ball, index=index + 1).adv, whole.adv)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_it_is_a_function_of_the_seed_and_leaves_the_global_stream_alone(task, norm: str, mode: str) -> None:
    x, y, ball = task.x[:8], task.y[:8], ThreatModel(norm, {"linf": 0.03, "l2": 0.4}[norm])
    before = torch.random.get_rng_state()
    one, again, other = (Square(queries=20, mode=mode, seed=seed).run(task.model, x, y, ball).adv for seed in (0, 0, 1))
    assert torch.equal(one, again)
    if mode == "fast":
        assert not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_restarts_and_seeds_begin_elsewhere(norm: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Tensor] = []
    real = Search._rows
    monkeypatch.setattr(Search, "_rows", lambda *args: starts.append((rows := real(*args)).adv.clone()) or rows)
    x, y = labelled(Affine(), 4)
    for seed in (0, 0, 1):
        Square(queries=1, restarts=2, seed=seed, mode=mode).run(Affine(), x, y, ThreatModel(norm, 1e-4))
    first, second, again, _, other, _ = starts
    assert torch.equal(first, again)
    assert (second != first).flatten(1).any(1).all()
    assert (other != first).flatten(1).any(1).all()
    if norm == "linf":
        # Stripes: every row of a channel is the first one, at an end of the ball.
        change = ((first - x) / 1e-4).round()
        assert torch.equal(change, change[:, :, :1].expand_as(change))
        assert change.unique().tolist() == [-1, 1]
    else:
        assert (first - x).flatten(1).norm(dim=1).tolist() == pytest.approx([1e-4] * 4, rel=1e-2)


def test_what_bf16_claims_counts_when_float32_agrees(task) -> None:
    class Touchy(nn.Module):
        """Wrong about everything under autocast, and only there."""

        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def forward(self, x: Tensor) -> Tensor:
            logits = self.model(x).float()
            return -logits if torch.is_autocast_enabled("cpu") else logits

    x, y = task.x[:8], task.y[:8]
    right = ~misclassified(task.model(x), y)
    found = Square(queries=10, precision="bf16").run(Touchy(), x, y, ThreatModel("linf", 1e-5))
    assert right.any() and not found.success[right].any()
    real = Square(queries=200, precision="bf16").run(task.model, x, y, ThreatModel("linf", 0.2))
    assert real.success.all() and misclassified(task.model(real.adv), y).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_model_changes(mode: str, norm: str) -> None:
    model = awkward_model()
    before = picture(model)
    Square(queries=5, mode=mode)(model, torch.rand(4, 3, 8, 8), torch.arange(4), ThreatModel(norm, 8 / 255))
    assert same(before, picture(model))


@pytest.mark.parametrize("mode", MODES)
def test_images_the_model_gets_wrong_come_back_as_they_are(mode: str) -> None:
    model = Affine()
    x, y = labelled(model, 8)
    found = Square(queries=5, mode=mode).run(model, x, (y + 1) % 5, threat("linf"))
    assert found.success.all() and torch.equal(found.adv, x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
def test_layouts_empty_batches_and_no_radius(mode: str, norm: str) -> None:
    attack, model = Square(queries=10, mode=mode), Affine()
    x, y = labelled(model, 4)
    last = attack(model, x.contiguous(memory_format=torch.channels_last), y, threat(norm, 0.1))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert attack(model, x, y, threat(norm, 0.1)).is_contiguous()
    assert [len(part) for part in attack.run(model, x[:0], y[:0], threat(norm))] == [0, 0, 0]
    still = attack.run(model, x, y, ThreatModel(norm, 0.0))
    assert torch.equal(still.adv, x) and not still.success.any()


@pytest.mark.parametrize("norm", NORMS)
def test_images_that_are_not_square(norm: str) -> None:
    w = torch.randn(2, 3 * 6 * 11, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(198, 2))
    model[1].weight.data = w / 10
    x = torch.rand(4, 3, 6, 11)
    y = model(x).argmax(1)
    for mode in MODES:
        found = Square(queries=60, mode=mode).run(model, x, y, ThreatModel(norm, 0.2))
        assert inside(found.adv, x, norm, 0.2)
        # In parity what is not broken comes back as it was.
        if mode == "fast":
            start = Square(queries=1).run(model, x, y, ThreatModel(norm, 0.2))
            assert (found.loss >= start.loss).all() and (found.loss > start.loss).any()


@pytest.mark.parametrize("norm", NORMS)
def test_parity_is_the_published_code(task, norm: str) -> None:
    """Every pixel, up to the last digit that the exact ball takes; where the published package is installed."""
    published = pytest.importorskip("pyautoattack.square", reason="pip install fastadv[bench]")
    x, y, eps = task.x[:24], task.y[:24], {"linf": 0.15, "l2": 1.5}[norm]
    kind = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": 3, "n_queries": 100, "n_restarts": 2}
    theirs = published.SquareAttack(task.model, resc_schedule=False, device="cpu", **kind)
    with torch.random.fork_rng():
        adv = theirs.perturb(x, y)
    attack = Square(queries=100, restarts=2, seed=3, mode="parity")
    ours = attack.run(task.model, x, y, ThreatModel(norm, eps))
    assert torch.equal(ours.success, misclassified(task.model(adv), y)) and 0 < ours.success.sum() < 24
    # 1e-6: eps / 2^20 in l2, a unit in the last place in linf.
    assert (ours.adv - adv).abs().max() < 1e-6


# What is refused.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_nan_logits_name_the_image(mode: str, after: int) -> None:
    class Poisoned(Affine):
        """NaN logits for one image of the batch, from the ``after``-th pass on."""

        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            bad = torch.zeros(len(x), 1)
            bad[2] = torch.nan if self.passes > after else 0.0
            return super().forward(x) + bad

    x, y = labelled(Affine(), 5)
    index = torch.tensor([10, 11, 12, 13, 14])
    with pytest.raises(NonFiniteGradientError, match=r"1 of 5 images: 12;"):
        Square(queries=10, mode=mode).run(Poisoned(), x, y, ThreatModel("linf", 1e-4), index=index)


def test_a_model_that_writes_into_its_input_is_refused() -> None:
    class InPlace(Affine):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    x = images(4)
    y, before = Affine()(x - 0.5).argmax(1), x.clone()
    for mode in MODES:
        with pytest.raises(SettingsError, match="writes into its input"):
            Square(queries=10, mode=mode)(InPlace(), x, y, ThreatModel("linf", 1e-4))
    assert torch.equal(x, before)


def test_settings_that_cannot_be_meant() -> None:
    for wrong, words in (
        ({"queries": 0}, "queries is 0"),
        ({"restarts": 1.5}, "restarts is 1.5"),
        ({"p_init": 0}, "p_init is 0"),
        ({"p_init": float("nan")}, "p_init is nan"),
        ({"mode": "exact"}, "unknown mode"),
        ({"precision": "fp16"}, "unknown precision"),
        ({"mode": "parity", "precision": "bf16"}, "parity"),
    ):
        with pytest.raises(SettingsError, match=words):
            Square(**wrong)
    with pytest.raises(DataError, match="5x5 pixels or more"):
        Square()(Affine(), torch.rand(2, 3, 4, 16), torch.tensor([0, 1]), threat("l2"))
    with pytest.raises(DataError, match="label 7"):
        Square().run(Affine(), images(2), torch.tensor([0, 7]), threat("linf"))

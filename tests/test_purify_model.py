"""The sparse coding model, the network and its attacks against what can be worked out or computed another way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.errors import SettingsError
from fastadv.pgd import PGD
from fastadv.purification import attacks, risks, training
from fastadv.purification.measures import accuracies, inactive, purification, units
from fastadv.purification.network import Activation, Hidden, constructed, partner, solving
from fastadv.purification.sparse import TEST, SparseCoding, World, label
from fastadv.threat import ThreatModel

CODING = SparseCoding(d=64, k=4, sigma=0.02)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer(activation: Activation, runs: int = 2, d: int = 12, m: int = 20) -> Hidden:
    return Hidden(0.4 * double(runs, d, m), 0.2 * double(runs, 1, m).abs(), activation)


def standard_error(share: float, n: int) -> float:
    return math.sqrt(max(share * (1 - share), 1e-9) / n)


def test_features_are_as_sparse_and_as_large_as_said() -> None:
    world = World(CODING, [0])
    x, z = world.stream(TEST).draw(20_000)
    size = x.abs() * math.sqrt(CODING.k)
    active = size > 0
    assert active.float().mean() == pytest.approx(CODING.k / CODING.d, abs=4 * standard_error(1 / 16, x.numel()))
    assert size[active].min() >= 0.5 and size[active].max() <= 1.5
    # U(0.5, 1.5) and as often negative as positive.
    assert size[active].mean() == pytest.approx(1, abs=0.005)
    assert x[active].sign().mean() == pytest.approx(0, abs=4 / math.sqrt(int(active.sum())))
    noise = z - x @ world.dictionary.mT
    assert noise.std() == pytest.approx(CODING.sigma, rel=0.01)
    assert torch.allclose(world.dictionary @ world.dictionary.mT, torch.eye(CODING.d), atol=1e-5)


def test_runs_of_one_seed_see_the_same_and_others_do_not() -> None:
    both, alone = World(CODING, [3, 5, 3]), World(CODING, [5])
    x, z = both.stream(TEST).draw(8)
    assert torch.equal(x[0], x[2]) and torch.equal(z[0], z[2]) and not torch.equal(x[0], x[1])
    assert torch.equal(alone.stream(TEST).draw(8).x[0], x[1])
    assert torch.equal(both.theta(0)[1], alone.theta(0)[0]) and not torch.equal(both.theta(0), both.theta(1))


def test_similar_pairs_share_their_features_and_not_their_noise() -> None:
    world = World(SparseCoding(d=64, k=4, sigma=0.0), [0])
    z, other, sign = world.stream(TEST).pairs(7)
    same = (z - other).abs().amax(2) < 1e-6
    assert torch.equal(same[:, :, None], sign > 0) and int(same.sum()) == 3
    noisy = World(CODING, [0]).stream(TEST).pairs(6)
    assert not torch.equal(noisy.z[0, 0], noisy.other[0, 0])


# Monte Carlo: of the law of the features itself, then of networks under attack.


@pytest.mark.parametrize(("d", "k", "eps"), [(64, 4, 0.2), (100, 5, 0.2), (100, 5, 0.35), (30, 12, 0.1)])
def test_clean_and_purified_accuracy_are_those_of_samples(d: int, k: float, eps: float) -> None:
    coding, n = SparseCoding(d=d, k=k, sigma=0.0), 40_000
    world = World(coding, [1])
    x = world.stream(TEST).features(n)
    active = (x != 0).sum(2, keepdim=True)
    sums = (x @ world.theta(0)).abs()
    for expected, right in (
        (risks.clean_accuracy(coding), active > 0),
        (risks.robust_accuracy(coding, eps, "active"), sums > eps * active.sqrt()),
        (risks.robust_accuracy(coding, eps / 2, "all"), sums > eps / 2 * math.sqrt(d)),
    ):
        assert right.float().mean() == pytest.approx(expected, abs=4 * standard_error(expected, n))


def test_a_linear_model_under_its_worst_attack_is_as_robust_as_the_formula_says() -> None:
    coding, eps, n = SparseCoding(d=64, k=4, sigma=0.05), 0.1, 40_000
    world = World(coding, [2])
    x, z = world.stream(TEST).draw(n)
    theta = world.theta(0)
    y, direction = label(x, theta), world.dictionary @ theta
    # For a linear model this step is the worst there is.
    adv = z - eps * y * (direction / direction.norm(dim=1, keepdim=True)).mT
    right = (y * (adv @ direction) > 0) & (x != 0).any(2, keepdim=True)
    expected = risks.robust_accuracy(coding, eps, "all")
    assert right.float().mean() == pytest.approx(expected, abs=4 * standard_error(expected, n))
    assert risks.robust_accuracy(SparseCoding(d=64, k=4, sigma=0.0), eps, "all") < expected - 0.01


def test_a_purified_network_under_fgm_is_as_robust_as_the_formula_says() -> None:
    coding, eps, n = SparseCoding(d=64, k=4, sigma=0.01), 0.05, 20_000
    world = World(coding, [0])
    theta = world.theta(0)
    # No step of this length switches a unit, and the noise switches none on.
    hidden = constructed(world.dictionary, 1, 0.08)
    x, z = world.stream(TEST).draw(n)
    y, q = label(x, theta), solving(hidden, world.dictionary, theta)
    right = y * hidden.output(q, z + attacks.fgm(hidden, q, z, y, eps)) > 0
    expected = risks.robust_accuracy(coding, eps, "active")
    assert right.float().mean() == pytest.approx(expected, abs=4 * standard_error(expected, n) + 1e-3)
    assert float((y * hidden.output(q, z) > 0).float().mean()) == pytest.approx(
        risks.clean_accuracy(coding), abs=4 * standard_error(0.98, n) + 2e-3
    )


def test_a_wrong_formula_is_seen() -> None:
    """The Monte Carlo tests can fail: the purified accuracy is nowhere near the linear one."""
    coding = SparseCoding(d=100, k=5, sigma=0.0)
    purified, linear = (risks.robust_accuracy(coding, 0.2, reads) for reads in ("active", "all"))
    assert (purified, linear) == (pytest.approx(0.681, abs=0.005), pytest.approx(0.056, abs=0.005))


@pytest.mark.parametrize("activation", ["soft", "hard"])
@pytest.mark.parametrize("loss", ["supervised", "contrastive", "projected"])
def test_the_closed_form_is_the_gradient(activation: Activation, loss: str) -> None:
    hidden, z = layer(activation), double(2, 30, 12).requires_grad_()
    q = double(2, 1, 20)
    if loss != "supervised":
        q = partner(hidden, double(2, 20, 5) if loss == "projected" else None, double(2, 30, 12))
    (expected,) = torch.autograd.grad(hidden.output(q, z).sum(), z)
    assert torch.allclose(hidden.gradient(q, z.detach()), expected, rtol=0, atol=1e-12)
    wrong = Hidden(hidden.w, hidden.b + 0.1, activation).gradient(q, z.detach())
    assert float((wrong - expected).abs().max()) > 1e-3


def test_the_contrastive_attack_climbs_what_finite_differences_climb() -> None:
    """Written down from the two embeddings, without any of the network's own functions."""
    hidden, a, z, other = layer("soft"), double(2, 20, 5), double(2, 30, 12), double(2, 30, 12)

    def similarity(z: Tensor) -> Tensor:
        v, w = z @ hidden.w, other @ hidden.w
        said = [torch.relu(each - hidden.b) - torch.relu(-each - hidden.b) for each in (v, w)]
        return ((said[0] @ a) * (said[1] @ a)).sum(2)

    grad, h = hidden.gradient(partner(hidden, a, other), z), 1e-6
    for _ in range(3):
        direction = double(2, 30, 12)
        slope = (similarity(z + h * direction) - similarity(z - h * direction)) / (2 * h)
        assert torch.allclose(slope, (grad * direction).sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projected", [False, True])
def test_a_similarity_is_the_output_with_the_partner(projected: bool) -> None:
    hidden, z, other = layer("soft"), double(2, 30, 12), double(2, 30, 12)
    a = double(2, 20, 5) if projected else torch.eye(20, dtype=torch.float64).expand(2, 20, 20)
    g, g_other = (hidden.units(hidden.pre(each)) @ a for each in (z, other))
    found = hidden.output(partner(hidden, a if projected else None, other), z)
    assert torch.allclose(found[:, :, 0], (g * g_other).sum(2))


def test_training_goes_down_the_gradient_of_autograd() -> None:
    """One step of contrastive training with a projection: its gradients are those of the loss written down."""
    hidden, projection = layer("soft"), double(2, 20, 5)
    z, other, y = double(2, 16, 12), double(2, 16, 12), torch.sign(double(2, 16, 1))
    parts = [hidden.w, hidden.b, projection]
    for part in parts:
        part.requires_grad_()
    g, g_other = (hidden.units(hidden.pre(each)) @ projection for each in (z, other))
    F.softplus(-y * (g * g_other).sum(2, keepdim=True) / 0.5).mean(1).sum().backward()
    with torch.no_grad():
        found = training.contrastive_gradients(hidden, projection, z, other, y, temperature=0.5)
    for part, grad in zip(parts, found, strict=True):
        assert torch.allclose(grad, part.grad, rtol=1e-10, atol=1e-12)


def test_supervised_gradients_are_those_of_autograd() -> None:
    hidden, z, y = layer("soft"), double(2, 16, 12), torch.sign(double(2, 16, 1))
    for part in (hidden.w, hidden.b):
        part.requires_grad_()
    ones = torch.ones(1, 1, 20, dtype=torch.float64)
    F.softplus(-y * hidden.output(ones, z)).mean(1).sum().backward()
    with torch.no_grad():
        w, b = training.supervised_gradients(hidden, z, y)
    assert torch.allclose(w, hidden.w.grad) and torch.allclose(b, hidden.b.grad)


def test_every_perturbation_is_in_the_ball_and_none_is_lost() -> None:
    hidden, q, z, y = layer("soft"), double(2, 1, 20), double(2, 50, 12), torch.sign(double(2, 50, 1))
    start = double(2, 50, 12)
    found = {
        "fgm": attacks.fgm(hidden, q, z, y, 0.3),
        "pgd": attacks.pgd(hidden, q, z, y, 0.3, steps=5, start=start),
        "smoothed": attacks.smoothed(hidden, q, z, y, 0.3, width=0.05, steps=5, exact=5),
        "transfer": attacks.transfer(double(2, 1, 12), y, 0.3).expand(2, 50, 12),
    }
    before = (y * hidden.output(q, z)).mean()
    for name, delta in found.items():
        assert delta.norm(dim=2).max() <= 0.3 * (1 + 1e-9), name
        if name != "transfer":
            assert (y * hidden.output(q, z + delta)).mean() < before - 0.1, name


def test_smoothed_gates_see_what_fgm_does_not() -> None:
    """Every unit is off, so FGM has no gradient; switching one on changes the sign of f."""
    hidden = Hidden(torch.eye(3)[None], torch.full((1, 1, 3), 0.5), "hard")
    q, z, y = torch.ones(1, 1, 3), torch.tensor([[[0.4, 0.4, 0.3]]]), -torch.ones(1, 1, 1)
    assert not attacks.fgm(hidden, q, z, y, 0.3).any()
    delta = attacks.smoothed(hidden, q, z, y, 0.3, width=0.2, steps=20, exact=0)
    assert hidden.output(q, z).item() == 0 and hidden.output(q, z + delta).item() > 0


def test_a_smoothed_gate_is_nearly_that_of_normal_noise() -> None:
    """The slope of one unit over v, against P(|v + N| > b); the logistic law is within 0.03 of the normal one."""
    v = torch.linspace(-1, 1, 101, dtype=torch.float64)
    hidden = Hidden(torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), 0.3, dtype=torch.float64), "soft")
    normal = torch.distributions.Normal(0.0, 0.1)
    expected = 1 - (normal.cdf(0.3 - v) - normal.cdf(-0.3 - v))
    seen: list[Tensor] = []

    class Recorded(Hidden):
        def back(self, slopes: Tensor) -> Tensor:
            seen.append(slopes[0, :, 0])
            return super().back(slopes)

    recorded = Recorded(hidden.w, hidden.b, "soft")
    attacks.smoothed(
        recorded, torch.ones(1, 1, 1), v.reshape(1, -1, 1), torch.ones(1, 101, 1), 0.1, width=0.1, steps=1, exact=0
    )
    assert float((seen[0] - expected).abs().max()) < 0.03


def test_the_packages_pgd_and_the_closed_form_agree() -> None:
    world = World(CODING, [0, 1])
    theta = world.theta(0)
    hidden = Hidden(world.dictionary @ torch.randn(2, 64, 80), torch.full((2, 1, 80), 0.05), "soft")
    q = training.head(world, hidden, theta, steps=60, batch_size=64)
    x, z = world.stream(TEST).draw(300)
    y = label(x, theta)
    fooled = attacks.package_pgd(hidden, q, z, y, 0.05, steps=20, seed=0)
    closed = attacks.pgd(hidden, q, z, y, 0.05, steps=20, start=torch.zeros_like(z))
    right = y * hidden.output(q, z + closed) > 0
    assert 0.05 < fooled.float().mean() < 0.95
    assert float((~fooled).float().mean()) == pytest.approx(float(right.float().mean()), abs=0.03)
    # One step from z itself is FGM, to the bit of a float or so.
    step = PGD(steps=1, step_size=0.05, random_start=False)
    model = attacks.AsClassifier(hidden.run(1), q[1:])
    adv = step(model, z[1].reshape(-1, 1, 1, 64), (y[1, :, 0] > 0).long(), ThreatModel("l2", 0.05, box=attacks.BOX))
    assert torch.allclose(adv.reshape(-1, 64) - z[1], attacks.fgm(hidden, q, z, y, 0.05)[1], atol=1e-5)


def test_a_constructed_network_is_as_mixed_as_asked_and_solves_the_task() -> None:
    world = World(CODING, [0])
    for width in (1, 4, 64):
        hidden = constructed(world.dictionary, width, 0.01)
        found = purification(world, hidden)
        assert found["purity"] == [pytest.approx(1 / math.sqrt(width), rel=1e-3)]
        assert found["participation"] == [pytest.approx(width, rel=1e-3)]
        # A weight counts from a tenth of the unit's length on.
        assert found["features"] == [width]
        assert found["coverage"] == [1.0 if width == 1 else 0.0]
        assert found["live"] == [64]
        mixed = world.dictionary.mT @ hidden.w
        assert torch.allclose(mixed @ solving(hidden, world.dictionary, world.theta(0)).mT, world.theta(0), atol=1e-4)
    with pytest.raises(SettingsError, match="width is 3"):
        constructed(world.dictionary, 3, 0.1)


def test_units_that_are_never_on_do_not_count() -> None:
    world = World(CODING, [0])
    w = world.dictionary.clone()
    w[:, :, 10:] *= 1e-4
    found = units(world, Hidden(w, torch.full((1, 1, 64), 0.01), "soft"))[0]
    assert len(found.purity) == 10 and set(found.best.tolist()) == set(range(10))


def test_inactive_share_by_hand() -> None:
    world = World(SparseCoding(d=4, k=2, sigma=0.0), [0])
    x = torch.tensor([[[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]])
    delta = torch.tensor([[[3.0, 4, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]]) @ world.dictionary.mT
    # 16 of 25, none, and a sample that was left alone.
    assert inactive(world, delta, x) == [pytest.approx((16 / 25 + 0) / 2, abs=1e-6)]


def test_the_worst_case_is_no_better_than_any_attack() -> None:
    world = World(CODING, [0, 1])
    hidden = Hidden(torch.randn(2, 64, 80) / 8, torch.full((2, 1, 80), 0.05), "hard")
    theta = world.theta(1)
    q = training.head(world, hidden, theta, steps=60, batch_size=64)
    found = accuracies(world, hidden, q, theta, 0.05, 200)
    for run in range(2):
        assert found["ens"][run] <= min(found["fgm"][run], found["pgd"][run]) <= found["clean"][run]
    assert all(value > 0.7 for value in found["clean"])
    assert accuracies(world, hidden, q, theta, 5.0, 200)["ens"] == [0.0, 0.0]

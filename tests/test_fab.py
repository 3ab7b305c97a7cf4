"""FAB against closed forms, laws, and the published code."""

from __future__ import annotations

import copy

import pytest
import torch
from analytic import EPS, Affine, HalfSpace, Wavy, images
from torch import nn

from fastadv.attacks.fab import FAB
from fastadv.attacks.hyperplane import to_hyperplane
from fastadv.attacks.ledger import Ledger
from fastadv.attacks.nearest import Search
from fastadv.errors import DataError, NonFiniteGradientError, SettingsError
from fastadv.threat import ThreatModel

NORMS = ("linf", "l2")
MODES = ("fast", "parity")
PUBLISHED = {"linf": "Linf", "l2": "L2"}


def distances(model, x, y, norm, box=(0.0, 1.0)):
    """How far the nearest other class of an affine model is inside the box, for each image."""
    with torch.no_grad():
        logits, found = model(x), []
        for k in range(logits.shape[1]):
            w = model.weight[k] - model.weight[y]
            b = (w * x.flatten(1)).sum(1) + logits.gather(1, y[:, None])[:, 0] - logits[:, k]
            move = to_hyperplane(x.flatten(1).unsqueeze(1), w, b, norm, box).squeeze(1)
            left = ((w * (x.flatten(1) + move)).sum(1) - b).abs()
            length = move.abs().amax(1) if norm == "linf" else move.norm(dim=1)
            found.append(torch.where((left < 1e-4) & (y != k), length, torch.inf))
        return torch.stack(found).amin(0)


def length(adv, x, norm):
    change = (adv.double() - x.double()).flatten(1)
    return change.abs().amax(1) if norm == "linf" else change.norm(dim=1)


def check_exact(attack, norm, slack, edge=False):
    """An image is broken where the nearest other class is inside the ball, and nowhere else."""
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x.round() if edge else x
    model = Affine()
    y = model(x).argmax(1)
    exact = distances(model, x, y, norm)
    for share in (0.3, 0.7):
        eps = exact.quantile(share).item()
        threat = ThreatModel(norm, eps)
        adv, success, _ = attack.run(model, x, y, threat)
        clear = (exact / eps - 1).abs() > slack
        assert clear.sum() > 12
        assert torch.equal(success[clear], (exact < eps)[clear])
        assert torch.equal(success, model(adv).argmax(1) != y)
        assert (length(adv, x, norm) <= torch.tensor(eps).double()).all()
        assert adv.min() >= 0
        assert adv.max() <= 1


@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_it_breaks_exactly_what_an_affine_model_allows(norm, targeted, edge):
    # Its iterates end 0.5 % beyond the boundary (eta 1.05, beta 0.9); drawn into the ball they are on it.
    check_exact(FAB(targeted=targeted, steps=12), norm, slack=1e-4, edge=edge)
    if edge:
        check_exact(FAB(targeted=targeted, steps=12, mode="parity"), norm, slack=1e-2, edge=edge)


@pytest.mark.parametrize("fault", ["wrong way", "no box", "not brought into the ball"])
def test_a_broken_attack_is_found(fault, monkeypatch):
    """The checks can fail."""
    if fault == "wrong way":
        real = Search._between
        monkeypatch.setattr(Search, "_between", lambda self, z, x, move, other: real(self, z, x, -move, -other))
    if fault == "no box":
        monkeypatch.setattr("fastadv.attacks.nearest.to_hyperplane", lambda *a: to_hyperplane(*a[:4], (-9.0, 9.0)))
    if fault == "not brought into the ball":
        monkeypatch.setattr(ThreatModel, "project", lambda self, adv, x: adv)
    with pytest.raises(AssertionError):
        check_exact(FAB(steps=12), "linf", slack=1e-4, edge=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_two_classes_and_another_box(norm, mode):
    model, box = HalfSpace(), (-1.0, 3.0)
    x = images(8, low=-0.5, high=2.5)
    with torch.no_grad():
        model.b.copy_(-model(x)[:, 1].median() + 0.3)
    y = model(x).argmax(1)
    w = model.w.detach()
    exact = (model(x)[:, 1] / (w.abs().sum() if norm == "linf" else w.norm())).abs().detach()
    eps = exact.median().item() * 1.02
    adv, success, loss = FAB(steps=15, mode=mode).run(model, x, y, ThreatModel(norm, eps, box))
    assert torch.equal(success, exact < eps)
    assert torch.equal(success, loss > 0)
    assert (length(adv, x, norm) <= torch.tensor(eps).double()).all()
    assert 0 < success.sum() < 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_no_radius_gives_the_images_themselves(norm, mode):
    x, model = images(8), Affine()
    y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    adv, success, _ = FAB(steps=5, mode=mode).run(model, x, y, ThreatModel(norm, 0.0))
    assert torch.equal(adv, x)
    assert success.tolist() == [True] * 2 + [False] * 6


def test_what_was_not_broken_comes_back_as_the_worst_image_tried():
    x, model = images(8), Affine()
    y = model(x).argmax(1)
    for norm in NORMS:
        eps = 0.9 * distances(model, x, y, norm).min().item()
        adv, success, loss = FAB(steps=10).run(model, x, y, ThreatModel(norm, eps))
        assert not success.any()
        worst = model.worst_margins(x, y, norm, eps).scatter(1, y[:, None], -torch.inf).amax(1)
        # The end of the way to the nearest class is, in an affine model, the worst there is.
        torch.testing.assert_close(loss, worst, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            model(adv).scatter(1, y[:, None], -torch.inf).amax(1) - model(adv).gather(1, y[:, None])[:, 0], loss
        )
        assert torch.equal(FAB(steps=10, mode="parity")(model, x, y, ThreatModel(norm, eps)), x)


class Elementwise(nn.Module):
    """Five wavy logits, each image computed by itself: sums along the image, no matrix product over the batch."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)) / 8)

    def forward(self, x):
        return torch.stack([torch.sin(4 * (x * w).flatten(1).sum(1)) + 0.2 * k for k, w in enumerate(self.w)], 1)


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_an_images_result_is_its_own(norm, targeted):
    """Not the batch's, nor the order's: its noise hangs on its number."""
    x, model = images(6), Elementwise()
    y = model(x).argmax(1)
    attack, threat = FAB(targeted=targeted, targets=2, steps=2, restarts=2), ThreatModel(norm, EPS[norm] / 10)
    together = attack.run(model, x, y, threat)
    assert 0 < together.success.sum() < 6
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    shuffled = attack.run(model, x[order], y[order], threat, index=order)
    alone = [attack.run(model, x[i : i + 1], y[i : i + 1], threat, index=torch.tensor([i])) for i in range(6)]
    for field, found in enumerate(together):
        assert torch.equal(shuffled[field], found[order])
        assert torch.equal(torch.cat([one[field] for one in alone]), found)
    assert torch.equal(attack.run(model, x, y, threat).adv, together.adv)


def test_restarts_begin_elsewhere(monkeypatch):
    starts = []
    real = Search._start
    monkeypatch.setattr(Search, "_start", lambda *args: starts.append(real(*args)) or starts[-1])
    x, model = images(3), Affine()
    y = model(x).argmax(1)
    for norm in NORMS:
        for seed, index in ((0, torch.arange(3)), (0, torch.arange(3)), (0, torch.arange(3) + 7), (1, torch.arange(3))):
            attack = FAB(steps=1, targets=1, restarts=3, seed=seed)
            attack.run(model, x, y, ThreatModel(norm, 1e-4), index=index)
        a, b, again, _, other_index, _, other_seed, _ = starts
        assert torch.equal(a, again)
        for other in (b, other_index, other_seed):
            assert (other != a).flatten(1).any(1).all()
        # At half the radius.
        torch.testing.assert_close(length(a, x, norm).float(), torch.full((3,), 5e-5), rtol=1e-2, atol=0)
        starts.clear()


class Counting(nn.Module):
    """Notes the size of each batch, and whether a gradient was wanted."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append((len(x), x.requires_grad))
        return self.inner(x)


def test_fast_takes_one_pass_each_way_per_step_and_parity_one_forward_more():
    x = images(4)
    for mode, passes in (("fast", 1), ("parity", 2)):
        model = Counting(Affine())
        y = model.inner(x).argmax(1)
        FAB(steps=20, targets=2, mode=mode).run(model, x, y, ThreatModel("linf", 1e-5))
        assert sum(grad for _, grad in model.seen) == 40
        # Beside the steps: the clean images, per target the end of the run and its find, in parity the ranking.
        assert len(model.seen) <= passes * 40 + 5
        assert all(size == 4 for size, _ in model.seen)


def test_images_leave_when_they_are_broken():
    x, model = images(16), Counting(Affine())
    y = model.inner(x).argmax(1)
    eps = distances(model.inner, x, y, "linf").median().item() * 1.02
    success = FAB(steps=10, targets=3).run(model, x, y, ThreatModel("linf", eps)).success
    sizes = [size for size, grad in model.seen if grad]
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == (~success).sum() < 16


def test_a_success_is_one_in_float32():
    """A model that lies in bf16."""

    class Liar(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Affine()

        def forward(self, x):
            logits = self.inner(x)
            return logits.flip(1) if torch.is_autocast_enabled("cpu") else logits

    x, model = images(8), Liar()
    y = model(x).argmax(1)
    threat = ThreatModel("linf", 0.5 * distances(model.inner, x, y, "linf").min().item())
    result = FAB(steps=4, targets=1, precision="bf16").run(model, x, y, threat)
    assert not result.success.any()
    assert (result.loss < 0).all()
    honest = ThreatModel("linf", 2 * distances(model.inner, x, y, "linf").max().item())
    assert FAB(steps=10, precision="bf16").run(model.inner, x, y, honest).success.all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targeted", [True, False])
def test_it_leaves_no_trace(net, mode, targeted):
    x = images(6)
    net.train()
    net[1].eval()
    twin = copy.deepcopy(net)
    before = torch.get_rng_state()
    y = torch.zeros(6, dtype=torch.int64)
    adv = FAB(targeted=targeted, steps=3, targets=2, restarts=2, mode=mode)(net, x, y, ThreatModel("l2", 0.2))
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in net.modules()] == [m.training for m in twin.modules()]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert adv.dtype == torch.float32
    assert not adv.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_layouts_and_empty_batches(net, mode):
    x, attack, threat = images(4), FAB(steps=3, targets=2, mode=mode), ThreatModel("linf", 0.05)
    y = torch.arange(4)
    adv = attack(net, x, y, threat)
    assert adv.is_contiguous()
    last = attack(net, x.contiguous(memory_format=torch.channels_last), y, threat)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert (length(last, x, "linf") <= torch.tensor(0.05).double()).all()
    empty = attack.run(net, x[:0], y[:0], threat)
    assert [len(found) for found in empty] == [0, 0, 0]
    with torch.inference_mode():
        torch.testing.assert_close(attack(net, x, y, threat), adv)


def test_a_model_that_needs_its_images_contiguous(net):
    """fast lays images out for the convolutions; where a view() refuses, they stay as given."""

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.view(len(x), -1).view(x.shape))

    x, y = images(4), torch.arange(4)
    success = FAB(steps=3, targets=2).run(Viewing(), x, y, ThreatModel("linf", 0.05)).success
    assert torch.equal(success, FAB(steps=3, targets=2).run(net, x, y, ThreatModel("linf", 0.05)).success)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["clean", "on the way", "gradient"])
def test_nan_is_an_error(mode, where):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = Affine(), 0

        def forward(self, x):
            self.calls += 1
            logits = self.inner(x)
            if where == "gradient":
                # Its slope at 0 is infinite.
                return logits + 0 * (x - x.detach()).abs().sum().sqrt()
            return logits * torch.nan if where == "clean" or self.calls > 6 else logits

    x = images(4)
    y = Affine()(x).argmax(1)
    with pytest.raises(NonFiniteGradientError, match="in 4 of 4 images: 7, 8, 9, 10"):
        FAB(steps=8, mode=mode)(Broken(), x, y, ThreatModel("linf", 1e-4), index=torch.arange(7, 11))


def test_what_cannot_be_meant_is_refused():
    for wrong in (
        {"steps": 0},
        {"restarts": 1.5},
        {"targets": 0},
        {"alpha_max": 1.5},
        {"eta": -1.0},
        {"beta": float("nan")},
        {"mode": "quick"},
        {"precision": "fp8"},
        {"mode": "parity", "precision": "bf16"},
    ):
        with pytest.raises(SettingsError):
            FAB(**wrong)
    x, y, model = images(4), torch.zeros(4, dtype=torch.int64), Affine()
    for index in (torch.arange(3), torch.arange(4.0)):
        with pytest.raises(DataError, match="index"):
            FAB(steps=1)(model, x, y, ThreatModel(), index=index)
    with pytest.raises(DataError, match="label 7"):
        FAB(steps=1)(model, x, y + 7, ThreatModel())


# The lengths that pyautoattack 0.2.0 finds on Wavy() within the radius, targeted or not, in 10 steps, 2 restarts and 2
# targets; 0 = none.
FOUND = {
    "linf": [0, 0.002636, 0.000821, 0.000355, 0.000457, 0.001401, 0, 0.000682, 0.001721, 0, 0.000234, 0],
    "l2": [0, 0.028508, 0.008898, 0.003921, 0.004984, 0.015535, 0, 0.007351, 0.019053, 0, 0.002541, 0],
}
RADIUS = {"linf": 0.003, "l2": 0.03}


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_parity_finds_what_the_published_code_found(norm, targeted):
    model, x = Wavy(), images(12)
    y = model(x).argmax(1)
    attack = FAB(targeted=targeted, steps=10, targets=2, restarts=2, mode="parity")
    adv, success, _ = attack.run(model, x, y, ThreatModel(norm, RADIUS[norm]))
    expected = torch.tensor(FOUND[norm], dtype=torch.float64)
    assert torch.equal(success, expected > 0)
    # Another machine may add in another order, and a bit turns an iterate: 1e-3 of the length then (measured).
    torch.testing.assert_close(length(adv, x, norm), expected, rtol=3e-3, atol=1e-6)
    fast = FAB(targeted=targeted, steps=10, targets=2, restarts=2).run(model, x, y, ThreatModel(norm, RADIUS[norm]))
    # Other random restarts: an image near the radius may be found by one and missed by the other.
    assert (fast.success != success).sum() <= 1


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_parity_is_the_published_code_to_the_bit(task, norm, targeted):
    published = pytest.importorskip("pyautoattack.fab_pt")
    threat = ThreatModel(norm, {"linf": 0.06, "l2": 0.6}[norm])
    x, y = task.x[:24], task.y[:24]
    model = copy.deepcopy(task.model)
    theirs = published.FABAttack_PT(
        model,
        norm=PUBLISHED[norm],
        n_iter=6,
        n_restarts=2,
        eps=threat.eps,
        device="cpu",
        targeted=targeted,
        n_target_classes=2,
    ).perturb(x, y)
    broken = task.model(theirs).argmax(1) != y
    adv, success, _ = FAB(targeted=targeted, steps=6, restarts=2, targets=2, mode="parity").run(
        task.model, x, y, threat
    )
    assert torch.equal(success, broken)
    assert 3 < success.sum() < 24
    assert torch.equal(adv, threat.project(theirs, x))
    fast = FAB(targeted=targeted, steps=6, restarts=2, targets=2).run(task.model, x, y, threat)
    assert (fast.success.sum() - success.sum()).abs() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_the_verdict_is_that_of_the_cpu(task, mode):
    x, y, threat = task.x[:40], task.y[:40], ThreatModel("linf", 0.06)
    attack = FAB(steps=8, targets=2, restarts=2, mode=mode)
    expected = attack.run(task.model, x, y, threat).success
    found = attack.run(copy.deepcopy(task.model).cuda(), x.cuda(), y.cuda(), threat)
    # Convolutions of another library: an image on the edge may turn.
    assert (found.success.cpu() != expected).sum() <= 1
    assert (length(found.adv.cpu(), x, "linf") <= torch.tensor(threat.eps).double()).all()


def test_the_ledger_takes_what_is_better():
    from fastadv.inputs import check_inputs
    from fastadv.losses import margin
    from fastadv.passes import Passes

    model, x, threat = HalfSpace(), images(3), ThreatModel("linf", 0.1)
    with torch.no_grad():
        model.b.copy_(-model(x)[:, 1].min() + 1.0)
    y = torch.ones(3, dtype=torch.int64)
    passes = Passes(model, margin, "eval", 2)
    with passes.opened(x.device):
        ledger = Ledger(passes, check_inputs(x, y, threat, None, None), threat, torch.arange(3), fast=True)
        better, worse = (
            x - 0.02 * model.w.detach().view(3, 8, 8).sign(),
            x + 0.02 * model.w.detach().view(3, 8, 8).sign(),
        )
        ledger.offer(torch.tensor([0, 2]), torch.stack([better[0], worse[2]]))
        ledger.offer(torch.tensor([1]), better[1:2], only_fooling=True)
        assert torch.equal(ledger.adv, torch.stack([better[0], x[1], x[2]]))
        assert ledger.left().tolist() == [0, 1, 2]

"""Attack losses against their formulas, the seed against the gradient it stands for, and the training losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from two_layers import WEIGHTS, answer, classifier, descend, kl, leaves, log_p

from fastadv.errors import SettingsError
from fastadv.losses import (
    ATTACK_LOSSES,
    adversarial_ce,
    attack_loss,
    ce,
    ce_seed,
    clean_ce,
    dlr,
    margin,
    mart,
    misclassified,
    training_loss,
)
from fastadv.recipe import Recipe
from fastadv.strategies import load_all
from fastadv.trainer import optimizer_of


@pytest.fixture
def logits():
    return 3 * torch.randn(64, 6)


@pytest.fixture
def y():
    return torch.randint(6, (64,))


@pytest.mark.parametrize("name", sorted(ATTACK_LOSSES))
def test_an_attack_loss_gives_one_value_per_image_that_depends_on_that_image_alone(name, logits, y):
    loss = ATTACK_LOSSES[name]
    together = loss(logits, y)
    assert together.shape == (64,)
    assert torch.equal(together, torch.cat([loss(logits[i : i + 1], y[i : i + 1]) for i in range(64)]))


def test_attack_losses_match_their_formulas(logits, y, tolerance):
    close = tolerance[torch.float32]
    for z, label, got_ce, got_margin, got_dlr in zip(
        logits, y, ce(logits, y), margin(logits, y), dlr(logits, y), strict=True
    ):
        others = [float(z[j]) for j in range(6) if j != label]
        ranked = sorted(map(float, z), reverse=True)
        gap = max(others) - float(z[label])
        want_ce = math.log(sum(math.exp(float(v)) for v in z)) - float(z[label])
        want = torch.tensor([want_ce, gap, gap / (ranked[0] - ranked[2])])
        torch.testing.assert_close(torch.stack([got_ce, got_margin, got_dlr]), want, rtol=1e-4, atol=close["atol"])


def test_margin_and_dlr_are_positive_exactly_where_the_model_is_wrong(logits, y):
    wrong = logits.argmax(1) != y
    assert torch.equal(margin(logits, y) > 0, wrong)
    assert torch.equal(dlr(logits, y) > 0, wrong)
    assert torch.equal(misclassified(logits, y), wrong)


def test_dlr_does_not_see_shift_and_scale(logits, y):
    torch.testing.assert_close(dlr(7 * logits + 3, y), dlr(logits, y), rtol=1e-3, atol=1e-5)


def test_dlr_refuses_two_classes():
    with pytest.raises(SettingsError, match="loss='margin'"):
        dlr(torch.randn(2, 2), torch.zeros(2, dtype=torch.int64))


def test_the_seed_is_the_gradient_of_cross_entropy_over_one_minus_p(logits, y):
    logits = logits.double().requires_grad_()
    (gradient,) = torch.autograd.grad(ce(logits, y).sum(), logits)
    p = logits.softmax(1).gather(1, y[:, None])
    torch.testing.assert_close(ce_seed(logits.detach(), y) * (1 - p), gradient)


def test_the_seed_does_not_fade_when_the_model_is_sure(y):
    logits = torch.zeros(64, 6).scatter(1, y[:, None], 200.0).requires_grad_()
    (gradient,) = torch.autograd.grad(ce(logits, y).sum(), logits)
    assert gradient.count_nonzero() == 0
    seed = ce_seed(logits.detach(), y)
    assert (seed.gather(1, y[:, None]) == -1).all()
    torch.testing.assert_close(seed.sum(1), torch.zeros(64))


@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_logits_count_as_wrong_also_at_the_label(where):
    logits = torch.tensor([[5.0, 0.0, 0.0]])
    assert not misclassified(logits, torch.tensor([0])).any()
    logits[0, where] = math.nan
    assert misclassified(logits, torch.tensor([0])).all()


def test_a_callable_loss_must_give_one_value_per_image(logits, y):
    for double in (False, True):
        own = attack_loss(lambda z, t, double=double: F.cross_entropy(z.double() if double else z, t, reduction="none"))
        torch.testing.assert_close(own(logits, y), ce(logits, y), rtol=1e-6, atol=1e-6)
    with pytest.raises(SettingsError, match='reduction="none"'):
        attack_loss(F.cross_entropy)(logits, y)


def test_training_losses_are_mean_cross_entropies(net, tolerance):
    net.eval()
    x, y = torch.rand(8, 3, 8, 8), torch.randint(10, (8,))
    seen = []

    def attack(x, y):
        seen.append((x, y))
        return x.flip(0)

    for smoothing in (0.0, 0.1):
        want = F.cross_entropy(net(x.flip(0)), y, label_smoothing=smoothing)
        got = adversarial_ce(net, x, y, attack, label_smoothing=smoothing)
        torch.testing.assert_close(got, want, **tolerance[torch.float32])
    assert len(seen) == 2
    assert seen[0][0] is x
    assert seen[0][1] is y
    torch.testing.assert_close(clean_ce(net, x, y, attack), F.cross_entropy(net(x), y), **tolerance[torch.float32])
    assert len(seen) == 2


def test_training_losses_reach_the_parameters(net):
    adversarial_ce(net, torch.rand(4, 3, 8, 8), torch.randint(10, (4,)), lambda x, y: x).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ["trades", "mart"])
@pytest.mark.parametrize("beta", [None, 1.5])
def test_a_step_with_a_divergence_is_the_transcribed_one(name, beta):
    model = classifier().eval()
    x, adv = torch.rand(2, 7, 3, 6, 6, dtype=torch.float64)
    y, p = torch.arange(7) % 3, leaves(model)
    norm = model.backbone.norm
    clean, attacked = (answer(images, p, norm.running_mean, norm.running_var) for images in (x, adv))
    own = torch.nn.functional.one_hot(y, 3).bool()
    if name == "trades":
        want = -log_p(clean)[own].mean() + (beta or 6.0) * kl(clean, attacked).mean()
    else:
        probs, doubt = log_p(attacked).exp(), 1 - log_p(clean).exp()[own]
        bce = -probs[own].log() - (1 - probs.masked_fill(own, 0).amax(1)).log()
        want = (bce + (beta or 5.0) * doubt * kl(clean, attacked)).mean()
    gradients = torch.autograd.grad(want, list(p.values()))
    (stage,) = load_all()["ranli-full"].stages(Recipe(loss=name, beta=beta, lr=0.5, optimizer="sgd", weight_decay=0.25))
    optimizer = optimizer_of(dict(model.named_parameters()), stage, 1e-8)
    got = stage.loss(model, x, y, lambda images, labels: adv)
    torch.testing.assert_close(got, want)
    got.backward()
    optimizer.step()
    for (short, value), gradient in zip(p.items(), gradients, strict=True):
        assert (model.get_parameter(WEIGHTS[short]) - descend(value, gradient, 0.5, 0.25)).abs().max() < 1e-7


def test_marts_margin_stays_finite_where_a_probability_is_one():
    logits = torch.tensor([[0.0, 300.0, 0.0]], requires_grad=True)
    loss = mart(lambda x: logits, torch.zeros(1), torch.tensor([0]), lambda x, y: x)
    loss.backward()
    # 300 for the class itself, 300 less log 2 for the strongest other one.
    assert loss.item() == pytest.approx(600 - math.log(2), rel=1e-5)
    assert logits.grad.abs().max() == pytest.approx(2.0)


def test_trades_without_a_divergence_is_clean_cross_entropy_and_smooths_labels(net, tolerance):
    net.eval()
    x, y = torch.rand(8, 3, 8, 8), torch.randint(10, (8,))
    for smoothing in (0.0, 0.1):
        got = training_loss("trades", label_smoothing=smoothing)(net, x, y, lambda images, labels: images)
        want = F.cross_entropy(net(x), y, label_smoothing=smoothing)
        torch.testing.assert_close(got, want, **tolerance[torch.float32])


def test_a_loss_that_cannot_be_meant_is_refused_by_the_recipe():
    with pytest.raises(SettingsError, match=r"label_smoothing is 0.1 with loss mart.*(?s:.)*--label-smoothing 0"):
        Recipe(loss="mart", label_smoothing=0.1)
    with pytest.raises(SettingsError, match="unknown loss 'trade'; did you mean 'trades'"):
        Recipe(loss="trade")
    with pytest.raises(SettingsError, match="beta is -1"):
        Recipe(loss="trades", beta=-1)


@pytest.mark.parametrize("loss", ["trades", "mart"])
def test_every_strategy_of_the_paper_takes_the_loss_in_every_adversarial_stage(loss):
    for name, chosen in load_all().items():
        if "-" not in name or name.startswith("pretrain"):
            continue
        stages = list(chosen.stages(Recipe(loss=loss)))
        assert [stage.loss.func.__name__ for stage in stages if stage.robust] == [loss] * sum(s.robust for s in stages)

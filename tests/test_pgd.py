"""PGD against closed forms, laws and a textbook loop."""

from __future__ import annotations

import itertools
import math
import textwrap

import pytest
import timm
import torch
import torch.nn.functional as F
from analytic import EPS, Affine, HalfSpace, Quadratic, images, seed
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv.losses import ce
from fastadv.pgd import PGD, pgd
from fastadv.threat import ThreatModel

NORMS = ("linf", "l2")


def textbook(model, x, y, *, eps, step_size, steps, start=None):
    """The linf loop as papers print it, on the model in eval mode."""
    adv = x.clone() if start is None else start
    for _ in range(steps):
        adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y, reduction="sum"), adv)
        adv = adv.detach() + step_size * grad.sign()
        adv = torch.clamp(torch.clamp(adv, x - eps, x + eps), 0, 1).detach()
    return adv


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_it_reaches_the_worst_case_of_a_half_space(norm, loss, random_start):
    model, x, y, eps = HalfSpace(), images(8), torch.ones(8, dtype=torch.int64), EPS[norm]
    adv = pgd(model, x, y, ThreatModel(norm, eps), steps=20, step_size=eps / 4, loss=loss, random_start=random_start)
    # The part of an l2 start that lies across w shrinks by the projection only: compare the logit, not the place.
    if random_start and norm == "l2":
        torch.testing.assert_close(model(adv), model(model.worst(x, norm, eps)), rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(adv, model.worst(x, norm, eps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_targeted_attack_goes_the_other_way(norm):
    model, x, eps = HalfSpace(), images(8), EPS[norm]
    target = torch.zeros(8, dtype=torch.int64)
    attack = PGD(steps=8, step_size=eps / 4, random_start=False, targeted=True)
    adv, success, loss = attack.run(model, x, target, ThreatModel(norm, eps))
    torch.testing.assert_close(adv, model.worst(x, norm, eps), rtol=0, atol=1e-6)
    assert torch.equal(success, model(adv).argmax(1) == target)
    torch.testing.assert_close(loss, ce(model(adv), target))


@pytest.mark.parametrize("norm", NORMS)
def test_it_reaches_every_class_margin_of_an_affine_model_and_passes_none(norm):
    model, x, eps = Affine(), images(16), EPS[norm]
    y = model(x).argmax(1)
    threat = ThreatModel(norm, eps)
    worst = model.worst_margins(x, y, norm, eps)
    for j in range(5):
        adv = pgd(
            model,
            x,
            y,
            threat,
            steps=30,
            step_size=eps / 4,
            loss=lambda z, t, j=j: z[:, j] - z.gather(1, t[:, None])[:, 0],
        )
        logits = model(adv)
        torch.testing.assert_close(logits[:, j] - logits.gather(1, y[:, None])[:, 0], worst[:, j], rtol=1e-3, atol=1e-3)
    for loss in ("ce", "dlr", "margin"):
        adv = pgd(model, x, y, threat, steps=30, step_size=eps / 4, loss=loss, keep="best", restarts=3)
        logits = model(adv)
        margins = (logits - logits.gather(1, y[:, None])).scatter(1, y[:, None], -math.inf).amax(1)
        most = worst.scatter(1, y[:, None], -math.inf).amax(1)
        assert (margins <= most + 1e-5).all()
        # ce mixes the classes, dlr divides by a moving gap; margin may climb towards the wrong class for some images.
        assert loss != "margin" or (margins > most - 1e-3).float().mean() > 0.8


@pytest.mark.parametrize("norm", NORMS)
def test_it_reaches_the_worst_case_of_a_quadratic(norm):
    model, x, y, eps = Quadratic(), images(8), torch.zeros(8, dtype=torch.int64), EPS[norm]
    adv = pgd(model, x, y, ThreatModel(norm, eps), steps=100, step_size=eps / 4, random_start=False)
    torch.testing.assert_close(adv, model.worst(x, norm, eps), rtol=0, atol=2e-6)


def test_the_box_cuts_the_worst_case():
    model, y = HalfSpace(), torch.ones(8, dtype=torch.int64)
    x = torch.cat([images(4, low=0.0, high=0.02), images(4, low=0.97, high=1.0)])
    adv = pgd(model, x, y, ThreatModel("linf", 0.05), steps=8, step_size=0.02)
    torch.testing.assert_close(adv, model.worst(x, "linf", 0.05).clamp(0, 1), rtol=0, atol=1e-6)


@st.composite
def attacks(draw):
    g = seed(draw(st.integers(0, 2**31)))
    norm = draw(st.sampled_from(NORMS))
    kind = draw(st.sampled_from(["any", "edges", "bytes"]))
    shape = (draw(st.integers(1, 5)), 3, 8, 8)
    x = torch.rand(shape, generator=g) if kind == "any" else torch.randint(0, 256, shape, generator=g) / 255
    x = x.round() if kind == "edges" else x
    eps = draw(st.sampled_from([0.0, 1 / 255, 4 / 255, 8 / 255, 0.5, 1.0]))
    keep = draw(st.sampled_from(["last", "best", "success"]))
    attack = PGD(steps=draw(st.integers(0, 4)), step_size=draw(st.sampled_from([1 / 255, 0.3])), keep=keep)
    return attack, ThreatModel(norm, eps), x, torch.randint(5, shape[:1], generator=g), g


@settings(max_examples=100, deadline=None, derandomize=True)
@given(attacks())
def test_whatever_it_is_asked_it_stays_inside_and_leaves_its_arguments_alone(case):
    attack, threat, x, y, g = case
    before, state = x.clone(), torch.get_rng_state()
    adv, success, loss = attack.run(Affine(), x, y, threat, generator=g)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, before)
    assert (adv.shape, adv.dtype, adv.requires_grad, adv.is_leaf) == (x.shape, torch.float32, False, True)
    assert adv.data_ptr() != x.data_ptr()
    offset = (adv.double() - x.double()).flatten(1).norm(p=math.inf if threat.norm == "linf" else 2, dim=1)
    assert (offset <= torch.tensor(threat.eps).double()).all()
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert success.shape == loss.shape == y.shape
    assert loss.isfinite().all()
    if threat.eps == 0:
        assert torch.equal(adv, x)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from(NORMS), st.sampled_from(["last", "best", "success"]))
def test_the_batch_is_its_images_in_any_order(number, norm, keep):
    x, g = images(6, seed=number), seed(number)
    y, order = torch.randint(5, (6,), generator=g), torch.randperm(6, generator=g)
    attack = PGD(steps=3, step_size=EPS[norm] / 2, random_start=False, keep=keep)
    model, threat = Affine(), ThreatModel(norm, EPS[norm])
    together = attack(model, x, y, threat)
    # Another batch size is another matrix product: gradients may differ in the last bit, and l2 images by as much.
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(attack(model, x[order], y[order], threat), together[order], **close)
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1], threat) for i in range(6)])
    torch.testing.assert_close(alone, together, **close)


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_more_eps_never_help_the_model(task, norm):
    model, x, y = task[0], task[1][:150], task[2][:150]
    unit = 1 if norm == "linf" else 4

    def loss(eps, steps):
        attack = PGD(steps=steps, step_size=2.5 * unit * eps / max(steps, 5))
        return attack.run(model, x, y, ThreatModel(norm, unit * eps), generator=seed(3)).loss.mean()

    by_steps = [loss(16 / 255, steps) for steps in (0, 1, 2, 5, 10, 20, 40)]
    assert all(b >= a - 1e-3 for a, b in itertools.pairwise(by_steps)), by_steps
    # Converged: twice the steps change next to nothing.
    assert by_steps[-1] < 1.02 * by_steps[-2]
    by_eps = [loss(eps / 255, 20) for eps in (0, 2, 4, 8, 16, 32)]
    assert all(b > a for a, b in itertools.pairwise(by_eps)), by_eps


def test_the_accuracy_falls_with_eps_to_zero(task):
    model, x, y = task[0], task[1][:200], task[2][:200]
    clean = accuracy(model, x, y)
    assert clean > 0.95
    curve = [
        accuracy(model, pgd(model, x, y, ThreatModel("linf", eps / 255), steps=20, step_size=2.5 * eps / 255 / 20), y)
        for eps in (0, 2, 4, 8, 16, 32, 64, 255)
    ]
    assert curve[0] == clean
    assert all(b <= a + 1 / len(x) for a, b in itertools.pairwise(curve)), curve
    assert curve[-1] == 0


def test_noise_and_another_models_images_are_weaker_than_the_attack(task):
    model, x, y = task
    threat = ThreatModel("linf", 16 / 255)
    white = [accuracy(model, pgd(model, x, y, threat, steps=20, generator=seed(i)), y) for i in range(3)]
    assert max(white) - min(white) < 0.03
    noise = min(accuracy(model, pgd(model, x, y, threat, steps=0, generator=seed(i)), y) for i in range(10))
    assert noise > max(white) + 0.3
    stranger = pgd(Affine(classes=10), x, y, threat, steps=20)
    assert accuracy(model, stranger, y) > max(white) + 0.3


@pytest.mark.parametrize("random_start", [False, True])
def test_it_agrees_with_the_textbook_loop(task, random_start):
    model, x, y = task
    threat = ThreatModel("linf", 8 / 255)
    start = threat.random_start(x, generator=seed(9)) if random_start else x.clone()
    want = textbook(model, x, y, eps=8 / 255, step_size=2 / 255, steps=10, start=start)
    got = pgd(model, x, y, threat, random_start=random_start, generator=seed(9))
    assert ((got - want).abs() < 1e-6).float().mean() > 0.999


@pytest.mark.slow
def test_it_agrees_with_the_textbook_loop_on_swin_tiny():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10).eval()
    x, y = torch.rand(2, 3, 224, 224), torch.tensor([3, 7])
    threat = ThreatModel("linf", 8 / 255)
    start = threat.random_start(x, generator=seed(9))
    want = textbook(model, x, y, eps=8 / 255, step_size=2 / 255, steps=3, start=start)
    got = pgd(model, x, y, threat, steps=3, generator=seed(9))
    assert ((got - want).abs() < 1e-6).float().mean() > 0.999


def test_the_translations_in_the_docstring_run(task):
    model, x, y = task
    blocks = pgd.__doc__.split("::\n\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        code = textwrap.dedent(block.partition("\n\n")[0])
        assert len(code.strip().splitlines()) == 3
        scope = {"model": model, "x": x, "y": y}
        exec(code, scope)
        assert scope["adv"].shape == x.shape

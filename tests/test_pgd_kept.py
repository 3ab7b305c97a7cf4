"""What PGD gives back: the iterate it should keep, for every image, eps, mask and layout."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import EPS, Affine, HalfSpace, Wavy, images, seed
from torch import nn

from fastadv.losses import ce
from fastadv.pgd import PGD, AttackResult, pgd
from fastadv.threat import ThreatModel

NORMS = ("linf", "l2")


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("keep", ["last", "best", "success"])
def test_keep_is_what_it_says(keep, targeted):
    model, x = Wavy(), images(100)
    y = torch.full((100,), int(targeted))
    threat, sign = ThreatModel("linf", 12 / 255), -1 if targeted else 1
    attack = PGD(steps=6, step_size=2 / 255, keep=keep, targeted=targeted)
    got = attack.run(model, x, y, threat, generator=seed(1))

    # The same iterates, one attack per length.
    runs = [PGD(steps=n, step_size=2 / 255, targeted=targeted) for n in range(7)]
    iterates = torch.stack([run(model, x, y, threat, generator=seed(1)) for run in runs])
    with torch.no_grad():
        logits = torch.stack([model(adv) for adv in iterates])
    fooled = (logits.argmax(2) == y) if targeted else (logits.argmax(2) != y)
    losses = torch.stack([ce(z, y) for z in logits])
    best = (sign * losses).argmax(0)
    first = torch.where(fooled.any(0), fooled.int().argmax(0), best)
    chosen = {"last": torch.full_like(best, 6), "best": best, "success": first}[keep]
    assert len(chosen.unique()) > 2 or keep == "last"

    assert torch.equal(got.adv, iterates[chosen, torch.arange(100)])
    torch.testing.assert_close(got.loss, losses[chosen, torch.arange(100)])
    assert torch.equal(got.success, fooled[-1] if keep == "last" else fooled.any(0))
    assert 0 < got.success.float().mean() < 1


@pytest.mark.parametrize("keep", ["last", "best", "success"])
def test_restarts_keep_the_best_and_success_stays(task, keep):
    model, x, y = task
    threat, settings = ThreatModel("linf", 10 / 255), {"steps": 4, "step_size": 4 / 255, "keep": keep}
    many = PGD(restarts=4, **settings).run(model, x, y, threat, generator=seed(5))
    noise = seed(5)
    single = [PGD(**settings).run(model, x, y, threat, generator=noise) for _ in range(4)]
    success = torch.stack([run.success for run in single])
    assert torch.equal(many.success, success.any(0))
    assert (success.sum(0) % 4 != 0).any()
    if keep == "best":
        assert torch.equal(many.loss, torch.stack([run.loss for run in single]).amax(0))
    else:
        # Whoever counts as fooled is shown by the image that did it.
        with torch.no_grad():
            assert torch.equal(many.success, model(many.adv).argmax(1) != y)


def test_the_result_unpacks_and_the_attack_gives_its_images(task):
    model, x, y = task
    result = PGD(steps=2).run(model, x, y, ThreatModel(), generator=seed(0))
    assert isinstance(result, AttackResult)
    adv, success, loss = result
    assert adv is result.adv
    assert success.shape == loss.shape == y.shape
    assert torch.equal(PGD(steps=2)(model, x, y, ThreatModel(), generator=seed(0)), adv)
    assert torch.equal(pgd(model, x, y, ThreatModel(), steps=2, generator=seed(0)), adv)


@pytest.mark.parametrize("norm", NORMS)
def test_one_eps_per_image_is_one_attack_per_image(norm):
    model, x, y = Affine(), images(4), torch.randint(5, (4,))
    eps = EPS[norm] * torch.tensor([0.0, 0.5, 1.0, 2.0])
    attack = PGD(steps=4, step_size=EPS[norm] / 2, random_start=False)
    got = attack(model, x, y, ThreatModel(norm, 0.01), eps=eps)
    alone = [attack(model, x[i : i + 1], y[i : i + 1], ThreatModel(norm, float(eps[i]))) for i in range(4)]
    torch.testing.assert_close(got, torch.cat(alone), rtol=0, atol=1e-6)
    assert torch.equal(got[0], x[0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(8, 8), (3, 1, 1), (4, 1, 8, 8), (4, 3, 8, 8)])
def test_masked_pixels_never_change(norm, shape):
    model, x, y = Affine(), images(4), torch.randint(5, (4,))
    mask = torch.rand(shape) < 0.5
    adv = pgd(model, x, y, ThreatModel(norm, EPS[norm]), steps=3, mask=mask)
    kept = ~mask.expand_as(x)
    assert torch.equal(adv[kept], x[kept])
    assert (adv != x)[~kept].float().mean() > 0.9
    assert torch.equal(
        pgd(model, x, y, ThreatModel(norm, EPS[norm]), steps=3, mask=mask.float(), generator=seed(2)),
        pgd(model, x, y, ThreatModel(norm, EPS[norm]), steps=3, mask=mask, generator=seed(2)),
    )


def test_an_l2_budget_goes_to_the_pixels_that_may_change():
    model, x, y = HalfSpace(), images(4), torch.ones(4, dtype=torch.int64)
    mask = torch.zeros(8, 8).bool()
    mask[:4] = True
    adv = pgd(model, x, y, ThreatModel("l2", 0.5), steps=10, step_size=0.2, mask=mask, random_start=False)
    w = model.w.detach().view(3, 8, 8) * mask
    torch.testing.assert_close(adv, x - 0.5 * w / w.norm(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("keep", ["last", "best", "success"])
def test_an_empty_batch_gives_an_empty_batch(keep):
    x, y = torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)
    result = PGD(keep=keep).run(Affine(), x, y, ThreatModel(), eps=torch.zeros(0), mask=torch.ones(8, 8))
    assert [tuple(value.shape) for value in result] == [(0, 3, 8, 8), (0,), (0,)]


@pytest.mark.parametrize("norm", NORMS)
def test_no_steps_give_the_start(norm):
    x, y, threat = images(4), torch.randint(5, (4,)), ThreatModel(norm, EPS[norm])
    assert torch.equal(pgd(Affine(), x, y, threat, steps=0, random_start=False), x)
    start = threat.random_start(x, generator=seed(4))
    assert torch.equal(pgd(Affine(), x, y, threat, steps=0, generator=seed(4)), start)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_layout_of_x_changes_nothing_and_is_kept(layout, keep):
    x, y, model = images(4), torch.randint(5, (4,)), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    laid_out = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": x.repeat_interleave(2, dim=3)[..., ::2],
    }[layout]
    attack = PGD(steps=3, keep=keep)
    mask = torch.rand(8, 8) < 0.9
    want = attack(model, x, y, ThreatModel(), generator=seed(6), mask=mask)
    got = attack(model, laid_out, y, ThreatModel(), generator=seed(6), mask=mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert got.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    assert got.is_contiguous() == (layout != "channels_last")


def test_gray_images_and_single_pixels_work():
    for shape in ((2, 1, 8, 8), (2, 3, 1, 1), (1, 1, 1, 1)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.full(shape, 0.5).to(memory_format=memory_format)
            model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 2))
            y = torch.zeros(shape[0], dtype=torch.int64)
            for norm in NORMS:
                adv = pgd(model, x, y, ThreatModel(norm, 0.1), mask=torch.ones(1, 1))
                assert (adv != x).all()

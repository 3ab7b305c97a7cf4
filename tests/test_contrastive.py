"""NT-Xent and its gradient have known values; the attack on it climbs that gradient; views are what they say."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv import contrastive
from fastadv.contrastive import AgainstOther, BothViews, attack_on_views, embedder, nt_xent, projected
from fastadv.engine import accelerate
from fastadv.errors import SettingsError
from fastadv.models import Classifier
from fastadv.passes import Passes
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel
from fastadv.views import two_views, view

THREAT = ThreatModel("linf", 8 / 255)


class Smooth(nn.Module):
    """Features (B, 8) of 3x6x6 pixels without a kink, so that finite differences are those of a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def smooth_model() -> Classifier:
    model = Classifier(Smooth(), 8, 3, name="smooth", input_size=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    projected(model, hidden=16, size=5)
    # Its ReLU would have a kink.
    model.projector[1] = nn.Tanh()
    return model.eval()


def by_hand(views: Tensor, temperature: float) -> list[float]:
    """The loss of every anchor, from its definition, one exponential after the other."""
    images = views.shape[1]
    rows = [[float(value) for value in row] for row in views.flatten(0, 1)]

    def similarity(a: list[float], b: list[float]) -> float:
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        return dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b)) / temperature

    losses = []
    for i, anchor in enumerate(rows):
        others = [k for k in range(len(rows)) if k != i]
        everything = sum(math.exp(similarity(anchor, rows[k])) for k in others)
        same = [k for k in others if k % images == i % images]
        losses.append(-sum(math.log(math.exp(similarity(anchor, rows[k])) / everything) for k in same) / len(same))
    return losses


@pytest.mark.parametrize(("views", "images", "temperature"), [(2, 2, 1.0), (2, 5, 0.5), (3, 4, 0.2)])
def test_nt_xent_is_its_definition(views: int, images: int, temperature: float) -> None:
    drawn = torch.randn(views, images, 6, dtype=torch.float64)
    found = nt_xent(drawn, temperature)
    assert found.shape == (views, images)
    assert found.flatten().tolist() == pytest.approx(by_hand(drawn, temperature), rel=1e-12)


def test_nt_xent_of_two_orthogonal_pairs() -> None:
    """Each anchor: 1 with its own other view, 0 with two strangers, so log(e + 2) - 1 at temperature 1."""
    pairs = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    assert nt_xent(3 * pairs, 1.0).flatten().tolist() == pytest.approx([math.log(math.e + 2) - 1] * 4)
    # A planted fault: the wrong view for a positive costs more.
    assert nt_xent(torch.stack([pairs[0], pairs[1].flip(0)]), 1.0).mean() > 1.5


def test_the_gradient_of_nt_xent_is_that_of_finite_differences() -> None:
    drawn = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda views: nt_xent(views, 0.3), drawn)


@pytest.mark.parametrize("kind", ["both", "first"])
def test_the_attacks_gradient_is_that_of_finite_differences(kind: str) -> None:
    model = smooth_model()
    seen, exact = embedder(model), embedder(copy.deepcopy(model).double())
    x = torch.rand(6, 3, 6, 6)
    other = exact(torch.rand(6, 3, 6, 6).double()).detach()
    loss: BothViews | AgainstOther = BothViews(0.5)
    if kind == "first":
        loss = AgainstOther(0.5)
        loss.hold(other)
    passes = Passes(seen, loss, "eval", 0)
    with passes.opened(x.device):
        _, found = passes.gradient(x, torch.zeros(6, dtype=torch.int64))

    @torch.no_grad()
    def total(point: Tensor) -> float:
        embedded = exact(point)
        pairs = torch.stack([embedded, other]) if kind == "first" else embedded.unflatten(0, (2, -1))
        return float(nt_xent(pairs, 0.5).sum())

    step = 1e-5
    for index in [(0, 0, 0, 0), (1, 2, 3, 4), (2, 1, 5, 5), (5, 0, 2, 1), (4, 1, 1, 1)]:
        moved = x.double()
        moved[index] += step
        above = total(moved)
        moved[index] -= 2 * step
        slope = (above - total(moved)) / (2 * step)
        assert float(found[index]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("pairs", ["a2s", "a2a"])
def test_the_attack_is_the_fused_one_and_climbs(pairs: contrastive.Pairs) -> None:
    model = smooth_model()
    fast = attack_on_views(PGD(steps=5), embedder(model), pairs=pairs, precision="fp32")
    assert fast.body in ("cpp", "triton")
    x = torch.rand(16, 3, 6, 6)
    y = torch.arange(8).repeat(2)
    before = [p.detach().clone() for p in model.parameters()]
    adv = fast(x, y, THREAT, torch.Generator().manual_seed(0))
    assert ((adv.double() - x.double()).abs() <= torch.tensor(THREAT.eps).double()).all()
    # The second views of a2s come back as they are; all others have moved.
    moved = (adv != x).flatten(1).any(1)
    assert moved.tolist() == [True] * 8 + [pairs == "a2a"] * 8
    clean, raised = (nt_xent(embedder(model)(images).unflatten(0, (2, -1))).mean() for images in (x, adv))
    assert raised > clean + 0.01
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    assert adv.equal(fast(x, y, THREAT, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("pairs", ["a2s", "a2a"])
def test_one_step_is_the_sign_of_the_gradient(pairs: contrastive.Pairs) -> None:
    model = smooth_model()
    attack = PGD(steps=1, step_size=4 / 255, random_start=False)
    x = torch.rand(8, 3, 6, 6) * 0.8 + 0.1
    adv = attack_on_views(attack, embedder(model), pairs=pairs, precision="fp32")(x, torch.zeros(8).long(), THREAT)
    leaf = x.clone().requires_grad_()
    nt_xent(embedder(model)(leaf).unflatten(0, (2, -1))).sum().backward()
    assert leaf.grad is not None
    wanted = x + 4 / 255 * leaf.grad.sign()
    if pairs == "a2s":
        wanted[4:] = x[4:]
    torch.testing.assert_close(adv, wanted)


def test_an_image_is_attacked_with_its_batch_and_not_alone() -> None:
    """Why nothing may be dropped from a batch on the way: with other company the gradient is another."""
    model, x = smooth_model(), torch.rand(12, 3, 6, 6)
    fast = attack_on_views(PGD(steps=3, random_start=False), embedder(model), precision="fp32")
    together = fast(x, torch.zeros(12).long(), THREAT)
    some = torch.tensor([0, 1, 2, 6, 7, 8])
    assert not torch.equal(fast(x[some], torch.zeros(6).long(), THREAT), together[some])
    # Asked to keep the best or the broken, it still takes every image to its end.
    kept = attack_on_views(PGD(keep="success", restarts=2), embedder(model), precision="fp32")
    assert (kept.attack.keep, kept.attack.restarts) == ("last", 1)


def test_a_recorded_attack_sees_other_views_each_time() -> None:
    """On a CPU a replay is a call: what it reads must have been put where it looks."""
    model, x, y = smooth_model(), torch.rand(2, 8, 3, 6, 6), torch.zeros(8).long()
    attack = PGD(steps=2, random_start=False)
    recorded = attack_on_views(attack, embedder(model), pairs="a2s", precision="fp32", capture="on")
    for batch in x:
        # A new one each time: it has seen no views before.
        plain = attack_on_views(attack, embedder(model), pairs="a2s", precision="fp32", capture="off")
        assert torch.equal(recorded(batch, y, THREAT), plain(batch, y, THREAT))
        assert recorded.captured


def test_the_embedder_shares_every_weight_and_leaves_the_head() -> None:
    model = smooth_model()
    seen = embedder(model)
    assert seen(torch.rand(2, 3, 6, 6)).shape == (2, 5)
    assert model(torch.rand(2, 3, 6, 6)).shape == (2, 3)
    assert {id(p) for p in seen.parameters()} < {id(p) for p in model.parameters()}
    assert not model.head.weight.requires_grad
    assert isinstance(accelerate(PGD(steps=1), seen).model, Classifier)


def test_what_cannot_be_contrasted_is_refused() -> None:
    with pytest.raises(SettingsError, match="a batch of 1 image"):
        nt_xent(torch.randn(2, 1, 4))
    with pytest.raises(SettingsError, match="1 view has no other"):
        nt_xent(torch.randn(1, 2, 4))
    for temperature in (0.0, -0.5, math.nan, math.inf):
        with pytest.raises(SettingsError, match="temperature is"):
            nt_xent(torch.randn(2, 2, 4), temperature)
    typo: Any = "a2b"
    with pytest.raises(SettingsError, match="unknown pairs 'a2b'; did you mean"):
        contrastive.adversarial_contrastive_loss(typo)


def test_the_training_losses_contrast_what_they_name() -> None:
    """Counted by what goes through the model: clean views, adversarial ones, or both."""
    model, x, y = smooth_model(), torch.rand(8, 3, 6, 6), torch.zeros(8).long()
    seen: list[Tensor] = []
    adv = (x + 0.1).clamp(0, 1)

    def forward(images: Tensor) -> Tensor:
        seen.append(images)
        return embedder(model)(images)

    def loss_of(pairs: contrastive.Pairs) -> Tensor:
        seen.clear()
        return contrastive.adversarial_contrastive_loss(pairs, 0.5)(forward, x, y, lambda images, labels: adv)

    def pair(images: Tensor) -> Tensor:
        return nt_xent(embedder(model)(images).unflatten(0, (2, -1))).mean()

    clean = contrastive.contrastive_loss(0.5)(forward, x, y, lambda images, labels: adv)
    assert torch.equal(seen[0], x)
    torch.testing.assert_close(clean, pair(x))
    torch.testing.assert_close(loss_of("a2a"), pair(adv))
    torch.testing.assert_close(loss_of("ds"), (pair(x) + pair(adv)) / 2)
    three = nt_xent(embedder(model)(torch.cat([x, adv[:4]])).unflatten(0, (3, -1))).mean()
    torch.testing.assert_close(loss_of("rocl"), three)


def test_a_view_without_settings_is_the_image() -> None:
    x = torch.rand(3, 3, 8, 8)
    draw = torch.Generator().manual_seed(0)
    torch.testing.assert_close(view(x, draw, False, least_area=1, jitter=0, grey=0), x, rtol=1e-4, atol=1e-4)


def test_views_are_drawn_from_the_generator_alone() -> None:
    x, y = torch.rand(5, 3, 16, 16), torch.arange(5)
    torch.manual_seed(1)
    first, labels = two_views(x, y, torch.Generator().manual_seed(3), True)
    torch.manual_seed(2)
    again, _ = two_views(x, y, torch.Generator().manual_seed(3), True)
    other, _ = two_views(x, y, torch.Generator().manual_seed(4), True)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:5], first[5:])
    assert labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert first.shape == (10, 3, 16, 16)
    assert first.dtype == torch.float32
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


def test_a_mirror_is_a_mirror_and_only_where_it_is_allowed() -> None:
    x = torch.rand(64, 3, 8, 8)
    plain = {"least_area": 1.0, "jitter": 0.0, "grey": 0.0}
    turned = view(x, torch.Generator().manual_seed(0), True, **plain)
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-4) for a, b in zip(turned, x, strict=True)]
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(turned, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48
    assert torch.allclose(view(x, torch.Generator().manual_seed(0), False, **plain), x, atol=1e-4)


def test_grey_and_hue_keep_the_brightness() -> None:
    x = 0.4 + 0.2 * torch.rand(32, 3, 8, 8)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = view(x, torch.Generator().manual_seed(0), False, least_area=1, jitter=0, grey=1)
    torch.testing.assert_close(grey[:, 0], grey[:, 2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((grey * weights).sum(1), (x * weights).sum(1), rtol=1e-2, atol=1e-3)
    jittered = view(x, torch.Generator().manual_seed(0), False, least_area=1, jitter=1, grey=0)
    changed = (jittered - x).abs().flatten(1).amax(1) > 0.01
    # Four of five, in expectation.
    assert 18 < int(changed.sum()) < 32
    assert not torch.allclose(jittered[:, 0], jittered[:, 1], atol=0.01)

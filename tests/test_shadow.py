"""The shadow: during a fast attack no parameter can get a gradient, and no weight is ever a stale one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from analytic import images, seed
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastadv import models, ops, window_attention, window_block
from fastadv.engine import Fast
from fastadv.errors import DataError
from fastadv.passes import untouched
from fastadv.pgd import PGD
from fastadv.shadow import Shadow
from fastadv.threat import ThreatModel
from fastadv.tuning.lora import LoraAttention, LoraConv, lora

THREAT = ThreatModel("linf", 8 / 255)


class Spy(nn.Linear):
    """Notes what its weight was in each pass."""

    def __init__(self):
        super().__init__(192, 10)
        self.seen = []

    def forward(self, x):
        self.seen.append((self.weight.requires_grad, self.weight.data_ptr()))
        return super().forward(x.flatten(1))


def test_during_the_attack_no_parameter_can_get_a_gradient():
    spy = Spy()
    PGD(steps=2).on(spy).run(images(2), torch.arange(2), THREAT)
    assert spy.seen == [(False, spy.weight.data_ptr())] * 3
    assert isinstance(spy.weight, nn.Parameter)
    assert spy.weight.requires_grad
    PGD(steps=1)(spy, images(2), torch.arange(2), THREAT)
    assert spy.seen[-1][0]


def change_in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.neg_()


def change_by_step(model):
    optimizer = torch.optim.SGD(model.parameters(), 5.0)
    model(images(4)).logsumexp(1).sum().backward()
    optimizer.step()


def change_data(model):
    for p in model.parameters():
        p.data = -p.data


def change_parameter(model):
    model[1].weight = nn.Parameter(-model[1].weight.detach())


def change_module(model):
    model[1] = nn.Linear(192, 10)


def change_by_loading(model):
    model.load_state_dict({name: -value for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize(
    "change", [change_in_place, change_by_step, change_data, change_parameter, change_module, change_by_loading]
)
def test_a_weight_change_is_noticed(change, refresh):
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), images(4), torch.arange(4)
    fast = PGD(steps=3).on(model, precision="fp32")
    before = fast(x, y, THREAT, generator=seed())
    change(model)
    if refresh:
        fast.refresh()
    got = fast(x, y, THREAT, generator=seed())
    assert not torch.equal(got, before)
    assert torch.equal(got, PGD(steps=3).on(model, precision="fp32")(x, y, THREAT, generator=seed()))


def test_refresh_takes_new_modules_into_the_shadow():
    model = nn.Sequential(nn.Flatten(), nn.Identity())
    fast = PGD(steps=1).on(model, precision="fp32")
    model[1] = Spy()
    fast.refresh()
    fast(images(2), torch.arange(2), THREAT)
    assert not model[1].seen[0][0]


def test_it_keeps_nothing_of_the_callers_tensors(task):
    model, x, y = task
    fast = PGD(steps=2).on(model, precision="fp32")
    x, y = x.clone(), y.clone()
    first = fast(x, y, THREAT, generator=seed())
    copies = first.clone(), x.clone(), y.clone()
    x.fill_(math.nan)
    y.fill_(-1)
    with pytest.raises(DataError):
        fast(x, y, THREAT)
    assert torch.equal(fast(copies[1], copies[2], THREAT, generator=seed()), first)
    assert torch.equal(first, copies[0])


def swin():
    return models.create("swin_micro_64", 10).eval(), torch.rand(2, 3, 64, 64, generator=seed()), torch.tensor([1, 2])


def vit():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    return model.eval(), torch.rand(2, 3, 32, 32, generator=seed()), torch.tensor([1, 2])


def resnet(**options):
    torch.manual_seed(0)
    options = {"block": BasicBlock, "channels": (8, 16, 16, 32), "stem_width": 8, **options}
    model = ResNet(layers=(1, 1, 1, 1), num_classes=10, **options)
    return model.eval(), torch.rand(2, 3, 64, 64, generator=seed()), torch.tensor([1, 2])


@pytest.mark.parametrize("make", [swin, vit, resnet, lambda: resnet(block=Bottleneck, stem_type="deep", avg_down=True)])
def test_bf16_copies_are_as_good_as_autocast_and_follow_the_weights(make):
    """What CUDA gets; here in slow arithmetic, with the same rounding."""
    model, x, y = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dtypes = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    inner = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][3]
    for module in (first, inner, last):
        module.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    copied = Fast(PGD(steps=2), Shadow(model, "bf16", copies=True), capture=False)
    cast = Fast(PGD(steps=2), Shadow(model, "bf16", copies=False), capture=False)
    exact = PGD(steps=2).on(model, precision="fp32")
    for _ in range(2):
        dtypes.clear()
        got = copied.run(x, y, THREAT, seed())
        # Patches and head in float32, in between bf16; then the score, all in float32.
        assert dtypes[:3] == [torch.float32, torch.bfloat16, torch.float32]
        assert dtypes[-3:] == [torch.float32] * 3
        assert copied.shadow.copies
        want, rough = exact.run(x, y, THREAT, seed()), cast.run(x, y, THREAT, seed())
        # A few signs near zero turn out otherwise, about as many as under autocast.
        errors = [(attack.adv != want.adv).float().mean() for attack in (got, rough)]
        assert errors[0] < 3 * errors[1] + 0.01
        torch.testing.assert_close(got.loss, want.loss, rtol=0.02, atol=0.02)
        with torch.no_grad():
            # In place and behind the back of the version counter.
            last.weight.data.mul_(-3)
            inner.weight.mul_(-1)
    last.weight.data.mul_(1 / 9)
    assert same_state(model, before)
    assert all(p.dtype == torch.float32 and type(p) is nn.Parameter for p in model.parameters())
    assert all(len(module._forward_hooks) <= 1 for module in model.modules())


def same_state(model, before):
    return all(torch.allclose(tensor, before[name], atol=1e-6) for name, tensor in model.state_dict().items())


def test_what_cannot_be_copied_to_bf16_is_attacked_under_autocast(monkeypatch):
    model, x, y = swin()
    attack = Fast(PGD(steps=2), Shadow(model, "bf16", copies=True), capture=False)
    want = Fast(PGD(steps=2), Shadow(model, "bf16", copies=False), capture=False)(x, y, THREAT, seed())

    class Picky(nn.Module):
        def forward(self, x):
            assert x.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"), "bf16 without autocast"
            return x

    model.backbone.norm = nn.Sequential(model.backbone.norm, Picky())
    with pytest.warns(UserWarning, match=r"run under autocast: bf16 weights fail \(bf16 without autocast") as caught:
        got = attack(x, y, THREAT, seed())
    assert len(caught) == 1
    assert torch.equal(got, want)
    assert attack.precision == "bf16"


def block_classes(model):
    return [type(module) for module in model.modules() if isinstance(module, SwinTransformerBlock)]


def test_window_attention_is_fused_inside_the_attack_and_nowhere_else(monkeypatch):
    assert ops.body("window_attention") == "cpp"
    model, x, y = swin()
    calls = []
    op = window_block.window_attention
    monkeypatch.setattr(window_block, "window_attention", lambda *args: calls.append(1) or op(*args))
    fast = PGD(steps=2).on(model, precision="fp32")
    got = fast.run(x, y, THREAT, seed())
    # Six blocks in two steps and a score.
    assert len(calls) == 18
    assert set(block_classes(model)) == {SwinTransformerBlock}
    want = PGD(steps=2).run(model, x, y, THREAT, generator=seed())
    assert len(calls) == 18
    assert ((got.adv - want.adv).abs() < 1e-6).float().mean() > 0.999
    # One who uses the op himself keeps it.
    window_attention.insert(model)
    fast(x, y, THREAT, seed())
    assert SwinTransformerBlock not in block_classes(model)


class Residual(nn.Module):
    """A block whose order of calls is its own secret: nothing in it is folded."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.conv1(self.bn1(x))


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        Residual(),
        *(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.train(), images(4), torch.arange(4)


@pytest.mark.parametrize("make", [convolutional, resnet])
def test_batch_norm_is_folded_into_the_convolution_before_it_and_follows_the_weights(make):
    model, x, y = make()
    fast = PGD(steps=2).on(model, precision="fp32")
    for _ in range(2):
        want = PGD(steps=2).run(model, x, y, THREAT, generator=seed())
        with fast.shadow.standing_in():
            folded = sum(isinstance(module, nn.Identity) for module in model.modules())
        folded -= sum(isinstance(module, nn.Identity) for module in model.modules())
        assert folded == (2 if make is convolutional else 13)
        got = fast.run(x, y, THREAT, seed())
        assert ((got.adv - want.adv).abs() < 1e-6).float().mean() > 0.99
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.mul_(1.1)


def test_batch_norm_is_not_folded_where_someone_looks_or_it_trains():
    model, x, y = convolutional()
    seen = []
    fast = PGD(steps=1).on(model, precision="fp32")
    fast(x, y, THREAT)
    # Hooks added later count too.
    model[1].register_forward_hook(lambda *call: seen.append(1))
    fast(x, y, THREAT)
    assert seen
    model, x, y = convolutional()
    attack = PGD(steps=2, mode="as-is", loss="margin")
    got, want = attack.on(model, precision="fp32")(x, y, THREAT, seed()), attack(model, x, y, THREAT, generator=seed())
    assert torch.equal(got, want)


class PreActivation(BasicBlock):
    """timm's block with its layers called in another order."""

    def forward(self, x):
        x = x + self.conv1(self.bn1(x).relu())
        return x + self.conv2(self.bn2(x).relu())


class Shared(nn.Module):
    """One convolution before two norms, of which a Sequential tells only one."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(16, 16, 3, padding=1)
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU(), conv)

    def forward(self, x):
        return self.layers(x)


class Partial(Shared):
    """A Sequential of which some layers are called."""

    def forward(self, x):
        return self.layers[0](x)


class Reader(Shared):
    """A forward that looks into a norm."""

    def forward(self, x):
        return self.layers(x) + self.layers[1].bias.view(-1, 1, 1)


@pytest.mark.parametrize("inner", [lambda: PreActivation(16, 16), Shared, Partial, Reader])
def test_batch_norm_is_not_folded_where_the_forward_calls_in_another_order(inner):
    model, x, y = convolutional()
    model[3] = inner().eval()
    for module in model[3].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            nn.init.normal_(module.bias)
    attack = PGD(steps=3, keep="success")
    want = attack.run(model, x, y, THREAT, generator=seed())
    fast = attack.on(model, precision="fp32")
    for _ in range(2):
        got = fast.run(x, y, THREAT, seed())
        assert torch.equal(got.success, want.success)
        assert ((got.adv - want.adv).abs() < 1e-6).float().mean() > 0.99
    # Also where no gradient is asked for.
    fast = attack.on(model.eval(), precision="fp32")
    with torch.no_grad():
        logits = model(x)
        with fast.shadow.standing_in():
            fast.shadow.check_folds(x)
            torch.testing.assert_close(fast.shadow.forward(x), logits)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_view_that_needs_the_channels_first_gets_them(precision):
    class Viewer(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
            self.head = nn.Linear(3 * 32 * 32, 5)

        def forward(self, x):
            return self.head(self.convs(x).view(x.size(0), -1))

    model, x, y = Viewer(), torch.rand(4, 3, 32, 32, generator=seed()), torch.arange(4)
    got = PGD(steps=2).on(model, precision=precision)(x, y, THREAT, seed())
    want = PGD(steps=2)(model, x, y, THREAT, generator=seed())
    assert ((got - want).abs() < 1e-6).float().mean() > (0.99 if precision == "fp32" else 0.9)


def test_large_maps_go_through_convolutions_with_their_channels_last():
    model, x, y = convolutional()
    layouts = []
    model[2].register_forward_hook(
        lambda module, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    fast = PGD(steps=2).on(model, precision="fp32")
    # Most work on 8x8 and 6x6 pixels: less than a tenth on maps below 7x7 needs larger images.
    got = fast(x, y, THREAT, seed())
    assert layouts[-1] is False
    large = torch.cat([torch.cat([x, x], 2)] * 2, 3)
    again = fast(large, y, THREAT, seed())
    assert layouts[-1] is True
    assert got.is_contiguous()
    assert again.is_contiguous()
    want = PGD(steps=2)(model, large, y, THREAT, generator=seed())
    assert ((again - want).abs() < 1e-6).float().mean() > 0.99


def tuned(name="swin_micro_64"):
    """A LoRA-tuned classifier in train mode whose updates are as large as the weights, and what it is attacked on."""
    torch.manual_seed(0)
    model = models.create(name, 10, image_size=None if name == "swin_micro_64" else 64)
    for part in lora(model, rank=4, alpha=4.0, dropout=0.5):
        part.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraAttention | LoraConv):
                factors = dict(module.named_parameters(recurse=False))
                for factor in factors.values():
                    factor.normal_(std=module.base.weight.std().item() ** 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                # timm starts each block's last one at zero: the block would be silent.
                module.weight.uniform_(0.5, 1)
    return model, torch.rand(2, 3, 64, 64, generator=seed()), torch.tensor([1, 2])


@pytest.fixture
def calls(monkeypatch):
    """Grows by one with each forward pass of a LoRA layer."""
    found = []
    for kind in (LoraAttention, LoraConv):
        plain = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, plain=plain: found.append(1) or plain(self, x))
    return found


def step(model):
    """One optimiser step, in place."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.grad = torch.randn_like(p)
    torch.optim.SGD(learning, 0.02).step()
    model.zero_grad()


def check_merged(model, x, y, shadow, calls):
    """Before and after an optimiser step the attack is that of the model as it is, and no LoRA layer runs in it."""
    fast = Fast(PGD(steps=2), shadow, capture=False)
    for _ in range(2):
        with untouched(model), torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            with torch.autocast("cpu", torch.bfloat16, enabled=shadow.precision == "bf16"):
                usual = model(x)
        assert calls
        calls.clear()
        with untouched(model), shadow.standing_in(), torch.no_grad():
            logits = shadow.forward(x)
        got = fast.run(x, y, THREAT, seed())
        assert not calls
        assert shadow.builds == 1
        # (W + sBA)x for Wx + sB(Ax), another order of the same additions, so rounding alone: as far from float64 as the
        # unmerged model (measured: 0.7 to 1.5 times; 12 and more with weights of a step ago).
        error, allowed = ((found - exact).square().mean().sqrt() for found in (logits, usual))
        assert error < 2 * allowed
        if shadow.precision == "fp32":
            want = PGD(steps=2).run(model, x, y, THREAT, generator=seed())
            # A few signs near zero turn.
            assert ((got.adv - want.adv).abs() < 1e-6).float().mean() > 0.99
        step(model)


@pytest.mark.parametrize(
    ("name", "precision", "copies"),
    [
        ("swin_micro_64", "fp32", False),
        ("swin_micro_64", "bf16", False),
        ("swin_micro_64", "bf16", True),
        ("vit_tiny_patch16_224", "fp32", False),
        ("resnet10t", "fp32", False),
        ("resnet10t", "bf16", True),
    ],
)
def test_lora_is_one_plain_layer_in_the_attack_and_never_a_step_behind(name, precision, copies, calls):
    model, x, y = tuned(name)
    check_merged(model, x, y, Shadow(model, precision, copies=copies), calls)


@pytest.mark.parametrize(("fault", "precision"), [("stale", "fp32"), ("stale", "bf16"), ("not merged", "fp32")])
def test_a_faulty_merge_is_found(fault, precision, monkeypatch, calls):
    """The check can fail."""
    model, x, y = tuned()
    shadow = Shadow(model, precision)
    if fault == "stale":
        refresh = shadow.refresh
        monkeypatch.setattr(shadow, "refresh", lambda: None if shadow.builds else refresh())
    else:
        monkeypatch.setattr("fastadv.standins._is_mergeable", lambda module: False)
    with pytest.raises(AssertionError, match=r"< \(2 \*" if fault == "stale" else "not "):
        check_merged(model, x, y, shadow, calls)


def test_a_recorded_attack_sees_the_merged_weights_of_now(calls):
    model, x, y = tuned()
    fast = PGD(steps=2).on(model, precision="fp32", capture="on")
    found = []
    for _ in range(2):
        found.append(fast(x, y, THREAT, seed()))
        assert torch.equal(found[-1], PGD(steps=2).on(model, precision="fp32")(x, y, THREAT, seed()))
        assert fast.captured
        step(model)
    assert not calls
    assert not torch.equal(*found)


def test_lora_convolutions_take_the_batch_norm_behind_them_in(calls):
    model, x, y = tuned("resnet10t")
    fast = PGD(steps=1).on(model, precision="fp32")
    fast(x, y, THREAT)
    with fast.shadow.standing_in():
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.layer1.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.layer1.modules())
    assert not calls


def test_merging_leaves_nothing_behind_also_after_an_error(calls):
    model, x, y = tuned()
    fast = PGD(steps=1).on(model, precision="fp32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, parameters = list(model.modules()), list(model.parameters())
    layers = [module for module in modules if isinstance(module, LoraAttention)]
    modes = [module.training for module in modules]
    model.head.register_forward_pre_hook(fail := Failing())
    for fails in (False, True):
        fail.now = fails
        if fails:
            with pytest.raises(ZeroDivisionError):
                fast(x, y, THREAT)
        else:
            fast(x, y, THREAT)
        assert not calls
        assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
        assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
        assert [module.training for module in modules] == modes
        assert all(type(layer.base.weight) is nn.Parameter for layer in layers)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(p.grad is None for p in parameters)
    fail.now = False
    model(x)
    assert len(calls) == len(layers) == 6


class Failing:
    now = False

    def __call__(self, module, inputs):
        if self.now:
            raise ZeroDivisionError


class Aside(nn.Module):
    """Adds to a layer's output, and has no plain layer that gives the same: it has a base, and nothing merged."""

    def __init__(self, base):
        super().__init__()
        self.base, self.calls = base, 0

    def forward(self, x):
        self.calls += 1
        return self.base(x) + x.square()


class Doubled(Aside):
    """Adds the layer's weight to itself."""

    def forward(self, x):
        self.calls += 1
        return 2 * self.base(x)

    def merged(self):
        return 2 * self.base.weight


def test_what_cannot_be_merged_runs_as_it_is(calls):
    shared = nn.Linear(192, 192, bias=False)
    aside, doubled = Aside(shared), Doubled(shared)
    # The same layer with an addition that can be merged, without any, with one that cannot, and merged again.
    model = nn.Sequential(nn.Flatten(), doubled, shared, aside, doubled, nn.Linear(192, 10))
    x, y = images(4), torch.arange(4)
    want = PGD(steps=2).run(model, x, y, THREAT, generator=seed())
    ran = aside.calls, doubled.calls
    got = PGD(steps=2).on(model, precision="fp32").run(x, y, THREAT, seed())
    assert ran == (3, 6)
    assert (aside.calls, doubled.calls) == (6, 6)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    # Who waits for a call gets it.
    seen = []
    doubled.register_forward_hook(lambda *call: seen.append(1))
    PGD(steps=2).on(model, precision="fp32").run(x, y, THREAT, seed())
    assert len(seen) == 6
    # In its own modes LoRA's dropout is on.
    tuned_model, x, y = tuned()
    PGD(steps=1, mode="as-is").on(tuned_model, precision="fp32")(x, y, THREAT)
    assert len(calls) == 6

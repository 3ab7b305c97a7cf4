"""An attack leaves no trace: whatever happens in it, the model, its gradients and the caller's modes are as before."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastadv.errors import FastadvError
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel

X, Y = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
THREAT = ThreatModel("linf", 8 / 255)
BOTH = ("plain", "fast")


def attack_on(model, how, x=X, y=Y, run=False, **settings):
    """The same attack, plain or accelerated."""
    attack = PGD(**{"steps": 2, **settings})
    if how == "plain":
        return (attack.run if run else attack)(model, x, y, THREAT, generator=torch.Generator().manual_seed(1))
    fast = attack.on(model, precision="fp32")
    return (fast.run if run else fast)(x, y, THREAT, generator=torch.Generator().manual_seed(1))


def picture(model):
    """Everything of a model an attack could change; tensors by identity, version and value."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [(name, id(tensor), type(tensor), tensor._version, tensor.requires_grad) for name, tensor in tensors],
        [(name, tensor.detach().clone()) for name, tensor in tensors],
        [(name, id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()],
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def awkward_model():
    """In train mode but for a batch norm, with a frozen layer, gradients already there, and a tied weight."""
    model = tiny_net()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model.add_module("tied", nn.Sequential(nn.Identity()))
    model[-1].register_parameter("same", model[7].weight)
    F.cross_entropy(model.train()(X), Y).backward()
    model[1].eval()
    return model


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("mode", ["eval", "as-is"])
@pytest.mark.parametrize("run", [False, True])
def test_nothing_of_the_model_changes(how, mode, run):
    model = awkward_model()
    before = picture(model)
    attack_on(model, how, run=run, mode=mode)
    after = picture(model)
    if mode == "as-is":
        # Statistics of a batch norm that trains are put back, which counts as a write.
        before, after = ([part for i, part in enumerate(p) if i != 1] for p in (before, after))
    assert same(before, after)


def test_the_picture_shows_a_change():
    changes = (
        lambda m: m[1].train(),
        lambda m: m[3].weight.requires_grad_(True),
        lambda m: m[0].weight.grad.zero_(),
        lambda m: setattr(m[0].weight, "grad", None),
        lambda m: m[1].running_mean.add_(1),
        lambda m: m.register_parameter("new", nn.Parameter(torch.ones(1))),
    )
    for change in changes:
        model = awkward_model()
        before = picture(model)
        change(model)
        assert not same(before, picture(model))


class Fragile(nn.Module):
    """Raises in its n-th forward, or in its n-th backward pass."""

    def __init__(self, inner, n, where):
        super().__init__()
        self.inner, self.n, self.where = inner, n, where
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        # Writes to one buffer and replaces another, also in eval mode. A fast attack first tries single images.
        self.calls += len(x) > 1
        self.replaced = self.replaced + 1
        if self.where == "forward" and self.calls == self.n:
            raise RuntimeError("the model broke")
        out = self.inner(x)
        if self.where == "backward" and self.calls == self.n:
            out.register_hook(self.fail)
        return out

    def fail(self, grad):
        raise RuntimeError("the model broke")


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("n", [1, 2])
def test_nothing_changes_when_the_model_raises(how, where, n):
    model = Fragile(awkward_model(), n, where)
    before = picture(model)
    with pytest.raises(RuntimeError, match="the model broke"):
        attack_on(model, how)
    after = picture(model)
    # The buffer that was written to is written back; everything else was never touched.
    assert same([part for i, part in enumerate(before) if i != 1], [part for i, part in enumerate(after) if i != 1])
    assert [entry[:3] for entry in before[1]] == [entry[:3] for entry in after[1]]


@pytest.mark.parametrize("how", BOTH)
def test_buffers_written_or_replaced_in_eval_mode_are_put_back(how):
    model = Fragile(awkward_model(), 99, "forward")
    calls, replaced = model.calls, model.replaced
    attack_on(model, how)
    assert model.calls is calls
    assert model.replaced is replaced
    assert calls.item() == replaced.item() == 0


@pytest.mark.parametrize("how", BOTH)
def test_nothing_changes_when_the_input_is_refused(how):
    model = awkward_model()
    before = picture(model)
    for x, y in ((X * 255, Y), (X, Y + 9)):
        with pytest.raises(FastadvError):
            attack_on(model, how, x, y)
    assert same(before, picture(model))


@pytest.mark.parametrize("how", BOTH)
def test_a_caller_may_be_in_any_grad_mode(how):
    model = tiny_net()
    want = attack_on(model, how, run=True)
    with torch.no_grad():
        no_grad = attack_on(model, how, run=True)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inference = attack_on(model, how, run=True)
        made_inside = attack_on(model, how, X.clone(), Y.clone(), run=True)
        assert torch.is_inference_mode_enabled()
    for got in (no_grad, inference, made_inside):
        assert torch.equal(got.adv, want.adv)
        assert torch.equal(got.loss, want.loss)
        assert not got.adv.is_inference()
        assert not got.adv.requires_grad


@pytest.mark.parametrize("how", BOTH)
def test_a_model_made_in_inference_mode_keeps_its_buffers(how):
    model = tiny_net()
    with torch.inference_mode():
        model[1].running_mean = torch.full((16,), 0.5)
    want = model[1].running_mean.clone()
    attack_on(model, how, mode="as-is", steps=0, run=True)
    assert torch.equal(model[1].running_mean, want)


def test_the_plain_attack_computes_as_the_callers_autocast_says_and_gives_float32():
    model = tiny_net()
    dtypes = []
    model[0].register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        result = attack_on(model, "plain", run=True)
        assert torch.is_autocast_enabled("cpu")
    assert set(dtypes) == {torch.bfloat16}
    assert result.adv.dtype == result.loss.dtype == torch.float32
    assert (result.adv.double() - X.double()).abs().max() <= torch.tensor(8 / 255).double()


def test_a_fast_attack_in_fp32_ignores_the_callers_autocast():
    model = tiny_net()
    want = attack_on(model, "fast")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attack_on(model, "fast"), want)


@pytest.mark.parametrize("how", BOTH)
def test_training_after_an_attack_in_the_same_autocast_gets_every_gradient(how):
    """Weights that a pass without gradients left in autocast's cache would swallow the parameters' gradients."""
    model = tiny_net()
    with torch.autocast("cpu", torch.bfloat16):
        adv = attack_on(model, how, run=True, steps=0).adv
        F.cross_entropy(model(adv).float(), Y).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in (model[0].weight, model[3].weight, model[7].weight)
    )


@pytest.mark.parametrize("how", BOTH)
def test_an_attack_between_forward_and_backward_of_a_training_step_does_not_disturb_it(how):
    model = tiny_net()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    F.cross_entropy(twin(X), Y).backward()
    torch.manual_seed(3)
    loss = F.cross_entropy(model(X), Y)
    attack_on(model, how, run=True, keep="best")
    loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("how", BOTH)
def test_the_model_is_attacked_in_eval_mode_whatever_its_mode(how):
    model = tiny_net()
    want = attack_on(copy.deepcopy(model).eval(), how)
    assert torch.equal(attack_on(model, how), want)
    assert not torch.equal(attack_on(model, how, mode="as-is"), want)


@pytest.mark.parametrize("how", BOTH)
def test_a_module_whose_eval_has_side_effects_is_spared_them(how):
    class Merging(nn.Linear):
        """As in LoRA libraries: eval() merges weights."""

        def train(self, mode=True):
            raise AssertionError("train() or eval() was called")

    attack_on(nn.Sequential(nn.Flatten(), Merging(192, 10)), how)


class Recurrent(nn.Module):
    """An LSTM keeps a second list of its weights."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(64, 10, batch_first=True)

    def forward(self, x):
        return self.lstm(x.flatten(2))[0][:, -1]


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("kind", ["traced", "parametrized", "recurrent"])
# torch.jit is on its way out, and says so.
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_modules_that_keep_their_weights_in_other_ways_work_too(how, kind):
    if kind == "traced":
        model = torch.jit.trace(tiny_net().eval(), X).train()
    elif kind == "parametrized":
        model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(192, 10)))
    else:
        model = Recurrent()
    values, modes = [p.detach().clone() for p in model.parameters()], [m.training for m in model.modules()]
    adv = attack_on(model, how)
    assert (adv != X).all()
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.grad is None for p in model.parameters())
    assert same(values, [p.detach() for p in model.parameters()])
    assert modes == [m.training for m in model.modules()]


@pytest.mark.parametrize("how", BOTH)
def test_under_data_parallel_the_inner_module_is_attacked_and_nothing_is_reduced(how, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = tiny_net()
        want = attack_on(model, how)
        parallel = DistributedDataParallel(model)
        reduced = []

        def count(state, bucket):
            reduced.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        parallel.register_comm_hook(None, count)
        assert torch.equal(attack_on(parallel, how), want)
        assert not reduced
        F.cross_entropy(parallel(X), Y).backward()
        assert reduced
    finally:
        torch.distributed.destroy_process_group()

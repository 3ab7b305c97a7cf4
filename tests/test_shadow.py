"""The shadow: during a fast attack no parameter can get a gradient, and no weight is ever a stale one."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import images, seed
from torch import nn

from fastadv.errors import DataError
from fastadv.pgd import PGD
from fastadv.threat import ThreatModel

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

"""Recorded attacks: replays give what the same attack gives unrecorded, whatever happens between them.

On a CPU a replay is a call, so all that is shown here, but the graph itself, is shown without a GPU.
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from analytic import Affine, images, seed
from conftest import tiny_net
from torch import nn

from fastadv.capture import CaptureError, Recorder
from fastadv.engine import BatchTooLarge
from fastadv.errors import DataError, NonFiniteGradientError
from fastadv.pgd import PGD
from fastadv.shadow import Shadow
from fastadv.threat import ThreatModel

THREAT = ThreatModel("linf", 8 / 255)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def batch(n, number=0, device="cpu"):
    return images(n, seed=100 + number).to(device), (torch.arange(n) % 10).to(device)


def both(attack, model, **settings):
    """The attack unrecorded and recorded."""
    return attack.on(model, capture="off", **settings), attack.on(model, capture="on", **settings)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def scale_in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)


def replace_weight(model):
    model[3].weight = nn.Parameter(-model[3].weight.detach())


def replace_module(model):
    model[7] = nn.Linear(256, 10, device=model[7].weight.device)


def replace_data(model):
    model[0].weight.data = -model[0].weight.data


def replace_statistics(model):
    model[1].running_mean = torch.full_like(model[1].running_mean, 0.3)


CHANGES = [scale_in_place, replace_weight, replace_module, replace_data, replace_statistics]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings", [{}, {"keep": "best"}, {"keep": "success", "restarts": 2}, {"loss": "margin"}, {"targeted": True}]
)
def test_replays_are_the_attack_bit_for_bit_while_weights_and_callers_tensors_change(settings, precision, device):
    model = tiny_net().to(device)
    attack = PGD(**{"steps": 4, **settings})
    plain, recorded = both(attack, model, precision=precision, compile="off")
    for number, change in enumerate([None, *CHANGES]):
        if change:
            change(model)
        x, y = batch(8, number, device)
        want = plain.run(x.clone(), y.clone(), THREAT, seed())
        got = recorded.run(x, y, THREAT, seed())
        x.fill_(math.nan)
        y.fill_(-1)
        assert equal(got, want)
        assert recorded.captured
        assert not plain.captured
        assert recorded.launches_per_batch == attack.restarts
        kept = [part.clone() for part in got]
        recorded.run(*batch(8, 50, device), THREAT, seed(1))
        assert equal(got, kept), "a result changed in the next replay"
    assert recorded.recordings.recorder.graphs == (device == "cuda")


def test_a_stale_recording_would_be_seen(monkeypatch):
    """The check that notices replaced weights, switched off: the test above must then be able to fail."""
    model = tiny_net()
    plain, recorded = both(PGD(steps=2), model, precision="fp32")
    x, y = batch(8)
    recorded(x, y, THREAT, seed())
    is_current = Shadow._is_current
    monkeypatch.setattr(Shadow, "_is_current", lambda shadow: shadow is recorded.shadow or is_current(shadow))
    replace_weight(model)
    assert not torch.equal(recorded(x, y, THREAT, seed()), plain(x, y, THREAT, seed()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("keep", ["last", "success"])
def test_a_ragged_batch_is_padded_and_its_padding_seen_nowhere(norm, keep, device):
    model = tiny_net().to(device)
    threat = ThreatModel(norm, {"linf": 8 / 255, "l2": 0.5}[norm])
    attack = PGD(steps=3, keep=keep, random_start=False)
    plain, recorded = both(attack, model, precision="fp32", compile="off")
    recorded.run(*batch(8, device=device), threat)
    for n in (5, 7, 3):
        x, y = batch(n, n, device)
        got = recorded.run(x, y, threat)
        assert recorded.health.bad.shape == (n,)
        # On a GPU another batch size may be another kernel: compare with a batch that the caller has padded.
        padded = torch.cat([x, x[:1].expand(8 - n, -1, -1, -1)]), torch.cat([y, y[:1].expand(8 - n)])
        assert equal(got, [part[:n] for part in plain.run(*padded, threat)])
        assert torch.equal(got.success, plain.run(x, y, threat).success)
    assert len(recorded.recordings._kept) == 1


def test_bad_numbers_are_those_of_the_images_given_and_never_of_the_padding():
    class Cliff(Affine):
        """Logits break for images that are bright on average."""

        def forward(self, x):
            return torch.where(x.flatten(1).mean(1, keepdim=True) > 0.55, math.nan, super().forward(x))

    model = Cliff(classes=10)
    x, y = batch(8)
    x[0] = 0.6
    attack = PGD(steps=2, step_size=1 / 255)
    recorded = attack.on(model, precision="fp32", capture="on")
    recorded(x[1:], y[1:], THREAT, seed())
    # The first image pads the rest.
    with pytest.raises(NonFiniteGradientError, match="from step 0 on, in 1 of 3 images: 0;"):
        recorded(x[:3], y[:3], THREAT, seed())
    assert recorded.captured
    recorded(x[:3], y[:3], THREAT, seed(), wait=False)
    assert recorded.health.bad.tolist() == [1, 0, 0]
    first = recorded.health
    recorded(x[1:4], y[1:4], THREAT, seed())
    assert first.bad.tolist() == [1, 0, 0], "a later replay changed the health of an earlier one"


@pytest.mark.parametrize("device", DEVICES)
def test_another_kind_of_batch_never_replays_an_old_recording(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)).to(device)
    plain, recorded = both(PGD(steps=3), model, precision="fp32", compile="off")
    x, y = batch(6, device=device)
    mask = torch.rand(8, 8, generator=seed()).to(device) < 0.7
    kinds = [
        (x, THREAT, {}),
        (x, ThreatModel("linf", 2 / 255), {}),
        (x, THREAT, {"eps": torch.linspace(0, 0.1, 6, device=device)}),
        (x, THREAT, {"mask": mask}),
        (x, THREAT, {"mask": ~mask}),
        (x.to(memory_format=torch.channels_last), THREAT, {}),
        (torch.cat([x, x], 3), THREAT, {}),
        (x, ThreatModel("l2", 0.5), {}),
        (x, ThreatModel("linf", 8 / 255, box=(0.0, 0.69)), {}),
        (torch.cat([x, x]), THREAT, {}),
    ]
    for _ in range(2):
        for z, threat, more in kinds:
            z = z.clamp(*threat.box)
            labels = y if len(z) == 6 else torch.cat([y, y])
            want = plain(z, labels, threat, seed(), **more)
            got = recorded(z, labels, threat, seed(), **more)
            assert torch.equal(got, want)
            assert got.stride() == want.stride()
            assert recorded.captured
    # Neither the radius nor the mask's values make another kind, and the list stays short.
    assert len(recorded.recordings._kept) <= 8


@pytest.mark.parametrize("drop", [False, True])
def test_batches_that_vary_in_size_need_few_recordings(drop):
    model = tiny_net()
    plain, recorded = both(PGD(steps=2, keep="success"), model, precision="fp32")
    for n in (33, 34, 36, 35, 40, 39, 38, 37, 33):
        x, y = batch(n, n)
        got, want = recorded.run(x, y, THREAT, seed(), drop=drop), plain.run(x, y, THREAT, seed(), drop=drop)
        assert torch.equal(got.success, want.success)
        assert recorded.captured
    # 33, then 40; with dropping their halves and quarters too, as far as they were needed.
    sizes = [size for _, size in recorded.recordings._kept]
    assert max(sizes) == 40
    assert len(sizes) <= (6 if drop else 2)


def test_noise_is_that_of_the_unrecorded_attack(task):
    model, x, y = task
    plain, recorded = both(PGD(steps=1), model, precision="fp32")
    for n in (16, 16, 9):
        one, other = seed(), seed()
        plain(x[:n], y[:n], THREAT, one)
        recorded(x[:n], y[:n], THREAT, other)
        assert torch.equal(one.get_state(), other.get_state())
    state = torch.get_rng_state()
    recorded(x[:16], y[:16], THREAT, seed())
    assert torch.equal(state, torch.get_rng_state())


def test_auto_records_nothing_on_a_cpu():
    fast = PGD(steps=1).on(tiny_net())
    fast(*batch(2), THREAT)
    assert not fast.captured
    assert fast.launches_per_batch == 0
    assert not fast.compiled


def test_a_label_without_a_class_is_refused_before_a_replay():
    recorded = PGD(steps=1).on(tiny_net(), precision="fp32", capture="on")
    x, y = batch(4)
    want = recorded(x, y, THREAT, seed())
    with pytest.raises(DataError, match="label 12"):
        recorded(x, y + 9, THREAT)
    assert torch.equal(recorded(x, y, THREAT, seed()), want)
    assert recorded.captured


@pytest.mark.parametrize("keep", ["last", "best"])
def test_an_empty_batch_and_no_steps_need_no_recording(keep):
    recorded = PGD(steps=0, keep=keep).on(tiny_net(), capture="on")
    x, y = batch(4)
    assert recorded(x, y, THREAT).shape == x.shape
    assert not recorded.captured
    recorded = PGD(steps=2, keep=keep).on(tiny_net(), capture="on")
    assert recorded(x[:0], y[:0], THREAT).shape == (0, 3, 8, 8)


class Counts(Affine):
    """Counts its forward passes in a buffer, also in eval mode."""

    def __init__(self):
        super().__init__(10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Draws(Affine):
    """Adds noise to what it sees, also in eval mode."""

    def forward(self, x):
        return super().forward(x + 0.01 * torch.randn_like(x))


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (Counts(), {}, "Counts run without capture: it writes to its buffers in eval mode"),
        (tiny_net(), {"mode": "as-is"}, "Sequential run without capture: its mode is 'as-is'"),
    ],
)
def test_what_cannot_be_replayed_is_attacked_unrecorded_and_says_so_once(model, settings, reason):
    plain, recorded = both(PGD(steps=2, **settings), model, precision="fp32")
    x, y = batch(4)
    with pytest.warns(UserWarning, match=f"^fastadv: attacks on {reason}$") as caught:
        torch.manual_seed(1)
        got = recorded(x, y, THREAT, seed())
    assert len(caught) == 1
    assert not recorded.captured
    torch.manual_seed(1)
    assert torch.equal(got, plain(x, y, THREAT, seed()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded(x, y, THREAT, seed())


def test_a_recording_that_fails_is_one_line_and_an_unrecorded_attack(monkeypatch):
    def refuse(recorder, work):
        raise CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recorder, "record", refuse)
    plain, recorded = both(PGD(steps=2, keep="success"), tiny_net(), precision="fp32")
    x, y = batch(4)
    with pytest.warns(UserWarning, match="without capture: operation not permitted") as caught:
        got = recorded.run(x, y, THREAT, seed())
    assert len(caught) == 1
    assert equal(got, plain.run(x, y, THREAT, seed()))
    assert equal(recorded.run(x, y, THREAT, seed(), drop=True), plain.run(x, y, THREAT, seed(), drop=True))


def test_a_model_that_is_random_in_eval_mode_is_told_once_and_not_recorded():
    x, y = batch(4)
    fast = PGD(steps=1).on(Draws(10))
    with pytest.warns(UserWarning, match="Draws draws random numbers in eval mode") as caught:
        fast(x, y, THREAT, seed())
        fast(x, y, THREAT, seed())
    assert len(caught) == 1
    fast = PGD(steps=1).on(Draws(10), capture="on")
    with pytest.warns(UserWarning) as caught:
        fast(x, y, THREAT, seed())
    assert "without capture: it draws random numbers" in str(caught[0].message)
    assert not fast.captured
    # Dropout is not random in eval mode.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(steps=1).on(tiny_net())(x, y, THREAT, seed())


def test_a_caller_may_be_in_any_grad_mode_when_something_is_recorded():
    model = tiny_net()
    x, y = batch(4)
    want = PGD(steps=2).on(model, precision="fp32")(x, y, THREAT, seed())
    recorded = PGD(steps=2).on(model, precision="fp32", capture="on")
    with torch.inference_mode():
        inside = recorded(x, y, THREAT, seed())
    with torch.no_grad():
        again = recorded(x, y, THREAT, seed())
    for got in (inside, again, recorded(x, y, THREAT, seed())):
        assert torch.equal(got, want)
        assert not got.is_inference()


class Hungry(Affine):
    """Asks for more memory than there is when it sees more than four images."""

    def forward(self, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.\nGPU 0 has ...")
        return super().forward(x)


@pytest.mark.parametrize("capture", ["on", "off"])
def test_out_of_memory_names_a_batch_that_would_fit(capture):
    fast = PGD(steps=1).on(Hungry(10), precision="fp32", capture=capture)
    with pytest.raises(BatchTooLarge) as refusal:
        fast(*batch(8), THREAT)
    assert refusal.value.what == (
        "out of memory in an attack on 8 images (CUDA out of memory. Tried to allocate 12.00 GiB.)"
    )
    assert refusal.value.fix == "attack 4 images at a time (--batch-size)"
    assert refusal.value.exit_code == 6
    assert fast(*batch(4), THREAT).shape == (4, 3, 8, 8)


class FakeGraph:
    """Stands for a CUDA graph: replays by calling, and breaks as CUDA does, when the recording ends."""

    def __init__(self, broken=False):
        self.broken = broken

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None or self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.fixture
def fake_cuda(monkeypatch):
    """A recorder that takes itself for one on CUDA."""

    class Stream:
        def wait_stream(self, other):
            pass

    fakes = {
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: Stream(),
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "CUDAGraph": FakeGraph,
        "graph": lambda graph, **options: graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    recorder = Recorder(torch.device("cuda"))
    recorder.device = torch.device("cpu")
    return recorder


def test_work_that_waits_for_the_device_is_noticed_before_anything_is_recorded(fake_cuda):
    def waits():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    assert fake_cuda.warm(lambda: None) is False
    assert fake_cuda.warm(waits) is True
    with pytest.warns(UserWarning, match="something else"):
        assert fake_cuda.warm(lambda: warnings.warn("something else", stacklevel=1)) is False

    class Reads(Affine):
        def forward(self, x):
            waits()
            return super().forward(x)

    fast = PGD(steps=2).on(Reads(10), precision="fp32", capture="on")
    fast.recordings.recorder = fake_cuda
    x, y = batch(4)
    with pytest.warns(UserWarning) as caught:
        got = fast(x, y, THREAT, seed())
    said = [str(warning.message) for warning in caught if "called" not in str(warning.message)]
    assert said == ["fastadv: attacks on Reads run without capture: it waits for the device"]
    assert torch.equal(got, PGD(steps=2).on(Affine(10), precision="fp32")(x, y, THREAT, seed()))


def test_the_reason_of_a_failed_recording_is_what_broke_it_and_not_how_it_ended(fake_cuda):
    def breaks():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    with pytest.raises(CaptureError, match=r"^CUDA error: operation not permitted when stream is capturing$"):
        fake_cuda.record(breaks)

    def runs_out():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        fake_cuda.record(runs_out)


@pytest.mark.gpu
def test_on_cuda_a_replay_never_waits_and_a_model_that_reads_the_device_is_not_recorded(task):
    model, x, y = task
    net = tiny_net().cuda()
    net.load_state_dict(model.state_dict())
    x, y = x.cuda(), y.cuda()
    fast = PGD(keep="success").on(net, compile="off")
    fast(x, y, THREAT, torch.Generator("cuda").manual_seed(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(x, y, THREAT, torch.Generator("cuda").manual_seed(0), wait=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fast.captured
    assert fast.launches_per_batch == 1

    class Branches(Affine):
        def forward(self, x):
            return super().forward(x) if x.mean() > 0 else super().forward(-x)

    fast = PGD(steps=2).on(Branches(10).cuda(), compile="off", precision="fp32")
    with pytest.warns(UserWarning, match="Branches run without capture: it waits for the device"):
        got = fast(x, y, THREAT, seed())
    # CUDA works on after the failed recording.
    assert torch.equal(
        got, PGD(steps=2).on(fast.model, capture="off", compile="off", precision="fp32")(x, y, THREAT, seed())
    )

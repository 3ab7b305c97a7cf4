"""The same attack, faster: stand-ins without gradients, bf16 and compiled where that pays, recorded once and replayed.

What the attack means stands in climb.py, and its loop runs here too; the image, the step and the ball stay float32.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from fastadv import ops
from fastadv.capture import RecordedTeams, Recordings
from fastadv.climb import AttackResult, climb, starting_point
from fastadv.errors import FastadvError, SettingsError
from fastadv.inputs import Inputs, check_inputs
from fastadv.losses import AttackLoss, attack_loss
from fastadv.passes import Health, Passes, unwrapped
from fastadv.pgd import PGD
from fastadv.registry import did_you_mean
from fastadv.shadow import Shadow, ShadowPasses, device_of
from fastadv.survivors import climb_survivors
from fastadv.threat import ThreatModel

PRECISIONS = ("auto", "bf16", "fp32")
SWITCHES = ("auto", "on", "off")


class BatchTooLarge(FastadvError):
    """The device has not enough memory for an attack on that many images."""

    exit_code = 6


def native_bf16(device: torch.device | str) -> bool:
    """Whether ``device`` computes in bfloat16 itself: a CPU with AVX512-BF16 or AMX, a GPU from Ampere on."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    # Emulated bfloat16 is slower than float32. The public query is younger than torch 2.11's.
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def accelerate(
    attack: PGD, model: nn.Module, *, precision: str = "auto", compile: str = "auto", capture: str = "auto"
) -> Fast:
    """``attack`` bound to ``model``: a faster callable ``(x, y, threat, generator=None) -> adv``.

    precision: bf16, fp32, or auto (bf16 where the device computes in it natively). compile: the model's passes by
    torch.compile. capture: the loop recorded once per kind of batch and replayed, on CUDA as a graph. Both: on, off, or
    auto, which is on for CUDA alone. The model keeps its parameters; stand-ins are in their place only while an attack
    runs.
    Raises: SettingsError for an attack that is no PGD and for an unknown setting.
    """
    if not isinstance(attack, PGD):
        raise SettingsError(f"attack is a {type(attack).__name__}", "only fastadv.pgd.PGD can be accelerated")
    for name, value in (("compile", compile), ("capture", capture)):
        if value not in SWITCHES:
            raise SettingsError(f"unknown {name} {value!r}", did_you_mean(str(value), SWITCHES))
    shadow = _shadow(model, precision, attack.mode, compile)
    return Fast(attack, shadow, capture=_is_on(capture, device_of(shadow.model)))


def shadow_passes(
    model: nn.Module,
    loss: AttackLoss,
    *,
    mode: str = "eval",
    num_labels: int = 0,
    precision: str = "auto",
    seeded: bool = False,
) -> Passes:
    """Passes through the shadow of ``model``, for an attack with a loop of its own.

    As :class:`fastadv.passes.Passes`; ``gradient`` and ``forward`` compute in ``precision`` (bf16, fp32 or auto),
    ``score`` in float32. Changes of weights are seen the next time the passes are opened.
    Raises: SettingsError for what is no module and for an unknown precision.
    """
    return ShadowPasses(_shadow(model, precision, mode, "off"), loss, mode, num_labels, seeded=seeded)


class Fast:
    """A PGD attack bound to a model, faster. Made by :func:`accelerate`.

    Images, steps, ball and final scores are float32. In bf16 what the rounded iterates claim is scored again in float32
    before it counts as success. Forward hooks added after the first call may not run, and neither do the model's own
    side effects in Python, where the loop is replayed.
    """

    def __init__(self, attack: PGD, shadow: Shadow, *, capture: bool) -> None:
        self.attack, self.shadow, self.model = attack, shadow, shadow.model
        self.recordings = Recordings(attack, shadow, on=capture)
        self.health: Health | None = None
        """What the last call met: ``.bad``, int32 (B,) on the device, and ``.check()``, which reads it and raises."""
        self._said_random = False

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        *,
        eps: Tensor | None = None,
        mask: Tensor | None = None,
        wait: bool = True,
    ) -> Tensor:
        """As :meth:`fastadv.pgd.PGD.__call__`.

        wait=False never waits for the device, after a first call that records: ranges and labels are then not checked,
        and NaN or infinity met on the way is left in ``health`` for the caller to read later.
        Raises: BatchTooLarge (exit code 6) where memory ends.
        """
        return self._attack(x, y, threat, generator, eps, mask, scored=False, wait=wait).adv

    def run(
        self,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None = None,
        *,
        eps: Tensor | None = None,
        mask: Tensor | None = None,
        drop: bool = False,
    ) -> AttackResult:
        """As :meth:`fastadv.pgd.PGD.run`. drop: broken images leave the batch at once, for keep="success".

        The verdict is the same; a model that breaks easily is attacked in a fraction of the time.
        """
        if drop and self.attack.keep != "success":
            raise SettingsError(f"drop=True with keep={self.attack.keep!r}", 'PGD(keep="success"), or drop=False')
        return self._attack(x, y, threat, generator, eps, mask, scored=True, wait=True, drop=drop)

    def refresh(self) -> None:
        """Take over changed weights now. Every call does so by itself, also for parameters and modules replaced."""
        self.shadow.refresh()

    @property
    def precision(self) -> str:
        """bf16 or fp32, of the gradient passes. Becomes fp32, with a warning, where the model cannot do bf16."""
        return self.shadow.precision

    @property
    def compiled(self) -> bool:
        """Whether the gradient passes are compiled. Becomes False, with a warning, where that fails."""
        return self.shadow.compile

    @property
    def captured(self) -> bool:
        """Whether the last call was a replay of recorded work."""
        return self.launches_per_batch > 0

    @property
    def launches_per_batch(self) -> int:
        """How many recordings the last call replayed: on CUDA, graph launches."""
        return self.recordings.launches

    @property
    def body(self) -> str:
        """Which body of the fused step runs on the model's device: cpp, triton or reference."""
        return ops.body("linf_step", device_of(self.model))

    def _attack(
        self,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None,
        eps: Tensor | None,
        mask: Tensor | None,
        *,
        scored: bool,
        wait: bool,
        drop: bool = False,
    ) -> AttackResult:
        given = check_inputs(x, y, threat, eps, mask, values=wait)
        loss, mode = self.attack.loss, self.attack.mode
        passes = ShadowPasses(self.shadow, attack_loss(loss), mode, given.num_labels, seeded=loss == "ce")
        self.recordings.launches = 0
        try:
            # Tensors that stay must not be inference tensors, whatever the caller is in.
            with torch.inference_mode(False), torch.no_grad():
                result, self.health = self._climb(passes, given, threat, generator, scored=scored, drop=drop)
        except (RuntimeError, MemoryError) as error:
            refusal = _too_large(len(x), error)
            if refusal is None:
                raise
            raise refusal from error
        if self.shadow.draws and mode == "eval" and not self._said_random:
            self._said_random = True
            warnings.warn(
                f"fastadv: {type(self.model).__name__} draws random numbers in eval mode: each step sees one draw, and "
                "the model looks more robust than it is",
                stacklevel=3,
            )
        if wait:
            self.health.check()
        return result

    def _climb(
        self,
        passes: ShadowPasses,
        given: Inputs,
        threat: ThreatModel,
        generator: torch.Generator | None,
        *,
        scored: bool,
        drop: bool,
    ) -> tuple[AttackResult, Health]:
        """By replays where there is a recording or one can be made, else as it is."""
        settings, count = self.attack, len(given.x)
        if drop and count:
            teams = RecordedTeams(self.recordings, passes, given, threat)
            return climb_survivors(settings, passes, given, threat, generator, teams)
        recording = self.recordings.find(passes, given, threat, scored=scored) if count and settings.steps else None
        if recording is None:
            return climb(settings, passes, given, threat, generator, scored=scored)
        recording.climber.load(given)
        for _ in range(settings.restarts):
            recording.climber.start(starting_point(settings, given, threat, generator))
            self.recordings.replay(recording)
        return recording.result(count)


def _shadow(model: nn.Module, precision: str, mode: str, compile: str) -> Shadow:
    """The shadow of ``model``. Raises SettingsError for what is no module and for an unknown precision."""
    model = unwrapped(model)
    if precision not in PRECISIONS:
        raise SettingsError(f"unknown precision {precision!r}", did_you_mean(str(precision), PRECISIONS))
    device = device_of(model)
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    return Shadow(model, precision, mode=mode, compile=_is_on(compile, device))


def _is_on(switch: str, device: torch.device) -> bool:
    # On a CPU a replay is a call, and Inductor takes a minute or more to compile for 1.2x (a small network) to 1.3x
    # (swin_micro_64): only for whoever asks.
    return switch == "on" or (switch == "auto" and device.type == "cuda")


def _too_large(images: int, error: Exception) -> BatchTooLarge | None:
    """What to raise for ``error`` where memory was the reason: it names a batch size."""
    text = str(error).partition("\n")[0]
    # On the CPU torch raises a plain RuntimeError.
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in text:
        return None
    fix = f"attack {images // 2} images at a time (--batch-size)" if images > 1 else "take a smaller model or image"
    return BatchTooLarge(f"out of memory in an attack on {images} images ({text or type(error).__name__})", fix)

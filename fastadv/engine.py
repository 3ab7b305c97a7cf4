"""The same attack, faster: parameters detached, bf16 inside where the device has it, a seed instead of a loss.

What the attack means stands in pgd.py, and its loop runs here too; the image, the step and the ball stay float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fastadv import ops
from fastadv.errors import SettingsError
from fastadv.inputs import check_inputs
from fastadv.losses import attack_loss
from fastadv.passes import Health, Passes, unwrapped
from fastadv.pgd import PGD, AttackResult, climb
from fastadv.registry import did_you_mean
from fastadv.threat import ThreatModel

PRECISIONS = ("auto", "bf16", "fp32")


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

    precision: bf16, fp32, or auto (bf16 where the device computes in it natively). compile and capture: auto or off;
    neither exists yet, so both mean off. The model keeps its parameters; they are taken out only while an attack runs.
    Raises: SettingsError for an attack that is no PGD, an unknown setting, or one that is not available yet.
    """
    if not isinstance(attack, PGD):
        raise SettingsError(f"attack is a {type(attack).__name__}", "only fastadv.pgd.PGD can be accelerated")
    if precision not in PRECISIONS:
        raise SettingsError(f"unknown precision {precision!r}", did_you_mean(str(precision), PRECISIONS))
    for name, value in (("compile", compile), ("capture", capture)):
        if value == "on":
            raise SettingsError(f"{name} is 'on', which is not available yet", f'{name}="auto" takes it once it is')
        if value not in ("auto", "off"):
            raise SettingsError(f"unknown {name} {value!r}", did_you_mean(str(value), ("auto", "off")))
    model = unwrapped(model)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    return Fast(attack, model, precision, device)


class Fast:
    """A PGD attack bound to a model, faster. Made by :func:`accelerate`.

    Images, steps, ball and final scores are float32. In bf16 what the rounded iterates claim is scored again in float32
    before it counts as success.
    """

    def __init__(self, attack: PGD, model: nn.Module, precision: str, device: torch.device) -> None:
        self.attack, self.model, self.device = attack, model, device
        self.precision = precision
        """bf16 or fp32, of the gradient passes. Becomes fp32, with a warning, where the model cannot do bf16."""
        self.bf16_works = False
        self.health: Health | None = None
        """What the last call met: ``.bad``, int32 (B,) on the device, and ``.check()``, which reads it and raises."""
        self.refresh()

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

        wait=False never waits for the device: ranges and labels are then not checked, and NaN or infinity met on the
        way is left in ``health`` for the caller to read later.
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
    ) -> AttackResult:
        """As :meth:`fastadv.pgd.PGD.run`."""
        return self._attack(x, y, threat, generator, eps, mask, scored=True, wait=True)

    def refresh(self) -> None:
        """Call after a weight change. Finds the model's parameters anew, also those in modules that were replaced."""
        self.slots = [
            (module._parameters, name)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    @property
    def body(self) -> str:
        """Which body of the fused step runs on the model's device: cpp, triton or reference."""
        return ops.body("linf_step", self.device)

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
    ) -> AttackResult:
        given = check_inputs(x, y, threat, eps, mask, values=wait)
        passes = ShadowPasses(self, given.num_labels)
        result, self.health = climb(self.attack, passes, given, threat, generator, scored=scored)
        if wait:
            self.health.check()
        return result


class ShadowPasses(Passes):
    """Passes through a model that holds, meanwhile, detached tensors instead of its parameters.

    No gradient can be computed for them or reach them, and what an optimiser changes in place is seen at once.
    """

    def __init__(self, fast: Fast, num_labels: int) -> None:
        attack = fast.attack
        super().__init__(fast.model, attack_loss(attack.loss), attack.mode, num_labels, seeded=attack.loss == "ce")
        self.fast = fast

    @contextmanager
    def opened(self, device: torch.device) -> Iterator[None]:
        """As for :class:`Passes`, with the parameters taken out; a caller's autocast is ignored."""
        # Once per attack: torch.func.functional_call swaps in each pass, which costs 1 ms for swin_tiny's 190 tensors.
        originals = [(holder, name, holder[name]) for holder, name in self.fast.slots if name in holder]
        with super().opened(device):
            self.precision = nullcontext()
            self.rounded = self.fast.precision == "bf16"
            try:
                for holder, name, parameter in originals:
                    # A tensor that is no Parameter, as functional_call puts there too.
                    holder[name] = parameter if parameter is None else parameter.detach()  # type: ignore[assignment]
                yield
            finally:
                for holder, name, parameter in originals:
                    holder[name] = parameter

    def forward(self, adv: Tensor) -> Tensor:
        """What the model makes of ``adv``, in bf16 where that is asked for and works."""
        if self.fast.precision == "fp32":
            return super().forward(adv)
        bf16 = torch.autocast(adv.device.type, torch.bfloat16)
        try:
            with bf16:
                logits = super().forward(adv)
            if not self.fast.bf16_works and isinstance(logits, Tensor) and logits.requires_grad:
                # Once per model: an operation may have a bf16 forward and no bf16 backward.
                torch.autograd.grad(logits.sum(), adv, retain_graph=True)
                self.fast.bf16_works = True
            return logits
        except RuntimeError as error:
            if self.fast.bf16_works or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).partition("\n")[0]
        # Where float32 fails too, it was not bf16, and its error is the one to see.
        logits = super().forward(adv)
        self.fast.precision = "fp32"
        warnings.warn(
            f"fastadv: attacks on {type(self.model).__name__} run in fp32: bf16 fails ({reason})", stacklevel=2
        )
        return logits

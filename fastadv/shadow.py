"""The model as a fast attack sees it: while an attack runs, stand-ins take the place of its parameters.

No gradient can be computed for them or reach them. They are made anew when weights are replaced and brought up to date
in place when weights change, so compiled code and graphs may hold their addresses. Shapes: adv (B, C, H, W) float32.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fastadv.losses import AttackLoss
from fastadv.passes import Passes
from fastadv.patches import patch_layers
from fastadv.standins import Slot, StandIns, detached, folded, merged, rounded, wants_channels_last, window_blocks

_ABSENT = object()
# What belongs into the slots that stand-ins are in at this moment.
_DISPLACED: WeakKeyDictionary[nn.Module, list[Slot]] = WeakKeyDictionary()


class Shadow:
    """What stands in for a model during an attack, in which precision it computes, and whether compiled.

    copies: hold bf16 copies of a timm backbone's weights instead of casting them in every pass (default: on CUDA).
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        *,
        mode: str = "eval",
        compile: bool = False,
        copies: bool | None = None,
    ) -> None:
        self.model, self.mode, self.compile = model, mode, compile
        self.precision = precision
        """bf16 or fp32, of the gradient passes. Becomes fp32, with a warning, where the model cannot do bf16."""
        self.copies = device_of(model).type == "cuda" if copies is None else copies
        self.proven = False
        """Whether precision and compiled code have worked in a pass."""
        self.draws = False
        """Whether a forward pass has drawn random numbers."""
        self._compared = False
        self.builds = 0
        """How often the stand-ins were made anew: whoever holds their addresses compares."""
        self.exact = self.inexact = StandIns([], None)
        self._layouts: dict[torch.Size, bool] = {}
        self._structure: list[tuple[Any, tuple[Any, ...]]] = []
        self._addresses: list[tuple[Tensor, int]] = []

    def refresh(self) -> None:
        """Bring the stand-ins up to date; make them anew if a module, parameter or buffer of the model is another."""
        with _as_it_is(self.model):
            if not self._is_current():
                self._build()
            if self.inexact.update:
                self.inexact.update()

    @contextmanager
    def standing_in(self, *, exactly: bool = False) -> Iterator[None]:
        """Inside, stand-ins are in the model; with ``exactly`` those in float32, of a score."""
        with _as_it_is(self.model):
            if not exactly:
                self.refresh()
            # Once per attack: torch.func.functional_call swaps in each pass, 1 ms for swin_tiny's 190 tensors.
            _DISPLACED[self.model] = put((self.exact if exactly else self.inexact).slots)
            try:
                yield
            finally:
                put(_DISPLACED.pop(self.model))

    def forward(self, adv: Tensor) -> Tensor:
        """What the model, with the stand-ins in it, makes of ``adv``."""
        autocast = self.precision == "bf16" and not self.copies
        if self._wants_channels_last(adv):
            adv = adv.contiguous(memory_format=torch.channels_last)
        with torch.autocast(adv.device.type, torch.bfloat16) if autocast else nullcontext():
            logits: Tensor = self._compiled(adv) if self.compile else self.model(adv)
        return logits

    def give_up(self, reason: str) -> None:
        """Go on without compiled code, or else without bf16 copies, or else without bf16, and say so."""
        reason = reason.partition("\n")[0]
        if self.compile:
            self.compile, said = False, f"uncompiled: torch.compile fails ({reason})"
        elif self.copies:
            self._go_exact()
            self.copies, said = False, f"under autocast: bf16 weights fail ({reason})"
        else:
            self.precision, said = "fp32", f"in fp32: bf16 fails ({reason})"
        warnings.warn(f"fastadv: attacks on {type(self.model).__name__} run {said}", stacklevel=2)

    def check_folds(self, adv: Tensor) -> None:
        """Go on without folding where the first of ``adv`` gets other logits by it: the layers' order is a guess."""
        if self._compared or self.copies or self.inexact is self.exact:
            return
        self._compared = True
        one = adv[:1].detach()
        with torch.no_grad():
            try:
                found = self.model(one)
                with self.standing_in(exactly=True):
                    exact = self.model(one)
                # Folding moves logits by 1e-6 of their size, a wrong order by all of it. NaN is the attack's to report.
                wrong = bool(((found - exact).abs() > 1e-3 * exact.abs().amax()).any())
            except Exception:
                # The forward reads an attribute of a batch norm that is away, or the attack's own pass will fail too.
                wrong = True
        if wrong:
            self._go_exact()

    def _go_exact(self) -> None:
        put(_DISPLACED[self.model])
        _DISPLACED[self.model] = put(self.exact.slots)
        self.inexact = self.exact

    def _wants_channels_last(self, adv: Tensor) -> bool:
        """Whether the model takes images of the size of ``adv`` fastest with their channels last."""
        # A mode of its own may make the extra pass draw random numbers or gather statistics.
        if adv.device.type != "cpu" or self.mode != "eval":
            return False
        if adv.shape[1:] not in self._layouts:
            self._layouts[adv.shape[1:]] = wants_channels_last(self.model, adv)
        return self._layouts[adv.shape[1:]]

    def _is_current(self) -> bool:
        """Whether modules, parameters and buffers are the objects the stand-ins were made from, at the same place."""
        # 0.3 ms for swin_tiny's 250 modules.
        return (
            bool(self._structure)
            and all(len(now) == len(then) and all(map(is_, now.values(), then)) for now, then in self._structure)
            and all(tensor.data_ptr() == address for tensor, address in self._addresses)
        )

    @torch.inference_mode(False)
    def _build(self) -> None:
        parts = [
            part
            for m in self.model.modules()
            # Hooks: not those of a batch norm that is folded away, nor any in a recording.
            for part in (m._modules, m._parameters, m._buffers, m._forward_hooks, m._forward_pre_hooks)
        ]
        self._structure = [(part, tuple(part.values())) for part in parts]
        tensors = [value for _, values in self._structure for value in values if isinstance(value, Tensor)]
        self._addresses = [(tensor, tensor.data_ptr()) for tensor in tensors]
        self._layouts.clear()
        # In its own modes a model may drop out part of what would be merged.
        plain = merged(self.model) if self.mode == "eval" else StandIns([], None)
        with holding(plain.slots):
            faster = rounded(self.model) if self.precision == "bf16" and self.copies else None
            self.copies = faster is not None
            if faster is None and self.mode == "eval":
                faster = folded(self.model)
            exact, layers = detached(self.model), window_blocks(self.model) + patch_layers(self.model)
        self.exact = plain.then(exact).then(StandIns(layers, None))
        self.inexact = self.exact if faster is None else plain.then(faster).then(StandIns(layers, None))
        self._compiled: Callable[[Tensor], Tensor] = torch.compile(self.model) if self.compile else self.model
        self.proven = self._compared = False
        self.builds += 1


class ShadowPasses(Passes):
    """Passes through the shadow of a model; scores are always float32. A caller's autocast is ignored."""

    def __init__(self, shadow: Shadow, loss: AttackLoss, mode: str, num_labels: int, *, seeded: bool = False) -> None:
        super().__init__(shadow.model, loss, mode, num_labels, seeded=seeded)
        self.shadow = shadow

    @contextmanager
    def opened(self, device: torch.device) -> Iterator[None]:
        """As for :class:`Passes`, with the stand-ins in the model."""
        # In this order: modes are set of the model's own modules, a batch norm among them that is folded away.
        with super().opened(device), self.shadow.standing_in():
            self.precision = nullcontext()
            yield

    @property
    def rounded(self) -> bool:
        """Whether :meth:`gradient` computes in a lower precision than :meth:`score`."""
        return self.shadow.precision == "bf16"

    def forward(self, adv: Tensor) -> Tensor:
        """What the shadow makes of ``adv``, in bf16 and compiled where that is asked for and works."""
        shadow = self.shadow
        shadow.check_folds(adv)
        # A black box never asks for a gradient, so nothing is ever proven: the probe below would go with every query.
        if shadow.proven or not (torch.is_grad_enabled() or shadow.compile or shadow.precision == "bf16"):
            return shadow.forward(adv)
        before = random_states(adv.device)
        logits = self._first(adv)
        shadow.draws = before != random_states(adv.device)
        shadow.proven = isinstance(logits, Tensor) and logits.requires_grad
        return logits

    def score(self, adv: Tensor) -> Tensor:
        """The logits at ``adv`` in float32, without a gradient."""
        with self._exactly():
            return super().score(adv)

    def _exactly(self) -> AbstractContextManager[None]:
        shadow = self.shadow
        return nullcontext() if shadow.inexact is shadow.exact else shadow.standing_in(exactly=True)

    def _first(self, adv: Tensor) -> Tensor:
        """As :meth:`forward`, giving up what does not work with this model: an operation may have no bf16 backward."""
        shadow = self.shadow
        while True:
            unsure = shadow.compile or shadow.precision == "bf16"
            try:
                logits = shadow.forward(adv)
                if unsure and isinstance(logits, Tensor) and logits.requires_grad:
                    # What compiled code saved for its backward pass can be used once.
                    torch.autograd.grad(logits.sum(), adv, retain_graph=not shadow.compile, allow_unused=True)
                return shadow.forward(adv) if shadow.compile else logits
            except Exception as error:
                if not unsure or isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = str(error)
            # Where plain float32 fails too, it was neither bf16 nor the compiler, and its error is the one to see.
            with self._exactly():
                self.model(adv)
            shadow.give_up(reason)


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of ``model`` are, or else its buffers; the CPU for a model without any."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def random_states(device: torch.device) -> tuple[object, ...]:
    """The global streams of random numbers that a forward pass could draw from, to be compared."""
    numbers: Any = np.random.get_state()
    # Through numpy: bytes(tensor) takes its 5,000 elements one by one, 20 ms.
    on_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes(), on_device, random.getstate(), numbers[2], numbers[1].tobytes()


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Inside, the model has its own parts, also where the stand-ins of a shadow are in it."""
    displaced = _DISPLACED.pop(model, None)
    if displaced is None:
        yield
        return
    stand_ins = put(displaced)
    try:
        yield
    finally:
        _DISPLACED[model] = put(stand_ins)


@contextmanager
def holding(slots: list[Slot]) -> Iterator[None]:
    """Inside, every slot holds its value; afterwards what it held before."""
    before = put(slots)
    try:
        yield
    finally:
        put(before)


def put(slots: list[Slot]) -> list[Slot]:
    """Put every value into its slot; the slots with what was in them before, in the order that undoes it."""
    before = []
    for holder, name, value in slots:
        held = holder[name] if name in holder else _ABSENT  # noqa: SIM401  # a ScriptModule's slots have no get()
        before.append(Slot(holder, name, held))
        if value is _ABSENT:
            del holder[name]
        else:
            holder[name] = value
    return before[::-1]

"""Work recorded once and replayed: as a CUDA graph, one launch instead of thousands; elsewhere as a plain call.

What is replayed reads and writes tensors that stay where they are. They lie outside of the graphs' memory, which all
graphs of a recorder share: they never run at the same time, and nothing in it is needed after a replay.
Shapes: x (B, C, H, W) float32; y (B,) int64.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastadv.climb import AttackResult, Climber, room_like
from fastadv.inputs import Inputs
from fastadv.passes import Health
from fastadv.shadow import Shadow, ShadowPasses, device_of
from fastadv.survivors import EagerTeams, Team
from fastadv.threat import ThreatModel

if TYPE_CHECKING:
    from fastadv.pgd import PGD

# Recordings kept for one attack: each holds a batch five times over.
PLACES = 8
# Passes before a recording: Triton and Inductor compile, cuBLAS and cuDNN choose and allocate.
WARM_UPS = 2


class CaptureError(RuntimeError):
    """Work that cannot be recorded; the message is one line."""


class Recorder:
    """Records work on ``device``: on CUDA into graphs that share a stream and a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs = device.type == "cuda"
        if self.graphs:
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Callable[[], None]) -> bool:
        """Do ``work`` where it will be recorded; whether it waited for the device, which a graph cannot do."""
        if not self.graphs:
            work()
            return False
        mode = torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(self.stream):
                    work()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        waits = False
        for warning in caught:
            text = str(warning.message)
            if "called a synchronizing" in text:
                waits = True
            # torch says of the debug mode itself, once, that it is a prototype.
            elif "Synchronization debug mode" not in text:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return waits

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does ``work`` again when called. Nothing is done yet, and what work finds in Python now is what counts.

        Raises: CaptureError where it cannot be recorded.
        """
        if not self.graphs:
            return work
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self.device),
                # Other threads, such as a loader's that pins memory, may go on using CUDA.
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                work()
        except Exception as error:
            # Ending the capture fails too, and says less than what broke it.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise CaptureError(str(cause).partition("\n")[0]) from error
        return graph.replay


class Recording:
    """A climb over tensors that stay, its whole ascent or a single step recorded.

    Raises: CaptureError for what cannot be replayed. What is in ``climber`` afterwards means nothing.
    """

    def __init__(self, recorder: Recorder, passes: ShadowPasses, climber: Climber, *, single: bool) -> None:
        self.recorder, self.passes, self.climber = recorder, passes, climber
        if climber.settings.mode != "eval":
            raise CaptureError(f"its mode is {climber.settings.mode!r}")

        def warm_up() -> None:
            climber.start(climber.x)
            climber.step(passes)
            climber.finish(passes)

        with passes.opened(recorder.device):
            written = _versions(passes.model)
            for _ in range(WARM_UPS):
                waits = recorder.warm(warm_up)
            if waits:
                raise CaptureError("it waits for the device")
            if passes.shadow.draws:
                raise CaptureError("it draws random numbers in eval mode")
            if written != _versions(passes.model):
                raise CaptureError("it writes to its buffers in eval mode")
            work = climber.step if single else climber.ascend
            self._replay = recorder.record(lambda: work(passes))
        self.classes = passes.classes
        """How many classes the model has: a replay does not look at labels."""

    def replay(self) -> None:
        """Do the recorded work with what is in ``climber`` now."""
        # A graph needs no Python, so nobody has to stand in for anything.
        with nullcontext() if self.recorder.graphs else self.passes.opened(self.recorder.device):
            self._replay()

    def result(self, count: int) -> tuple[AttackResult, Health]:
        """What was found for the first ``count`` images, in tensors that the next replay leaves alone."""
        health = Health(self.climber.x[:count], self.climber.health.passes_per_run)
        health.bad.copy_(self.climber.health.bad[:count])
        health.good_passes.copy_(self.climber.health.good_passes[:count])
        return AttackResult(*(found[:count].clone() for found in self.climber.result())), health


class Recordings:
    """The recordings of one attack on one shadow: made where one is missing, dropped when weights are replaced."""

    def __init__(self, attack: PGD, shadow: Shadow, *, on: bool) -> None:
        self.attack, self.shadow = attack, shadow
        self.on = on
        """Whether to record at all; becomes False, with a warning, where the model cannot be recorded."""
        self.largest = 0
        """Images of the largest batch that was attacked with dropping."""
        self.launches = 0
        """Replays since someone set this to 0."""
        self.recorder = Recorder(device_of(shadow.model)) if on else None
        self._kept: OrderedDict[tuple[Hashable, int], Recording] = OrderedDict()
        self._builds = 0

    def find(
        self,
        passes: ShadowPasses,
        given: Inputs,
        threat: ThreatModel,
        *,
        scored: bool,
        step_for: int = 0,
    ) -> Recording | None:
        """A recording for images like ``given``, new or used before; None where there can be none.

        Without ``step_for`` of a whole ascent, with room for ``given`` or more: padding a ragged batch costs less than
        recording it. Otherwise of a step, for exactly ``step_for`` images.
        """
        if self.recorder is None or not self.on or given.x.device != self.recorder.device:
            return None
        self.shadow.refresh()
        if self.shadow.builds != self._builds:
            # They hold the addresses of the stand-ins before.
            self._kept.clear()
            self._builds = self.shadow.builds
        x, _, _, mask, _ = given
        scored = scored or self.attack.keep != "last" or self.attack.restarts > 1
        signature = (threat.norm, threat.box, x.shape[1:], x.is_contiguous(), mask is None, scored, step_for > 0)
        sizes = [size for kind, size in self._kept if kind == signature]
        new = _roomy(len(x)) if sizes else len(x)
        size = step_for or min((size for size in sizes if size >= len(x)), default=new)
        if (signature, size) not in self._kept:
            climber = Climber(self.attack, room_like(given, size), threat, scored=scored)
            climber.load(given)
            try:
                recording = Recording(self.recorder, passes, climber, single=step_for > 0)
            except CaptureError as error:
                self.on = False
                name = type(self.shadow.model).__name__
                warnings.warn(f"fastadv: attacks on {name} run without capture: {error}", stacklevel=2)
                return None
            self._kept[signature, size] = recording
            if len(self._kept) > PLACES:
                self._kept.popitem(last=False)
        self._kept.move_to_end((signature, size))
        found = self._kept[signature, size]
        # A label without a class is for the checks of an ordinary pass.
        return found if given.num_labels <= found.classes else None

    def replay(self, recording: Recording) -> None:
        """Replay one of the recordings, and count it."""
        recording.replay()
        self.launches += 1


class RecordedTeams(EagerTeams):
    """Teams that replay a recorded step: as large as the largest batch, a half or a quarter of it."""

    def __init__(self, recordings: Recordings, passes: ShadowPasses, given: Inputs, threat: ThreatModel) -> None:
        super().__init__(recordings.attack, passes, given, threat)
        self.recordings, self.shadowed = recordings, passes
        count = len(given.x)
        if count > recordings.largest:
            recordings.largest = _roomy(count) if recordings.largest else count
        self.sizes = [-(-recordings.largest // part) for part in (4, 2, 1)]

    def room(self, count: int) -> int:
        """The smallest of the three sizes that is large enough; exactly ``count`` where nothing can be recorded."""
        return min(size for size in self.sizes if size >= count) if self.recordings.on else count

    def team(self, size: int) -> Team:
        """The recorded team of that size, or an eager one."""
        recording = self.recordings.find(self.shadowed, self.given, self.threat, scored=True, step_for=size)
        if recording is None:
            return super().team(size)
        return Team(recording.climber, partial(self.recordings.replay, recording))


def _roomy(count: int) -> int:
    """``count`` rounded up, by a quarter at most: a batch larger than those before is seldom the largest to come."""
    unit = 1 << max(0, count.bit_length() - 3)
    return -(-count // unit) * unit


def _versions(model: nn.Module) -> list[int]:
    """How often each buffer was written to."""
    return [buffer._version for buffer in model.buffers() if not buffer.is_inference()]

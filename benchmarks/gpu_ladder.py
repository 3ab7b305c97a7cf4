"""GPU part: from RoLI's loop in fp32 to everything fastadv has, rung by rung, on one model at one batch size.

The rungs take turns. A rung of fastadv that falls back (no capture, no compiled code, no bf16) is an error; a rung that
runs out of memory is a row that says so.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from contestants import CONTESTANTS, THREAT, Agreement
from contestants import Settings as Asked
from gpu_settings import Settings
from limits import H200, gflop
from subjects import twin
from torch import Tensor

from fastadv import models, tuning, window_attention
from fastadv.engine import BatchTooLarge
from fastadv.models import Classifier

Row = dict[str, Any]
ROLI, TORCHATTACKS, TEXTBOOK = "RoLI's loop", "torchattacks", "MadryLab's loop"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to do the job. ``theirs``: the loop of that name; otherwise fastadv with these settings."""

    name: str
    theirs: str = ""
    tf32: bool = False
    autocast: bool = False
    compile: str = "off"
    capture: str = "off"
    window: bool = True
    jobs: tuple[str, ...] = ("attack", "training")


FP32, TF32, AUTO = "RoLI's loop, fp32", "RoLI's loop, TF32", "fastadv"
RUNGS = (
    Rung(name=FP32, theirs=ROLI),
    Rung(name=TF32, theirs=ROLI, tf32=True),
    Rung(name="torchattacks, fp32", theirs=TORCHATTACKS, jobs=("attack",)),
    # What torchattacks does as well: gradients of the images alone. There where it is not installed.
    Rung(name="MadryLab's loop, fp32", theirs=TEXTBOOK, jobs=("attack",)),
    Rung(name="MadryLab's loop, bf16 autocast", theirs=TEXTBOOK, tf32=True, autocast=True),
    Rung(name="fastadv, eager bf16", window=False),
    Rung(name="... with window attention"),
    Rung(name="... captured", capture="on"),
    Rung(name=AUTO, compile="on", capture="on"),
)
# Each takes as long to compile as the whole rest takes to run.
COMPILED = (
    Rung(name="fastadv, compiled, timm's attention", compile="on", window=False),
    Rung(name="fastadv, compiled, not captured", compile="on"),
)
# At further batch sizes: the two ends.
ENDS = tuple(rung for rung in RUNGS if rung.name in (FP32, TF32, AUTO, "torchattacks, fp32"))
ROUNDS = 3
# Seconds kept free for compiling swin_base.
COMPILING = 60


def ladder(settings: Settings, name: str, batch: int, rungs: tuple[Rung, ...], jobs: tuple[str, ...]) -> Iterator[Row]:
    """The rungs of each job, on one model at one batch size."""
    model, x, y = material(settings, name, batch)
    for job in jobs:
        yield from climbed(settings, [rung for rung in rungs if job in rung.jobs], job, model, x, y)


def compiled(settings: Settings, name: str, batch: int) -> Iterator[Row]:
    """Compile what the ladder will compile, so that Inductor's files are there: the tests run meanwhile."""
    model, x, y = material(settings, name, batch)
    began = time.perf_counter()
    fast = Asked(steps=1).ours().on(model, precision="bf16", compile="on", capture="off")
    with falling_back_is_an_error():
        fast(x, y, THREAT)
    yield {"model": name, "batch": batch, "compile_s": time.perf_counter() - began}


def material(settings: Settings, name: str, batch: int) -> tuple[Classifier, Tensor, Tensor]:
    """The model with random weights, random images and labels."""
    torch.manual_seed(0)
    model = models.create(name, 10).to(settings.device).eval()
    x, y = torch.rand(batch, 3, model.input_size, model.input_size), torch.randint(0, 10, (batch,))
    return model, x.to(settings.device), y.to(settings.device)


def climbed(settings: Settings, rungs: list[Rung], job: str, model: Classifier, x: Tensor, y: Tensor) -> Iterator[Row]:
    """The rungs of one job: made ready one by one, then timed in turns until the rounds or the time are over."""
    steps = 1 if settings.tiny else {"attack": 10, "training": 7}[job]
    runs: dict[str, Callable[[], Any]] = {}
    a_round = 0.0
    facts: dict[str, Row] = {}
    where = {"job": job, "model": model.name, "batch": len(x), "steps": steps}
    equal = equality(model, x[:4], y[:4])
    for rung in rungs:
        if rung.theirs and equal[rung.theirs] is None:
            yield {**where, "rung": rung.name, "not_timed": f"{rung.theirs} is not installed"}
            continue
        if rung.theirs and equal[rung.theirs] <= 0.999:
            yield {**where, "rung": rung.name, "not_timed": f"only {equal[rung.theirs]:.4f} of its pixels are ours"}
            continue
        if settings.left() < 2 * a_round + (COMPILING if rung.compile == "on" and not settings.tiny else 0):
            yield {**where, "rung": rung.name, "not_timed": f"{settings.left():.0f} s were left"}
            continue
        try:
            began = time.perf_counter()
            run, report, peak = ready(settings, rung, job, model, x, y, steps)
            facts[rung.name] = report() | {"ready_s": time.perf_counter() - began, "peak_bytes": peak}
            runs[rung.name] = run
            a_round += timed(run, settings.device)
            # Told at once: should the time run out before the turns, this much is known.
            yield {**where, "rung": rung.name, "ready": facts[rung.name]}
        except (torch.OutOfMemoryError, BatchTooLarge) as error:
            yield {**where, "rung": rung.name, "not_timed": f"out of memory ({str(error).partition('.')[0]})"}
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 if settings.tiny else ROUNDS):
        for name, run in runs.items():
            seconds[name].append(timed(run, settings.device))
        # A whole round, or none: the sides of a ratio must have met the same moments.
        if settings.left() < 1.2 * sum(values[-1] for values in seconds.values()):
            break
    for name, values in seconds.items():
        yield {**where, "rung": name, **facts[name], **speeds(model.name, job, len(x), steps, values)}


def ready(
    settings: Settings, rung: Rung, job: str, model: Classifier, x: Tensor, y: Tensor, steps: int
) -> tuple[Callable[[], Any], Callable[[], Row], int | None]:
    """A call that does the job, warmed up; what it reports of itself; and how far memory rose."""
    cuda = settings.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    call, report = bound(settings, rung, job, model, x, y, steps)

    def run() -> None:
        with precision(rung), contextlib.nullcontext() if rung.window else without_the_op():
            call()

    with falling_back_is_an_error():
        # Recording an update takes the third call, the fourth is the first that only replays.
        for _ in range(1 if rung.theirs else 4 if job == "training" and rung.capture == "on" else 2):
            run()
    check(rung, report(), settings)
    return run, report, torch.cuda.max_memory_allocated() - before if cuda else None


def bound(
    settings: Settings, rung: Rung, job: str, model: Classifier, x: Tensor, y: Tensor, steps: int
) -> tuple[Callable[[], Any], Callable[[], Row]]:
    """The job as a call without arguments, and what it reports."""
    options = {"precision": "fp32" if settings.device == "cpu" else "bf16"}
    options |= {"compile": "off" if settings.tiny else rung.compile, "capture": rung.capture}
    if job == "attack" and rung.theirs:
        attack = CONTESTANTS[rung.theirs].bind(model, Asked(steps=steps), x)
        return lambda: attack(x, y), dict
    if job == "attack":
        fast = Asked(steps=steps).ours().on(model, **options)
        return lambda: fast(x, y, THREAT, wait=False), lambda: told(fast)
    # Only here: it needs every package that training needs.
    import training

    own = twin(model)
    learning = tuning.full(own)
    if rung.theirs:
        them = training.Theirs(own, learning, steps, name=rung.theirs, x=x, autocast=rung.autocast)
        return lambda: them.step(x, y, 1), dict
    with contextlib.nullcontext() if rung.window else without_the_op():
        ours = training.Ours(own, learning, steps, **options)
    return lambda: ours.step(x, y, 1), lambda: told(ours.fast) | {"step_recorded": ours.update.recorded}


def told(fast: Any) -> Row:
    """What fastadv says about its last call."""
    return {
        "precision": fast.precision,
        "compiled": fast.compiled,
        "captured": fast.captured,
        "launches_per_batch": fast.launches_per_batch,
    }


def check(rung: Rung, report: Row, settings: Settings) -> None:
    """Raise RuntimeError where fastadv did not do what the rung says."""
    if rung.theirs:
        return
    wanted = {
        "captured": rung.capture == "on",
        "launches_per_batch": int(rung.capture == "on"),
        "compiled": rung.compile == "on" and not settings.tiny,
        "precision": "fp32" if settings.device == "cpu" else "bf16",
    }
    if "step_recorded" in report:
        wanted["step_recorded"] = rung.capture == "on"
    wrong = {name: report[name] for name, value in wanted.items() if report[name] != value}
    if wrong:
        raise RuntimeError(f"{rung.name}: wanted {wanted}, but {wrong}")


def equality(model: Classifier, x: Tensor, y: Tensor) -> dict[str, float | None]:
    """The share of pixels of each foreign loop that fastadv's PGD-3 in fp32 has too; None where it is not installed.

    Three steps: random weights may drive ten steps apart from one different last digit.
    """
    agreement = Agreement(model, x, y, steps=3)
    found: dict[str, float | None] = {}
    with precision(Rung(name="")):
        for name in (ROLI, TORCHATTACKS, TEXTBOOK):
            contestant = CONTESTANTS[name]
            found[name] = None if contestant.version is None else agreement.check(contestant)[0]
    return found


@contextlib.contextmanager
def precision(rung: Rung) -> Iterator[None]:
    """TF32 on or off inside, and autocast for a foreign attack; afterwards as before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.set_float32_matmul_precision("high" if rung.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = rung.tf32
        with torch.autocast(device, torch.bfloat16, enabled=rung.autocast):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def falling_back_is_an_error() -> Iterator[None]:
    """fastadv's own warnings raise inside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastadv: ")
        yield


@contextlib.contextmanager
def without_the_op() -> Iterator[None]:
    """Inside, no Swin block gets fastadv's window attention."""
    insert = window_attention.insert
    window_attention.insert = lambda model: 0
    try:
        yield
    finally:
        window_attention.insert = insert


def timed(run: Callable[[], Any], device: str) -> float:
    """Wall seconds of one run, waiting for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def speeds(model: str, job: str, batch: int, steps: int, seconds: list[float]) -> Row:
    """Images per second (median and range), useful TFLOP/s, share of an H200's limit."""
    median = statistics.median(seconds)
    rate, work, limit = batch / median, gflop(model, job, steps), H200.get((model, job))
    return {
        "rounds": len(seconds),
        "seconds": median,
        "range_s": [min(seconds), max(seconds)],
        "images_per_s": rate,
        "tflop_per_s": work * rate / 1000 if work else None,
        "share_of_limit": rate / limit if limit else None,
    }

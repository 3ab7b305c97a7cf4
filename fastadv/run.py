"""A run on disk: where it stands, what it saved and logged. A killed run continues from here in the same bits."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from fastadv import checkpoint, stopping
from fastadv.data import Splits, fingerprint
from fastadv.environment import environment
from fastadv.errors import CheckpointError, SettingsError
from fastadv.models import Classifier
from fastadv.recipe import Recipe
from fastadv.runfolder import RunLock, run_folder
from fastadv.runlog import Progress, RunLog
from fastadv.sharing import ALONE, Share

KEPT = ("stage", "stage_step", "step", "loss_sum", "best", "history")


class Run:
    """The state of a run. Everything in it that matters for the weights is in every checkpoint.

    Of the processes that ``share`` a run only the first one touches its folder; what it reads there it tells the
    others, and all decide the same: a signal or the time that one of them notices counts for all.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        progress: Progress,
        *,
        stages: int = 1,
        resume: bool = False,
        share: Share = ALONE,
    ) -> None:
        if share.first:
            run_folder(folder, resume=resume)
        self.folder, self.recipe, self.progress, self.resume = folder, recipe, progress, resume
        self.stages, self.share = stages, share
        self.lock = RunLock(folder) if share.first else nullcontext()
        self.stage = self.stage_step = self.step = 0
        self.stage_name = ""
        self.loss_sum = 0.0
        self.best: list[float] | None = None
        self.history: list[dict[str, Any]] = []
        self._restored: dict[str, dict[str, Tensor]] | None = None
        self._loss: Tensor | None = None
        self._saved_at = self._epoch_began = time.monotonic()

    def __enter__(self) -> Self:
        self.lock.__enter__()
        if self.share.first:
            checkpoint.clean(self.folder)
        self.log = RunLog(self.folder / "log.jsonl" if self.share.first else Path(os.devnull))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.close()
        self.lock.__exit__(kind, error, trace)

    def begin(self, splits: Splits) -> None:
        """Write down what a new run is made of (recipe, environment, data, split), or pick up a killed one.

        Raises SettingsError where the processes do not have the same images and settings.
        """
        if self.share.size > 1:
            # Where files lie may differ from machine to machine.
            settings = dataclasses.replace(self.recipe, data="", weights="").to_json()
            self.share.agree({"recipe": settings, "data": json.dumps({**_describe(splits), "data": "", "skipped": ""})})
        if self.share.first:
            self._begin(splits)
        if self.share.size > 1:
            self._tell()

    def _begin(self, splits: Splits) -> None:
        if self.resume and (self.folder / "split.json").exists():
            self._restore(splits)
            return
        self._write("recipe.json", self.recipe.to_json())
        self._write("env.json", json.dumps(environment(), indent=2))
        # Last: a folder without it is one that never began.
        self._write("split.json", json.dumps(_describe(splits)))
        self.log.event("start", recipe=self.recipe.sha256, train=len(splits.train), val=len(splits.val))

    def _restore(self, splits: Splits) -> None:
        """Read the newest whole checkpoint. Raises SettingsError when the data are not those the run began with."""
        began = checkpoint.read_split(self.folder)
        if began != json.loads(json.dumps(_describe(splits))):
            raise SettingsError(
                f"the images of {self.recipe.data!r} are not those that {self.folder} began with",
                "bring the data back as they were, or start a new run",
            )
        if not checkpoint.steps(self.folder):
            return  # killed before its first checkpoint: it begins again
        path, self._restored, meta = checkpoint.newest(self.folder)
        for name in KEPT:
            setattr(self, name, meta[name])
        self.log.event("resume", step=self.step, checkpoint=path.name)

    def _tell(self) -> None:
        """Bring all processes to where the first one found the run."""
        state = {name: getattr(self, name) for name in KEPT}
        files = self._restored if self._restored is None else list(self._restored)
        told = self.share.tell_json({**state, "files": files})
        for name in KEPT:
            setattr(self, name, told[name])
        if told["files"] is not None:
            mine = self._restored or {name: {} for name in told["files"]}
            data = {name: self.share.tell_bytes(safetensors.torch.save(mine[name])) for name in told["files"]}
            self._restored = {name: safetensors.torch.load(each) for name, each in data.items()}

    def pick_up(
        self,
        model: nn.Module,
        learners: dict[str, nn.Parameter] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Bring model and optimizer to where the restored checkpoint left them; a run that was not killed has none."""
        files, self._restored = self._restored, None
        if files is None:
            return
        model.load_state_dict(files["model.safetensors"], strict=True)
        state = files.get("optimizer.safetensors")
        if state and learners is not None and optimizer is not None:
            whole = optimizer.state_dict()
            names = {id(p): name for name, p in learners.items()}
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            parts: dict[str, dict[str, Tensor]] = {name: {} for name in order}
            for key, value in state.items():
                name, _, part = key.rpartition(":")
                parts[name][part] = value
            whole["state"] = {i: parts[name] for i, name in enumerate(order)}
            optimizer.load_state_dict(whole)

    def start_stage(self, name: str, epochs: int, steps_per_epoch: int) -> None:
        """Announce the stage on the terminal, with what of it was done before a resume."""
        self.stage_name = name
        self._epoch_began = time.monotonic()
        self.progress.stage(name, epochs, steps_per_epoch, done=self.stage_step)

    def advance(self, loss: Tensor, images: int) -> None:
        """Count one update. The loss stays on the device."""
        # In float64 the sum does not depend on when checkpoints gathered it.
        value = loss.detach().double()
        self._loss = value if self._loss is None else self._loss + value
        self.step += 1
        self.stage_step += 1
        self.progress.step(images)

    def must_save(self) -> bool:
        """Whether a signal asked for the end, or the last checkpoint is older than the recipe allows."""
        late = time.monotonic() - self._saved_at > 60 * self.recipe.checkpoint_minutes
        return bool(self.share.meet(int(bool(stopping.requested()) or late)))

    def save(
        self,
        model: nn.Module,
        learners: dict[str, nn.Parameter] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Write a checkpoint of this very step and drop older ones; then raise Stopped if a signal asked for it."""
        self._gather_loss()
        if self.share.first:
            files = {"model.safetensors": model.state_dict()}
            if optimizer is not None and learners is not None:
                states = {name: optimizer.state[p].items() for name, p in learners.items()}
                files["optimizer.safetensors"] = {
                    f"{name}:{part}": value for name, state in states.items() for part, value in state
                }
            meta = {name: getattr(self, name) for name in KEPT}
            checkpoint.save(checkpoint.step_folder(self.folder, self.step), files, meta)
            checkpoint.prune(self.folder, keep=2)
        self._saved_at = time.monotonic()
        if asked := self.share.meet(stopping.requested()):
            if not stopping.requested():
                stopping.take_over(asked)
            self.log.event("stop", step=self.step)
            raise stopping.Stopped(self.folder)

    def end_epoch(self, epoch: int, model: Classifier, metrics: dict[str, float] | None, lr: float) -> None:
        """Log the epoch; keep the weights as best/ when their validation accuracy is the stage's highest."""
        self._gather_loss()
        steps = self.stage_step - sum(row["steps"] for row in self.history if row["stage_index"] == self.stage)
        now = time.monotonic()
        row: dict[str, Any] = {
            "stage": self.stage_name,
            "stage_index": self.stage,
            "epoch": epoch + 1,
            "steps": steps,
            "step": self.step,
            "loss": self.loss_sum / max(1, steps),
            "lr": lr,
            "seconds": now - self._epoch_began,
            "clean": None,
            "robust": None,
            **(metrics or {}),
        }
        self._epoch_began, self.loss_sum = now, 0.0
        self.history.append(row)
        self.log.event("epoch", **row)
        self.progress.epoch(row)
        if metrics is None:
            return
        # Robust first; clean accuracy decides between equals, which are common on a few hundred images.
        score = [metrics.get("robust", 0.0), metrics["clean"]]
        if self.best is None or score > self.best:
            self.best = score
            if not self.share.first:
                return
            files = {"model.safetensors": model.state_dict()}
            checkpoint.save(self._best_folder, files, {"step": self.step, "stage": self.stage, **metrics})

    def accuracies(self) -> list[float]:
        """Validation accuracy, robust where the stage measures it, of every validated epoch of this stage."""
        rows = [row for row in self.history if row["stage_index"] == self.stage and row["clean"] is not None]
        return [row["clean"] if row["robust"] is None else row["robust"] for row in rows]

    def back_to_best(self, model: Classifier) -> None:
        """Load the stage's best weights, where an epoch was validated."""
        if self.best is not None:
            if self.share.first:
                files, _ = checkpoint.load(self._best_folder)
                model.load_state_dict(files["model.safetensors"], strict=True)
            self.share.spread(model)

    def finish_stage(self, model: Classifier) -> None:
        """Go on from the stage's best weights: load them, and make that the newest checkpoint."""
        self.back_to_best(model)
        self.stage += 1
        self.stage_step, self.best = 0, None
        self.save(model)

    def where(self) -> str:
        """The last step counted, in words, for messages."""
        return f"stage {self.stage_name}, step {self.step}"

    def last_good(self) -> str:
        """The newest checkpoint's path, or ``none yet``."""
        saved = checkpoint.steps(self.folder)
        return str(saved[-1]) if saved else "none yet"

    @property
    def _best_folder(self) -> Path:
        """best/ for the last stage, best-STAGE/ for those before.

        One for each stage: a resume that falls back into an earlier stage must find that stage's best weights.
        """
        return self.folder / ("best" if self.stage == self.stages - 1 else f"best-{self.stage_name}")

    def _write(self, name: str, text: str) -> None:
        """Write a file of the run folder whole or not at all."""
        temporary = self.folder / f".tmp-{name}"
        try:
            temporary.write_text(text + "\n")
            temporary.replace(self.folder / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"could not write {self.folder / name}: {error.strerror}", "free some space, or --out OTHER"
            ) from error

    def _gather_loss(self) -> None:
        if self._loss is not None:
            self.loss_sum += float(self._loss)
            self._loss = None


def _describe(splits: Splits) -> dict[str, Any]:
    """What identifies the data: names, sizes, a hash of every split, and which training images validate."""
    return {
        "data": splits.name,
        "classes": list(splits.train.classes),
        "skipped": list(splits.skipped),
        **{part: fingerprint(getattr(splits, part)) for part in ("train", "val", "test")},
        "val_from": splits.val_from,
        "val_indices": [int(i) for i in splits.val_indices],
    }

"""Training by the processes of a torchrun: the weights of one process, up to rounding, and an orderly end for all."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastadv import assemble, checkpoint, pretrain, report, trainer
from fastadv.cli import command
from fastadv.errors import SettingsError
from fastadv.measure import measure
from fastadv.parallel import Parallel, Rows, RowsThreat, check_shares
from fastadv.pretraining import AdversarialRecipe, ContrastiveRecipe
from fastadv.recipe import Recipe
from fastadv.run import Run
from fastadv.runlog import Progress
from fastadv.sharing import ALONE, Share, joined
from fastadv.strategies import load_all
from fastadv.threat import ThreatModel
from fastadv.trainer import fit
from fastadv.update import Update

# Twenty training images in batches of five: two rows for the first process and three for the second.
SMALL: dict[str, Any] = {
    "weights": "none",
    "val_images": 10,
    "batch_size": 5,
    "train_steps": 1,
    "eval_steps": 1,
    "precision": "fp32",
    "device": "cpu",
    "lr": 0.05,
    # What Adam divides by makes a weight of rounding errors where a gradient is near zero.
    "optimizer": "sgd",
}
# A Swin has no batch norm, whose statistics are of a process's own rows.
CASES: dict[str, Recipe] = {
    "roli-full": Recipe(
        strategy="roli-full", probe_epochs=1, epochs=1, probe_optimizer="sgd", **{**SMALL, "train_steps": 2}
    ),
    "n-fgsm": AdversarialRecipe(strategy="pretrain-adversarial", single_step="n-fgsm", epochs=1, **SMALL),
    "l2": Recipe(strategy="ranli-bias", norm="l2", eps=0.5, step_size=0.5, epochs=2, **SMALL),
}
VALIDATE = trainer.validate
FLAGS = [
    *("--objective", "adversarial", "--model", "resnet_micro_64", "--image-size", "32", "--weights", "none"),
    *("--val-images", "10", "--batch-size", "5", "--epochs", "2"),
    *("--eval-steps", "1", "--train-steps", "1", "--precision", "fp32", "--device", "cpu"),
]


def child(target: Callable[..., Any], rank: int, port: int, folder: Path, words: tuple[Any, ...]) -> None:
    """One process as torchrun would start it; what it says goes into files."""
    world = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""})
    torch.set_num_threads(1)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    code = target(folder, *words)
    sys.stdout.flush()
    sys.exit(code)


def processes(folder: Path, target: Callable[..., Any], *words: Any) -> list[tuple[int | None, str, str]]:
    """Runs ``target(folder, *words)`` in two processes: exit code, stdout and stderr of each."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The server imports torch once for all of them, and has no threads that a fork could lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tyro", "fastadv.report", "fastadv.trainer"])
    started = [context.Process(target=child, args=(target, rank, port, folder, words)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        # None: it hung.
        process.kill() if process.exitcode is None else None
    says = [[(folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in (0, 1)]
    return [(process.exitcode, *said) for process, said in zip(started, says, strict=True)]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Two classes of squares: 20 images to train on, 10 to validate, 10 to test."""
    random, labels = np.random.default_rng(0), np.arange(40) % 2
    images = random.integers(0, 160, (40, 64, 64, 3), dtype=np.uint8)
    images[labels == 1, 20:50, 20:50] += 90
    for name, rows in (("train", slice(0, 30)), ("test", slice(30, 40))):
        np.savez(tmp_path / f"{name}.npz", images=images[rows], labels=labels[rows])
    return str(tmp_path)


def falling(model: Any, stage: Any, splits: Any, recipe: Any, epoch: int, share: Any) -> dict[str, float]:
    """In the place of a validation: the first epoch's weights are the best, and all have to go back to them."""
    return {"clean": -epoch, "robust": -epoch}


def trained(folder: Path, recipe: Recipe, share: Share) -> dict[str, torch.Tensor]:
    """The weights after all stages."""
    trainer.validate = falling if recipe.epochs == 2 else VALIDATE
    splits, stages = assemble.splits(recipe), list(load_all()[recipe.strategy].stages(recipe))
    model = assemble.model(recipe, 2)
    with Progress() as progress, Run(folder, recipe, progress, stages=len(stages), share=share) as run:
        run.begin(splits)
        for stage in stages:
            fit(model, stage, splits, recipe, run)
            run.finish_stage(model)
    return model.state_dict()


def train_all(folder: Path, data: str) -> None:
    with joined() as share:
        for name, case in CASES.items():
            recipe = dataclasses.replace(case, data=data)
            torch.save(trained(folder / name, recipe, share), folder / f"{name}-{share.rank}")
        images, model = assemble.splits(recipe).train, assemble.model(recipe, 2)
        both, mine = (
            measure(model, images, recipe.eval_attack, ThreatModel(eps=1e-3), batch_size=8, share=each)
            for each in (share, ALONE)
        )
        assert torch.equal(both.right, mine.right)
        assert torch.equal(both.survived, mine.survived)
        assert 0 < both.robust < both.n


def test_two_processes_leave_the_weights_of_one(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, _, said in processes(tmp_path / "both", train_all, data):
        assert code == 0, said
    monkeypatch.setattr(trainer, "validate", VALIDATE)
    for name, case in CASES.items():
        recipe = dataclasses.replace(case, data=data)
        before = assemble.model(recipe, 2).state_dict()
        alone = trained(tmp_path / name, recipe, ALONE)
        first, second = (torch.load(tmp_path / "both" / f"{name}-{rank}") for rank in (0, 1))
        for key, value in alone.items():
            assert torch.equal(first[key], second[key]), (name, key)
            # Seen: 3e-8 at most, where weights move by 2e-4 and more. Equal weights for unequal rows are 3e-4 off, a
            # noise of its own for each process 1e-4.
            torch.testing.assert_close(first[key], value, rtol=1e-6, atol=3e-7)
        assert max(float((alone[key] - before[key]).abs().max()) for key in before) > 1e-2, name


def command_line(folder: Path, argv: list[str], fault: str = "") -> int:
    """The command without pictures. The second process cannot write, and meets ``fault`` at the third step."""
    if os.environ["RANK"] == "1":
        report.of_training = pretrain.export = checkpoint.save = None
    for place, name in ((report.plots, "curves"), (report, "draw_examples"), (report, "write_page")):
        setattr(place, name, lambda *args, **more: None)
    attacked = Update._attacked

    def disturbed(update: Update, *args: Any) -> torch.Tensor:
        if fault and update.parallel.share.rank == 1 and update.guard.steps == 2:
            if fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            os.kill(os.getpid(), getattr(signal, fault))
        return attacked(update, *args)

    Update._attacked = disturbed
    return command(pretrain.main, argv, program="python -m fastadv.pretrain")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "best")[0]["model.safetensors"]


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_in_the_same_bits(tmp_path: Path, data: str) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    (code, said, _), silent = processes(tmp_path / "1", command_line, [*FLAGS, "--data", data, "--out", str(whole)])
    assert (code, *silent) == (0, 0, "", "")
    assert said.count("weights: ") == said.count("2 processes share every batch of 5 images") == 1
    first, second = processes(tmp_path / "2", command_line, [*FLAGS, "--data", data, "--out", str(run)], "SIGTERM")
    assert first[0] == 75
    assert first[2] == f"stopped and saved; continue with: python -m fastadv.pretrain --resume {run}\n"
    assert second == (75, "", "")
    assert [path.name for path in checkpoint.steps(run)] == ["step-00000003"]
    again = processes(tmp_path / "3", command_line, ["--resume", str(run)])
    assert [code for code, _, _ in again] == [0, 0]
    assert all(torch.equal(value, weights(run)[key]) for key, value in weights(whole).items())


@pytest.mark.parametrize(
    ("flags", "fault", "code", "speaker", "line"),
    [
        ([], "memory", 6, 1, "error: out of memory (CUDA out of memory)"),
        (["--batch-size", "1"], "", 2, 0, "error: batch_size is 1, of 20 training images, for 2 processes"),
        (["--batch-sighs", "4"], "", 2, 0, "error: Unrecognized"),
    ],
)
def test_all_processes_end_alike_and_one_says_why(
    tmp_path: Path, data: str, flags: list[str], fault: str, code: int, speaker: int, line: str
) -> None:
    found = processes(tmp_path, command_line, [*FLAGS, "--data", data, *flags, "--out", str(tmp_path / "run")], fault)
    assert [each[0] for each in found] == [code, code]
    lines = found[speaker][2].splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(line)
    assert found[1 - speaker][2] == ""


def test_a_killed_process_ends_the_others(tmp_path: Path, data: str) -> None:
    first, second = processes(
        tmp_path, command_line, [*FLAGS, "--data", data, "--out", str(tmp_path / "run")], "SIGKILL"
    )
    assert (first[0], second[0]) == (5, -signal.SIGKILL)
    assert first[2].startswith("error: another process of this run has ended\nfix: ")


def sums(folder: Path) -> None:
    with joined() as share:
        mine = share.rank + 1.0
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
        model[2].eval()
        weight, learning, resting = model[0].weight, model[1], model[2]
        parallel = Parallel(share, model, {"weight": weight})
        x, y = parallel.cut(torch.arange(10.0).view(10, 1), torch.arange(10), 5)
        assert x.flatten().tolist() == y.tolist() == ([0, 1, 5, 6] if share.first else [2, 3, 4, 7, 8, 9])
        weight.grad = torch.full((2, 2), mine)
        for norm in (learning, resting):
            norm.running_mean.fill_(10 * mine)
        broken = torch.tensor(share.rank == 1)
        loss = parallel.add_up(torch.tensor(100 * mine), broken)
        # Two fifths of what the first has and three fifths of what the second has.
        for found, of_one in ((loss, 100.0), (weight.grad, 1.0), (learning.running_mean, 10.0)):
            torch.testing.assert_close(found, torch.full_like(found, 1.6 * of_one))
        assert resting.running_mean.eq(10 * mine).all()
        assert broken
        assert share.meet(share.rank * 15) == 15
        assert share.tell_json({"a": [mine, None]}) == {"a": [1.0, None]}
        share.spread(model)
        assert resting.running_mean.eq(10).all()
        with pytest.raises(SettingsError, match="the processes were given different"):
            share.agree({"a": str(share.rank)})


def test_sums_are_weighed_by_rows(tmp_path: Path) -> None:
    assert [(code, said) for code, _, said in processes(tmp_path, sums)] == [(0, ""), (0, "")]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("radii", [1, 10])
def test_the_noise_of_all_rows_is_that_of_the_batch(norm: Any, layout: torch.memory_format, radii: int) -> None:
    x = torch.rand(10, 3, 4, 4).contiguous(memory_format=layout)
    eps, threat = torch.linspace(0.1, 0.2, radii), ThreatModel(norm, 0.1)
    whole = threat.random_start(x, eps, torch.Generator().manual_seed(1))
    for rows in (Rows(0, 2, 5), Rows(2, 5, 5)):
        mine = RowsThreat(norm, 0.1, rows=rows)
        radius = rows.of(eps) if radii > 1 else eps
        found = mine.random_start(rows.of(x), radius, torch.Generator().manual_seed(1))
        assert torch.equal(found, rows.of(whole))
        assert not torch.equal(found, rows.of(x))


def test_rows_are_dealt_evenly_and_all() -> None:
    for images, size in ((5, 2), (7, 7), (64, 6)):
        dealt = []
        for rank in range(size):
            parallel = Parallel(Share(rank, size), nn.Identity(), {})
            _, y = parallel.cut(torch.zeros(images, 1), torch.arange(images), images)
            dealt.append(y)
        assert torch.cat(dealt).tolist() == list(range(images))
        assert images // size <= min(map(len, dealt)) <= max(map(len, dealt)) <= -(-images // size)


@pytest.mark.parametrize(
    ("recipe", "images", "what"),
    [
        (Recipe(batch_size=3), 100, "batch_size is 3, of 100 training images, for 4 processes"),
        (Recipe(batch_size=64), 3, "batch_size is 64, of 3 training images, for 4 processes"),
        (ContrastiveRecipe(batch_size=7), 100, "two images for each"),
        (Recipe(device="cuda:1"), 100, "device is 'cuda:1' for 4 processes"),
    ],
)
def test_processes_without_work_are_refused(recipe: Recipe, images: int, what: str) -> None:
    with pytest.raises(SettingsError, match=what):
        check_shares(recipe, images, 4)
    check_shares(recipe, images, 1)
    check_shares(dataclasses.replace(recipe, batch_size=8, device="auto"), 8, 4)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert assemble.device("auto") == torch.device("cuda")
    for name, value in (("WORLD_SIZE", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert assemble.device("auto") == assemble.device("cuda") == torch.device("cuda:1")
    assert assemble.device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        SettingsError, match="process 3 on this machine has no GPU: 2 here; torchrun --nproc-per-node 2"
    ):
        assemble.device("auto")


def test_steps_of_several_processes_are_not_recorded_and_that_is_said(tmp_path: Path) -> None:
    recipe = dataclasses.replace(CASES["l2"], capture="on")
    model, (stage,) = assemble.model(recipe, 2), load_all()[recipe.strategy].stages(recipe)
    attack = stage.bind(recipe.train_attack, model, precision="fp32", compile="off", capture="on")
    guard: Any = type("Guard", (), {"device": torch.device("cpu")})
    parts = (stage.loss, model, attack, recipe.threat, None, guard)
    with pytest.warns(UserWarning, match="training steps run without capture: 2 processes add up") as caught:
        update = Update(*parts, Parallel(Share(0, 2), model, {}))
    assert len(caught) == 1
    assert update.recorder is None
    assert Update(*parts).recorder is not None

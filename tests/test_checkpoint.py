"""Checkpoints survive kills, full disks and flipped bits; what comes back is what was saved, to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastadv import checkpoint
from fastadv.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent
MODEL = "model.safetensors"


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 4), value), "step": torch.tensor(int(value))}


def saved(run: Path, step: int) -> Path:
    folder = checkpoint.step_folder(run, step)
    checkpoint.save(folder, {MODEL: tensors(step)}, {"step": step})
    return folder


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {
        "float": torch.nn.Parameter(base.clone()),
        "bf16": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "nan": torch.tensor([float("nan"), -0.0]),
        "transposed": base.t(),
        "row": base[1],
        "same row": base[1],
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "rng": torch.get_rng_state(),
    }
    meta = {"step": 3, "lr": 0.1 + 0.2, "history": [{"clean": None}]}
    checkpoint.save(tmp_path / "best", {MODEL: state, "rng.safetensors": {"cpu": torch.get_rng_state()}}, meta)
    files, found = checkpoint.load(tmp_path / "best")
    assert found == meta
    assert set(files) == {MODEL, "rng.safetensors"}
    for name, tensor in state.items():
        assert files[MODEL][name].dtype == tensor.dtype
        assert files[MODEL][name].shape == tensor.shape
        assert bits(files[MODEL][name]) == bits(tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = saved(tmp_path, 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750


def test_an_existing_directory_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    (tmp_path / "step-00000005" / "left-over").touch()
    checkpoint.save(tmp_path / "step-00000005", {MODEL: tensors(6)}, {"step": 5})
    assert checkpoint.load(tmp_path / "step-00000005")[0][MODEL]["step"] == 6
    assert sorted(path.name for path in (tmp_path / "step-00000005").iterdir()) == ["manifest.json", MODEL]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def edited(folder: Path, **fields: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def forge(folder: Path, data: bytes) -> None:
    """Put other bytes into a checkpoint and make the manifest agree with them."""
    (folder / MODEL).write_bytes(data)
    edited(folder, files={MODEL: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}})


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES = {
    "cut in half": (lambda folder: cut(folder / MODEL, 60), "bytes"),
    "last byte missing": (lambda folder: cut(folder / MODEL, (folder / MODEL).stat().st_size - 1), "bytes"),
    "empty": (lambda folder: cut(folder / MODEL, 0), "0 bytes"),
    "flipped bit": (lambda folder: flip(folder / MODEL, -1), "sha256"),
    "file missing": (lambda folder: (folder / MODEL).unlink(), "missing"),
    "file is a fifo": (lambda folder: ((folder / MODEL).unlink(), os.mkfifo(folder / MODEL)), "missing"),
    "manifest missing": (
        lambda folder: (folder / "manifest.json").unlink(),
        "manifest.json cannot be used: it is miss",
    ),
    "manifest cut": (lambda folder: cut(folder / "manifest.json", 30), "not JSON"),
    "manifest in latin-1": (lambda folder: (folder / "manifest.json").write_bytes(b'{"\xe9": 1}'), "not JSON"),
    "manifest nested": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "not JSON"),
    "manifest a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "format"),
    "newer format": (lambda folder: edited(folder, format=2), "format 2, this version reads up to 1"),
    "no format": (lambda folder: edited(folder, format=None), "format"),
    "no files": (lambda folder: edited(folder, files=None), "'files'"),
    "no meta": (lambda folder: edited(folder, meta=[]), "'meta'"),
    "parent folder": (lambda folder: edited(folder, files={"../best.safetensors": {}}), "outside"),
    "absolute path": (lambda folder: edited(folder, files={"/etc/passwd": {}}), "outside"),
    "no hash": (lambda folder: edited(folder, files={MODEL: {"bytes": 1}}), "sha256"),
    "entry a number": (lambda folder: edited(folder, files={MODEL: 3}), "sha256"),
    "forged trailing bytes": (
        lambda folder: forge(folder, (folder / MODEL).read_bytes() + b"x"),
        "safetensors refuses",
    ),
    "forged header": (lambda folder: forge(folder, (1 << 62).to_bytes(8, "little") + b"{}"), "safetensors refuses"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    saved(tmp_path, 1)
    folder = saved(tmp_path, 2)
    damage(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        checkpoint.load(folder)
    assert caught.value.exit_code == 4
    assert str(folder) in caught.value.what
    with pytest.warns(checkpoint.CheckpointWarning, match=str(folder)):
        found, files, meta = checkpoint.newest(tmp_path)
    assert (found.name, meta["step"], int(files[MODEL]["step"])) == ("step-00000001", 1, 1)


def test_a_flipped_bit_is_what_safetensors_alone_does_not_see(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    flip(folder / MODEL, -1)
    read = safetensors.torch.load((folder / MODEL).read_bytes())
    assert not all(torch.equal(read[name], tensor) for name, tensor in tensors(1).items())


def test_newest_needs_one_that_is_whole(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no valid checkpoint is left"):
        checkpoint.newest(tmp_path)
    flip(saved(tmp_path, 1) / MODEL, -1)
    with (
        pytest.warns(checkpoint.CheckpointWarning),
        pytest.raises(CheckpointError, match=r"no valid checkpoint is left in .*sha256"),
    ):
        checkpoint.newest(tmp_path)


def test_steps_are_ordered_as_numbers_and_other_names_are_left_alone(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 400):
        saved(tmp_path, step)
    for name in (".tmp-step-00000500", "step-best", "step-1", "best"):
        (tmp_path / name).mkdir()
    names = ["step-00000400", "step-99999999", "step-100000000"]
    assert [path.name for path in checkpoint.steps(tmp_path)] == names
    assert checkpoint.newest(tmp_path)[0].name == names[-1]
    checkpoint.prune(tmp_path, keep=2)
    assert [path.name for path in checkpoint.steps(tmp_path)] == names[1:]
    checkpoint.clean(tmp_path)
    assert not (tmp_path / ".tmp-step-00000500").exists()
    assert (tmp_path / "best").exists()


SAVE_TWICE = """
import resource, sys, torch
from pathlib import Path
from fastadv import checkpoint
from fastadv.errors import CheckpointError

run = Path(sys.argv[1])
checkpoint.save(run / "step-00000001", {"model.safetensors": {"a": torch.zeros(10)}}, {})
checkpoint.save(run / "best", {"model.safetensors": {"a": torch.zeros(10)}}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in ("step-00000400", "best"):
    try:
        checkpoint.save(run / name, {"model.safetensors": {"a": torch.ones(1 << 18)}}, {})
    except CheckpointError as error:
        print(error.exit_code, error.what, "|", error.fix)
"""


def test_no_space_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    done = python(SAVE_TWICE, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("4 could not save step 400: no space (needs 1.0 MiB, free ")
    assert f"--resume {tmp_path}" in first
    assert second.startswith("4 could not save best: no space (needs 1.0 MiB, free ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000001"]
    assert checkpoint.load(tmp_path / "best")[0][MODEL]["a"].sum() == 0


def test_a_run_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"could not save step 3: No such file or directory \(.*gone"):
        saved(tmp_path / "gone", 3)


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(point: str) -> None:
        raise KeyboardInterrupt

    saved(tmp_path, 1)
    checkpoint.save(tmp_path / "best", {MODEL: tensors(1)}, {})
    monkeypatch.setattr(checkpoint, "_fault", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "_fault", lambda point: interrupted(point) if point == "replace" else None)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "best", {MODEL: tensors(2)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000001"]
    assert checkpoint.load(tmp_path / "best")[0][MODEL]["step"] == 1


# One import of torch for all children: they are forked.
KILLED_INSIDE_A_SAVE = """
import os, sys, torch
from pathlib import Path
from fastadv import checkpoint


def save_best(run, fault):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.environ["FASTADV_FAULT"] = fault
    for value in range(1, 5):
        checkpoint.save(run / "best", {"model.safetensors": {"value": torch.tensor(value)}}, {})
    os._exit(0)


def state(run):
    return sorted(p.name for p in run.iterdir()), int(checkpoint.load(run / "best")[0]["model.safetensors"]["value"])


for fault in sys.argv[2:]:
    run = Path(sys.argv[1]) / fault
    run.mkdir()
    print(save_best(run, fault), *state(run))
    checkpoint.clean(run)
    print(*state(run))
    print(save_best(run, ""), *state(run))
"""


def test_a_kill_inside_a_save_leaves_a_loadable_best(tmp_path: Path) -> None:
    done = python(KILLED_INSIDE_A_SAVE, tmp_path, "save:3", "replace:2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{-signal.SIGKILL} ['.tmp-best', 'best'] 2",
        "['best'] 2",
        "0 ['best'] 4",
        f"{-signal.SIGKILL} ['.old-best', '.tmp-best'] 2",
        "['best'] 2",
        "0 ['best'] 4",
    ]


KILLED_AT_RANDOM = """
import json, os, random, signal, sys, time, warnings, torch
from pathlib import Path
from fastadv import checkpoint

warnings.simplefilter("error")
run = Path(sys.argv[1])


def content(step):
    return torch.arange(20_000) * step


def work(tell):
    checkpoint.clean(run)
    step = checkpoint.newest(run)[2]["step"] if checkpoint.steps(run) else 0
    while True:
        step += 1
        files = {"model.safetensors": {"a": content(step)}, "optimizer.safetensors": {"a": content(step + 1)}}
        checkpoint.save(run / "best", files, {"step": step})
        os.write(tell, b".")
        checkpoint.save(checkpoint.step_folder(run, step), files, {"step": step})
        checkpoint.prune(run)
        os.write(tell, b".")


random.seed(0)
last, leftovers = 0, 0
for _ in range(20):
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        work(tell)
    os.close(tell)
    # Whatever the machine's load: let it save a few times, then kill it within the time that a save takes.
    began = time.perf_counter()
    saves = random.randint(1, 4)
    for _ in range(saves):
        assert os.read(told, 1), "the child ended by itself"
    time.sleep(random.random() * (time.perf_counter() - began) / saves)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(told)
    leftovers += any(path.name.startswith((".tmp-", ".old-")) for path in run.iterdir())
    if checkpoint.steps(run):
        _, files, meta = checkpoint.newest(run)
        assert torch.equal(files["model.safetensors"]["a"], content(meta["step"]))
        assert torch.equal(files["optimizer.safetensors"]["a"], content(meta["step"] + 1))
        assert meta["step"] >= last, "went back"
        last = meta["step"]
    files, meta = checkpoint.load(run / "best")
    assert torch.equal(files["model.safetensors"]["a"], content(meta["step"]))
    assert meta["step"] - last in (0, 1)
print(json.dumps({"steps": last, "leftovers": leftovers}))
"""


def test_killed_at_random_moments_the_newest_is_whole(tmp_path: Path) -> None:
    done = python(KILLED_AT_RANDOM, tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["steps"] >= 10
    assert seen["leftovers"] > 0, "no kill fell inside a save: the test has shown nothing"


PUBLISHED_BY_COPY = """
import shutil


def copied(source, target):
    target.mkdir()
    for path in source.iterdir():
        time.sleep(0.02)
        shutil.copy(path, target)


checkpoint.os.rename = copied
random.seed(0)
"""


def test_a_writer_that_copies_instead_of_renaming_would_be_caught(tmp_path: Path) -> None:
    """The check above goes red on a planted fault."""
    done = python(KILLED_AT_RANDOM.replace("random.seed(0)\n", PUBLISHED_BY_COPY), tmp_path)
    assert done.returncode == 1
    assert "CheckpointWarning" in done.stderr or "CheckpointError" in done.stderr


def test_no_warning_for_an_undamaged_run(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest(tmp_path)[2] == {"step": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ('{"classes": ["a"', "cut off"), ("[]", "no classes"), ('{"classes": 3}', "no classes")],
)
def test_a_damaged_split_is_named(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "split.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"split\.json cannot be used: .*{reason}"):
        checkpoint.read_split(tmp_path)
    (tmp_path / "split.json").write_text('{"classes": ["a", "b"], "val_from": "train"}')
    assert checkpoint.read_split(tmp_path) == {"classes": ["a", "b"], "val_from": "train"}

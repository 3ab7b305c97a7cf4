"""AutoAttack: the published verdicts, stages, state on disk, shares of several processes, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import make_verdicts
import nets
import pytest
import torch
from analytic import Affine, HalfSpace, images
from torch import Tensor, nn

from fastadv.attacks import autoattack, flags
from fastadv.attacks.apgd import APGD
from fastadv.attacks.autoattack import AutoAttack
from fastadv.attacks.fab import FAB
from fastadv.attacks.square import Square
from fastadv.attacks.stages import Stage, stages
from fastadv.attacks.store import card
from fastadv.attacks.verdicts import CLEAN_WRONG, SURVIVED, Verdicts, export_state
from fastadv.errors import CheckpointError, DataError, Elsewhere, NonFiniteGradientError, SettingsError
from fastadv.losses import misclassified
from fastadv.pgd import AttackResult
from fastadv.threat import ThreatModel

BALL = ThreatModel("linf", 0.05)
RECORDED = json.loads(make_verdicts.FILE.read_text())["runs"]
REPEATED = [run for run in RECORDED if "small" in RECORDED[run]]


class Striped(nn.Module):
    """Five classes by the mean of the image; easy to break by writing a mean into it."""

    def forward(self, x: Tensor) -> Tensor:
        return -(x.mean((1, 2, 3))[:, None] * 10 - torch.arange(5)).square()


@dataclass
class Scripted:
    """An attack that breaks the images whose number is in ``breaks`` and records what it was given."""

    breaks: set[int]
    calls: list[list[int]]
    fail_at: int | None = None

    def run(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, index: Tensor) -> AttackResult:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(index.tolist())
        # The clean images, whatever stages before did to them.
        assert torch.equal(x, X[index]) and torch.equal(y, Y[index])
        success = torch.tensor([number in self.breaks for number in index.tolist()])
        return AttackResult(torch.where(success.view(-1, 1, 1, 1), 1 - x, x), success, torch.zeros(len(x)))


# Means 0.02, 0.12, ...: labels 0 to 4 in turn; image 7 is given a wrong label.
MEANS = (torch.arange(12) % 5) / 10 + 0.02
X = MEANS.view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
Y = torch.arange(12) % 5
Y[7] = 0


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Scripted]]:
    """Three scripted stages: one, two, square."""
    parts = [Scripted({0, 5}, []), Scripted({5, 3}, []), Scripted({11}, [])]

    def planned(version: str, classes: int, **_: object) -> tuple[list[Stage], list[str]]:
        return [Stage(name, part) for name, part in zip(("one", "two", "square"), parts, strict=True)], []

    monkeypatch.setattr(autoattack, "stages", planned)
    yield parts


# What the published code found.


@pytest.mark.parametrize("run", REPEATED)
def test_parity_gives_the_published_verdict_on_every_image(run: str) -> None:
    """The committed verdicts of 500 images agree, and 16 of them, every stage among them, are attacked again here."""
    recorded = RECORDED[run]
    assert len(recorded["published"]) == nets.HELD_OUT and recorded["published"] == recorded["ours"]
    small = recorded["small"]
    assert len(small["rows"]) == 16 and small["differ"] == []
    net, norm = run.split()
    x, y = (part[small["rows"]] for part in nets.held_out())
    found = AutoAttack(mode="parity", batch_size=16).run(nets.load(net), x, y, ThreatModel(norm, recorded["eps"]))
    assert found.broken_by.tolist() == small["published"]
    assert found.stages == make_verdicts.STAGES


def test_the_recorded_runs_have_every_stage_in_them() -> None:
    for run in REPEATED:
        assert {0, 1, 2, 3, SURVIVED} <= set(RECORDED[run]["published"])
        right = [stage for stage in RECORDED[run]["published"] if stage != CLEAN_WRONG]
        assert 0.2 <= right.count(SURVIVED) / len(right) <= 0.8


@pytest.mark.parametrize("run", [run for run in REPEATED if run.endswith("linf")])
def test_fast_verdicts_are_confirmed_and_close_to_parity(run: str) -> None:
    """On the recorded batch: what fast counts as broken is, in the ball; at most one image differs in robustness."""
    recorded = RECORDED[run]["small"]
    model, ball = nets.load(run.split()[0]), ThreatModel("linf", RECORDED[run]["eps"])
    x, y = (part[recorded["rows"]] for part in nets.held_out())
    found = AutoAttack().run(model, x, y, ball)
    assert torch.equal(misclassified(model(found.adv), y), ~found.robust)
    assert (found.adv.double() - x.double()).abs().max() <= torch.tensor(ball.eps).double()
    survived = torch.tensor([stage == SURVIVED for stage in recorded["published"]])
    assert (survived != found.robust).sum() <= 1


# The run itself.


def test_each_stage_gets_what_is_left_from_clean_images(script: list[Scripted]) -> None:
    lines: list[str] = []
    found = AutoAttack(batch_size=4).run(Striped(), X, Y, BALL, progress=lines.append)
    assert script[0].calls == [[0, 1, 2, 3], [4, 5, 6, 8], [9, 10, 11]]
    assert script[1].calls == [[1, 2, 3, 4], [6, 8, 9, 10], [11]]
    assert script[2].calls == [[1, 2, 4, 6], [8, 9, 10, 11]]
    assert found.stages == ("one", "two", "square") and len(found.seconds) == 3
    expected = {0: 0, 5: 0, 3: 1, 11: 2, 7: CLEAN_WRONG}
    assert found.broken_by.tolist() == [expected.get(number, SURVIVED) for number in range(12)]
    assert torch.equal(found.robust, found.broken_by == SURVIVED)
    broken = torch.tensor([number in (0, 3, 5, 11) for number in range(12)])
    assert torch.equal(found.adv, torch.where(broken.view(-1, 1, 1, 1), 1 - X, X))
    assert [found.accuracy(stage) for stage in (0, 1, 2, 3, None)] == [n / 12 for n in (11, 9, 8, 7, 7)]
    # As the published code logs it: people parse these.
    assert lines[0] == "initial accuracy: 91.67%"
    assert "one - 2/3 - 1 out of 4 successfully perturbed" in lines
    assert any(line.startswith("robust accuracy after ONE: 75.00% (total time ") for line in lines)
    assert lines[-1] == "robust accuracy: 58.33%"
    # 1 of 12 is more than the 0.2 % that Square alone should find.
    assert any("Square broke 8.3%" in note for note in found.notes)


def test_it_ends_where_nothing_survives(script: list[Scripted]) -> None:
    script[0].breaks = set(range(12))
    found = AutoAttack().run(Striped(), X, Y, BALL)
    assert found.stages == ("one",) and not found.robust.any() and not script[1].calls
    assert "no image was left for two, square" in found.notes
    nobody = AutoAttack().run(Striped(), X, (Y + 1) % 5, BALL)
    assert nobody.stages == () and nobody.seconds == () and (nobody.broken_by == CLEAN_WRONG).all()
    none = AutoAttack().run(Striped(), X[:0], Y[:0], BALL)
    assert none.adv.shape == (0, 3, 8, 8) and none.accuracy() == 0.0


def test_a_whole_run_on_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """All real stages, on a model whose worst case is known."""
    monkeypatch.setattr(Square, "__post_init__", lambda self: object.__setattr__(self, "queries", 200))
    model = Affine()
    x = images(6)
    y = model(x).argmax(1)
    ball = ThreatModel("linf", 0.012)
    worst = model.worst_margins(x, y, "linf", ball.eps).scatter(1, y[:, None], -torch.inf).amax(1)
    assert (worst.abs() > 1e-3).all() and 0 < (worst > 0).sum() < 6
    found = AutoAttack().run(model, x, y, ball)
    assert torch.equal(found.robust, worst < 0)
    assert any("4 classes instead of 9" in note for note in found.notes)


# The stages.


def test_the_stages_of_each_version() -> None:
    names = {version: [stage.name for stage in stages(version, 10)[0]] for version in ("standard", "plus", "rand")}
    assert names == {
        "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
        "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
        "rand": ["apgd-ce", "apgd-dlr"],
    }
    given = {"seed": 3, "mode": "parity", "precision": "fp32"}
    plus = {stage.name: stage.attack for stage in stages("plus", 10, **given)[0]}
    assert plus["apgd-ce"] == APGD(restarts=5, **given) and plus["apgd-dlr"] == APGD(loss="dlr", restarts=5, **given)
    assert plus["fab"] == FAB(targeted=False, restarts=5, **given) and plus["fab-t"] == FAB(**given)
    assert plus["apgd-t"] == APGD(loss="dlr-targeted", **given) and plus["square"] == Square(**given)
    rand = [stage.attack for stage in stages("rand", 10)[0]]
    assert rand == [APGD(eot=20), APGD(loss="dlr", eot=20)]
    assert all(stages(version, 10)[1] == [] for version in names)


def test_few_classes_change_the_stages_and_are_noted() -> None:
    def of(version: str, classes: int) -> tuple[list[str], str]:
        found, notes = stages(version, classes)
        return [stage.name for stage in found], "; ".join(notes)

    assert of("standard", 4) == (
        ["apgd-ce", "apgd-t", "fab-t", "square"],
        "apgd-t and fab-t aim at 3 classes instead of 9: there are no more",
    )
    names, notes = of("standard", 3)
    assert names == ["apgd-ce", "apgd-dlr", "fab-t", "square"] and "in place of apgd-t" in notes
    names, notes = of("standard", 2)
    assert names == ["apgd-ce", "fab-t", "square"] and "apgd-t is left out: its loss needs 4 classes" in notes
    assert of("plus", 2)[0] == ["apgd-ce", "fab", "square", "fab-t"]
    assert of("rand", 2)[0] == ["apgd-ce"] and "apgd-dlr is left out" in of("rand", 2)[1]


@pytest.mark.parametrize("mode", ["fast", "parity"])
def test_two_classes_run_through(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HalfSpace()
    x = images(4)
    y = model(x).argmax(1)
    monkeypatch.setattr(Square, "__post_init__", lambda self: object.__setattr__(self, "queries", 20))
    found = AutoAttack(mode=mode).run(model, x, y, ThreatModel("linf", 1e-4))
    assert found.robust.all() and found.stages == ("apgd-ce", "fab-t", "square")


# State on disk.


@pytest.mark.parametrize("part", [0, 1, 2])
def test_an_interrupted_run_goes_on(script: list[Scripted], tmp_path: Path, part: int) -> None:
    whole = AutoAttack(batch_size=4).run(Striped(), X, Y, BALL)
    calls = [list(stage.calls) for stage in script]
    for stage in script:
        stage.calls.clear()
    # In the second batch of each stage in turn.
    script[part].fail_at = 1
    with pytest.raises(KeyboardInterrupt):
        AutoAttack(batch_size=4).run(Striped(), X, Y, BALL, state=tmp_path)
    script[part].fail_at = None
    again = AutoAttack(batch_size=4).run(Striped(), X, Y, BALL, state=tmp_path)
    # No batch twice, none left out.
    assert [stage.calls for stage in script] == calls
    assert torch.equal(again.adv, whole.adv) and torch.equal(again.broken_by, whole.broken_by)
    third = AutoAttack(batch_size=4).run(Striped(), X, Y, BALL, state=tmp_path)
    assert [stage.calls for stage in script] == calls
    assert torch.equal(third.adv, whole.adv) and third.seconds == again.seconds


def test_a_state_folder_belongs_to_one_run(
    script: list[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(Affine(), nn.Linear(5, 5))
    attack, folder = AutoAttack(), tmp_path / "a" / "b"
    y = model(X).argmax(1)
    for stage in script:
        monkeypatch.setattr(stage, "run", lambda *_, index, **__: AttackResult(X[index], index < 0, index))
    attack.run(model, X, y, BALL, state=folder)
    attack.run(model, X, y, BALL, state=folder)
    for changed, kind, words in (
        (lambda: attack.run(model, X, (y + 1) % 5, BALL, state=folder), CheckpointError, "other images or labels"),
        (lambda: attack.run(model, X * 0.9, y, BALL, state=folder), CheckpointError, "other images or labels"),
        (
            lambda: AutoAttack(mode="parity", seed=1).run(model, X, y, BALL, state=folder),
            SettingsError,
            "holds results made with other settings: mode fast, now parity; seed 0, now 1;",
        ),
        (
            lambda: attack.run(model, X, y, ThreatModel("l2", 0.5), state=folder),
            SettingsError,
            rf"other settings: eps {BALL.eps}, now 0.5; norm linf, now l2;",
        ),
    ):
        with pytest.raises(kind, match=words) as caught:
            changed()
        assert "another folder" in caught.value.fix and f"remove {folder}" in caught.value.fix
    with torch.no_grad():
        model[1].bias[0] += 1e-6
    with pytest.raises(CheckpointError, match="other weights"):
        attack.run(model, X, y, BALL, state=folder)
    with pytest.raises(SettingsError, match="other things"):
        attack.run(model, X, y, BALL, state=tmp_path)


def test_a_damaged_batch_runs_again(script: list[Scripted], tmp_path: Path) -> None:
    whole = AutoAttack(batch_size=4).run(Striped(), X, Y, BALL, state=tmp_path)
    (file,) = (tmp_path / "two-00001").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for stage in script:
        stage.calls.clear()
    again = AutoAttack(batch_size=4).run(Striped(), X, Y, BALL, state=tmp_path)
    assert [stage.calls for stage in script] == [[], [[6, 8, 9, 10]], []]
    assert torch.equal(again.broken_by, whole.broken_by)
    assert any("batch 1 of two ran again" in note and "sha256" in note for note in again.notes)


def test_the_card_sees_every_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    x, y = torch.rand(3, 2), torch.arange(3)
    before = card(model, x, y, {"a": 1})
    assert card(model, x, y, {"a": 1}) == before
    model[1].running_mean[0] += 1
    assert card(model, x, y, {"a": 1})["weights"] != before["weights"]
    for other in ((x + 1e-7, y), (x, y + 1), (x.flip(0), y)):
        assert card(model, *other, {"a": 1})["data"] != before["data"]
    assert card(model, x, y, {"a": 2})["settings"] != before["settings"]


def test_the_exported_state_is_the_published_one(tmp_path: Path, script: list[Scripted]) -> None:
    found = AutoAttack().run(Striped(), X, Y, BALL)
    path = tmp_path / "state.json"
    export_state(found, path)
    state = json.loads(path.read_text())
    assert state["_robust_flags"] == found.robust.tolist() and state["_clean_accuracy"] == found.accuracy(0)
    assert state["_run_attacks"] == ["one", "two", "square"] and state["path"] == str(path)
    assert state["_attacks_to_run"] == "{'one', 'square', 'two'}" and state["_SAVE_TIMEOUT"] == 60
    assert os.listdir(tmp_path) == ["state.json"]
    published = pytest.importorskip("pyautoattack.state", reason="pip install fastadv[bench]")
    read = published.EvaluationState.from_disk(path)
    assert read.robust_flags.tolist() == found.robust.tolist() and read.clean_accuracy == found.accuracy(0)
    own = published.EvaluationState({"one"}, path=tmp_path / "own.json")
    own.robust_flags, own.clean_accuracy = found.robust, 1.0
    own.to_disk(force=True)
    theirs = json.loads((tmp_path / "own.json").read_text())
    assert {key: type(value) for key, value in theirs.items()} == {key: type(value) for key, value in state.items()}


# Several processes.

WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
import nets
from pathlib import Path
from fastadv.attacks.autoattack import AutoAttack
from fastadv.attacks import stages
from fastadv.threat import ThreatModel
torch.set_num_threads(1)
x, y = (part[:24] for part in nets.held_out())
plan = stages.stages
def short(*args, **kwargs):
    return plan(*args, **kwargs)[0][:2], []
from fastadv.attacks import autoattack
autoattack.stages = short
state = Path(sys.argv[2]) if len(sys.argv) > 2 else None
if sys.argv[1].endswith("uneven") and int(__import__("os").environ["RANK"]):
    x = x * 0.5
found = AutoAttack(mode="parity", batch_size=5).run(nets.load("plain"), x, y, ThreatModel("linf", 0.1), state=state)
rank = __import__("os").environ.get("RANK", "alone")
torch.save(dict(adv=found.adv, broken_by=found.broken_by, stages=found.stages), sys.argv[1] + rank)
"""


def work(tmp_path: Path, name: str, size: int, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """The worker in ``size`` processes, as torchrun would start them."""
    with __import__("socket").socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    code = WORKER.format(tests=str(Path(__file__).parent))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / name), *words],
            env={**os.environ, **(world | {"RANK": str(rank)} if size > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    return [
        subprocess.CompletedProcess([], process.returncode, "", error)
        for process, error in zip(started, errors, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_give_the_verdict_of_one(tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    for size, words in ((1, ()), (2, (folder,))):
        for done in work(tmp_path, f"of{size}-", size, *words):
            assert done.returncode == 0, done.stderr
    alone, first, second = (torch.load(tmp_path / name) for name in ("of1-alone", "of2-0", "of2-1"))
    assert 0 < (alone["broken_by"] == SURVIVED).sum() < 24 and {0, 1} <= set(alone["broken_by"].tolist())
    for found in (first, second):
        assert torch.equal(found["broken_by"], alone["broken_by"]) and torch.equal(found["adv"], alone["adv"])
        assert found["stages"] == alone["stages"]
    # Each batch of each stage once, by whichever process.
    assert {path.name for path in Path(folder).iterdir()} >= {"about", "apgd-ce-00000", "apgd-ce-00001", "apgd-t-00000"}


@pytest.mark.slow
def test_processes_with_other_images_are_told(tmp_path: Path) -> None:
    for done in work(tmp_path, "uneven", 2):
        assert done.returncode and "the processes were given different models, images or settings" in done.stderr


def test_another_process_failing_ends_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadv import sharing

    def with_a_second_that_failed(flags: Tensor, op: object) -> None:
        torch.maximum(flags, torch.tensor([0, 5, 1]), out=flags)

    monkeypatch.setattr(sharing.dist, "all_reduce", with_a_second_that_failed)
    monkeypatch.setattr(sharing, "_device", lambda: "cpu")
    with pytest.raises(Elsewhere, match="another process") as caught, sharing.Share(0, 2).together():
        pass
    assert caught.value.exit_code == 5
    with pytest.raises(ZeroDivisionError), sharing.Share(0, 2).together():
        raise ZeroDivisionError


# Flags and refusals.


def noted(model: nn.Module, version: str = "standard") -> str:
    """The notes on a model that nothing is left of."""
    return "; ".join(AutoAttack(version=version).run(model, X, Y, BALL).notes)


def test_probabilities_are_warned_about(script: list[Scripted]) -> None:
    with pytest.warns(UserWarning, match="probabilities"):
        assert "probabilities" in noted(nn.Sequential(Striped(), nn.Softmax(1)))
    assert noted(Striped()) == noted(Striped()) and "probabilities" not in noted(Striped())


def test_a_random_model_is_noted_unless_that_is_expected(script: list[Scripted]) -> None:
    class Noisy(Striped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.01 * torch.rand(5)

    assert 'version="rand"' in noted(Noisy()) and 'version="rand"' not in noted(Noisy(), "rand")
    assert 'version="rand"' not in noted(Striped())


def test_zero_gradients_are_counted(script: list[Scripted]) -> None:
    class Stairs(Striped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + ((x * 255).round() / 255 - x).detach() - x + x.detach())

    assert "zero for 11 of 12 images" in noted(Stairs())
    assert "zero for" not in noted(Striped())


def test_square_may_find_two_in_a_thousand() -> None:
    assert flags.square_flag(500, 498, 1000) == []
    assert "0.3%" in flags.square_flag(500, 497, 1000)[0]


def test_what_is_refused() -> None:
    class Hole(Striped):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where((x[:, :1, 0, 0] - 0.42).abs() < 0.01, torch.nan, super().forward(x))

    with pytest.raises(NonFiniteGradientError, match=r"2 of 12 images: 4, 9") as caught:
        AutoAttack(batch_size=12).run(Hole(), X, Y, BALL)
    assert "weights" in caught.value.fix
    with pytest.raises(DataError, match="label 5, but the model has 5 classes"):
        AutoAttack().run(Striped(), X, Y + 1, BALL)
    for wrong, words in (
        ({"version": "standart"}, "did you mean 'standard'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"mode": "exact"}, "unknown mode"),
        ({"mode": "parity", "precision": "bf16"}, "parity"),
    ):
        with pytest.raises(SettingsError, match=words):
            AutoAttack(**wrong)


def test_a_verdict_reads_well() -> None:
    assert (
        str(AutoAttack()) == "AutoAttack standard" and str(AutoAttack(mode="parity")) == "AutoAttack standard, parity"
    )
    empty = Verdicts(X[:0], Y[:0] == 0, Y[:0].to(torch.int8), (), (), [])
    assert empty.accuracy() == 0.0

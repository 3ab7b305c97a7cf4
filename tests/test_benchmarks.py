"""The benchmarks themselves: baselines that are what they say, checks that can fail, programs that run to their end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import clock
import contestants
import equal
import gpu_check
import gpu_ladder
import gpu_parts
import gpu_report
import limits
import memory
import peers
import table
import targets
import transcriptions

from fastadv import models, ops
from fastadv.engine import Fast


@pytest.fixture
def agreement(net: nn.Module) -> contestants.Agreement:
    model = models.Classifier(net[:-1], 256, 10, name="tiny", input_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    return contestants.Agreement(model.eval(), torch.rand(8, 3, 8, 8), torch.randint(0, 10, (8,)), steps=4)


@pytest.mark.parametrize("name", contestants.installed())
def test_every_contestant_makes_fastadvs_pixels(agreement: contestants.Agreement, name: str) -> None:
    share, attack = agreement.check(contestants.CONTESTANTS[name])
    # bf16 has pixels of its own.
    assert share > 0.999 or name == contestants.AUTO
    assert attack(agreement.x, agreement.y).shape == agreement.x.shape


@pytest.mark.parametrize("fault", ["eps", "sign", "projection", "noise"])
def test_a_wrong_baseline_is_found(
    agreement: contestants.Agreement, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    ascended, start = transcriptions.ascended, transcriptions.uniform_start
    wrong = {
        "eps": lambda adv, grad, x, step, eps: ascended(adv, grad, x, step, 0.9 * eps),
        "sign": lambda adv, grad, x, step, eps: ascended(adv, -grad, x, step, eps),
        "projection": lambda adv, grad, x, step, eps: adv.detach() + step * grad.sign(),
    }
    if fault == "noise":
        monkeypatch.setattr(transcriptions, "uniform_start", lambda x, eps: start(x, eps).roll(1, 0))
    else:
        monkeypatch.setattr(transcriptions, "ascended", wrong[fault])
    for name in ("RoLI's loop", "MadryLab's loop"):
        assert agreement.check(contestants.CONTESTANTS[name])[0] < 0.999


@pytest.mark.parametrize(("name", "passes", "fills"), [("roli", 5, True), ("madry", 5, False), ("textbook", 4, False)])
def test_a_transcribed_loop_does_the_work_of_the_original(net: nn.Module, name: str, passes: int, fills: bool) -> None:
    """RoLI's fills p.grad in every step; it and MadryLab's judge the last iterate in one more forward pass."""
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    getattr(transcriptions, name)(net, x, y, x, steps=4, step_size=0.01, eps=0.03)
    assert len(calls) == passes
    assert all((parameter.grad is not None) == fills for parameter in net.parameters())


def test_a_batch_level_mask_takes_everything_or_nothing() -> None:
    best, adv = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    loss = torch.tensor(1.0)
    transcriptions.keep_higher(torch.tensor(0.5), adv, loss, best)
    assert best.sum() == 0
    transcriptions.keep_higher(torch.tensor(2.0), adv, loss, best)
    assert best.sum() == 2
    assert loss == 2
    losses = torch.tensor([3.0, 0.0])
    transcriptions.keep_higher(torch.tensor([2.0, 1.0]), 5 * adv, losses, best)
    assert best.flatten().tolist() == [1, 5]
    assert losses.tolist() == [3, 1]


def test_turns_rotate_and_ratios_are_taken_round_by_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    rounds: list[int] = []
    turns = clock.taking_turns(calls, 3, before=rounds.append)
    assert "".join(order) == "abcbcacab"
    assert rounds == [0, 1, 2]
    assert all(len(own) == 3 for own in turns.values())
    # A slow second round doubles both sides: their ratio stays.
    known = {"a": [clock.Turn(wall, 1) for wall in (1, 2, 1)], "b": [clock.Turn(3 * wall, 2) for wall in (1, 2, 1)]}
    found = clock.summary(known, "a")
    assert found["b"]["wall_ratio_range"] == [3, 3]
    assert (found["b"]["wall_s"], found["b"]["wall_range_s"], found["b"]["cpu_ratio"]) == (3, [3, 6], 2)


def test_saved_bytes_are_counted_once_and_given_back() -> None:
    model = nn.Linear(4, 4)
    x = torch.rand(8, 4, requires_grad=True)
    with memory.Saved(model) as saved:
        out = model(x).exp()
        # The weight is the model's; the product's input and the exponential's output are saved, 8 x 4 floats each.
        assert saved.now == 2 * 8 * 4 * 4
        again = (out * out).sum()
        assert saved.now == 2 * 8 * 4 * 4, "the output was saved already"
        again.backward()
        del out, again
    assert (saved.now, saved.most) == (0, 2 * 8 * 4 * 4)


def test_peak_memory_sees_what_an_attack_allocates() -> None:
    x = torch.rand(1, 3, 8, 8)
    # 64 MiB, written to: resident memory counts pages that were touched.
    peak = memory.peak_bytes(lambda x, y: torch.ones(2**24).sum(), x, x)
    # The kernel counts up to 64 pages late for each thread; the allocator and Python need a little besides.
    assert 62 * 2**20 <= peak < 96 * 2**20


def document(bf16: bool, **ratios: float) -> dict:
    """The JSON of peers.py with these wall ratios."""
    rows = {name: {"wall_ratio": ratio, "equal_pixels": 1.0} for name, ratio in ratios.items()}
    return {"conditions": {"native_bf16": bf16}, "cells": {targets.CELLS["attack"]: {"rows": rows}}}


def test_targets_are_met_missed_or_explained() -> None:
    slow = document(False, **{"fastadv fp32": 1.0, "torchattacks": 1.3, "RoLI's loop": 1.6})
    verdicts = [row["verdict"] for row in targets.judged(slow)]
    assert len(verdicts) == len(targets.CPU_TARGETS)
    assert verdicts[:2] == ["met", "missed"]
    assert verdicts[2:5] == [targets.NO_BF16] * 3
    assert verdicts[5].startswith("not measured: memory/")
    fast = document(True, **{"fastadv fp32": 1.0, "fastadv auto": 0.5, "torchattacks": 1.3, "RoLI's loop": 1.5})
    assert [row["measured"] for row in targets.judged(fast)][2:4] == [2.6, 3.0]
    assert len(targets.lines(targets.judged(fast))) == len(targets.CPU_TARGETS)
    fast["cells"][targets.CELLS["memory"]] = {
        "rows": {"fastadv fp32": {"peak_bytes": 5}, "RoLI's loop": {"peak_bytes": 10}}
    }
    assert targets.judged(fast)[5]["verdict"] == "met"


def test_the_tables_hold_every_row_and_stand_between_their_markers(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    out = results / "peers_cpu.json"
    quick = ["--quick", "--only", "attack/resnet20_32", "--out", str(out)]
    assert peers.main(quick) == 0
    known = json.loads(out.read_text())
    (cell,) = known["cells"].values()
    assert {"fastadv fp32", "RoLI's loop", "MadryLab's loop"} <= set(cell["rows"])
    assert all(row["equal_pixels"] > 0.999 for name, row in cell["rows"].items() if name != contestants.AUTO)
    assert len(known["targets"]) == len(targets.CPU_TARGETS)
    assert {"torch", "commit", "cpu"} <= set(known["conditions"]["environment"])
    # A cell that is there is kept by --resume, under the same conditions alone.
    cell["took_s"] = -1
    out.write_text(json.dumps(known))
    assert peers.main([*quick, "--resume"]) == 0
    assert json.loads(out.read_text())["cells"]["attack/resnet20_32"]["took_s"] == -1
    known["conditions"]["settings"]["rounds"] = 5
    assert peers.opened(out, known["conditions"], resume=True)["cells"] == {}

    readme, plot = tmp_path / "README.md", tmp_path / "plot.svg"
    options = ["--results", str(results), "--readme", str(readme), "--plot", str(plot), "--write"]
    readme.write_text("before\n")
    with pytest.raises(ValueError, match="peers:begin"):
        table.main(options)
    readme.write_text("before\n<!-- peers:begin -->\nold\n<!-- peers:end -->\nafter\n")
    assert table.main(options) == 0
    text, drawn = readme.read_text(), plot.read_text()
    assert text.startswith("before\n<!-- peers:begin -->\n|")
    assert text.endswith("|\n<!-- peers:end -->\nafter\n") or text.endswith(".\n<!-- peers:end -->\nafter\n")
    assert "old" not in text
    assert all(f"| {name} |" in text for name in cell["rows"])
    assert "resnet20_32" in drawn
    assert table.main(options) == 0
    assert (readme.read_text(), plot.read_text()) == (text, drawn)


def test_a_contestant_that_differs_is_shown_but_not_timed() -> None:
    assert table.timing({"equal_pixels": 0.5}) == "not timed: 50.0 % of the pixels equal"


def test_equal_robustness_finds_a_weak_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = {"num": 30, "eps": 8 / 255, "steps": 1, "precisions": ["fp32"]}
    honest = equal.compared("digits", **ask)
    assert honest["accelerated"]["fp32"]["difference_points"] == 0
    assert honest["plain"]["hits"] < honest["clean"]["hits"]
    monkeypatch.setattr(Fast, "__call__", lambda self, x, *_: x)
    weak = equal.compared("digits", **ask)["accelerated"]["fp32"]
    assert weak["difference_points"] > 0
    assert weak["only_plain_breaks"] == weak["hits"] - honest["plain"]["hits"]
    assert equal.text(honest).count("\n") == 3


def test_flops_are_those_of_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = models.create(limits.SWIN_TINY, 1000).eval()
        x = torch.rand(1, 3, 224, 224)
    counted = []
    for learns in (False, True):
        model.requires_grad_(learns)
        with FlopCounterMode(display=False) as forward:
            out = model(x.requires_grad_())
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counted.append([counter.get_total_flops() / 1e9 for counter in (forward, backward)])
    (forward, to_image), (_, to_all) = counted
    # Rounded to two digits there. The full backward was counted without the images' own gradient, 0.03 GFLOP.
    assert (forward, to_image, to_all) == pytest.approx(limits.FLOPS[limits.SWIN_TINY], abs=0.04)
    assert limits.gflop(limits.SWIN_TINY, "training", 7) == pytest.approx(155, rel=0.01)
    assert limits.gflop("resnet50", "attack", 10) is None


JUNIT = "<testsuites><testsuite>{}</testsuite></testsuites>"
PASSED = '<testcase classname="t" name="a"/>'
SKIPPED = '<testcase classname="t" name="b"><skipped/></testcase>'
FAILED = '<testcase classname="t" name="c"><failure/></testcase>'
BROKEN = '<testcase classname="" name="tests.test_x"><error/></testcase>'


@pytest.mark.parametrize(
    ("cases", "passed", "failed"),
    [
        (PASSED + SKIPPED, 1, []),
        (SKIPPED, 0, []),
        (PASSED + FAILED, 1, ["t::c"]),
        (PASSED + BROKEN, 1, ["::tests.test_x"]),
    ],
)
def test_gpu_tests_that_did_not_run_are_no_success(cases: str, passed: int, failed: list[str]) -> None:
    assert gpu_check.counted(JUNIT.format(cases)) == (passed, failed)


def a_check(tmp_path: Path, budget: float = 60) -> gpu_check.Check:
    return gpu_check.Check(out=tmp_path / "gpu.json", device="cpu", tiny=True, budget=budget)


def test_no_gpu_test_that_ran_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU all of them skip, which is what the check must notice."""
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "test_it.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it():\n    pytest.skip('none')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    check = a_check(tmp_path)
    gpu_check.tests(check, 60)
    assert check.document["parts"]["tests"]["status"] == "failed"
    assert check.document["parts"]["tests"]["rows"] == [{"passed": 0, "failed": []}]


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ("rows.write('{\"a\": 1}\\n')", "ok", ""),
        ("rows.write('{\"a\": 1}\\n'); rows.flush(); raise RuntimeError('planted')", "failed", "planted"),
        ('rows.write(\'{"a": 1}\\n{"b"\'); rows.flush(); import time; time.sleep(60)', "failed", "killed"),
    ],
)
def test_what_a_part_measured_survives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, status: str, why: str
) -> None:
    def child(check: object, part: object, rows: Path, deadline: float) -> list[str]:
        return [sys.executable, "-S", "-c", f"rows = open({str(rows)!r}, 'w'); {body}"]

    monkeypatch.setattr(gpu_check, "child", child)
    # Killed 10 s after the budget is spent; this one was spent 8 s ago.
    check = a_check(tmp_path, budget=-8)
    gpu_check.measure(check, gpu_parts.Part("planted", least=-20, most=0, job=""))
    found = json.loads(check.out.read_text())["parts"]["planted"]
    assert (found["status"], found["rows"]) == (status, [{"a": 1}])
    assert why in found["why"]


def test_a_part_without_time_is_skipped_and_says_so(tmp_path: Path) -> None:
    check = a_check(tmp_path, budget=5)
    gpu_check.measure(check, gpu_parts.PARTS[3])
    (found,) = check.document["parts"].values()
    assert found["status"] == "skipped"
    assert "it needs 60" in found["why"]


def dry_run(out: Path, *skip: str) -> int:
    """The parts of the dry run but those named, in this process."""
    names = [part.name for part in gpu_parts.DRY]
    asked = ["--device", "cpu", "--tiny", "--in-process", "--out", str(out), "--skip", "install"]
    return gpu_check.main([*asked, *(name for name in names if name.split()[0] in skip)])


def test_the_gpu_check_runs_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts with the plain replayer, on the CPU, and everything that is promised has its line."""
    # The others differ from these in settings alone.
    few = (gpu_ladder.FP32, "fastadv, eager bf16", gpu_ladder.AUTO)
    monkeypatch.setattr(gpu_ladder, "RUNGS", [rung for rung in gpu_ladder.RUNGS if rung.name in few])
    out = tmp_path / "gpu.json"
    assert dry_run(out, "strength") == 0
    found = json.loads(out.read_text())
    assert all(part["status"] == "ok" for part in found["parts"].values())
    rows = [row for row in found["parts"]["ladder swin_micro_64 2"]["rows"] if "images_per_s" in row]
    for job in ("attack", "training"):
        last = [row for row in rows if row["job"] == job][-1]
        assert (last["rung"], last["captured"], last["launches_per_batch"]) == ("fastadv", True, 1)
    assert all(row["step_recorded"] for row in rows if row["rung"] == "fastadv" and row["job"] == "training")
    assert len(found["targets"]) == 7
    assert all(row["verdict"] in ("met", "missed") or "not measured" in row["verdict"] for row in found["targets"])
    assert {"torch", "cpu", "commit"} <= set(found["environment"])
    assert len(found["tables"]) == 3


def test_an_op_in_plain_pytorch_fails_the_gpu_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "body", lambda name, device="cpu": "reference")
    out = tmp_path / "gpu.json"
    assert dry_run(out, "step", "window", "ladder", "strength") == 1
    assert "plain PyTorch" in json.loads(out.read_text())["parts"]["machine"]["why"]


def test_a_loop_that_is_not_captured_fails_the_gpu_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fast, "captured", property(lambda self: False))
    monkeypatch.setattr(gpu_ladder, "RUNGS", [rung for rung in gpu_ladder.RUNGS if rung.name == "fastadv"])
    out = tmp_path / "gpu.json"
    assert dry_run(out, "machine", "step", "window", "strength") == 1
    assert "'captured': False" in json.loads(out.read_text())["parts"]["ladder swin_micro_64 2"]["why"]


def test_the_gpu_check_judges_what_it_measured() -> None:
    def rung(name: str, job: str, batch: int, seconds: float) -> dict:
        row = {"job": job, "model": gpu_report.BASE, "batch": batch, "steps": 7, "rung": name, "seconds": seconds}
        return row | gpu_ladder.speeds(gpu_report.BASE, job, batch, 7, [seconds])

    ladder = [rung(gpu_report.ROLI, "training", 64, 1.8), rung("fastadv", "training", 64, 0.2)]
    ladder += [rung(gpu_report.TF32, "training", 128, 0.6), rung("fastadv", "training", 128, 0.2)]
    ladder += [rung(gpu_report.MADRY, "attack", 128, 2.0), rung("fastadv", "attack", 128, 0.2)]
    step = {"what": "linf_step", "tb_per_s": 3.9, "plain_over_fused": 6.0}
    ladder += [{**step, "gradient": "bfloat16", "share_of_copy": 0.1}]
    ladder += [{**step, "gradient": "float32", "share_of_copy": 0.9}]
    ladder += [{"what": "total", "forward_tb_per_s": 3.5, "backward_tb_per_s": 3.0}]
    found = gpu_report.targets({"parts": {"all": {"rows": ladder}}})
    assert [row["verdict"] for row in found[:2]] == ["met", "missed"]
    assert "torchattacks, fp32 was not timed" in found[2]["verdict"]
    assert found[2]["verdict"].endswith(": 10.00")
    assert [row["verdict"] for row in found[3:]] == ["met", "met", "met", "missed"]
    assert found[3]["measured"] == pytest.approx(640)
    text = table.gpu({"targets": found, "tables": gpu_report.tables({"parts": {"all": {"rows": ladder}}})})
    assert "640 (" not in text, "RoLI's loop was not timed at that batch size, so there is no ratio"
    assert "| 640 |" in text


@pytest.mark.slow
def test_a_part_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, gpu_parts.__file__, "machine", "--rows", str(rows), "--device", "cpu", "--tiny"]
    subprocess.run([*command, "--deadline", str(time.time() + 60)], check=True, timeout=120)
    assert [row["what"] for row in gpu_check.read_rows(rows)] == ["bodies", "copy", "bf16 product"]

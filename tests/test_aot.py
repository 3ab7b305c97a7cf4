"""The Triton kernels compiled ahead of time for sm_80 and sm_90: 16-byte accesses, no spills, tensor cores."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not there (not Linux)")


def check(cache, *arguments, program="aot_checker.py"):
    # A cache of its own: what is read was compiled now.
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_kernel_uses_wide_accesses_and_spills_nothing(tmp_path):
    result = check(tmp_path, "product")
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert len(reports) == 24
    assert [report["name"] for report in reports if report["faults"]] == []


def test_the_checker_goes_red_on_scalar_loads_and_on_spills(tmp_path):
    result = check(tmp_path, "planted")
    assert result.returncode == 0, result.stderr
    for scalar, spilling in zip(*[iter(json.loads(result.stdout))] * 2, strict=True):
        assert [fault.split(":")[0] for fault in scalar["faults"]] == ["narrow loads", "narrow stores"]
        assert [fault.split(":")[0] for fault in spilling["faults"]] == ["spills"]
        assert spilling["local"] > 0


def test_a_missing_disassembler_is_a_failure(tmp_path):
    result = check(tmp_path, "planted", "--tools", str(tmp_path / "nowhere"))
    assert result.returncode == 1
    assert "cuobjdump" in result.stderr


def test_window_attention_runs_on_tensor_cores_and_spills_nothing(tmp_path):
    result = check(tmp_path, "product", "planted", program="aot_window.py")
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert len(reports["product"]) == 9
    assert [report["name"] for report in reports["product"] if report["faults"]] == []
    assert sum(report["HGMMA"] > 0 for report in reports["product"]) == 3
    # The same checker goes red.
    for spilling, single in zip(*[iter(reports["planted"])] * 2, strict=True):
        assert [fault.split(":")[0] for fault in spilling["faults"]] == ["spills"]
        assert spilling["local"] > 0
        assert [fault.split(":")[0] for fault in single["faults"]] == ["tensor cores", "waiting"]

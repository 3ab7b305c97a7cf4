"""A result remembers the versions, the machine and the commit it was made with."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastadv import environment


def test_the_environment_names_what_a_number_depends_on() -> None:
    found = environment.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert found["command"] == shlex.join(sys.orig_argv)
    assert {"fastadv", "timm", "numpy", "safetensors", "platform", "gpus"} <= found.keys()


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    ran = subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True)
    return ran.stdout.strip()


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fastadv").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "fastadv" / "environment.py"))
    assert environment._checkout() == {}
    git(tmp_path, "init", "-q")
    assert environment._checkout() == {}, "no commit yet"
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert environment._checkout() == {"commit": commit, "modified": False}
    (tmp_path / "fastadv" / "environment.py").touch()
    assert environment._checkout() == {"commit": commit, "modified": True}

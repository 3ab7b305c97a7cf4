"""What a number depends on besides its recipe: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fastadv import __version__

PACKAGES = ("torch", "triton", "timm", "torchvision", "numpy", "safetensors")


def environment() -> dict[str, Any]:
    """What a number depends on besides the recipe: versions, machine, threads, commit of the checkout, command line."""
    # Not at the top: its import takes seconds.
    import torch

    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "fastadv": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": cuda,
        "cuda": torch.version.cuda,
        **_checkout(),
        "command": shlex.join(sys.orig_argv),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _checkout() -> dict[str, Any]:
    """Commit of the git checkout that this package runs from, and whether files differ from it; nothing elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    commit, changes = (_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    return {} if commit is None else {"commit": commit, "modified": None if changes is None else bool(changes)}


def _git(root: Path, *words: str) -> str | None:
    try:
        ran = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()

"""The shared library of the CPU ops: found where the package was installed or in the cache, compiled where it is not.

Imports nothing of this package and torch only inside functions, so that setup.py can load this file by its path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    # The exact ball needs every operation rounded by itself: neither fused into an fma nor reordered (no fast-math).
    "-ffp-contract=off",
    # These two change no value. Without them gcc leaves comparisons and square roots in branches and libm calls.
    "-fno-math-errno",
    "-fno-trapping-math",
    # The oldest torch the library has to load into: 2.11.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
# On top of these, by source. Window attention promises a tolerance, not bits: a product and a sum may be one fma.
MORE_FLAGS = {"window_attention.cpp": ("-ffp-contract=fast",)}


class BuildError(RuntimeError):
    """The library could not be made; the message says why."""


def library(sources: Path | None = None) -> Path:
    """The path of the shared library for this source, these flags and this torch; compiles it if there is none yet.

    Looks beside the sources (there an install puts it), then in the cache folder, where a compiled one is kept.
    Nothing waits for another process: two that compile at once both succeed, and the later rename wins.

    Raises: BuildError where there is no source, no compiler, or the compiler refuses.
    """
    sources = sources or source_folder()
    name = library_name(sources)
    if (sources / name).exists():
        return sources / name
    cached = cache_folder() / name
    return cached if cached.exists() else compile_library(sources, cached.parent)


def compile_library(sources: Path, folder: Path) -> Path:
    """Compile ``sources`` into ``folder`` (3 to 4 s on two cores) and return the library's path.

    The file appears whole or not at all: it is linked in a temporary folder beside its place, then renamed.
    """
    compiler, target = find_compiler(), folder / library_name(sources)
    torch_folder = _torch_folder()
    flags = [*FLAGS, f"-I{torch_folder / 'include'}"]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
            objects = {source: Path(scratch, source.stem + ".o") for source in _units(sources)}
            commands = [
                [*compiler, *flags, *MORE_FLAGS.get(source.name, ()), "-c", str(source), "-o", str(compiled)]
                for source, compiled in objects.items()
            ]
            _run_together(commands)
            built = Path(scratch, target.name)
            _run_together([[*compiler, "-shared", *map(str, objects.values()), "-o", str(built), *link]])
            with built.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(built, target)
    except OSError as error:
        raise BuildError(f"cannot write {target}: {error}") from error
    return target


def library_name(sources: Path) -> str:
    """The library's file name: a hash of the sources, the flags, the processor and torch's version."""
    digest = hashlib.sha256(repr((FLAGS, MORE_FLAGS, platform.machine(), _torch_version())).encode())
    for file in sorted([*sources.glob("*.h"), *sources.glob("*.cpp")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return f"fastadv_ops-{digest.hexdigest()[:16]}.so"


def source_folder() -> Path:
    """The folder of the C++ sources, the package ``fastadv.csrc``."""
    spec = importlib.util.find_spec("fastadv.csrc")
    if spec is None or spec.origin is None:
        raise BuildError("the package fastadv.csrc is not there (this checkout was never installed: pip install -e .)")
    return Path(spec.origin).parent


def cache_folder() -> Path:
    """Where compiled libraries are kept: ``$XDG_CACHE_HOME/fastadv``, ``~/.cache/fastadv``, or a temporary folder.

    The temporary folder serves homes that cannot be written. It belongs to this user and nobody else can write there:
    what lies in it will be loaded.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(home) and _writable(Path(home, "fastadv")):
        return Path(home, "fastadv")
    shared = Path(tempfile.gettempdir(), f"fastadv-{os.getuid()}")
    if _writable(shared) and shared.stat().st_uid == os.getuid() and not shared.stat().st_mode & 0o022:
        return shared
    return Path(tempfile.mkdtemp(prefix="fastadv-"))


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, g++, c++ or clang++."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler ({named[0] if named else 'g++, c++, clang++'} not found on PATH)")


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Asked by writing: permission bits say nothing about read-only mounts.
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _units(sources: Path) -> list[Path]:
    units = sorted(sources.glob("*.cpp"))
    if not units:
        raise BuildError(f"no C++ sources in {sources}")
    return units


def _run_together(commands: list[list[str]]) -> None:
    """Run the commands side by side; raise BuildError with the first complaint of one that failed."""
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    outputs = [process.communicate()[1] for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            complaints = [line for line in output.splitlines() if "error" in line] or output.splitlines()
            raise BuildError(f"{command[0]} ended with {process.returncode}: {' '.join(complaints[:1])}")


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def _torch_version() -> str:
    import torch

    return torch.__version__

"""The C++ library: built once, whole or not at all, where it can be written; and what happens without a compiler."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fresh_python import run_python

import fastadv
from fastadv import build

ROOT = Path(__file__).parents[1]
TRIVIAL = 'extern "C" int fastadv_answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path):
    """A folder of sources that compile in a moment."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(TRIVIAL)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastadv"


@pytest.fixture
def csrc(tmp_path):
    """The real sources, without a library that an install put beside them."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=ignore))


def test_compiled_once_and_again_when_the_source_changes(sources, cache):
    first = build.library(sources)
    written = first.stat().st_mtime_ns
    assert first.parent == cache
    assert build.library(sources) == first
    assert first.stat().st_mtime_ns == written
    (sources / "answer.cpp").write_text(TRIVIAL.replace("42", "43"))
    second = build.library(sources)
    assert second != first
    # Nothing of the building is left.
    assert sorted(cache.iterdir()) == sorted([first, second])


def test_a_library_beside_the_sources_is_taken_first(sources, cache):
    installed = build.compile_library(sources, sources)
    assert build.library(sources) == installed
    assert not cache.exists()


def test_the_name_depends_on_sources_flags_and_torch(sources, monkeypatch):
    names = {build.library_name(sources)}
    (sources / "answer.h").write_text("// an include\n")
    names.add(build.library_name(sources))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    names.add(build.library_name(sources))
    monkeypatch.setattr(build, "_torch_version", lambda: "2.11.0")
    names.add(build.library_name(sources))
    assert len(names) == 4


def test_a_killed_build_leaves_nothing_that_blocks(sources, cache, tmp_path):
    slow = tmp_path / "slow++"
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 600\n")
    slow.chmod(0o755)
    code = f"from pathlib import Path; from fastadv import build; build.library(Path({str(sources)!r}))"
    # A session of its own, so that its compiler dies with it.
    victim = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"CXX": str(slow)}, start_new_session=True)
    while not (tmp_path / "started").exists():
        assert victim.poll() is None
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not list(cache.glob("*.so"))
    assert build.library(sources).exists()


def test_two_builds_at_once_both_succeed(sources, cache):
    code = f"from pathlib import Path; from fastadv import build; print(build.library(Path({str(sources)!r})))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert printed == {str(build.library(sources))}


def test_a_home_that_cannot_be_written_falls_back_to_a_private_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    folder = build.cache_folder()
    assert folder == tmp_path / f"fastadv-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    # Where others can write, others choose what is loaded.
    folder.chmod(0o777)
    assert build.cache_folder() not in (folder, build.cache_folder())


def test_what_the_compiler_refuses_is_told(sources, cache, monkeypatch):
    (sources / "answer.cpp").write_text("int answer() { return question; }\n")
    with pytest.raises(build.BuildError, match=r"answer\.cpp:1:.*question"):
        build.library(sources)
    assert not list(cache.iterdir())
    (sources / "answer.cpp").unlink()
    with pytest.raises(build.BuildError, match=r"no C\+\+ sources"):
        build.library(sources)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler not found"):
        build.library(sources)


def importing(csrc):
    return f"from pathlib import Path; from fastadv import build; build.source_folder = lambda: Path({str(csrc)!r})\n"


@pytest.mark.slow
def test_the_first_import_builds_the_real_sources(csrc, cache):
    code = importing(csrc) + "from fastadv import ops; print(ops.body('linf_step'), ops.body('l2_step'))"
    assert run_python(code, FASTADV_OPS="native") == "cpp cpp\n"
    assert len(list(cache.glob("*.so"))) == 1


@pytest.mark.slow
def test_exactness_would_not_survive_fast_math(csrc, cache):
    # The planted fault for the tests of the exact ball: what a careless flag does to the library.
    code = importing(csrc) + (
        "build.FLAGS += ('-fassociative-math', '-fno-signed-zeros')\n"
        "import torch; from fastadv import ops\n"
        "grey = torch.arange(256).reshape(1, 256) / 255\n"
        "adv = ops.linf_step(grey.clone(), torch.ones_like(grey), grey, 1.0, 8 / 255, -1.0, 2.0)\n"
        "print(((adv.double() - grey.double()).abs() > torch.tensor(8 / 255).double()).sum().item())"
    )
    assert run_python(code, FASTADV_OPS="native") == "40\n"


def test_without_a_compiler_one_warning_and_the_reference(csrc, cache):
    code = importing(csrc) + (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from fastadv import ops\n"
        "    import torch\n"
        "    x = torch.rand(2, 3); ops.linf_step(x.clone(), x, x, 0.1, 0.1); ops.l2_step(x.clone(), x, x, 0.1, 0.1)\n"
        "print(ops.body('linf_step'), len(caught), caught[0].message)"
    )
    printed = run_python(code, CXX="no-such-compiler")
    assert printed.startswith("reference 1 fastadv: the C++ ops could not be built (no C++ compiler")
    assert "install g++ or set CXX" in printed
    with pytest.raises(AssertionError, match=r"FASTADV_OPS=native, but the C\+\+ ops could not be built"):
        run_python(code, CXX="no-such-compiler", FASTADV_OPS="native")


def test_setup_works_without_torch():
    pytest.importorskip("setuptools", reason="pip brings it into the build, and need not leave it in the environment")
    code = (
        "import importlib.util as u, runpy, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py')\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [fastadv.__version__, "False"]

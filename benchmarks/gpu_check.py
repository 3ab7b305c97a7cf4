"""One command for a GPU machine: install, GPU tests, kernels, the ladder on two Swins; one JSON, in under ten minutes.

``python benchmarks/gpu_check.py`` needs no network: wheels that the machine lacks may lie in .whl/. Every part is a
process of its own, so that one that crashes or hangs takes nothing with it; what it measured until then is kept, and
the JSON is written after each. Fails when an op runs as plain PyTorch, when a GPU test fails or none ran, and when
fastadv falls back from what it was asked for. ``--device cpu --tiny`` is the dry run: the same parts in seconds, with
numbers that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_parts
from gpu_parts import Part, Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What fastadv, its tests and the parts import; an installation without network brings none of it.
NEEDED = ("timm", "torchvision", "safetensors", "tyro", "rich", "sklearn", "matplotlib", "jinja2")
FOR_TESTS = ("pytest", "pytest_benchmark", "hypothesis")
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input")
MISSING = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))"
MACHINE = """
import json, torch; from fastadv.environment import environment
facts = environment(); facts.pop("command"); print(json.dumps(facts))
"""


@dataclass
class Check:
    """The document, written after every part, and the time that is left."""

    out: Path
    device: str
    tiny: bool
    budget: float
    in_process: bool = False
    began: float = field(default_factory=time.time)
    document: Row = field(default_factory=lambda: {"what": "gpu_check", "parts": {}})
    site: str = ""
    """A folder with packages from .whl/, for the processes of the parts."""

    def left(self) -> float:
        """Seconds of the budget that are not spent."""
        return self.began + self.budget - time.time()

    def note(self, name: str, status: str, began: float, *, why: str = "", rows: list[Row] | None = None) -> None:
        """Put a part into the document and write it. status: ok, failed or skipped."""
        took = round(time.time() - began, 1)
        self.document["parts"][name] = {"status": status, "why": why, "seconds": took, "rows": rows or []}
        self.document["seconds"] = round(time.time() - self.began, 1)
        self.write()
        print(f"{status:8}{name:44}{took:6.1f} s  {why}", flush=True)

    def write(self) -> None:
        """The JSON as it stands."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        draft = self.out.with_suffix(".part")
        draft.write_text(json.dumps(self.document, indent=1) + "\n")
        draft.replace(self.out)

    def environment(self) -> dict[str, str]:
        """Environment variables for the processes."""
        path = os.pathsep.join(part for part in (self.site, os.environ.get("PYTHONPATH", "")) if part)
        return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    def run(self, command: list[str], limit: float) -> str:
        """What a command prints. Raises RuntimeError with the end of what it said when it fails."""
        try:
            ran = subprocess.run(
                command,
                env=self.environment(),
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=max(1, min(limit, self.left())),
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{' '.join(command[:6])} ... took over {error.timeout:.0f} s") from error
        if ran.returncode:
            raise RuntimeError(f"{' '.join(command[:6])} ... failed: {(ran.stdout + ran.stderr)[-1500:]}")
        return ran.stdout


def install(check: Check) -> None:
    """The checkout into the running Python, without network; wheels from .whl/ into a folder beside it."""
    began = time.time()
    wheels = sorted((ROOT / ".whl").glob("*.whl"))
    try:
        if wheels:
            check.site = tempfile.mkdtemp(prefix="fastadv-wheels-")
            check.run([*PIP, "--no-index", "--target", check.site, *map(str, wheels)], 120)
        check.run([*PIP, "--no-build-isolation", "-e", str(ROOT)], 180)
        missing = check.run([sys.executable, "-c", MISSING, *NEEDED, *FOR_TESTS], 60).split()
    except RuntimeError as error:
        check.note("install", "failed", began, why=str(error))
        return
    cure = f"; to cure: python -m pip download --no-deps -d .whl {' '.join(missing)}"
    check.note("install", "ok", began, why=f"not installed: {' '.join(missing)}{cure}" if missing else "")


def machine_facts(check: Check) -> None:
    """Versions, device and commit into the document, and the file's name after the device."""
    try:
        # Not in this process, which does without torch: a broken installation might not let it import.
        facts = json.loads(check.run([sys.executable, "-c", MACHINE], 60).splitlines()[-1])
    except (RuntimeError, IndexError, ValueError) as error:
        facts = {"unknown": str(error)[-500:]}
    check.document["environment"] = facts
    if check.out.name == "gpu_.json":
        device = (facts.get("gpus") or [check.device])[0]
        check.out = check.out.with_name(f"gpu_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json")


def tests(check: Check, limit: float) -> None:
    """The GPU tests. Fails when one fails or cannot be collected, and when none ran."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "tests.xml", check.out.with_suffix(".tests.log")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        with log.open("w") as said:
            try:
                subprocess.run(
                    [*command, "--continue-on-collection-errors"],
                    env=check.environment(),
                    cwd=ROOT,
                    stdout=said,
                    stderr=said,
                    timeout=max(1, min(limit, check.left())),
                )
            except subprocess.TimeoutExpired:
                check.note("tests", "failed", began, why=f"not finished after {limit:.0f} s, see {log.name}")
                return
        passed, failed = counted(report.read_text()) if report.exists() else (0, [f"no report, see {log.name}"])
    why = f"{passed} passed" + (f"; failed: {', '.join(failed[:10])}, see {log.name}" if failed else "")
    if not failed and passed:
        log.unlink()
    rows = [{"passed": passed, "failed": failed}]
    check.note("tests", "failed" if failed or not passed else "ok", began, why=why, rows=rows)


def counted(report: str) -> tuple[int, list[str]]:
    """How many tests of a JUnit report passed, and the names of those that failed or could not be collected."""
    passed, failed = 0, []
    for case in ET.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" not in kinds:
            passed += 1
    return passed, failed


def compiling_ahead(check: Check, running: ExitStack) -> list[subprocess.Popen[bytes]]:
    """Start the processes that fill Inductor's cache; they end with ``running`` at the latest."""
    started = []
    for part in gpu_parts.AHEAD:
        command = child(check, part, Path(os.devnull), time.time() + part.most)
        process = subprocess.Popen(
            command, env=check.environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        running.callback(process.wait)
        running.callback(process.kill)
        started.append(process)
    return started


def wait_for(check: Check, started: list[subprocess.Popen[bytes]], limit: float) -> None:
    """Wait until what was started ahead is done, but not for long: a part compiles itself what is missing."""
    began = time.time()
    while time.time() - began < limit and any(process.poll() is None for process in started):
        time.sleep(0.5)
    done = sum(process.poll() == 0 for process in started)
    check.note("compiled ahead", "ok", began, why=f"{done} of {len(started)}")


def child(check: Check, part: Part, rows: Path, deadline: float) -> list[str]:
    """The command of a part's process."""
    command = [sys.executable, gpu_parts.__file__, part.name, "--rows", str(rows), "--deadline", str(deadline)]
    return [*command, "--device", check.device, *(["--tiny"] if check.tiny else [])]


def measure(check: Check, part: Part) -> None:
    """A part in a process of its own, for as long as it may take; its rows so far, whatever happens to it."""
    began = time.time()
    if check.left() < part.least:
        check.note(part.name, "skipped", began, why=f"{check.left():.0f} s were left, it needs {part.least:.0f}")
        return
    deadline = began + min(part.most, check.left())
    with tempfile.TemporaryDirectory() as folder:
        rows, status, why = Path(folder) / "rows.jsonl", "ok", ""
        try:
            if check.in_process:
                gpu_parts.work(part, rows, check.device, check.tiny, deadline)
            else:
                # A part looks at its deadline between measurements; the limit is for one that hangs.
                limit = min(deadline + 15, check.began + check.budget + 10) - time.time()
                ran = subprocess.run(
                    child(check, part, rows, deadline),
                    env=check.environment(),
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    timeout=max(1.0, limit),
                )
                if ran.returncode:
                    status, why = "failed", last_line(ran.stderr)
        except subprocess.TimeoutExpired:
            status, why = "failed", f"killed {time.time() - deadline:.0f} s after its time was over"
        except Exception as error:
            status, why = "failed", f"{type(error).__name__}: {error}"
        check.note(part.name, status, began, why=why, rows=read_rows(rows))


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no message"


def read_rows(path: Path) -> list[Row]:
    """The rows a part wrote; a line that a kill tore is left out."""
    found: list[Any] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the dry run")
    parser.add_argument("--budget", type=float, default=560, help="seconds; what does not fit is skipped and says so")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_<name>.json; a dry run: none")
    parser.add_argument("--in-process", action="store_true", help="no process of its own for each part")
    parser.add_argument("--skip", nargs="*", default=[], help="install, tests, ahead, or names of parts")
    args = parser.parse_args(argv)
    # A dry run's numbers must not lie beside real ones.
    out = args.out or (Path(tempfile.mkdtemp()) if args.tiny else RESULTS) / "gpu_.json"
    check = Check(out=out, device=args.device, tiny=args.tiny, budget=args.budget, in_process=args.in_process)
    if "install" not in args.skip:
        install(check)
    machine_facts(check)
    with ExitStack() as running:
        on_gpu = args.device == "cuda"
        started = compiling_ahead(check, running) if on_gpu and "ahead" not in args.skip else []
        if on_gpu and "tests" not in args.skip:
            tests(check, 180)
        if started:
            wait_for(check, started, 60)
    for part in gpu_parts.DRY if args.tiny else gpu_parts.PARTS:
        if part.name not in args.skip:
            measure(check, part)
    # Here: it imports torch, which the machine might not even have.
    import gpu_report
    from table import gpu
    from targets import lines

    check.document["targets"] = gpu_report.targets(check.document)
    check.document["tables"] = gpu_report.tables(check.document)
    check.write()
    print(gpu(check.document))
    print("\n".join(lines(check.document["targets"])))
    failed = [name for name, part in check.document["parts"].items() if part["status"] == "failed"]
    print(
        f"{check.out}: {check.document['seconds']:.0f} s; " + (f"FAILED: {', '.join(failed)}" if failed else "all ok")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

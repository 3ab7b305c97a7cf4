"""Rules of the house that are cheap to check and easy to forget."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from fastadv import __version__

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("fastadv/**/*.py"), *ROOT.glob("kernels/*.py")])
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_one_idea(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(source)), "a module says what it is for"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_say_what_they_give(path: Path) -> None:
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    bodies = [tree, *classes]
    for body in bodies:
        for node in body.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                # A method that overrides nn.Module's or a kernel's JIT body is described by its class or module.
                assert ast.get_docstring(node) or node.name == "forward" or _is_jit(node), f"{path.name}: {node.name}"


def _is_jit(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_fetched(path: Path) -> None:
    source = path.read_text()
    assert "weights_only=False" not in source
    assert not re.search(r"\bimport (pickle|requests|urllib)|pretrained=True", source)


def test_the_trees_modules_are_those_of_the_readme() -> None:
    for path in ROOT.glob("fastadv/*.py"):
        if path.name not in ("__init__.py",):
            assert f"{path.name} " in README, f"{path.name} is missing in the README's tree"


def test_every_readme_command_parses(capsys: pytest.CaptureFixture[str]) -> None:
    """Every ``python -m fastadv.X`` line of the README names flags that exist."""
    from fastadv import compare, evaluate, inherit, pretrain, purify, train
    from fastadv.cli import command

    modules = (compare, evaluate, inherit, pretrain, purify, train)
    mains = {module.__name__.rpartition(".")[2]: module.main for module in modules}
    lines = re.findall(r"^\s*(?:\$ )?python -m fastadv\.(\w+)(.*)$", README, flags=re.MULTILINE)
    assert {name for name, _ in lines} == set(mains)
    for name, rest in lines:
        words = shlex.split(rest, comments=True)
        if name != "evaluate" and "--resume" not in words:
            assert command(mains[name], [*words, "--help"]) == 0, rest
            said = capsys.readouterr().out
            for word in words:
                if word.startswith("--") and word not in ("--strategy", "--objective", "--out", "--json", "--help"):
                    assert f"{word} " in said, f"{word} is no flag of {name}"


def test_the_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readmes_strategy_is_a_whole_file() -> None:
    """Run as it stands, it registers and yields stages."""
    from fastadv.strategies import STRATEGIES, load_all

    load_all()
    (source,) = re.findall(r"```python\n(\"\"\".*?@strategy.*?)```", README, flags=re.DOTALL)
    exec(compile(source, "README.md", "exec"), {})
    chosen = STRATEGIES["warmhead"]
    assert [stage.name for stage in chosen.stages(chosen.recipe)] == ["head", "all"]
    STRATEGIES._items.pop("warmhead")

"""The README's speed tables and their plot, from the JSON files in benchmarks/results.

``python benchmarks/table.py`` prints the tables; ``--write`` puts them between the markers ``<!-- peers:begin -->`` and
``<!-- peers:end -->`` (and ``autoattack:``, ``gpu:``) of README.md, those of AutoAttack and its verdicts also of
docs/results.md, and draws docs/peers_cpu.svg.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
VERDICTS = ROOT / "tests" / "data" / "verdicts.json"
FAST = "fastadv fp32"
Row = Mapping[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def peers(document: Row) -> str:
    """Everything of peers_<device>.json: both speed tables, memory, equal robustness, targets, conditions."""
    cells = document["cells"]
    attacks = {name: cell for name, cell in cells.items() if name.startswith("attack/")}
    steps = {name: cell for name, cell in cells.items() if name.startswith("training/")}
    memory = {name: cell for name, cell in cells.items() if name.startswith("memory/")}
    parts = [attack_table(attacks), training_table(steps), memory_table(memory), equality(document)]
    parts += [target_table(document.get("targets", [])), conditions(document)]
    return "\n\n".join(part for part in parts if part)


def attack_table(cells: Mapping[str, Row]) -> str:
    """PGD: a row per contestant, a column per model."""
    if not cells:
        return ""
    head = ["PGD-10, linf 8/255, one batch"]
    for name, cell in cells.items():
        weights = f"clean {percent(cell['clean'])}" if cell["trained"] else "random weights"
        head.append(f"`{name.partition('/')[2]}`, {cell['batch_size']} images, {weights}")
    sides = list(dict.fromkeys(side for cell in cells.values() for side in cell["rows"]))
    rows = [[side, *(timing(cell["rows"].get(side, {})) for cell in cells.values())] for side in sides]
    return markdown(head, rows)


def training_table(cells: Mapping[str, Row]) -> str:
    """One adversarial training step with PGD-7: a row per model and strategy, a column per side."""
    if not cells:
        return ""
    sides = list(dict.fromkeys(side for cell in cells.values() for side in cell["rows"]))
    rows = []
    for name, cell in cells.items():
        _, model, strategy = name.split("/")
        what = f"`{model}`, {strategy}, {cell['batch_size']} images"
        rows.append([what, *(timing(cell["rows"].get(side, {})) for side in sides)])
    return markdown(["training step, PGD-7", *sides], rows)


def timing(row: Row) -> str:
    """``1.52x, 6.1 s (6.0-6.3), CPU 12.1 s; robust 30.2 % (25.8-35.0)``: times as long as fastadv in fp32."""
    if not row:
        return "-"
    if "wall_s" not in row:
        return f"not timed: {100 * row['equal_pixels']:.1f} % of the pixels equal"
    low, high = row["wall_range_s"]
    text = f"**{row['wall_ratio']:.2f}x**, {seconds(row['wall_s'])} s ({seconds(low)}-{seconds(high)}), "
    text += f"CPU {seconds(row['cpu_s'])} s"
    return text + (f"; robust {percent(row['robust'])}" if "robust" in row else "")


def seconds(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def percent(found: Row) -> str:
    """``30.2 % (25.8-35.0)``."""
    low, high = found["interval"]
    return f"{100 * found['share']:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def memory_table(cells: Mapping[str, Row]) -> str:
    """Peak memory of one attack: a row per side, a column per model."""
    if not cells:
        return ""
    head = ["peak memory of an attack, MiB (of it saved for the backward pass)"]
    head += [
        f"`{name.partition('/')[2]}`, {next(iter(c['rows'].values()))['batch_size']} images"
        for name, c in cells.items()
    ]
    sides = list(dict.fromkeys(side for cell in cells.values() for side in cell["rows"]))
    rows = []
    for side in sides:
        found = [cell["rows"].get(side) for cell in cells.values()]
        rows.append(
            [side, *(f"{r['peak_bytes'] / 2**20:.0f} ({r['saved_bytes'] / 2**20:.0f})" if r else "-" for r in found)]
        )
    return markdown(head, rows)


def equality(document: Row) -> str:
    """The sentence on equal robust accuracy."""
    found = document.get("equal_robustness")
    if not found:
        return ""
    parts = [
        f"accelerated in {precision} {percent(row)} ({row['difference_points']:+.2f} points; "
        f"{row['only_plain_breaks']} broken by the plain attack alone, {row['only_accelerated_breaks']} by this one)"
        for precision, row in found["accelerated"].items()
    ]
    return (
        f"As strong: {found['attack']}, {found['n']} images of {found['data']} ({found['classes']} classes; "
        f"{found['model']}; clean {percent(found['clean'])}). Plain fp32 attack: {percent(found['plain'])} robust; "
        f"{'; '.join(parts)}."
    )


def target_table(found: Sequence[Row]) -> str:
    """Promised, measured, verdict."""
    if not found:
        return ""
    rows = []
    for row in found:
        bound = f"{'<=' if row['at_most'] else '>='} {row['bound']:g}"
        rows.append([row["what"], bound, "-" if row["measured"] is None else f"{row['measured']:.2f}", row["verdict"]])
    return markdown(["promised", "ratio", "measured", "verdict"], rows)


def conditions(document: Row) -> str:
    """Machine, versions, commit and number of rounds, as one paragraph."""
    known = document.get("conditions")
    if not known:
        return ""
    machine, settings = known["environment"], known["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in known.get("peers", {}).items() if version)
    commit = str(machine.get("commit", "?"))[:9] + (" (modified)" if machine.get("modified") else "")
    device = ", ".join(machine.get("gpus") or []) or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"x: times as long as `{FAST}`, the median of the ratios of {settings['rounds']} rounds in which all take "
        f"turns; seconds are medians with their range. {device}; torch {machine['torch']}, timm {machine['timm']}"
        f"{'; ' + versions if versions else ''}; commit {commit}."
    )


def autoattack(document: Row) -> str:
    """Everything of autoattack.json: against the published code, PGD with and without broken images, the two modes."""
    runs = [("standard AutoAttack", "pyautoattack", "fastadv", document["cases"])]
    runs += [("PGD-10, evaluation", "everything", "survivors", document["pgd"])]
    runs += [("AutoAttack, modes", "parity", "fast", document.get("parity", {}))]
    runs += [("AutoAttack, parity mode", "parity", "another seed", document.get("seeds", {}))]
    parts = []
    for what, slow, quick, cases in runs:
        if not cases:
            continue
        rows = []
        for name, case in cases.items():
            ball = f"{name}: {case['norm']} {case['eps']:g}, {case['n']} images"
            cells = [f"{seconds(case[side]['cpu_seconds'])} s, {left(case[side])}" for side in (slow, quick)]
            low, *_, high = case["speed_up_of_batches"]
            spread = f"**{case['speed_up']:.2f}x** ({low:g}-{high:g})"
            rows.append([ball, *cells, spread, str(case["verdicts_differ"])])
        parts.append(markdown([what, slow, quick, "speed-up (of batches)", "verdicts that differ"], rows))
    machine = document["environment"]
    commits = sorted({case["commit"][:9] for *_, cases in runs for case in cases.values()})
    parts.append(
        f"CPU seconds and robust accuracy of a small residual network on digits, sides taking turns batch by batch; "
        f"{machine['cpu']}, {machine['threads']} thread; torch {machine['torch']}, pyautoattack "
        f"{machine['pyautoattack']}; commit {', '.join(commits)}."
    )
    return "\n\n".join(parts)


def verdicts(document: Row) -> str:
    """What the published AutoAttack did to each set of tests/data/verdicts.json, and how often parity mode differs."""
    from fastadv.attacks.verdicts import SURVIVED

    rows = []
    for name, run in document["runs"].items():
        found = run["published"]
        stages = [str(found.count(number)) for number in range(len(run["stages"]))]
        survive = found.count(SURVIVED)
        attacked = survive + sum(map(int, stages))
        share = f"{survive} ({100 * survive / attacked:.0f} %)"
        radius = f"{round(255 * run['eps'])}/255" if name.startswith("swin") else f"{run['eps']:g}"
        rows.append([f"{name} {radius}", str(len(found)), str(attacked), *stages, share, str(len(run["differ"]))])
    stages = next(iter(document["runs"].values()))["stages"]
    return markdown(["network, ball", "images", "right when clean", *stages, "survive", "verdicts that differ"], rows)


def left(row: Row) -> str:
    """``30.2 % (25.8-35.0) robust``."""
    return f"{percent({'share': row['robust'], 'interval': row['robust_interval']})} robust"


def gpu(document: Row) -> str:
    """The ladder, kernels and targets of gpu_<name>.json."""
    parts = []
    for table in document.get("tables", []):
        parts.append(markdown(table["head"], table["rows"]))
    parts += [target_table(document.get("targets", [])), *document.get("notes", [])]
    return "\n\n".join(part for part in parts if part)


def plot(document: Row, path: Path) -> None:
    """A panel per model: how many times as long as fastadv in fp32 each attack takes, with the range of the rounds."""
    import matplotlib

    matplotlib.use("svg")
    # The same file for the same numbers: no date, no random ids, text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "fastadv", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    cells = {n.partition("/")[2]: c["rows"] for n, c in document["cells"].items() if n.startswith("attack/")}
    figure, axes = pyplot.subplots(1, len(cells), figsize=(3.2 * len(cells), 2.8), sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], cells.items(), strict=True):
        timed = {side: row for side, row in rows.items() if "wall_ratio" in row}
        ratios = [row["wall_ratio"] for row in timed.values()]
        below = [row["wall_ratio"] - row["wall_ratio_range"][0] for row in timed.values()]
        above = [row["wall_ratio_range"][1] - row["wall_ratio"] for row in timed.values()]
        colours = ["tab:blue" if side.startswith("fastadv") else "tab:gray" for side in timed]
        axis.barh(list(timed), ratios, xerr=[below, above], color=colours, error_kw={"linewidth": 0.8})
        axis.axvline(1, color="black", linewidth=0.6)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(f"times as long as {FAST}")
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def between(text: str, marker: str, content: str) -> str:
    """``text`` with ``content`` between its two markers; raises ValueError where they are not, once each."""
    pattern = re.compile(f"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the text needs the lines <!-- {marker}:begin --> and <!-- {marker}:end -->, once")
    return pattern.sub(lambda found: found[1] + content + "\n" + found[2], text)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="rewrite README.md and the plot instead of printing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "peers_cpu.svg")
    args = parser.parse_args(argv)
    tables = {}
    for path in sorted(args.results.glob("*.json")):
        document = json.loads(path.read_text())
        if path.name == "peers_cpu.json":
            tables["peers"] = peers(document)
            if args.write:
                plot(document, args.plot)
        elif path.name == "autoattack.json":
            tables["autoattack"] = autoattack(document)
        elif path.name.startswith("gpu_"):
            tables["gpu"] = gpu(document)
    if not args.write:
        print("\n\n".join(tables.values()))
        return 0
    insert(args.readme, tables)
    if "autoattack" in tables:
        known = verdicts(json.loads(VERDICTS.read_text()))
        insert(args.docs, {"autoattack": tables["autoattack"], "verdicts": known})
    return 0


def insert(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table between its markers in ``page``."""
    text = page.read_text()
    for marker, content in tables.items():
        text = between(text, marker, content)
    page.write_text(text)
    print(f"wrote {', '.join(tables)} into {page}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

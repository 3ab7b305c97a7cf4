"""``python -m fastadv.purify all``: the purification laboratory, one page of claims, predictions and measurements."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadv.cli import EVERYWHERE, command, parse, pick
from fastadv.errors import NumericalError, SettingsError

if TYPE_CHECKING:
    # At run time they are imported inside the functions: Ctrl-C and SIGTERM then work while torch is still loading.
    from collections.abc import Mapping

    from fastadv.purification.lab import Settings
    from fastadv.purification.marks import Outcome

PROGRAM = "python -m fastadv.purify"
PAGE = "purify.html"
USAGE = f"""\
usage: {PROGRAM} NAME [NAME ...] [--out FOLDER] [--seeds N] [--seed FIRST] [any setting]
       {PROGRAM} all
       {PROGRAM} --page-only FOLDER

Does experiments with a two-layer network on sparse data. Writes FOLDER/{PAGE}, results.csv, purification.png (of E2
and E4) and one JSON file for each experiment. The same command again goes on where it was stopped: what is done is not
done again.

  --out        the folder (default: runs/purify)
  --page-only  write page and table again from what is in a folder
  {EVERYWHERE}
"""


def main(argv: list[str]) -> dict[str, Any] | None:
    """Do the experiments named on the command line; gives the rows of results.csv. None after a mere listing."""
    picked, rest = pick(argv, "--out", "--page-only")
    names = [word for place, word in enumerate(rest) if not _belongs_to_flag(rest, place)]
    flags = [word for place, word in enumerate(rest) if _belongs_to_flag(rest, place)]
    if not argv or {"-h", "--help"} & set(flags):
        _list(settings=bool(argv))
        return None
    from fastadv.purification.laboratory import finished, saved_settings

    if picked.page_only:
        if names or flags or picked.out:
            raise SettingsError("--page-only with names or settings", f"{PROGRAM} --page-only FOLDER alone")
        folder = Path(picked.page_only)
        settings = saved_settings(folder)
        return finish(folder, settings, finished(folder))
    if not names:
        raise SettingsError("no experiment named", f"{PROGRAM} all, or a name of {PROGRAM} --help")
    return experiment(names, flags, Path(picked.out or "runs/purify"))


def experiment(names: list[str], flags: list[str], folder: Path) -> dict[str, Any]:
    """Do these experiments in the folder and write its page. Raises NumericalError at the end where one collapsed."""
    from fastadv.purification.lab import Lab, Settings
    from fastadv.purification.laboratory import choose, finished, open_folder, run
    from fastadv.runfolder import RunLock, run_folder

    chosen = choose(names)
    settings = parse(Settings, Settings(), flags, f"{PROGRAM} NAME", "The purification laboratory.")
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--out is not a folder ({folder})", "choose a folder with --out OTHER")
    run_folder(folder, resume=folder.is_dir())
    with RunLock(folder):
        open_folder(folder, settings)
        outcomes = run(Lab(settings, folder), chosen, lambda line: print(line, flush=True))
        found = finish(folder, settings, finished(folder))
    for outcome in outcomes.values():
        if outcome.failure:
            raise NumericalError(outcome.failure, str(outcome.numbers["fix"]))
    return found


def finish(folder: Path, settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Write results.csv and the page from what is there; gives the rows."""
    from fastadv.purification import laboratory_page, poster
    from fastadv.purification.laboratory import CSV, rows, write_csv

    write_csv(folder, outcomes)
    given = [f"--{name.replace('_', '-')} {value:g}" for name, value in _changed(settings).items()]
    words = " ".join([PROGRAM, "all" if len(outcomes) > 1 else next(iter(outcomes), "all"), *given])
    laboratory_page.write(folder / PAGE, settings, outcomes, f"{words} --out {shlex.quote(str(folder))}")
    files = [PAGE, CSV, *([poster.FILE] if poster.draw(folder / poster.FILE, outcomes) else [])]
    print(f"{laboratory_page.verdict(outcomes)} Files in {folder}: {', '.join(files)}")
    return {"folder": str(folder), "rows": rows(outcomes)}


def _changed(settings: Settings) -> dict[str, float]:
    import dataclasses

    own = dataclasses.asdict(type(settings)())
    return {name: value for name, value in dataclasses.asdict(settings).items() if value != own[name]}


def _belongs_to_flag(words: list[str], place: int) -> bool:
    """Whether a word is a flag or the value of one; every flag but the help has a value."""
    before = words[place - 1] if place else ""
    return words[place].startswith("-") or (before.startswith("--") and "=" not in before and before != "--help")


def _list(settings: bool) -> None:
    from fastadv.purification.lab import Settings
    from fastadv.purification.laboratory import EXPERIMENTS

    width = max(len(each.name) for each in EXPERIMENTS)
    print(USAGE)
    print("\n".join(f"  {each.key}  {each.name:<{width}}  {each.title}" for each in EXPERIMENTS), flush=True)
    if settings:
        print()
        parse(Settings, Settings(), ["--help"], f"{PROGRAM} NAME ...", "Settings; pass marks belong to the defaults.")


if __name__ == "__main__":
    sys.exit(command(main, program=PROGRAM))

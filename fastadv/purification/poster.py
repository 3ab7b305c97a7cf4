"""One picture of it all, for a README: hidden weights of clean and adversarial training, and what a head inherits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastadv.plots import BLUE, DPI, VERMILION
from fastadv.purification.marks import Outcome
from fastadv.purification.study import CLEAN, FGM, ORACLE, SMOOTHED

FILE = "purification.png"
TITLES = {CLEAN: "clean training: units mix features", SMOOTHED: "adversarial training: most read one"}
ROWS = {CLEAN: "clean", FGM: "FGM", SMOOTHED: "smoothed", ORACLE: "true features"}


def draw(path: Path, outcomes: Mapping[str, Outcome]) -> bool:
    """Write the picture to ``path`` where E2 and E4 have been done; gives whether they have."""
    if any(key not in outcomes or outcomes[key].failure for key in ("E2", "E4")):
        return False
    arms, down = outcomes["E2"].numbers["arms"], outcomes["E4"].numbers["down"]
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    *maps, bars = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    for axes, (name, title) in zip(maps, TITLES.items(), strict=True):
        pictured = np.array(arms[name]["pictures"]["weights"])
        axes.imshow(pictured, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="nearest")
        purity = mean(arms[name]["purification"]["purity"])
        axes.set_title(f"{title}\n(median purity {purity:.2f})", loc="left", fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("feature", fontsize=9)
    maps[0].set_ylabel("hidden unit", fontsize=9)
    for place, name in enumerate(ROWS):
        for offset, key, colour in ((-0.19, "clean", BLUE), (0.19, "ens", VERMILION)):
            value = 100 * mean(down[name][key])
            bars.barh(place + offset, value, height=0.36, color=colour)
            word = "" if place else " clean" if key == "clean" else " worst case"
            bars.text(value + 2, place + offset, f"{value:.0f}{word}", va="center_baseline", fontsize=9)
    bars.set_yticks(range(len(ROWS)), list(ROWS.values()), fontsize=9)
    bars.set(ylim=(len(ROWS) - 0.5, -0.5), xlim=(0, 130), xticks=[0, 50, 100])
    bars.set_title("a clean head on it, new task:\naccuracy (%)", loc="left", fontsize=10)
    bars.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI, facecolor="white")
    return True

"""Roofline plot of a block of results: operations for each byte of weights against their rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from .results import Block, title
from .targets import ONE, Times

_SERIES = {"bitlm": ("tab:blue", "o"), "torch": ("tab:orange", "s"), "ggml": ("tab:green", "^")}


def plot(block: Block, path: Path) -> None:
    """Write the plot of the groups with one thread to a PNG or SVG file.

    The slope is the pass that only reads the bytes of the 4096x4096 1-bit weight from memory, the
    levels are what peak.py measured.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = list(_points(block))
    figure, axes = pyplot.subplots(figsize=(9, 6))
    bytes_read = next(row["bytes"] for group in block["groups"] if group["name"] == ONE
                      for row in group["engines"] if row["engine"] == "read binary")
    bandwidth = bytes_read / Times(block).median(ONE, "read binary") * 1e-3
    low, high = 0.5, 2 * max(x for _, x, _, _ in points)
    axes.plot([low, high], [low * bandwidth, high * bandwidth], "k-", linewidth=1)
    axes.text(low * 1.1, low * bandwidth * 1.4, f"reading {bandwidth:.1f} GB/s", rotation=35,
              rotation_mode="anchor")
    for what, rate in block.get("peak", {}).items():
        axes.axhline(rate, color="k", linewidth=0.8, linestyle="--")
        axes.text(high, rate * 1.04, what, ha="right", fontsize=8)
    for kind, (color, marker) in _SERIES.items():
        for cold, filled in ((True, color), (False, "none")):
            own = [(x, y) for k, x, y, c in points if k == kind and c == cold]
            if own:
                axes.scatter(*zip(*own), edgecolors=color, facecolors=filled, marker=marker, s=26,
                             label=f"{kind}, weights from {'memory' if cold else 'cache'}")
    top = 3 * max([y for _, _, y, _ in points] + list(block.get("peak", {}).values()))
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(1, top), title=title(block),
             xlabel="operations for each byte of weights",
             ylabel="10^9 operations a second, one thread")
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(block: Block) -> Iterator[tuple[str, float, float, bool]]:
    """Yield (kind of engine, operations a byte, GOP/s, cold) of the products with one thread."""
    for group in block["groups"]:
        if group["threads"] != 1:
            continue
        for row in group["engines"]:
            kind = row["engine"].partition(" ")[0]
            if kind not in _SERIES or not row.get("bytes"):
                continue
            work = 2.0 * group["rows"] * group["columns"] * row["batch"]
            yield (kind, work / row["bytes"], work / statistics.median(row["us"]) * 1e-3,
                   group["cold"])

# SPDX-License-Identifier: Apache-2.0
"""Pictures of stored rows, and of nothing else.

    python -m bench plot bench/results/FOLDER/*.jsonl --out docs/bench/FOLDER

writes ``speedup``, ``scaling`` and ``roofline``, each as PNG and SVG; a picture whose rows are missing is left out and
said so. Needs matplotlib (the ``bench`` extra).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from bench import compare
from bench.command import command_parser
from bench.compare import Row, width_of, words_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# one colour per contender in every picture; told apart in grey print and by the colour-blind
_COLOURS = {
    "engine": "#0b6e99", "literal": "#b3541e", "factored": "#d9a441", "compiled": "#7a9e3f",
    "naive": "#8c4fa3", "faiss": "#4c9f9a",
}  # fmt: skip
_BOUND = "#888888"


def _nodes(row: Row) -> int:
    return int(row["sizes"]["h"] * row["sizes"]["w"])


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def speedup(rows: Sequence[Row], figure: Any) -> bool:
    """Bars: how many times as long the others take, on a DINO-like prior. False where there is nothing to show."""
    engines = [row for row in rows if row["name"] == "engine" and row["data"] == "dino"]
    groups = []
    for engine in engines:
        key = [engine[name] for name in ("op", "case", "mode", "data", "dtype")]
        others = [
            row for row in rows
            if [row[name] for name in ("op", "case", "mode", "data", "dtype")] == key
            and row["name"] in ("literal", "factored", "compiled", "naive", "faiss")
        ]  # fmt: skip
        if others:
            size = f"{engine['sizes']['B']} x {engine['sizes']['h']}x{engine['sizes']['w']}"
            words = [engine["op"], ", ".join([size, *width_of(engine)]), words_of(engine["mode"])]
            groups.append(("\n".join(words), others))
    if not groups:
        return False
    axes = figure.subplots()
    seen: set[str] = set()
    for place, (_, others) in enumerate(groups):
        for n, row in enumerate(others):
            at = place + (n - (len(others) - 1) / 2) * 0.25
            label = row["name"] if row["name"] not in seen else None
            seen.add(row["name"])
            bar = axes.bar(at, row["ratio_to_engine"], 0.23, color=_COLOURS[row["name"]], label=label)
            axes.bar_label(bar, fmt="%.3g", fontsize=7)
    axes.axhline(1, color=_COLOURS["engine"], linewidth=1)
    axes.set(yscale="log", ylabel="time / engine's time", xticks=range(len(groups)))
    axes.set_xticklabels([name for name, _ in groups], fontsize=7)
    _legend(axes)
    return True


def scaling(rows: Sequence[Row], figure: Any) -> bool:
    """Time of one image over N, log-log, with the N x N matrix that the others hold."""
    chosen = [
        row for row in rows
        if row["op"] == "knn_graph" and row["data"] in ("random", "dino") and row["sizes"]["B"] == 1
    ]  # fmt: skip
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in chosen:
        if row["name"] in ("engine", "naive", "faiss"):
            lines.setdefault((row["name"], row["data"]), {})[_nodes(row)] = row["p50_ms"]
    if not any(len(line) > 1 for line in lines.values()):
        return False
    axes = figure.subplots()
    for (name, data), line in sorted(lines.items()):
        nodes = sorted(line)
        style = "-" if data == "dino" else "--"
        axes.plot(nodes, [line[n] for n in nodes], style, marker="o", color=_COLOURS[name], label=f"{name}, {data}")
    largest = max(n for line in lines.values() for n in line)
    wall = axes.twinx()
    grid = [1024 * 2**n for n in range(0, 12) if 1024 * 2**n <= 2 * largest]
    wall.plot(grid, [4 * n * n / 2**30 for n in grid], ":", color=_BOUND, label="one N x N matrix, GiB")
    wall.set(yscale="log", ylabel="GiB")
    wall.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set(xscale="log", yscale="log", xlabel="nodes N", ylabel="ms per image")
    _legend(axes)
    return True


def roofline(rows: Sequence[Row], figure: Any) -> bool:
    """Rate over intensity of every engine row below the ceilings that its run measured."""
    # where an op's backends are compared, the first one is the engine
    chosen = [row for row in rows if row.get("ceiling") and row["ratio_to_engine"] == 1]
    if not chosen:
        return False
    axes = figure.subplots()
    top = max(row["ceiling"]["gflops"] for row in chosen)
    slope = max(row["ceiling"]["copy_gbs"] for row in chosen)
    reach = [row["flop"] / row["byte"] for row in chosen]
    left, right = min(*reach, top / slope) / 2, max(max(reach), 2 * top / slope) * 2
    axes.plot([left, top / slope, right], [left * slope, top, top], color=_BOUND, label="measured ceilings")
    marks = {}
    for row in chosen:
        rate = row["flop"] / row["p50_ms"] / 1e6
        mark = "s" if row["mode"] == "fwd" else "^"
        label = ", ".join([row["op"], *width_of(row), words_of(row["mode"])])
        colour = f"C{sorted({one['op'] for one in chosen}).index(row['op'])}"
        # hollow: the wide edge MLP
        fill = "none" if row["case"].endswith("_e256") else "full"
        (marks[label],) = axes.plot(row["flop"] / row["byte"], rate, mark, color=colour, markersize=5, fillstyle=fill)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s of the whole problem")
    axes.legend(
        [*axes.lines[:1], *marks.values()], ["measured ceilings", *marks],
        frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5),
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("above the line: work that was skipped, not done", fontsize=8)
    return True


PICTURES: dict[str, Callable[[Sequence[Row], Any], bool]] = {
    "speedup": speedup,
    "scaling": scaling,
    "roofline": roofline,
}


def draw(rows: Sequence[Row], folder: Path, title: str) -> list[str]:
    """Write what the rows allow; the names of the pictures made."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, picture in PICTURES.items():
        figure = plt.figure(figsize=(7.5, 3.8), dpi=140, layout="constrained")
        if picture(rows, figure):
            figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
            figure.text(0.995, 0.005, title, ha="right", va="bottom", fontsize=6, color="#666666")
            for suffix in ("png", "svg"):
                # no date inside, so that the same rows make the same file
                metadata = {"Date": None} if suffix == "svg" else {}
                figure.savefig(folder / f"{name}.{suffix}", metadata=metadata)
            made.append(name)
        else:
            print(f"plot: {name} is left out; none of its rows are in the files", file=sys.stderr)
        plt.close(figure)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("plot", __doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="JSON-lines files of python -m bench run")
    parser.add_argument("--out", type=Path, default=Path("docs/bench"), help="folder")
    args = parser.parse_args(arguments)
    try:
        return _draw_files(args.rows, args.out)
    except compare.CompareError as error:
        print(f"plot: {error}", file=sys.stderr)
    except OSError as error:
        print(f"plot: --out cannot be written: {error.strerror}; expected a folder, got {args.out}", file=sys.stderr)
    return 2


def _draw_files(paths: Sequence[Path], out: Path) -> int:
    rows = [row for path in paths for row in compare.read(path).values()]
    machines = {(row["device"], row["threads"], row["instruction_set"]) for row in rows}
    if len(machines) != 1:
        raise compare.CompareError(f"rows are of {len(machines)} kinds of machine; expected one")
    matplotlib.rcParams["svg.hashsalt"] = "drseg"
    device, threads, level = machines.pop()
    machine = device if "gpu" in rows[0] else f"{device}, {threads} threads, {level}"
    made = draw(rows, out, f"{machine}; torch {rows[0]['torch']}, {rows[0]['date']}")
    return 0 if made else 2

# SPDX-License-Identifier: Apache-2.0
"""Tables of performance, made from stored rows and from nothing else: one section for each machine.

    python -m bench report bench/results/FOLDER docs/performance.md README.md [--check]

Replaces in each file what stands between the marks with the folder's name: between ``bench`` marks all rows, between
``summary`` marks the four that most people ask for. ``--check`` changes nothing and exits with 1 where a section is not
what the rows give.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import compare
from bench.command import command_parser
from bench.compare import Row, width_of, words_of

BEGIN, END = "<!-- bench: {}, made by bench/report.py -->", "<!-- /bench -->"
SUMMARY = "<!-- summary: {}, made by bench/report.py -->"
# op, batch, nodes of an image, hidden width of the edge MLP, mode
_SUMMARIZED = [
    ("pdgr", 8, 576, 256, "fwd"),
    ("pdgr", 8, 576, 256, "fwd+bwd"),
    ("knn_graph", 8, 576, None, "fwd"),
    ("knn_graph", 1, 16384, None, "fwd"),
]
_PICTURES = {
    "speedup": "times as long as the engine takes, on a DINO-like prior",
    "scaling": "time of one image over N, and the matrix that the others hold",
    "roofline": "rate over intensity, and the highest ceilings that their runs measured",
}


def _find(rows: Sequence[Row], **wanted: str) -> Row | None:
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def _times(rows: Sequence[Row], engine: Row, name: str, digits: int = 1) -> str:
    same = {key: engine[key] for key in ("op", "case", "mode", "data", "dtype")}
    row = _find(rows, **same, name=name)
    return "-" if row is None else f"{row['ratio_to_engine']:.{digits}f}x"


def _grid(row: Row) -> str:
    return f"{row['sizes']['B']} x {row['sizes']['h']}x{row['sizes']['w']}"


def _dtype(row: Row) -> list[str]:
    """What is not float32 says so."""
    return [] if row["dtype"] == "float32" else [row["dtype"]]


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _module_table(rows: Sequence[Row]) -> list[str]:
    engines = [row for row in rows if row["op"] == "pdgr" and row["name"] == "engine"]
    if not engines:
        return []
    # what all rows have in common stands above them
    sizes = {name: {row["sizes"][name] for row in engines} for name in ("D", "E", "C", "K")}
    common = [f"{name} {value}" for name, (value, *others) in sizes.items() if not others]
    lines = [
        f"| {', '.join(['PDGR', *common])} | prior | engine, ms | literal | factored | compiled | "
        "matmul lower bound | engine, MB | literal, MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in engines:
        literal = _find(rows, name="literal", **{key: row[key] for key in ("op", "case", "mode", "data", "dtype")})
        memory = [f"{one['peak_mb']:.0f}" if one and one.get("peak_mb") else "-" for one in (row, literal)]
        own = [f"{name} {row['sizes'][name]}" for name, values in sizes.items() if len(values) > 1] + _dtype(row)
        cells = [", ".join([_grid(row), *own, words_of(row["mode"])]), row["data"], _ms(row["p50_ms"])]
        cells += [_times(rows, row, name, 0) for name in ("literal", "factored")]
        cells += [_times(rows, row, "compiled"), _times(rows, row, "matmul_lower_bound", 2), *memory]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _is_selection(row: Row) -> bool:
    return bool(row["op"] == "knn_graph" and row["data"] != "case")


def _selection_table(rows: Sequence[Row]) -> list[str]:
    engines = [row for row in rows if _is_selection(row) and row["name"] == "engine"]
    if not engines:
        return []
    lines = [
        "| `knn_graph` with decay, K 75 | prior | engine, ms | plain torch | faiss-cpu (no decay) | product of the "
        "scores alone |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in engines:
        size = row["sizes"]
        name = f"{size['B']} x {size['h'] * size['w']} nodes, D {size['D']}, decay {size['decay']:g}"
        cells = [", ".join([name, *_dtype(row)]), row["data"], _ms(row["p50_ms"])]
        cells += [_times(rows, row, name, 2) for name in ("naive", "faiss", "matmul_lower_bound")]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _op_table(rows: Sequence[Row]) -> list[str]:
    engines = [row for row in rows if row["data"] == "case" and row["ratio_to_engine"] == 1]
    if not engines:
        return []
    lines = [
        "| one op, K 75, a DINO-like graph | backend | ms | reference | of the ceiling (above 1: skipped work) | MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in engines:
        cells = [
            ", ".join([f"`{row['op']}`", _grid(row), *width_of(row), *_dtype(row), words_of(row["mode"])]),
            row["name"],
        ]
        cells += [_ms(row["p50_ms"]), "-" if row["name"] == "reference" else _times(rows, row, "reference")]
        cells += [f"{row['share_of_ceiling']:.2f}", f"{row['peak_mb']:.0f}" if row.get("peak_mb") is not None else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _model_table(rows: Sequence[Row]) -> list[str]:
    models = [row for row in rows if row["op"] == "model"]
    if not models:
        return []
    lines = [
        "| whole model, random weights, 17 classes | backend of the ops | images/s | PDGR's share | process, MB |",
        "|---|---|---:|---:|---:|",
    ]
    for row in models:
        share = "-" if row["pdgr_share"] is None else f"{100 * row['pdgr_share']:.1f} %"
        lines.append(
            f"| {', '.join([row['case'], row['mode'], *_dtype(row)])} | {row['name']} | "
            f"{row['images_per_second']:.3f} | {share} | {row['process_mb']:.0f} |"
        )
    return [*lines, ""]


def _read(folder: Path) -> tuple[list[Row], str]:
    """The rows of a folder, and the machine that they are of.

    Raises:
        CompareError: no rows, or rows of several machines.
    """
    rows: list[Row] = []
    for path in sorted(folder.glob("*.jsonl")):
        # whole scenes are measured in their own way, and have no table here
        rows += [row for row in _rows_of(path) if row["op"] != "scene"]
    machines = {(row["device"], row["threads"], row["instruction_set"], row["torch"]) for row in rows}
    if len(machines) != 1:
        raise compare.CompareError(f"{folder}: holds rows of {len(machines)} machines; expected one")
    device, threads, level, _ = machines.pop()
    return rows, device if "gpu" in rows[0] else f"{threads} threads of an {device} ({level})"


def _root(folder: Path, page: Path) -> Path:
    """The folder that has both the rows and the page."""
    return next(parent for parent in page.resolve().parents if folder.resolve().is_relative_to(parent))


def summary(folder: Path, page: Path) -> str:
    """Four rows of a machine, for a page of many things; a machine that has not all of them has fewer."""
    rows, machine = _read(folder)
    months = " and ".join(sorted({row["date"][:7] for row in rows}))
    lines = [
        f"| {machine}, {months} | engine, ms | plain PyTorch takes | `torch.compile` takes |",
        "|---|---:|---:|---:|",
    ]
    for op, batch, nodes, width, mode in _SUMMARIZED:
        for row in rows:
            size = row.get("sizes", {})
            found = (row["op"], size.get("B"), size.get("h", 0) * size.get("w", 0), row["mode"])
            same = found == (op, batch, nodes, mode) and width in (None, size.get("E"))
            if not same or (row["name"], row["data"], row["dtype"]) != ("engine", "dino", "float32"):
                continue
            kind = "PDGR" if op == "pdgr" else "k-NN selection"
            cells = [f"{kind}, {batch} x {nodes} nodes, {words_of(mode)}", _ms(row["p50_ms"])]
            plain = _times(rows, row, "literal", 0) if op == "pdgr" else _times(rows, row, "naive", 2)
            lines.append("| " + " | ".join([*cells, plain, _times(rows, row, "compiled")]) + " |")
    return "\n".join([*lines, ""])


def section(folder: Path, page: Path) -> str:
    """All rows of a folder; pictures are named as the page finds them.

    Raises:
        CompareError: no rows, or rows of several machines.
    """
    rows, machine = _read(folder)
    how = "one run where a call takes seconds"
    if "gpu" in rows[0]:
        how = "each a CUDA graph where it can be captured, with a cold second-level cache"
    root = _root(folder, page)
    place = folder.resolve().relative_to(root).as_posix()
    torch = rows[0]["torch"]
    dtypes = dict.fromkeys(["float32", *(row["dtype"] for row in rows if "dtype" in row)])
    months = sorted({row["date"][:7] for row in rows})
    lines = [
        f"{machine}, {' and '.join(months)}, torch {torch}, {', '.join(dtypes)}. Medians of interleaved runs, {how}. "
        f"Rows: `{place}/*.jsonl`.",
        "",
        *_module_table(rows),
        *_selection_table(rows),
        *_op_table(rows),
        *_model_table(rows),
    ]
    for name, words in _PICTURES.items():
        picture = f"docs/bench/{folder.name}/{name}.png"
        if (root / picture).is_file():
            shown = {
                path.name: part for path in sorted(folder.glob("*.jsonl")) if (part := _shown(name, _rows_of(path)))
            }
            files = ", ".join(f"`{place}/{file}`" for file in shown)
            widths = sorted({width for part in shown.values() for row in part for width in width_of(row)})
            title = "; ".join([words[0].upper() + words[1:], *([" and ".join(widths)] if widths else [])])
            shown_as = Path(os.path.relpath(root / picture, page.resolve().parent)).as_posix()
            lines += [f"![{name}: {words}]({shown_as})", "", f"*{title}. {files}*", ""]
    return "\n".join(lines)


def _shown(picture: str, rows: Sequence[Row]) -> list[Row]:
    """What a picture is made of."""
    timed = [row for row in rows if row.get("ceiling")]
    kinds: dict[str, Callable[[Row], bool]] = {"speedup": lambda row: row["data"] == "dino", "scaling": _is_selection}
    return list(filter(kinds.get(picture), timed))


def _rows_of(path: Path) -> list[Row]:
    """As compare.read, but rows of the whole model too."""
    keys = ("op", "case", "mode", "dtype", "data", "name")
    last = {tuple(str(row.get(key)) for key in keys): row for row in compare.load(path)}
    return list(last.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("report", __doc__)
    parser.add_argument("rows", type=Path, help="folder of JSON-lines files")
    parser.add_argument("pages", type=Path, nargs="+", metavar="page")
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(arguments)
    if not args.rows.is_dir():
        what = "is no folder" if args.rows.exists() else "not found"
        print(f"report: {args.rows} {what}; expected a folder of rows", file=sys.stderr)
        return 2
    return max(_renew(args.rows, page, args.check) for page in args.pages)


def _renew(rows: Path, page: Path, check: bool) -> int:
    """The exit code for one page."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no text"
        print(f"report: {page} cannot be read: {why}; expected a page with a section", file=sys.stderr)
        return 2
    name = rows.resolve().name
    makers = {mark.format(name): maker for mark, maker in ((BEGIN, section), (SUMMARY, summary))}
    wanted = text
    for begin, maker in makers.items():
        if begin not in text:
            continue
        if text.count(begin) != 1 or END not in text.split(begin)[1]:
            print(f"report: {page} has an open section; expected {begin} and {END} once", file=sys.stderr)
            return 2
        try:
            made = maker(rows, page)
        except (OSError, ValueError) as error:
            print(f"report: {rows} cannot be used: {error}", file=sys.stderr)
            return 2
        before, rest = wanted.split(begin)
        wanted = f"{before}{begin}\n{made}{END}{rest.split(END, 1)[1]}"
    if not any(begin in text for begin in makers):
        print(f"report: {page} has no place for the section; expected {BEGIN.format(name)} and {END}", file=sys.stderr)
        return 2
    if check:
        if wanted != text:
            print(f"report: {page} is not what the rows of {rows} give; run it without --check")
        return int(wanted != text)
    try:
        page.write_text(wanted, encoding="utf-8")
    except OSError as error:
        print(f"report: {page} cannot be written: {error.strerror}; expected a writable page", file=sys.stderr)
        return 2
    return 0

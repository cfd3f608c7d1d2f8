# SPDX-License-Identifier: Apache-2.0
"""Compares stored rows of two runs on one kind of machine.

    python -m bench compare OLD.jsonl NEW.jsonl

Beside the times stands their ratio, *normalised* by the ceilings that each run measured, so that a slow hour of the
machine does not count against the code. Ceilings move by chance as well. So a row is slower or faster only if its time
and its normalised time both say so, by more than noise: that of the times, of one or two samples, and of two separate
runs. Beside each verdict stands the smallest slowdown that these rows can tell. Stored rows are weaker evidence than
the race of ``python -m bench run --base REF --gate``, which is the gate.

A row is *lost* if the new run did not measure it. Rows of other libraries, and of plain PyTorch, tell how steady the
machine was, and decide nothing.

Exit code 0: none of our rows is slower or lost; 1: some are; 2: the files cannot be compared.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.command import command_parser

Row = dict[str, Any]
# what the width of the edge MLP matters to
OF_HIDDEN = ("pdgr", "edge_weight", "edge_coefficient")
# cases of rows that were stored before all came from one list of sizes
_CASES = {
    "pdgr_8x576": "paper_vitl_24x24_e256",
    "pdgr_1x4096": "grid_64x64_e256",
    "pdgr_1x16384": "vitl_128x128_e256",
    "pdgr_1x65536": "vitl_256x256_e256",
    "knn_8x576": "paper_vitl_24x24",
    "knn_4096": "grid_64x64",
    "knn_16384": "grid_128x128",
    "knn_65536": "grid_256x256",
}
# and contenders
_NAMES = {"floor": "matmul_lower_bound"}
# whose rows decide: the engine, and its backends one by one
_OURS = ("engine", "native", "cuda", "triton", "reference")
_KEY = ("op", "case", "mode", "dtype", "data", "name")
_TIMES = {"p20_ms", "p50_ms", "p80_ms", "repeats", "sizes"}
# of one kind of machine
_MACHINE = ("device", "threads", "instruction_set", "forced_level")
# what is read from rows, here and by whoever else reads them: texts, and numbers that are finite
_TEXTS = (*_KEY, "device", "instruction_set", "forced_level", "torch", "date")
_NUMBERS = (
    "p20_ms", "p50_ms", "p80_ms", "repeats", "threads", "ratio_to_engine", "share_of_ceiling", "flop", "byte",
    "peak_mb", "process_mb", "pdgr_share", "images_per_second",
)  # fmt: skip
_OBJECTS = ("sizes", "ceiling", "overrides")
# of these everything is divided by
_ABOVE_ZERO = ("byte", "ceiling.gflops", "ceiling.copy_gbs", "ceiling.least_ms")
# null where there is none
_OPTIONAL = ("forced_level", "ceiling", "overrides", "peak_mb", "pdgr_share")
_WORDS = {"fwd": "forward", "fwd+bwd": "forward + backward"}
_AS_WRITTEN = "expected what python -m bench run --out writes"
# what two runs of one version differ by beyond the spread within them (2 cores of an AMD EPYC, 2026-11)
_BETWEEN_RUNS = 0.05
# relative deviation of times of which there are too few to have one
_FEW, _DEVIATION_OF_FEW = 3, 0.1
# logarithm of a factor beyond all times; the exponential of a larger one is no float
_ANY = 700.0


class CompareError(ValueError):
    """Files that cannot be read, or do not belong together."""


class _Stored(dict[str, Any]):
    """A row, or an object in it, that says where it is if something is read that it lacks."""

    def __init__(self, values: Row, place: str, within: str = "") -> None:
        super().__init__(values)
        self._place, self._within = place, within

    def __missing__(self, name: str) -> Any:
        raise CompareError(f"{self._place}: a row lacks {self._within}{name}; {_AS_WRITTEN}")


def load(path: Path) -> list[Row]:
    """Every row of a file, under the names that its case and its contender have now.

    Raises:
        CompareError: no such file, or a line of it that is no row, or holds a value of another kind. Whoever reads what
            a row lacks gets one, too.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise CompareError(f"{path}: not found; expected a file of rows") from None
    except OSError as error:
        raise CompareError(f"{path}: cannot be read: {error.strerror}; expected a file of rows") from None
    except UnicodeDecodeError:
        raise CompareError(f"{path}: is no text; expected a file of rows") from None
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise CompareError(
            f"{place}: is no row; expected an object as python -m bench run --out writes, got {_cut(line)}"
        )
    for name, value in row.items():
        if value is not None or name not in _OPTIONAL:
            _check(name, value, place)
    for name in _OBJECTS:
        if row.get(name) is not None:
            row[name] = _Stored(row[name], place, f"{name}.")
    now = (("case", _CASES), ("name", _NAMES))
    return _Stored(row | {key: names[row[key]] for key, names in now if row.get(key) in names}, place)


def _check(name: str, value: Any, place: str) -> None:
    """Refuse a value that is not of the kind that is read under this name."""
    expected = None
    if name in _TEXTS and not isinstance(value, str):
        expected = "a text"
    elif name in _OBJECTS and not isinstance(value, dict):
        expected = "an object"
    elif name in _NUMBERS or name.startswith(("sizes.", "ceiling.")):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # an integer may be larger than every float
        if not number or not abs(value) <= sys.float_info.max:
            expected = "a finite number"
        elif name in _ABOVE_ZERO and not value > 0:
            expected = "a number above 0"
    elif name in ("sizes", "ceiling"):
        for inner, one in value.items():
            _check(f"{name}.{inner}", one, place)
    if expected is not None:
        raise CompareError(f"{place}: {name} cannot be read; expected {expected}, got {_cut(json.dumps(value))}")


def _cut(text: str) -> str:
    return text if len(text) < 50 else f"{text[:50]}..."


def words_of(mode: str) -> str:
    """``forward + backward``; a mode without other words is its own."""
    return _WORDS.get(mode, mode)


def width_of(row: Row) -> list[str]:
    """``E 128``, where the width of the edge MLP matters."""
    return [f"E {row['sizes']['E']}"] if row["op"] in OF_HIDDEN else []


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """The rows of a file by what they measure; of several of the same, the last.

    Raises:
        CompareError: no such file, or no rows in it.
    """
    timed = [row for row in load(path) if row.keys() >= _TIMES]
    for row in timed:
        if missing := [name for name in _KEY if name not in row]:
            raise CompareError(f"{path}: a row lacks {', '.join(missing)}; {_AS_WRITTEN}")
    rows = [(_key(row), row) for row in timed]
    found = dict(rows)
    if not found:
        raise CompareError(f"{path}: holds no timed row; {_AS_WRITTEN}")
    if len(rows) > len(found):
        again = len(rows) - len(found)
        print(f"compare: {path} has {again} of its rows measured again later; the last of each counts", file=sys.stderr)
    for key, row in found.items():
        if not row["p50_ms"] > 0 or not row["repeats"] > 0:
            raise CompareError(f"{path}: {' '.join(key)} was never timed; expected p50_ms and repeats above 0")
    return found


def _key(row: Row) -> tuple[str, ...]:
    """What a row measures; options of a model that were changed are part of it."""
    changed = tuple(f"{name}={value}" for name, value in sorted((row.get("overrides") or {}).items()))
    return (*(str(row[name]) for name in _KEY), *changed)


@dataclass(frozen=True)
class Comparison:
    """One row against its predecessor.

    Args:
        key: what it measures. verdict: ``slower``, ``same``, ``faster``, ``lost`` or ``new``. times: old and new median
        in ms, None for a row that one file lacks. ratio: new over old, normalised. resolution: smallest slowdown told
        from noise. normalised: by both runs' ceilings.
    """

    key: tuple[str, ...]
    verdict: str
    times: tuple[float | None, float | None]
    ratio: float | None = None
    resolution: float | None = None
    normalised: bool = False

    @property
    def ours(self) -> bool:
        return self.key[_KEY.index("name")] in _OURS


def _standard_error(row: Row) -> float:
    """Of the median, relative: from the percentiles, as if the times were normal."""
    sigma = (row["p80_ms"] - row["p20_ms"]) / (2 * 0.8416) / row["p50_ms"]
    if row["repeats"] < _FEW:
        sigma = max(sigma, _DEVIATION_OF_FEW)
    return float(1.2533 * sigma / math.sqrt(row["repeats"]))


def compare(old: dict[tuple[str, ...], Row], new: dict[tuple[str, ...], Row]) -> list[Comparison]:
    """Every row of either.

    Raises:
        CompareError: the rows are of different kinds of machine.
    """
    for name in _MACHINE:
        values = [{str(row.get(name)) for row in rows.values()} for rows in (old, new)]
        if values[0] != values[1] or len(values[0]) > 1:
            sides = [" and ".join(sorted(value)) for value in values]
            raise CompareError(f"{name} differs; expected rows of one kind of machine, got {sides[0]} and {sides[1]}")
    found = []
    for key in sorted(old.keys() | new.keys()):
        if key not in new or key not in old:
            lost = key in old
            one = (old if lost else new)[key]["p50_ms"]
            found.append(Comparison(key, "lost", (one, None)) if lost else Comparison(key, "new", (None, one)))
            continue
        before, after = old[key], new[key]
        if before["sizes"] != after["sizes"]:
            raise CompareError(f"{' '.join(key)}: sizes differ; expected one problem in both files")
        times = (before["p50_ms"], after["p50_ms"])
        least: list[float] = [(row.get("ceiling") or {}).get("least_ms", 0.0) for row in (before, after)]
        # of one problem counted in two ways the ceilings say nothing
        alike = all(least) and all(before.get(count) == after.get(count) for count in ("flop", "byte"))
        moved = least[0] / least[1] if alike else 1.0
        ratio = times[1] / times[0] * moved
        noise = _BETWEEN_RUNS + 3 * math.hypot(_standard_error(before), _standard_error(after))
        # in logarithms: what is beyond it differs by more than noise with the ceilings and without them
        resolution = math.expm1(min(noise + abs(math.log(moved)), _ANY))
        verdict = "slower" if ratio > 1 + resolution else "faster" if ratio < 1 / (1 + resolution) else "same"
        found.append(Comparison(key, verdict, times, ratio, resolution, alike))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("compare", __doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(arguments)
    try:
        found = compare(read(args.old), read(args.new))
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    _print(found)
    worse = [one for one in found if one.ours and one.verdict in ("slower", "lost")]
    if any(one.verdict == "slower" for one in worse):
        print("measure a slower row again in both versions, or race them: python -m bench run --base REF --gate")
    return int(bool(worse))


def _print(found: Sequence[Comparison]) -> None:
    width = max(len(" ".join(one.key)) for one in found)
    print(f"{'':{width}}    old ms    new ms  normalised ratio; above 1 took longer")
    for one in found:
        times = "  ".join(f"{'-' if time is None else format(time, '.3f'):>8}" for time in one.times)
        ratio = "    -" if one.ratio is None else f"{one.ratio:5.2f}"
        tells = "" if one.resolution is None else f"  a difference below {100 * one.resolution:.0f} % is noise"
        raw = (
            ""
            if one.ratio is None or one.normalised
            else "  not normalised: a row has no ceilings, or the work is counted in another way"
        )
        whose = "" if one.ours else "  (not ours: decides nothing)"
        print(f"{' '.join(one.key):{width}}  {times}  {ratio}  {one.verdict:6}{tells}{raw}{whose}")

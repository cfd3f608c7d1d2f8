# SPDX-License-Identifier: Apache-2.0
"""Stored rows are compared by what their runs measured of the machine, and only on one kind of machine."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench import compare, one_op, plot, report
from drseg_core.testing import CASES

ROOT = Path(__file__).parents[2]


def row(**changes: Any) -> dict[str, Any]:
    found = {
        "op": "knn_graph", "case": "knn_4096", "mode": "fwd", "dtype": "float32", "data": "dino", "name": "engine",
        "sizes": {"B": 1, "h": 64, "w": 64, "D": 1024, "K": 75, "decay": 2.0},
        "p20_ms": 98.0, "p50_ms": 100.0, "p80_ms": 102.0, "repeats": 7, "ratio_to_engine": 1.0,
        "flop": 10**10, "byte": 10**7, "ceiling": {"gflops": 200.0, "copy_gbs": 10.0, "least_ms": 50.0},
        "device": "a CPU", "threads": 2, "instruction_set": "AVX2", "forced_level": None, "torch": "2.14.1",
        "date": "2026-11-24",
    }  # fmt: skip
    return {**found, **changes}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def slower(by: float) -> dict[str, float]:
    return {name: by * row()[name] for name in ("p20_ms", "p50_ms", "p80_ms")}


@pytest.mark.parametrize(
    ("changes", "verdict", "code"),
    [
        ({}, "same", 0),
        (slower(1.5), "slower", 1),
        (slower(0.5), "faster", 0),
        # the machine had half its speed: twice the time is the same code
        ({**slower(2.0), "ceiling": {"gflops": 100.0, "copy_gbs": 5.0, "least_ms": 100.0}}, "same", 0),
        # the same time where the ceilings have twice the speed: they or the code, nobody can tell
        ({"ceiling": {"gflops": 400.0, "copy_gbs": 20.0, "least_ms": 25.0}}, "same", 0),
        # and neither if the time says faster
        ({**slower(0.8), "ceiling": {"gflops": 800.0, "copy_gbs": 40.0, "least_ms": 12.5}}, "same", 0),
        # a faster machine, and more time
        ({**slower(1.3), "ceiling": {"gflops": 400.0, "copy_gbs": 20.0, "least_ms": 25.0}}, "slower", 1),
        # a slower machine, and less time
        ({**slower(0.7), "ceiling": {"gflops": 100.0, "copy_gbs": 5.0, "least_ms": 100.0}}, "faster", 0),
        # the ceilings alone moved by a third, which may be chance as well
        ({"ceiling": {"gflops": 270.0, "copy_gbs": 13.0, "least_ms": 37.5}}, "same", 0),
        # one sample says little
        ({**slower(1.4), "repeats": 1}, "same", 0),
        ({**slower(2.0), "repeats": 1}, "slower", 1),
        ({**slower(1.5), "ceiling": None}, "slower", 1),
        # as slow, but the rows are too noisy to tell
        ({**slower(1.5), "p20_ms": 60.0, "p80_ms": 400.0}, "same", 0),
        ({**slower(1.5), "p80_ms": 1e7}, "same", 0),
    ],
)
def test_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], verdict: str, code: int):
    old, new = write(tmp_path / "old", row()), write(tmp_path / "new", row(**changes))
    assert compare.main([str(old), str(new)]) == code
    heading, line, *more = capsys.readouterr().out.splitlines()
    assert "normalised ratio" in heading and verdict in line and "is noise" in line
    assert " 100.000 " in line and (["race them" in one for one in more] == [True] * code)


def test_the_last_row_of_the_same_counts_and_lost_rows_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = write(tmp_path / "old", row(**slower(9)), row(), row(mode="fwd+bwd"))
    new = write(tmp_path / "new", row(), row(mode="fwd", dtype="bfloat16"))
    assert compare.main([str(old), str(new)]) == 1
    out, err = capsys.readouterr()
    assert err == f"compare: {old} has 1 of its rows measured again later; the last of each counts\n"
    lines = out.splitlines()
    assert [line.split()[-1] for line in lines if "bfloat16" in line or "fwd+bwd" in line] == ["new", "lost"]
    assert "same" in next(line for line in lines if "fwd float32" in line)


@pytest.mark.parametrize("name", ["faiss", "naive", "matmul_lower_bound"])
def test_rows_of_others_decide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    old = write(tmp_path / "old", row(), row(name=name), row(name=name, mode="fwd+bwd"))
    new = write(tmp_path / "new", row(), row(name=name, **slower(9)))
    assert compare.main([str(old), str(new)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if name in line]
    assert all("not ours" in line for line in lines) and "slower" in lines[0] and "lost" in lines[1]


@pytest.mark.parametrize("name", ["engine", "native", "cuda", "triton", "reference"])
def test_rows_of_ours_decide(tmp_path: Path, name: str):
    old, new = write(tmp_path / "old", row(name=name)), write(tmp_path / "new", row(name=name, **slower(9)))
    assert compare.main([str(old), str(new)]) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "another CPU"}, "device differs"),
        ({"threads": 4}, "threads differs"),
        ({"sizes": {"B": 2}}, "sizes differ"),
        ({"p50_ms": 0.0}, "was never timed; expected p50_ms and repeats above 0"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
):
    old, new = write(tmp_path / "old", row()), write(tmp_path / "new", row(**changes))
    assert compare.main([str(old), str(new)]) == 2
    assert words in capsys.readouterr().err


def test_a_model_with_other_options_is_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [row(overrides={}), row(**slower(3.0), overrides={"model.rotations": 4})]
    old, new = write(tmp_path / "old", *rows), write(tmp_path / "new", *reversed(rows))
    assert compare.main([str(old), str(new)]) == 0
    assert "model.rotations=4" in capsys.readouterr().out


def test_machines_are_not_mixed_within_files_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there = {"device": "another"}
    old = write(tmp_path / "old", row(data="random"), row(**there))
    new = write(tmp_path / "new", row(data="random", **there), row())
    assert compare.main([str(old), str(new)]) == 2
    assert "expected rows of one kind of machine" in capsys.readouterr().err


def test_work_that_is_counted_in_another_way_hides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    doubled = {"flop": 2 * 10**10, "ceiling": {"gflops": 200.0, "copy_gbs": 10.0, "least_ms": 100.0}}
    old, new = write(tmp_path / "old", row()), write(tmp_path / "new", row(**slower(2.0), **doubled))
    assert compare.main([str(old), str(new)]) == 1
    assert "counted in another way" in capsys.readouterr().out


NO_ROW = "is no row; expected an object as python -m bench run --out writes, got"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "not found; expected a file of rows"),
        (b"", "holds no timed row"),
        (b"\nno json\n", f":2: {NO_ROW} no json"),
        (b'[{"op": "x"}]\n', f':1: {NO_ROW} [{{"op": "x"}}]'),
        (b"[\n", f":1: {NO_ROW} ["),
        (b'{"op": "x"}\n', "holds no timed row"),
        (b'{"case": [], "name": {}}\n', ":1: case cannot be read; expected a text, got []"),
        (b"[" * 10**5, f":1: {NO_ROW} [[[["),
        (
            json.dumps(dict.fromkeys(sorted(compare._TIMES), 1) | {"sizes": {}}).encode(),
            "a row lacks op, case, mode, dtype, data, name",
        ),
        (b"\x89PNG", "is no text; expected a file of rows"),
    ],
)
def test_files_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str):
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content)
    for name, command in (("compare", compare), ("plot", plot)):
        assert command.main([str(bad), str(bad)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"{name}: {bad}") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"p50_ms": "a"}, 'p50_ms cannot be read; expected a finite number, got "a"'),
        ({"p50_ms": None}, "p50_ms cannot be read; expected a finite number, got null"),
        ({"p20_ms": float("nan")}, "p20_ms cannot be read; expected a finite number, got NaN"),
        ({"p80_ms": 10**400}, "p80_ms cannot be read; expected a finite number, got 1000"),
        ({"repeats": True}, "repeats cannot be read; expected a finite number, got true"),
        ({"flop": [1]}, "flop cannot be read; expected a finite number, got [1]"),
        ({"byte": 0}, "byte cannot be read; expected a number above 0, got 0"),
        ({"sizes": [1]}, "sizes cannot be read; expected an object, got [1]"),
        ({"sizes": {"B": "one"}}, 'sizes.B cannot be read; expected a finite number, got "one"'),
        ({"ceiling": 5}, "ceiling cannot be read; expected an object, got 5"),
        ({"ceiling": {"least_ms": -1.0}}, "ceiling.least_ms cannot be read; expected a number above 0, got -1.0"),
        ({"overrides": [1]}, "overrides cannot be read; expected an object, got [1]"),
        ({"device": ["a CPU"]}, 'device cannot be read; expected a text, got ["a CPU"]'),
        ({"threads": {}}, "threads cannot be read; expected a finite number, got {}"),
        ({"date": 2026}, "date cannot be read; expected a text, got 2026"),
    ],
    ids=str,
)
def test_values_of_another_kind_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
):
    (tmp_path / "results").mkdir()
    bad = write(tmp_path / "results" / "bad.jsonl", row(mode="fwd+bwd"), row(**changes))
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN.format('results')}\n{report.END}\n")
    for command, words in (
        (compare, [bad, bad]), (plot, [bad, "--out", tmp_path / "out"]), (report, [tmp_path / "results", page])
    ):  # fmt: skip
        assert command.main([*map(str, words)]) == 2
        err = capsys.readouterr().err
        assert f"{bad}:2: {said}" in err and err.count("\n") == 1


@pytest.mark.parametrize("lacks", ["device", "ratio_to_engine", "sizes.h", "ceiling.gflops", "date"])
def test_what_a_picture_or_a_table_needs_and_a_row_lacks_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lacks: str
):
    (tmp_path / "results").mkdir()
    outer, _, inner = lacks.partition(".")
    rows = many_rows()
    for one in rows:
        (one[outer] if inner else one).pop(inner or outer, None)
    bad = write(tmp_path / "results" / "bad.jsonl", *rows)
    assert plot.main([str(bad), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert f"plot: {bad}:" in err and err.endswith(
        f": a row lacks {lacks}; expected what python -m bench run --out writes\n"
    )
    if inner != "gflops":
        page = tmp_path / "page.md"
        page.write_text(f"{report.BEGIN.format('results')}\n{report.END}\n")
        assert report.main([str(tmp_path / "results"), str(page)]) == 2
        err = capsys.readouterr().err
        assert f"a row lacks {lacks};" in err and err.count("\n") == 1


def test_rows_of_a_mode_of_another_have_pictures_and_tables(tmp_path: Path):
    (tmp_path / "results").mkdir()
    path = write(tmp_path / "results" / "rows.jsonl", *(one | {"mode": "bwd", "ceiling": None} for one in many_rows()))
    assert plot.main([str(path), "--out", str(tmp_path / "out")]) == 0
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN.format('results')}\n{report.END}\n")
    assert report.main([str(tmp_path / "results"), str(page)]) == 0


def test_pages_that_are_no_text_or_not_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "results").mkdir()
    picture = tmp_path / "page.png"
    picture.write_bytes(b"\x89PNG")
    for page, why in ((tmp_path / "absent.md", os.strerror(errno.ENOENT)), (picture, "is no text")):
        assert report.main([str(tmp_path / "results"), str(page)]) == 2
        assert capsys.readouterr().err == f"report: {page} cannot be read: {why}; expected a page with a section\n"


def test_pictures_without_a_folder_to_be_in_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "rows.jsonl", *many_rows())
    assert plot.main([str(path), "--out", str(path)]) == 2
    why = os.strerror(errno.EEXIST)
    assert capsys.readouterr().err == f"plot: --out cannot be written: {why}; expected a folder, got {path}\n"


def many_rows() -> list[dict[str, Any]]:
    rows = []
    for side, time in ((64, 40.0), (128, 160.0)):
        sizes = row()["sizes"] | {"h": side, "w": side}
        for name, factor in (("engine", 1.0), ("naive", 6.0), ("faiss", 4.0), ("matmul_lower_bound", 3.0)):
            rows.append(
                row(case=f"knn_{side * side}", sizes=sizes, name=name, p50_ms=time * factor, ratio_to_engine=factor)
            )
    return rows


def test_pictures_of_rows(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", *many_rows())
    assert plot.main([str(path), "--out", str(tmp_path / "out")]) == 0
    made = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert made == [f"{name}.{suffix}" for name in ("roofline", "scaling", "speedup") for suffix in ("png", "svg")]
    again = (tmp_path / "out" / "scaling.svg").read_bytes()
    plot.main([str(path), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "scaling.svg").read_bytes() == again


def test_pictures_of_two_machines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "rows.jsonl", row(), row(name="naive", device="another"))
    assert plot.main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert "2 kinds of machine" in capsys.readouterr().err


def test_the_readme_section_is_what_the_rows_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "results"
    folder.mkdir()
    op = {"op": "graph_propagate", "case": "grid_64x64", "data": "case", "peak_mb": 12.4, "share_of_ceiling": 0.25}
    write(
        folder / "rows.jsonl",
        *many_rows(),
        row(**op, name="native", p50_ms=4.0),
        row(**op, name="reference", p50_ms=48.0, ratio_to_engine=12.0),
    )
    readme = tmp_path / "README.md"
    begin, other = (report.BEGIN.format(name) for name in ("results", "another"))
    kept = f"{other}\nof another machine\n{report.END}\nafter\n"
    readme.write_text(f"before\n{begin}\nold\n{report.END}\n{kept}")
    assert report.main([str(folder), str(readme), "--check"]) == 1
    assert report.main([str(folder), str(readme)]) == 0
    assert report.main([str(folder), str(readme), "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith(f"{report.END}\n{kept}") and "old" not in text
    assert "| 1 x 16384 nodes, D 1024, decay 2 | dino | 160 | 6.00x | 4.00x | 3.00x |" in text
    assert "| `graph_propagate`, 1 x 64x64, forward | native | 4.00 | 12.0x | 0.25 | 12 |" in text
    readme.write_text("no marks")
    assert report.main([str(folder), str(readme)]) == 2
    assert "no place for the section" in capsys.readouterr().err
    before = readme.read_bytes()
    for wrong, what in ((folder / "missing", "not found"), (readme, "is no folder")):
        assert report.main([str(wrong), str(readme)]) == 2
        assert capsys.readouterr().err == f"report: {wrong} {what}; expected a folder of rows\n"
    assert readme.read_bytes() == before


@pytest.mark.parametrize(
    ("page", "mark"), [("README.md", report.SUMMARY), ("docs/performance.md", report.BEGIN)], ids=["summary", "all"]
)
def test_pages_say_what_the_committed_rows_say(page: str, mark: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    before, after = mark.split("{}")
    folders = [part.split(after)[0] for part in text.split(before)[1:]]
    assert len(folders) == text.count(report.END) > 1
    for folder in folders:
        assert report.main([str(ROOT / "bench" / "results" / folder), str(ROOT / page), "--check"]) == 0


def test_rows_under_a_name_of_before_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old, new = write(tmp_path / "old", row(case="knn_4096")), write(tmp_path / "new", row(case="grid_64x64"))
    assert compare.main([str(old), str(new)]) == 0
    assert "knn_graph grid_64x64 fwd float32 dino engine  " in capsys.readouterr().out


def test_names_of_before_are_cases_of_those_sizes():
    sizes = {case.name: one_op.sizes_of(case) for case in CASES}
    stored = [row for path in (ROOT / "bench" / "results").glob("*/*.jsonl") for row in compare.load(path)]
    rows = [row for row in stored if row["op"] not in ("model", "preset", "scene")]
    assert {row["case"] for row in rows} >= {*compare._CASES.values()}
    for one in rows:
        assert one["sizes"].items() <= (sizes[one["case"]] | {"decay": one["sizes"].get("decay"), "layers": 2}).items()


def test_tables_name_the_width_of_the_edge_mlp(tmp_path: Path):
    sizes = {"B": 8, "h": 24, "w": 24, "D": 1024, "E": 128, "C": 384, "K": 75}
    rows = [row(op="pdgr", case="one", sizes=sizes), row(op="pdgr", case="wide", sizes=sizes | {"E": 256})]
    heading, _, *lines, _ = report._module_table(rows)
    assert heading.startswith("| PDGR, D 1024, C 384, K 75 |")
    assert [line.split("|")[1] for line in lines] == [f" 8 x 24x24, E {width}, forward " for width in (128, 256)]
    assert report._module_table(rows[1:])[0].startswith("| PDGR, D 1024, E 256, C 384, K 75 |")
    op = {"op": "edge_weight", "data": "case", "name": "native", "share_of_ceiling": 0.5, "sizes": sizes}
    assert report._op_table([row(**op)])[2].startswith("| `edge_weight`, 8 x 24x24, E 128, forward |")


def test_tables_name_what_is_not_float32(tmp_path: Path):
    op = {"op": "graph_layer", "data": "case", "name": "native", "share_of_ceiling": 0.5}
    assert report._op_table([row(**op, dtype="bfloat16")])[2].startswith("| `graph_layer`, 1 x 64x64, bfloat16, forw")
    write(tmp_path / "rows.jsonl", *many_rows(), *(one | {"dtype": "bfloat16"} for one in many_rows()))
    text = report.section(tmp_path, tmp_path)
    assert "float32, bfloat16. Medians" in text and "| 1 x 4096 nodes, D 1024, decay 2, bfloat16 | dino |" in text

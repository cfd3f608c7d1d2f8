# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest

from drseg_core.studies.paper import PaperRow
from drseg_core.studies.report import Order, by_set, markdown, order, over_tests, rows, spread, text_of
from drseg_core.studies.tables import Section, TrainingStudy, Variant


def row(*values, metric="mIoU"):
    return {name: {metric: value} for name, value in zip("ab", values, strict=False)}


def variant(name, miou, **options):
    return Variant(name, name.upper(), {}, PaperRow(miou), **options)


def test_spread_is_over_seeds_of_the_mean_over_test_sets():
    scores = {0: row(10.0, 20.0), 1: row(12.0, 22.0), 2: row(14.0, 24.0)}
    found = spread(scores, "mIoU")
    assert found.mean == 17 and found.deviation == pytest.approx(2.0) and found.seeds == 3
    assert spread(scores, "mIoU", "b").mean == 22 and text_of(found) == "17.0 ± 2.0"
    assert text_of(spread({0: row(10.0)}, "mIoU")) == "10.0" and text_of(spread({}, "mIoU")) == "-"


def test_a_test_set_without_a_metric_has_no_part_in_its_mean():
    assert over_tests(row(10.0, None), "mIoU") == 10 and over_tests(row(None, None), "mIoU") is None


def test_order_counts_pairs_and_whether_every_seed_agrees():
    variants = (variant("low", 1.0), variant("middle", 2.0), variant("high", 3.0), Variant("new", "NEW", {}))
    scores = {
        "low": {0: row(10.0), 1: row(10.0)},
        # above low on average, but not with seed 1
        "middle": {0: row(13.0), 1: row(9.0)},
        "high": {0: row(8.0), 1: row(7.0)},
        "new": {0: row(99.0)},
    }
    assert order(variants, scores) == Order(pairs=3, same=1, same_in_every_seed=0, opposite_in_every_seed=2, equal=0)
    alike = {"low": {0: row(10.0), 1: row(5.0)}, "middle": {0: row(10.0), 1: row(5.0)}}
    assert order(variants, alike) == Order(pairs=1, same=0, same_in_every_seed=0, opposite_in_every_seed=0, equal=1)
    assert order(variants[:1], scores) is None and order(variants, {}) is None


def test_the_page_says_what_was_not_run_and_what_it_is_compared_with():
    study = TrainingStudy(
        "t",
        "Title",
        (variant("low", 1.0), variant("high", 2.0), variant("gone", 3.0, why_not="no weights")),
        reference="high",
    )
    scores = {"low": {0: row(10.0), 1: row(20.0)}, "high": {0: row(11.0), 1: row(25.0)}}
    facts = {
        "data": "folder:x",
        "steps": 5,
        "start_steps": None,
        "prior_steps": 0,
        "protocol": "rskt",
        "seeds": [0, 1],
        "tests": [{"name": "a", "spec": "folder:a"}],
        "command": "drseg study t",
        "commits": ["abc"],
    }
    page = markdown(study, scores, {"low": "seed 1: it broke"}, facts)
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert "GONE (not run: no weights)" in lines and "LOW (mean of 2; seed 1: it broke)" in lines
    # 10 - 11 and 20 - 25: -3.0, deviation of -1 and -5
    assert f"-3.0 ± {math.sqrt(8):.1f}" in lines["LOW (mean of 2; seed 1: it broke)"]
    assert "protocol rskt" in page and "The paper orders" not in page and "the paper orders 1 pairs" in page
    assert "of HIGH" in page and "`drseg study t`; trained at commit abc\n" in page
    page = markdown(study, scores, {}, {**facts, "start_steps": 7, "start": "contrast"})
    assert "5 steps after 7 of the dual encoder, which saw captions alone, seeds" in page
    page = markdown(study, scores, {}, {**facts, "seconds": 90.1})
    assert "`drseg study t`; trained at commit abc; 2 minutes, one process after another\n" in page


def test_each_column_of_the_paper_says_so():
    metrics = {"a": {"mIoU": 10.0, "fwIoU": 20.0, "mACC": 30.0}}
    study = TrainingStudy("t", "Title", (Variant("x", "X", {}, PaperRow(1.0, 2.0, 3.0)), Variant("y", "Y", {})))
    first, second = rows(study, {"x": {0: metrics}}, {})
    papers = {"paper: mIoU": "1.00", "paper: fwIoU": "2.00", "paper: mACC": "3.00"}
    assert first == {"": "X", "mIoU": "10.0", "fwIoU": "20.0", "mACC": "30.0", **papers}
    assert second.keys() == first.keys() and {second[key] for key in papers} == {None}


def test_sets_stand_one_by_one_beside_the_paper_s():
    published = PaperRow(1.0, None, 2.0, {"b": (30.0, 40.5)})
    study = TrainingStudy("t", "T", (Variant("x", "X", {}, published), Variant("y", "Y", {}, published)))
    scores = {"x": {seed: {"a": {"mIoU": 1.0, "mACC": 2.0}, "b": {"mIoU": 3.0 + seed, "mACC": 5.0}} for seed in (0, 2)}}
    assert by_set(study, scores) == [
        {"": "X", "of": "here", "a": "1.0 ± 0.0 / 2.0 ± 0.0", "b": "4.0 ± 1.4 / 5.0 ± 0.0"},
        {"": "X", "of": "paper", "a": None, "b": "30.00 / 40.50"},
        {"": "Y", "of": "paper", "a": None, "b": "30.00 / 40.50"},
    ]
    assert by_set(TrainingStudy("t", "T", (variant("x", 1.0),)), scores) == []


def test_sections_follow_the_note():
    study = TrainingStudy("t", "T", (variant("x", 1.0),), "Note.", sections=(Section("More", [{"what": "1"}], "Why."),))
    facts = {"data": "d", "steps": 1, "start_steps": 0, "prior_steps": 0, "protocol": None, "seeds": [0], "tests": []}
    page = markdown(study, {}, {}, {**facts, "command": "c", "commits": []})
    assert "Note.\n\n## More\n\nWhy.\n\n| what |\n|---|\n| 1 |\n\n`c`; trained at" in page

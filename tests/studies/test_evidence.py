# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest

from drseg_core.studies import evidence
from drseg_core.studies.setting import make_setting
from drseg_core.studies.training import StudyFiles


def scores(*by_seed):
    return {seed: {"source": {"mIoU": value}, "shifted": {"mIoU": value - 1}} for seed, value in enumerate(by_seed)}


@pytest.fixture
def files(tmp_path):
    setting = dataclasses.replace(make_setting(quick=True, seeds=(0, 1, 2)), start="contrast")
    return lambda name: StudyFiles(name, setting, tmp_path)


def test_a_row_is_compared_seed_by_seed(files):
    table = files("table2")
    table.scores = {"baseline": scores(30, 32, 34), "pdgr": scores(31, 33.1, 35.2), "pdgr_k1": scores(31, 33, 34.9)}
    found = {(pair.row, pair.against): pair for pair in evidence.compared(table)}
    assert list(found) == [
        ("+ PDGR", "baseline"),
        ("+ PDGR, K 1", "baseline"),
        ("+ PDGR", "+ PDGR, K 1"),
    ]
    gain = found["+ PDGR", "baseline"]
    assert gain.by_seed == pytest.approx((1, 1.1, 1.2)) and gain.mean == pytest.approx(1.1)
    # of three values the t of 97.5 % is 4.303
    assert gain.half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3) and gain.wins
    # above or level in every seed is not above in every seed
    assert not found["+ PDGR", "+ PDGR, K 1"].wins and str(gain) == "+1.10 ± 0.25"


@pytest.mark.parametrize(("apart", "wins"), [((1, 1.1, 1.2), True), ((0.1, 1, 3), False), ((-0.1, 5, 5), False)])
def test_what_wins(apart, wins, files):
    table = files("table6")
    table.scores = {"k_1": scores(0, 0, 0), "k_75": scores(*apart)}
    (pair,) = evidence.compared(table)
    assert (pair.row, pair.against, pair.wins) == ("K 75", "K 1", wins)


def test_a_row_that_is_its_partner_under_another_option_is_left_out(files):
    sweep = files("sweep-neighbour-share")
    first, *others = sweep.study.variants
    sweep.scores = {first.name: scores(1, 2, 3), **{variant.name: scores(1, 2, 3.5) for variant in others}}
    assert len(evidence.compared(sweep)) == len(others)
    sweep.scores[others[0].name] = scores(1, 2, 3)
    assert [pair.row for pair in evidence.compared(sweep)] == [variant.title for variant in others[1:]]


def test_one_seed_never_wins(files):
    table = files("table6")
    table.scores = {"k_1": scores(1), "k_20": scores(9)}
    (pair,) = evidence.compared(table)
    assert not pair.wins and str(pair) == "+8.00"


def test_the_page_says_it_in_five_lines(files):
    tables = {name: files(name) for name in ("table2", "table6")}
    tables["table2"].scores = {"baseline": scores(30, 32, 34), "pdgr": scores(31, 33.1, 35.2)}
    tables["table6"].scores = {"k_1": scores(0, 0, 0), "k_20": scores(1, 1, 1), "k_75": scores(2, 2, 2)}
    pairs = {name: evidence.compared(table) for name, table in tables.items()}
    trained_by = {"commits": ["abc"], "machines": ["a CPU, threads: 1"], "seconds": 9000}
    text = evidence.page(pairs, tables["table2"].setting, "drseg study evidence", trained_by)
    assert text.endswith(
        "\n`drseg study evidence`; trained at commit abc on a CPU, threads: 1; 2.5 hours of one "
        "process after another, each training once\n"
    )
    lines = text.split("\n\n")
    told = next(part for part in lines if part.startswith("1. ")).splitlines()
    assert len(told) == 5
    assert told[0] == "1. PDGR in place of the canonical map: +1.10 ± 0.25 against the baseline."
    assert "not scored" in told[1] and "K 75 gains most against K 1: +2.00 ± 0.00." in told[3]
    assert "none was scored.\n" in evidence.page({}, tables["table2"].setting, "", trained_by)
    assert "None wins" not in told[3] and "The prior has random weights, where no other is named." in text
    assert "| [table6-contrast](table6-contrast.md) | K 20 | K 1 | +1.00 ± 0.00 | 3 of 3 | yes |" in text


def test_what_was_complete_before_does_not_shorten_the_time_left(tmp_path, monkeypatch, logged, caplog):
    hours = iter(range(0, 360000, 3600))
    setting = dataclasses.replace(make_setting(quick=True, seeds=(0, 1)), start="contrast")
    table = StudyFiles("table2", setting, tmp_path)
    complete = {item.folder for item in table.planned if item.seed == 0}
    for folder in complete:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.json").write_text("{}")

    def run_variants(planned, *, jobs, done):
        for item in planned:
            done(item, None, "not trained")

    monkeypatch.setattr(evidence, "STUDIES", ("table2",))
    monkeypatch.setattr(evidence, "training_free", lambda *_, **__: {})
    monkeypatch.setattr(evidence, "expected_seconds", lambda *_: 0.0)
    monkeypatch.setattr(evidence, "run_variants", run_variants)
    monkeypatch.setattr(evidence, "time", SimpleNamespace(monotonic=lambda: next(hours)))
    with caplog.at_level(logging.INFO, logger="drseg_core"):
        evidence.evidence(setting, tmp_path)
    told = [message for message in logged() if "trainings" in message]
    count, half = 2 * len(complete), len(complete)
    assert f"{count} trainings, {half} of them complete" in told[0]
    # one training took the hour since the start
    assert f"{half + 1} of {count} trainings, about {half - 1} hours left" in told[1]
    assert told[-1].endswith(f"{count} of {count} trainings, none left") and len(told) == half + 1

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json

import pytest

from drseg_core.studies import channels, expected_time, registry, runner
from drseg_core.studies.evidence import STUDIES
from drseg_core.studies.registry import studies
from tests.few_words import few_words  # noqa: F401
from tests.studies.in_memory import learn_in_memory

pytestmark = pytest.mark.usefixtures("few_words")
SMALL = ("--quick", "--steps", "1", "--start-steps", "1")


def test_list(drseg):
    code, out, _ = drseg("study", "list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(studies())
    assert {"channel-masking", "retention", "correlation-maps", "table1", "table6", "sweep-decay"} <= set(studies())


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


# evidence has the others among its own
@pytest.mark.parametrize("name", [name for name in studies() if name == "table2" or name not in STUDIES])
def test_quick(drseg, out, name, monkeypatch):
    # whole runs: those of tables, of what ranks channels before it trains, and of the evidence the first ones
    ranked = ("sweep-alpha", "sweep-prototypes", "sweep-sampling", "sweep-similarity")
    whole = {"evidence": 3}.get(name, 0 if name.startswith("sweep-") and name not in ranked else 99)
    count, run_variant = itertools.count(), runner.run_variant
    monkeypatch.setattr(
        runner, "run_variant", lambda planned: (run_variant if next(count) < whole else learn_in_memory)(planned)
    )
    # evidence says how long it takes, for which each of its models would be made and timed
    monkeypatch.setattr(expected_time, "_measured", lambda *_: (2.0, 0.5))
    code, printed, err = drseg("study", name, *SMALL, "--out", out)
    assert code == 0, err
    content = json.loads((out / f"{name}.json").read_text())
    assert content["study"] == name and content["seeds"] == [0] and content["command"].startswith("drseg ")
    assert (out / f"{name}.md").read_text() in printed and (out / f"{name}.png").stat().st_size > 1000
    assert all(variant["not_run"] is None for variant in content.get("variants", []))
    assert f"[{name}]({name}.md)" in (out / "index.md").read_text()
    if name == "evidence":
        parts = [json.loads((out / f"{part}-contrast.json").read_text()) for part in STUDIES]
        assert all(variant["not_run"] is None for part in parts for variant in part["variants"])


def test_studies_share_their_variants(drseg, out):
    variants = {}
    for name in ("table2", "table4", "table2-readings"):
        assert drseg("study", name, *SMALL, "--out", out)[0] == 0
        variants[name] = {
            variant["name"]: variant["scores"] for variant in json.loads((out / f"{name}.json").read_text())["variants"]
        }
    assert variants["table4"]["ugaf"] == variants["table2"]["all"]
    assert variants["table2-readings"]["pdgr_spsd_replace"] == variants["table2"]["pdgr_spsd"]


# processes begin with eight seconds of imports, so one study has them
@pytest.mark.parametrize(("name", "jobs"), [("channel-masking", 2), ("correlation-maps", 1), ("neighbour-purity", 1)])
def test_studies_need_no_other(drseg, tmp_path, name, jobs):
    """In a new folder, with two seeds, or two processes; the second time everything is there already."""
    words = ("study", name, *SMALL, "--seeds", "0,1", "--out", tmp_path)
    code, printed, err = drseg(*words, "--jobs", jobs)
    assert code == 0, err
    found = json.loads((tmp_path / f"{name}.json").read_text())["found"]
    assert all(list(by_seed) == ["0", "1"] for by_seed in found.values())
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("**/*.json")}
    assert drseg(*words, "--jobs", 1)[1] == printed and kept == {path: path.stat().st_mtime_ns for path in kept}
    assert json.loads((tmp_path / f"{name}.json").read_text())["found"] == found


def test_variants_of_equal_seconds(drseg, tmp_path):
    words = ("study", "sweep-residual", "--quick", "--start-steps", "1", "--seconds", "0.5", "--out", tmp_path)
    code, printed, err = drseg(*words)
    assert code == 0, err
    content = json.loads((tmp_path / "sweep-residual.json").read_text())
    assert content["seconds_each"] == 0.5
    reached = content["steps_reached"]
    assert list(reached) == [variant["title"] for variant in content["variants"]]
    assert all(len(steps) == 1 and 1 <= steps[0] < 1000 for steps in reached.values())
    assert "landscape,scenes=8,size=64`, 0.5 seconds each after 1 of the dual encoder" in printed
    assert "Steps in that time, by seed: " in printed
    # the time is up: nothing is trained again
    assert drseg(*words)[1] == printed


def test_a_seed_that_fails_fails_alone(drseg, tmp_path, monkeypatch):
    measure = channels._masked

    def broken(planned):
        if planned.seed == 1:
            raise ValueError("one is not finite")
        return measure(planned)

    monkeypatch.setattr(channels, "_masked", broken)
    words = ("study", "channel-masking", *SMALL, "--out", tmp_path)
    code, printed, err = drseg(*words, "--seeds", "0,1")
    assert code == 8 and "seed 1: ValueError: one is not finite" in printed and "1 variants failed: seed 1" in err
    assert "\nSeeds 0; " in printed and "Not run: seed 1" in printed
    code, _, err = drseg(*words, "--seeds", "1")
    assert code == 8 and "channel-masking has no result; seed 1: ValueError: one is not finite" in err


def test_other_files_are_no_studies(drseg, tmp_path):
    (tmp_path / "mine.json").write_text("[]")
    assert drseg("study", "activation-sparsity", *SMALL, "--out", tmp_path)[0] == 0
    assert "mine" not in (tmp_path / "index.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("table9", "--out", "x"), "name is unknown"),
        (("table2",), "--out"),
        (("table2", "--out", "x", "--seeds", "a"), "seeds are not numbers"),
        (("table2", "--out", "x", "--jobs", "0"), "jobs is out of range"),
        (("table2", "--out", "x", "--matched"), "matched does not belong to table2"),
        (("table2", "--out", "x", "--released"), "released does not belong to table2"),
        (("table1", "--out", "x", "--released", "--matched"), "released does not belong to table1 --matched"),
        (("table2", "--out", "x", "--steps", "0"), "steps is out of range"),
        (("table2", "--out", "x", "--seconds", "0"), "seconds is out of range; expected a number above 0, got 0.0"),
        (("table2", "--out", "x", "--seconds", "nan"), "seconds has a wrong value"),
        (("table2", "--out", "x", "--seconds", "9", "--steps", "3"), "steps and seconds are both given"),
        (("table2", "--out", "x", "--start", "captions"), "start is not usable; expected dense or contrast"),
        (("table2", "--out", "x", "--data", "folder:y"), "tests are missing"),
    ],
)
def test_refusals(drseg, words, message):
    code, _, err = drseg("study", *words)
    assert code == 2 and message in err.splitlines()[0], err


def test_what_table_1_is_given(drseg, tmp_path, monkeypatch):
    given = []

    def run(setting, out, *, jobs, command):
        given.append(setting)
        (out / f"table1{setting.suffix}.md").write_text("the page")
        return {}

    monkeypatch.setattr(registry, "find_study", lambda name: registry.Study(name, "", run))
    files = ("--prior-v1", "a.pth", "--remote-clip", "b.pt")
    for words in ((), ("--matched",)):
        code, printed, err = drseg("study", "table1", "--quick", *files, *words, "--out", tmp_path)
        assert code == 0 and "the page" in printed, err
    assert [one.matched for one in given] == [False, True]
    assert {(one.prior_v1, one.remote_clip) for one in given} == {("a.pth", "b.pt")}
    assert {path.name for path in tmp_path.glob("*.md")} == {"table1.md", "table1-matched.md", "index.md"}


def test_data_that_are_not_there_are_found_before_any_training(drseg, tmp_path):
    code, _, err = drseg("study", "table2", "--data", "folder:none", "--test", "folder:none", "--out", tmp_path / "out")
    assert code == 3 and "none" in err and not (tmp_path / "out").exists()


def test_an_out_that_is_no_folder(drseg, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = drseg("study", "table2", "--quick", "--out", out)
        assert code == 2 and "--out cannot be made" in err.splitlines()[0]


def test_a_configuration_that_is_another_method(drseg, tmp_path):
    path = tmp_path / "san.yaml"
    path.write_text("model: {proposals: {kind: side_adapter}}\n")
    code, _, err = drseg(
        "study", "table2", "--config", path, "--data", "folder:x", "--test", "folder:x", "--out", tmp_path
    )
    assert code == 2 and "comparison method" in err

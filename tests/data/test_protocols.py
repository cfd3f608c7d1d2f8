# SPDX-License-Identifier: Apache-2.0
"""What each protocol fixes, and that it is what is read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from drseg_core.data.benchmarks import BENCHMARKS
from drseg_core.data.protocols import PROTOCOLS, check_held_out, get_protocol, open_protocol
from drseg_core.errors import ConfigError, DatasetError
from tests.data.miniatures import NAMES, write_release

SEGEARTH_CLASSES = {"isaid": 16, "potsdam": 6, "vaihingen": 6, "loveda": 7, "uavid": 7, "udd5": 5, "vdd": 7}


def classes(protocol: str) -> dict[str, int]:
    return {name: len(view.class_names) for name, view in PROTOCOLS[protocol].sets.items()}


def splits(protocol: str) -> dict[str, str]:
    return {name: view.split for name, view in PROTOCOLS[protocol].sets.items()}


def test_the_benchmark_scores_everything():
    """LoveDA's no-data is a class, and the training sets are scored with their training images."""
    assert splits("rskt") == dict.fromkeys(NAMES, "all")
    for name, view in PROTOCOLS["rskt"].sets.items():
        assert view.class_names == BENCHMARKS[name].class_names and view.new_id is None
    assert PROTOCOLS["rskt"].sets["loveda"].class_names[0] == "no-data"


def test_clean_is_held_out_and_has_no_class_of_nothing():
    assert splits("clean") == {**dict.fromkeys(NAMES, "all"), "dlrsd": "val", "isaid": "val"}
    assert classes("clean") == {**classes("rskt"), "loveda": 7}
    assert not any("no-data" in view.class_names for view in PROTOCOLS["clean"].sets.values())
    assert PROTOCOLS["clean"].held_out and not PROTOCOLS["rskt"].held_out


def test_ovrs_and_segearth_cover_their_sets():
    assert set(PROTOCOLS["ovrs"].sets) == {"dlrsd", "isaid", "potsdam", "vaihingen"}
    assert classes("segearth") == SEGEARTH_CLASSES
    assert splits("segearth") == {**dict.fromkeys(SEGEARTH_CLASSES, "val"), "uavid": "test", "vdd": "test"}


def test_views_and_means():
    views = {name: protocol.views for name, protocol in PROTOCOLS.items()}
    assert views["clean"].window is None and views["clean"].edge == 640 and views["clean"].pad is None
    # what the public code does to images that are no multiple of 32, and to images without a label
    assert views["rskt"] == dataclasses.replace(views["clean"], pad=32)
    assert [name for name, protocol in PROTOCOLS.items() if protocol.unlabelled == "negative"] == ["rskt"]
    assert (views["ovrs"].edge, views["ovrs"].window, views["ovrs"].stride, views["ovrs"].whole) == (
        640,
        384,
        256,
        True,
    )
    assert (views["segearth"].edge, views["segearth"].window, views["segearth"].stride) == (448, 224, 112)
    assert {name: p.convention for name, p in PROTOCOLS.items()} == {
        "rskt": "present", "clean": "present", "ovrs": "present", "segearth": "union",
    }  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_new_ids_are_classes(protocol):
    for name, view in PROTOCOLS[protocol].sets.items():
        new_id = view.new_id or {old: old for old in range(len(BENCHMARKS[name].class_names))}
        assert sorted(set(new_id.values())) == list(range(len(view.class_names))), name
        assert len(set(view.class_names)) == len(view.class_names)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_miniature_opens_or_says_why_not(protocol, tmp_path):
    for name in NAMES:
        view = PROTOCOLS[protocol].sets.get(name)
        side = view.image_side if view is not None and view.image_side is not None else 40
        root = write_release(name, tmp_path, splits=("train", "val", "test", "all"), count=1, size=(side, side))
        if view is None:
            with pytest.raises(ConfigError, match=f"protocol {protocol}: set is not covered.*got '{name}'"):
                open_protocol(PROTOCOLS[protocol], f"{name}:{root}")
            continue
        dataset = open_protocol(PROTOCOLS[protocol], f"{name}:{root}")
        assert dataset.class_names == view.class_names
        assert dataset.sample_name(0).split("/")[-1].startswith(f"{view.split}_")
        ids = set(np.unique(dataset[0].mask)) - {255}
        assert ids == set(range(len(view.class_names))), name


@pytest.mark.promise("C50")
def test_what_each_id_becomes(tmp_path):
    def pairs(protocol: str, name: str) -> dict[int, int]:
        view = PROTOCOLS[protocol].sets[name]
        base = open_protocol(PROTOCOLS["rskt"], f"{name}:{root}")
        from drseg_core.data.benchmark_dataset import RelabelledDataset

        new = RelabelledDataset(base, view.class_names, view.new_id)
        return {int(a): int(b) for a, b in zip(base[0].mask.ravel(), new[0].mask.ravel(), strict=True)}

    root = tmp_path
    for name in ("loveda", "uavid", "isaid"):
        write_release(name, root, splits=("all",), count=1)
    no_data_ignored = {0: 255, **{old: old - 1 for old in range(1, 8)}, 255: 255}
    assert pairs("clean", "loveda") == pairs("segearth", "loveda") == no_data_ignored
    assert pairs("segearth", "uavid")[5] == pairs("segearth", "uavid")[6] == 3
    names = PROTOCOLS["segearth"].sets["uavid"].class_names
    wanted = ["background", "building", "road", "tree", "vegetation", "car", "car", "human"]
    assert [names[pairs("segearth", "uavid")[old]] for old in range(8)] == wanted
    assert pairs("segearth", "isaid") == {**{old: old + 1 for old in range(15)}, 255: 0}


def test_crops_of_another_size_are_refused(tmp_path):
    root = write_release("potsdam", tmp_path, splits=("val",), size=(256, 256))
    dataset = open_protocol(PROTOCOLS["segearth"], f"potsdam:{root}")
    with pytest.raises(DatasetError, match="expected 512 x 512, got 256 x 256 .see drseg data prepare --patch"):
        dataset[0]


def test_unknown_protocols_and_data():
    with pytest.raises(ConfigError, match="expected one of rskt, clean, ovrs, segearth, got 'mine'"):
        get_protocol("mine")
    with pytest.raises(ConfigError, match="data is no benchmark set.*got 'folder:x'"):
        open_protocol(PROTOCOLS["clean"], "folder:x")


def test_clean_refuses_what_was_trained_on():
    clean = PROTOCOLS["clean"]
    with pytest.raises(ConfigError, match="the model was trained on potsdam:a; expected images it never saw"):
        check_held_out(clean, "potsdam:b", "potsdam:a")
    check_held_out(clean, "potsdam:b", "dlrsd:a")
    check_held_out(clean, "dlrsd:b", "dlrsd:a")
    check_held_out(PROTOCOLS["rskt"], "potsdam:b", "potsdam:a")

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from drseg_core.data.dataset import check_class_names
from drseg_core.data.palette import palette, palette_beside
from drseg_core.data.vocabulary import (
    OTHER,
    OTHER_COLOR,
    Vocabulary,
    as_vocabulary,
    never_learned,
    parse_classes,
    plain_classes,
)
from drseg_core.errors import ConfigError, DatasetError


@pytest.mark.parametrize(
    "text",
    [
        "road, parking lot#808080; roof; open  field",
        "road , parking lot #808080\nroof\n\nopen field\n",
        " ; road,parking lot#808080;roof;open field;",
        "road#808080, parking lot; roof; open field",
        "road #808080 ,parking lot;roof;open field",
    ],
)
def test_classes_as_they_are_typed(text):
    found = parse_classes(text)
    assert found == Vocabulary(
        ("road", "roof", "open field"),
        (("road", "parking lot"), ("roof",), ("open field",)),
        ((128, 128, 128), None, None),
    )
    assert found.text() == "road (or parking lot); roof; open field"
    assert found.table().tolist() == palette_beside(found.colors).tolist() and found.table()[0].tolist() == [128] * 3


@pytest.mark.parametrize("text", ["building, road, tree", "building road tree"])
def test_one_class_of_several_words_is_pointed_out(text):
    assert parse_classes(text).looks_like_several and parse_classes(text).text().endswith("classes have ; between them")
    assert not parse_classes("road").looks_like_several and parse_classes("road").text() == "road"


def test_a_list_has_what_a_text_has():
    text = "road, parking lot#808080; roof; open field"
    found = as_vocabulary(text.split("; "), "predict")
    assert found == as_vocabulary(text, "predict") == parse_classes(text) == as_vocabulary(found, "predict")
    assert as_vocabulary(["roof", "open  field"], "predict") == plain_classes(("roof", "open  field"))


def test_a_learned_name_keeps_its_comma():
    found = as_vocabulary(["car, automobile", "road, street"], "predict", known=["car, automobile"])
    assert found.names == ("car, automobile", "road")
    assert found.synonyms == (("car, automobile",), ("road", "street"))


@pytest.mark.parametrize(
    ("classes", "kind", "said"),
    [
        (["road, street", "street"], ConfigError, "has a word twice; .*, got 'street'"),
        (["road, ", "street"], ConfigError, "has an empty name"),
        (["road", "road"], DatasetError, "predict: class name 'road' repeats"),
        ([], DatasetError, "predict: class names out of range"),
        ("", ConfigError, "is empty"),
    ],
)
def test_classes_that_a_function_refuses(classes, kind, said):
    with pytest.raises(kind, match=said):
        as_vocabulary(classes, "predict")


def test_one_class_of_several_words_is_a_warning_of_the_function(logged):
    as_vocabulary("building, road, tree", "predict")
    assert logged() == ["predict: classes are building (or road, tree) - one class only; classes have ; between them"]


def test_a_file_of_classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeff# mine\nStraße, Weg#ff0000\n\nGebäude; 水体\n", encoding="utf-8")
    found = parse_classes(f"@{path}")
    assert found.names == ("Straße", "Gebäude", "水体") and found.colors[0] == (255, 0, 0)
    assert parse_classes(f"meadow; @{path}").names == ("meadow", "Straße", "Gebäude", "水体")
    for wrong in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(ConfigError, match="names no file of UTF-8 text; expected one class a line"):
            parse_classes(f"@{wrong}")


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        (" ; \n", "is empty"),
        ("a; , b", "empty name; expected text between commas, got ', b'"),
        ("#808080", "empty name"),
        ("a; a, b", "has a word twice; expected every word once, in one class, got 'a'"),
        ("road, lane; path, lane", "has a word twice; expected every word once, in one class, got 'lane'"),
        ("road, path; Path", "has a word twice; .*, got 'Path'"),
        ("road, road", "has a word twice"),
        ("road#808080, lane#101010", "a class of two colours; expected one, got 'road#808080, lane#101010'"),
        ("road#808080 lane", "a colour that cannot be read; .*, got 'road#808080 lane'"),
        ("road#80808, lane", "a colour that cannot be read; .*, got 'road#80808, lane'"),
        ("#808080, lane", "empty name"),
        ("road#80808", "a colour that cannot be read; expected for example #808080, got 'road#80808'"),
        ("road#gray", "a colour that cannot be read"),
        ("road; ro\x1b[2Jof", r"a control character; expected text, got 'ro\\x1b\[2Jof'"),
        ("road, la\x00ne", "a control character"),
        ("road, la\uffffne", r"a control character; expected text, got 'road, la\\uffffne'"),
    ],
)
def test_refusals(text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        parse_classes(text)
    assert "\n" not in str(caught.value)


def test_a_class_for_the_rest():
    found = parse_classes("a; b#010203").with_other()
    assert found.names == ("a", "b", OTHER) and found.table()[2].tolist() == [128, 128, 128]
    own = parse_classes("other; a")
    assert own.with_other() is own
    assert plain_classes(("x, y",)).synonyms == (("x, y",),)


def test_maps_without_given_colours_have_those_of_the_palette():
    names = [f"class {number}" for number in range(40)]
    plain = plain_classes(names)
    assert plain.table().tolist() == palette(40).tolist()
    for last in (OTHER, "background"):
        added = plain_classes([*names, last])._replace(colors=(*plain.colors, OTHER_COLOR))
        assert added.table().tolist() == [*palette(40).tolist(), [128] * 3]
    assert plain.with_other().table().tolist() == added.table().tolist()


def test_one_colour_of_two_classes_is_a_warning(logged):
    assert len(parse_classes("a#ff0000; b, c#FF0000; d#00ff00; e; f").names) == 5
    assert logged() == ["--classes: 'a' and 'b' have one colour, #ff0000, so a map shows them alike"]


def test_names_that_were_never_learned():
    learned = ("Bare soil", "roof, house", "pond")
    assert never_learned((("bare soil",), ("house",), ("lake", "pond")), learned) is None
    said = never_learned((("pond",), ("glacier", "ice"), ("moon",)), learned)
    assert said == (
        "predict: the run never learned 'glacier', 'moon', which may come out badly; it learned "
        "Bare soil, roof, house, pond"
    )
    many = never_learned((("moon",),), [f"c{i}" for i in range(20)])
    assert many is not None and many.endswith("c7 and 12 more")


def test_how_many_names_there_are_and_a_text_is_no_list_of_them():
    with pytest.raises(DatasetError, match="Predictor: class names are no list; .* got the text 'road'"):
        check_class_names("road", "Predictor")
    # as many as a mask has numbers for, beside that of no class
    assert len(check_class_names([f"class {number}" for number in range(255)], "Predictor")) == 255

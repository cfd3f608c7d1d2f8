# SPDX-License-Identifier: Apache-2.0
"""Legends in any script: a font that has the characters, or a word about those that none has."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from drseg_core.data import fonts
from drseg_core.data.fonts import Text
from drseg_core.data.palette import with_legend


def drawn(text: str) -> np.ndarray:
    picture = Image.new("RGB", (200, 30), "white")
    Text([text]).draw(ImageDraw.Draw(picture), (2, 4), text)
    return np.array(picture)


@pytest.mark.parametrize("text", ["Straße", "Gebäude", "Łąka", "Дорога", "Δρόμος", "čížek"])
def test_latin_greek_and_cyrillic_are_drawn(text, logged):
    pytest.importorskip("matplotlib")
    picture = drawn(text)
    assert logged() == [] and (picture < 128).any()
    # every letter is its own picture, not the same box
    single = {bytes(drawn(letter)) for letter in set(text)}
    assert len(single) == len(set(text))


def test_what_no_font_has_is_named_and_never_a_box(monkeypatch, caplog, logged):
    monkeypatch.setattr(fonts, "_system_font", lambda character: None)
    with caplog.at_level(logging.WARNING, "drseg_core"):
        picture = drawn("水体 a")
    (line,) = logged()
    assert line.startswith("no font here has 体 水; ? is drawn instead")
    assert np.array_equal(picture, drawn("?? a"))


def test_the_font_of_the_system_is_used(monkeypatch, logged):
    """A font that has a character that the first one lacks: here the first one is made to lack it."""
    pytest.importorskip("matplotlib")
    whole = fonts._fonts(14)
    monkeypatch.setattr(fonts, "_fonts", lambda size: whole[-1:])
    asked = []

    def system(character: str) -> str:
        asked.append(character)
        return whole[0].path

    monkeypatch.setattr(fonts, "_system_font", system)
    assert not fonts._has(whole[-1], "Ж")
    assert (drawn("aЖ") < 128).any() and asked == ["Ж"] and logged() == []


def test_fontconfig_is_asked_once_for_a_character(monkeypatch):
    calls = []

    class Done:
        stdout = "/somewhere/font.ttf\n"

    monkeypatch.setattr(fonts.shutil, "which", lambda name: name)
    monkeypatch.setattr(fonts.subprocess, "run", lambda words, **options: calls.append(words) or Done())
    fonts._system_font.cache_clear()
    assert fonts._system_font("水") == fonts._system_font("水") == "/somewhere/font.ttf"
    assert calls == [["fc-match", "--format=%{file}", "sans:charset=6c34"]]
    fonts._system_font.cache_clear()


@pytest.mark.parametrize("installed", [True, False])
def test_a_font_that_is_missing(monkeypatch, caplog, logged, installed):
    """Neither a font of matplotlib's that can be opened nor fontconfig: Pillow's own has Latin letters."""

    def damaged(file, size):
        raise OSError("unknown file format")

    own = ImageFont.load_default(size=14)
    spec = SimpleNamespace(origin="/nowhere/matplotlib/__init__.py") if installed else None
    monkeypatch.setattr(fonts.importlib.util, "find_spec", lambda name: spec if name == "matplotlib" else True)
    monkeypatch.setattr(ImageFont, "truetype", damaged)
    # Pillow opens its own through the same door
    monkeypatch.setattr(ImageFont, "load_default", lambda size: own)
    monkeypatch.setattr(fonts.shutil, "which", lambda name: None)
    fonts._fonts.cache_clear()
    fonts._system_font.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "drseg_core"):
            legend = with_legend(np.zeros((60, 40, 3), np.uint8), ["roof", "Дорога"], [0, 1])
    finally:
        fonts._fonts.cache_clear()
        fonts._system_font.cache_clear()
    assert (legend[:, 62:] < 128).any()
    assert logged()[0].startswith("no font here has Д а г о р; ? is drawn instead")


def test_a_legend(logged):
    pytest.importorskip("matplotlib")
    picture = np.zeros((60, 40, 3), np.uint8)
    found = with_legend(picture, ["Straße", "Gebäude"], [0, 1])
    assert found.shape[1] > 100 and logged() == []

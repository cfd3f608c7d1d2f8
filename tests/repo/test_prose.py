# SPDX-License-Identifier: Apache-2.0
"""README and pages are written in short sentences."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST, MEDIAN = 35, 18


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose: no code, tables, headings or pictures; an item of a list ends one."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^( *)```.*?^\1```", "\n", text, flags=re.MULTILINE | re.DOTALL)
    lines = ["" if re.match(r"\s*(\||#|!\[|:::|    (?!\S*[*-] ))", line) else line for line in text.splitlines()]
    lines = [re.sub(r"^\s*([*-]|\d+\.) ", "\n", line) for line in lines]
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    # what stands in backticks is one word, which may begin a sentence
    text = re.sub(r"`[^`]*`", "Code", text)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        found += re.split(r"(?<=[.!?:])[*_)\"]*\s+(?=[^a-z])", " ".join(paragraph.split()))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def words(sentence: str) -> int:
    return len(re.findall(r"[\w'-]*\w[\w'%./-]*", sentence))


def test_what_a_sentence_is():
    text = "# A title\n\nOne, two. Three `a b. c` [four](http://five.six)\n\n* five: six\n* seven\n\n"
    text += "| a | b. |\n\n```\nx. y\n```\n"
    assert sentences(text) == ["One, two.", "Three Code four", "five: six", "seven"]
    assert words("Three Code four, 0.5 % and well-known") == 6


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_sentence_is_long(path):
    found = sentences(path.read_text(encoding="utf-8"))
    long = [f"{words(sentence)}: {sentence}" for sentence in found if words(sentence) > LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_most_sentences_are_short(path):
    assert statistics.median(map(words, sentences(path.read_text(encoding="utf-8")))) < MEDIAN

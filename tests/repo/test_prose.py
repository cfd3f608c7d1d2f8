# SPDX-License-Identifier: Apache-2.0
"""README, pages and the docstrings of public names are written in short sentences."""

from __future__ import annotations

import inspect
import re
import statistics
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from tests.repo.test_docstrings import PUBLIC

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST, MEDIAN = 35, 18
LONGEST_OF_DOCSTRINGS = 40


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


def cells(text: str) -> list[str]:
    """The sentences of a page's tables."""
    text = re.sub(r"^( *)```.*?^\1```", "\n", text, flags=re.MULTILINE | re.DOTALL)
    rows = [line for line in text.splitlines() if line.lstrip().startswith("|")]
    return [sentence for row in rows for cell in re.split(r"(?<!\\)\|", row) for sentence in sentences(cell.strip())]


def words(sentence: str) -> int:
    return len(re.findall(r"[\w'-]*\w[\w'%./-]*", sentence))


def prose(docstring: str) -> str:
    """A docstring as a page: no examples, tables or headings; an argument, and a field of a table, ends a sentence."""
    lines: list[str] = []
    table, depth = False, 0
    for line in docstring.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip()) if text else depth
        table = text != "" and (table or text.startswith("==="))
        if table or re.match(r">>>|\.\.\.( |$)|[A-Z]\w+:$", text):
            text = ""
        elif indent < depth or re.match(r" {4}(?! )[*\w, ]+: ", line):
            lines.append("")
        lines.append(text)
        depth = indent
    return "\n".join(lines).replace("``", "`")


def test_what_the_prose_of_a_docstring_is():
    text = "A thing.\n\nArgs:\n    one: its\n        ``a b``. More.\n    two, three: those\n\nReturns:\n    It.\n\n"
    text += "=== ===\na   b\n=== ===\n\nExamples:\n    >>> for a in b:\n    ...     a.b\n"
    assert sentences(prose(text)) == ["A thing.", "one: its Code.", "More.", "two, three: those", "It."]


def long_sentences(value: Any) -> list[str]:
    """Those of a function, or of a class and its public methods."""
    kinds = (FunctionType, property, classmethod, staticmethod)
    methods = [item for key, item in vars(value).items() if key[0] != "_" and isinstance(item, kinds)]
    docstrings = [
        inspect.cleandoc(item.__doc__ or "") for item in (value, *(methods if inspect.isclass(value) else []))
    ]
    found = [sentence for docstring in docstrings for sentence in sentences(prose(docstring))]
    return [f"{words(sentence)}: {sentence}" for sentence in found if words(sentence) > LONGEST_OF_DOCSTRINGS]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_no_sentence_of_a_public_docstring_is_long(name):
    found = long_sentences(PUBLIC[name])
    assert not found, "\n".join(found)


def test_a_long_sentence_of_a_method_is_found():
    class Planted:
        """A thing."""

        def method(self):
            pass

    assert not long_sentences(Planted)
    Planted.method.__doc__ = "So " + "very " * LONGEST_OF_DOCSTRINGS + "long."
    assert len(long_sentences(Planted)) == 1


def test_what_a_sentence_is():
    text = "# A title\n\nOne, two. Three `a b. c` [four](http://five.six)\n\n* five: six\n* seven\n\n"
    text += "| a | b. |\n\n```\nx. y\n```\n"
    assert sentences(text) == ["One, two.", "Three Code four", "five: six", "seven"]
    assert cells(text) == ["a", "b."]
    assert words("Three Code four, 0.5 % and well-known") == 6


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_sentence_is_long(path):
    text = path.read_text(encoding="utf-8")
    found = [*sentences(text), *cells(text)]
    long = [f"{words(sentence)}: {sentence}" for sentence in found if words(sentence) > LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_most_sentences_are_short(path):
    assert statistics.median(map(words, sentences(path.read_text(encoding="utf-8")))) < MEDIAN

# SPDX-License-Identifier: Apache-2.0
"""What the tags of a map say, in a file that may be from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drseg_core.files import is_text, parse_json


def names_in(tags: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the classes in id order; none where the tag is not what a map has."""
    try:
        return _list_of_text(parse_json(tags["class_names"]))
    except (ValueError, KeyError):
        return ()


def words_in(tags: Mapping[str, str], classes: int) -> tuple[tuple[str, ...], ...] | None:
    """All words of each class but that of a threshold; None where the tags do not say them, as in earlier versions."""
    try:
        # maps from words have them among their options
        found = parse_json(tags["words"]) if "words" in tags else parse_json(tags["zero_shot"])["words"]
    except (ValueError, KeyError, TypeError):
        return None
    words = tuple(map(_list_of_text, found)) if isinstance(found, list) else ()
    return words if all(words) and len(words) in (classes, classes - 1) else None


def _list_of_text(value: Any) -> tuple[str, ...]:
    """The texts of a list; none if one is empty, or is no text that UTF-8 can hold."""
    if isinstance(value, list) and all(isinstance(one, str) and one.strip() and is_text(one) for one in value):
        return tuple(value)
    return ()

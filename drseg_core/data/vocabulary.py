# SPDX-License-Identifier: Apache-2.0
"""The classes of a map as they are typed: names, synonyms and colours."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import check_class_names, has_control
from drseg_core.data.palette import palette, palette_beside
from drseg_core.errors import ConfigError

__all__ = ["Vocabulary", "as_vocabulary", "parse_classes"]

_log = logging.getLogger(__name__)

Color = tuple[int, int, int]
OTHER, OTHER_COLOR = "other", (128, 128, 128)
ADDED = (OTHER, "background")
"""Names of classes that a map may have besides those that are typed."""
_WORD = re.compile(r"([^#]*)(?:#([0-9a-fA-F]{6})\s*)?")
_SHOWN = 8


ONE_CLASS = "one class only; classes have ; between them"


class Vocabulary(NamedTuple):
    """Class ``names`` in id order, the ``synonyms`` of each (its name first), and ``colors``, None where not given.

    Examples:
        >>> from drseg_core.data.vocabulary import parse_classes
        >>> parse_classes("road, parking lot #808080; roof").synonyms
        (('road', 'parking lot'), ('roof',))
    """

    names: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]
    colors: tuple[Color | None, ...]

    def table(self) -> NDArray[np.uint8]:
        """(T, 3) RGB: what is given, else what :func:`drseg_core.data.palette.palette_beside` has for the id."""
        # the grey of a class that is added is no choice: beside it, maps without colours stay as they are
        grey = [name in ADDED and color == OTHER_COLOR for name, color in zip(self.names, self.colors, strict=True)]
        if any(color is not None and not added for color, added in zip(self.colors, grey, strict=True)):
            return palette_beside(self.colors)
        table = palette(len(self.names))
        table[grey] = OTHER_COLOR
        return table

    def text(self) -> str:
        """How the classes were understood."""
        shown = [words[0] + (f" (or {', '.join(words[1:])})" if words[1:] else "") for words in self.synonyms]
        return "; ".join(shown) + (f" - {ONE_CLASS}" if self.looks_like_several else "")

    @property
    def looks_like_several(self) -> bool:
        """Whether it is one class of several words: commas, or spaces, are a natural way to write several classes."""
        return len(self.synonyms) == 1 and len(" ".join(self.synonyms[0]).split()) > 1

    def with_other(self) -> Vocabulary:
        """The same with a class for pixels that are none of them; the one of that name where there is one."""
        if OTHER in self.names:
            return self
        return Vocabulary((*self.names, OTHER), (*self.synonyms, (OTHER,)), (*self.colors, OTHER_COLOR))


def plain_classes(names: Sequence[str]) -> Vocabulary:
    """Names as they are, such as those of a training: no synonyms, no colours."""
    return Vocabulary(tuple(names), tuple((name,) for name in names), (None,) * len(names))


def parse_classes(text: str) -> Vocabulary:
    """Classes from ``"road, parking lot#808080; roof"``, with new lines in place of ``;``, or from ``"@classes.txt"``.

    Commas inside one item separate synonyms; ``#rrggbb`` behind one of them is the colour of the class. In a file,
    lines that begin with ``#`` are left out.

    Raises:
        ConfigError: no class, an empty name or synonym, a word twice, two colours, a file that cannot be read.

    Examples:
        >>> from drseg_core.data.vocabulary import parse_classes
        >>> classes = parse_classes("building#ff0000; field")
        >>> classes.names, classes.colors
        (('building', 'field'), ((255, 0, 0), None))
    """
    found = [_item(item) for item in _items(text)]
    if not found:
        raise ConfigError('--classes is empty; expected names such as "building; field; pavement"')
    return _joined(found)


def as_vocabulary(classes: Vocabulary | str | Sequence[str], origin: str, known: Sequence[str] = ()) -> Vocabulary:
    """Classes as a function takes them: a text as in :func:`parse_classes`, or a list of such classes.

    Args:
        classes: in a list each is one class, as between two ``;`` of a text: commas separate synonyms.
        origin: function for the message.
        known: names that are taken as they are, with their commas, such as those of a training.

    Raises:
        ConfigError: see :func:`parse_classes`.
        DatasetError: see :func:`drseg_core.data.dataset.check_class_names`.

    Examples:
        >>> from drseg_core.data.vocabulary import as_vocabulary
        >>> as_vocabulary(["building", "road, street"], "predict").synonyms
        (('building',), ('road', 'street'))
        >>> as_vocabulary(["car, automobile"], "predict", known=["car, automobile"]).names
        ('car, automobile',)
    """
    if isinstance(classes, Vocabulary):
        return classes
    if isinstance(classes, str):
        found = parse_classes(classes)
        if found.looks_like_several:
            _log.warning("%s: classes are %s", origin, found.text())
        return found
    names = check_class_names(classes, origin)
    if all(name in known or not {",", "#"} & set(name) for name in names):
        return plain_classes(names)
    return _joined([((name,), None) if name in known else _item(name) for name in names])


def _item(item: str) -> tuple[tuple[str, ...], Color | None]:
    """The words and the colour of one class."""
    found = [_WORD.fullmatch(word) for word in item.split(",")]
    parts = [match.groups() for match in found if match is not None]
    if len(parts) < len(found):
        raise ConfigError(
            f"--classes has a colour that cannot be read; expected for example #808080, got {item.strip()!r}"
        )
    words = tuple(" ".join(word.split()) for word, _ in parts)
    if any(map(has_control, words)):
        raise ConfigError(f"--classes has a control character; expected text, got {ascii(item.strip())}")
    if "" in words:
        raise ConfigError(f"--classes has an empty name; expected text between commas, got {item.strip()!r}")
    codes = [code for _, code in parts if code is not None]
    if len(codes) > 1:
        raise ConfigError(f"--classes has a class of two colours; expected one, got {item.strip()!r}")
    return words, _color(codes[0]) if codes else None


def _joined(found: Sequence[tuple[tuple[str, ...], Color | None]]) -> Vocabulary:
    seen: set[str] = set()
    for word in (word for words, _ in found for word in words):
        # text encoders see no capitals
        if word.casefold() in seen:
            raise ConfigError(f"--classes has a word twice; expected every word once, in one class, got {word!r}")
        seen.add(word.casefold())
    named: dict[Color, str] = {}
    for words, color in found:
        if color is not None and named.setdefault(color, words[0]) != words[0]:
            code = "#{:02x}{:02x}{:02x}".format(*color)
            _log.warning(
                "--classes: %r and %r have one colour, %s, so a map shows them alike", named[color], words[0], code
            )
    return Vocabulary(tuple(words[0] for words, _ in found), *map(tuple, zip(*found, strict=True)))


def _color(code: str) -> Color:
    return int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)


def class_files(text: str) -> list[Path]:
    """The files that a text for :func:`parse_classes` names."""
    return [Path(item.strip()[1:]) for item in re.split(r"[;\n]", text) if item.strip().startswith("@")]


def _items(text: str) -> Iterator[str]:
    for item in re.split(r"[;\n]", text):
        if not item.strip():
            continue
        if not item.strip().startswith("@"):
            yield item
            continue
        (path,) = class_files(item)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--classes names no file of UTF-8 text; expected one class a line: {reason}") from None
        for line in lines:
            if not line.strip().startswith("#"):
                yield from (part for part in line.split(";") if part.strip())


def never_learned(synonyms: Sequence[Sequence[str]], learned: Sequence[str]) -> str | None:
    """What to say of classes none of whose words were among those of the training."""
    known = {word.strip().casefold() for name in learned for word in (name, *name.split(","))}
    new = [words[0] for words in synonyms if not any(word.casefold() in known for word in words)]
    if not new:
        return None
    more = f" and {len(learned) - _SHOWN} more" if len(learned) > _SHOWN else ""
    return (
        f"predict: the run never learned {', '.join(map(repr, new))}, which may come out badly; it learned "
        f"{', '.join(learned[:_SHOWN])}{more}"
    )

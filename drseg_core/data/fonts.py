# SPDX-License-Identifier: Apache-2.0
"""Text of any script in pictures: each character in the first font that has it.

matplotlib's DejaVu has Latin, Greek and Cyrillic; for the rest fontconfig (``fc-match``) names a font of the system.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from drseg_core.extras import require

UNKNOWN = "?"
"""What stands for a character that no font here has."""

# no character, so every font draws its box for it
_NOTHING = "\uffff"
_log = logging.getLogger(__name__)


class Text:
    """Measures and draws lines of text; a character that no font has is named in one warning and drawn as ``?``.

    Args:
        texts: all that will be drawn.
        size: of the letters in pixels.
    """

    def __init__(self, texts: Sequence[str], size: int = 14) -> None:
        require("Text", "pillow")
        self.size = size
        self._font: dict[str, Any] = {}
        missing = []
        for character in sorted({c for text in texts for c in text}):
            found = _font_with(character, size)
            if found is None:
                missing.append(character)
            self._font[character] = found
        if missing:
            _log.warning(
                "no font here has %s; ? is drawn instead (a package such as fonts-noto-cjk has many scripts)",
                " ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else ""),
            )

    def width(self, text: str) -> float:
        """Of a line in pixels."""
        return sum(font.getlength(part) for font, part in self._parts(text))

    def draw(self, draw: Any, place: tuple[float, float], text: str) -> None:
        """Put a line there, in black."""
        x, y = place
        for font, part in self._parts(text):
            draw.text((x, y), part, fill="black", font=font)
            x += font.getlength(part)

    def _parts(self, text: str) -> Iterator[tuple[Any, str]]:
        shown = [(self._font[c], c) if self._font[c] is not None else (_fonts(self.size)[0], UNKNOWN) for c in text]
        for font, some in groupby(shown, key=lambda pair: pair[0]):
            yield font, "".join(character for _, character in some)


def _font_with(character: str, size: int) -> Any:
    for font in _fonts(size):
        if _has(font, character):
            return font
    file = _system_font(character)
    if file is None:
        return None
    from PIL import ImageFont

    try:
        font = ImageFont.truetype(file, size)
    except OSError:
        return None
    return font if _has(font, character) else None


def _has(font: Any, character: str) -> bool:
    """Whether a font has a character; its box for those it lacks is like that of what is no character."""
    if character.isspace():
        return True
    own, box = font.getmask(character), font.getmask(_NOTHING)
    return (own.size, bytes(own)) != (box.size, bytes(box))


@functools.cache
def _fonts(size: int) -> tuple[Any, ...]:
    """matplotlib's font, where it is, and Pillow's."""
    from PIL import ImageFont

    found: list[Any] = []
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin:
        file = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        # absent in some packages; a damaged one is as good as none
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(file, size))
    return (*found, ImageFont.load_default(size=size))


@functools.cache
def _system_font(character: str) -> str | None:
    """The file of a font that fontconfig names for a character; None where there is none."""
    program = shutil.which("fc-match")
    if program is None:
        return None
    try:
        words = [program, "--format=%{file}", f"sans:charset={ord(character):x}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

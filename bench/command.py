# SPDX-License-Identifier: Apache-2.0
"""The form of every command's options, and of what they take."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from pathlib import Path


def command_parser(name: str, text: str | None, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser that says ``text`` as it stands. An abbreviation is refused: with one option more it may be two's."""
    return argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        usage=usage,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no whole number; expected one >= 1") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected a number >= 1")
    return value


def pixels(text: str) -> tuple[int, int]:
    """Width and height of ``WxH``."""
    found = re.fullmatch("([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is no size; expected WxH in pixels, such as 1536x1024")
    return int(found[1]), int(found[2])


def rows_file(text: str) -> Path:
    """The file of ``--out``, to which rows can be added: what cannot be written is refused before anything is timed."""
    path = Path(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"is a folder; expected a file to add rows to, got {path}")
    if os.path.exists(path) and not os.path.isfile(path):
        # whoever reads a pipe would take a try for its end
        return path
    # only a try tells; it leaves nothing behind
    made = [one for one in (path, *path.parents) if not os.path.exists(one)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot be written: {error.strerror}; expected a file to add rows to, got {path}"
        ) from None
    finally:
        for one in made:
            with contextlib.suppress(OSError):
                one.unlink(missing_ok=True) if one == path else one.rmdir()
    return path

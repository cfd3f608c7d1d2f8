# SPDX-License-Identifier: Apache-2.0
"""The form of every command's options."""

from __future__ import annotations

import argparse


def command_parser(name: str, text: str | None, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser that says ``text`` as it stands. An abbreviation is refused: with one option more it may be two's."""
    return argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        usage=usage,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

# SPDX-License-Identifier: Apache-2.0
"""The parser of ``drseg`` itself and of the commands that need the standard library alone."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from drseg_core.cli.failures import UsageError


def refuse(parser: argparse.ArgumentParser, text: str) -> NoReturn:
    """One line about the command line, then the usage."""
    usage = " ".join(parser.format_usage().split())
    raise UsageError(f"{parser.prog}: error: {' '.join(text.split())}\n{usage}\nSee {parser.prog} --help.")


class PlainParser(argparse.ArgumentParser):
    """argparse's, whose errors are one line, then the usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        refuse(self, message)

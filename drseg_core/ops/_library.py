# SPDX-License-Identifier: Apache-2.0
"""Finds and loads a library of csrc, and says why it cannot. ``DRSEG_NATIVE=0`` leaves all of them out by choice."""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its own section table: loading it would end the process with a bus error."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False
    (offset,) = struct.unpack_from("<Q", header, 40)
    entry, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < offset + entry * count


@dataclass(frozen=True)
class Library:
    """One shared library, on PyTorch's stable ABI.

    Args:
        namespace: of its operators in ``torch.ops``; its file is called by it.
        variable: the environment variable that names another file.
    """

    namespace: str
    variable: str

    @property
    def _words(self) -> str:
        return self.namespace.removeprefix("drseg_").replace("_cuda", " CUDA") + " library"

    def path(self) -> Path:
        """Where it is expected: the build puts it into ``drseg_core/_lib``."""
        named = os.environ.get(self.variable)
        return Path(named) if named else Path(__file__).parents[1] / "_lib" / f"lib{self.namespace}{_SUFFIX}"

    def load(self) -> str | None:
        """Load it; None, or the reason why it is not there."""
        path = self.path()
        if os.environ.get("DRSEG_NATIVE") == "0":
            return f"{self._words} left out by DRSEG_NATIVE=0"
        if not path.is_file():
            return f"{self._words} not built: {path.name} is not in {path.parent.name}/"
        try:
            if is_cut_short(path):
                raise OSError(f"{path.name} is cut short")
            torch.ops.load_library(str(path))
        except OSError as error:
            return f"{self._words} does not load: {error.__cause__ or error}"
        return None

    def lacks(self, *symbols: str) -> str | None:
        """What is wrong with the loaded library where an operator is missing: it is an older build."""
        missing = [symbol for symbol in symbols if not hasattr(getattr(torch.ops, self.namespace), symbol)]
        if not missing:
            return None
        return f"{self._words} is older than this package: it lacks {', '.join(missing)}; build it again"

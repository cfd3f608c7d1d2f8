# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of launch sizes that ``drseg_kernels._launch`` reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from drseg_kernels import _launch

from drseg_core.files import write_text_atomic

# what an entry was timed for
_KEY = ("dtype", "channels", "nodes", "k", "device")


def _same(row: dict[str, Any], key: dict[str, Any], but: str = "") -> bool:
    return all(row.get(name) == key.get(name) for name in _KEY if name != but)


def is_timed(path: Path, key: dict[str, Any]) -> bool:
    """Whether a table has a timed entry for this key, of any device."""
    if not path.exists():
        return False
    rows = json.loads(path.read_text(encoding="utf-8"))["configurations"]
    return any("predicted_us" not in row and _same(row, key, "device") for row in rows)


def write_entry(path: Path, key: dict[str, Any], chosen: Any, **notes: Any) -> None:
    """Put a configuration into a table, in the place of one with the same key; smaller sizes come first.

    What was only predicted goes where somebody has timed the same, on whichever device.

    Args:
        path: of the table. key: what it was timed for, by the names of the entries of ``drseg_kernels._launch``.
        chosen: the configuration. notes: what the entry says besides.

    Raises:
        ValueError: the table that is there cannot be read.
    """
    kind: Any = type(chosen)
    old: list[dict[str, Any]] = []
    if path.exists():
        _launch.read_table(path, kind)
        old = json.loads(path.read_text(encoding="utf-8"))["configurations"]
    given = {name: key[name] for name in _KEY if key.get(name) is not None}
    rows = [row for row in old if not _same(row, key, "device" if "predicted_us" in row else "")]
    rows.append({**given, "configuration": dataclasses.asdict(chosen), **notes})
    # what was timed comes first, and counts first
    rows.sort(
        key=lambda row: ("predicted_us" in row, *(row.get(name) or ("" if name == "device" else 0) for name in _KEY))
    )
    write_text_atomic(path, json.dumps({"configurations": rows}, indent=1) + "\n")
    # what was written counts from here on
    _launch.forget_tables()

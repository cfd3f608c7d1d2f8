# SPDX-License-Identifier: Apache-2.0
"""``manifest.sha256``: lines of ``sha256sum`` with paths relative to the manifest's folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from drseg_core.errors import DatasetError
from drseg_core.files import write_text_atomic

MANIFEST = "manifest.sha256"


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces.

    Raises:
        DatasetError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DatasetError(f"file_sha256: {printable(path)} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def read_manifest(path: Path) -> dict[str, str]:
    """The hashes (hex) by normalised relative path.

    Raises:
        DatasetError: not UTF-8, or not readable.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"read_manifest: {path} cannot be read as UTF-8 text: {error}") from None
    # "<hex>  path", with "*" before the path where sha256sum read in binary mode
    return {os.path.normpath(line[66:]): line[:64].lower() for line in lines if len(line) > 66}


def write_manifest(folder: Path, files: Iterable[Path]) -> Path:
    """Hash ``files`` and write their manifest into ``folder``, whole or not at all."""
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in sorted(files)]
    write_text_atomic(folder / MANIFEST, "".join(lines))
    return folder / MANIFEST


def manifest_problem(path: Path, folder: Path, expected: dict[str, str]) -> str | None:
    """What is wrong with a file of ``folder`` by that folder's manifest; None when nothing is.

    Raises:
        DatasetError: the file cannot be read.
    """
    name = os.path.relpath(path, folder)
    if name not in expected:
        return f"{printable(path)} is not in {MANIFEST}; expected every file"
    found = file_sha256(path)
    if found == expected[name]:
        return None
    return (
        f"{printable(path)} has changed; expected SHA-256 {expected[name][:12]}... of {MANIFEST}, got {found[:12]}..."
    )


def printable(path: Path) -> str:
    """A name fit for one line of output: no line breaks, no undecodable bytes."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else text.encode("unicode_escape").decode()

# SPDX-License-Identifier: Apache-2.0
"""The finished blocks of a map, in a folder beside it, from which the next call goes on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drseg_core.errors import ConfigError
from drseg_core.files import atomic_path, make_folder, own_prefix, parse_json, write_text_atomic

_log = logging.getLogger(__name__)

__all__ = ["BlockStore", "share", "work_folder"]

_DIGEST = 32
_KEY, _DONE, _COMPLETE, _LOCK = "key.json", "done.json", "complete.json", "lock"
_SUFFIX = ".block"


def work_folder(out: str | Path) -> Path:
    """Where the finished blocks of a map are kept until it is complete.

    Examples:
        >>> from drseg_core.scenes.block_store import work_folder
        >>> work_folder("maps/town.tif").name
        'town.tif.work'
    """
    path = Path(out)
    return path.with_name(f"{path.name}.work")


def share(numbers: Sequence[int], part: int, parts: int) -> Sequence[int]:
    """One part of some: neighbours stay together, as they share tiles.

    Examples:
        >>> from drseg_core.scenes.block_store import share
        >>> [list(share(range(7), part, 3)) for part in range(3)]
        [[0, 1], [2, 3], [4, 5, 6]]
    """
    return numbers[len(numbers) * part // parts : len(numbers) * (part + 1) // parts]


class BlockStore:
    """Named groups of arrays in a folder.

    Each group is written as a whole or not at all. It carries a checksum over its bytes, its name and the key of the
    folder. So a group that is damaged or of another map is never taken.

    Args:
        folder: made when the first group is saved.
        facts: all that the blocks depend on: model, options, scene. Its hash is the key.

    Examples:
        >>> import numpy as np
        >>> from drseg_core.scenes.block_store import BlockStore
        >>> store = BlockStore("map.tif.work", {"model": "5f3a", "tile_size": 384})
        >>> store.open()
        >>> store.save("block-0", {"label": np.zeros((2, 3), np.uint8)})
        >>> store.load("block-0")["label"].shape, store.load("block-1")
        ((2, 3), None)
        >>> BlockStore("map.tif.work", {"model": "5f3a", "tile_size": 256}).load("block-0") is None
        True
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str, indent=1)
        self._key = hashlib.sha256(self._text.encode()).digest()
        self._held: int | None = None
        self._mode = fcntl.LOCK_EX

    @classmethod
    def at(cls, folder: str | Path) -> BlockStore:
        """The store in a folder, whatever its facts, for reading."""
        store = cls(folder, {})
        with contextlib.suppress(FileNotFoundError):
            store._text = (store.folder / _KEY).read_text(encoding="utf-8")
            store._key = hashlib.sha256(store._text.encode()).digest()
        return store

    def open(self, *, alone: bool = True) -> None:
        """Begin, or go on where these facts left off.

        Args:
            alone: remove blocks of other facts. Otherwise they are refused, because another process may use them.

        Raises:
            ConfigError: the folder is of another map.
        """
        path = self.folder / _KEY
        if self.folder.exists() and not self._is_own():
            if not alone:
                raise ConfigError(
                    f"predict: {self.folder} is of another model, scene, device or other options; expected {path} as "
                    "this call has it, or no such folder"
                )
            _log.warning(
                "%s belongs to another model, scene, device or set of options; it is started again", self.folder
            )
            self.remove()
            if self._held is not None:
                self._unlock()
                self._lock(self._mode)
        if not path.exists():
            write_text_atomic(path, self._text)

    @contextlib.contextmanager
    def claim(self, *, alone: bool) -> Iterator[None]:
        """Lock the map against other calls: against all, or with ``alone=False`` against those with ``alone=True``.

        The lock ends with the process at the latest. A file system without locks keeps nobody away.

        Raises:
            ConfigError: another call works at the map.
        """
        mode = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        self._lock(mode)
        try:
            yield
        finally:
            self._unlock()

    def _lock(self, mode: int) -> None:
        path = self.folder / _LOCK
        while self._held is None:
            make_folder(self.folder)
            # another call may remove the folder between any two of these lines: then once more
            with contextlib.suppress(FileNotFoundError):
                self._mode, self._held = mode, os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.flock(self._held, mode | fcntl.LOCK_NB)
                    stays = path.stat().st_ino == os.fstat(self._held).st_ino
                except BlockingIOError:
                    self._unlock()
                    out = self.folder.with_suffix("")
                    raise ConfigError(
                        f"predict: {out} is being written by another call; expected one at a time"
                    ) from None
                except FileNotFoundError:
                    stays = False
                except OSError:
                    stays = True
                if not stays:
                    self._unlock()

    def _unlock(self) -> None:
        if self._held is not None:
            os.close(self._held)
        self._held = None

    def _is_own(self) -> bool:
        try:
            return (self.folder / _KEY).read_text(encoding="utf-8") == self._text
        except (OSError, UnicodeDecodeError):
            # begun, and killed before it had a key: then nothing else is in it
            return not self._groups()

    def _groups(self) -> list[Path]:
        """Files of all groups; none where another call removes the folder meanwhile, which ``Path.glob`` may raise."""
        try:
            return [path for path in self.folder.iterdir() if path.suffix == _SUFFIX]
        except FileNotFoundError:
            return []

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def has(self, name: str) -> bool:
        """Whether there is a group of this name; :meth:`load` says whether it is sound."""
        return self._path(name).exists()

    def _checksum(self, name: str, content: memoryview) -> bytes:
        digest = hashlib.sha256(self._key + name.encode())
        digest.update(content)
        return digest.digest()

    def remove_empty(self) -> None:
        """Remove the folder if nothing in it is finished."""
        if not (self.folder / _DONE).exists() and not self._groups():
            self.remove()

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep a group of arrays, durably."""
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        view = content.getbuffer()
        with atomic_path(self._path(name)) as temporary, open(temporary, "wb") as file:
            file.write(self._checksum(name, view))
            file.write(view)

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """A group of arrays; None if it is missing, or with a warning if it is damaged."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if self._checksum(name, memoryview(content)[_DIGEST:]) != content[:_DIGEST]:
            _log.warning("%s is damaged or belongs to another map; it is made again", path)
            return None
        with np.load(io.BytesIO(content[_DIGEST:]), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    def finishing(self, outputs: Mapping[Path, Path], blended: Sequence[str] = ()) -> None:
        """Note the complete outputs, before they are put in place.

        Args:
            outputs: each output with the complete file that becomes it.
            blended: the neighbours with a share in them.
        """
        # a call that was killed as it put its outputs in place leaves some, which another one replaces
        former = {out.name: _mark(out) for out in outputs if self.placed(out)}
        marks = {out.name: _mark(now) for out, now in outputs.items()}
        note = {"outputs": marks, "former": former, "blended": sorted(blended)}
        write_text_atomic(self.folder / _DONE, json.dumps(note))

    def finished(self, outputs: Sequence[Path], blended: Sequence[str] = ()) -> bool:
        """Whether the outputs are those of :meth:`finishing`, all in their place."""
        note = self._note()
        marks = note.get("outputs", {})
        return note.get("blended") == sorted(blended) and all(
            path.exists() and marks.get(path.name) == _mark(path) for path in outputs
        )

    def placed(self, output: Path) -> bool:
        """Whether this file is one that this map put in its place, in the last call or in one that was killed."""
        note = self._note()
        return output.exists() and _mark(output) in [
            note.get(which, {}).get(output.name) for which in ("outputs", "former")
        ]

    def _note(self) -> dict[str, Any]:
        try:
            return parse_json((self.folder / _DONE).read_text(encoding="utf-8")) if self._is_own() else {}
        except (OSError, ValueError):
            return {}

    def remove_blocks(self) -> None:
        """Remove all but the note of complete outputs."""
        for path in self._groups():
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all, at once: if the process is killed, the rest counts as unfinished files and is removed later."""
        out = self.folder.with_suffix("")
        gone = self.folder.with_name(f"{own_prefix(out)}work.part")
        with contextlib.suppress(FileNotFoundError):
            self.remove_blocks()
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def note_complete(first: Path, outputs: Sequence[Path]) -> None:
    """Note in the folder of a call's first scene that all outputs of the call are in place.

    So the folders of the other scenes may be removed before it.
    """
    write_text_atomic(first / _COMPLETE, json.dumps({str(path.absolute()): _mark(path) for path in outputs}))


def is_complete(first: Path, output: Path) -> bool:
    """Whether an output is still as :func:`note_complete` says."""
    try:
        return parse_json((first / _COMPLETE).read_text(encoding="utf-8"))[str(output.absolute())] == _mark(output)
    except (OSError, ValueError, KeyError):
        return False


def _mark(path: Path) -> list[int]:
    """Properties of a file that stay the same if it is renamed."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]

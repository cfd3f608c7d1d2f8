# SPDX-License-Identifier: Apache-2.0
"""Unpacking archives from elsewhere: only inside the target, only files and folders, only so much.

Every member is judged before the first byte is written. Refused are:

* names that are absolute, climb (``..``), hold a drive letter, a backslash or a NUL, or occur twice
* links, devices, pipes and sparse files
* encrypted members
* more members or bytes than the limits

If a member turns out longer or shorter than its header says, the work ends, and what was written is removed.
"""

from __future__ import annotations

import contextlib
import functools
import lzma
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from drseg_core.errors import ArchiveError, ResourceError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class Limits:
    """Bounds on one archive.

    Args:
        members: files and folders.
        size: bytes when unpacked.
        ratio: bytes when unpacked over bytes of the archive. Deflate reaches 1032 at most; label images of few
            colours really reach 100 and more.
    """

    members: int = 1_000_000
    size: int = 500 * 10**9
    ratio: float = 500.0


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    is_folder: bool
    open: Callable[[], IO[bytes] | None]


def archive_stem(name: str) -> str | None:
    """The name of an archive without its suffix; None where the suffix is of no archive."""
    suffix = next((s for s in sorted(ARCHIVE_SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), None)
    return name[: -len(suffix)] if suffix else None


def unpack(archive: Path, target: Path, limits: Limits | None = None) -> Path:
    """Unpack a zip or tar archive (plain, gz, bz2, xz) into a new folder, which appears only when it is complete.

    Memory: the list of names and one megabyte.

    Args:
        archive: the file; its content decides what it is.
        target: folder to make.
        limits: bounds.

    Returns:
        ``target``.

    Raises:
        ArchiveError: no archive, damaged, or with a member that is refused; the message names it.
        ResourceError: the disk has too little room.
    """
    limits = limits or Limits()
    bound = min(limits.size, int(limits.ratio * max(archive.stat().st_size, 1)))
    with _damage_named(archive), _opened(archive, bound) as members:
        checked = _check(archive, members, limits.members, bound)
        target.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(member.size for member in checked), shutil.disk_usage(target.parent).free
        if needed > free:
            raise ResourceError(f"unpack: {archive} needs {needed} bytes when unpacked; {free} are free")
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:100]}-", dir=target.parent) as folder:
            inside = Path(folder) / "content"
            inside.mkdir()
            for member in checked:
                _write(archive, member, inside)
            inside.replace(target)
    return target


@contextlib.contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, NotImplementedError) as error:
        raise ArchiveError(f"unpack: {archive} is damaged: {_one_line(error)}") from None
    except OSError as error:
        if error.errno:
            raise
        # gzip and bz2 report damage so
        raise ArchiveError(f"unpack: {archive} is damaged: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _opened(archive: Path, bound: int) -> Iterator[Iterable[_Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield _zip_members(archive, file)
        return
    try:
        opened = tarfile.open(archive)
    except tarfile.ReadError:
        raise ArchiveError(f"unpack: {archive} is no archive; expected zip or tar") from None
    with opened as tar:
        yield _tar_members(archive, tar, bound)


def _zip_members(archive: Path, file: zipfile.ZipFile) -> Iterator[_Member]:
    for info in file.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refused(archive, info.filename, "is a link or device; expected files and folders")
        if info.flag_bits & 1:
            raise _refused(archive, info.filename, "is encrypted; expected an open archive")
        # filename ends at a NUL, and has other separators replaced
        yield _Member(info.orig_filename, info.file_size, info.is_dir(), functools.partial(file.open, info))


def _tar_members(archive: Path, tar: tarfile.TarFile, bound: int) -> Iterator[_Member]:
    for info in tar:
        if not (info.isreg() or info.isdir()) or info.issparse():
            raise _refused(archive, info.name, "is a link, device or sparse file; expected files and folders")
        yield _Member(info.name, info.size, info.isdir(), functools.partial(tar.extractfile, info))
    # tarfile takes a header that is cut short or wrong for the end
    if tar.fileobj is not None:
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ArchiveError(f"unpack: {archive} is damaged: it ends without an end mark")
        # what is compressed has its checksum at its very end, and the tar none of its content; members behind a header
        # that is all zeros, and those of a second tar, would be lost
        while block := tar.fileobj.read(1 << 20):
            bound -= len(block)
            if bound < 0 or block.strip(b"\0"):
                raise ArchiveError(f"unpack: {archive} is damaged: it goes on behind its end mark")


def _check(archive: Path, members: Iterable[_Member], most: int, bound: int) -> list[_Member]:
    checked: list[_Member] = []
    files: set[str] = set()
    folders: set[str] = set()
    size = 0
    for member in members:
        parts = _parts(archive, member.name)
        name = "/".join(parts)
        size += member.size
        if size > bound:
            raise _refused(archive, member.name, f"makes the archive too large; expected at most {bound} bytes")
        if len(checked) >= most:
            raise _refused(archive, member.name, f"is one member too many; expected at most {most}")
        above = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if name in files or above & files or not member.is_folder and name in folders:
            raise _refused(archive, member.name, "occurs twice; expected every name once")
        folders |= above
        (folders if member.is_folder else files).add(name)
        if parts:
            checked.append(_Member(name, member.size, member.is_folder, member.open))
    return checked


def _parts(archive: Path, name: str) -> list[str]:
    """The name's parts below the target, after all that could lead elsewhere is refused."""
    if "\0" in name or "\\" in name:
        raise _refused(archive, name, "has a NUL or backslash in its name; expected a relative path")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise _refused(archive, name, "has an absolute name; expected a relative path")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _refused(archive, name, "climbs out of its folder; expected a relative path without ..")
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts):
        raise _refused(archive, name[:80], "has a name that is too long; expected at most 255 bytes between slashes")
    return parts


def _refused(archive: Path, name: str, reason: str) -> ArchiveError:
    return ArchiveError(f"unpack: {archive}: member {name!r} {reason}")


def _write(archive: Path, member: _Member, folder: Path) -> None:
    path = folder / member.name
    if member.is_folder:
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    source = member.open()
    if source is None:
        raise _refused(archive, member.name, "has no content; expected a file")
    written = 0
    with source, open(path, "xb") as file:
        while block := source.read(1 << 20):
            written += len(block)
            if written > member.size:
                break
            file.write(block)
    if written != member.size:
        raise _refused(archive, member.name, f"has another size than its header says; expected {member.size} bytes")

# SPDX-License-Identifier: Apache-2.0
"""Archives that would write elsewhere, or too much, are refused before anything is written."""

from __future__ import annotations

import gzip
import io
import shutil
import stat
import struct
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from drseg_core.data.prepare import archives
from drseg_core.data.prepare.archives import Limits, archive_stem, unpack
from drseg_core.errors import ArchiveError, ResourceError


def zip_of(path: Path, *members: tuple[str, bytes], mode: int = 0, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            # past the constructor, which tidies names up
            info.filename, info.compress_type, info.external_attr = name, compression, mode << 16
            file.writestr(info, content)
    return path


def tar_of(path: Path, *members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(content))
    return path


def refused(archive: Path, message: str, limits: Limits | None = None) -> None:
    folder = archive.parent / "out"
    with pytest.raises(ArchiveError, match=message) as caught:
        unpack(archive, folder / "set", limits)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert {path.name for path in archive.parent.rglob("*")} <= {"out", archive.name}


@pytest.mark.parametrize("make, name", [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tar.gz")])
def test_a_good_archive(tmp_path, make, name):
    archive = make(tmp_path / name, ("top/one.txt", b"1"), ("./top/deep/two.txt", b"22" * 400), ("Köln..x", b""))
    root = unpack(archive, tmp_path / "out" / "set")
    assert {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()} == {
        "top/one.txt": b"1",
        "top/deep/two.txt": b"22" * 400,
        "Köln..x": b"",
    }
    assert [path.name for path in root.parent.iterdir()] == ["set"]


def test_a_folder_may_be_named_after_what_is_in_it_and_twice(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("top/one.txt", b"1"), ("top/", b""), ("./top/", b""))
    root = unpack(archive, tmp_path / "out" / "set")
    assert [path.name for path in root.rglob("*")] == ["top", "one.txt"]


@pytest.mark.promise("C37")
@pytest.mark.parametrize("make, suffix", [(zip_of, ".zip"), (tar_of, ".tar")])
@pytest.mark.parametrize(
    "name, reason",
    [
        ("../evil", "climbs out"),
        ("top/../../evil", "climbs out"),
        ("top/..", "climbs out"),
        ("/etc/evil", "absolute name"),
        ("C:/evil", "absolute name"),
        ("c:evil", "absolute name"),
        ("top\\..\\evil", "NUL or backslash"),
        ("x" * 300, "too long"),
    ],
)
def test_names_that_lead_elsewhere(tmp_path, make, suffix, name, reason):
    # a good member before it: nothing of it is written either
    refused(make(tmp_path / f"a{suffix}", ("good", b"1"), (name, b"2")), reason)


@pytest.mark.promise("C37")
def test_nul_in_a_name(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("good.txtXevil", b"1"))
    archive.write_bytes(archive.read_bytes().replace(b"good.txtXevil", b"good.txt\0evil"))
    refused(archive, "NUL or backslash")


@pytest.mark.promise("C37")
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(tmp_path, kind):
    refused(tar_of(tmp_path / "a.tar", ("evil", b""), kind=kind, link="/etc/passwd"), "'evil' is a link, device")


@pytest.mark.promise("C37")
@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip(tmp_path, kind):
    refused(zip_of(tmp_path / "a.zip", ("evil", b"/etc/passwd"), mode=kind | 0o777), "'evil' is a link or device")


@pytest.mark.promise("C37")
@pytest.mark.parametrize("make, suffix", [(zip_of, ".zip"), (tar_of, ".tar")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a", "a"), ("a", "./a"), ("a", "a/b"), ("a/b", "a"), ("a//b", "a/b")])
def test_names_that_occur_twice(tmp_path, make, suffix, names):
    refused(make(tmp_path / f"x{suffix}", *((name, b"1") for name in names)), "occurs twice")


@pytest.mark.promise("C37")
def test_too_much(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("a", bytes(1 << 20)))
    refused(archive, "'a' makes the archive too large; expected at most")
    unpack(archive, tmp_path / "fine", Limits(ratio=2000))
    (tmp_path / "fine/a").unlink()
    (tmp_path / "fine").rmdir()
    refused(archive, "expected at most 1000 bytes", Limits(size=1000, ratio=2000))
    archive.unlink()
    refused(tar_of(tmp_path / "a.tar.gz", ("a", bytes(1 << 21))), "makes the archive too large")
    (tmp_path / "a.tar.gz").unlink()
    many = zip_of(tmp_path / "a.zip", *((str(i), b"") for i in range(5)))
    refused(many, "'4' is one member too many; expected at most 4", Limits(members=4))


@pytest.mark.promise("C37")
def test_a_header_that_lies_about_the_size(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("good", b"1"), ("liar", b"x" * 1000), compression=zipfile.ZIP_STORED)
    data = bytearray(archive.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    # the size when unpacked, in the central directory: the limits are judged by it
    for lie in (10, 900, 1001):
        data[entry + 24 : entry + 28] = struct.pack("<I", lie)
        archive.write_bytes(data)
        refused(archive, "damaged|another size")


@pytest.mark.promise("C37")
def test_no_more_is_written_than_a_header_says(tmp_path):
    endless = archives._Member("liar", 10, False, lambda: io.BytesIO(bytes(5 << 20)))
    with pytest.raises(ArchiveError, match="another size than its header says; expected 10 bytes"):
        archives._write(tmp_path / "a.zip", endless, tmp_path)
    assert (tmp_path / "liar").stat().st_size <= 10


def test_encrypted(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("secret", b"1"))
    data = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    archive.write_bytes(data)
    refused(archive, "'secret' is encrypted")


@pytest.mark.parametrize("make, name", [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tar.gz")])
def test_damaged(tmp_path, make, name):
    content = bytes(range(256)) * 40
    archive = make(tmp_path / name, *((str(i), content[i:]) for i in range(5)))
    data = archive.read_bytes()
    for share in (0.0, 0.3, 0.6, 0.9):
        archive.write_bytes(data[: int(len(data) * share)] if name != "a.tar" else data[: int(50_000 * share) + 100])
        refused(archive, "damaged|no archive")
    if name == "a.tar":
        # in the header of the second member, and right before it
        for place in (512 + 10_240 + 100, 512 + 10_240):
            archive.write_bytes(data[:place])
            refused(archive, "ends without an end mark")
    archive.write_bytes(b"<html>not here</html>")
    refused(archive, "is no archive; expected zip or tar")
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 255
    archive.write_bytes(flipped)
    if name != "a.tar":
        # a plain tar has no checksum of its content
        refused(archive, "damaged")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_wrong_header_is_not_the_end(tmp_path, name, number):
    archive = tar_of(tmp_path / name, *((str(i), b"") for i in range(3)))
    data = bytearray(gzip.decompress(archive.read_bytes()) if name == "a.tar.gz" else archive.read_bytes())
    data[number * tarfile.BLOCKSIZE] ^= 1
    archive.write_bytes(gzip.compress(data) if name == "a.tar.gz" else data)
    refused(archive, "ends without an end mark")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_nothing_behind_an_end_mark_is_lost(tmp_path, name):
    """A header of zeros looks like one, and two tars in one file have two."""
    archive = tar_of(tmp_path / name, *((str(i), b"") for i in range(3)))
    compress, extract = (gzip.compress, gzip.decompress) if name == "a.tar.gz" else (bytes, bytes)
    plain = extract(archive.read_bytes())
    hole = bytearray(plain)
    hole[tarfile.BLOCKSIZE : 2 * tarfile.BLOCKSIZE] = bytes(tarfile.BLOCKSIZE)
    for data in (hole, plain + plain):
        archive.write_bytes(compress(data))
        refused(archive, "goes on behind its end mark")


@pytest.mark.promise("C37")
def test_the_checksum_at_the_end_is_looked_at(tmp_path):
    """A tar has none of its content, and a reader of members stops before that of the compression."""
    archive = tmp_path / "a.tar.gz"
    content = bytes(range(256)) * 40
    with tarfile.open(archive, "w:gz", compresslevel=0) as file:
        info = tarfile.TarInfo("one")
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))
    assert (unpack(archive, tmp_path / "out" / "set") / "one").read_bytes() == content
    shutil.rmtree(tmp_path / "out")
    data = archive.read_bytes()
    archive.write_bytes(data.replace(content[:50], content[1:51], 1))
    refused(archive, "damaged: CRC check failed")


@pytest.mark.promise("C37")
def test_what_is_behind_the_end_mark_is_bounded(tmp_path):
    archive = tar_of(tmp_path / "a.tar.gz", ("one", b"1"))
    plain = gzip.decompress(archive.read_bytes())
    archive.write_bytes(gzip.compress(plain + bytes(20_000_000)))
    refused(archive, "goes on behind its end mark")
    archive.write_bytes(gzip.compress(plain + bytes(20_000)))
    assert (unpack(archive, tmp_path / "out" / "set") / "one").read_bytes() == b"1"


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    archive = zip_of(tmp_path / "a.zip", ("a", b"x" * 5000))
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: SimpleNamespace(free=4999))
    with pytest.raises(ResourceError, match="needs 5000 bytes when unpacked; 4999 are free"):
        unpack(archive, tmp_path / "out" / "set")
    assert list((tmp_path / "out").iterdir()) == []


def test_names_of_archives():
    assert archive_stem("a/Train.zip") == "a/Train" and archive_stem("x.TAR.GZ") == "x" and archive_stem("p.tgz") == "p"
    assert archive_stem("a.png") is None

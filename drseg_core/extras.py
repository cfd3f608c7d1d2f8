# SPDX-License-Identifier: Apache-2.0
"""What the extras of ``pip install 'drseg[...]'`` bring, and the one line where one of them is missing.

torch and numpy are enough for ``drseg_core.ops`` and ``drseg_core.nn``.
"""

from __future__ import annotations

import functools
import importlib.util

from drseg_core.errors import MissingExtraError

# those of pyproject.toml that the package itself imports from; a library of several is named after the first
EXTRAS = {
    "model": (
        "torchvision",
        "timm",
        "open_clip_torch",
        "safetensors",
        "huggingface_hub",
        "pyyaml",
        "pillow",
        "tqdm",
    ),
    "maps": ("rasterio", "pillow", "tqdm"),
    "vectors": ("pyogrio", "shapely", "pyarrow"),
    "cli": ("jsonargparse", "pyyaml"),
    "plots": ("matplotlib",),
    "convert": ("onnx",),
    "cluster": ("distributed",),
    "matching": ("scipy",),
}
_MODULE = {"open_clip_torch": "open_clip", "pillow": "PIL", "pyyaml": "yaml"}


def module_name(library: str) -> str:
    """What is imported of a library."""
    return _MODULE.get(library, library)


@functools.cache
def require(function: str, *needed: str) -> None:
    """Make sure that what a function is about to import is installed.

    Args:
        function: begins the message.
        needed: extras, or single libraries of them.

    Raises:
        MissingExtraError: something is not; the message says what to install.
    """
    absent: dict[str, None] = {}
    extras: dict[str, None] = {}
    for name in needed:
        missing = [library for library in EXTRAS.get(name, (name,)) if not installed(library)]
        absent |= dict.fromkeys(missing)
        if missing:
            extras[name if name in EXTRAS else next(extra for extra in EXTRAS if name in EXTRAS[extra])] = None
    if absent:
        raise MissingExtraError(
            f"{function}: {_listed(absent)} {'is' if len(absent) == 1 else 'are'} not installed; expected the "
            f"extra{'' if len(extras) == 1 else 's'} {_listed(extras)}: pip install 'drseg[{','.join(extras)}]'"
        )


def installed(library: str) -> bool:
    """Whether a library can be found; it is not imported."""
    return importlib.util.find_spec(module_name(library)) is not None


def _listed(names: dict[str, None]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last

# SPDX-License-Identifier: Apache-2.0
"""From class names to the sentences the text encoder reads."""

from __future__ import annotations

from collections.abc import Sequence

from drseg_core.errors import ConfigError

# over which the text features of a word are averaged where nothing was trained: CLIP saw captions of many kinds
AERIAL_TEMPLATES = (
    "a photo of a {}",
    "an aerial photo of a {}",
    "a satellite image of a {}",
    "an orthophoto of a {}",
    "a {} seen from above",
    "a top view of a {}",
    "a small {} seen from the air",
    "a large {} seen from the air",
    "a blurry satellite image of a {}",
    "a map of land cover with a {}",
)


def class_prompt(name: str, template: str = "A photo of a {} in the scene") -> str:
    """``template`` with the class name put in.

    Of a name with synonyms (``"car, automobile"``) only the part before the first ``", "`` is used, as in the
    benchmark protocol.

    Raises:
        ConfigError: empty name, or a template without exactly one ``{}``.
    """
    if template.count("{}") != 1:
        raise ConfigError(f"class_prompt: template is not usable; expected exactly one {{}}, got {template!r}")
    word = name.split(", ", 1)[0].strip()
    if not word:
        raise ConfigError(f"class_prompt: name is empty; expected a class name, got {name!r}")
    return template.replace("{}", word)


def class_prompts(names: Sequence[str], template: str = "A photo of a {} in the scene") -> list[str]:
    """One prompt per class, in order; see :func:`class_prompt`."""
    if isinstance(names, str):
        raise TypeError(f"class_prompts: names has a wrong type; expected a sequence of names, got the text {names!r}")
    if not names:
        raise ConfigError("class_prompts: names is empty; expected at least one class name, got none")
    return [class_prompt(name, template) for name in names]

# SPDX-License-Identifier: Apache-2.0
"""Class names to text features over templates and synonyms, and their product with dense features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.errors import ConfigError
from drseg_core.models.clip import ClipEncoder
from drseg_core.models.prompts import AERIAL_TEMPLATES

__all__ = ["ClassText", "class_logits", "encode_classes"]


class ClassText(NamedTuple):
    """Text features of class names.

    ``embedding`` (W, C) has the features of all words, each of length 1. ``counts`` says how many consecutive words
    belong to each of the T classes.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.models.class_text import encode_classes
        >>> text = encode_classes(drseg.load("run").model.clip, ["road", "tree, bush"], background=["sky", "wall"])
        >>> len(text.embedding), text.counts
        (5, (1, 2, 2))
    """

    embedding: Tensor
    counts: tuple[int, ...]


@torch.no_grad()
def encode_classes(
    clip: ClipEncoder,
    classes: Sequence[str | Sequence[str]],
    templates: Sequence[str] = AERIAL_TEMPLATES,
    background: Sequence[str] = (),
) -> ClassText:
    """Class names to text features.

    For each word the L2-normalised text features are averaged over the templates and normalised again. This is CLIP's
    prompt ensemble, which all papers of :func:`drseg_core.models.dense_features.dense_features` use. They have the 80
    templates for ImageNet, which speak of photos of objects. The templates here speak of views from above. The words of
    a class compete, see :func:`class_logits`.

    Args:
        clip: its text tower is used.
        classes: names; a class of several words is a sequence of them, or one text with ``", "`` between them.
        templates: sentences with one ``{}``.
        background: prompts of one more class, the last, for all else in the image.

    Returns:
        Features of all words in turn, on the device and in the dtype of the text tower.

    Raises:
        TypeError: ``classes`` is one text.
        ConfigError: no class, no template, a class without a word, an empty word, a word that is too long, or a
            template that cannot be used.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.models.class_text import encode_classes
        >>> encode_classes(drseg.load("run").model.clip, [["roof", "building"], "pond"], ["a {}"]).counts
        (2, 1)
    """
    for name, value in (("classes", classes), ("templates", templates), ("background", background)):
        if isinstance(value, str):
            raise TypeError(f"encode_classes: {name} has a wrong type; expected a sequence, got the text {value!r}")
    wanted = [name.split(", ") if isinstance(name, str) else list(name) for name in classes]
    if background:
        wanted.append(list(background))
    if not classes or not templates or not all(wanted):
        empty = "classes" if not classes else "templates" if not templates else "a class"
        raise ConfigError(f"encode_classes: {empty} is empty; expected at least one text, got none")
    words = [word for group in wanted for word in group]
    device = clip.text.positional_embedding.device
    total = torch.stack([clip.encode_text(clip.tokenize(words, template).to(device)) for template in templates]).mean(
        dim=0
    )
    return ClassText(F.normalize(total, dim=-1), tuple(map(len, wanted)))


def class_logits(features: Tensor, text: ClassText) -> Tensor:
    """The product of dense features with text, for each class with its best word, in float32 or wider.

    Args:
        features: (B, C, h, w), not normalised here; features of length 1 give cosines.
        text: from :func:`encode_classes`.

    Returns:
        (B, T, h, w).

    Raises:
        ValueError: features and text have different numbers of channels.

    Examples:
        >>> import torch
        >>> from drseg_core.models.class_text import ClassText, class_logits
        >>> text = ClassText(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), (2, 1))
        >>> class_logits(torch.tensor([0.6, 0.8]).view(1, 2, 1, 1), text).flatten().tolist()
        [0.800000011920929, -0.6000000238418579]
    """
    embedding, counts = text
    if features.dim() != 4 or features.shape[1] != embedding.shape[1]:
        raise ValueError(
            f"class_logits: features have a wrong shape; expected (B, {embedding.shape[1]}, h, w), "
            f"got {tuple(features.shape)}"
        )
    with torch.autocast(features.device.type, enabled=False):
        kind = torch.promote_types(features.dtype, torch.float32)
        logits = (features.permute(0, 2, 3, 1).to(kind) @ embedding.to(kind).T).permute(0, 3, 1, 2)
    if len(counts) == logits.shape[1]:
        return logits
    return torch.stack([words.amax(dim=1) for words in logits.split(counts, dim=1)], dim=1)

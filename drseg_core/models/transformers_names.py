# SPDX-License-Identifier: Apache-2.0
"""Weights under the names that Hugging Face's ``transformers`` gives them, in the names of the published files.

CLIP comes out as OpenAI published it, DINO, DINOv2 and DINOv3 as Meta did: what open_clip and timm read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drseg_core.errors import CheckpointError

_IMAGE_TOWER = "vision_model."
# of activations: whether that is QuickGELU
_QUICK = {"quick_gelu": True, "gelu": False}
# what open_clip adds to a variance, and transformers by default
_EPS = 1e-5
# in this order; each takes the place of what an earlier one has left
_CLIP = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.self_attn\.([qkv])_proj\.(weight|bias)$", r".attn.\1_in_proj_\2"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
# OpenAI multiplies from the left
_TRANSPOSED = ("visual.proj", "text_projection")

_DINO = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2_qkv."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)
# of DINOv3 alone: registers have another name than DINOv2's, and a gate makes three layers of a perceptron's two
_DINO_3 = ((r"^register_tokens$", "storage_tokens"),)
_GATED = ((r"\.mlp\.gate_proj\.", ".mlp.w1."), (r"\.mlp\.up_proj\.", ".mlp.w2."), (r"\.mlp\.down_proj\.", ".mlp.w3."))
_PLAIN = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
# a layer for classes that DINO's encoders do not have
_POOLER = "pooler."


def clip_as_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ``CLIPModel``'s state dict in OpenAI's names; any other one as it is."""
    if not any(key.startswith(_IMAGE_TOWER) for key in state):
        return dict(state)
    renamed = _joined(_renamed(state, _CLIP), "in_proj_", whole=True)
    return {key: value.T if key in _TRANSPOSED else value for key, value in renamed.items()}


def dino_as_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ``ViTModel``, ``Dinov2Model``, ``Dinov2WithRegistersModel`` or ``DINOv3ViTModel`` in the
    names of DINO's authors; any other one as it is.
    """
    if "embeddings.cls_token" not in state:
        return dict(state)
    rules: tuple[tuple[str, str], ...] = _DINO
    if any(key.endswith(".attention.o_proj.weight") for key in state):
        rules += _DINO_3 + (_GATED if any(".mlp.gate_proj." in key for key in state) else _PLAIN)
    kept = {key: value for key, value in state.items() if not key.startswith(_POOLER)}
    return _joined(_renamed(kept, rules), "qkv.", whole=False)


def from_transformers(names: Iterable[str]) -> bool:
    """Whether a CLIP with such names, whatever stands before them, was written by ``transformers``."""
    return any(_IMAGE_TOWER in key for key in names)


def says_quick_gelu(path: str) -> bool | None:
    """Whether the ``config.json`` beside a ``CLIPModel``'s file says QuickGELU; None where there is none to be read.

    The file itself does not hold it. OpenAI's weights have QuickGELU, most others do not.

    Raises:
        CheckpointError: it is of another model than a CLIP, or of one that open_clip would not compute as it does.
    """
    try:
        content = json.loads(Path(path).with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    # older files have a tower twice; transformers takes all of the second
    towers: list[Any] = [
        next((content[key] for key in (f"{name}_dict", name) if content.get(key) is not None), {})
        for name in ("vision_config", "text_config")
    ]
    # transformers leaves out what is its default
    kinds = {str(tower.get("hidden_act", "quick_gelu")) for tower in towers if isinstance(tower, dict)}
    small = {str(tower.get("layer_norm_eps", _EPS)) for tower in towers if isinstance(tower, dict)}
    model = content.get("model_type", "clip")
    problem: tuple[str, object, object]
    if model != "clip":
        problem = ("model_type", "clip", model)
    elif small != {str(_EPS)}:
        problem = ("layer_norm_eps", _EPS, _words(small))
    elif len(kinds) != 1 or not kinds <= _QUICK.keys():
        problem = ("hidden_act", f"one of {_words(_QUICK)} in both towers", _words(kinds))
    else:
        return _QUICK[kinds.pop()]
    what, right, found = problem
    raise CheckpointError(f"ClipEncoder: config.json beside {path} has another {what}; expected {right}, got {found}")


def _words(values: Iterable[object]) -> str:
    return " and ".join(sorted(map(str, values)))


def _renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    result = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def _joined(state: dict[str, Tensor], joint: str, *, whole: bool) -> dict[str, Tensor]:
    """Projections ``q_``, ``k_`` and ``v_`` of each block one below the other.

    Zeros stand for a bias that no block has, unless they must be ``whole``. What is incomplete stays in parts, which
    fit no model.
    """
    parts = re.compile(rf"^(.*\.attn\.)([qkv])_{re.escape(joint)}(weight|bias)$")
    found = [match for match in map(parts.match, state) if match is not None]
    biased = {match[2] for match in found if match[3] == "bias"}
    result = {key: value for key, value in state.items() if parts.match(key) is None}
    for start, kind in dict.fromkeys((match[1], match[3]) for match in found):
        names = {letter: f"{start}{letter}_{joint}{kind}" for letter in "qkv"}
        held = {letter: state[name] for letter, name in names.items() if name in state}
        wanted = set("qkv") if kind == "weight" or whole else biased
        if held.keys() >= wanted:
            like = next(iter(held.values()))
            result[f"{start}{joint}{kind}"] = torch.cat([held.get(letter, torch.zeros_like(like)) for letter in "qkv"])
        else:
            result |= {names[letter]: value for letter, value in held.items()}
    return result

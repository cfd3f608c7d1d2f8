# SPDX-License-Identifier: Apache-2.0
"""Weights of a DINOv2 out of an ONNX file, by timm's names, and the proof that they compute what the file does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drseg_core.errors import CheckpointError
from drseg_core.extras import require

__all__ = ["disagreement", "dinov2_from_onnx"]

_CLASS_TOKEN = "embeddings.cls_token"
_PATCH = "embeddings.patch_embeddings.projection"
_LAST = "layernorm"
# of a block: what transformers calls a linear layer, what timm does; query, key and value are one layer there
_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_LINEAR = {"attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_OTHER = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


def dinov2_from_onnx(path: str | Path) -> dict[str, Tensor]:
    """The weights of a DINOv2 that transformers' modules were exported from with torch's TorchScript exporter.

    Such a file has most tensors by their names. The matrices of linear layers are nameless and transposed: each is the
    one that is multiplied just before its layer's bias is added. The position table is folded into two nameless
    tensors, for the class token and for the patches. What else the file holds (a head) is left out.

    Args:
        path: ONNX file with its weights inside.

    Returns:
        A state dict of timm's ``VisionTransformer`` without a head, float32: strict for
        ``timm.create_model("vit_small_patch14_dinov2", num_classes=0)`` where the file is of that size.

    Raises:
        CheckpointError: the file cannot be read, or is not such an export (a part is missing, or there are more of
            the encoder's own tensors than are known).
        MissingExtraError: ``onnx`` is not installed.

    Examples:
        >>> from drseg_core.checkpoints.from_onnx import dinov2_from_onnx
        >>> dinov2_from_onnx("absent.onnx")
        Traceback (most recent call last):
        drseg_core.errors.CheckpointError: dinov2_from_onnx: absent.onnx cannot be read; ...
    """
    file = _OnnxFile(path)
    state = {
        "cls_token": file.take(_CLASS_TOKEN),
        "patch_embed.proj.weight": file.take(f"{_PATCH}.weight"),
        "patch_embed.proj.bias": file.take(f"{_PATCH}.bias"),
        "norm.weight": file.take(f"{_LAST}.weight"),
        "norm.bias": file.take(f"{_LAST}.bias"),
        "pos_embed": file.position_table(),
    }
    for block in range(file.blocks):
        theirs, own = f"encoder.layer.{block}.", f"blocks.{block}."
        parts = [file.linear(theirs + part) for part in _QKV]
        for place, word in enumerate(("weight", "bias")):
            state[f"{own}attn.qkv.{word}"] = np.concatenate([part[place] for part in parts])
        for name, new in _LINEAR.items():
            state[f"{own}{new}.weight"], state[f"{own}{new}.bias"] = file.linear(theirs + name)
        state |= {own + new: file.take(theirs + name) for name, new in _OTHER.items()}
    file.check_nothing_left()
    return {name: torch.from_numpy(np.array(value, np.float32, order="C")) for name, value in state.items()}


def disagreement(path: str | Path, encoder: Any) -> float:
    """How far an encoder with converted weights is from its ONNX file: the file runs on onnx's reference evaluator.

    Args:
        path: ONNX file.
        encoder: timm's ``VisionTransformer`` on the CPU, of the grid of the file's position table, so that neither
            resizes it.

    Returns:
        Root mean square of the difference of the tokens after the last norm, over that of the file's tokens, on an
        image of noise.

    Raises:
        CheckpointError: the file cannot be read or run.
        MissingExtraError: ``onnx`` is not installed.

    Examples:
        >>> from drseg_core.checkpoints.from_onnx import disagreement
        >>> disagreement("absent.onnx", None)
        Traceback (most recent call last):
        drseg_core.errors.CheckpointError: dinov2_from_onnx: absent.onnx cannot be read; ...
    """
    file = _OnnxFile(path)
    side = encoder.patch_embed.img_size
    pixels = torch.randn(1, 3, *side, generator=torch.Generator().manual_seed(0))
    expected = file.run(pixels.numpy(), file.after(f"{_LAST}.bias").output[0])
    with torch.no_grad():
        found = encoder.eval().forward_features(pixels).numpy()
    if found.shape != expected.shape:
        return math.inf
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


class _OnnxFile:
    """Tensors of an ONNX file by the names that transformers gives them, each of which can be taken once."""

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise CheckpointError(f"dinov2_from_onnx: {path} cannot be read; expected an ONNX file, got none")
        require("dinov2_from_onnx", "convert")
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import numpy_helper

        self.path = path
        try:
            # a file that lies elsewhere is not followed
            self.model = onnx.load(str(path), load_external_data=False)
            if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in self.model.graph.initializer):
                raise ValueError("tensors in other files")
            self.tensor = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}
        except (OSError, DecodeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(
                f"dinov2_from_onnx: {path} cannot be read; expected an ONNX file with its weights inside, got {reason}"
            ) from error
        begins = [name.removesuffix(_CLASS_TOKEN) for name in self.tensor if name.endswith(_CLASS_TOKEN)]
        if len(begins) != 1:
            raise self._refused(f"expected one tensor {_CLASS_TOKEN}, got {len(begins)}")
        self.prefix = begins[0]
        found = [re.match(re.escape(self.prefix) + r"encoder\.layer\.(\d+)\.", name) for name in self.tensor]
        self.blocks = 1 + max((int(match[1]) for match in found if match), default=-1)
        self.left = {name for name in self.tensor if name.startswith((f"{self.prefix}e", f"{self.prefix}{_LAST}"))}

    def take(self, name: str) -> np.ndarray[Any, Any]:
        full = self.prefix + name
        if full not in self.left:
            raise self._refused(f"expected a tensor {full}, got none")
        self.left.remove(full)
        return self.tensor[full]

    def linear(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Weight (out, in) and bias of a layer."""
        adding = self.after(f"{name}.bias")
        bias = self.take(f"{name}.bias")
        for node in self.model.graph.node:
            if node.op_type == "MatMul" and node.output[0] in adding.input:
                matrices = [self.tensor[value] for value in node.input if value in self.tensor]
                if len(matrices) == 1 and matrices[0].ndim == 2 and matrices[0].shape[1] == len(bias):
                    return matrices[0].T, bias
        raise self._refused(f"expected a product with one matrix before the bias of {name}, got none")

    def position_table(self) -> np.ndarray[Any, Any]:
        """(1, 1 + N, C), of the class token and a square grid of N patches."""
        width = self.tensor[self.prefix + _CLASS_TOKEN].shape[-1]
        nameless = [
            value
            for name, value in self.tensor.items()
            if name != self.prefix + _CLASS_TOKEN and value.ndim == 3 and value.shape[::2] == (1, width)
        ]
        of_class = [value for value in nameless if value.shape[1] == 1]
        of_grid = [value for value in nameless if value.shape[1] > 1]
        if len(of_class) != 1 or len(of_grid) != 1 or math.isqrt(of_grid[0].shape[1]) ** 2 != of_grid[0].shape[1]:
            shapes = ", ".join(str(value.shape) for value in nameless) or "none"
            raise self._refused(f"expected one position of the class token and a square grid of others, got {shapes}")
        return np.concatenate((of_class[0], of_grid[0]), axis=1)

    def check_nothing_left(self) -> None:
        if self.left:
            raise self._refused(f"expected no other tensors of the encoder, got {', '.join(sorted(self.left)[:5])}")

    def after(self, name: str) -> Any:
        """The node that adds a named tensor to something."""
        found = [node for node in self.model.graph.node if node.op_type == "Add" and self.prefix + name in node.input]
        if len(found) != 1:
            raise self._refused(f"expected one sum with {self.prefix}{name}, got {len(found)}")
        return found[0]

    def run(self, pixels: np.ndarray[Any, Any], output: str) -> np.ndarray[Any, Any]:
        """A value inside the graph, of normalised pixels (1, 3, H, W)."""
        import onnx
        from onnx.reference import ReferenceEvaluator
        from onnx.reference.op_run import OpRun

        class Resize(OpRun):
            # the reference's own takes minutes, even for a table that stays as it is
            def _run(self, x: Any, region: Any = None, scales: Any = None, sizes: Any = None, **how: Any) -> Any:
                wanted = sizes if sizes is not None and len(sizes) else np.array(x.shape) * scales
                if tuple(np.round(wanted).astype(int)) != x.shape:
                    raise ValueError(f"expected a position table of the image's grid, got {x.shape} for {wanted}")
                return (x,)

        part = onnx.ModelProto()
        part.CopyFrom(self.model)
        nodes = list(_needed(self.model.graph.node, output))
        del part.graph.node[:], part.graph.output[:]
        part.graph.node.extend(nodes)
        part.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
        try:
            evaluator = ReferenceEvaluator(part, new_ops=[Resize])
            return evaluator.run([output], {self.model.graph.input[0].name: pixels})[0]
        except Exception as error:
            reason = " ".join(str(error).split())
            raise self._refused(f"expected a graph that runs, got {type(error).__name__}: {reason}") from error

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"dinov2_from_onnx: {self.path} is no export of a DINOv2; {why}")


def _needed(nodes: Any, output: str) -> Iterator[Any]:
    """The nodes on which a value depends, in their order."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return reversed(kept)

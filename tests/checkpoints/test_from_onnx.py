# SPDX-License-Identifier: Apache-2.0
"""Weights out of an ONNX file, made here node by node as an exporter writes a small DINOv2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drseg_core.checkpoints.from_onnx import dinov2_from_onnx, disagreement
from drseg_core.errors import CheckpointError

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'drseg[convert]'")
timm = pytest.importorskip("timm")
WIDTH, HEADS, DEPTH, PATCH, GRID = 12, 3, 2, 4, 3


def small(seed: int | None = None) -> Any:
    """timm's encoder; with a seed all its tensors are random, those that begin as zeros or ones too."""
    encoder = timm.models.vision_transformer.VisionTransformer(
        img_size=GRID * PATCH,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        init_values=1.0,
        num_classes=0,
    ).eval()
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.copy_(0.4 * torch.randn_like(parameter))
    return encoder


class Export:
    """A graph that is written one node at a time."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: dict[str, np.ndarray] = {}

    def add(self, op: str, *inputs: str, **options: Any) -> str:
        output = f"value_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [output], **options))
        return output

    def keep(self, name: str, value: Any) -> str:
        self.tensors[name] = np.ascontiguousarray(value)
        return name

    def shape(self, *sizes: int) -> str:
        return self.keep(f"shape_{len(self.tensors)}", np.array(sizes, np.int64))

    def number(self, value: float) -> str:
        return self.keep(f"number_{len(self.tensors)}", np.array(value, np.float32))

    def linear(self, x: str, name: str, weight: np.ndarray, bias: np.ndarray) -> str:
        product = self.add("MatMul", x, self.keep(f"onnx::MatMul_{len(self.tensors)}", weight.T))
        return self.add("Add", self.keep(f"{name}.bias", bias), product)

    def norm(self, x: str, name: str, weight: np.ndarray, bias: np.ndarray) -> str:
        mean = self.add("ReduceMean", x, axes=[-1])
        apart = self.add("Sub", x, mean)
        square = self.add("Mul", apart, apart)
        variance = self.add("Add", self.add("ReduceMean", square, axes=[-1]), self.number(1e-6))
        unit = self.add("Div", apart, self.add("Sqrt", variance))
        scaled = self.add("Mul", unit, self.keep(f"{name}.weight", weight))
        return self.add("Add", scaled, self.keep(f"{name}.bias", bias))

    def write(self, path: Path, result: str) -> Path:
        make = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "small",
            [make("input_image", onnx.TensorProto.FLOAT, ["batch", 3, GRID * PATCH, GRID * PATCH])],
            [make(result, onnx.TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.tensors.items()],
        )
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)]), str(path))
        return path


def export(encoder: Any, path: Path, prefix: str = "backbone.") -> Path:
    """DINOv2 from its equations: x += ls1 * attention(norm1(x)), x += ls2 * mlp(norm2(x)), with a head behind it."""
    own = {name: value.numpy() for name, value in encoder.state_dict().items()}
    graph, n = Export(), GRID * GRID
    keep, add = graph.keep, graph.add
    patch = f"{prefix}embeddings.patch_embeddings.projection"
    x = add(
        "Conv",
        "input_image",
        keep(f"{patch}.weight", own["patch_embed.proj.weight"]),
        keep(f"{patch}.bias", own["patch_embed.proj.bias"]),
        strides=[PATCH, PATCH],
    )
    x = add("Transpose", add("Reshape", x, graph.shape(1, WIDTH, n)), perm=[0, 2, 1])
    x = add("Concat", keep(f"{prefix}embeddings.cls_token", own["cls_token"]), x, axis=1)
    # the table goes through a resize that changes nothing, as in an export for any size
    table = add("Reshape", keep("onnx::Reshape_1", own["pos_embed"][:, 1:]), graph.shape(1, GRID, GRID, WIDTH))
    table = add("Transpose", table, perm=[0, 3, 1, 2])
    table = add("Resize", table, "", "", graph.shape(1, WIDTH, GRID, GRID), mode="cubic")
    table = add("Reshape", add("Transpose", table, perm=[0, 2, 3, 1]), graph.shape(1, n, WIDTH))
    x = add("Add", x, add("Concat", keep("onnx::Concat_1", own["pos_embed"][:, :1]), table, axis=1))
    for block in range(DEPTH):
        theirs, mine = f"{prefix}encoder.layer.{block}.", f"blocks.{block}."
        seen = graph.norm(x, f"{theirs}norm1", own[f"{mine}norm1.weight"], own[f"{mine}norm1.bias"])
        weights = np.split(own[f"{mine}attn.qkv.weight"], 3)
        biases = np.split(own[f"{mine}attn.qkv.bias"], 3)
        parts = {}
        for word, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            part = graph.linear(seen, f"{theirs}attention.attention.{word}", weight, bias)
            part = add("Reshape", part, graph.shape(1, n + 1, HEADS, WIDTH // HEADS))
            parts[word] = add("Transpose", part, perm=[0, 2, 3, 1] if word == "key" else [0, 2, 1, 3])
        product = add("MatMul", parts["query"], parts["key"])
        share = add("Softmax", add("Div", product, graph.number((WIDTH / HEADS) ** 0.5)), axis=-1)
        mixed = add("Transpose", add("MatMul", share, parts["value"]), perm=[0, 2, 1, 3])
        mixed = add("Reshape", mixed, graph.shape(1, n + 1, WIDTH))
        name = f"{theirs}attention.output.dense"
        mixed = graph.linear(mixed, name, own[f"{mine}attn.proj.weight"], own[f"{mine}attn.proj.bias"])
        x = add("Add", add("Mul", mixed, keep(f"{theirs}layer_scale1.lambda1", own[f"{mine}ls1.gamma"])), x)
        seen = graph.norm(x, f"{theirs}norm2", own[f"{mine}norm2.weight"], own[f"{mine}norm2.bias"])
        wide = graph.linear(seen, f"{theirs}mlp.fc1", own[f"{mine}mlp.fc1.weight"], own[f"{mine}mlp.fc1.bias"])
        half = add("Add", add("Erf", add("Div", wide, graph.number(2**0.5))), graph.number(1.0))
        wide = add("Mul", add("Mul", wide, half), graph.number(0.5))
        wide = graph.linear(wide, f"{theirs}mlp.fc2", own[f"{mine}mlp.fc2.weight"], own[f"{mine}mlp.fc2.bias"])
        x = add("Add", add("Mul", wide, keep(f"{theirs}layer_scale2.lambda1", own[f"{mine}ls2.gamma"])), x)
    x = graph.norm(x, f"{prefix}layernorm", own["norm.weight"], own["norm.bias"])
    head = keep("decoder.weight", np.ones((WIDTH, 1), np.float32))
    return graph.write(path, add("Sigmoid", add("MatMul", x, head)))


@pytest.fixture(scope="module")
def original() -> Any:
    return small(seed=0)


@pytest.fixture(scope="module")
def path(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(original, tmp_path_factory.mktemp("onnx") / "small.onnx")


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_every_tensor_comes_back(original: Any, tmp_path: Path, prefix: str) -> None:
    state = dinov2_from_onnx(export(original, tmp_path / "small.onnx", prefix))
    expected = original.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value) and state[name].is_contiguous(), name


def test_the_file_and_the_encoder_compute_the_same(path: Path) -> None:
    encoder = small()
    assert disagreement(path, encoder) > 0.1
    encoder.load_state_dict(dinov2_from_onnx(path))
    assert disagreement(path, encoder) < 2e-6


QKV = "blocks.1.attn.qkv.{}"


def swap_query_and_key(state: dict[str, torch.Tensor]) -> None:
    for name in (QKV.format("weight"), QKV.format("bias")):
        query, key, value = state[name].chunk(3)
        state[name] = torch.cat((key, query, value))


def transpose_projection(state: dict[str, torch.Tensor]) -> None:
    state["blocks.0.attn.proj.weight"] = state["blocks.0.attn.proj.weight"].T.contiguous()


def transpose_query(state: dict[str, torch.Tensor]) -> None:
    query, *others = state[QKV.format("weight")].chunk(3)
    state[QKV.format("weight")] = torch.cat((query.T, *others))


def swap_norms(state: dict[str, torch.Tensor]) -> None:
    first, second = "blocks.0.norm1.bias", "blocks.0.norm2.bias"
    state[first], state[second] = state[second], state[first]


def swap_scales(state: dict[str, torch.Tensor]) -> None:
    first, second = "blocks.0.ls1.gamma", "blocks.0.ls2.gamma"
    state[first], state[second] = state[second], state[first]


def turn_table(state: dict[str, torch.Tensor]) -> None:
    first, rest = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    state["pos_embed"] = torch.cat((first, rest.unflatten(1, (GRID, GRID)).transpose(1, 2).flatten(1, 2)), dim=1)


def swap_blocks(state: dict[str, torch.Tensor]) -> None:
    held = {name: value for name, value in state.items() if name.startswith("blocks.")}
    state.update({re.sub(r"\d", lambda found: str(1 - int(found[0])), name, count=1): v for name, v in held.items()})


@pytest.mark.parametrize(
    "fault",
    [
        swap_query_and_key,
        transpose_projection,
        transpose_query,
        swap_norms,
        swap_scales,
        turn_table,
        swap_blocks,
        lambda state: state.update({"norm.bias": torch.zeros(WIDTH)}),
    ],
)
def test_planted_faults_fit_and_are_seen(path: Path, fault: Any) -> None:
    state = dinov2_from_onnx(path)
    fault(state)
    encoder = small()
    encoder.load_state_dict(state)
    assert disagreement(path, encoder) > 1e-3


def test_another_number_of_heads_is_seen(path: Path) -> None:
    encoder = small()
    encoder.load_state_dict(dinov2_from_onnx(path))
    for block in encoder.blocks:
        block.attn.num_heads, block.attn.head_dim, block.attn.scale = 2, WIDTH // 2, (WIDTH // 2) ** -0.5
    assert disagreement(path, encoder) > 1e-3


# files that are something else


def edited(path: Path, target: Path, change: Any) -> Path:
    model = onnx.load(str(path))
    change(model.graph)
    onnx.save(model, str(target))
    return target


def rename(old: str, new: str) -> Any:
    def change(graph: Any) -> None:
        for tensor in graph.initializer:
            tensor.name = tensor.name.replace(old, new)
        for node in graph.node:
            node.input[:] = [name.replace(old, new) for name in node.input]

    return change


def add_tensor(name: str, shape: tuple[int, ...]) -> Any:
    return lambda graph: graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename("cls_token", "class"), "expected one tensor embeddings.cls_token, got 0"),
        (rename("layer.1.norm2", "layer.1.other"), "expected a tensor backbone.encoder.layer.1.norm2.weight, got none"),
        (rename("backbone.layernorm", "backbone.last"), "expected a tensor backbone.layernorm.weight, got none"),
        (rename("layer.1.mlp.fc2.bias", "layer.1.mlp.w3.bias"), "expected one sum with backbone.encoder.layer.1.mlp"),
        (add_tensor("backbone.embeddings.register_tokens", (1, 4, 7)), "got backbone.embeddings.register_tokens"),
        (add_tensor("onnx::Reshape_2", (1, 16, WIDTH)), r"square grid of others, got .*\(1, 16, 12\)"),
        (lambda graph: graph.ClearField("node"), "expected one sum with"),
    ],
)
def test_other_files_are_refused(path: Path, tmp_path: Path, change: Any, said: str) -> None:
    other = edited(path, tmp_path / "other.onnx", change)
    with pytest.raises(CheckpointError, match=f"other.onnx is no export of a DINOv2; .*{said}") as caught:
        dinov2_from_onnx(other)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:-100])
    for name in (broken, tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read; expected an ONNX file"):
            dinov2_from_onnx(name)


def test_a_table_of_another_grid_is_not_compared(path: Path) -> None:
    encoder = small()
    encoder.patch_embed.img_size = (16, 16)
    with pytest.raises(CheckpointError, match="expected a graph that runs"):
        disagreement(path, encoder)

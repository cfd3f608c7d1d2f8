# SPDX-License-Identifier: Apache-2.0
"""What holds for any size and any numbers, for each op on edges. ``test_properties.py`` draws them.

Each check names a fault that it is for. Those of ``tests/mutants/properties.toml`` are planted, and found.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from contract import LAYOUTS, Call, at_offset
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from drseg_core import ops

Inputs = dict[str, Any]
NORMS = ("sym_row", "sym_count", "sym_inout", "row", "sym_undirected")
DEEP, INTERPRETED = bool(os.environ.get("DRSEG_DEEP")), os.environ.get("TRITON_INTERPRET") == "1"
OFFSET = 3


def few(examples: int = 10, deep: int = 2000) -> settings:
    """The same few cases at every commit; in the deep run ``deep`` of them, other ones each time."""
    if INTERPRETED:
        # a launch takes as long as a hundred calls of the others
        examples, deep = 2, 40
    count = int(os.environ.get("DRSEG_EXAMPLES", deep)) if DEEP else examples
    # to say why a case fails takes minutes
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(max_examples=count, derandomize=not DEEP, deadline=None, database=None, phases=phases)


@dataclass(frozen=True)
class Sizes:
    """Of a graph, with the seed of its numbers."""

    batch: int
    nodes: int
    slots: int
    channels: int
    seed: int

    def random(self, more: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + more)


SEEDS = st.integers(0, 2**31)
# sizes beside the width of a vector register, too; the interpreter takes a few launches, of no trivial ones
SIZES = st.builds(
    Sizes,
    batch=st.integers(2, 2) if INTERPRETED else st.integers(1, 3),
    nodes=st.integers(3, 6) if INTERPRETED else st.integers(1, 40),
    slots=st.integers(2, 4) if INTERPRETED else st.integers(1, 18),
    channels=st.sampled_from([5, 8, 15, 1])
    if INTERPRETED
    else st.integers(1, 5) | st.sampled_from([8, 15, 16, 17, 33]),
    seed=SEEDS,
)


def integers(random: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=random).float()


def reals(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64)


def any_index(sizes: Sizes) -> Tensor:
    """Neighbours of every kind: repeated ones, nodes that all choose, and nodes that nobody chooses."""
    index = torch.randint(0, sizes.nodes, (sizes.batch, sizes.nodes, sizes.slots), generator=sizes.random(1))
    return torch.where(torch.rand(index.shape, generator=sizes.random(2)) < 0.3, sizes.nodes // 2, index).int()


@dataclass(frozen=True)
class Op:
    """An op on edges.

    Args:
        name: of the op.
        make: inputs of float64 numbers, from sizes and options.
        exact: float32 inputs of integers, on which every sum of the op is exact; from sizes and options.
        differentiable: inputs that get a gradient.
        batched: inputs of nodes and edges.
        options: to draw from.
        exact_options: those of them in which no rounding is left on integers.
        scaled: inputs times a power of four, and what this makes of the output.
        seen_in: the entries of the output that an input's row shows in.
    """

    name: str
    make: Callable[[Sizes, Inputs], Inputs]
    exact: Callable[[Sizes, Inputs], Inputs]
    differentiable: tuple[str, ...]
    batched: tuple[str, ...]
    options: tuple[Inputs, ...]
    exact_options: tuple[Inputs, ...]
    scaled: Callable[[Inputs, float], tuple[Inputs, float]]
    seen_in: Callable[[Inputs, str, int, int], Tensor]

    def run(self, inputs: Inputs, call: Call, grad: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
        """The output and every gradient."""
        given = {
            name: value.detach().requires_grad_() if name in self.differentiable else value
            for name, value in inputs.items()
        }
        output = call(**given)
        if grad is None:
            grad = integers(torch.Generator().manual_seed(seed), -2, 2, *output.shape).to(output.dtype)
        names = [name for name in self.differentiable if given.get(name) is not None]
        found = torch.autograd.grad(output, [given[name] for name in names], grad)
        return {"output": output.detach(), **{f"grad_{name}": value for name, value in zip(names, found, strict=True)}}

    def with_dtype(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }


def scaled_by(*names: str) -> Callable[[Inputs, float], tuple[Inputs, float]]:
    """The output follows these inputs."""
    return lambda inputs, factor: (
        {**inputs, **{name: inputs[name] * factor for name in names if inputs.get(name) is not None}},
        factor,
    )


# ---- graph_propagate


def _propagate(sizes: Sizes, options: Inputs) -> Inputs:
    random, index = sizes.random(), any_index(sizes)
    x = reals(random, sizes.batch, sizes.nodes, sizes.channels)
    return {"x": x, "index": index, "coefficient": reals(random, *index.shape), **options}


def _exact_propagate(sizes: Sizes, options: Inputs) -> Inputs:
    random, index = sizes.random(), any_index(sizes)
    x = integers(random, -3, 3, sizes.batch, sizes.nodes, sizes.channels)
    return {"x": x, "index": index, "coefficient": integers(random, -3, 3, *index.shape), **options}


def _reached(inputs: Inputs, name: str, sample: int, node: int) -> Tensor:
    """Rows of the output that see a row of ``x``, or of ``coefficient``."""
    index = inputs["index"][sample]
    against, both = inputs.get("transpose", False), inputs.get("undirected", False)
    rows = torch.zeros(len(index), dtype=torch.bool)
    if name == "coefficient":
        rows[node] = not against
        if against or both:
            rows[index[node].long()] = True
        return rows
    if not against:
        rows |= (index == node).any(-1)
    if against or both:
        rows[index[node].long()] = True
    return rows


# ---- graph_layer


def _layer(make: Callable[[Sizes, Inputs], Inputs], exact: bool) -> Callable[[Sizes, Inputs], Inputs]:
    def layer(sizes: Sizes, options: Inputs) -> Inputs:
        inputs, random = make(sizes, {}), sizes.random(5)

        def vector() -> Tensor:
            return integers(random, -3, 3, sizes.channels) if exact else reals(random, sizes.channels)

        inputs["bias"] = vector()
        # small variances would magnify what is rounded
        more = {"norm_weight": vector(), "norm_bias": vector(), "eps": 0.25}
        return {**inputs, **(more if options["activation"] == "layer_norm" else {}), **options}

    return layer


def _scaled_layer(inputs: Inputs, factor: float) -> tuple[Inputs, float]:
    grown, _ = scaled_by("x", "bias")(inputs, factor)
    if inputs["activation"] != "layer_norm":
        return grown, factor
    return {**grown, "eps": inputs["eps"] * factor**2}, 1.0


# ---- edge_weight


def _weight(sizes: Sizes, options: Inputs) -> Inputs:
    random, index = sizes.random(), any_index(sizes)
    # kinks lie a quarter away from what integers reach
    source = integers(random, -3, 3, sizes.batch, sizes.nodes, sizes.channels).double() + 0.25
    target = integers(random, -3, 3, sizes.batch, sizes.nodes, sizes.channels).double()
    vector = reals(random, sizes.channels) / sizes.channels
    given = {"source": source, "target": target, "index": index, "vector": vector, "bias": reals(random, 1)}
    return {**given, "mask": torch.rand(index.shape, generator=random) < 0.8, **options}


def _exact_weight(sizes: Sizes, options: Inputs) -> Inputs:
    """Logits of 58 and more: there softplus is the logit itself, and its slope one."""
    random, index = sizes.random(), any_index(sizes)
    half = (sizes.batch, sizes.nodes, sizes.channels)
    return {
        "source": integers(random, -3, 3, *half),
        "target": integers(random, -3, 3, *half),
        "index": index,
        "vector": integers(random, -1, 1, sizes.channels),
        "bias": torch.tensor([256.0]),
        "mask": torch.rand(index.shape, generator=random) < 0.8,
        **options,
    }


def _scaled_weight(inputs: Inputs, factor: float) -> tuple[Inputs, float]:
    grown, _ = scaled_by("source", "target")(inputs, factor)
    return {**grown, "vector": inputs["vector"] / factor}, 1.0


def _weights_of(inputs: Inputs, name: str, sample: int, node: int) -> Tensor:
    """Weights that see a row of ``source``, or of ``target``, whatever is masked."""
    index = inputs["index"][sample]
    if name == "target":
        return index == node
    seen = torch.zeros(index.shape, dtype=torch.bool)
    seen[node] = True
    return seen


# ---- degree_normalize


def _degrees(sizes: Sizes, options: Inputs) -> Inputs:
    index = any_index(sizes)
    weight = 0.1 + torch.rand(index.shape, generator=sizes.random(), dtype=torch.float64)
    return {"weight": weight, "index": index, **options}


def _exact_degrees(sizes: Sizes, options: Inputs) -> Inputs:
    """Weights of a row add up to 1024, to which eps adds nothing and whose root is a power of two."""
    index = any_index(sizes)
    cut = torch.randint(0, 1025, (*index.shape[:2], sizes.slots - 1), generator=sizes.random()).sort(-1).values
    edge = torch.zeros(*index.shape[:2], 1)
    weight = torch.cat([edge, cut.float(), edge + 1024], -1).diff(dim=-1)
    return {"weight": weight, "index": index, **options}


def _scaled_degrees(inputs: Inputs, factor: float) -> tuple[Inputs, float]:
    # by the count of slots they follow the weights; otherwise weights are compared with each other alone
    grown = {**inputs, "weight": inputs["weight"] * factor, "eps": 1e-6 * factor}
    return grown, factor if inputs["norm"] == "sym_count" else 1.0


def _coefficients_of(weights: Tensor, index: Tensor, norm: str) -> Tensor:
    """Coefficients that see some weights (N, K)."""
    row, column = weights.any(-1), torch.zeros(len(index), dtype=torch.bool)
    column[index[weights].long()] = True
    none = torch.zeros_like(row)
    start, end = {
        "sym_row": (row, row),
        "sym_count": (none, none),
        "sym_inout": (row, column),
        "row": (row, none),
        "sym_undirected": (row | column, row | column),
    }[norm]
    return weights | start[:, None] | end[index.long()]


def _degrees_see(inputs: Inputs, name: str, sample: int, node: int) -> Tensor:
    index = inputs["index"][sample]
    return _coefficients_of(_weights_of(inputs, "source", sample, node), index, inputs["norm"])


# ---- edge_coefficient


def _coefficient(sizes: Sizes, options: Inputs) -> Inputs:
    inputs = _weight(sizes, options)
    # a row of padding alone has coefficients that are divided by eps
    inputs["mask"][..., 0] = True
    return inputs


def _exact_coefficient(sizes: Sizes, options: Inputs) -> Inputs:
    """Four weights of 36 and more whose sum is 256: the neighbours are two pairs of opposites."""
    pairs, width, random = max(1, sizes.nodes // 2), min(sizes.channels, 4), sizes.random()
    half = integers(random, -7, 7, sizes.batch, pairs, width)
    pair = torch.randint(0, pairs, (sizes.batch, 2 * pairs, 2, 1), generator=random)
    vector = 2.0 * integers(random, 0, 1, width) - 1
    return {
        "source": torch.full((sizes.batch, 2 * pairs, width), 8.0),
        "target": torch.stack([half, -half], 2).flatten(1, 2),
        "index": (2 * pair + torch.arange(2)).flatten(2).int(),
        "vector": vector,
        "bias": 64 - 8 * vector.sum().reshape(1),
        **options,
    }


def _coefficients_see(inputs: Inputs, name: str, sample: int, node: int) -> Tensor:
    weights = _weights_of(inputs, name, sample, node)
    return _coefficients_of(weights, inputs["index"][sample], inputs["norm"])


HALVES = ("source", "target", "vector", "bias")
BY_NORM = tuple({"norm": norm} for norm in NORMS)
LAYERS = tuple(
    {"activation": activation, "undirected": undirected}
    for activation in ("none", "relu", "layer_norm")
    for undirected in (False, True)
)
OPS = {
    op.name: op
    for op in (
        Op(
            "graph_propagate", _propagate, _exact_propagate, ("x", "coefficient"), ("x", "index", "coefficient"),
            ({"transpose": False}, {"transpose": True}), ({"transpose": False}, {"transpose": True}),
            scaled_by("x"), _reached,
        ),
        Op(
            "graph_layer", _layer(_propagate, False), _layer(_exact_propagate, True),
            ("x", "coefficient", "bias", "norm_weight", "norm_bias"), ("x", "index", "coefficient"),
            LAYERS, LAYERS[:4], _scaled_layer, _reached,
        ),
        Op(
            "edge_weight", _weight, _exact_weight, HALVES, ("source", "target", "index", "mask"),
            ({},), ({},), _scaled_weight, _weights_of,
        ),
        Op(
            "degree_normalize", _degrees, _exact_degrees, ("weight",), ("weight", "index"),
            BY_NORM, ({"norm": "sym_row"}, {"norm": "row"}), _scaled_degrees, _degrees_see,
        ),
        Op(
            "edge_coefficient", _coefficient, _exact_coefficient, HALVES, ("source", "target", "index", "mask"),
            BY_NORM, ({"norm": "sym_row"}, {"norm": "row"}, {"norm": "sym_count"}), _scaled_weight, _coefficients_see,
        ),
    )
}  # fmt: skip


def near(got: Tensor, right: Tensor, what: str) -> None:
    """Equal but for roundings, in parts of the largest number."""
    slack = 3e-5 if got.dtype == torch.float32 else 1e-10
    size = 1 + (float(right.abs().max()) if right.numel() else 0.0)
    off = float((got.double() - right.double()).abs().max()) if got.numel() else 0.0
    assert off <= slack * size, f"{what} is off by {off:.3g} of {size:.3g}"


def same(got: dict[str, Tensor], right: dict[str, Tensor], what: str) -> None:
    for name, value in right.items():
        assert torch.equal(got[name], value), f"{name} {what}"


# finds: degree_normalize's sym_row took the degree of the row for that of the neighbour
def permuted_nodes(op: Op, inputs: Inputs, call: Call, random: torch.Generator) -> None:
    """Nodes in another order give the rows in that order."""
    nodes = inputs["index"].shape[1]
    order = torch.randperm(nodes, generator=random)
    place = order.argsort()
    moved = {name: value[:, order] if name in op.batched else value for name, value in inputs.items()}
    moved["index"] = place[moved["index"].long()].int()
    with torch.no_grad():
        grad = integers(random, -2, 2, *call(**inputs).shape).to(inputs[op.differentiable[0]].dtype)
    right, got = op.run(inputs, call, grad), op.run(moved, call, grad[:, order])
    for name, value in right.items():
        rows = name == "output" or name.removeprefix("grad_") in op.batched
        near(got[name], value[:, order] if rows else value, f"{name} of permuted nodes")


# finds: the last slot of a row is left out of a sum
def permuted_slots(op: Op, inputs: Inputs, call: Call, random: torch.Generator) -> None:
    """The order of a row's slots does not matter."""
    slots = inputs["index"].shape[2]
    order = torch.randperm(slots, generator=random)
    edges = {name for name in ("index", "mask", "weight", "coefficient") if name in inputs}
    moved = {name: value[..., order] if name in edges else value for name, value in inputs.items()}
    with torch.no_grad():
        right = call(**inputs)
    per_edge = right.shape == inputs["index"].shape and op.name not in ("graph_propagate", "graph_layer")
    grad = integers(random, -2, 2, *right.shape).to(right.dtype)
    right, got = op.run(inputs, call, grad), op.run(moved, call, grad[..., order] if per_edge else grad)
    for name, value in right.items():
        there = per_edge if name == "output" else name.removeprefix("grad_") in edges
        near(got[name], value[..., order] if there else value, f"{name} of permuted slots")


# finds: edge_weight's bias joins before the scale of a vector
def scaled(op: Op, inputs: Inputs, call: Call, factor: float) -> None:
    """Powers of two change no digit."""
    grown, follows = op.scaled(inputs, factor)
    with torch.no_grad():
        assert torch.equal(call(**grown), follows * call(**inputs)), f"{op.name} depends on a scale"


# finds: a tie of sums, one slot of a block that is added twice
def exact_everywhere(op: Op, inputs: Inputs, call: Call, seed: int) -> None:
    """On small integers every backend has the reference's bits, forward and backward."""
    reference = getattr(ops, op.name)
    right = op.run(inputs, lambda **given: reference(**given, backend="reference"), seed=seed)
    got = op.run(inputs, call, seed=seed)
    # a sum of no terms may have either sign of zero
    same({n: v + 0 for n, v in got.items()}, {n: v + 0 for n, v in right.items()}, "is not exact on integers")


# finds: the second sample read the columns of the first
def isolated(op: Op, inputs: Inputs, call: Call, seed: int) -> None:
    """A sample alone has the bits that it has in a batch, and so has one without a batch's dimension."""
    with torch.no_grad():
        grad = integers(torch.Generator().manual_seed(seed), -2, 2, *call(**inputs).shape)
    grad = grad.to(inputs[op.differentiable[0]].dtype)
    whole = op.run(inputs, call, grad)
    for sample in range(len(grad)):
        for pick in (slice(sample, sample + 1), sample):
            alone = {name: value[pick] if name in op.batched else value for name, value in inputs.items()}
            got = op.run(alone, call, grad[pick])
            for name, value in whole.items():
                if name == "output" or name.removeprefix("grad_") in op.batched:
                    assert torch.equal(got[name], value[pick]), f"{name} depends on its batch"


# finds: the stride of the slots was that of a contiguous tensor
def any_layout(op: Op, inputs: Inputs, call: Call, layouts: list[str], seed: int, bits: bool) -> None:
    """Strides, offsets and expansion change nothing; to the kernels, no bit."""
    laid, plain = dict(inputs), dict(inputs)
    for name, layout in zip(op.batched, layouts, strict=False):
        if isinstance(inputs.get(name), Tensor):
            laid[name] = LAYOUTS[layout](inputs[name])
            plain[name] = laid[name].clone(memory_format=torch.contiguous_format)
    for name in {*op.differentiable} - {*op.batched}:
        if isinstance(inputs.get(name), Tensor):
            laid[name] = at_offset(inputs[name], OFFSET)
    with torch.no_grad():
        output = call(**plain)
    grad = LAYOUTS[layouts[-1]](integers(torch.Generator().manual_seed(seed), -2, 2, *output.shape).to(output.dtype))
    right = op.run(plain, call, grad.clone(memory_format=torch.contiguous_format))
    got = op.run(laid, call, grad)
    if bits:
        same(got, right, f"depends on the layouts {layouts}")
    for name, value in right.items():
        near(got[name], value, f"{name} in the layouts {layouts}")


# finds: a block of rows was left out as soon as one of them was not finite
def contained(op: Op, inputs: Inputs, call: Call, bad: list[tuple[int, int, float]], name: str) -> None:
    """Rows that are not finite show where they are read, and nowhere else."""
    with torch.no_grad():
        clean, spoilt = call(**inputs), {**inputs, name: inputs[name].clone()}
        seen, shows = torch.zeros(clean.shape, dtype=torch.bool), torch.zeros(clean.shape, dtype=torch.bool)
        for sample, node, value in bad:
            sample, node = sample % clean.shape[0], node % clean.shape[1]
            spoilt[name][sample, node] = value
            touched = op.seen_in(inputs, name, sample, node)
            touched = touched if touched.dim() == 2 else touched[:, None].expand(clean.shape[1:])
            seen[sample] |= touched
            # an infinite one may end as a zero
            if math.isnan(value):
                shows[sample] |= touched
        if inputs.get("mask") is not None:
            shows &= inputs["mask"]
            spoilt["mask"] = inputs["mask"]
        got = call(**spoilt)
    assert torch.equal(got[~seen], clean[~seen]), f"{name} that is not finite shows elsewhere"
    assert not got[shows].isfinite().any(), f"{name} that is not finite is hidden"


# finds: the gradient of sym_inout's columns had half of its size
def derivative(op: Op, inputs: Inputs, call: Call, random: torch.Generator) -> None:
    """The gradients are the slope of the output in any direction, and linear in what comes in: <J v, g> = <v, J' g>."""
    step = 1e-6
    names = [name for name in op.differentiable if inputs.get(name) is not None]
    along = {name: reals(random, *inputs[name].shape) for name in names}
    with torch.no_grad():
        ahead = call(**{**inputs, **{name: inputs[name] + step * along[name] for name in names}})
        behind = call(**{**inputs, **{name: inputs[name] - step * along[name] for name in names}})
    one, other = reals(random, *ahead.shape), reals(random, *ahead.shape)
    first, second = op.run(inputs, call, one), op.run(inputs, call, other)
    slope = (((ahead - behind) / (2 * step)) * one).sum()
    forward = sum((along[name] * first[f"grad_{name}"]).sum() for name in names)
    size = sum((along[name] * first[f"grad_{name}"]).abs().sum() for name in names) + one.abs().sum()
    assert abs(float(slope - forward)) <= 1e-6 * float(size), (
        f"the slope is {slope:.9g}, its gradients say {forward:.9g}"
    )
    both = op.run(inputs, call, one + 2 * other)
    for name in names:
        near(both[f"grad_{name}"], first[f"grad_{name}"] + 2 * second[f"grad_{name}"], f"grad_{name} of a sum")


# finds: grad_bias was made of the gradient of another call where only that was asked for
def wanted_gradients(op: Op, inputs: Inputs, call: Call, seed: int) -> None:
    """What alone is asked for has the bits of what all are, and nothing else gets a gradient."""
    everything = op.run(inputs, call, seed=seed)
    for name in op.differentiable:
        if inputs.get(name) is None:
            continue
        alone = {**inputs, name: inputs[name].detach().requires_grad_()}
        output = call(**alone)
        grad = integers(torch.Generator().manual_seed(seed), -2, 2, *output.shape).to(output.dtype)
        (got,) = torch.autograd.grad(output, alone[name], grad)
        assert torch.equal(got, everything[f"grad_{name}"]), f"grad_{name} depends on what else is asked for"
    assert not call(**inputs).requires_grad


# finds: a buffer that was not cleared between two calls
def repeats(op: Op, inputs: Inputs, call: Call, seed: int) -> None:
    """The same bits again, with any number of threads; and inputs are not written."""
    kept = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    threads, first = torch.get_num_threads(), op.run(inputs, call, seed=seed)
    try:
        for count in (1,) if INTERPRETED else (1, 2, 3):
            torch.set_num_threads(count)
            same(op.run(inputs, call, seed=seed), first, f"differs with {count} threads")
    finally:
        torch.set_num_threads(threads)
    same(inputs, kept, "was written")


# finds: the masked slot was counted in the degree
def padded(op: Op, inputs: Inputs, call: Call, random: torch.Generator, bits: bool) -> None:
    """What a padded slot names has no influence, on values or on gradients."""
    padding = torch.rand(inputs["index"].shape, generator=random) < 0.4
    if "mask" in op.batched:
        padding[..., 0] = False
        inputs = {**inputs, "mask": ~padding}
    else:
        name = "weight" if op.name == "degree_normalize" else "coefficient"
        inputs = {**inputs, name: inputs[name].masked_fill(padding, 0)}
    elsewhere = torch.randint(0, inputs["index"].shape[1], padding.shape, generator=random).int()
    moved = {**inputs, "index": torch.where(padding, elsewhere, inputs["index"])}
    with torch.no_grad():
        shape = call(**inputs).shape
    grad = integers(random, -2, 2, *shape).to(inputs[op.differentiable[0]].dtype)
    right, got = op.run(inputs, call, grad), op.run(moved, call, grad)
    per_edge = shape == padding.shape and op.name not in ("graph_propagate", "graph_layer")
    if per_edge:
        assert not right["output"][padding].any(), "a padded slot has a weight"
    for name, value in right.items():
        # a weight of zero is one like any other: what it would do if it grew depends on its end
        if name in ("grad_weight", "grad_coefficient"):
            continue
        if bits:
            assert torch.equal(got[name], value), f"{name} sees what padding names"
        else:
            near(got[name], value, f"{name} with padding that names others")


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _arriving(index: Tensor, value: Tensor) -> Tensor:
    """Sums (B, N) of the values of the edges that end in each node."""
    return torch.zeros(index.shape[:2], dtype=value.dtype).scatter_add(1, index.long().flatten(1), value.flatten(1))


def _of_equal_weights(index: Tensor, weight: float, norm: str) -> Tensor:
    """Coefficients (Eq. 9) where every edge weighs the same."""
    row = torch.full(index.shape[:2], weight * index.shape[2], dtype=torch.float64)
    column = _arriving(index, torch.full(index.shape, weight, dtype=torch.float64))
    if norm == "sym_count":
        return torch.full(index.shape, weight / index.shape[2], dtype=torch.float64)
    if norm == "row":
        return (weight / (row + 1e-6))[..., None].expand(index.shape)
    if norm == "sym_undirected":
        row = column = (row + column) / 2
    end = (row if norm == "sym_row" else column).gather(1, index.long().flatten(1)).view(index.shape)
    half = 0.5 if norm == "sym_undirected" else 1.0
    return half * weight / ((row + 1e-6)[..., None] * (end + 1e-6)).sqrt()


# finds: sym_inout with the degree of the wrong end, a bias that is added twice
def constants(op: Op, inputs: Inputs, call: Call, value: float) -> None:
    """The same number in every node gives what can be said by hand."""
    index, given = inputs["index"], dict(inputs)
    if op.name in ("graph_propagate", "graph_layer"):
        share = inputs["coefficient"].abs() + 0.1
        share = share / share.sum(-1, keepdim=True)
        given |= {"x": torch.full_like(inputs["x"], value), "coefficient": share}
        leaving, arriving = torch.ones(index.shape[:2]).to(share), _arriving(index, share)
        total = arriving if inputs.get("transpose") else leaving + arriving * bool(inputs.get("undirected"))
        right = value * total[..., None].expand_as(inputs["x"])
        if op.name == "graph_layer":
            given["bias"] = torch.full_like(inputs["bias"], 0.5)
            right = right + 0.5
            activation = inputs["activation"]
            if activation == "layer_norm":
                right = inputs["norm_bias"].expand_as(right)
            elif activation == "relu":
                right = right.relu()
    else:
        weight = abs(value) + 0.1
        if op.name == "degree_normalize":
            given["weight"] = torch.full_like(inputs["weight"], weight)
        else:
            halves = {name: torch.full_like(inputs[name], value) for name in ("source", "target")}
            given |= {**halves, "mask": None}
            active = max(2 * value, 0.0) * float(inputs["vector"].double().sum())
            weight = _softplus(active + float(inputs["bias"]))
        right = torch.full(index.shape, weight, dtype=torch.float64)
        if op.name != "edge_weight":
            right = _of_equal_weights(index, weight, inputs["norm"])
    with torch.no_grad():
        near(call(**given), right, f"{op.name} of constants")


# finds: the transpose left out the last edge of every node
def adjoint(inputs: Inputs, call: Call, random: torch.Generator) -> None:
    """<A x, y> = <x, A' y>, and A (2 x + z) = 2 A x + A z: on integers, bit for bit."""
    x, index, coefficient = inputs["x"], inputs["index"], inputs["coefficient"]
    y, z = integers(random, -3, 3, *x.shape), integers(random, -3, 3, *x.shape)
    ahead, back = (
        call(x=x, index=index, coefficient=coefficient, transpose=False),
        call(x=y, index=index, coefficient=coefficient, transpose=True),
    )
    assert (ahead.double() * y).sum() == (x.double() * back).sum()
    for transpose in (False, True):
        one, other, both = (
            call(x=value, index=index, coefficient=coefficient, transpose=transpose) for value in (x, z, 2 * x + z)
        )
        assert torch.equal(both, 2 * one + other)

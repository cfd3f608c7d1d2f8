# SPDX-License-Identifier: Apache-2.0
"""Properties of the ops on edges, for graphs of any size (``properties.py``).

The same few cases at every commit; ``make test-deep`` draws 2000 new ones for each property.
"""

from __future__ import annotations

import math

import properties
import pytest
import torch
from contract import LAYOUTS
from hypothesis import given
from hypothesis import strategies as st
from properties import OPS, SEEDS, SIZES, Op, few

from drseg_core import ops

DTYPES = (torch.float32, torch.float64)
BACKENDS = [
    (row["op"], row["backend"])
    for row in ops.backend_report()
    if row["op"] in OPS and row["device"] == "cpu" and row["available"]
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name,backend", BACKENDS)
    else:
        metafunc.parametrize("backend", [backend for name, backend in BACKENDS if name == "graph_propagate"])


def calls(op: Op, backend: str):
    def call(**inputs):
        output = getattr(ops, op.name)(**inputs, backend=backend)
        assert ops.last_backend(op.name) == backend
        return output

    return call


def drawn(data: st.DataObject, name: str, backend: str, dtypes: tuple[torch.dtype, ...] | None = None):
    """An op, inputs of it, and how it is called."""
    op, sizes = OPS[name], data.draw(SIZES)
    inputs = op.make(sizes, data.draw(st.sampled_from(op.options)))
    return op, op.with_dtype(inputs, data.draw(st.sampled_from(dtypes or DTYPES))), calls(op, backend)


def drawn_exact(data: st.DataObject, name: str, backend: str):
    op, sizes = OPS[name], data.draw(SIZES)
    return op, op.exact(sizes, data.draw(st.sampled_from(op.exact_options))), calls(op, backend)


@pytest.mark.promise("C6")
@few()
@given(data=st.data(), seed=SEEDS)
def test_the_order_of_nodes(name, backend, data, seed):
    properties.permuted_nodes(*drawn(data, name, backend), torch.Generator().manual_seed(seed))


@pytest.mark.promise("C6")
@few()
@given(data=st.data(), seed=SEEDS)
def test_the_order_of_slots(name, backend, data, seed):
    properties.permuted_slots(*drawn(data, name, backend), torch.Generator().manual_seed(seed))


@pytest.mark.promise("C6")
@few()
@given(data=st.data(), factor=st.sampled_from([0.0625, 0.25, 4.0, 64.0]))
def test_scale(name, backend, data, factor):
    properties.scaled(*drawn(data, name, backend), factor)


@pytest.mark.promise("C2")
@few()
@given(data=st.data(), seed=SEEDS)
def test_integers_are_exact(name, backend, data, seed):
    properties.exact_everywhere(*drawn_exact(data, name, backend), seed)


@pytest.mark.promise("C7")
@few()
@given(data=st.data(), seed=SEEDS)
def test_samples_are_alone(name, backend, data, seed):
    properties.isolated(*drawn(data, name, backend), seed)


@pytest.mark.promise("C13")
@few()
@given(data=st.data(), seed=SEEDS, layouts=st.lists(st.sampled_from(list(LAYOUTS)), min_size=5, max_size=5))
def test_layouts(name, backend, data, seed, layouts):
    # torch, in which the reference is written, sums what lies otherwise in another order
    properties.any_layout(*drawn(data, name, backend), layouts, seed, bits=backend != "reference")


BAD = st.tuples(st.integers(0, 2), st.integers(0, 40), st.sampled_from([math.nan, math.inf, -math.inf]))


@pytest.mark.promise("C11")
@few()
@given(data=st.data(), bad=st.lists(BAD, min_size=1, max_size=3))
def test_what_is_not_finite_stays_in_its_rows(name, backend, data, bad):
    op, inputs, call = drawn(data, name, backend)
    if inputs.get("activation") == "relu" or op.name in ("edge_weight", "degree_normalize", "edge_coefficient"):
        # infinities are ordinary numbers to relu and softplus
        bad = [(sample, node, math.nan) for sample, node, _ in bad]
    rows = [name for name in op.differentiable if name in op.batched]
    properties.contained(op, inputs, call, bad, data.draw(st.sampled_from(rows)))


@pytest.mark.promise("C3")
@few()
@given(data=st.data(), seed=SEEDS)
def test_gradients_are_slopes(name, backend, data, seed):
    properties.derivative(*drawn(data, name, backend, (torch.float64,)), torch.Generator().manual_seed(seed))


@pytest.mark.promise("C3")
@few()
@given(data=st.data(), seed=SEEDS)
def test_gradients_that_are_asked_for(name, backend, data, seed):
    properties.wanted_gradients(*drawn(data, name, backend), seed)


@pytest.mark.promise("C24", "C15")
@few()
@given(data=st.data(), seed=SEEDS)
def test_the_same_bits_again(name, backend, data, seed):
    properties.repeats(*drawn(data, name, backend), seed)


@pytest.mark.promise("C9")
@few()
@given(data=st.data(), seed=SEEDS)
def test_padding_has_no_influence(name, backend, data, seed):
    exact = name in ("edge_weight", "graph_propagate")
    op, inputs, call = (drawn_exact if exact else drawn)(data, name, backend)
    properties.padded(op, inputs, call, torch.Generator().manual_seed(seed), bits=exact)


@pytest.mark.promise("C6")
@few()
@given(data=st.data(), value=st.floats(-4, 4))
def test_constants(name, backend, data, value):
    properties.constants(*drawn(data, name, backend), value)


@pytest.mark.promise("C3")
@few(20)
@given(sizes=SIZES, seed=SEEDS)
def test_the_transpose_is_the_adjoint(backend, sizes, seed):
    op = OPS["graph_propagate"]
    properties.adjoint(op.exact(sizes, {}), calls(op, backend), torch.Generator().manual_seed(seed))

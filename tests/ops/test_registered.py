# SPDX-License-Identifier: Apache-2.0
"""What backends of others give is held to the shapes and dtypes of the op."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch
from fused import FUSED
from subjects import SUBJECTS
from torch import Tensor

from drseg_core import ops
from drseg_core.ops.graph_propagate import reference as propagate
from drseg_core.testing import CASES


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y, x: y[..., :1], "gave a wrong result; expected float32 (1, 4, 3), got float32 (1, 4, 1)"),
        (lambda y, x: y.double(), "gave a wrong result; expected float32 (1, 4, 3), got float64 (1, 4, 3)"),
        (
            lambda y, x: (y, y),
            "gave a wrong result; expected float32 (1, 4, 3), got float32 (1, 4, 3) and float32 (1, 4, 3)",
        ),
        (lambda y, x: None, "gave a wrong result; expected float32 (1, 4, 3), got NoneType"),
        (lambda y, x: x, "gave back its argument; expected a new tensor, got x"),
    ],
    ids=["shape", "dtype", "two", "nothing", "its argument"],
)
def test_a_stranger_that_breaks_its_word_is_named(registered, wrong, said):
    def run(x: Tensor, *others: Any) -> Any:
        return wrong(propagate.graph_propagate(x, *others), x)

    registered("graph_propagate", "odd", run, lambda device: None)
    x, index = torch.randn(1, 4, 3), torch.tensor([[[0], [2], [1], [3]]])
    for given in (x, x.clone().requires_grad_()):
        with pytest.raises(RuntimeError) as caught:
            ops.graph_propagate(given, index, torch.ones(1, 4, 1), backend="odd")
        assert str(caught.value) == f"graph_propagate: backend odd {said}"
        # ours are as ever
        assert ops.graph_propagate(given, index, torch.ones(1, 4, 1)).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_strangers_are_believed_in_every_op_that_they_do_as_its_reference(registered, dtype):
    broken: list[str] = []

    def as_reference(op: str, run: Any) -> Any:
        @functools.wraps(run)
        def runs(*arguments: Any) -> Any:
            found = run(*arguments)
            if op not in broken:
                return found
            return found[..., None] if isinstance(found, Tensor) else (found[0][..., None], *found[1:])

        return runs

    names = ("prepare_prior", "knn_graph", "csc", "edge_weight", "degree_normalize", "graph_propagate")
    for op in names:
        module = importlib.import_module(f"drseg_core.ops.{op}.reference")
        backward = getattr(module, f"{op}_backward", None)
        registered(op, "odd", as_reference(op, getattr(module, op)), lambda device: None, run_backward=backward)
    prior, index = torch.randn(1, 12, 8).to(dtype), torch.tensor([[[0], [2], [1], [3]]])
    calls = {
        "prepare_prior": lambda backend: ops.prepare_prior(prior, backend=backend)[:2],
        "knn_graph": lambda backend: ops.knn_graph(prior, (3, 4), 5, return_score=True, backend=backend),
        "csc": lambda backend: ops.csc(index, backend=backend),
    }
    for subject in (*SUBJECTS.values(), *FUSED.values()):
        inputs = subject.make_inputs(CASES[0], dtype)
        calls[subject.name] = functools.partial(
            lambda f, given, backend: (f(**given, backend=backend),), subject.function, inputs
        )
    for op, call_of in calls.items():
        assert all(map(torch.equal, call_of("odd"), call_of("reference"))), op
        assert ops.last_backend(op) == "reference"
    for op in names:
        broken[:] = [op]
        with pytest.raises(RuntimeError, match=f"^{op}: backend odd gave a wrong result; expected "):
            calls[op]("odd")

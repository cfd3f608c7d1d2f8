# SPDX-License-Identifier: Apache-2.0
"""The contract has teeth: faulty implementations, each of which some check must fail."""

from __future__ import annotations

from collections.abc import Callable

import contract
import pytest
import torch
from contract import ORDINARY, Call
from subjects import DEGREE_NORMALIZE, EDGE_WEIGHT, GRAPH_PROPAGATE, Subject
from torch import Tensor

from drseg_core import ops
from drseg_core.testing import CASES


class Straight(torch.autograd.Function):
    """Forward value from one function, gradients from another: a backward that does not belong to its forward."""

    @staticmethod
    def forward(ctx, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad


def wrong_gradient(op: Callable[..., Tensor], alter: Callable[[Tensor], Tensor]) -> Call:
    """The right output with the gradients of ``alter(output)``."""

    def call(**inputs):
        output = op(**inputs)
        return Straight.apply(output.detach(), alter(output))

    return call


def half_storage(**inputs) -> Tensor:
    return ops.graph_propagate(**{**inputs, "x": inputs["x"].bfloat16().to(inputs["x"].dtype)})


def drop_a_neighbour(**inputs) -> Tensor:
    return ops.graph_propagate(inputs["x"], inputs["index"][..., 1:], inputs["coefficient"][..., 1:])


def skip_the_tail(**inputs) -> Tensor:
    keep = torch.arange(inputs["x"].shape[2]) < 16
    return ops.graph_propagate(**inputs) * keep


def ignore_strides(**inputs) -> Tensor:
    x = inputs["x"]
    if not x.is_contiguous():
        x = torch.as_strided(x, x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1))
    return ops.graph_propagate(**{**inputs, "x": x})


def write_an_input(**inputs) -> Tensor:
    output = ops.graph_propagate(**inputs)
    inputs["x"].data.mul_(1.5)  # as a kernel does: the version counter does not see it
    return output


def depend_on_the_batch(**inputs) -> Tensor:
    return (
        ops.graph_propagate(**inputs) * inputs["x"].shape[0]
        if inputs["x"].dim() == 3
        else ops.graph_propagate(**inputs)
    )


def leave_a_hole(**inputs) -> Tensor:
    output = ops.graph_propagate(**inputs)
    hole = torch.empty_like(output)
    return torch.where(torch.arange(output.shape[-1]) == 3, hole, output)


_calls = 0


def change_from_run_to_run(**inputs) -> Tensor:
    global _calls
    _calls += 1
    return ops.graph_propagate(**inputs) * (1 + 1e-7 * (_calls % 2))


def float32_affine(**inputs) -> Tensor:
    return ops.graph_propagate(**inputs) + 1e-6


def softplus_linear_late(**inputs) -> Tensor:
    weight = ops.edge_weight(**inputs)
    return torch.where(weight > 1, weight + 1e-5, weight)


def mask_forgotten(**inputs) -> Tensor:
    return ops.edge_weight(**{**inputs, "mask": None})


def degree_of_the_column(**inputs) -> Tensor:
    return ops.degree_normalize(inputs["weight"], inputs["index"], norm="sym_inout")


def degree_without_eps(**inputs) -> Tensor:
    return ops.degree_normalize(**inputs, eps=1e-18)


def normalise_twice(**inputs) -> Tensor:
    return ops.degree_normalize(ops.degree_normalize(**inputs), inputs["index"])


def _oracle(subject: Subject, call: Call, case=ORDINARY) -> None:
    contract.check_oracle(subject, subject.make_inputs(case, torch.float32), call)


SATURATED = next(case for case in CASES if case.saturated)
PROPAGATE, EDGE, DEGREE = ops.graph_propagate, ops.edge_weight, ops.degree_normalize

FAULTS: dict[str, Callable[[], None]] = {
    "features stored in bf16": lambda: _oracle(GRAPH_PROPAGATE, half_storage),
    "one neighbour dropped": lambda: _oracle(GRAPH_PROPAGATE, drop_a_neighbour),
    "channel tail skipped": lambda: _oracle(GRAPH_PROPAGATE, skip_the_tail),
    "constant added": lambda: _oracle(GRAPH_PROPAGATE, float32_affine),
    "gradient negated": lambda: _oracle(GRAPH_PROPAGATE, wrong_gradient(PROPAGATE, lambda y: -y)),
    "gradient halved": lambda: _oracle(GRAPH_PROPAGATE, wrong_gradient(PROPAGATE, lambda y: y / 2)),
    "gradient off by 1e-4": lambda: _oracle(GRAPH_PROPAGATE, wrong_gradient(PROPAGATE, lambda y: y * 1.0001)),
    "edge gradient off by 1e-4": lambda: _oracle(EDGE_WEIGHT, wrong_gradient(EDGE, lambda y: y * 1.0001)),
    "mask forgotten": lambda: _oracle(EDGE_WEIGHT, mask_forgotten),
    "softplus slightly off": lambda: _oracle(EDGE_WEIGHT, softplus_linear_late),
    "degree gradient missing": lambda: _oracle(
        DEGREE_NORMALIZE, lambda **i: DEGREE(**i).detach() / i["weight"].detach() * i["weight"]
    ),
    "degree from the column": lambda: _oracle(DEGREE_NORMALIZE, degree_of_the_column),
    "degree without eps": lambda: _oracle(DEGREE_NORMALIZE, degree_without_eps, SATURATED),
    "normalised twice": lambda: _oracle(DEGREE_NORMALIZE, normalise_twice),
    "strides ignored": lambda: contract.check_layout(
        GRAPH_PROPAGATE, GRAPH_PROPAGATE.make_inputs(ORDINARY), ignore_strides, "transposed", "contiguous"
    ),
    "input written": lambda: contract.check_not_written(
        GRAPH_PROPAGATE, GRAPH_PROPAGATE.make_inputs(ORDINARY), write_an_input
    ),
    "batch dependent": lambda: contract.check_batch(
        GRAPH_PROPAGATE, GRAPH_PROPAGATE.make_inputs(ORDINARY), depend_on_the_batch
    ),
    "output not written": lambda: contract.check_poisoned(
        GRAPH_PROPAGATE, GRAPH_PROPAGATE.make_inputs(ORDINARY), leave_a_hole
    ),
    "differs between runs": lambda: contract.check_repeats(
        GRAPH_PROPAGATE, GRAPH_PROPAGATE.make_inputs(ORDINARY), change_from_run_to_run
    ),
    "backward not linear": lambda: contract.check_linear_backward(
        GRAPH_PROPAGATE, GRAPH_PROPAGATE.make_inputs(ORDINARY), wrong_gradient(PROPAGATE, lambda y: _bent(y))
    ),
}


class _Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad + 1e-3


def _bent(value: Tensor) -> Tensor:
    return _Bent.apply(value)


@pytest.mark.promise("C40", "C42")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail(fault):
    with pytest.raises(AssertionError):
        FAULTS[fault]()


@pytest.mark.promise("C40")
@pytest.mark.parametrize("subject", [GRAPH_PROPAGATE, EDGE_WEIGHT, DEGREE_NORMALIZE], ids=lambda s: s.name)
def test_the_right_implementation_passes_the_same_checks(subject):
    inputs = subject.make_inputs(ORDINARY)
    for check in (
        contract.check_oracle,
        contract.check_not_written,
        contract.check_batch,
        contract.check_poisoned,
        contract.check_repeats,
        contract.check_linear_backward,
    ):
        check(subject, inputs, subject.function)

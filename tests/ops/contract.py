# SPDX-License-Identifier: Apache-2.0
"""What every backend of every differentiable op must pass; ``test_knn_graph.py`` holds the selection to its own.

A test class sets ``subject`` and inherits all checks, for every backend that can run here. The checks take ``call`` so
that planted faults can be run through them (``test_contract.py``): a check that no fault fails would prove nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import Inputs, Subject
from torch import Tensor

from drseg_core import ops
from drseg_core.testing import CASES, Case, numerics

Call = Callable[..., Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SMALL = tuple(case for case in CASES if not case.large)
ORDINARY = next(case for case in CASES if case.name == "odd_37_nodes")


def with_one_variant(test: Callable[..., None]) -> Callable[..., None]:
    """A check that runs with the first of its subject's variants alone, and with all of them on a device."""
    test.with_one_variant = True  # type: ignore[attr-defined]
    return test


def leaves(subject: Subject, inputs: Inputs) -> Inputs:
    """The same inputs, those that get a gradient as leaves."""
    return {
        name: value.detach().requires_grad_() if name in subject.differentiable else value
        for name, value in inputs.items()
    }


def output_gradient(output: Tensor, seed: int = 7) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=random, dtype=torch.float64).to(output)


def run(subject: Subject, inputs: Inputs, call: Call, grad: Tensor | None = None) -> dict[str, Tensor]:
    """The output and every gradient."""
    inputs = leaves(subject, inputs)
    output = call(**inputs)
    grad = output_gradient(output) if grad is None else grad
    grads = torch.autograd.grad(output, [inputs[name] for name in subject.differentiable], grad)
    named = {f"grad_{name}": value for name, value in zip(subject.differentiable, grads, strict=True)}
    return {"output": output.detach(), **named, "given": grad}


def compare(subject: Subject, inputs: Inputs, got: dict[str, Tensor]) -> None:
    expected = subject.oracle(inputs, got["given"])
    for name, (value, limit) in expected.items():
        # a gradient of a half-precision input may leave its range
        value = torch.where(value.abs() > torch.finfo(got[name].dtype).max, value.sign() * torch.inf, value)
        result = numerics.compare_values(got[name], value, limit)
        assert result.problem is None, f"{subject.name} {name}: {result.problem}"


def check_oracle(subject: Subject, inputs: Inputs, call: Call) -> None:
    """Output and gradients agree with the float64 oracle; dtypes and shapes are as documented; nothing is vacuous."""
    got = run(subject, inputs, call)
    first = inputs[subject.differentiable[0]]
    assert got["output"].dtype == subject.output_dtype(first.dtype)
    assert got["output"].is_contiguous() and got["output"].abs().sum() > 0
    for name in subject.differentiable:
        assert got[f"grad_{name}"].dtype == inputs[name].dtype
        assert got[f"grad_{name}"].shape == inputs[name].shape
    compare(subject, inputs, got)


def _padded(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A buffer whose unused part gives itself away: NaN, or an index far out of range."""
    if value.dtype == torch.bool:
        return torch.ones(shape, dtype=value.dtype)
    return torch.full(shape, torch.nan if value.is_floating_point() else 0x7F7F7F7F, dtype=value.dtype)


def _every_second(value: Tensor) -> Tensor:
    view = _padded(value, (*value.shape[:-1], 2 * value.shape[-1]))[..., ::2]
    return view.copy_(value)


def at_offset(value: Tensor, offset: int) -> Tensor:
    """The same values in a view that starts ``offset`` elements into its storage."""
    buffer = _padded(value, (value.numel() + 16,))
    return buffer[offset : offset + value.numel()].view(value.shape).copy_(value)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "outer_transposed": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every_second": _every_second,
    "expanded_row": lambda t: t[:, :1].expand(t.shape),
    "expanded_batch": lambda t: t[:1].expand(t.shape),
    "offset": lambda t: at_offset(t, 1),
}


def check_layout(subject: Subject, inputs: Inputs, call: Call, layout: str, grad_layout: str) -> None:
    """Strides, offsets and expansions of inputs and of the incoming gradient change nothing."""
    laid = dict(inputs)
    for name in subject.node_inputs:
        laid[name] = LAYOUTS[layout](inputs[name])
    with torch.no_grad():
        grad = LAYOUTS[grad_layout](output_gradient(call(**laid)))
    compare(subject, laid, run(subject, laid, call, grad))


def check_not_written(subject: Subject, inputs: Inputs, call: Call) -> None:
    """Inputs and incoming gradients keep their bytes."""
    copies = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    given = leaves(subject, inputs)
    output = call(**given)
    grad = output_gradient(output)
    kept = grad.clone()
    torch.autograd.grad(output, [given[name] for name in subject.differentiable], grad)
    for name, copy in copies.items():
        assert torch.equal(inputs[name], copy), f"{subject.name} wrote into {name}"
    assert torch.equal(grad, kept), f"{subject.name} wrote into the incoming gradient"


def check_repeats(subject: Subject, inputs: Inputs, call: Call, times: int = 20) -> None:
    """The same bits every time, whatever the number of threads."""
    first = run(subject, inputs, call)
    threads = torch.get_num_threads()
    try:
        for count in range(times):
            torch.set_num_threads(1 + count % 3)
            again = run(subject, inputs, call)
            for name, value in first.items():
                assert torch.equal(value, again[name]), f"{subject.name} {name} differs between runs"
    finally:
        torch.set_num_threads(threads)


def check_batch(subject: Subject, inputs: Inputs, call: Call) -> None:
    """A sample's result does not depend on the others, and the unbatched form is the batched one."""
    whole = run(subject, inputs, call)
    for b in range(whole["output"].shape[0]):
        for pick in (slice(b, b + 1), b):
            one = {n: v[pick] if n in subject.node_inputs and v is not None else v for n, v in inputs.items()}
            got = run(subject, one, call, whole["given"][pick])
            for name in ("output", *(f"grad_{n}" for n in subject.differentiable if n in subject.node_inputs)):
                assert torch.equal(got[name], whole[name][pick]), f"{subject.name} {name} depends on its batch"


def check_linear_backward(subject: Subject, inputs: Inputs, call: Call) -> None:
    """Twice the gradient gives exactly twice the gradients, none gives none."""
    once = run(subject, inputs, call)
    twice = run(subject, inputs, call, 2 * once["given"])
    none = run(subject, inputs, call, torch.zeros_like(once["given"]))
    for name in (f"grad_{n}" for n in subject.differentiable):
        assert torch.equal(twice[name], 2 * once[name]), f"{subject.name} {name} is not linear"
        assert not none[name].any(), f"{subject.name} {name} appears from nothing"


def check_lattice(subject: Subject, inputs: Inputs, call: Call) -> None:
    """Small integers are exact in every dtype and order of summation, so the result must be too."""
    got = run(subject, inputs, call, torch.ones_like(call(**inputs)))
    for name, (value, _) in subject.oracle(inputs, got["given"]).items():
        assert torch.equal(got[name].double(), value), f"{subject.name} {name} is not exact on integers"


def check_poisoned(subject: Subject, inputs: Inputs, call: Call) -> None:
    """Every byte of every result is written: allocations that start as NaN do not show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    try:
        compare(subject, inputs, run(subject, inputs, call))
    finally:
        torch.use_deterministic_algorithms(False)


def empty_inputs(subject: Subject, axis: str) -> Inputs:
    """Inputs in which one size is zero: ``B``, ``N``, ``K`` or ``C``."""
    inputs = subject.make_inputs(ORDINARY, torch.float32)
    for name in subject.node_inputs:
        value = inputs[name]
        edges = name in ("index", "mask", "exponent", "coefficient", "weight")
        size = list(value.shape)
        if axis == "B":
            size[0] = 0
        elif axis == "N":
            size[1] = 0
        elif axis == "K" and edges or axis == "C" and not edges:
            size[2] = 0
        inputs[name] = value.new_zeros(size) if size != list(value.shape) else value
    if axis == "C" and "vector" in inputs:
        inputs["vector"] = inputs["vector"].new_empty(0)
    return inputs


class OpContract:
    """Inherit, set ``subject``, and every check runs for every backend."""

    subject: Subject
    device = "cpu"

    @pytest.fixture
    def call(self, backend: str) -> Call:
        def call(**inputs: Any) -> Tensor:
            output = self.subject.function(**inputs, backend=backend)
            assert ops.last_backend(self.subject.name) == backend
            return output

        return call

    def inputs(self, variant: dict[str, Any], case: Case = ORDINARY, dtype: torch.dtype = torch.float32) -> Inputs:
        return {**self.subject.make_inputs(case, dtype), **variant}

    @pytest.mark.promise("C1", "C17")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
    def test_agrees_with_the_oracle(self, case, dtype, variant, call):
        check_oracle(self.subject, self.inputs(variant, case, dtype), call)

    @pytest.mark.promise("C1")
    def test_agrees_at_the_paper_size(self, variant, call):
        case = next(case for case in CASES if case.name == "paper_vitl_24x24")
        check_oracle(self.subject, self.inputs(variant, case), call)

    @pytest.mark.promise("C13")
    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    def test_layouts(self, dtype, call):
        inputs = self.inputs(self.subject.variants[0], dtype=dtype)
        for layout, grad_layout in itertools.product(LAYOUTS, LAYOUTS):
            check_layout(self.subject, inputs, call, layout, grad_layout)

    @pytest.mark.promise("C13")
    def test_storage_offsets(self, variant, call):
        inputs = self.inputs(variant)
        for offset in (0, 1, 2, 3, 5, 7, 8):
            moved = {n: at_offset(v, offset) if n in self.subject.node_inputs else v for n, v in inputs.items()}
            compare(self.subject, moved, run(self.subject, moved, call))

    @pytest.mark.promise("C15")
    def test_inputs_are_not_written(self, variant, call):
        check_not_written(self.subject, self.inputs(variant), call)

    @pytest.mark.promise("C24")
    def test_same_bits_for_any_threads(self, variant, call):
        check_repeats(self.subject, self.inputs(variant), call)

    @pytest.mark.promise("C7")
    def test_samples_are_independent(self, variant, call):
        check_batch(self.subject, self.inputs(variant), call)

    @pytest.mark.promise("C3")
    def test_backward_is_linear(self, variant, call):
        check_linear_backward(self.subject, self.inputs(variant), call)

    @pytest.mark.promise("C15")
    def test_poisoned_allocations(self, variant, call):
        check_poisoned(self.subject, self.inputs(variant), call)

    @pytest.mark.promise("C14")
    @pytest.mark.parametrize("axis", ["B", "N", "K", "C"])
    def test_empty(self, axis, variant, call):
        inputs = {**empty_inputs(self.subject, axis), **variant}
        given = leaves(self.subject, inputs)
        output = call(**given)
        grads = torch.autograd.grad(output.sum(), [given[name] for name in self.subject.differentiable])
        for name, grad in zip(self.subject.differentiable, grads, strict=True):
            assert grad.shape == inputs[name].shape and not grad.isnan().any()
        if axis == "K" and self.subject.name == "graph_propagate":
            assert output.shape == inputs["x"].shape and not output.any()
        compare(self.subject, self.inputs(variant), run(self.subject, self.inputs(variant), call))

    def test_int64_index_and_clamping(self, variant, call):
        inputs = self.inputs(variant)
        expected = call(**inputs)
        assert torch.equal(call(**{**inputs, "index": inputs["index"].long()}), expected)
        nodes = inputs["index"].shape[1]
        wild = torch.where(inputs["index"] == nodes - 1, 2**31 - 1, inputs["index"])
        wild = torch.where(wild == 0, -5, wild)
        assert torch.equal(call(**{**inputs, "index": wild}), expected)

    def test_known_columns_change_nothing(self, variant, call):
        inputs = self.inputs(variant)
        expected = run(self.subject, inputs, call)
        known = ops.csc(inputs["index"])
        strided = tuple(torch.stack((value.long(), torch.zeros_like(value).long()), 1)[:, 0] for value in known)
        for csc in (known, strided):
            got = run(self.subject, {**inputs, "csc": csc}, call, expected["given"])
            for name, value in expected.items():
                assert torch.equal(got[name], value), f"{self.subject.name} {name} differs with its columns given"

    @pytest.mark.promise("C3")
    def test_gradcheck(self, variant, backend):
        tiny = next(case for case in CASES if case.name == "tiny_3x4")
        for seed in range(3):
            inputs = {**self.subject.make_inputs(tiny, torch.float64, seed=seed), **variant}
            given = leaves(self.subject, inputs)

            def function(*tensors: Tensor, given: Inputs = given) -> Tensor:
                named = dict(zip(self.subject.differentiable, tensors, strict=True))
                return self.subject.function(**{**given, **named}, backend=backend)

            assert torch.autograd.gradcheck(function, [given[n] for n in self.subject.differentiable], fast_mode=False)

    @pytest.mark.promise("C16")
    def test_double_backward_is_refused(self, variant, call):
        given = leaves(self.subject, self.inputs(variant))
        name = self.subject.differentiable[0]
        (grad,) = torch.autograd.grad(call(**given).square().sum(), given[name], create_graph=True)
        with pytest.raises(RuntimeError, match="not twice differentiable"):
            grad.sum().backward()
        compare(self.subject, self.inputs(variant), run(self.subject, self.inputs(variant), call))

    @pytest.mark.promise("C15")
    def test_editing_a_saved_input_is_refused(self, variant, call):
        inputs = {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in self.inputs(variant).items()}
        given = leaves(self.subject, inputs)
        copies = {n: v * 1 if n in self.subject.differentiable else v for n, v in given.items()}
        output = call(**copies)
        copies[self.subject.differentiable[-1]].add_(1)
        if self.subject.name == "edge_weight":
            copies["source"].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    @pytest.mark.promise("C3")
    def test_only_needed_gradients(self, variant, call):
        inputs = self.inputs(variant)
        everything = run(self.subject, inputs, call)
        for name in self.subject.differentiable:
            alone = {**inputs, name: inputs[name].detach().requires_grad_()}
            output = call(**alone)
            (grad,) = torch.autograd.grad(output, alone[name], everything["given"])
            assert torch.equal(grad, everything[f"grad_{name}"])

    # a variant is a constant to the compiler; that each has its schema and its fake, opcheck tells
    @pytest.mark.promise("C21")
    @with_one_variant
    def test_compiles_without_a_break(self, variant, call, backend):
        torch.compiler.reset()
        given = leaves(self.subject, self.inputs(variant))

        def function(inputs: Inputs) -> Tensor:
            return self.subject.function(**inputs, backend=backend) * 2

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(given), function(given))
        grad = torch.autograd.grad(compiled(given).sum(), given[self.subject.differentiable[0]])[0]
        assert torch.equal(grad, torch.autograd.grad(function(given).sum(), given[self.subject.differentiable[0]])[0])

    @pytest.mark.promise("C4")
    def test_autocast_keeps_full_precision(self, variant, call):
        inputs = self.inputs(variant)
        expected = run(self.subject, inputs, call)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(self.subject, inputs, call, expected["given"])
        for name, value in expected.items():
            assert torch.equal(got[name], value)

    @pytest.mark.promise("C4")
    def test_matmul_precision_setting_changes_nothing(self, variant, call):
        expected = run(self.subject, self.inputs(variant), call)
        torch.set_float32_matmul_precision("medium")
        try:
            got = run(self.subject, self.inputs(variant), call)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")
        for name, value in expected.items():
            assert torch.equal(got[name], value)

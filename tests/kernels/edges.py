# SPDX-License-Identifier: Apache-2.0
"""The contract of the ops on edges, run on their Triton kernels.

Interpreted or compiled is decided when Triton is imported: with ``TRITON_INTERPRET=1`` the tensors stay on the CPU,
without it they are computed on a CUDA device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import LAYOUTS, ORDINARY, Call, Inputs, OpContract, check_layout, check_repeats, compare, run
from subjects import Subject
from torch import Tensor
from torch.library import opcheck

from drseg_core import ops
from drseg_core.errors import BackendDtypeError
from drseg_core.testing import CASES, Case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TINY = next(case for case in CASES if case.name == "tiny_3x4")


class Noted:
    """A kernel that notes its name in a list whenever it is launched."""

    def __init__(self, name: str, kernel: Any, seen: list[str]) -> None:
        self._name, self._kernel, self._seen = name, kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        self._seen.append(self._name)
        return self._kernel[grid]


def launches_of(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> list[str]:
    """A list that fills with the names of the modules' kernels, in the order of their launches."""
    seen: list[str] = []
    for module in modules:
        for name in [name for name in vars(module) if "_kernel" in name]:
            monkeypatch.setattr(module, name, Noted(name, getattr(module, name), seen))
    return seen


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function for tensors of the CPU, computed on the device."""

    def moved(value: Any, to: str) -> Any:
        if isinstance(value, tuple):
            parts = [moved(part, to) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value.to(to) if isinstance(value, Tensor) else value

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        result = function(
            *(moved(value, DEVICE) for value in args), **{name: moved(value, DEVICE) for name, value in options.items()}
        )
        return moved(result, "cpu")

    return call


def on_kernels(subject: Subject) -> Subject:
    return dataclasses.replace(subject, function=on_device(subject.function))


class KernelContract(OpContract):
    """The contract on the kernels ``which``; what asks for float64 is left out."""

    test_gradcheck = None
    device = DEVICE
    which = "triton"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    @pytest.fixture(autouse=True)
    def leave_out(self, request: pytest.FixtureRequest) -> None:
        if not INTERPRETED and not request.config.getoption("--gpu"):
            pytest.fail("set TRITON_INTERPRET=1, or pass --gpu")
        given = getattr(getattr(request.node, "callspec", None), "params", {})
        if given.get("dtype", torch.float32) not in self.dtypes:
            pytest.skip(f"the kernels leave {given['dtype']} to other backends")
        if INTERPRETED and given.get("dtype") == torch.bfloat16 and "oracle" in request.node.name:
            pytest.skip("the interpreter cuts the last digit of bfloat16 off")

    def inputs(self, variant: dict[str, Any], case: Case | None = None, dtype: torch.dtype = torch.float32) -> Inputs:
        # the interpreter takes a millisecond per node
        return super().inputs(variant, case or (TINY if INTERPRETED else ORDINARY), dtype)

    @pytest.mark.promise("C1")
    def test_agrees_at_the_paper_size(self, variant, call):
        if INTERPRETED:
            pytest.skip("too large for the interpreter")
        super().test_agrees_at_the_paper_size(variant, call)

    @pytest.mark.promise("C13")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_layouts(self, dtype, call):
        if INTERPRETED and dtype != torch.float32:
            pytest.skip("the launcher lays out every dtype in the same way")
        inputs = self.inputs(self.subject.variants[0], dtype=dtype)
        # the launcher lays each operand out by itself: the interpreter meets every layout of each once
        pairs = zip(LAYOUTS, LAYOUTS, strict=True) if INTERPRETED else itertools.product(LAYOUTS, LAYOUTS)
        for layout, grad_layout in [*pairs, ("transposed", "contiguous"), ("contiguous", "transposed")]:
            check_layout(self.subject, inputs, call, layout, grad_layout)

    @pytest.mark.promise("C13")
    def test_a_lazy_negative_is_negative(self, variant, call):
        inputs, name = self.inputs(variant), self.subject.differentiable[0]
        lazy = torch._neg_view(-inputs[name])
        assert lazy.is_neg() and torch.equal(call(**{**inputs, name: lazy}), call(**inputs))

    @pytest.mark.promise("C24")
    def test_same_bits_for_any_threads(self, variant, call):
        check_repeats(self.subject, self.inputs(variant), call, times=2 if INTERPRETED else 250)

    def test_float64_is_refused_by_name_and_left_to_others(self, variant):
        inputs = {**self.subject.make_inputs(TINY, torch.float64), **variant}
        for name in self.subject.differentiable:
            mixed = {**self.subject.make_inputs(TINY, torch.float32), **variant, name: inputs[name]}
            with pytest.raises(BackendDtypeError, match=f"expected one of {', '.join(map(str, self.dtypes))}, got"):
                self.subject.function(**mixed, backend=self.which)
        getattr(ops, self.subject.name)(**inputs)
        assert ops.last_backend(self.subject.name) != self.which

    @pytest.mark.promise("C21")
    def test_opcheck(self, variant):
        inputs = {**self.subject.make_inputs(TINY, torch.float32), **variant}
        given = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in self.subject.registered(inputs)]
        first = self.subject.differentiable[0]
        position = next(n for n, value in enumerate(self.subject.registered(inputs)) if value is inputs[first])
        given[position] = given[position].requires_grad_()
        given = [self.which if isinstance(value, str) and value == "auto" else value for value in given]
        opcheck(getattr(torch.ops.drseg, self.subject.name).default, tuple(given))


def check_sizes(subject: Subject, inputs: Inputs, call: Call) -> None:
    """Output and gradients agree with the oracle, and a second run gives the same bits."""
    got = run(subject, inputs, call)
    compare(subject, inputs, got)
    again = run(subject, inputs, call)
    for name, value in got.items():
        assert torch.equal(value, again[name]), f"{subject.name} {name} differs between runs"


def crowded_index(batch: int, nodes: int, slots: int, seed: int = 0) -> Tensor:
    """Neighbours of every kind: repeated within a row, one that all rows choose, and nodes that no row chooses."""
    random = torch.Generator().manual_seed(seed)
    index = torch.randint(0, max(1, nodes - nodes // 3), (batch, nodes, slots), generator=random)
    index[:, :, 0] = 0
    if slots > 2:
        index[:, ::2, 2] = index[:, ::2, 1]
    return index.int()


def layer_inputs(
    activation: str, nodes: int, slots: int, channels: int, dtype: torch.dtype = torch.float32, batch: int = 2
) -> dict[str, Any]:
    """Inputs of ``graph_layer`` at any size: repeated neighbours in some rows, normal features."""
    random = torch.Generator().manual_seed(nodes * slots + channels)
    bias, norm_weight, norm_bias = torch.randn(3, channels, generator=random)
    inputs = {
        "x": torch.randn(batch, nodes, channels, generator=random).to(dtype),
        "index": crowded_index(batch, nodes, slots),
        # of both signs: sums that cancel show what is lost on the way
        "coefficient": torch.randn(batch, nodes, slots, generator=random),
        "bias": bias,
        "activation": activation,
    }
    if activation == "layer_norm":
        inputs |= {"norm_weight": 1 + 0.3 * norm_weight, "norm_bias": norm_bias}
    return inputs


def within_padding(value: Tensor, padding: float) -> tuple[Tensor, Tensor]:
    """A larger buffer full of ``padding``, and a view into it that holds ``value``."""
    wide = torch.full((value.numel() + 64,), padding, dtype=value.dtype, device=DEVICE)
    inner = wide[32 : 32 + value.numel()].view(value.shape)
    inner.copy_(value)
    return wide, inner

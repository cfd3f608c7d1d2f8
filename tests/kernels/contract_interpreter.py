# SPDX-License-Identifier: Apache-2.0
"""What the interpreter does at once here is what it does its own way: values, kinds and shapes."""

from __future__ import annotations

import itertools
import os
from typing import Any

import interpreter_arithmetic
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("is of the interpreter alone", allow_module_level=True)

KINDS = {
    "fp32": (tl.float32, np.float32),
    "fp64": (tl.float64, np.float64),
    "fp16": (tl.float16, np.float16),
    "int32": (tl.int32, np.int32),
    "int64": (tl.int64, np.int64),
    "int1": (tl.int1, np.bool_),
}
SHAPES = {"number": (), "column": (4, 1), "row": (1, 8), "block": (4, 8), "line": (8,)}
SPECIAL = (0.0, -0.0, 1.5, float("inf"), float("-inf"), float("nan"), 3e38, 1e-40)
METHODS = (*interpreter_arithmetic.ARITHMETIC, *interpreter_arithmetic.COMPARISONS, *interpreter_arithmetic.BITS)


@triton.jit
def _nothing():
    pass


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    """The first launch of a process replaces the language."""
    _nothing[(1,)]()


def made(kind: str, shape: str, seed: int) -> Any:
    random = np.random.default_rng(seed)
    dtype, of = KINDS[kind]
    sizes = SHAPES[shape]
    whole = random.integers(-3, 4, sizes or (1,)) if dtype.is_int() else random.choice(SPECIAL, sizes or (1,))
    handle = interpreter.TensorHandle(np.asarray(whole).astype(of), dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(sizes)) if sizes else dtype)


def same(at_once: Any, own: Any) -> None:
    assert at_once.type == own.type and at_once.dtype == own.dtype and at_once.type.is_block() == own.type.is_block()
    left, right = at_once.handle.data, own.handle.data
    assert left.dtype == right.dtype and np.array_equal(
        np.broadcast_to(left, right.shape), right, equal_nan=left.dtype.kind == "f"
    )
    if left.dtype.kind == "f":
        assert np.array_equal(np.signbit(left), np.signbit(right)) or np.isnan(left).any()
    assert (left.size == 1 or left.shape == right.shape) and at_once.handle.dtype == own.handle.dtype


def both(name: str, *arguments: Any) -> None:
    """Both ways give the same, or refuse."""
    place = tl if name in ("where", "load", "sort") else tl.tensor
    try:
        own = interpreter_arithmetic.OWN[name](*arguments)
    except Exception as error:
        with pytest.raises(type(error)):
            getattr(place, name)(*arguments)
        return
    same(getattr(place, name)(*arguments), own)


@pytest.mark.parametrize("name", METHODS)
@np.errstate(all="ignore")
def test_arithmetic(name):
    kinds = ("fp32", "fp64", "fp16", "int32", "int64", "int1")
    for left, right in itertools.product(kinds, kinds):
        for one, two in itertools.product(SHAPES, SHAPES):
            if "line" not in (one, two) or one == two:
                both(f"__{name}__", made(left, one, 1), made(right, two, 2))


@pytest.mark.parametrize(
    "number", [0, 1, -2, 2**31 - 1, 2**40, 0.0, -0.0, 0.1, 1e300, float("inf"), float("nan"), True], ids=repr
)
@np.errstate(all="ignore")
def test_numbers_of_python(number):
    for name in (*METHODS, *(f"r{name}" for name in interpreter_arithmetic.ARITHMETIC)):
        for kind, shape in itertools.product(KINDS, ("number", "block")):
            for given in (number, tl.constexpr(number)):
                both(f"__{name}__", made(kind, shape, 1), given)


@np.errstate(all="ignore")
def test_where():
    for kind, other, shape in itertools.product(KINDS, KINDS, SHAPES):
        mask = made("int1", "block", 3)
        for left, right in (
            (made(kind, shape, 1), made(other, "block", 2)),
            (made(kind, "block", 1), 0),
            (0.5, made(kind, "row", 2)),
        ):
            both("where", mask, left, right)
        both("where", made("int1", "column", 3), made(kind, "row", 1), made(kind, "row", 2))


@pytest.mark.parametrize("kind", ["int32", "int64", "fp32"])
def test_sorting(kind):
    for seed, shape in enumerate(("block", "row", "column", "line")):
        for dim in (None, 0, 1):
            both("sort", made(kind, shape, seed), dim)
        both("sort", made(kind, shape, seed), None, True)


@np.errstate(all="ignore")
def test_casts():
    for kind, wanted, shape in itertools.product(KINDS, KINDS, SHAPES):
        both("to", made(kind, shape, 1), KINDS[wanted][0])


@pytest.mark.parametrize("kind", ["fp32", "fp64", "fp16", "bf16", "int32", "int64", "int1"])
def test_loads(kind):
    memory = torch.arange(64).to(
        getattr(
            torch,
            {"fp": "float", "bf": "bfloat", "in": "int"}[kind[:2]] + kind.lstrip("fpbint")
            if kind != "int1"
            else "bool",
        )
    )
    element = {**{name: dtype for name, (dtype, _) in KINDS.items()}, "bf16": tl.bfloat16}[kind]
    base = tl.tensor(
        interpreter.TensorHandle(np.array([memory.data_ptr()], np.uint64), tl.pointer_type(element)),
        tl.pointer_type(element),
    )
    for shape, of in itertools.product(("column", "row", "block", "line"), ("int32", "int64")):
        offset = made(of, shape, 1) + 4
        both("__add__", base, offset)
        address = base + offset
        for mask in (None, made("int1", shape, 2), made("int1", "number", 2)):
            for other in (None, 0, 0.0, -1, 0.5) if mask is not None else (None,):
                both("load", address, mask, other)

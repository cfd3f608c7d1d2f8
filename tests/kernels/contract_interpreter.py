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
METHODS = (
    *interpreter_arithmetic.ARITHMETIC,
    *interpreter_arithmetic.COMPARISONS,
    *interpreter_arithmetic.BITS,
    *interpreter_arithmetic.SHIFTS,
    *interpreter_arithmetic.WHOLE,
    "truediv",
)
OF_LANGUAGE = ("where", "load", "sort", "maximum", "minimum", "sum", "max", "min", "arange", "zeros", "full")


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
        # those of NaN are nobody's
        seen = ~np.isnan(right)
        assert np.array_equal(np.signbit(np.broadcast_to(left, right.shape))[seen], np.signbit(right)[seen])
    assert (left.size == 1 or left.shape == right.shape) and at_once.handle.dtype == own.handle.dtype


def both(name: str, *arguments: Any, **options: Any) -> None:
    """Both ways give the same, or refuse."""
    place = tl if name in OF_LANGUAGE else tl.tensor
    try:
        own = interpreter_arithmetic.OWN[name](*arguments, **options)
    except Exception as error:
        with pytest.raises(type(error)):
            getattr(place, name)(*arguments, **options)
        return
    same(getattr(place, name)(*arguments, **options), own)


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
@pytest.mark.filterwarnings("ignore:Value .* exceeds")
def test_numbers_of_python(number):
    for name in (*METHODS, *(f"r{name}" for name in interpreter_arithmetic.ARITHMETIC), "rtruediv"):
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


@pytest.mark.parametrize("name", ["maximum", "minimum"])
@np.errstate(all="ignore")
def test_the_larger_and_the_smaller(name):
    for nan in (*tl.PropagateNan.__members__.values(), tl.constexpr(tl.PropagateNan.ALL)):
        for left, right, shape in itertools.product(KINDS, KINDS, SHAPES):
            if shape != "line":
                both(name, made(left, "block", 1), made(right, shape, 2), nan)
                both(name, made(left, shape, 1), made(right, "block", 2), nan)
        for kind, number in itertools.product(KINDS, (0, 0.0, -0.0, 1.5, 2**40, float("nan"))):
            both(name, made(kind, "block", 1), number, nan)
            both(name, number, made(kind, "block", 1), nan)
    both(name, made("fp32", "block", 1), made("fp32", "row", 2))


@pytest.mark.parametrize("name", ["sum", "max", "min"])
@np.errstate(all="ignore")
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_reductions(name):
    for kind, shape, axis in itertools.product(KINDS, SHAPES, (None, 0, 1, 2, tl.constexpr(0))):
        both(name, made(kind, shape, 1), axis)
        both(name, made(kind, shape, 1), axis, keep_dims=True)
    lowest = made("fp32", "line", 1)
    lowest.handle.data[:] = np.nan
    both(name, lowest, 0)


def test_new_axes():
    every = slice(None)
    for kind, shape in itertools.product(KINDS, SHAPES):
        for places in ((None, every), (every, None), (every, None, every), (None,), None, (every, slice(1)), (None, 0)):
            both("__getitem__", made(kind, shape, 1), places)


def test_constants():
    for _ in range(2):
        both("arange", 0, 8)
        both("arange", tl.constexpr(4), tl.constexpr(8))
        both("arange", 0, 7)
        for kind, (dtype, _) in KINDS.items():
            both("zeros", (4, tl.constexpr(8)), dtype)
            both("zeros", [4], tl.constexpr(dtype))
            for value in (1, 1.5, -0.0, 0.0, float("nan"), tl.constexpr(2), made(kind, "number", 1)):
                both("full", (8,), value, dtype)


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
        both("to", made(kind, shape, 1), KINDS[wanted][0], bitcast=True)


def pointer(kind: str, memory: torch.Tensor) -> Any:
    element = {**{name: dtype for name, (dtype, _) in KINDS.items()}, "bf16": tl.bfloat16}[kind]
    handle = interpreter.TensorHandle(np.array([memory.data_ptr()], np.uint64), tl.pointer_type(element))
    return tl.tensor(handle, tl.pointer_type(element))


def memory_of(kind: str) -> torch.Tensor:
    names = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16", "int1": "bool"}
    return torch.arange(64).to(getattr(torch, names.get(kind, kind)))


@pytest.mark.parametrize("kind", ["fp32", "fp64", "fp16", "bf16", "int32", "int64", "int1"])
def test_loads(kind):
    memory = memory_of(kind)
    base = pointer(kind, memory)
    both("__add__", base, 3)
    for shape, of in itertools.product(("number", "column", "row", "block", "line"), ("int32", "int64")):
        offset = made(of, shape, 1) + 4
        both("__add__", base, offset)
        both("__add__", base + offset, 3)
        address = base + offset
        for mask in (None, made("int1", shape, 2), made("int1", "number", 2), made("int1", "row", 2)):
            for other in (None, 0, 0.0, -1, 0.5):
                both("load", address, mask, other)


@np.errstate(all="ignore")
@pytest.mark.parametrize("kind", ["fp32", "fp64", "fp16", "bf16", "int32", "int64", "int1"])
def test_stores(kind):
    stores = interpreter_arithmetic.OWN["store"], tl.store
    assert stores[0] is not stores[1]
    for shape, value, of in itertools.product(SHAPES, SHAPES, KINDS):
        offset = made("int64", shape, 1) + 20
        for mask in (None, made("int1", shape, 2), made("int1", "number", 2), made("int1", "row", 2)):
            found = []
            for store in stores:
                memory = memory_of(kind)
                try:
                    store(pointer(kind, memory) + offset, made(of, value, 3), mask)
                    found.append(memory.view(torch.uint8).tolist())
                except Exception as error:
                    found.append(type(error))
            assert found[0] == found[1]

# SPDX-License-Identifier: Apache-2.0
"""What a program does most, at once by NumPy: arithmetic, comparisons, casts, ``tl.where``, ``tl.load``, ``tl.sort``.

Triton's interpreter goes through a dozen calls for one addition, each of which asks for the same kinds and shapes. The
plain cases are here, with the function of NumPy that the interpreter takes. All others go the interpreter's own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
BITS = {"and": np.bitwise_and, "or": np.bitwise_or}
NUMBERS = ("fp32", "fp64", "int32", "int64")
# by the kinds that they are from and to: all that NumPy converts as the interpreter does
CASTS = {
    ("fp16", "fp32"): np.float32,
    ("fp32", "fp16"): np.float16,
    ("int1", "fp32"): np.float32,
    ("int1", "int32"): np.int32,
    ("int32", "fp32"): np.float32,
    ("int32", "int64"): np.int64,
    ("int64", "int32"): np.int32,
}
_MOST = {int: 2**31 - 1, float: float(np.finfo(np.float32).max)}
# the interpreter's own ways, by name
OWN: dict[str, Callable[..., Any]] = {}


def patch(tl: Any, interpreter: Any) -> None:
    """Replace methods and functions of ``tl``, after the interpreter has replaced them."""
    at_once = _AtOnce(tl, interpreter)
    for name, function in ARITHMETIC.items():
        at_once.replace(f"__{name}__", function, NUMBERS)
        at_once.replace(f"__r{name}__", lambda right, left, of=function: of(left, right), NUMBERS)
    for name, function in COMPARISONS.items():
        at_once.replace(f"__{name}__", function, NUMBERS, truth=True)
    for name, function in BITS.items():
        at_once.replace(f"__{name}__", function, ("int1", "int32"))
    at_once.replace_to()
    at_once.replace_where()
    at_once.replace_load()
    at_once.replace_sort()


class _AtOnce:
    def __init__(self, tl: Any, interpreter: Any) -> None:
        self.tl, self.semantic, self.handle = tl, interpreter.interpreter_semantic, interpreter.TensorHandle
        self.builder = interpreter.interpreter_builder
        self.numbers: dict[tuple[Any, ...], Any] = {}

    def made(self, data: Any, dtype: Any, kind: Any) -> Any:
        """A tensor of a kind; its handle says ``dtype``, as the interpreter leaves it."""
        return self.tl.tensor(self.handle_of(data, dtype), kind)

    def handle_of(self, data: Any, dtype: Any) -> Any:
        handle = object.__new__(self.handle)
        handle.data, handle.dtype, handle.attr = data, dtype, {}
        return handle

    def block(self, left: Any, right: Any, dtype: Any, data: Any) -> Any:
        """The kind of a result: that of a number where both are numbers, else that of a block."""
        kind = left.type
        if (right is None or right.type is kind) and kind.scalar is dtype:
            return kind
        blocks = left.type.is_block() or right is not None and right.type.is_block()
        return self.tl.block_type(dtype, list(data.shape)) if blocks else dtype

    def number(self, beside: Any, given: Any) -> Any:
        """(1,) array of a number of Python as what stands beside it takes it; None where both change."""
        number = given.value if type(given) is self.tl.constexpr else given
        if type(number) is not int and (type(number) is not float or not beside.dtype.is_floating()):
            return None
        # those that need 64 bits may change the other
        if _MOST[type(number)] < abs(number) < math.inf:
            return None
        # zero has two signs, which compare equal
        key = type(number), repr(number), beside.dtype.name, beside.type.is_block()
        if key not in self.numbers:
            same, made = self.semantic.binary_op_type_checking_impl(beside, number)
            fits = same is beside and made.dtype.name == beside.dtype.name
            self.numbers[key] = made.handle.data.reshape(-1)[:1].copy() if fits else None
        return self.numbers[key]

    def replace(self, name: str, function: Callable[..., Any], kinds: tuple[str, ...], truth: bool = False) -> None:
        tensor, truths, wide = self.tl.tensor, self.tl.int1, self.tl.int64
        own_way = OWN[name] = getattr(tensor, name)
        moves = name == "__add__"

        def method(left: Any, right: Any) -> Any:
            dtype = left.dtype
            if type(right) is tensor:
                theirs, data = right.dtype, right.handle.data
                if moves and dtype.is_ptr() and theirs.name in ("int32", "int64"):
                    return self.moved(left, right)
                if theirs.name != dtype.name:
                    if {theirs.name, dtype.name} != {"int32", "int64"} or kinds is not NUMBERS:
                        return own_way(left, right)
                    dtype = wide
                beside = right
            else:
                data, beside = self.number(left, right) if dtype.name in kinds else None, None
            if data is None or dtype.name not in kinds:
                return own_way(left, right)
            result = function(left.handle.data, data)
            return self.made(result, dtype, self.block(left, beside, truths if truth else dtype, result))

        setattr(tensor, name, method)

    def moved(self, address: Any, offset: Any) -> Any:
        element = address.handle.get_element_ty()
        width = max(1, element.primitive_bitwidth // 8)
        data = address.handle.data + width * offset.handle.data.astype(np.uint64)
        return self.made(data, address.handle.dtype, self.block(address, offset, address.dtype, data))

    def replace_to(self) -> None:
        tl = self.tl
        own_way = OWN["to"] = tl.tensor.to

        def to(tensor: Any, dtype: Any, *options: Any, **named: Any) -> Any:
            kind = dtype.value if type(dtype) is tl.constexpr else dtype
            if not options and not named and tensor.dtype.name == kind.name:
                return tensor
            wanted = CASTS.get((tensor.dtype.name, kind.name))
            if options or named or wanted is None:
                return own_way(tensor, dtype, *options, **named)
            data = tensor.handle.data.astype(wanted)
            return self.made(data, kind, self.block(tensor, None, kind, data))

        tl.tensor.to = to

    def replace_where(self) -> None:
        tl, tensor = self.tl, self.tl.tensor
        own_way = OWN["where"] = tl.where

        def where(condition: Any, x: Any, y: Any) -> Any:
            known = type(condition) is tensor and condition.type.is_block() and condition.dtype.name == "int1"
            typed = x if type(x) is tensor else y
            if not known or type(typed) is not tensor or typed.dtype.is_ptr():
                return own_way(condition, x, y)
            both = []
            for value in (x, y):
                if type(value) is not tensor:
                    both.append(self.number(typed, value))
                else:
                    both.append(value.handle.data if value.dtype.name == typed.dtype.name else None)
            if both[0] is None or both[1] is None:
                return own_way(condition, x, y)
            data = np.where(condition.handle.data, *both)
            return self.made(data, typed.dtype, tl.block_type(typed.dtype, list(data.shape)))

        tl.where = where

    def replace_load(self) -> None:
        tl, tensor = self.tl, self.tl.tensor
        own_way = OWN["load"] = tl.load

        def load(pointer: Any, mask: Any = None, other: Any = None, **options: Any) -> Any:
            known = type(pointer) is tensor and pointer.type.is_block() and pointer.dtype.is_ptr()
            if not known or type(mask) is not tensor or set(options) - {"eviction_policy", "cache_modifier"}:
                return own_way(pointer, mask, other, **options)
            element, shape = pointer.dtype.element_ty, pointer.handle.data.shape
            fill = None if other is None else self.fill(element, other, shape)
            if element.name not in (*NUMBERS, "fp16", "bf16") or (other is not None and fill is None):
                return own_way(pointer, mask, other, **options)
            asked = mask.handle
            if asked.data.shape != shape:
                if np.broadcast_shapes(asked.data.shape, shape) != shape:
                    return own_way(pointer, mask, other, **options)
                asked = self.handle_of(np.broadcast_to(asked.data, shape), asked.dtype)
            found = self.builder.create_masked_load(pointer.handle, asked, fill, None, None, False)
            return tensor(found, tl.block_type(element, list(shape)))

        tl.load = load

    def replace_sort(self) -> None:
        tl, tensor = self.tl, self.tl.tensor
        own_way = OWN["sort"] = tl.sort

        def sort(x: Any, dim: Any = None, descending: Any = 0) -> Any:
            axis = -1 if dim is None else getattr(dim, "value", dim)
            known = type(x) is tensor and x.type.is_block() and x.dtype.name in ("int32", "int64")
            # a whole network of comparisons is a second of a program
            if not known or getattr(descending, "value", descending) or axis not in (-1, len(x.type.shape) - 1):
                return own_way(x, dim, tl.constexpr(getattr(descending, "value", descending)))
            return self.made(np.sort(np.broadcast_to(x.handle.data, x.type.shape), axis=-1), x.dtype, x.type)

        tl.sort = sort

    def fill(self, element: Any, other: Any, shape: tuple[int, ...]) -> Any:
        """Handle of what stands where the mask is false; None where it is no number, or has no kind of NumPy's."""
        number = other.value if type(other) is self.tl.constexpr else other
        if type(number) not in (int, float) or element.name not in (*NUMBERS, "fp16", "bf16"):
            return None
        key = "fill", element.name, type(number), repr(number), shape
        if key not in self.numbers:
            made = self.semantic.cast(self.semantic.to_tensor(number), element)
            self.numbers[key] = self.handle_of(np.broadcast_to(made.handle.data, shape), element)
        return self.numbers[key]

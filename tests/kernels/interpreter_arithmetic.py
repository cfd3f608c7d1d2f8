# SPDX-License-Identifier: Apache-2.0
"""What a program does most, at once by NumPy: arithmetic, comparisons, casts, loads, stores, sums and the like.

Triton's interpreter goes through a dozen calls for one addition, each of which asks for the same kinds and shapes. The
plain cases are here, with the function of NumPy that the interpreter takes; what comes of two kinds is found once. All
others go the interpreter's own way.
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
SHIFTS = {"lshift": np.left_shift, "rshift": np.right_shift, "xor": np.bitwise_xor}
# towards zero, as Triton's
WHOLE = {"floordiv": lambda left, right: (left - np.fmod(left, right)) // right, "mod": np.fmod}
NUMBERS = ("fp32", "fp64", "int32", "int64")
FLOATS, INTEGERS = NUMBERS[:2], NUMBERS[2:]
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
BITCASTS = {("fp32", "int32"): np.int32, ("int32", "fp32"): np.float32}
_MOST = {int: 2**31 - 1, float: float(np.finfo(np.float32).max)}
# the interpreter's own ways, by name
OWN: dict[str, Callable[..., Any]] = {}
# what is found once: a function of two arrays, and of its result the dtype of the handle, the kind and the dtype
Found = tuple[Callable[..., Any], Any, Any, Any]


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
    for name, function in SHIFTS.items():
        at_once.replace(f"__{name}__", function, ("int32",))
    for name, function in WHOLE.items():
        at_once.replace(f"__{name}__", function, INTEGERS)
    at_once.replace("__truediv__", np.divide, FLOATS)
    at_once.replace("__rtruediv__", lambda right, left: np.divide(left, right), FLOATS)
    at_once.replace_to()
    at_once.replace_getitem()
    at_once.replace_where()
    at_once.replace_extremes("maximum", np.maximum, np.fmax)
    at_once.replace_extremes("minimum", np.minimum, np.fmin)
    at_once.replace_load()
    at_once.replace_store()
    at_once.replace_sort()
    at_once.replace_reduction("sum", np.add, np.add)
    at_once.replace_reduction("max", np.maximum, np.fmax)
    at_once.replace_reduction("min", np.minimum, np.fmin)
    at_once.replace_constants()


def _moved(width: int) -> Callable[..., Any]:
    """Addresses of elements of so many bytes, moved by an offset."""
    bytes_of = np.array(width, np.int64)

    def moved(address: Any, offset: Any) -> Any:
        return address + np.multiply(offset, bytes_of, dtype=np.int64).view(np.uint64)

    return moved


class _AtOnce:
    def __init__(self, tl: Any, interpreter: Any) -> None:
        self.tl, self.semantic, self.handle = tl, interpreter.interpreter_semantic, interpreter.TensorHandle
        self.interpreter, self.builder = interpreter, interpreter.interpreter_builder
        self.numbers: dict[tuple[Any, ...], Any] = {}
        # an id in a key stays that of its kind as long as the kind lives
        self.kept: dict[int, Any] = {}

    def made(self, data: Any, dtype: Any, kind: Any, scalar: Any) -> Any:
        """A tensor of a kind; its handle says ``dtype``, as the interpreter leaves it."""
        handle = object.__new__(self.handle)
        handle.data, handle.dtype, handle.attr = data, dtype, {}
        tensor = object.__new__(self.tl.tensor)
        tensor.handle, tensor.type, tensor.dtype = handle, kind, scalar
        return tensor

    def keep(self, *kinds: Any) -> None:
        self.kept.update((id(kind), kind) for kind in kinds)

    def kind(self, scalar: Any, *of: Any) -> Any:
        """The kind of what comes of those: a number where all are numbers, else a block."""
        shapes = [kind.shape for kind in of if kind.is_block()]
        return self.tl.block_type(scalar, list(np.broadcast_shapes(*shapes))) if shapes else scalar

    def number(self, beside: Any, given: Any) -> Any:
        """(1,) array of a number of Python as what stands beside it takes it; None where both change."""
        number = given.value if type(given) is self.tl.constexpr else given
        kind = type(number)
        if kind is not int and kind is not float:
            return None
        # zero has two signs, which compare equal
        key = kind, number or repr(number), id(beside.type)
        if key not in self.numbers:
            self.keep(beside.type)
            self.numbers[key] = self._number(beside, number)
        return self.numbers[key]

    def _number(self, beside: Any, number: Any) -> Any:
        # those that need 64 bits may change the other
        if beside.dtype.is_ptr() and type(number) is int and abs(number) <= _MOST[int]:
            return np.array([number], np.int32)
        if type(number) is float and not beside.dtype.is_floating() or _MOST[type(number)] < abs(number) < math.inf:
            return None
        same, made = self.semantic.binary_op_type_checking_impl(beside, number)
        return (
            made.handle.data.reshape(-1)[:1].copy() if same is beside and made.dtype.name == beside.dtype.name else None
        )

    def replace(self, name: str, function: Callable[..., Any], kinds: tuple[str, ...], truth: bool = False) -> None:
        tensor, handle, constexpr, new = self.tl.tensor, self.handle, self.tl.constexpr, object.__new__
        own_way = OWN[name] = getattr(tensor, name)
        known: dict[tuple[Any, ...], tuple[Found, Any]] = {}
        none: set[tuple[Any, ...]] = set()

        def learn(left: Any, right: Any, key: tuple[Any, ...]) -> Any:
            """The first of its key."""
            is_tensor = type(right) is tensor
            like = self.tl.int32 if left.dtype.is_ptr() else left.dtype
            self.keep(left.type, right.type if is_tensor else like)
            data = None if is_tensor else self.number(left, right)
            found = self.found(function, left.type, right.type if is_tensor else like, kinds, truth, name == "__add__")
            if found is None or data is None and not is_tensor:
                none.add(key)
                return own_way(left, right)
            known[key] = found, data
            return method(left, right)

        # several million times in a contract, so all is in one function
        def method(left: Any, right: Any) -> Any:
            kind = left.type
            if type(right) is tensor:
                key: tuple[Any, ...] = id(kind), id(right.type)
            else:
                if type(right) is constexpr:
                    right = right.value
                # zero has two signs, which compare equal
                key = id(kind), type(right), right or repr(right)
            both = known.get(key)
            if both is None:
                return own_way(left, right) if key in none else learn(left, right, key)
            (of, dtype, kind, scalar), data = both
            own = new(handle)
            own.data = of(left.handle.data, right.handle.data if data is None else data)
            own.dtype, own.attr = dtype, {}
            made = new(tensor)
            made.handle, made.type, made.dtype = own, kind, scalar
            return made

        setattr(tensor, name, method)

    def found(
        self, function: Callable[..., Any], left: Any, right: Any, kinds: tuple[str, ...], truth: bool, adds: bool
    ) -> Found | None:
        """What comes of two kinds; None where it goes the interpreter's own way."""
        dtype, theirs = left.scalar, right.scalar
        if adds and dtype.is_ptr() and theirs.name in INTEGERS:
            function = _moved(max(1, dtype.element_ty.primitive_bitwidth // 8))
        else:
            if theirs.name != dtype.name and {theirs.name, dtype.name} == set(INTEGERS) and kinds is NUMBERS:
                dtype = theirs = self.tl.int64
            if theirs.name != dtype.name or dtype.name not in kinds:
                return None
        scalar = self.tl.int1 if truth else dtype
        try:
            return function, dtype, self.kind(scalar, left, right), scalar
        except ValueError:
            # shapes that do not fit
            return None

    def replace_to(self) -> None:
        tl = self.tl
        own_way = OWN["to"] = tl.tensor.to

        def to(tensor: Any, dtype: Any, *options: Any, **named: Any) -> Any:
            kind = dtype.value if type(dtype) is tl.constexpr else dtype
            bits = not options and named == {"bitcast": True}
            if options or named and not bits:
                return own_way(tensor, dtype, *options, **named)
            if tensor.dtype.name == kind.name:
                return tensor
            wanted = (BITCASTS if bits else CASTS).get((tensor.dtype.name, kind.name))
            if wanted is None:
                return own_way(tensor, dtype, *options, **named)
            data = tensor.handle.data
            data = data.view(wanted) if bits else data.astype(wanted)
            return self.made(data, kind, tensor.type.with_element_ty(kind) if tensor.type.is_block() else kind, kind)

        tl.tensor.to = to

    def replace_getitem(self) -> None:
        tl, everything = self.tl, slice(None)
        own_way = OWN["__getitem__"] = tl.tensor.__getitem__
        kinds: dict[tuple[Any, ...], Any] = {}

        def getitem(x: Any, places: Any) -> Any:
            """``x[:, None]`` and the like."""
            known = (
                type(places) is tuple and x.type.is_block() and len(places) - places.count(None) <= len(x.type.shape)
            )
            if not known or not all([place is None or place == everything for place in places]):
                return own_way(x, places)
            data = x.handle.data[places]
            key = id(x.type), data.shape
            if key not in kinds:
                self.keep(x.type)
                kinds[key] = tl.block_type(x.dtype, list(data.shape))
            return self.made(data, x.handle.dtype, kinds[key], x.dtype)

        tl.tensor.__getitem__ = getitem

    def replace_where(self) -> None:
        tl, tensor = self.tl, self.tl.tensor
        own_way = OWN["where"] = tl.where
        kinds: dict[tuple[Any, ...], Any] = {}

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
            key = typed.dtype.name, data.shape
            if key not in kinds:
                kinds[key] = tl.block_type(typed.dtype, list(data.shape))
            return self.made(data, typed.dtype, kinds[key], typed.dtype)

        tl.where = where

    def replace_extremes(self, name: str, all_nan: Callable[..., Any], no_nan: Callable[..., Any]) -> None:
        """``tl.maximum`` or ``tl.minimum``, where a NaN passes or does not."""
        tl, tensor = self.tl, self.tl.tensor
        passes, passes_not = tl.PropagateNan.ALL, tl.PropagateNan.NONE
        own_way = OWN[name] = getattr(tl, name)
        known: dict[tuple[int, int], Found | None] = {}

        def extreme(x: Any, y: Any, propagate_nan: Any = passes_not) -> Any:
            asked = propagate_nan.value if type(propagate_nan) is tl.constexpr else propagate_nan
            if type(x) is not tensor or asked is not passes and asked is not passes_not:
                return own_way(x, y, propagate_nan)
            data = y.handle.data if type(y) is tensor else self.number(x, y)
            theirs = y.type if type(y) is tensor else x.dtype
            key = id(x.type), id(theirs)
            if key not in known:
                self.keep(x.type, theirs)
                known[key] = self.found(no_nan, x.type, theirs, NUMBERS, False, False)
            found = known[key]
            # integers of two widths are left to the interpreter
            if data is None or found is None or theirs.scalar.name != x.dtype.name:
                return own_way(x, y, propagate_nan)
            return self.made((all_nan if asked is passes else no_nan)(x.handle.data, data), *found[1:])

        setattr(tl, name, extreme)

    def replace_load(self) -> None:
        tl, tensor, read = self.tl, self.tl.tensor, self.interpreter._interpreter.load
        own_way = OWN["load"] = tl.load
        kinds: dict[int, Any] = {}
        fills: dict[tuple[Any, ...], Any] = {}

        def load(pointer: Any, mask: Any = None, other: Any = None, **options: Any) -> Any:
            known = type(pointer) is tensor and pointer.dtype.is_ptr() and (mask is not None or other is None)
            if not known or options and set(options) - {"eviction_policy", "cache_modifier"}:
                return own_way(pointer, mask, other, **options)
            kind, data = pointer.type, pointer.handle.data
            number = other.value if type(other) is tl.constexpr else other
            if type(number) is tensor:
                return own_way(pointer, mask, other, **options)
            # zero has two signs, which compare equal
            key = id(kind), type(number), number or repr(number)
            if key not in fills:
                self.keep(kind)
                fills[key] = self.fill(pointer.dtype.element_ty, number, data.shape)
            fill, asked = fills[key], self.asked(pointer, mask)
            if fill is None or asked is None:
                return own_way(pointer, mask, other, **options)
            element = pointer.dtype.element_ty
            if id(kind) not in kinds:
                kinds[id(kind)] = self.kind(element, kind)
            return self.made(read(data, asked, fill, fill.dtype), element, kinds[id(kind)], element)

        tl.load = load

    def replace_store(self) -> None:
        tl, tensor, write = self.tl, self.tl.tensor, self.interpreter._interpreter.store
        own_way = OWN["store"] = tl.store

        def store(pointer: Any, value: Any, mask: Any = None, **options: Any) -> Any:
            known = type(pointer) is tensor and pointer.dtype.is_ptr() and not options
            element = pointer.dtype.element_ty if known else None
            if not known or type(value) is not tensor or element.name not in (*NUMBERS, "fp16"):
                return own_way(pointer, value, mask, **options)
            shape, asked = pointer.handle.data.shape, self.asked(pointer, mask)
            fits = value.dtype.name == element.name and (pointer.type.is_block() or not value.type.is_block())
            data = self.spread(value.handle.data, shape) if fits else None
            if asked is None or data is None:
                return own_way(pointer, value, mask, **options)
            write(pointer.handle.data, data, asked)

        tl.store = store

    def asked(self, pointer: Any, mask: Any) -> Any:
        """Array of truths of a pointer's shape; None where the interpreter must see to it."""
        shape = pointer.handle.data.shape
        if mask is None:
            key = "all", shape
            if key not in self.numbers:
                self.numbers[key] = np.ones(shape, bool)
            return self.numbers[key]
        if type(mask) is not self.tl.tensor or mask.dtype.name != "int1":
            return None
        if mask.type.is_block() and not pointer.type.is_block():
            return None
        return self.spread(mask.handle.data, shape)

    def spread(self, data: Any, shape: tuple[int, ...]) -> Any:
        """The same numbers in a shape; None where there are too many."""
        if data.shape == shape:
            return data
        try:
            return np.broadcast_to(data, shape)
        except ValueError:
            return None

    def fill(self, element: Any, number: Any, shape: tuple[int, ...]) -> Any:
        """Array of what stands where the mask is false; None where it is no number, or has no kind of NumPy's."""
        if number is None:
            number = 0
        if type(number) not in (int, float) or element.name not in (*NUMBERS, "fp16", "bf16"):
            return None
        made = self.semantic.cast(self.semantic.to_tensor(number), element)
        return np.broadcast_to(made.handle.data, shape)

    def replace_sort(self) -> None:
        tl, tensor = self.tl, self.tl.tensor
        own_way = OWN["sort"] = tl.sort

        def sort(x: Any, dim: Any = None, descending: Any = 0) -> Any:
            axis = -1 if dim is None else getattr(dim, "value", dim)
            known = type(x) is tensor and x.type.is_block() and x.dtype.name in INTEGERS
            # a whole network of comparisons is a second of a program
            if not known or getattr(descending, "value", descending) or axis not in (-1, len(x.type.shape) - 1):
                return own_way(x, dim, tl.constexpr(getattr(descending, "value", descending)))
            data = np.sort(np.broadcast_to(x.handle.data, x.type.shape), axis=-1)
            return self.made(data, x.dtype, x.type, x.dtype)

        tl.sort = sort

    def replace_reduction(self, name: str, of_integers: Any, of_floats: Any) -> None:
        tl, tensor = self.tl, self.tl.tensor
        own_way = OWN[name] = getattr(tl, name)

        def reduction(x: Any, axis: Any = None, **options: Any) -> Any:
            along = getattr(axis, "value", axis)
            known = type(x) is tensor and x.type.is_block() and x.dtype.name in NUMBERS and not options
            if not known or along is not None and not 0 <= along < len(x.type.shape):
                return own_way(x, axis, **options)
            function = of_floats if x.dtype.name in FLOATS else of_integers
            data = np.asarray(function.reduce(x.handle.data, axis=along, dtype=x.handle.data.dtype))
            if not data.shape:
                return self.made(data.reshape(1), x.dtype, x.dtype, x.dtype)
            return self.made(data, x.dtype, tl.block_type(x.dtype, list(data.shape)), x.dtype)

        setattr(tl, name, reduction)

    def replace_constants(self) -> None:
        """``tl.arange``, ``tl.zeros`` and ``tl.full``: what comes of the same arguments is made once, to be read."""
        tl = self.tl

        def once(name: str) -> None:
            own_way = OWN[name] = getattr(tl, name)
            made: dict[tuple[Any, ...], Any] = {}

            def constant(*given: Any) -> Any:
                plain = [value.value if type(value) is tl.constexpr else value for value in given]
                if type(plain[0]) in (tuple, list):
                    plain[0] = tuple([size.value if type(size) is tl.constexpr else size for size in plain[0]])
                key = tuple([value.name if isinstance(value, tl.dtype) else repr(value) for value in plain])
                if any(type(value) is tl.tensor for value in plain):
                    return own_way(*given)
                if key not in made:
                    made[key] = own_way(*given)
                    made[key].handle.data.setflags(write=False)
                one = made[key]
                return self.made(one.handle.data, one.handle.dtype, one.type, one.dtype)

            setattr(tl, name, constant)

        for name in ("arange", "zeros", "full"):
            once(name)

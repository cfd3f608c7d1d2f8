# SPDX-License-Identifier: Apache-2.0
"""Takes out of Triton's interpreter what it does again for each operation of a program, always with the same result.

What a kernel computes stays as it was; a contract takes a small part of the time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import interpreter_arithmetic


def patch() -> None:
    """Once in a process, before a kernel runs."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    _patch_language_once(tl, interpreter)
    _blocks_once(tl)
    # both are asked for every value: kinds of numbers, and blocks of them, are few
    interpreter._get_np_dtype = _kept_by_name(interpreter._get_np_dtype)
    tl.block_type.with_element_ty = _kept_by_name(tl.block_type.with_element_ty)
    # a pointer of each kind of tensor comes with every launch
    tl.str_to_ty = functools.cache(tl.str_to_ty)
    _tensor_once(tl)
    TritonSemantic.to_tensor = _to_tensor(tl, TritonSemantic.to_tensor)
    interpreter._patch_attr = _patch_attr(interpreter)
    TritonSemantic.broadcast_impl_value = _broadcast(TritonSemantic.broadcast_impl_value)
    TritonSemantic.binary_op_type_checking_impl = _operands(tl, TritonSemantic.binary_op_type_checking_impl)
    # sums of integers are computed again in 64 bits, and the comparison is then left out: only debug builds assert
    assert not interpreter.InterpreterOptions().debug
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


def _patch_language_once(tl: Any, interpreter: Any) -> None:
    """Let the interpreter take the place of the language once in this process.

    It does so in every launch and every call of a device function, ``tl.sum`` among them: 40 % of a contract's time.
    A number that comes at run time is an array of one there. Triton 3.6 asks NumPy for its ``int``, which 2.4 refuses.
    """
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    done: set[int] = set()

    class Stays:
        def restore(self) -> None:
            pass

    def patched(function: Any) -> Stays:
        # a module's names are patched when the first of its functions runs
        if id(function.__globals__) not in done:
            first = not done
            done.add(id(function.__globals__))
            patch(function)
            if first:
                interpreter_arithmetic.patch(tl, interpreter)
            tl.tensor.__index__ = lambda number: int(number.handle.data.item())
        return Stays()

    interpreter._patch_lang = patched


def _blocks_once(tl: Any) -> None:
    """Let blocks of one kind of numbers and one shape share one ``tl.block_type``."""
    made: dict[tuple[str, tuple[int, ...]], Any] = {}
    init = tl.block_type.__init__

    def new(kind: Any, element_ty: Any, shape: Any) -> Any:
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        key = element_ty.name, sizes
        if key not in made:
            block = object.__new__(kind)
            init(block, element_ty, shape)
            made[key] = block
        return made[key]

    tl.block_type.__new__ = staticmethod(new)
    tl.block_type.__init__ = lambda *_: None


def _kept_by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of types, which asks once for each; a type's name tells it from every other."""
    known: dict[tuple[str, ...], Any] = {}

    def kept(*types: Any) -> Any:
        names = tuple([kind.name for kind in types])
        if names not in known:
            known[names] = function(*types)
        return known[names]

    return kept


def _tensor_once(tl: Any) -> None:
    """Let a ``tl.tensor`` ask its type for shape and size, which makes them once, when somebody wants them."""
    no_block = tl.tuple([]), tl.constexpr(1)

    def init(tensor: Any, handle: Any, kind: Any) -> None:
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar

    def constants(tensor: Any) -> Any:
        kind = tensor.type
        if not kind.is_block():
            return no_block
        if not hasattr(kind, "constants"):
            sizes = list(kind.shape)
            kind.constants = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
        return kind.constants

    tl.tensor.__init__ = init
    tl.tensor.shape = property(lambda tensor: constants(tensor)[0])
    tl.tensor.numel = property(lambda tensor: constants(tensor)[1])


def _to_tensor(tl: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``TritonSemantic.to_tensor``, through which each assignment of a program goes."""
    tensor = tl.tensor

    def to_tensor(semantic: Any, value: Any, check_type: bool = True) -> Any:
        return value if type(value) is tensor else function(semantic, value, check_type)

    return to_tensor


def _patch_attr(interpreter: Any) -> Callable[..., None]:
    """``interpreter._patch_attr`` whose builtins are not asked whether they have what they are given here."""
    semantic = interpreter.interpreter_semantic

    def patch_attr(place: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        inner = getattr(member, "__wrapped__", member)

        def builtin(*given: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return inner(*given, **named)

        scope.set_attr(place, name, builtin)

    return patch_attr


def _broadcast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``TritonSemantic.broadcast_impl_value``, at once for blocks of one shape."""

    def broadcast(semantic: Any, left: Any, right: Any) -> Any:
        if left.type.is_block() and right.type.is_block() and list(left.type.shape) == list(right.type.shape):
            return left, right
        return function(semantic, left, right)

    return broadcast


def _operands(tl: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``TritonSemantic.binary_op_type_checking_impl``, which knows operands of one kind, and numbers it has met."""
    numbers: dict[tuple[Any, ...], Any] = {}

    def of_number(semantic: Any, number: Any, block: Any, left: bool, flags: tuple[Any, ...]) -> Any:
        # zero has two signs, which compare equal
        key = type(number), repr(number), block.type.name, left, flags
        known = numbers.get(key)
        if known is None:
            both = function(semantic, *((number, block) if left else (block, number)), *flags)
            if both[left] is not block:
                return both
            known = numbers[key] = both[not left]
        return (known, block) if left else (block, known)

    def operands(
        semantic: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        flags = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        if isinstance(lhs, tl.tensor):
            if isinstance(rhs, tl.tensor):
                address = lhs.dtype.is_ptr() and allow_lhs_ptr and rhs.dtype.is_int()
                alike = lhs.dtype.name == rhs.dtype.name and not lhs.dtype.is_ptr() and not div_or_mod
                if address or alike:
                    return semantic.broadcast_impl_value(lhs, rhs)
            elif isinstance(rhs, (bool, int, float)):
                return of_number(semantic, rhs, lhs, False, flags)
        elif isinstance(lhs, (bool, int, float)) and isinstance(rhs, tl.tensor):
            return of_number(semantic, lhs, rhs, True, flags)
        return function(semantic, lhs, rhs, *flags)

    return operands

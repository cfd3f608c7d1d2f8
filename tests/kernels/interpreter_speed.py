# SPDX-License-Identifier: Apache-2.0
"""Takes out of Triton's interpreter what it does again for each operation of a program, always with the same result.

What a kernel computes stays as it was; a contract takes half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def patch() -> None:
    """Once in a process, before a kernel runs."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    _patch_language_once(tl, interpreter)
    # both are asked for every value: kinds of numbers, and blocks of them, are few
    interpreter._get_np_dtype = _kept_by_name(interpreter._get_np_dtype)
    tl.block_type.with_element_ty = _kept_by_name(tl.block_type.with_element_ty)
    tl.tensor.__init__ = _tensor_init(tl)
    TritonSemantic.broadcast_impl_value = _broadcast(TritonSemantic.broadcast_impl_value)
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
            done.add(id(function.__globals__))
            patch(function)
            tl.tensor.__index__ = lambda number: int(number.handle.data.item())
        return Stays()

    interpreter._patch_lang = patched


def _kept_by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of types, which asks once for each; a type's name tells it from every other."""
    known: dict[tuple[str, ...], Any] = {}

    def kept(*types: Any) -> Any:
        names = tuple([kind.name for kind in types])
        if names not in known:
            known[names] = function(*types)
        return known[names]

    return kept


def _tensor_init(tl: Any) -> Callable[[Any, Any, Any], None]:
    """``tl.tensor.__init__`` that makes the constants of each type once."""
    no_block = tl.tuple([]), tl.constexpr(1)

    def init(tensor: Any, handle: Any, kind: Any) -> None:
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
        if not kind.is_block():
            tensor.shape, tensor.numel = no_block
            return
        if not hasattr(kind, "constants"):
            sizes = list(kind.shape)
            kind.constants = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
        tensor.shape, tensor.numel = kind.constants

    return init


def _broadcast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``TritonSemantic.broadcast_impl_value``, at once for blocks of one shape."""

    def broadcast(semantic: Any, left: Any, right: Any) -> Any:
        if left.type.is_block() and right.type.is_block() and list(left.type.shape) == list(right.type.shape):
            return left, right
        return function(semantic, left, right)

    return broadcast

# SPDX-License-Identifier: Apache-2.0
"""What registering an op takes: a schema in torch's library, and a step of autograd that ``torch.func`` can follow.

A schema has a forward and, apart, a backward. What joins them is a ``torch.autograd.Function`` with
``setup_context``: the one form that ``backward``, ``torch.compile``, ``vmap``, ``grad`` and ``jacrev`` all take.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from drseg_core.ops._dispatch import check_result

PLAIN: dict[str, Callable[..., Any]] = {}
"""Of every schema: what computes it by torch's own operators; its arguments are the schema's."""

_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")
# what torch's own eager mode gives to an op; any subclass of Tensor may mean another
_USUAL = frozenset([Tensor, torch.nn.Parameter, bool, int, float, str, type(None), list, tuple])


def usual(arguments: Sequence[Any]) -> bool:
    """Whether only torch's eager mode sees a call: no compiler, transform or dispatch mode.

    Nor may a tensor be the lazy negative of another, which the dispatcher would make of it first.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        # of batched gradients, which are no transform
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
        or not _USUAL.issuperset(map(type, arguments))
        or any(value.is_neg() for value in arguments if isinstance(value, Tensor))
    )


def define(
    op: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], plain: Callable[..., Any] | None = None
) -> Any:
    """Add ``drseg::op`` to torch's library.

    Args:
        op: name. schema: arguments and results, as torch writes them.
        run: computes it, on any device. fake: shapes and dtypes of its results.
        plain: computes it by torch's own operators, for programs; None where ``run`` by the reference does.

    Returns:
        What calls it: through torch's dispatcher where somebody follows, who sees one operator; otherwise at once,
        which takes half of the time.
    """

    def without_autograd(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                found = run(*arguments)
        else:
            found = run(*arguments)
        if not is_backward:
            check_result(op, found, arguments, names, fake)
        # as the fake promises, however a backend lays out its result
        return found.contiguous() if isinstance(found, Tensor) else tuple(value.contiguous() for value in found)

    names = tuple(inspect.signature(run).parameters)
    is_backward = op.endswith("_backward")
    place = names.index("backend")
    PLAIN[op] = plain or (lambda *arguments: run(*arguments[:place], "reference", *arguments[place + 1 :]))
    name = f"drseg::{op}"
    torch.library.define(name, schema)
    torch.library.impl(name, "default", without_autograd)
    torch.library.register_fake(name, fake)
    operator = getattr(torch.ops.drseg, op).default

    def one_by_one(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        """The rule of ``vmap``: a sum over a sample is not one over all of them, so each has its own call."""
        mapped = [isinstance(value, Tensor) and dim is not None for value, dim in zip(arguments, in_dims, strict=True)]
        if info.batch_size == 0:
            # one sample of zeros shows what a result of none looks like
            arguments = tuple(
                value.new_zeros([1 if n == dim else size for n, size in enumerate(value.shape)]) if one else value
                for value, dim, one in zip(arguments, in_dims, mapped, strict=True)
            )
        results = []
        for n in range(max(info.batch_size, 1)):
            given = zip(arguments, in_dims, mapped, strict=True)
            results.append(operator(*(value.select(dim, n) if one else value for value, dim, one in given)))
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        stacked = tuple(torch.stack(values)[: info.batch_size] for values in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(name, one_by_one)
    return lambda *arguments: without_autograd(*arguments) if usual(arguments) else operator(*arguments)


class _Bound:
    """Arguments that are all there, in order."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.kwargs: dict[str, Any] = {}

    def apply_defaults(self) -> None:
        pass


class _Positional(inspect.Signature):
    """The signature of a function that is called with all of its arguments in order."""

    def bind(self, *args: Any, **options: Any) -> Any:
        return super().bind(*args, **options) if options else _Bound(args)


class Differentiable(Function):
    """Base of an op's step of autograd: ``forward``, ``setup_context`` and ``backward`` are the op's own.

    Called with all arguments in order.
    """

    generate_vmap_rule = True

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """``apply``, without its work for transforms and missing arguments, if there are none."""
        return super(Function, cls).apply(*arguments) if usual(arguments) else cls.apply(*arguments)  # type: ignore[misc]

    def __init_subclass__(cls) -> None:
        # torch binds the arguments to it in every call; finding it, and binding them, takes longer than the call
        parameters = inspect.signature(cls.forward).parameters.values()
        cls.forward.__signature__ = _Positional(list(parameters))  # type: ignore[attr-defined]


def differentiated(*inputs: Any) -> bool:
    """Whether a call on these inputs is a step of autograd; where it is none, the operator alone is quicker."""
    if not torch.is_grad_enabled():
        return False
    # a transform may hide from a tensor that an outer one follows it
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


class _Once(Differentiable):
    """A backward that must not be differentiated again: no second derivative is implemented."""

    @staticmethod
    def forward(op: str, operator: Any, *arguments: Any) -> Any:
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: backward is not twice differentiable; expected create_graph=False, got a second derivative"
        )


def backward_of(op: str, operator: Any, output_mask: Sequence[bool], *arguments: Any) -> list[Tensor | None]:
    """Gradients by ``operator``, of which ``output_mask`` and ``arguments`` end in it; None where not asked for."""
    # only who asks for a graph of the backward could differentiate it
    run = (lambda *given: _Once.call(op, operator, *given)) if torch.is_grad_enabled() else operator
    found = run(*arguments)
    grads = [found] if isinstance(found, Tensor) else found
    return [value if need else None for value, need in zip(grads, output_mask, strict=True)]


def columns(indptr: Tensor | None, perm: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """A graph's columns as a backend takes them: both lists, contiguous, or None where it makes its own."""
    return None if indptr is None or perm is None else (indptr.contiguous(), perm.contiguous())


def asked_for(grads: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a backend's backward gave, empty where it was not asked for; there it may be anything."""
    return tuple(value if need else value.new_empty(0) for value, need in zip(grads, output_mask, strict=True))


def fake_gradients(output_mask: Sequence[bool], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Shapes of what a backward returns: a gradient like its input, or nothing where it is not asked for."""
    like = next(value for value in inputs if value is not None)
    return tuple(
        like.new_empty(0) if value is None or not need else value.new_empty(value.shape)
        for value, need in zip(inputs, output_mask, strict=True)
    )


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which sums are kept: float64 where an input is, float32 otherwise."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32

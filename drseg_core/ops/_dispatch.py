# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs, and why not another.

An op's table lists its backends from the most to the least preferred. One predicate, ``why_not``, serves the choice,
the error for a named backend that cannot run, and ``drseg doctor``. Nothing falls back silently. A fused op has kernels
of its own on some backends. On another backend it runs its parts, if that backend has all of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch.compiler import is_compiling

from drseg_core.errors import BackendDtypeError, BackendUnavailableError
from drseg_core.ops._checks import FLOAT_DTYPES

Run = Callable[..., Any]
WhyNot = Callable[[str], str | None]
# of sizes and options by name: why a backend does not take them, or None
Refusal = Callable[[Mapping[str, Any]], str | None]


class _Last(threading.local):
    """The backend that ran last in this thread, by op."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def clear(self) -> None:
        self.of.clear()


# whether torch.compile reads context variables; it writes none
_COMPILES_CONTEXTS = torch.__version__ >= "2.14"


class _Compiled(threading.local):
    """What compiled code is to know of blocks: of those in it, and of those around it where it reads no context."""

    def __init__(self) -> None:
        self.override: str | None | EllipsisType = ... if _COMPILES_CONTEXTS else None


_last = _Last()
_override: ContextVar[str | None] = ContextVar("drseg_core.ops.use_backend", default=None)
_compiled = _Compiled()


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: of the backend.
        run: what computes the op's forward; positional arguments of the registered op without ``backend``.
        run_backward: what computes its gradients, or None for an op without any.
        why_not: given a device type, says why this backend cannot run there, or returns None when it can.
        dtypes: dtypes of the op's floating-point tensors that it computes in.
        by_name_only: device types on which it runs only if it is named.
        raw: whether it takes or gives more than plain arguments. For ops that weigh edges see ``_edges.py``.
            ``graph_layer`` takes scales, and a tensor to which it adds the gradient to the coefficients, as last
            arguments. ``prepare_prior`` gives rounded rows to ``knn_graph``.
        refuses: given sizes and options of a call, says why this backend does not take them, or returns None.
        some_rows: whether ``knn_graph`` takes a pair of nodes, first and end, as its last argument ``rows``. Any other
            backend chooses for all nodes.
    """

    name: str
    run: Run
    run_backward: Run | None
    why_not: WhyNot
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    by_name_only: tuple[str, ...] = ()
    raw: bool = False
    refuses: Refusal | None = None
    some_rows: bool = False


def reference_backend(run: Run, run_backward: Run | None = None, **traits: Any) -> Backend:
    """The op's meaning in plain PyTorch, which runs wherever torch does; ``traits`` as in ``Backend``."""
    return Backend("reference", run, run_backward, lambda device: None, **traits)


# forward and backward of a fused op from those of each of its parts
Compose = Callable[..., tuple[Run, Run]]

_tables: dict[str, tuple[Backend, ...]] = {}
# every backend that some op has: ours, and those that others add
_OURS = ("native", "cuda", "triton", "reference")
_names: tuple[str, ...] = _OURS
_fusions: dict[str, tuple[tuple[str, ...], Compose, bool]] = {}


def add_table(op: str, *backends: Backend) -> None:
    """Make ``backends`` (most preferred first) the implementations of ``op``."""
    global _names
    _tables[op] = backends
    _names = tuple(dict.fromkeys([*_names, *(backend.name for backend in backends)]))
    table.cache_clear()


def add_fusion(op: str, parts: tuple[str, ...], compose: Compose, *backends: Backend, widens: bool = False) -> None:
    """As ``add_table``, for an op that ``compose`` makes of ``parts`` for every backend that is not named here.

    ``widens`` says that the parts are given float32, or float64, whatever the dtype of the op's tensors.
    """
    _fusions[op] = (parts, compose, widens)
    add_table(op, *backends)


def _with_columns(run: Any, model: Any) -> Any:
    """``run``, called as ``model``, which may be given the graph's columns last."""
    if run is None or model is None or "csc" not in inspect.signature(model).parameters:
        return run
    try:
        own = inspect.signature(run).parameters.get("csc")
    except (TypeError, ValueError):
        # a function of another language
        own = None
    if own is not None and own.kind in (own.POSITIONAL_ONLY, own.POSITIONAL_OR_KEYWORD):
        return run
    return lambda *arguments: run(*arguments[:-1])


def _takes_exponent(run: Any, model: Any) -> bool:
    """Whether ``run`` takes the last arguments of ``model``, which may be given an exponent."""
    if run is None or model is None:
        return True
    try:
        own = inspect.signature(run).parameters
    except (TypeError, ValueError):
        return False
    return all(name in own for name in ("csc", "exponent") if name in inspect.signature(model).parameters)


def _refuses_exponent(case: Mapping[str, Any]) -> str | None:
    return "it takes no exponent" if case.get("exponent") else None


def register_backend(
    op: str,
    name: str,
    run: Run,
    why_not: WhyNot,
    *,
    run_backward: Run | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    preferred: bool = False,
) -> None:
    """Add an implementation of an op. Dispatch, ``drseg doctor``, the contract tests and the benchmark then know it.

    Modules named in the environment variable ``DRSEG_BACKENDS`` (separated by commas) are imported with
    ``drseg_core.ops``. So one file that calls this function is enough. A fused op runs on the backend too, if the
    backend has all of its parts.

    Args:
        op: name of the op.
        name: name of the backend, a word of your choice.
        run: the forward. It takes the arguments of the op's ``reference.py`` in that order, and returns the same
            values in new tensors. Another shape or dtype, or an argument given back, is refused. A function without an
            argument ``csc`` is not given the graph's columns. One without ``exponent`` refuses edges that have
            exponents.
        why_not: given a device type (``"cpu"``, ``"cuda"``), says in a few words why ``run`` cannot run there, or
            returns None when it can.
        run_backward: the gradients, as the function of that name in ``reference.py``; None if the op has none.
        dtypes: dtypes of the op's floating-point tensors; None means all that its reference takes.
        preferred: choose it before every other backend. Otherwise it runs only if it is named.

    Raises:
        ValueError: there is no such op, or it already has a backend of that name.

    Examples:
        >>> from drseg_core.ops import backend_report, register_backend
        >>> from drseg_core.ops.degree_normalize import reference
        >>> register_backend(
        ...     "degree_normalize", "mine", reference.degree_normalize, lambda device: None,
        ...     run_backward=reference.degree_normalize_backward,
        ... )
        >>> {row["op"] for row in backend_report() if row["backend"] == "mine" and row["available"]}
        {'degree_normalize'}
    """
    if op not in _tables:
        raise ValueError(f"register_backend: op is unknown; expected one of {', '.join(_tables)}, got {op!r}")
    if not isinstance(name, str) or not name.isidentifier() or name == "auto":
        raise ValueError(f"register_backend: name is no word; expected an identifier other than auto, got {name!r}")
    if any(backend.name == name for backend in _tables[op]):
        raise ValueError(f"register_backend: name is taken; expected another than {name!r} for {op}, got it again")
    model = next(backend for backend in table(op) if backend.name == "reference")
    given = (_with_columns(run, model.run), _with_columns(run_backward, model.run_backward))
    takes = _takes_exponent(run, model.run) and _takes_exponent(run_backward, model.run_backward)
    refuses = None if takes else _refuses_exponent
    added = Backend(name, *given, why_not, model.dtypes if dtypes is None else tuple(dtypes), refuses=refuses)
    add_table(op, *((added, *_tables[op]) if preferred else (*_tables[op], added)))


def _composed(parts: Sequence[str], compose: Compose, widens: bool, backends: Sequence[Backend]) -> Backend:
    """A fused op on a backend that has no kernel for it."""
    name = backends[0].name
    forward, backward = compose(*((backend.run, backend.run_backward) for backend in backends))
    differentiable = all(backend.run_backward for backend in backends)

    def noted(run: Run) -> Run:
        @functools.wraps(run)
        def runs(*arguments: Any) -> Any:
            _last.of.update(dict.fromkeys(parts, name))
            return run(*arguments)

        return runs

    def why_not(device: str) -> str | None:
        return next(filter(None, (backend.why_not(device) for backend in backends)), None)

    def refuses(case: Mapping[str, Any]) -> str | None:
        return next(filter(None, (backend.refuses(case) for backend in backends if backend.refuses)), None)

    def given(dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if widens and dtype != torch.float64 else dtype

    dtypes = tuple(dtype for dtype in FLOAT_DTYPES if all(given(dtype) in backend.dtypes for backend in backends))
    by_name = tuple(device for backend in backends for device in backend.by_name_only)
    runs_backward = noted(backward) if differentiable else None
    return Backend(name, noted(forward), runs_backward, why_not, dtypes, by_name, refuses=refuses)


@functools.cache
def table(op: str) -> tuple[Backend, ...]:
    """The backends of an op from the most to the least preferred; of a fused op in the order of its first part."""
    if op not in _fusions:
        return _tables[op]
    parts, compose, widens = _fusions[op]
    kernels = {backend.name: backend for backend in _tables[op]}
    others = [{backend.name: backend for backend in _tables[part]} for part in parts]
    found = []
    for name in others[0]:
        if name in kernels:
            found.append(kernels.pop(name))
        elif all(name in other for other in others):
            found.append(_composed(parts, compose, widens, [other[name] for other in others]))
    return (*kernels.values(), *found)


def backend_names() -> tuple[str, ...]:
    """Every backend that some op has, ours from the most to the least preferred.

    Examples:
        >>> from drseg_core.ops import backend_names
        >>> backend_names()[:3]
        ('native', 'cuda', 'triton')
    """
    return _names


def resolve(
    op: str, tensor: Tensor, requested: str, case: Mapping[str, Any] | None = None, /, **others: Tensor | None
) -> Backend:
    """The backend that computes ``op`` on ``tensor``.

    Args:
        op: name of the op.
        tensor: its first tensor; device and dtype decide.
        requested: a backend's name, or ``"auto"`` for the most preferred one that can run.
        case: sizes and options that some backend may refuse.
        others: its other floating-point tensors by name. Their dtypes decide as well: with a wider one the result
            would have that dtype, but not its precision.

    Raises:
        BackendUnavailableError: the named backend cannot run; the message says why.
        BackendDtypeError: the named backend does not compute in one of the dtypes (also a ``TypeError``).
    """
    device = tensor.device.type
    dtypes = {"": tensor.dtype}
    for name, other in others.items():
        if other is not None:
            dtypes[name] = other.dtype
    reasons = {}
    for backend in table(op):
        if requested != backend.name and not (requested == "auto" and device not in backend.by_name_only):
            continue
        reason = backend.why_not(device)
        if reason is None and case is not None and backend.refuses is not None:
            reason = backend.refuses(case)
        for name, dtype in dtypes.items():
            if reason is None and dtype not in backend.dtypes:
                reason = f"it does not compute in {dtype}"
                if requested == backend.name:
                    raise BackendDtypeError(
                        f"{op}: backend {requested} cannot take {name + ' in ' if name else ''}{dtype}; "
                        f"expected one of {', '.join(map(str, backend.dtypes))}, got {dtype}"
                    )
        if reason is None:
            _last.of[op] = backend.name
            return backend
        reasons[backend.name] = reason
    able = [
        b.name
        for b in table(op)
        if b.why_not(device) is None
        and set(dtypes.values()) <= {*b.dtypes}
        and not (case is not None and b.refuses is not None and b.refuses(case))
    ]
    reason = reasons.get(requested, f"{op} has no {requested} kernel")
    raise BackendUnavailableError(
        f"{op}: backend {requested} cannot run on {tensor.device}: {reason}; "
        f"expected one of {', '.join(able) or 'none'}, got {requested}"
    )


def asked_once(function: Run) -> Run:
    """What ``torch.compiler.assume_constant_result`` makes of a function: a compiler calls it and keeps the result.

    The function of torch is not used, because it imports the compiler, and with it triton. That takes as long as
    importing torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def check_result(op: str, found: Any, arguments: Sequence[Any], names: Sequence[str], fake: Run) -> None:
    """Refuse what a registered backend of another, which ran last, must not return; ours are not looked at.

    Args:
        op: name of the op. found: what it returned for ``arguments``, called ``names``. fake: what gives the shapes
            and dtypes of its results.

    Raises:
        RuntimeError: a result has another shape or dtype, or is one of the arguments.
    """
    if len(_names) == len(_OURS) or (name := _last.of.get(op)) in (None, *_OURS):
        return
    expected = fake(*(value.to("meta") if isinstance(value, Tensor) else value for value in arguments))
    right, got = (_kinds(values) for values in (expected, found))
    if got != right:
        raise RuntimeError(f"{op}: backend {name} gave a wrong result; expected {right}, got {got}")
    for argument, value in zip(names, arguments, strict=False):
        if any(value is one for one in (found if isinstance(found, tuple) else (found,))):
            raise RuntimeError(f"{op}: backend {name} gave back its argument; expected a new tensor, got {argument}")


def _kinds(values: Any) -> str:
    several = values if isinstance(values, (tuple, list)) else (values,)
    return " and ".join(
        f"{str(one.dtype).removeprefix('torch.')} {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
        for one in several
    )


@asked_once
def has_backend(op: str, name: str) -> bool:
    """Whether an op has a backend of that name, wherever it runs."""
    return any(found.name == name for found in table(op))


def _is_raw(op: str, tensor: Tensor, requested: str, others: Mapping[str, Tensor | None]) -> bool:
    case = None if others.get("exponent") is None else {"exponent": True}
    chosen = resolve(op, tensor, requested, case, **others)
    if not chosen.raw or chosen.refuses is None or requested != "auto":
        return chosen.raw
    # it may refuse the sizes, and leave them to the next one
    dtypes = {tensor.dtype, *(other.dtype for other in others.values() if other is not None)}
    device, backends = tensor.device.type, table(op)
    behind = backends[[backend.name for backend in backends].index(chosen.name) + 1 :]
    able = (b for b in behind if device not in b.by_name_only and b.why_not(device) is None and dtypes <= {*b.dtypes})
    return next((backend.raw for backend in able), True)


@asked_once
def _takes_raw(op: str, device: str, requested: str, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    first, *others = (torch.empty(0, dtype=dtype, device=device) for dtype in dtypes)
    try:
        return _is_raw(op, first, requested, dict(zip(names, others, strict=True)))
    except (BackendUnavailableError, BackendDtypeError):
        # the op itself says so, in words that the compiler lets through
        return False


def takes_raw(op: str, tensor: Tensor, requested: str, **others: Tensor | None) -> bool:
    """Whether the backend that ``resolve`` finds is ``raw``, whatever the sizes are; a compiler asks once."""
    if not torch.compiler.is_compiling():
        return _is_raw(op, tensor, requested, others)
    given = {name: other for name, other in others.items() if other is not None}
    dtypes = (tensor.dtype, *(other.dtype for other in given.values()))
    return _takes_raw(op, tensor.device.type, requested, tuple(given), dtypes)


def gradients(op: str, chosen: Backend, *arguments: Any) -> Any:
    """What the backend's backward gives.

    Raises:
        BackendUnavailableError: it has none.
    """
    if chosen.run_backward is None:
        able = ", ".join(backend.name for backend in table(op) if backend.run_backward is not None)
        raise BackendUnavailableError(
            f"{op}: backend {chosen.name} has no backward; expected one of {able} for a gradient, got {chosen.name}"
        )
    return chosen.run_backward(*arguments)


@asked_once
def _for_onnx() -> bool:
    # a trace takes torch's own function for False
    return torch.onnx.is_in_onnx_export()


def requested_backend(op: str, backend: str | None) -> str:
    """What a public function's ``backend`` argument asks for: the argument, then ``use_backend``, then ``auto``.

    Every call passes here. So a tracer that cannot follow our ops is refused here.
    """
    compiling = is_compiling()
    if _get_tracing_state() is not None or (compiling and _for_onnx()):
        asked = "ONNX" if _for_onnx() else "torch.jit.trace"
        raise TypeError(f"{op}: {asked} has no form for this op; expected torch.export or torch.compile, got {asked}")
    if backend is None:
        known = _compiled.override if compiling else ...
        backend = _override.get() if known is ... else known
    if backend is None:
        return "auto"
    if backend not in backend_names():
        raise ValueError(f"{op}: backend is unknown; expected one of {', '.join(backend_names())}, got {backend!r}")
    return backend


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every op whose ``backend`` is None uses this one.

    The block holds for the thread or asyncio task that enters it, and for tasks started in it. It does not hold for
    threads started in it. A backward always runs on the backend of its forward. But what ``torch.utils.checkpoint``
    computes again chooses anew. On a GPU that happens in a thread of autograd, outside of every block. The ``backend``
    argument of an op or a module holds everywhere.

    Examples:
        >>> import torch
        >>> from drseg_core import ops
        >>> with ops.use_backend("reference"):
        ...     y = ops.graph_propagate(torch.ones(3, 2), torch.tensor([[1], [2], [0]]), torch.ones(3, 1))
        >>> ops.last_backend("graph_propagate")
        'reference'
    """
    requested_backend("use_backend", name)
    compiling, previous = is_compiling(), _compiled.override
    if compiling or previous is not ...:
        _compiled.override = name
    token = None if compiling else _override.set(name)
    try:
        yield
    finally:
        if token is not None:
            _override.reset(token)
        _compiled.override = previous


def last_backend(op: str) -> str | None:
    """Name of the backend that computed ``op`` last in this thread; None if none did.

    On a GPU autograd computes in a thread of its own, which is not seen from here. It uses the backend of the forward.

    Examples:
        >>> from drseg_core import ops
        >>> ops.last_backend("no such op") is None
        True
    """
    return _last.of.get(op)


def backend_report() -> list[dict[str, Any]]:
    """For every op, backend and device type: can it run here, and if not, why.

    Returns:
        Rows with the keys ``op``, ``backend``, ``device``, ``available``, ``reason`` (None when available) and
        ``place``. The backend of place 0 runs if none is named, that of place 1 if the first were not there, and so
        on. None means: only if named, or not at all.

    Examples:
        >>> from drseg_core import ops
        >>> {row["op"] for row in ops.backend_report()} >= {"knn_graph", "graph_layer"}
        True
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows: list[dict[str, Any]] = []
    for op in _tables:
        backends = {backend.name: backend for backend in table(op)}
        for name in backend_names():
            for device in devices:
                able = [b.name for b in backends.values() if device not in b.by_name_only and b.why_not(device) is None]
                reason = backends[name].why_not(device) if name in backends else f"{op} has no {name} kernel"
                row = {"op": op, "backend": name, "device": device, "available": reason is None, "reason": reason}
                rows.append({**row, "place": able.index(name) if name in able else None})
    return rows


_AS_IT_IS = contextlib.nullcontext()


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """An op's body runs below autograd but not below autocast, which would round what it computes in float32.

    The precision of float32 products is a setting of the whole process, which no op may change. So where the setting
    allows less, no op asks the library for such a product. A kernel of ours multiplies. References need no such
    product.
    """
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    # usual, and quicker than a context that changes nothing
    return _AS_IT_IS

# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs, and why not another.

An op's table lists its backends from the most to the least preferred. One predicate, ``why_not``, serves the choice,
the error for a backend named in vain and ``drseg doctor``. Nothing falls back silently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drseg_core.errors import BackendDtypeError, BackendUnavailableError

BACKEND_NAMES = ("reference", "native", "triton")

_override: str | None = None
_last: dict[str, str] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: one of ``BACKEND_NAMES``.
        run: what computes the op's forward; positional arguments of the registered op without ``backend``.
        run_backward: what computes its gradients, or None for an op without any.
        why_not: given a device type, says why this backend cannot run there, or returns None when it can.
        dtypes: dtypes of the op's floating-point tensors that it computes in.
    """

    name: str
    run: Callable[..., Any]
    run_backward: Callable[..., Any] | None
    why_not: Callable[[str], str | None]
    dtypes: tuple[torch.dtype, ...]


_tables: dict[str, Sequence[Backend]] = {}


def add_table(op: str, backends: Sequence[Backend]) -> None:
    """Make ``backends`` (most preferred first) the implementations of ``op``."""
    _tables[op] = tuple(backends)


def _unasked(backend: Backend, device: str) -> bool:
    """Whether a backend runs for who names none: on a CPU the Triton kernels are interpreted, for tests."""
    return device != "cpu" or backend.name != "triton"


def resolve(op: str, tensor: Tensor, requested: str, **others: Tensor | None) -> Backend:
    """The backend that computes ``op`` on ``tensor``.

    Args:
        op: name of the op.
        tensor: its first tensor; device and dtype decide.
        requested: a backend's name, or ``"auto"`` for the most preferred one that can run.
        others: its other floating-point tensors by name, whose dtypes decide as well: of a wider one the result would
            have the dtype and not the precision.

    Raises:
        BackendUnavailableError: the named backend cannot run; the message says why.
        BackendDtypeError: the named backend does not compute in one of the dtypes (also a ``TypeError``).
    """
    device = tensor.device.type
    dtypes = {"": tensor.dtype} | {name: other.dtype for name, other in others.items() if other is not None}
    reasons = {}
    for backend in _tables[op]:
        if requested != backend.name and not (requested == "auto" and _unasked(backend, device)):
            continue
        reason = backend.why_not(device)
        for name, dtype in dtypes.items():
            if reason is None and dtype not in backend.dtypes:
                reason = f"it does not compute in {dtype}"
                if requested == backend.name:
                    raise BackendDtypeError(
                        f"{op}: backend {requested} cannot take {name + ' in ' if name else ''}{dtype}; "
                        f"expected one of {', '.join(map(str, backend.dtypes))}, got {dtype}"
                    )
        if reason is None:
            _last[op] = backend.name
            return backend
        reasons[backend.name] = reason
    able = [b.name for b in _tables[op] if b.why_not(device) is None and set(dtypes.values()) <= {*b.dtypes}]
    reason = reasons.get(requested, f"{op} has no {requested} kernel")
    raise BackendUnavailableError(
        f"{op}: backend {requested} cannot run on {tensor.device}: {reason}; "
        f"expected one of {', '.join(able) or 'none'}, got {requested}"
    )


def preferred(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Name of the backend that ``op`` takes for tensors of a dtype on a device type if none is named."""
    for backend in _tables[op]:
        if _unasked(backend, device) and backend.why_not(device) is None and dtype in backend.dtypes:
            return backend.name
    return None


# the answer is the same for every call, and torch.compile cannot follow the search for it; the public way to say so
# would import the compiler
preferred._dynamo_marked_constant = True  # type: ignore[attr-defined]


def requested_backend(op: str, backend: str | None) -> str:
    """What a public function's ``backend`` argument asks for: the argument, then ``use_backend``, then ``auto``."""
    if backend is None:
        backend = _override
    if backend is None:
        return "auto"
    if backend not in BACKEND_NAMES:
        raise ValueError(f"{op}: backend is unknown; expected one of {', '.join(BACKEND_NAMES)}, got {backend!r}")
    return backend


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every op whose ``backend`` is None uses this one (process-wide, not per thread)."""
    global _override
    requested_backend("use_backend", name)
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def last_backend(op: str) -> str | None:
    """Name of the backend that computed ``op`` last in this process."""
    return _last.get(op)


def backend_report() -> list[dict[str, Any]]:
    """For every op, backend and device type: can it run here, and if not, why.

    Returns:
        Rows with the keys ``op``, ``backend``, ``device``, ``available``, ``reason`` (None when available) and
        ``place``: 0 for what runs where no backend is named, 1 for what would without that, and so on; None for what
        never does.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows: list[dict[str, Any]] = []
    for op, backends in _tables.items():
        table = {backend.name: backend for backend in backends}
        for name in BACKEND_NAMES:
            for device in devices:
                unasked = [b.name for b in backends if _unasked(b, device) and b.why_not(device) is None]
                reason = table[name].why_not(device) if name in table else f"{op} has no {name} kernel"
                row = {"op": op, "backend": name, "device": device, "available": reason is None, "reason": reason}
                rows.append({**row, "place": unasked.index(name) if name in unasked else None})
    return rows


# entries of torch's table of float32 precisions that decide on matrix products
_PRODUCTS = (("cuda", "matmul"), ("mkldnn", "matmul"))


def _own_precision(backend: str, op: str) -> str:
    """What the entry itself holds, ``none`` if it takes the value of the levels above it.

    The getter tells the effective value only, so those levels are lifted while it is read.
    """
    outer: list[tuple[str, str, str]] = []
    try:
        for level in (("generic", "all"), (backend, "all")):
            outer.append((*level, torch._C._get_fp32_precision_getter(*level)))
            torch._C._set_fp32_precision_setter(*level, "none")
        return torch._C._get_fp32_precision_getter(backend, op)
    finally:
        for level_backend, level_op, precision in outer:
            torch._C._set_fp32_precision_setter(level_backend, level_op, precision)


@contextlib.contextmanager
def plain_float32(tensor: Tensor) -> Iterator[None]:
    """Full float32 products: no autocast and no TF32 or bf16 shortcut, whatever the caller has set.

    An op's body runs below autograd but not below autocast, and the precision of float32 products is global; either
    would round the affinities before the selection. The precision has two interfaces, ``fp32_precision`` of
    ``torch.backends`` and ``set_float32_matmul_precision``; both are put back as they were.
    """
    legacy: str | None
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch refuses to read the older setting where the newer one contradicts it; only the newer one counts then
        legacy = None
    newer = hasattr(torch._C, "_get_fp32_precision_getter")
    reduced = newer and any(torch._C._get_fp32_precision_getter(*entry) not in ("none", "ieee") for entry in _PRODUCTS)
    changes = reduced or legacy not in (None, "highest")
    own = [(*entry, _own_precision(*entry)) for entry in _PRODUCTS] if changes and newer else []
    try:
        if changes and legacy is not None:
            torch.set_float32_matmul_precision("highest")
        for backend, op, _ in own:
            torch._C._set_fp32_precision_setter(backend, op, "ieee")
        with torch.autocast(tensor.device.type, enabled=False):
            yield
    finally:
        # the older setter writes the newer entries too, so these come last
        if changes and legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, op, precision in own:
            torch._C._set_fp32_precision_setter(backend, op, precision)


def refuse_double_backward(op: str) -> Callable[..., Any]:
    """Backward of a backward: raises, because no second derivative is implemented."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{op}: backward is not twice differentiable; expected create_graph=False, got a second derivative"
        )

    return backward

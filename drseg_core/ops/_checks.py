# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the ops. They run on the host, before any launch, for empty and fake tensors too.

Every message reads ``<op>: <argument> <problem>; expected ..., got ...``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from drseg_core.errors import NumericalError

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)
_LARGEST = torch.finfo(torch.float64).max


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    op: str, name: str, value: object, shape: tuple[str, ...] | None, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """Refuse what is not a dense tensor with the ranks and dtypes the op takes.

    ``shape`` names the dimensions of the batched form, e.g. ``("B", "N", "D")``; where it starts with ``B`` the
    unbatched form is taken too. None leaves the rank to the caller.
    """
    if type(value) is Tensor or type(value) is torch.nn.Parameter:
        # as it is nearly always, and the rest takes longer than much of what else a call does
        if value.dtype in dtypes and value.layout is torch.strided and not value.is_nested and not value.is_meta:
            if shape is None or value.dim() == len(shape) or (shape[0] == "B" and value.dim() == len(shape) - 1):
                return
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; expected torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{op}: {name} is a DTensor; expected torch.Tensor, got a distributed one: call .to_local()")
    if value.is_nested or value.is_quantized or value.layout != torch.strided:
        layout = "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout)
        raise TypeError(f"{op}: {name} has an unsupported layout; expected a dense strided tensor, got {layout}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{op}: {name} has an unsupported dtype; expected one of {_names(dtypes)}, got {_names([value.dtype])}"
        )
    if value.device.type == "meta":
        raise RuntimeError(f"{op}: {name} is a meta tensor; expected data, got none: meta tensors have no data")
    if shape is None:
        return
    ranks = {len(shape)} | ({len(shape) - 1} if shape[0] == "B" else set())
    if value.dim() not in ranks:
        forms = [f"({', '.join(shape)})"]
        if len(ranks) == 2:
            forms.insert(0, f"({', '.join(shape[1:])})")
        raise ValueError(
            f"{op}: {name} has the wrong rank; expected shape {' or '.join(forms)}, got {tuple(value.shape)}"
        )


def check_shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{op}: {name} has the wrong shape; expected {meaning} = {expected}, got {tuple(value.shape)}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    first, expected = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        device = tensor.device
        if expected is None:
            first, expected = name, device
        elif device != expected:
            raise ValueError(f"{op}: {name} is on another device; expected {expected} as {first}, got {device}")


def check_no_tangent(op: str, **tensors: Tensor) -> None:
    """Refuse forward-mode differentiation: a registered op would drop the tangent without a word."""
    # outside of every level nothing has a tangent
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise TypeError(
                f"{op}: {name} has a forward-mode tangent; expected reverse-mode differentiation (backward), got jvp"
            )


def check_unmapped(op: str, **tensors: Tensor) -> None:
    """Refuse ``torch.vmap`` over what is read on the host: torch's own words ask for a report of a fault."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    for name, tensor in tensors.items():
        # a transform within vmap wraps what vmap has wrapped
        while functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                raise TypeError(
                    f"{op}: {name} is mapped by torch.vmap, and its values are read; "
                    "expected a batch dimension B instead, got a mapped tensor"
                )
            tensor = functorch.get_unwrapped(tensor)


def check_csc(op: str, csc: object, index: Tensor) -> None:
    """Refuse columns that cannot be those of ``index``, by types and sizes."""
    if csc is None:
        return
    if not isinstance(csc, tuple) or len(csc) != 2:
        raise TypeError(f"{op}: csc must be a pair of tensors; expected Csc or None, got {type(csc).__name__}")
    rows = math.prod(index.shape[:-1])
    for name, value, size, meaning in (
        ("csc.indptr", csc[0], rows + 1, "(B * N + 1,)"),
        ("csc.perm", csc[1], index.numel(), "(B * N * K,)"),
    ):
        check_tensor(op, name, value, None, INDEX_DTYPES)
        check_shape(op, name, value, (size,), meaning)
        check_same_device(op, index=index, **{name: value})


def check_csc_values(op: str, csc: tuple[Tensor, Tensor] | None, right: tuple[Tensor, Tensor]) -> None:
    """Refuse columns of another graph than ``right``'s. Reads the data, so it synchronises a GPU."""
    if csc is not None and not all(
        torch.equal(value.long(), own.long()) for value, own in zip(csc, right, strict=True)
    ):
        raise ValueError(f"{op}: csc is of another graph; expected csc(index), got other columns")


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        got = type(value).__name__
        # numpy's has the same name
        where = f"{type(value).__module__}." if got == "bool" else ""
        raise TypeError(f"{op}: {name} must be a flag; expected bool, got {where}{got}")


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} is unknown; expected one of {', '.join(choices)}, got {value!r}")


def number(value: Any) -> Any:
    """The Python number that a scalar of numpy is, or a tensor of no dimensions; everything else as it is.

    A tensor that waits on a GPU, or for a gradient, is none: the one would be waited for, the other be lost.
    """
    if type(value) is int or type(value) is float or getattr(value, "ndim", None) != 0:
        return value
    if isinstance(value, Tensor) and (value.device.type != "cpu" or value.requires_grad):
        return value
    return value.item()


def numbers(values: Any) -> Any:
    """The same for each of a tuple or list; everything else as it is."""
    if not isinstance(values, (tuple, list)):
        return values
    return tuple([value if type(value) is int else number(value) for value in values])


def check_count(op: str, name: str, value: object, *, positive: bool = False) -> int:
    """An integer >= 0, or >= 1, as Python's, or as the symbol that a compiler has for it."""
    count = number(value)
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer; expected int, got {type(count).__name__}")
    if count < 0:
        raise ValueError(f"{op}: {name} must not be negative; expected {name} >= 0, got {count}")
    if positive and count == 0:
        raise ValueError(f"{op}: {name} is out of range; expected {name} >= 1, got 0")
    return count  # type: ignore[return-value]


def check_grid(op: str, grid: object, nodes: int | None = None) -> tuple[int, int]:
    """A pair (h, w) of integers >= 0 as Python's; with h * w the given number of nodes of the prior."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"{op}: grid is not a pair; expected (h, w), got {' '.join(repr(grid).split())}")
    height, width = check_count(op, "grid height", grid[0]), check_count(op, "grid width", grid[1])
    if nodes is not None and height * width != nodes:
        raise ValueError(f"{op}: grid does not match prior; expected h * w = N = {nodes}, got {height} x {width}")
    return height, width


def check_number(op: str, name: str, value: object, *, positive: bool = False) -> float:
    """A finite number >= 0 as Python's."""
    found = number(value)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; expected float, got {type(found).__name__}")
    # comparisons only: torch.compile traces no math.isfinite of a symbolic number; integers may be larger than floats
    if not 0 <= found <= _LARGEST or (positive and found == 0):
        rule = "> 0" if positive else ">= 0"
        got = found if isinstance(found, float) or abs(found) <= _LARGEST else "an integer beyond float64"
        raise ValueError(f"{op}: {name} is out of range; expected a finite number {rule}, got {got}")
    return found


def check_alpha(op: str, value: object) -> float:
    """The share of the neighbours in what is propagated, as Python's number."""
    alpha = check_number(op, "alpha", value)
    if not alpha < 1:
        raise ValueError(f"{op}: alpha is out of range; expected 0 <= alpha < 1, got {alpha}")
    return alpha


def check_edges(
    op: str,
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    inverse_norm: Tensor | None,
    source_bias: Tensor | None,
    mask: Tensor | None,
    score: Tensor | None,
    exponent: Tensor | None,
) -> Tensor:
    """The arguments of the ops that weigh edges; the vector (E,), also of a (1, E)."""
    if isinstance(vector, Tensor) and vector.dim() == 2 and not vector.is_nested and vector.shape[0] == 1:
        # the weight of a linear layer with one output
        vector = vector[0]
    check_tensor(op, "source", source, ("B", "N", "E" if target is not None else "2E"))
    check_tensor(op, "index", index, ("B", "N", "K"), INDEX_DTYPES)
    check_tensor(op, "vector", vector, ("E",))
    check_tensor(op, "bias", bias, None)
    width = source.shape[-1]
    if target is not None:
        check_tensor(op, "target", target, ("B", "N", "E"))
        check_shape(op, "target", target, tuple(source.shape), "the shape of source")
    elif width % 2:
        raise ValueError(f"{op}: source is no two halves; expected (..., 2E) where target is None, got {width} columns")
    else:
        width //= 2
    if inverse_norm is not None:
        check_tensor(op, "inverse_norm", inverse_norm, ("B", "N"), (torch.float32, torch.float64))
        check_shape(op, "inverse_norm", inverse_norm, tuple(source.shape[:-1]), "the shape of source before E")
    if source_bias is not None:
        check_tensor(op, "source_bias", source_bias, ("E",))
        check_shape(op, "source_bias", source_bias, (width,), "(E,)")
    if mask is not None:
        check_tensor(op, "mask", mask, ("B", "N", "K"), (torch.bool,))
    if score is not None:
        check_tensor(op, "score", score, ("B", "N", "K"))
        if mask is not None:
            raise ValueError(f"{op}: score and mask say the same; expected one of them, got both")
    if exponent is not None:
        check_tensor(op, "exponent", exponent, ("B", "N", "K"), (torch.float32, torch.float64))
    given = {"source": source, "target": target, "vector": vector, "bias": bias, "source_bias": source_bias}
    given |= {"exponent": exponent, "inverse_norm": inverse_norm, "score": score}
    check_same_device(op, **given, index=index, mask=mask)
    check_no_tangent(op, **{name: value for name, value in given.items() if value is not None})
    check_shape(op, "vector", vector, (width,), "(E,)")
    if bias.numel() != 1:
        raise ValueError(f"{op}: bias has the wrong shape; expected () or (1,), got {tuple(bias.shape)}")
    if index.shape[:-1] != source.shape[:-1]:
        raise ValueError(
            f"{op}: index does not match source; expected {tuple(source.shape[:-1])} before K, got {tuple(index.shape)}"
        )
    for name, value in (("mask", mask), ("score", score), ("exponent", exponent)):
        if value is not None:
            check_shape(op, name, value, tuple(index.shape), "the shape of index")
    return vector


def check_index_values(op: str, index: Tensor, nodes: int) -> None:
    """Refuse an index outside ``[0, nodes)``. Reads the data, so it synchronises a GPU."""
    check_unmapped(op, index=index)
    bad = (index < 0) | (index >= nodes)
    if bool(bad.any()):
        position = bad.nonzero()[0].tolist()
        where = ", ".join(map(str, position))
        value = int(index[tuple(position)])
        raise ValueError(
            f"{op}: index is out of range; expected 0 <= index < N = {nodes}, got index[{where}] = {value}"
        )


def check_weight_values(op: str, weight: Tensor) -> None:
    """Refuse a negative or non-finite edge weight. Reads the data, so it synchronises a GPU."""
    check_unmapped(op, weight=weight)
    bad = ~(weight >= 0) | weight.isinf()
    if bool(bad.any()):
        position = bad.nonzero()[0].tolist()
        where = ", ".join(map(str, position))
        value = float(weight[tuple(position)])
        raise NumericalError(
            f"{op}: weight is negative or not finite; expected finite values >= 0, got weight[{where}] = {value}"
        )


def check_finite_rows(op: str, name: str, value: Tensor) -> None:
    """Refuse non-finite features, naming the first bad node. Reads the data, so it synchronises a GPU."""
    check_unmapped(op, **{name: value})
    bad = (~value.isfinite()).sum(-1)
    if bool(bad.any()):
        position = bad.nonzero()[0].tolist()
        count = int(bad[tuple(position)])
        where = ", ".join(f"{axis}={i}" for axis, i in zip("bn"[2 - len(position) :], position, strict=True))
        raise NumericalError(
            f"{op}: {name}[{where}] has {count} non-finite values; expected finite values, got NaN or Inf"
        )

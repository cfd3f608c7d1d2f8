# SPDX-License-Identifier: Apache-2.0
"""Arguments of the ops that weigh edges, and their plain form for backends that take nothing else.

Our kernels read projections as they leave a product, and scores in place of a mask. Other backends are given plain
``source``, ``target`` and a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch
from drseg_core.ops._registration import asked_for, widest

# source, or both halves in one; target, or None; inverse_norm and source_bias, or None
Halves = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def plain_halves(halves: Halves) -> tuple[Tensor, Tensor]:
    """``source`` and ``target`` (B, N, E), normalised and with the bias of the first layer."""
    source, target, inverse_norm, source_bias = halves
    if target is None:
        source, target = source.chunk(2, -1)
    if inverse_norm is None and source_bias is None:
        return source, target
    wide = widest(*halves)
    source, target = source.to(wide), target.to(wide)
    if inverse_norm is None:
        return source if source_bias is None else source + source_bias.to(wide), target
    factor = inverse_norm.to(wide).unsqueeze(-1)
    target = target * factor
    return source * factor if source_bias is None else torch.addcmul(source_bias.to(wide), source, factor), target


def plain_mask(mask: Tensor | None) -> Tensor | None:
    """A mask, where scores came in its place: -inf where there is no edge."""
    return mask if mask is None or mask.dtype == torch.bool else mask.ne(-torch.inf)


def _others(halves: Halves, vector: Tensor, bias: Tensor, exponent: Tensor | None) -> dict[str, Tensor | None]:
    names = ("target", "inverse_norm", "source_bias")
    return {"vector": vector, "bias": bias, **dict(zip(names, halves[1:], strict=True)), "exponent": exponent}


def resolve(
    op: str,
    halves: Halves,
    vector: Tensor,
    bias: Tensor,
    exponent: Tensor | None,
    backend: str,
    case: Mapping[str, Any] | None = None,
) -> _dispatch.Backend:
    """The backend for ``op`` in all of these dtypes and takes the ``case``, and an exponent if there is one."""
    if exponent is not None:
        case = {**(case or {}), "exponent": True}
    return _dispatch.resolve(op, halves[0], backend, case, **_others(halves, vector, bias, exponent))


def takes_raw(op: str, halves: Halves, vector: Tensor, bias: Tensor, exponent: Tensor | None, backend: str) -> bool:
    """Whether that backend takes the arguments as they come."""
    return _dispatch.takes_raw(op, halves[0], backend, **_others(halves, vector, bias, exponent))


def _last(exponent: Tensor | None) -> tuple[Tensor, ...]:
    """An exponent as the last argument of a backend, which may know of none."""
    return () if exponent is None else (exponent,)


def run(
    chosen: _dispatch.Backend,
    halves: Halves,
    edges: Sequence[Tensor],
    mask: Tensor | None,
    exponent: Tensor | None,
    *options: Any,
) -> Any:
    """The forward of an op; ``edges`` are index, vector and bias."""
    if chosen.raw:
        return chosen.run(halves, *edges, mask, *options, *_last(exponent))
    return chosen.run(*plain_halves(halves), *edges, plain_mask(mask), *options, *_last(exponent))


def run_backward(
    op: str,
    chosen: _dispatch.Backend,
    saved: Sequence[Tensor],
    halves: Halves,
    edges: Sequence[Tensor],
    options: Sequence[Any],
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None,
    exponent: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients to source, target, vector, bias, source_bias and exponent, empty where they are not asked for.

    ``saved`` is the incoming gradient and what the forward kept. Halves in one tensor have one gradient, to source.
    """
    source, target, inverse_norm, source_bias = halves
    to_exponent = () if exponent is None else output_mask[5:]
    if chosen.raw:
        mask = [*output_mask[:5], *to_exponent]
        given = (*saved, halves, *edges, *options, mask, csc, *_last(exponent))
        found = asked_for(_dispatch.gradients(op, chosen, *given), mask)
        return found if to_exponent else (*found, source.new_empty(0))
    wants_source, wants_target, wants_vector, wants_bias, wants_shift = output_mask[:5]
    stacked = target is None
    mask = [wants_source or wants_shift, wants_source if stacked else wants_target, wants_vector, wants_bias]
    mask += to_exponent
    given = (*saved, *plain_halves(halves), *edges, *options, mask, csc, *_last(exponent))
    to_source, to_target, to_vector, to_bias, *last = asked_for(_dispatch.gradients(op, chosen, *given), mask)
    to_shift = source.new_empty(0)
    if source_bias is not None and wants_shift:
        to_shift = to_source.sum(tuple(range(to_source.dim() - 1))).to(source_bias.dtype)
    parts = [to_source if wants_source else source.new_empty(0), to_target]
    if inverse_norm is not None:
        parts = [value * inverse_norm.unsqueeze(-1) if value.numel() else value for value in parts]
    if stacked and wants_source:
        parts = [torch.cat(parts, -1), source.new_empty(0)]
    like = (source, source if target is None else target)
    parts = [value.to(half.dtype) for value, half in zip(parts, like, strict=True)]
    return (*parts, to_vector, to_bias, to_shift, *(last or [source.new_empty(0)]))

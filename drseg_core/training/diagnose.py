# SPDX-License-Identifier: Apache-2.0
"""Where values stopped being finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite(model: nn.Module, image: Tensor, text: Tensor) -> str:
    """Name the first tensor that is not finite: input, then parameters and buffers, then activations in order.

    Runs the model once more, without gradients; the models here do not change by that.
    """
    if not torch.isfinite(image).all():
        return "the input image"
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, value in tensors:
            if value.is_floating_point() and (bad := int((~torch.isfinite(value)).sum())):
                return f"{kind} {name} ({bad} of {value.numel()} values)"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(not torch.isfinite(value).all() for value in _floating(output)):
                found.append(f"output of {name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name or "the model")) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(image, text)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "a gradient or the loss itself"


def _floating(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, (tuple, list)):
        return [value for item in output for value in _floating(item)]
    if isinstance(output, dict):
        return [value for item in output.values() for value in _floating(item)]
    return []

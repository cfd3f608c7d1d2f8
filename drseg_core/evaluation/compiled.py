# SPDX-License-Identifier: Apache-2.0
"""A model for inference alone, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from drseg_core.errors import BackendUnavailableError, ConfigError


def compiled_network(network: Any, device: torch.device) -> Callable[..., Any]:
    """``torch.compile`` of a model that is called without gradients; it compiles in its first calls.

    On a CPU the compiled code has its own copy of the weights, in the order and dtype that its products read. So later
    changes of the model have no effect.

    Args:
        network: a module.
        device: where it runs.

    Raises:
        ConfigError: it is no module.

    Calls raise BackendUnavailableError if it cannot be compiled, for example without a C++ compiler.
    """
    if not isinstance(network, nn.Module):
        raise ConfigError(f"compiled: model cannot be compiled; expected a torch module, got {type(network).__name__}")
    made = torch.compile(network, options={"freezing": True} if device.type == "cpu" else None)

    def call(*given: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return made(*given)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            raise BackendUnavailableError(
                f"compiled: model cannot be compiled on {device.type}; got {reason}"
            ) from error

    return call

# SPDX-License-Identifier: Apache-2.0
"""What is made once per graph: lists that several launches need, for as long as the graph lives unchanged."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Made = TypeVar("Made")

# of an index in use: its version, the stream on which its lists were made, and the lists by what they are
kept: Any = WeakIdKeyDictionary()


def once_per_graph(index: Tensor, what: Hashable, make: Callable[[], Made]) -> Made:
    """``make()``, or what it gave for this index before.

    A graph that is recorded into a CUDA graph is made anew in every call: a replay must see what the index holds then.
    An index whose content changes without torch's notice (``.data``, another library, a replay that writes it) must be
    another tensor, or the lists are those of before.

    Args:
        index: (B, N, K) neighbours. what: tells apart what is made of one index. make: must not wait for the device.
    """
    if index.is_inference() or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return make()
    # another stream may run before what was made on this one has ended
    stream = torch.cuda.current_stream(index.device) if index.is_cuda else None
    found = kept.get(index)
    if found is None or found[:2] != (index._version, stream):
        found = kept[index] = (index._version, stream, {})
    if what not in found[2]:
        found[2][what] = make()
    made: Made = found[2][what]
    return made

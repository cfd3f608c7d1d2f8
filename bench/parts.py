# SPDX-License-Identifier: Apache-2.0
"""What each part of the whole model takes of a step, the way back included: from a profile of the step.

Forward, an operator belongs to the part inside whose call it runs. Backward, it belongs to the part whose operator made
its node of the autograd graph: both carry the same sequence number. On a GPU the time is that of the kernels.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

# what is called of a model, and the part that it is
_CALLS = (
    ("CLIP image", "clip.visual", "forward"),
    ("CLIP text", "clip.text", "forward"),
    ("prior", "dino", "maps"),
    ("SPSD", "spsd", "split"),
    ("SPSD", "spsd", "merge"),
    ("PDGR", "pdgr", "forward"),
    ("UGAF", "fusion", "forward"),
    ("aggregator", "aggregator", "forward"),
    ("decoder", "decoder", "forward"),
)
LOSS, OPTIMIZER, REST = "loss", "optimizer", "rest"
PARTS = (*dict.fromkeys(name for name, _, _ in _CALLS), LOSS, OPTIMIZER, REST)
_PREFIX = "part of the model: "
# scope and name of what the autograd engine runs
_BACKWARD, _ENGINE = 1, "autograd::engine::evaluate_function"


def part(name: str) -> record_function:
    """What runs inside is of this part."""
    return record_function(_PREFIX + name)


@contextlib.contextmanager
def named(model: nn.Module) -> Iterator[None]:
    """Inside, the calls of the model's parts are told apart in a profile."""
    with contextlib.ExitStack() as stack:
        for name, place, method in _CALLS:
            owner: Any = model
            for step in place.split("."):
                owner = getattr(owner, step, None)
            if owner is not None:
                setattr(owner, method, _inside(name, getattr(owner, method)))
                # the method of the class is seen again
                stack.callback(delattr, owner, method)
        yield


def _inside(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with part(name):
            return call(*arguments, **options)

    return run


def milliseconds(run: Callable[[], object], device: str, steps: int) -> dict[str, float]:
    """Milliseconds of each part of one call of ``run``; they add up to all that was profiled."""
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    # the first use sets the profiler up
    for count in dict.fromkeys((1, steps)) if on_gpu else (steps,):
        with profile(activities=activities) as taken:
            for _ in range(count):
                run()
            if on_gpu:
                torch.cuda.synchronize()
    found = attributed(taken.events() or [], on_gpu)
    return {name: found[name] / 1000 / steps for name in PARTS if name in found}


def attributed(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Microseconds by part of the events of a profile."""
    ours = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    made: dict[int, str] = {}
    for event in ours:
        # of several operators with one number, the last is the one that made the node
        if event.sequence_nr >= 0 and not _is_backward(event):
            made[event.sequence_nr] = _part_of(event, {})
    total: dict[str, float] = collections.defaultdict(float)
    for event in ours:
        if on_gpu:
            # a range has a mirror among the kernels, of its own name
            us = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
        else:
            us = event.self_cpu_time_total
        total[_part_of(event, made)] += us
    return dict(total)


def _is_backward(event: Any) -> bool:
    return event.scope == _BACKWARD or event.name.startswith(_ENGINE)


def _part_of(event: Any, made: dict[int, str]) -> str:
    while event is not None:
        if event.name.startswith(_PREFIX):
            return str(event.name.removeprefix(_PREFIX))
        if _is_backward(event) and event.sequence_nr in made:
            return made[event.sequence_nr]
        event = event.cpu_parent
    return REST

# SPDX-License-Identifier: Apache-2.0
"""One thing to time: the engine at a case. Everything that times the engine alone builds it here, gate included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import one_op, selection, whole_pdgr
from drseg_core.ops import use_backend
from drseg_core.testing import CASES, Case

MODES = ("fwd", "fwd+bwd")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
PDGR_CASES = {case.name: case for case in whole_pdgr.CASES}
SELECTION_CASES = {what.case.name: what for what in selection.CASES}
# what whole PDGR and the selection can be compared with
BESIDE = tuple(dict.fromkeys((*whole_pdgr.BESIDE, *selection.BESIDE)))
OP_CASES = {case.name: case for case in CASES}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for.

    Args:
        op: ``pdgr`` or an op. case: a named size. mode: ``fwd`` or ``fwd+bwd``.
        data: ``random`` or ``dino`` for ``pdgr_*`` and ``knn_*``; the other cases have their own (``case``).
        dtype: of the features; ``pdgr_*`` are float32. backend: None takes the one that runs by default.
    """

    op: str
    case: str
    mode: str
    data: str
    dtype: str = "float32"
    backend: str | None = None

    def __str__(self) -> str:
        words = [self.op, self.case, self.mode, self.data, self.dtype]
        return " ".join(words + ([self.backend] if self.backend else []))

    @property
    def sizes(self) -> Case:
        if self.case in SELECTION_CASES:
            return SELECTION_CASES[self.case].case
        return PDGR_CASES[self.case] if self.case in PDGR_CASES else OP_CASES[self.case]


def jobs_of(op: str, case: str, modes: list[str], data: list[str], dtype: str, backend: str | None) -> list[Job]:
    """Every job of an op at a case; none where there is no such thing."""
    modes = [mode for mode in modes if mode == "fwd" or op != "knn_graph"]
    if op == "pdgr" and case in PDGR_CASES and dtype == "float32":
        return [Job(op, case, mode, kind, dtype, backend) for mode in modes for kind in data]
    if op == "knn_graph" and case in SELECTION_CASES:
        return [Job(op, case, mode, kind, dtype, backend) for mode in modes for kind in data]
    if op in one_op.OPS and case in OP_CASES:
        return [Job(op, case, mode, "case", dtype, backend) for mode in modes]
    return []


@dataclasses.dataclass(frozen=True)
class Engine:
    """The engine at a job, warm.

    Args:
        run: one call.
        wrong: why its result must not be timed; None where it passed the gate.
        backends: what ran, by op.
    """

    run: Callable[[], object]
    wrong: str | None
    backends: dict[str, str | None]


def build(job: Job, device: str = "cpu") -> Engine:
    """Make the inputs, run once and hold the result against another way to it."""
    dtype = DTYPES[job.dtype]
    with use_backend(job.backend):
        if job.op == "pdgr":
            made = whole_pdgr.engine(PDGR_CASES[job.case], job.data, job.mode, device)
        elif job.case in SELECTION_CASES:
            made = selection.engine(SELECTION_CASES[job.case], job.data, dtype, device)
        else:
            made = one_op.engine(job.op, OP_CASES[job.case], job.mode, dtype, device)
    call, wrong, backends = made

    def run() -> object:
        with use_backend(job.backend):
            return call()

    return Engine(run, wrong, backends)


def measure(
    job: Job, *, repeats: int, slow: int, with_memory: bool, device: str, beside: Sequence[str] = BESIDE
) -> tuple[list[dict[str, Any]], list[str]]:
    """The engine beside what it is compared with: rows, and what was refused."""
    with use_backend(job.backend):
        if job.op == "pdgr":
            return whole_pdgr.measure(
                PDGR_CASES[job.case], job.data, job.mode, repeats=repeats, slow=slow, with_memory=with_memory,
                device=device, beside=beside,
            )  # fmt: skip
        if job.case in SELECTION_CASES:
            return selection.measure(
                SELECTION_CASES[job.case], job.data, repeats=repeats, slow=slow, dtype=DTYPES[job.dtype], device=device,
                beside=beside,
            )  # fmt: skip
        return one_op.measure(
            job.op, OP_CASES[job.case], job.mode, repeats=repeats, dtype=DTYPES[job.dtype], backend=job.backend,
            device=device,
        )  # fmt: skip

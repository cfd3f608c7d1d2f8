# SPDX-License-Identifier: Apache-2.0
"""One thing to time: the engine at a case. Everything that times the engine alone builds it here, gate included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import one_op, selection, whole_pdgr
from bench.compare import OF_HIDDEN
from bench.precision import PRECISIONS
from drseg_core import testing
from drseg_core.ops import use_backend
from drseg_core.testing import Case

MODES = whole_pdgr.MODES
# an op's own inputs, and priors for whole PDGR and the selection
DATA = ("case", *whole_pdgr.DATA)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
# what whole PDGR and the selection can be compared with
CONTENDERS = {
    "literal": "the paper's equations, written down in PyTorch",
    "factored": "the same, with the first layer of the edge MLP split by node",
    "compiled": "factored, under torch.compile",
    "pyg": "factored, with messages added up by PyTorch Geometric's scatter",
    "matmul_lower_bound": "only the matrix products that nobody can leave out",
    "naive": "plain torch: all scores of some rows at a time, then topk",
    "faiss": "faiss-cpu's exact search by inner product, no decay",
    "sklearn": "scikit-learn's brute-force neighbours, no decay",
    "keops": "a symbolic kernel matrix of pykeops, no decay",
    "flashlib": "flashlib's flash_knn on CUDA, no decay",
}
BESIDE = tuple(CONTENDERS)
CASES = {case.name: case for case in testing.CASES}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for.

    Args:
        op: ``pdgr`` or an op. case: the sizes. mode: ``fwd`` or ``fwd+bwd``.
        data: a ``random`` or a ``dino``-like prior for ``pdgr``, and for ``knn_graph`` beside other searches; ``case``
            for the backends of an op on its own inputs.
        dtype: of an op's tensors; of ``pdgr`` one of ``PRECISIONS``. backend: None takes the one that runs by default.
    """

    op: str
    case: Case
    mode: str
    data: str
    dtype: str = "float32"
    backend: str | None = None

    def __str__(self) -> str:
        words = [self.op, self.case.name, self.mode, self.data, self.dtype]
        return " ".join(words + ([self.backend] if self.backend else []))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Job:
        """From what ``dataclasses.asdict`` made of one in another process."""
        return cls(**fields | {"case": Case(**fields["case"])})


def jobs_of(
    op: str, name: str, modes: Sequence[str], data: Sequence[str], dtype: str, backend: str | None
) -> list[Job]:
    """Every job of an op at a case; none where there is no such thing."""
    case = CASES[name]
    kinds: list[str] = []
    if name.endswith("_e256") and op not in ("pdgr", *OF_HIDDEN):
        # the same as without the wide edge MLP
        return []
    if dtype not in (PRECISIONS if op == "pdgr" else DTYPES):
        return []
    if op in one_op.OPS and case.nodes <= one_op.MOST_NODES:
        kinds += ["case"]
    if case.large and op in ("pdgr", "knn_graph"):
        kinds += whole_pdgr.DATA
    return [
        Job(op, case, mode, kind, dtype, backend)
        for mode in modes
        if mode == "fwd" or op != "knn_graph"
        for kind in kinds
        if kind in data
    ]


def quick_jobs(
    ops: Sequence[str], modes: Sequence[str], data: Sequence[str], dtype: str = "float32", backend: str | None = None
) -> list[Job]:
    """Those of the gate and of ``make bench``: large enough that a call is more than overhead, and quick to repeat."""
    found = []
    for op in ops:
        for kind in data:
            name = "paper_vitl_24x24" if kind == "case" else "image_24x24" if op == "pdgr" else "grid_64x64"
            found += jobs_of(op, name, modes, [kind], dtype, backend)
    return found


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
    with use_backend(job.backend):
        if job.op == "pdgr":
            made = whole_pdgr.engine(job.case, job.data, job.mode, device, job.dtype)
        elif job.data != "case":
            made = selection.engine(job.case, job.data, DTYPES[job.dtype], device)
        else:
            made = one_op.engine(job.op, job.case, job.mode, DTYPES[job.dtype], device)
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
                job.case, job.data, job.mode, repeats=repeats, slow=slow, with_memory=with_memory, device=device,
                beside=beside, dtype=job.dtype,
            )  # fmt: skip
        if job.data != "case":
            return selection.measure(
                job.case, job.data, repeats=repeats, slow=slow, dtype=DTYPES[job.dtype], device=device, beside=beside
            )
        return one_op.measure(
            job.op, job.case, job.mode, repeats=repeats, dtype=DTYPES[job.dtype], backend=job.backend, device=device
        )

# SPDX-License-Identifier: Apache-2.0
"""Logs of a run while it trains: log.jsonl, log.csv, TensorBoard if it is installed, and a progress bar."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.data import IGNORE
from drseg_core.files import parse_json, write_text_atomic
from drseg_core.training.distributed import ProcessGroup
from drseg_core.training.loss import labelled
from drseg_core.training.optim import movement

# of each part of the model, where it is trained: CLIP, the MLP of Eq. 8, all else
MOVEMENTS = ("movement_clip", "movement_edge", "movement_head")
FIELDS = (
    "step", "loss", "miou", "learning_rate", "gradient_norm", *MOVEMENTS, "skipped", "unlabelled", "samples", "seconds",
)  # fmt: skip


class RunLog:
    """Appends one record per call to every log of a run folder.

    Opened for a resumed run, it first drops the records of steps after ``step``: they will be made again.
    """

    def __init__(self, run: Path, *, step: int = 0) -> None:
        records = [record for record in read_log(run) if record["step"] <= step]
        write_text_atomic(run / "log.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        table = io.StringIO()
        writer = csv.DictWriter(table, FIELDS)
        writer.writeheader()
        writer.writerows(records)
        write_text_atomic(run / "log.csv", table.getvalue())
        self._lines = open(run / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._table = open(run / "log.csv", "a", encoding="utf-8", newline="")  # noqa: SIM115
        self._board: Any = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step or None)

    def add(self, record: dict[str, Any]) -> None:
        """Write one record with the keys ``FIELDS``."""
        self._lines.write(json.dumps(record) + "\n")
        csv.DictWriter(self._table, FIELDS).writerow(record)
        self._lines.flush()
        self._table.flush()
        if self._board is not None:
            for name in ("loss", "miou", "learning_rate", "gradient_norm", *MOVEMENTS):
                if record[name] is not None:
                    self._board.add_scalar(f"train/{name}", record[name], record["step"])

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._table.close()
        if self._board is not None:
            self._board.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """Records of ``log.jsonl``; a last line that was cut short is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = parse_json(line)
                if isinstance(record, dict) and "step" in record:
                    records.append({name: record.get(name) for name in FIELDS})
    return records


class Clock:
    """Seconds trained, the earlier parts of a resumed run included."""

    def __init__(self, elapsed: float) -> None:
        self._begin = time.monotonic() - elapsed

    def seconds(self) -> float:
        return time.monotonic() - self._begin


class Window:
    """Loss and training mIoU since the last log record. Predictions are scored at the logits' resolution."""

    def __init__(self, classes: int, group: ProcessGroup) -> None:
        self._classes = classes
        self._group = group
        self._reset()

    def _reset(self) -> None:
        self._loss: list[float] = []
        self._norm: float | None = None
        # pairs of class and prediction, and images without a label: one tensor, summed over the processes at once
        self._counts = torch.zeros(self._classes**2 + 1, dtype=torch.long, device=self._group.device)

    def add(self, loss: float, norm: float, logits: Tensor, mask: Tensor) -> None:
        """Take in one step: (B, T, h, w) logits and the (B, H, W) mask they were trained on."""
        self._loss.append(loss)
        self._norm = norm
        size = (logits.shape[-2], logits.shape[-1])
        target = F.interpolate(mask[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
        valid = target != IGNORE
        pair = target[valid] * self._classes + logits.argmax(1)[valid]
        self._counts[:-1] += torch.bincount(pair, minlength=self._classes**2)
        self._counts[-1] += (~labelled(mask)).sum()

    def close(
        self, step: int, optimizer: torch.optim.Optimizer, skipped: int, position: int, elapsed: float
    ) -> dict[str, Any]:
        """The record of the steps since the last one.

        ``miou`` is the mean over classes that occur, in percent; ``unlabelled`` counts the images without any label;
        see :func:`drseg_core.training.optim.movement`.
        """
        counts = self._group.sum(self._counts).cpu()
        confusion = counts[:-1].view(self._classes, self._classes).double()
        union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
        present = confusion.sum(1) > 0
        miou = float((confusion.diag()[present] / union[present]).mean() * 100) if present.any() else None
        record = {
            "step": step,
            "loss": sum(self._loss) / len(self._loss) if self._loss else None,
            "miou": miou,
            "learning_rate": max(group["lr"] for group in optimizer.param_groups),
            "gradient_norm": self._norm,
            **dict.fromkeys(MOVEMENTS),
            **{f"movement_{part}": value for part, value in movement(optimizer).items()},
            "skipped": skipped,
            "unlabelled": int(counts[-1]),
            "samples": position,
            "seconds": round(elapsed, 3),
        }
        self._reset()
        return record


class Progress:
    """A bar with ETA on a terminal, otherwise one plain line per log record; both on stderr."""

    def __init__(self, *, start: int, total: int, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", desc="train", dynamic_ncols=True, smoothing=0.1)

    def step(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def record(self, record: dict[str, Any], progress: float) -> None:
        """Show a log record; ``progress`` (0..1) tells how far the nearer of the two limits is."""
        total = round(record["step"] / progress) if progress > 0 else record["step"]
        loss, miou = (math.nan if record[name] is None else record[name] for name in ("loss", "miou"))
        text = f"loss {loss:.4f}, mIoU {miou:.1f} %"
        if self._bar is not None:
            self._bar.total = max(total, record["step"])
            self._bar.set_postfix_str(text)
        elif self._enabled:
            left = record["seconds"] * (1 / progress - 1) if progress > 0 else 0.0
            print(f"step {record['step']}/{total}: {text}, {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

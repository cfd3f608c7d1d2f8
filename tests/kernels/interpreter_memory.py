# SPDX-License-Identifier: Apache-2.0
"""Lets Triton's interpreter see accesses that a GPU would not forgive: outside of the operands, and races.

The interpreter runs one program after the other, and in each one operation after the other. So it computes the same
whether barriers are there or not, and whatever programs share. Here every access is looked at:

* It must lie within a tensor that was given to the launch.
* Within a program, an element that one thread writes and another one touches needs a barrier in between.
* No program touches what another one of its launch writes, but for two atomic operations.

Which thread has an element is up to the compiler. The same place of blocks of one shape is taken for one thread, as the
compiler gives such loads and stores one layout. What is smaller than the program's threads is loaded by several of them
and stored by one. So the others need a barrier to load it after that.
"""

from __future__ import annotations

import bisect
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

LOAD, STORE, ATOMIC = "load", "store", "atomic operation"
# programs of a launch all of whose loads are looked at: the first, the last and some of the others
SOME = 16
# launches of one kernel in the same sizes that are looked at; what a program does may depend on its data
LAUNCHES = 4


class AccessError(AssertionError):
    """An access that is outside of the operands, or a race."""


@dataclass
class Access:
    """Of a block: the addresses that are really accessed, and the places of the block that they stand at."""

    kind: str
    address: np.ndarray
    place: np.ndarray
    shape: tuple[int, ...]
    first: int
    last: int

    def meets(self, other: Access) -> bool:
        """Whether they may race, if nothing lies between them: one of them writes what the other touches."""
        if self.kind == other.kind != STORE or self.last < other.first or other.last < self.first:
            return False
        # NumPy would sort both, for each pair anew
        return not self.elements.isdisjoint(other.elements)

    @functools.cached_property
    def elements(self) -> frozenset[int]:
        return frozenset(self.address.tolist())

    def by_the_same_threads(self, earlier: Access, threads: int) -> bool:
        """Whether each element that both touch is one thread's."""
        if self.shape != earlier.shape or np.prod(self.shape, dtype=int) == 1:
            return False
        if self.kind == LOAD and np.prod(self.shape, dtype=int) < threads:
            return False
        common, mine, others = np.intersect1d(self.address, earlier.address, return_indices=True)
        for access in (self, earlier):
            if np.isin(access.address, common).sum() != len(common):
                # several places of the block have one element
                return False
        return bool((self.place[mine] == earlier.place[others]).all())


@dataclass
class Launch:
    """What the programs of one launch have accessed.

    Args:
        kernel: its name.
        operands: begin and end of each tensor, in bytes.
        threads: of a program.
        programs: how many there are.
    """

    kernel: str
    operands: Sequence[tuple[int, int]]
    threads: int
    programs: int
    program: int = -1
    # since the last barrier; loads are most, and meet no other load
    loads: list[Access] = field(default_factory=list)
    changes: list[Access] = field(default_factory=list)
    writes: list[tuple[int, Access]] = field(default_factory=list)
    reads: list[tuple[int, Access]] = field(default_factory=list)

    def __post_init__(self) -> None:
        joined: list[list[int]] = []
        for begin, end in sorted(self.operands):
            if joined and begin < joined[-1][1]:
                joined[-1][1] = max(end, joined[-1][1])
            else:
                joined.append([begin, end])
        self._begins, self._ends = [begin for begin, _ in joined], [end for _, end in joined]

    def begin_program(self) -> None:
        self.program += 1
        self.barrier()

    @property
    def is_looked_at(self) -> bool:
        """Loads are many; programs do the same but for the first and the last."""
        return self.program % max(1, self.programs // SOME) == 0 or self.program == self.programs - 1

    def fail(self, problem: str) -> None:
        raise AccessError(f"{self.kernel}, program {self.program} of {self.programs}: {problem}")

    def access(self, kind: str, address: np.ndarray, mask: np.ndarray, size: int) -> None:
        if kind == LOAD and not (self.is_looked_at or self.changes):
            return
        shape = np.shape(address)
        address, mask = np.ravel(address), np.ravel(mask if mask.shape == shape else np.broadcast_to(mask, shape))
        place = np.flatnonzero(mask)
        if not place.size:
            return
        address = address[place].astype(np.int64)
        access = Access(kind, address, place, shape, int(address.min()), int(address.max()))
        operand = bisect.bisect_right(self._begins, access.first) - 1
        if operand < 0 or access.last + size > self._ends[operand]:
            self.fail(f"a {kind} lies outside of every operand")
        for earlier in self.changes if kind == LOAD else (*self.loads, *self.changes):
            if access.meets(earlier) and not access.by_the_same_threads(earlier, self.threads):
                self.fail(f"a {kind} after a {earlier.kind} of the same elements; expected a barrier between them")
        (self.loads if kind == LOAD else self.changes).append(access)
        (self.reads if kind == LOAD else self.writes).append((self.program, access))

    def barrier(self) -> None:
        self.loads.clear()
        self.changes.clear()

    def end(self) -> None:
        """Nothing that one program writes may be touched by another one."""
        if not self.writes:
            return
        written = np.concatenate([access.address for _, access in self.writes])
        writer = np.concatenate([np.full(access.address.size, program) for program, access in self.writes])
        atomic = np.concatenate([np.full(access.address.size, access.kind == ATOMIC) for _, access in self.writes])
        order = np.lexsort((atomic, writer, written))
        written, writer, atomic = written[order], writer[order], atomic[order]
        shared = (written[1:] == written[:-1]) & (writer[1:] != writer[:-1]) & ~(atomic[1:] & atomic[:-1])
        if shared.any():
            at = int(np.flatnonzero(shared)[0])
            self.fail(f"programs {writer[at]} and {writer[at + 1]} write the same element")
        for program, access in self.reads:
            if access.last < written[0] or written[-1] < access.first:
                continue
            at = np.searchsorted(written, access.address)
            found = written[np.minimum(at, written.size - 1)] == access.address
            others = found & (writer[np.minimum(at, written.size - 1)] != program)
            if others.any():
                self.fail(f"program {program} reads what program {writer[at[others][0]]} writes")


class Watched:
    """The interpreter's access to memory, which a launch is told of."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self.launch: Launch | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def _tell(self, kind: str, address: np.ndarray, mask: np.ndarray, dtype: Any) -> None:
        if self.launch is not None:
            self.launch.access(kind, address, mask, np.dtype(dtype).itemsize)

    def load(self, address: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> Any:
        self._tell(LOAD, address, mask, dtype)
        return self._own.load(address, mask, other, dtype)

    def store(self, address: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        self._tell(STORE, address, mask, value.dtype)
        return self._own.store(address, value, mask)

    def atomic_rmw(self, operation: Any, address: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any) -> Any:
        self._tell(ATOMIC, address, mask, value.dtype)
        return self._own.atomic_rmw(operation, address, value, mask, order)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Of the elements of a tensor: address of the first byte, and behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + ((last + 1) * tensor.element_size() if tensor.numel() else 0)


def patch() -> None:
    """Once in a process, before a kernel runs."""
    from triton.runtime import interpreter

    watched = interpreter._interpreter = Watched(interpreter._interpreter)
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    begin_grid, begin_program, call = builder.set_grid_dim, builder.set_grid_idx, executor.__call__
    given: dict[str, Any] = {}
    seen: Counter[Any] = Counter()

    def set_grid_dim(*sizes: int) -> None:
        begin_grid(*sizes)
        kind = (sizes, *given.pop("kind"))
        seen[kind] += 1
        if seen[kind] <= LAUNCHES:
            watched.launch = Launch(programs=int(np.prod(sizes)), **given)

    def set_grid_idx(*place: int) -> None:
        begin_program(*place)
        if watched.launch is not None:
            watched.launch.begin_program()

    def create_barrier() -> None:
        if watched.launch is not None:
            watched.launch.barrier()

    def launched(self: Any, *arguments: Any, **options: Any) -> None:
        values = [*arguments, *(options[name] for name in self.arg_names if name in options)]
        flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        given.update(
            kernel=self.fn.__name__,
            kind=[self.fn, *((v.shape, v.dtype, v.stride()) if isinstance(v, torch.Tensor) else v for v in flat)],
            operands=[extent(tensor) for tensor in tensors],
            threads=32 * options.get("num_warps", 4),
        )
        try:
            call(self, *arguments, **options)
            if watched.launch is not None:
                watched.launch.end()
        finally:
            watched.launch = None

    builder.set_grid_dim, builder.set_grid_idx, builder.create_barrier = set_grid_dim, set_grid_idx, create_barrier
    executor.__call__ = launched

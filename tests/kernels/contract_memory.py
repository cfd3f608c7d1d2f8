# SPDX-License-Identifier: Apache-2.0
"""Accesses outside of the operands and races are found under the interpreter, which computes the same with them."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from interpreter_memory import AccessError
from triton.runtime.errors import InterpreterError

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("is of the interpreter alone", allow_module_level=True)

# more elements than a program of one warp has threads
N = 64


@triton.jit
def _copy(source, target, count, N: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(source + i, mask=i < count + LOAD, other=0.0)
    tl.store(target + i, value, mask=i < count + STORE)


@triton.jit
def _read_after_write(values, out, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(values + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + i, tl.load(values + (N - 1 - i)))


@triton.jit
def _write_after_read(values, out, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(values + (N - 1 - i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(values + i, value)


@triton.jit
def _write_after_write(values, out, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(values + i, tl.zeros((N,), tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(values + (N - 1 - i), i.to(tl.float32), mask=i < 2)


@triton.jit
def _number(values, out, N: tl.constexpr, BARRIER: tl.constexpr):
    value = tl.load(values)
    if BARRIER:
        tl.debug_barrier()
    tl.store(values, value + 1)


@triton.jit
def _atomic_after_write(values, out, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(values + i, tl.zeros((N,), tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_add(values + i // 2, tl.full((N,), 1.0, tl.float32))


@triton.jit
def _in_place(values, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(values + i, tl.load(values + i) + 1)
    tl.store(values + i, tl.load(values + i) * 2)


@triton.jit
def _shared(source, target, STEP: tl.constexpr, ATOMIC: tl.constexpr, READ: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, N)
    value = tl.load((target if READ else source) + at)
    if ATOMIC:
        tl.atomic_add(target + at, value)
    else:
        tl.store(target + at + (N if READ else 0), value)


def found(kernel, programs, *arguments, **options) -> str:
    """What is said of a launch; nothing if all is well."""
    try:
        kernel[(programs,)](*arguments, **options)
    except (InterpreterError, AccessError) as error:
        return str(error)
    return ""


@pytest.mark.promise("C15")
def test_what_lies_outside_of_the_operands():
    room = torch.zeros(4, 2 * N)
    source, target = room[1, :50], room[3, :50]
    assert found(_copy, 1, source, target, 50, N, 0, 0) == ""
    assert "a load lies outside of every operand" in found(_copy, 1, source, target, 50, N, 1, 0)
    assert "a store lies outside of every operand" in found(_copy, 1, source, target, 50, N, 0, 1)
    # nobody reads or writes where the mask is false
    assert found(_copy, 1, source, target, 0, N, 0, 0) == ""


@pytest.mark.promise("C42")
@pytest.mark.parametrize(
    "kernel",
    [_read_after_write, _write_after_read, _write_after_write, _number, _atomic_after_write],
    ids=lambda kernel: kernel.__name__,
)
def test_a_barrier_that_is_missing(kernel):
    values, out = torch.zeros(N), torch.zeros(N)
    assert found(kernel, 1, values, out, N, True, num_warps=1) == ""
    assert "expected a barrier between them" in found(kernel, 1, values, out, N, False, num_warps=1)


def test_a_thread_needs_no_barrier_for_what_is_its_own():
    assert found(_in_place, 1, torch.zeros(N), N, num_warps=1) == ""
    # of four warps two have what the others have, and one of them stores it
    assert "a load after a store" in found(_in_place, 1, torch.zeros(N), N, num_warps=4)


@pytest.mark.promise("C42")
def test_programs_that_meet():
    source, target = torch.zeros(4 * N), torch.zeros(4 * N)
    assert found(_shared, 3, source, target, N, False, False, N) == ""
    assert "programs 0 and 1 write the same element" in found(_shared, 3, source, target, N // 2, False, False, N)
    assert found(_shared, 3, source, target, N // 2, True, False, N) == ""
    assert "program 1 reads what program 0 writes" in found(_shared, 3, source, target, N, False, True, N)


def test_what_a_program_does_with_other_data_is_looked_at_too():
    source, target = torch.zeros(2 * N)[:50], torch.zeros(2 * N)[:60]
    for _ in range(2):
        assert found(_copy, 1, source, target, 50, N, 0, 0) == ""
    assert "outside" in found(_copy, 1, source, target, 50, N, 0, 11)

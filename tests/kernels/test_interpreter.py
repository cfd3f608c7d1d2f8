# SPDX-License-Identifier: Apache-2.0
"""Runs the contract of the Triton kernels under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreted import CONTRACTS, INTERPRETED

HERE = Path(__file__).parent


def interpreted(*arguments: str, cwd: Path = HERE.parents[1]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRACTS)
def test_contract(name, request):
    # it has run beside the other tests, or does so beside those of another worker
    done = request.config.stash[INTERPRETED].result(name)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout and " failed" not in done.stdout
    print(done.stdout.splitlines()[-1])


BFLOAT16 = """
import torch, triton
import triton.language as tl

@triton.jit
def _product(left, right, out):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out + at, tl.dot(tl.load(left + at), tl.load(right + at)))

left, right = torch.randn(2, 16, 16).bfloat16()
out = torch.empty(16, 16)
_product[(1,)](left, right, out)
print((out - left.float() @ right.float()).abs().max().item())
"""


@pytest.mark.promise("C41")
def test_the_interpreter_still_multiplies_bfloat16_wrongly(tmp_path):
    # when this fails, the kernels' products may be tested in bfloat16 here too
    script = tmp_path / "product.py"
    script.write_text(BFLOAT16, encoding="utf-8")
    done = interpreted(str(script))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1e3


ROUNDING = """
import torch, triton
import triton.language as tl

@triton.jit
def _store(value, out):
    tl.store(out, tl.load(value))

# three quarters of the way from one to the next bfloat16
value, out = torch.tensor([1 + 0.75 * 2**-7]), torch.empty(1, dtype=torch.bfloat16)
_store[(1,)](value, out)
print(out.item())
"""


@pytest.mark.promise("C41")
def test_the_interpreter_still_cuts_bfloat16_off(tmp_path):
    # when this fails, the contracts' results may be tested in bfloat16 here too
    script = tmp_path / "rounding.py"
    script.write_text(ROUNDING, encoding="utf-8")
    done = interpreted(str(script))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 1

# SPDX-License-Identifier: Apache-2.0
"""Which backend runs, what happens without the native library, and what an import does not do."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import compare, run
from fused import FUSED
from subjects import SUBJECTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import drseg_core
from drseg_core import ops
from drseg_core.errors import BackendDtypeError, BackendUnavailableError
from drseg_core.nn import PDGR
from drseg_core.ops import _cuda, _dispatch, _library, _native, _triton
from drseg_core.ops.graph_propagate import reference as propagate
from drseg_core.ops.linear_map.cases import make_inputs as make_linear_inputs
from drseg_core.testing import CASES

OPS = ("prepare_prior", "linear_map", "knn_graph", "csc", "edge_weight", "degree_normalize", "graph_propagate")
NO_TRITON = "Triton kernels need a CUDA device (TRITON_INTERPRET=1 interprets them on the CPU, slowly)"
ROOT = Path(__file__).parents[2]
HEAVY = ("triton", "timm", "open_clip", "torchvision", "rasterio", "matplotlib")


def arguments(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    if op in ("prepare_prior", "knn_graph"):
        prior = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        return {"prior": prior} | ({"grid": (3, 4), "k": 3} if op == "knn_graph" else {})
    if op == "linear_map":
        return make_linear_inputs(CASES[0], dtype)
    if op == "csc":
        return {"index": SUBJECTS["edge_weight"].make_inputs(CASES[0], dtype)["index"]}
    return {**SUBJECTS, **FUSED}[op].make_inputs(CASES[0], dtype)


def call(op: str, **changes: Any) -> Any:
    return getattr(ops, op)(**{**arguments(op), **changes})


def fresh(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.promise("C25")
@pytest.mark.parametrize("op", OPS)
def test_none_takes_the_preferred_backend(op):
    for options in ({}, {"backend": None}):
        call(op, **options)
        assert ops.last_backend(op) == "native"
    assert ops.last_backend("no such op") is None


def test_another_device_takes_what_can_run_there():
    with FakeTensorMode():
        tensor = torch.empty(1, 2, 3, device="cuda")
        assert _dispatch.resolve("graph_propagate", tensor, "auto").name == "triton"
        assert _dispatch.resolve("graph_propagate", tensor.double(), "auto").name == "reference"
        assert _dispatch.resolve("graph_propagate", tensor, "auto", coefficient=tensor.double()).name == "reference"
        # CUDA C++ goes first where it is built
        first = "triton" if _cuda.why_not("cuda") else "cuda"
        assert _dispatch.resolve("graph_layer", tensor, "auto").name == first
        assert _dispatch.resolve("graph_layer", tensor.double(), "auto").name == "reference"
        with pytest.raises(BackendUnavailableError) as caught:
            _dispatch.resolve("graph_propagate", tensor, "native")
    assert str(caught.value) == (
        "graph_propagate: backend native cannot run on cuda:0: the native library has no cuda kernels; "
        "expected one of triton, reference, got native"
    )


@pytest.mark.promise("C25")
@pytest.mark.parametrize("op", OPS)
def test_a_named_backend_runs_or_says_why_not(op):
    kernels = {row["backend"]: row["reason"] for row in ops.backend_report() if row["op"] == op}
    assert kernels["triton"] == NO_TRITON
    for name in ops.backend_names():
        if name not in ("triton", "cuda"):
            call(op, backend=name)
            assert ops.last_backend(op) == name
            continue
        with pytest.raises(BackendUnavailableError) as caught:
            call(op, backend=name)
        assert str(caught.value) == (
            f"{op}: backend {name} cannot run on cpu: {kernels[name]}; expected one of native, reference, got {name}"
        )
        assert caught.value.exit_code == 5


@pytest.mark.promise("C25")
@pytest.mark.parametrize("op", OPS)
def test_an_unknown_backend_lists_the_choices(op):
    before = ops.last_backend(op)
    for name in ("gpu", "", "NATIVE", 3):
        with pytest.raises(
            ValueError, match=rf"^{op}: backend is unknown; expected one of native, cuda, triton, reference, got "
        ):
            call(op, backend=name)
    with pytest.raises(
        ValueError, match="^use_backend: backend is unknown; expected one of native, cuda, triton, reference"
    ):
        with ops.use_backend("gpu"):
            pytest.fail("entered the block")
    assert ops.last_backend(op) == before
    call(op)
    assert ops.last_backend(op) == "native"


def test_use_backend_nests_and_ends():
    def chosen(**options: Any) -> str | None:
        call("graph_propagate", **options)
        return ops.last_backend("graph_propagate")

    with ops.use_backend("reference"):
        assert chosen() == "reference"
        assert chosen(backend="native") == "native"
        with ops.use_backend("native"):
            assert chosen() == "native"
            with ops.use_backend(None):
                assert chosen() == "native" and chosen(backend="reference") == "reference"
        assert chosen() == "reference"
        with ops.use_backend("triton"), pytest.raises(BackendUnavailableError):
            chosen()
        assert chosen() == "reference"
    assert chosen() == "native"
    with pytest.raises(KeyError):
        with ops.use_backend("reference"):
            raise KeyError
    assert chosen() == "native"


def _ran() -> str | None:
    call("graph_propagate")
    return ops.last_backend("graph_propagate")


def test_blocks_that_overlap_in_two_threads_are_each_threads_own():
    turns = [threading.Event() for _ in range(4)]
    found: dict[str, list[str | None]] = {}

    def work(name: str, mine: int) -> None:
        found[name] = [ops.last_backend("graph_propagate"), _ran()]
        with ops.use_backend(name):
            # in at the same time as the other, and out in the order in which they came
            turns[mine].set()
            turns[1 - mine].wait(10)
            found[name].append(_ran())
            if mine == 1:
                turns[2].wait(10)
        found[name].append(_ran())
        turns[2 + mine].set()

    with ops.use_backend("reference"):
        assert _ran() == "reference"
        threads = [threading.Thread(target=work, args=given) for given in (("reference", 0), ("native", 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        # what others ran is not what ran here
        assert ops.last_backend("graph_propagate") == "reference"
    # a thread that is started in a block begins outside of it, and has computed nothing
    assert found == {
        "reference": [None, "native", "reference", "native"],
        "native": [None, "native", "native", "native"],
    }
    assert _ran() == "native"


def test_blocks_that_overlap_in_two_tasks_are_each_tasks_own():
    async def work(name: str, pause: float) -> list[str | None]:
        found = [_ran()]
        with ops.use_backend(name):
            await asyncio.sleep(pause)
            found.append(_ran())
            with ops.use_backend("native"):
                await asyncio.sleep(pause)
                found.append(_ran())
            # a task begins with the block of its beginning
            found.append(await asyncio.create_task(inner()))
        return [*found, _ran()]

    async def inner() -> str | None:
        return _ran()

    async def both() -> list[list[str | None]]:
        return await asyncio.gather(work("reference", 0.01), work("native", 0.015))

    first, second = asyncio.run(both())
    assert first == ["native", "reference", "native", "reference", "native"] and set(second) == {"native"}
    assert _ran() == "native"


def test_a_backward_in_another_thread_uses_the_backend_of_the_forward():
    given = arguments("graph_propagate")
    x = given["x"].requires_grad_()
    with ops.use_backend("reference"):
        output = ops.graph_propagate(**given)
    found: list[str | None] = []

    def work() -> None:
        output.sum().backward()
        found.append(ops.last_backend("graph_propagate"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert found == ["reference"] and x.grad is not None


@pytest.mark.parametrize("inside,outside", [("reference", "native"), ("native", "reference")])
def test_the_backward_uses_the_backend_of_the_forward(inside, outside):
    given = arguments("graph_propagate")
    x = given["x"].requires_grad_()
    with ops.use_backend(inside):
        output = ops.graph_propagate(**given)
        module = PDGR(5, 8, k=3, backend=None)
    with ops.use_backend(outside):
        call("graph_propagate")
        assert ops.last_backend("graph_propagate") == outside
        output.sum().backward()
        assert ops.last_backend("graph_propagate") == inside and x.grad is not None
        # a module asks when it is called, not when it is made
        if outside == "reference":
            module(torch.ones(1, 5, 3, 4), torch.ones(1, 8, 3, 4))
            assert ops.last_backend("graph_propagate") == outside


def test_the_named_backend_of_a_module_reaches_every_op():
    given = torch.ones(1, 5, 3, 4, requires_grad=True), torch.ones(1, 8, 3, 4)
    output = PDGR(5, 8, k=3, backend="reference")(*given)
    assert {ops.last_backend(op) for op in OPS} == {"reference"}
    call("graph_propagate")
    output.sum().backward()
    assert ops.last_backend("graph_propagate") == "reference"
    PDGR(5, 8, k=3)(*given)
    assert {ops.last_backend(op) for op in OPS} == {"native"}
    # none is replaced in silence
    with pytest.raises(
        BackendUnavailableError, match="^prepare_prior: backend triton cannot run on cpu: Triton kernels"
    ):
        PDGR(5, 8, k=3, backend="triton")(*given)


@pytest.mark.promise("C17")
@pytest.mark.parametrize("op", SUBJECTS)
def test_float64_is_computed_in_float64(op):
    subject, inputs = SUBJECTS[op], arguments(op, torch.float64)
    compare(subject, inputs, run(subject, inputs, subject.function))
    assert ops.last_backend(op) == "native"


@pytest.mark.promise("C17")
def test_a_dtype_that_a_backend_lacks():
    def nothing(*_: Any) -> None:
        return None

    table = [
        _dispatch.Backend("native", nothing, None, lambda device: None, (torch.float32,)),
        _dispatch.Backend("reference", nothing, None, lambda device: None, (torch.float32, torch.float64)),
    ]
    _dispatch.add_table("made_up", *table)
    try:
        single, double = torch.ones(2), torch.ones(2).double()
        assert _dispatch.resolve("made_up", single, "auto").name == "native"
        assert _dispatch.resolve("made_up", double, "auto").name == "reference"
        assert ops.last_backend("made_up") == "reference"
        with pytest.raises(BackendDtypeError) as caught:
            _dispatch.resolve("made_up", double, "native")
        assert isinstance(caught.value, TypeError) and str(caught.value) == (
            "made_up: backend native cannot take torch.float64; expected one of torch.float32, got torch.float64"
        )
        with pytest.raises(BackendUnavailableError, match="expected one of none, got auto"):
            _dispatch.resolve("made_up", single.half(), "auto")
    finally:
        del _dispatch._tables["made_up"], _dispatch._last.of["made_up"]


@pytest.mark.parametrize(("next_is_raw", "next_runs"), [(True, True), (False, True), (True, False)])
def test_arguments_stay_raw_if_whoever_may_get_them_takes_them_raw(next_is_raw, next_runs):
    """The first may refuse the sizes of a call: what is decided before must hold for the one behind it, too."""

    def why_not(device: str) -> str | None:
        return None if next_runs else "it was left out"

    parts = (None, None, lambda device: None)
    table = [
        _dispatch.Backend("cuda", *parts, raw=True, refuses=lambda case: "too large" if case.get("nodes") else None),
        _dispatch.Backend("triton", None, None, why_not, raw=next_is_raw),
        _dispatch.Backend("reference", *parts),
    ]
    _dispatch.add_table("made_up", *table)
    try:
        assert _dispatch.takes_raw("made_up", torch.ones(2), "auto") is (next_is_raw and next_runs)
        # who names it is told if it refuses
        assert _dispatch.takes_raw("made_up", torch.ones(2), "cuda")
    finally:
        del _dispatch._tables["made_up"], _dispatch._last.of["made_up"]


@pytest.mark.promise("C25", "C41")
def test_the_report_is_what_the_calls_do():
    rows = ops.backend_report()
    assert rows == drseg_core.backends()
    on_cpu = [row for row in rows if row["device"] == "cpu"]
    assert [(row["op"], row["backend"]) for row in on_cpu] == [
        (op, name) for op in dict.fromkeys(row["op"] for row in rows) for name in ops.backend_names()
    ]
    assert {row["op"] for row in rows} == {*OPS, *FUSED}
    for row in on_cpu:
        assert set(row) == {"op", "backend", "device", "available", "reason", "place"}
        # nobody gets interpreted kernels unasked
        usual = ("native", "reference")
        assert row["place"] == (usual.index(row["backend"]) if row["backend"] in usual else None)
        assert row["available"] is (row["reason"] is None)
        if row["available"]:
            call(row["op"], backend=row["backend"])
            assert ops.last_backend(row["op"]) == row["backend"]
        else:
            with pytest.raises(BackendUnavailableError) as caught:
                call(row["op"], backend=row["backend"])
            assert row["reason"] in str(caught.value)


# the page's own backend
PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
TOY = re.search(r"^```python\n# mine\.py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1].replace("mine", "toy")


@pytest.fixture
def toy(tmp_path) -> dict[str, str]:
    """The environment of a process that knows a stranger's backend, as docs/extending.md has it."""
    (tmp_path / "toy.py").write_text(TOY)
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "DRSEG_BACKENDS": "toy", "OMP_NUM_THREADS": "1"}


def in_toy_process(toy: dict[str, str], *command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=toy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ALL_ON_TOY = """
import sys
import pytest
from bench.__main__ import main as bench
from drseg_core.cli.main import main
from drseg_core.ops import backend_report

assert main(["doctor"]) == 0
print([row for row in backend_report() if row["backend"] == "toy"])
print("bench", bench({bench!r}))
sys.exit(pytest.main({pytest!r}))
"""


def test_one_file_of_a_stranger_joins_doctor_contract_and_bench(toy):
    tests = ("tests/ops/test_graph_propagate.py", "-k", "toy and (oracle or layouts or batch) and not paper")
    options = ("--op", "graph_propagate", "--case", "tiny_3x4", "--backend", "toy", "--repeats", "2", "--mode", "fwd")
    words = {"bench": ["run", *options], "pytest": ["-q", "-p", "no:cacheprovider", *tests]}
    said = in_toy_process(toy, "-c", ALL_ON_TOY.format(**words))
    assert "graph_propagate on cpu: native, then reference" in said
    assert "{'op': 'graph_propagate', 'backend': 'toy', 'device': 'cpu', 'available': True" in said
    timed = said[said.index("'available': True") :]
    assert re.search(r"\btoy\b", timed[timed.index("\n") :]) and "bench 0" in timed and " passed" in timed


@pytest.mark.parametrize(("module", "reason"), [("absent", "No module named 'absent'"), ("toy", "no such luck")])
def test_a_module_of_a_stranger_that_cannot_be_imported_is_named(toy, tmp_path, module, reason):
    (tmp_path / "toy.py").write_text("raise ValueError('no such\\nluck')")
    words = f"DRSEG_BACKENDS: {module} cannot be imported: {reason}; expected a module whose folder is on PYTHONPATH"
    for command in (["-c", "import drseg_core.ops"], ["-m", "drseg_core", "doctor"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env={**toy, "DRSEG_BACKENDS": module}, capture_output=True, text=True
        )
        last = done.stderr.splitlines()[-1]
        assert done.returncode != 0 and last.endswith(words), done.stderr
    # the doctor goes on, and has one line of it
    assert done.returncode == 5 and len(done.stderr.splitlines()) == 1
    assert "kernels" in done.stdout and f"problem: {words}" in done.stdout


STRANGERS = """
import torch
from drseg_core import nn, ops
from drseg_core.ops.edge_weight import reference as edge
from drseg_core.ops.graph_propagate import reference as propagate

# what knows nothing of columns or scores, in any form that a function has
def edge_weight(source, target, index, vector, bias, mask):
    weight = edge.edge_weight(source, target, index, vector, bias)
    return weight if mask is None else weight * mask

ops.register_backend("edge_weight", "mine", edge_weight, lambda device: None, run_backward=edge.edge_weight_backward)
for op in ("prepare_prior", "knn_graph", "degree_normalize"):
    module = __import__(f"drseg_core.ops.{op}.reference", fromlist=["reference"])
    backward = getattr(module, f"{op}_backward", None)
    ops.register_backend(op, "mine", getattr(module, op), lambda device: None, run_backward=backward)
run = lambda *given: propagate.graph_propagate(*given)
back = lambda *given: propagate.graph_propagate_backward(*given)
ops.register_backend("graph_propagate", "mine", run, lambda device: None, run_backward=back)
ops.register_backend("graph_propagate", "other", torch.add, lambda device: None)
torch.manual_seed(0)
features, prior = torch.randn(1, 5, 3, 3, requires_grad=True), torch.randn(1, 8, 3, 3)
for options in ({"k": 9, "self_loop": "exclude"}, {"k": 4}, {"k": 9, "self_loop": "extra"}):
    torch.manual_seed(1)
    mine, usual = nn.PDGR(5, 8, backend="mine", **options), nn.PDGR(5, 8, **options)
    usual.load_state_dict(mine.state_dict())
    got, right = mine(features, prior), usual(features, prior)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
print(ops.last_backend("graph_propagate"), ops.last_backend("csc"))
"""


def test_strangers_that_know_of_neither_columns_nor_scores():
    done = subprocess.run([sys.executable, "-c", STRANGERS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mine", "native"]


FUSED_ON_TOY = """
import torch
from drseg_core import ops
x, index = torch.randn(1, 4, 3, requires_grad=True), torch.tensor([[[0], [2], [1], [3]]])
ops.graph_layer(x, index, torch.ones(1, 4, 1), torch.zeros(3), activation="relu", backend="toy").sum().backward()
print(ops.last_backend("graph_layer"), ops.last_backend("graph_propagate"))
for op, given in (("edge_weight", 5), ("graph_propagate", 3)):
    try:
        ops.register_backend(op, "native", None, None)
    except ValueError as error:
        print(error)
try:
    ops.register_backend("no_op", "toy", None, None)
except ValueError as error:
    print(error)
ops.register_backend("degree_normalize", "half", lambda w, i, n, e: w / 2, lambda device: None, preferred=True)
try:
    ops.degree_normalize(torch.ones(2, 1, requires_grad=True), torch.zeros(2, 1).int()).sum().backward()
except ops._dispatch.BackendUnavailableError as error:
    print(error)
"""


def test_a_fused_op_runs_on_the_parts_of_a_stranger(toy):
    lines = in_toy_process(toy, "-c", FUSED_ON_TOY).splitlines()
    assert lines == [
        "toy toy",
        "register_backend: name is taken; expected another than 'native' for edge_weight, got it again",
        "register_backend: name is taken; expected another than 'native' for graph_propagate, got it again",
        f"register_backend: op is unknown; expected one of {', '.join(_dispatch._tables)}, got 'no_op'",
        "degree_normalize: backend half has no backward; expected one of native, triton, reference for a gradient, "
        "got half",
    ]


def test_a_stranger_may_keep_its_results_and_lay_them_out_as_it_likes(registered):
    kept: list[Tensor] = []

    def run(x: Tensor, *others: Any) -> Tensor:
        assert x.dtype == torch.float32
        kept.append(propagate.graph_propagate(x, *others).mT.contiguous().mT)
        return kept[-1]

    registered("graph_propagate", "odd", run, lambda device: None, dtypes=(torch.float32,), preferred=True)
    given = {**FUSED["graph_layer"].make_inputs(CASES[0], torch.bfloat16), "activation": "relu"}
    given |= {"norm_weight": None, "norm_bias": None}
    for changes in ({}, {"bias": None}, {"undirected": True}):
        kept.clear()
        got = ops.graph_layer(**{**given, **changes})
        # unasked, and in half precision too: it is given float32
        assert ops.last_backend("graph_layer") == ops.last_backend("graph_propagate") == "odd"
        assert got.is_contiguous() and torch.equal(got, ops.graph_layer(**{**given, **changes}, backend="reference"))
        assert any((value < 0).any() for value in kept)
    single = {name: value.float() if name == "x" else value for name, value in given.items()}
    assert ops.graph_propagate(single["x"], single["index"], single["coefficient"]).is_contiguous()
    with pytest.raises(BackendDtypeError):
        ops.graph_propagate(given["x"], given["index"], given["coefficient"], backend="odd")


@pytest.fixture
def another_library(monkeypatch):
    """Forget the library that is loaded, and find another one."""

    def use(path: Path) -> None:
        monkeypatch.setenv("DRSEG_NATIVE_LIBRARY", str(path))
        monkeypatch.delenv("DRSEG_NATIVE", raising=False)
        _native._load.cache_clear()

    yield use
    monkeypatch.undo()
    _native._load.cache_clear()
    call("graph_propagate", backend="native")


def check_library_refused(reason: str) -> None:
    """One warning with the reason, the reference by itself, an error for who names the native backend."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # of what other tests left open, whenever it is collected
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(3):
            output = call("graph_propagate")
            assert ops.last_backend("graph_propagate") == "reference"
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert reason in str(caught[0].message) and "\n" not in str(caught[0].message)
    assert torch.equal(output, call("graph_propagate", backend="reference"))
    with pytest.raises(BackendUnavailableError) as error:
        call("graph_propagate", backend="native")
    assert reason in str(error.value) and "expected one of reference, got native" in str(error.value)
    report = {(row["op"], row["backend"]): row["reason"] for row in ops.backend_report() if row["device"] == "cpu"}
    assert reason in report["graph_propagate", "native"]


@pytest.mark.promise("C27")
def test_a_missing_library(another_library, tmp_path):
    another_library(tmp_path / "absent" / "libdrseg_native.so")
    check_library_refused("native library not built: libdrseg_native.so is not in absent/")


def test_a_folder_in_place_of_the_library(another_library, tmp_path):
    another_library(tmp_path)
    check_library_refused("native library not built")


@pytest.mark.parametrize("content", [b"", b"not a library", b"<html>404</html>" * 100, b"\x7fELF\x02\x01" + bytes(200)])
def test_a_file_that_is_no_library(another_library, tmp_path, content):
    path = tmp_path / "libdrseg_native.so"
    path.write_bytes(content)
    another_library(path)
    check_library_refused("native library does not load: ")


@pytest.mark.promise("C27")
@pytest.mark.skipif(sys.platform != "linux", reason="the check reads the ELF format")
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_a_library_cut_short_does_not_kill_the_process(another_library, tmp_path, share):
    path = tmp_path / "libdrseg_native.so"
    content = _native.LIBRARY.path().read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    another_library(path)
    check_library_refused("native library does not load: libdrseg_native.so is cut short")


def test_a_whole_copy_of_the_library_loads(another_library, tmp_path):
    path = tmp_path / "libdrseg_native.so"
    shutil.copy(_native.LIBRARY.path(), path)
    assert not _library.is_cut_short(path)


def test_an_older_library_names_what_it_lacks():
    reason = _native.why_not("cpu", "graph_propagate", "no_such_operator")
    assert reason == "native library is older than this package: it lacks no_such_operator; build it again"
    assert _native.why_not("cpu", "graph_propagate") is None
    assert _native.why_not("mps") == "the native library has no mps kernels"


WITHOUT_NATIVE = """
import json, sys, warnings
for name in {blocked!r}:
    sys.modules[name] = None
import torch
with warnings.catch_warnings(record=True) as early:
    warnings.simplefilter("always")
    import drseg_core
    from drseg_core import ops
    from drseg_core.nn import PDGR
with warnings.catch_warnings(record=True) as late:
    warnings.simplefilter("always")
    module = PDGR(5, 8, k=3)
    features = torch.randn(1, 5, 3, 4, requires_grad=True)
    for _ in range(2):
        module(features, torch.randn(1, 8, 3, 4)).square().sum().backward()
try:
    ops.graph_propagate(torch.ones(2, 3), torch.zeros(2, 1).int(), torch.ones(2, 1), backend="native")
    error = None
except drseg_core.BackendUnavailableError as caught:
    error = str(caught)
ours = lambda found: [[w.category.__name__, str(w.message)] for w in found if "drseg" in str(w.message)]
print(json.dumps({{
    "early": ours(early), "late": ours(late), "error": error, "backend": ops.last_backend("graph_propagate"),
    "finite": bool(features.grad.isfinite().all()), "loaded": bool(torch.ops.loaded_libraries),
}}))
"""


@pytest.mark.promise("C27")
@pytest.mark.parametrize(
    "blocked,environment,reason",
    [
        ((), {"DRSEG_NATIVE": "0"}, "native library left out by DRSEG_NATIVE=0"),
        (
            HEAVY,
            {"DRSEG_NATIVE_LIBRARY": "absent/lib.so", "HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""},
            "native library not built: lib.so is not in absent/",
        ),
    ],
    ids=["by choice", "no library, no triton, no home, no GPU"],
)
def test_a_stripped_environment_works_after_one_warning(blocked, environment, reason):
    result = fresh(WITHOUT_NATIVE.format(blocked=blocked), **environment)
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout.splitlines()[-1])
    assert got["early"] == [], "importing warns"
    assert got["late"] == [["RuntimeWarning", f"drseg_core: {reason}; the CPU uses the slower reference"]]
    assert got["backend"] == "reference" and got["finite"] and not got["loaded"]
    assert got["error"] == (
        f"graph_propagate: backend native cannot run on cpu: {reason}; expected one of reference, got native"
    )


IMPORTS = f"""
import json, sys
import torch
given = [name for name in {HEAVY!r} if name in sys.modules]
import drseg_core
found = lambda: [name for name in {HEAVY!r} if name in sys.modules and name not in given]
state = lambda: [found(), torch.cuda.is_initialized(), [str(path) for path in torch.ops.loaded_libraries]]
first = state()
import importlib.util, pkgutil
names = [module.name for module in pkgutil.walk_packages(drseg_core.__path__, "drseg_core.")]
if importlib.util.find_spec("jsonargparse") is None:
    names = [name for name in names if not name.startswith("drseg_core.cli.")]
guilty = []
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
        if state() != first:
            guilty.append([name, *state()])
            break
print(json.dumps([first, guilty, names]))
"""


@pytest.mark.promise("C27")
def test_importing_loads_no_heavy_package_and_touches_no_device():
    result = fresh(IMPORTS)
    assert result.returncode == 0, result.stderr
    first, guilty, names = json.loads(result.stdout.splitlines()[-1])
    assert first == [[], False, []]
    assert guilty == []
    assert {"drseg_core.ops.knn_graph.api", "drseg_core.nn.pdgr", "drseg_core.ops._native"} <= set(names)


LEVEL = """
import os
import sys

import test_knn_graph
import torch
from contract import SMALL, compare, run
from subjects import SUBJECTS

from drseg_core import ops

def check(path):
    kept = []
    for subject in SUBJECTS.values():
        for case in SMALL:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                for variant in subject.variants:
                    inputs = {**subject.make_inputs(case, dtype), **variant}
                    got = run(subject, inputs, lambda **inputs: subject.function(**inputs, backend="native"))
                    compare(subject, inputs, got)
                    kept.append(got)
    with ops.use_backend("native"):
        for case in SMALL:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                test_knn_graph.test_gap_rule(case, dtype, "additive", True, "native")
        for dtype in (torch.float32, torch.float64):
            test_knn_graph.test_integer_lattice_is_exact(256, 3, True, dtype, "native")
        for form in test_knn_graph.FORMS:
            test_knn_graph.test_large_grids_are_exact((33, 35), form, False, "native")
        for kind in ("dino", "outliers"):
            test_knn_graph.test_grids_that_are_searched_coarsely_first(kind, "additive", "native")
    torch.save(kept, path)

# the library reads its level at its first call, and none was made yet: what is imported serves all levels
for level in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        os.environ["DRSEG_CPU_LEVEL"] = level
        check(os.path.join(sys.argv[1], level))
        sys.stderr.flush()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"{level}: exit code {code}")
"""
# avxvnni: avx2 with its own products in the coarse search, where the CPU has them
LEVELS = ("plain", "avx2", "avxvnni", "avx512")


def levels_here() -> int:
    capability = torch.backends.cpu.get_cpu_capability()
    return 4 if capability.startswith("AVX512") else 3 if capability == "AVX2" else 1


@pytest.fixture(scope="module")
def level_results(tmp_path_factory) -> dict[str, list[dict[str, Tensor]]]:
    """What the library computes at each instruction set that this CPU has, each within the contract's limits."""
    folder, levels = tmp_path_factory.mktemp("levels"), LEVELS[: levels_here()]
    result = fresh(LEVEL, str(folder), *levels)
    assert result.returncode == 0, result.stderr
    return {level: torch.load(folder / level, weights_only=True) for level in levels}


@pytest.mark.promise("C1")
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_keeps_the_limits(level, level_results):
    if level not in level_results:
        pytest.skip(f"this CPU has no {level}")
    assert len(level_results[level]) == 144 and all(torch.isfinite(got["output"]).all() for got in level_results[level])


@pytest.mark.promise("C41")
def test_the_instruction_set_that_was_asked_for_ran(level_results):
    if len(level_results) == 1:
        pytest.skip("this CPU has one instruction set")
    # fused multiply-add rounds once where the plain code rounds twice, so some bit differs
    pairs = list(zip(level_results["plain"], level_results["avx2"], strict=True))
    # of graph_propagate, then of edge_weight; degree_normalize has no product that could be fused
    for part in (pairs[:36], pairs[36:54]):
        assert any(not torch.equal(plain["output"], wide["output"]) for plain, wide in part)


ENTRIES = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul"))


def _write(level: tuple[str, str], precision: str) -> None:
    torch._C._set_fp32_precision_setter(*level, precision)


def _default_precision() -> None:
    for level in ENTRIES:
        _write(level, "none")
    torch.set_float32_matmul_precision("highest")
    for level in ENTRIES:
        _write(level, "none")


def _precision() -> list[str]:
    """All that can be read of the precision of float32 products, and how it follows a change of the outer levels."""

    def read() -> list[str]:
        found = [torch._C._get_fp32_precision_getter(*level) for level in ENTRIES]
        for getter in (torch.get_float32_matmul_precision, lambda: str(torch.backends.cuda.matmul.allow_tf32)):
            try:
                found.append(getter())
            except RuntimeError:
                found.append("mixed")
        return found

    state = read()
    outer = []
    for level in ENTRIES[:3]:
        outer.append(torch._C._get_fp32_precision_getter(*level))
        for precision in ("tf32", "none"):
            _write(level, precision)
            state += read()
    for level, precision in zip(ENTRIES, outer, strict=False):
        _write(level, precision)
    return state


def _set(target: Any, name: str, value: Any) -> Any:
    return lambda: setattr(target, name, value)


def _all(*settings: Any) -> Any:
    return lambda: [setting() for setting in settings]


BACKENDS = torch.backends
WAYS = {
    "default": lambda: None,
    "legacy highest": lambda: torch.set_float32_matmul_precision("highest"),
    "legacy high": lambda: torch.set_float32_matmul_precision("high"),
    "legacy medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": _set(BACKENDS.cuda.matmul, "allow_tf32", True),
    "all tf32": _set(BACKENDS, "fp32_precision", "tf32"),
    "all bf16": _set(BACKENDS, "fp32_precision", "bf16"),
    "all ieee": _set(BACKENDS, "fp32_precision", "ieee"),
    "cuda": _set(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "cudnn": _set(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "mkldnn": _set(BACKENDS.mkldnn, "fp32_precision", "bf16"),
    "mkldnn level": lambda: _write(("mkldnn", "all"), "bf16"),
    "mkldnn products bf16": _set(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "mkldnn products tf32": _set(BACKENDS.mkldnn.matmul, "fp32_precision", "tf32"),
    # the entry holds by itself what it would take from above
    "all and products": _all(
        _set(BACKENDS, "fp32_precision", "bf16"), _set(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16")
    ),
    "all but products": _all(
        _set(BACKENDS, "fp32_precision", "tf32"), _set(BACKENDS.cuda.matmul, "fp32_precision", "ieee")
    ),
    "legacy, then newer": _all(
        lambda: torch.set_float32_matmul_precision("medium"), _set(BACKENDS.cuda.matmul, "fp32_precision", "ieee")
    ),
    "newer, then legacy": _all(
        _set(BACKENDS, "fp32_precision", "bf16"), lambda: torch.set_float32_matmul_precision("high")
    ),
}


SETTERS = (
    (torch, "set_float32_matmul_precision"),
    (torch._C, "_set_float32_matmul_precision"),
    (torch._C, "_set_fp32_precision_setter"),
)


def _refuse(*arguments: Any) -> None:
    raise AssertionError(f"an op set {arguments}")


@pytest.mark.promise("C4")
@pytest.mark.parametrize("way", WAYS)
def test_no_precision_setting_reaches_an_op_and_all_are_left_alone(way, monkeypatch):
    def answers() -> list[Tensor]:
        found = []
        random = torch.Generator().manual_seed(0)
        prior = torch.randn(1, 196, 768, generator=random)
        found += ops.knn_graph(prior, (14, 14), 9, return_score=True)
        for op in OPS[4:]:
            found += run(SUBJECTS[op], SUBJECTS[op].make_inputs(CASES[2]), getattr(ops, op)).values()
        return [value for value in found if isinstance(value, Tensor)]

    _default_precision()
    try:
        expected = answers()
        assert len(expected) > 5
        WAYS[way]()
        before = _precision()
        got = answers()
        assert _precision() == before
        # nor for a moment, in which another thread would see it
        with monkeypatch.context() as patched:
            for target, name in SETTERS:
                patched.setattr(target, name, _refuse)
            answers()
    finally:
        _default_precision()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_compiler_lets_the_error_of_a_backend_that_cannot_run_through():
    reason = _triton.why_not("cpu")
    if reason is None:
        pytest.skip("the kernels are interpreted")
    torch.compiler.reset()
    compiled = torch.compile(lambda prior: ops.knn_graph(prior, (2, 3), 3, backend="triton"), backend="aot_eager")
    with pytest.raises(BackendUnavailableError, match="backend triton cannot run on cpu"):
        compiled(torch.randn(1, 6, 4))

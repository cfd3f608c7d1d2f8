# SPDX-License-Identifier: Apache-2.0
"""What each op and PDGR say to input they cannot use.

Every refusal has its exact type and reads ``<op>: <argument> <problem>; expected ..., got ...`` in one line, and after
it a good call gives the right answer. Layouts are in ``contract.py`` and ``tests/nn/test_pdgr.py``, backends in
``test_dispatch.py``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from contract import compare, run
from subjects import SUBJECTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from drseg_core import ops
from drseg_core.errors import BackendUnavailableError, NumericalError
from drseg_core.nn import PDGR
from drseg_core.testing import numerics

B, N, K, D, E, C = 2, 6, 3, 5, 4, 7
GRID = (2, 3)
PDGR_OPTIONS = {"k": K, "edge_hidden": E}


def good(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keyword arguments that ``op`` takes."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    index = torch.rand(B, N, N, generator=random).topk(K).indices.sort(-1).values.int()
    return {
        "knn_graph": lambda: {"prior": draw(B, N, D), "grid": GRID, "k": K},
        "edge_weight": lambda: {
            "source": draw(B, N, E),
            "target": draw(B, N, E),
            "index": index,
            "vector": draw(E),
            "bias": draw(),
            "mask": torch.ones(B, N, K, dtype=torch.bool),
        },
        "degree_normalize": lambda: {"weight": draw(B, N, K).abs() + 0.1, "index": index},
        "graph_propagate": lambda: {"x": draw(B, N, C), "index": index, "coefficient": draw(B, N, K)},
        "padding_mask": lambda: {"index": index},
        "PDGR": lambda: {"features": draw(B, C, *GRID), "prior": draw(B, D, *GRID)},
    }[op]()


def pdgr(**options: Any) -> PDGR:
    torch.manual_seed(0)
    return PDGR(C, D, **{**PDGR_OPTIONS, **options})


def call(op: str, arguments: dict[str, Any]) -> Any:
    return pdgr()(**arguments) if op == "PDGR" else getattr(ops, op)(**arguments)


@pytest.fixture(scope="module")
def first_answer() -> Tensor:
    return call("PDGR", good("PDGR")).detach()


@pytest.fixture(autouse=True)
def a_good_call_still_works(first_answer):
    """After each test: every op gives what its float64 oracle says, and PDGR the bits it gave at the start."""
    yield
    for name, subject in SUBJECTS.items():
        inputs = good(name)
        compare(subject, inputs, run(subject, inputs, subject.function))
    given = good("knn_graph")
    index, score = ops.knn_graph(**given, decay=0.0, return_score=True)
    unit = torch.nn.functional.normalize(given["prior"].double(), dim=-1)
    for b in range(B):
        truth = unit[b] @ unit[b].T
        assert numerics.compare_selection(index[b], score[b], truth, 2e-6, include_self=True) is None
    assert torch.equal(call("PDGR", good("PDGR")), first_answer)


def refuse(action: Callable[[], Any], error: type[Exception], begin: str, pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error) as caught:
            action()
    message = str(caught.value)
    # exactly this type: a subclass would end in another exit code
    assert caught.type is error, caught.type
    assert "\n" not in message, message
    assert message.startswith(begin), message
    assert re.search(r"; expected .+, got .+", message), message
    assert re.search(pattern, message), message


TENSORS = {
    "knn_graph": ("prior",),
    "edge_weight": ("source", "target", "index", "vector", "bias", "mask"),
    "degree_normalize": ("weight", "index"),
    "graph_propagate": ("x", "index", "coefficient"),
    "padding_mask": ("index",),
    "PDGR": ("features", "prior"),
}
ARGUMENTS = [(op, name) for op, names in TENSORS.items() for name in names]
FLOATS = [(op, name) for op, name in ARGUMENTS if name not in ("index", "mask")]


@pytest.mark.promise("C44")
@pytest.mark.parametrize("op,name", ARGUMENTS)
def test_not_a_tensor(op, name):
    value = good(op)[name]
    for wrong in (None, value.tolist(), value.numpy(), "features"):
        # without a target the source is both halves
        if name in ("mask", "target") and wrong is None:
            continue
        rule = f"must be a tensor; expected torch.Tensor, got {type(wrong).__name__}$"
        refuse(lambda wrong=wrong: call(op, {**good(op), name: wrong}), TypeError, f"{op}: {name} ", rule)


@pytest.mark.promise("C44")
@pytest.mark.parametrize("op,name", ARGUMENTS)
def test_wrong_rank(op, name):
    value = good(op)[name]
    for wrong in (value.flatten()[:1].view(1, 1, 1, 1, 1), torch.zeros(2, dtype=value.dtype)):
        if name == "vector" and wrong.dim() == 1:
            wrong = torch.zeros(E, 1)
        if name == "bias" and wrong.numel() == 1:
            continue
        rule = rf"(wrong rank|wrong shape); expected .*got {re.escape(str(tuple(wrong.shape)))}$"
        refuse(lambda wrong=wrong: call(op, {**good(op), name: wrong}), ValueError, f"{op}: {name} ", rule)


@pytest.mark.promise("C44")
@pytest.mark.parametrize("op,name", ARGUMENTS)
def test_unsupported_dtype(op, name):
    value = good(op)[name]
    if name == "index":
        wrong_dtypes = [torch.float32, torch.bool, torch.int16, torch.uint8, torch.complex64]
    elif name == "mask":
        wrong_dtypes = [torch.float32, torch.int32, torch.uint8]
    else:
        wrong_dtypes = [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
    for dtype in wrong_dtypes:
        wrong = value.to(dtype)
        rule = rf"unsupported dtype; expected one of .*, got {str(dtype).removeprefix('torch.')}$"
        refuse(lambda wrong=wrong: call(op, {**good(op), name: wrong}), TypeError, f"{op}: {name} ", rule)


@pytest.mark.promise("C17")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_float_dtype_is_computed(dtype):
    for name, subject in SUBJECTS.items():
        inputs = good(name, dtype)
        compare(subject, inputs, run(subject, inputs, subject.function))
    index, score = ops.knn_graph(**good("knn_graph", dtype), return_score=True)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and index.dtype == torch.int32
    assert pdgr().to(dtype)(**good("PDGR", dtype)).dtype == dtype


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.sparse_coo": lambda t: t.to_sparse(),
    "torch.sparse_csr": lambda t: t.flatten(1).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "nested ": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "torch._mkldnn": lambda t: t.to_mkldnn(),
}


@pytest.mark.promise("C44")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op,name", FLOATS)
def test_layouts(op, name, layout):
    value = good(op)[name]
    if value.dim() < 2 and layout != "torch.sparse_coo":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = LAYOUTS[layout](value)
    rule = f"unsupported layout; expected a dense strided tensor, got {layout.strip()}$"
    refuse(lambda: call(op, {**good(op), name: wrong}), TypeError, f"{op}: {name} ", rule)


@pytest.mark.promise("C44")
@pytest.mark.parametrize("op,name", ARGUMENTS)
def test_meta_tensors(op, name):
    wrong = good(op)[name].to("meta")
    rule = "meta tensors have no data$"
    refuse(lambda: call(op, {**good(op), name: wrong}), RuntimeError, f"{op}: {name} ", rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fake_tensors_have_the_metadata_of_real_ones(dtype):
    for op in TENSORS:
        function = pdgr().to(dtype) if op == "PDGR" else getattr(ops, op)
        given = good(op, dtype)
        real = function(**given)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = function(**{n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in given.items()})
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride()), op


@pytest.mark.promise("C44")
def test_checks_hold_for_fake_and_for_empty_tensors():
    with FakeTensorMode():
        refuse(lambda: ops.knn_graph(torch.empty(B, N, D), GRID, N + 1), ValueError, "knn_graph: k ", "candidates")
        refuse(lambda: ops.knn_graph(torch.empty(B, N), GRID, 2), ValueError, "knn_graph: grid ", "h . w = N = 2,")
    refuse(lambda: ops.knn_graph(torch.empty(0, N, D), GRID, N + 1), ValueError, "knn_graph: k ", "candidates")
    empty = {**good("graph_propagate"), "x": torch.empty(0, N, C)}
    refuse(lambda: call("graph_propagate", empty), ValueError, "graph_propagate: index ", "does not match x")


# (row, op, argument, value, error, what the message says beyond its form)
TABLE: list[tuple[str, str, str, Any, type[Exception], str]] = [
    (
        "7",
        "knn_graph",
        "prior",
        torch.ones(B, N, 0),
        ValueError,
        r"no channels; expected D >= 1, got shape \(2, 6, 0\)",
    ),
    *(("9", "knn_graph", "k", k, TypeError, "expected int") for k in (2.5, "8", torch.tensor([3]), True, None, [3])),
    *(("9", "knn_graph", "k", k, TypeError, "expected int") for k in (np.float32(3), np.bool_(True), np.array([3]))),
    ("9", "knn_graph", "k", torch.tensor(3.0), TypeError, "expected int, got float$"),
    ("10", "knn_graph", "k", -1, ValueError, "expected k >= 0, got -1$"),
    ("12", "knn_graph", "k", 32, ValueError, r"expected k <= 6 \(N = 6\), got 32: pass pad=True or lower k$"),
    ("24", "knn_graph", "grid", (2, 4), ValueError, "expected h . w = N = 6, got 2 x 4$"),
    ("24", "knn_graph", "grid", (6,), ValueError, r"expected \(h, w\), got \(6,\)$"),
    ("24", "knn_graph", "grid", (1, 2, 3), ValueError, r"not a pair"),
    ("24", "knn_graph", "grid", None, ValueError, "not a pair; .*got None$"),
    ("24", "knn_graph", "grid", torch.zeros(3, 3), ValueError, "not a pair"),
    ("24", "knn_graph", "grid", "23", ValueError, "not a pair"),
    ("24", "knn_graph", "grid", (2.0, 3), TypeError, "height must be an integer; expected int, got float$"),
    ("24", "knn_graph", "grid", (2, True), TypeError, "width must be an integer; expected int, got bool$"),
    ("24", "knn_graph", "grid", (-2, -3), ValueError, "height must not be negative"),
    *(("30", "knn_graph", "decay", x, ValueError, "finite number >= 0") for x in (-1, float("nan"), float("inf"))),
    *(("30", "knn_graph", "decay", x, TypeError, "must be a number") for x in ("1", None, torch.ones(1), True)),
    ("30", "knn_graph", "decay", torch.ones((), requires_grad=True), TypeError, "expected float, got Tensor$"),
    ("30", "knn_graph", "decay", np.complex64(1), TypeError, "expected float, got complex$"),
    *(("40", "knn_graph", "return_score", x, TypeError, "must be a flag") for x in (1, None, torch.tensor(True))),
    ("40", "knn_graph", "return_score", "no", ValueError, "is unknown; expected True, False or 'rough', got 'no'$"),
    ("40", "knn_graph", "form", "cubic", ValueError, "one of additive, gauss, multiplicative, product, got 'cubic'$"),
    ("40", "knn_graph", "form", ["additive"], ValueError, "is unknown"),
    ("40", "knn_graph", "precision", "tf32", ValueError, "expected one of exact, got 'tf32'$"),
    ("30", "knn_graph", "decay", 1e300, ValueError, r"is too large; expected decay <= 3.403e\+38, got 1e\+300$"),
    *(
        ("40", op, name, value, TypeError, f"must be a flag; expected bool, got {type(value).__name__}$")
        for op, names in {
            "knn_graph": ("include_self", "pad", "check_finite"),
            "edge_weight": ("validate",),
            "degree_normalize": ("validate",),
            "graph_propagate": ("transpose", "validate"),
            "padding_mask": ("include_self",),
        }.items()
        for name in names
        for value in ("no", 1, None, torch.tensor(True))
    ),
    ("24", "edge_weight", "target", torch.ones(B, N + 1, E), ValueError, r"= \(2, 6, 4\), got \(2, 7, 4\)$"),
    ("24", "edge_weight", "target", torch.ones(1, N, E), ValueError, r"= \(2, 6, 4\), got \(1, 6, 4\)$"),
    ("24", "edge_weight", "target", torch.ones(N, E), ValueError, r"= \(2, 6, 4\), got \(6, 4\)$"),
    ("24", "edge_weight", "index", torch.zeros(1, N, K).int(), ValueError, r"expected \(2, 6\) before K, got \(1, 6"),
    ("24", "edge_weight", "index", torch.zeros(B, 5, K).int(), ValueError, r"does not match source"),
    ("31", "edge_weight", "vector", torch.ones(E + 1), ValueError, r"\(E,\) = \(4,\), got \(5,\)$"),
    ("31", "edge_weight", "bias", torch.ones(E), ValueError, r"expected \(\) or \(1,\), got \(4,\)$"),
    ("17", "edge_weight", "mask", torch.ones(B, N, K + 1).bool(), ValueError, r"= \(2, 6, 3\), got \(2, 6, 4\)$"),
    ("17", "edge_weight", "mask", torch.ones(N, K).bool(), ValueError, r"= \(2, 6, 3\), got \(6, 3\)$"),
    ("24", "degree_normalize", "index", torch.zeros(B, N, 2).int(), ValueError, r"= \(2, 6, 3\), got \(2, 6, 2\)$"),
    *(
        ("30", "degree_normalize", "eps", eps, ValueError, "expected a finite number > 0")
        for eps in (0, 0.0, -1e-6, float("nan"), float("inf"))
    ),
    *(
        ("30", "degree_normalize", "eps", eps, ValueError, f"is too small; expected eps >= 1e-20, got {eps}$")
        for eps in (9e-21, 1e-30, 1e-50)
    ),
    *(("30", "degree_normalize", "eps", eps, TypeError, "expected float") for eps in ("1e-6", None, True)),
    ("40", "degree_normalize", "norm", "sym", ValueError, "one of sym_row, sym_count, .*, got 'sym'$"),
    ("40", "degree_normalize", "norm", None, ValueError, "is unknown"),
    ("24", "graph_propagate", "coefficient", torch.ones(B, N, 2), ValueError, r"= \(2, 6, 3\), got \(2, 6, 2\)$"),
    ("24", "graph_propagate", "x", torch.ones(B, 5, C), ValueError, r"expected \(2, 5\) before K, got \(2, 6, 3\)$"),
    ("24", "graph_propagate", "x", torch.ones(3, N, C), ValueError, r"expected \(3, 6\) before K, got \(2, 6, 3\)$"),
    ("24", "graph_propagate", "x", torch.ones(N, C), ValueError, r"does not match x"),
    *(
        ("40", op, "backend", name, ValueError, "one of native, cuda, triton, reference, got ")
        for op in ("knn_graph", "edge_weight", "degree_normalize", "graph_propagate")
        for name in ("gpu", "", 1, "Native")
    ),
    *(
        (
            "39",
            op,
            "backend",
            "triton",
            BackendUnavailableError,
            f"on cpu: ({op} has no triton kernel|.*need a CUDA device.*); expected one of .*ref",
        )
        for op in ("knn_graph", "edge_weight", "degree_normalize", "graph_propagate")
    ),
    ("24", "PDGR", "prior", torch.ones(B, D, 3, 3), ValueError, r"as \(2, 7, 2, 3\), or .*, got \(2, 5, 3, 3\)$"),
    ("24", "PDGR", "prior", torch.ones(1, D, 2, 3), ValueError, r"same B, h, w as \(2, 7, 2, 3\), got \(1, 5, 2, 3\)$"),
    (
        "24",
        "PDGR",
        "prior",
        torch.ones(B, D + 1, 2, 3),
        ValueError,
        r"expected \(B, 5, h, w\), or .*, got \(2, 6, 2, 3\)$",
    ),
    (
        "24",
        "PDGR",
        "features",
        torch.ones(B, 8, 2, 3),
        ValueError,
        r"expected \(B, 7, h, w\), or .*, got \(2, 8, 2, 3\)$",
    ),
    ("2", "PDGR", "features", torch.ones(C, 2, 3), ValueError, r"expected \(B, 7, h, w\), or .*, got \(7, 2, 3\)$"),
    (
        "25",
        "PDGR",
        "features",
        torch.ones(B, C, 2, 3).half(),
        TypeError,
        "torch.float32 or autocast, got torch.float16$",
    ),
]


@pytest.mark.promise("C44")
@pytest.mark.parametrize("row,op,name,value,error,rule", TABLE, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_argument(row, op, name, value, error, rule):
    begin = "grid" if name == "grid" else name
    # the index is what the caller computed from x, so it is the index that does not match
    begin = "index" if (op, name) == ("graph_propagate", "x") else begin
    refuse(lambda: call(op, {**good(op), name: value}), error, f"{op}: {begin} ", rule)


CONSTRUCTOR: list[tuple[str, Any, type[Exception], str]] = [
    *(
        (name, value, error, rule)
        for name in ("channels", "prior_dim", "edge_hidden", "layers", "hidden")
        for value, error, rule in (
            (0, ValueError, ">= 1, got 0$"),
            (-3, ValueError, "negative; .*got -3$"),
            (2.5, TypeError, "expected int, got float$"),
            (True, TypeError, "expected int, got bool$"),
            ("8", TypeError, "expected int, got str$"),
        )
    ),
    ("k", -1, ValueError, "expected k >= 0, got -1$"),
    ("k", 7.0, ValueError, "an integer, or a share above 0 and below 1, got 7.0$"),
    ("k", 0.0, ValueError, "an integer, or a share above 0 and below 1, got 0.0$"),
    ("k", float("nan"), ValueError, "a share above 0 and below 1, got nan$"),
    *(
        (name, value, error, rule)
        for name in ("edge_temperature", "edge_decay")
        for value, error, rule in (
            (0.0, ValueError, "finite number > 0, got 0.0$"),
            (-1.0, ValueError, "finite number > 0, got -1.0$"),
            (float("inf"), ValueError, "finite number > 0, got inf$"),
            ("0.1", TypeError, "expected float, got str$"),
        )
    ),
    ("k", None, TypeError, "expected int, got NoneType$"),
    ("affinity", "cosine", ValueError, "one of exp, linear, power, product, gauss, got 'cosine'$"),
    ("self_loop", "none", ValueError, "one of in_topk, exclude, extra, got 'none'$"),
    ("norm", "sym", ValueError, "one of sym_row, sym_count, sym_inout, row, sym_undirected, got 'sym'$"),
    ("norm", None, ValueError, "got None$"),
    *(
        (name, value, TypeError, f"must be a flag; expected bool, got {type(value).__name__}$")
        for name in (
            "normalize_prior",
            "bias",
            "residual",
            "use_affinity_as_weight",
            "resample_prior",
            "keep_format",
        )
        for value in ("no", 0, None)
    ),
    ("residual", np.True_, TypeError, r"expected bool, got (numpy\.bool|bool_)$"),
    ("gamma", 0.0, ValueError, "finite number > 0, got 0.0$"),
    ("gamma", 10**400, ValueError, "finite number > 0, got an integer beyond float64$"),
    ("gamma", float("nan"), ValueError, "finite number > 0, got nan$"),
    ("gamma", "1", TypeError, "expected float, got str$"),
    ("decay", -0.5, ValueError, "finite number >= 0, got -0.5$"),
    ("decay", float("inf"), ValueError, "finite number >= 0, got inf$"),
    ("decay", None, TypeError, "expected float, got NoneType$"),
    ("dropout", -0.1, ValueError, "finite number >= 0, got -0.1$"),
    ("dropout", "0.1", TypeError, "expected float, got str$"),
    ("norm_scale", float("nan"), ValueError, "finite number >= 0, got nan$"),
    ("norm_scale", "x", TypeError, "expected float, got str$"),
    ("backend", "gpu", ValueError, "one of native, cuda, triton, reference, got 'gpu'$"),
]


@pytest.mark.promise("C44")
@pytest.mark.parametrize("name,value,error,rule", CONSTRUCTOR)
def test_bad_option_of_pdgr(name, value, error, rule):
    options = {"channels": C, "prior_dim": D, **PDGR_OPTIONS, name: value}
    refuse(lambda: PDGR(**options), error, f"PDGR: {name} ", rule)


@pytest.mark.promise("C44")
def test_unknown_option_of_pdgr_and_too_much_dropout():
    with pytest.raises(TypeError, match="unexpected keyword argument 'neighbours'"):
        PDGR(C, D, neighbours=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="^PDGR: dropout is out of range; expected 0 <= dropout <= 1, got 1.5$"):
        PDGR(C, D, dropout=1.5)


SCALARS = [np.int8, np.uint8, np.int64, np.array, torch.tensor]


@pytest.mark.parametrize("integer", SCALARS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("real", [np.float16, np.float32, np.float64, np.array, torch.tensor], ids=lambda f: f.__name__)
def test_numbers_of_other_libraries_are_numbers(integer, real):
    prior = good("knn_graph")["prior"]
    expected = ops.knn_graph(prior, GRID, K, decay=0.5, return_score=True)
    for grid in ((integer(2), integer(3)), [integer(2), 3]):
        found = ops.knn_graph(prior, grid, integer(K), decay=real(0.5), return_score=True)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    # without padding the radius is compared with a corner's candidates
    near = ops.knn_graph(prior, GRID, 3, radius=1.5, return_score=True)
    found = ops.knn_graph(prior, GRID, integer(3), radius=real(1.5), return_score=True)
    assert all(torch.equal(*pair) for pair in zip(found, near, strict=True))
    # a product of two of them would not fit into eight bits
    assert ops.knn_graph(torch.ones(144, 2), (integer(12), integer(12)), integer(1)).shape == (144, 1)
    given = good("degree_normalize")
    assert torch.equal(ops.degree_normalize(**given, eps=real(0.5)), ops.degree_normalize(**given, eps=0.5))
    given = good("graph_propagate")
    weight = {"activation": "layer_norm", "norm_weight": torch.ones(C), "norm_bias": torch.zeros(C)}
    assert torch.equal(ops.graph_layer(**given, **weight, eps=real(0.5)), ops.graph_layer(**given, **weight, eps=0.5))


def test_options_of_pdgr_are_plain_numbers_whoever_they_came_from():
    torch.manual_seed(0)
    counts = {"k": np.int64(K), "edge_hidden": np.int32(E), "layers": np.uint8(2), "hidden": np.array(C)}
    reals = {"gamma": np.float32(0.5), "decay": np.float64(2), "dropout": np.float32(0.5), "norm_scale": np.float16(1)}
    module = PDGR(np.int64(C), torch.tensor(D), **counts, **reals)
    torch.manual_seed(0)
    plain = PDGR(C, D, k=K, edge_hidden=E, gamma=0.5, decay=2.0, dropout=0.5)
    assert torch.equal(module.eval()(**good("PDGR")), plain.eval()(**good("PDGR")))
    # as a stored option or a name in a log they are to be what they look like
    assert repr(module) == repr(plain) and type(module.k) is int and type(module.dropout.p) is float
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**good("PDGR")), plain(**good("PDGR")))


@pytest.mark.promise("C14")
def test_empties_and_no_neighbours():
    module = pdgr()
    for shape in ((0, 2, 3), (B, 0, 3), (B, 2, 0), (0, 0, 0)):
        features = torch.ones(shape[0], C, *shape[1:], requires_grad=True)
        output = module(features, torch.ones(shape[0], D, *shape[1:]))
        assert output.shape == features.shape
        grads = torch.autograd.grad(output.sum(), [features, *module.parameters()])
        assert all(not grad.any() for grad in grads)
    module = pdgr(k=0)
    given = good("PDGR")
    output = module(given["features"].requires_grad_(), given["prior"])
    grads = torch.autograd.grad(output.square().sum(), [given["features"], *module.parameters()])
    # nothing arrives, so the output is the normalised bias, the same in every cell
    assert torch.equal(output, output[:, :, :1, :1].expand(output.shape)) and output.isfinite().all()
    named = dict(zip(["features", *(name for name, _ in module.named_parameters())], grads, strict=True))
    assert not any(named[name].any() for name in named if not name.startswith(("output_norm", "biases")))


@pytest.mark.promise("C9")
@pytest.mark.parametrize("include_self,most", [(True, 25), (False, 24)])
def test_more_neighbours_than_candidates(include_self, most):
    prior = torch.randn(1, 25, D)
    ops.knn_graph(prior, (5, 5), most, include_self=include_self)
    for k in (most + 1, 32, 2**40):
        rule = rf"k <= {most} \(N = 25\), got {k}: pass pad=True or lower k$"
        refuse(
            lambda k=k: ops.knn_graph(prior, (5, 5), k, include_self=include_self), ValueError, "knn_graph: k ", rule
        )
    one = torch.randn(1, 1, D)
    rule = rf"k <= {int(include_self)} \(N = 1\), got 2"
    refuse(lambda: ops.knn_graph(one, (1, 1), 2, include_self=include_self), ValueError, "knn_graph: k ", rule)
    index, score = ops.knn_graph(one, (1, 1), 2, include_self=include_self, pad=True, return_score=True)
    assert index.tolist() == [[[0, 0]]] and score.isfinite().sum() == int(include_self)


@pytest.mark.promise("C11")
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_non_finite_features_are_named_on_request(value):
    given = good("knn_graph")
    given["prior"][0, 4, 1:4] = value
    rule = r"prior\[b=0, n=4\] has 3 non-finite values"
    refuse(lambda: ops.knn_graph(**given, check_finite=True), NumericalError, "knn_graph: prior", rule)
    index, score = ops.knn_graph(**given, return_score=True)
    assert score[0, 4].isnan().all() and score[0, [0, 1, 2, 3, 5]].isfinite().all() and score[1].isfinite().all()
    assert (index[0, 4] == 4).all() and not (index[0, [0, 1, 2, 3, 5]] == 4).any()


@pytest.mark.promise("C5", "C12")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_priors_of_any_scale_and_zero(dtype):
    given = good("PDGR")
    prior = given["prior"].to(dtype)
    expected = pdgr()(given["features"], prior)
    for exponent in (-8, 12) if dtype == torch.float16 else (-80, -20, 20, 80):
        scaled = prior * 2.0**exponent
        assert scaled.isfinite().all() and (scaled != 0).all()
        torch.testing.assert_close(pdgr()(given["features"], scaled), expected)
    # in half precision itself: the squares leave its range, and its eps is zero
    half = pdgr().to(dtype)
    for wrong in (torch.zeros_like(prior), torch.full_like(prior, 6e4)):
        features = given["features"].to(dtype).requires_grad_()
        output = half(features, wrong)
        output.float().square().sum().backward()
        assert output.isfinite().all() and features.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


@pytest.mark.promise("C18")
@pytest.mark.parametrize("op,name", ARGUMENTS)
def test_two_devices(op, name):
    # fake tensors have a device without needing one
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in good(op).items()}
        if sum(isinstance(v, Tensor) for v in given.values()) < 2:
            return
        given[name] = given[name].to("cuda", copy=True)
        first = TENSORS[op][0]
        blamed = TENSORS[op][1] if name == first else name
        refuse(lambda: call(op, given), ValueError, f"{op}: {blamed} ", r"another device; .*(cuda:0.*cpu|cpu.*cuda:0)")


@pytest.mark.promise("C17")
def test_mixed_dtypes_are_summed_in_the_widest_and_come_back_as_documented():
    for name, subject in SUBJECTS.items():
        exact = good(name, torch.float64)
        for other in subject.differentiable[1:]:
            mixed = {**good(name), other: exact[other].float().double()}
            output = subject.function(**mixed)
            expected = subject.function(**{k: v.double() if v.is_floating_point() else v for k, v in mixed.items()})
            assert output.dtype == (mixed["x"].dtype if name == "graph_propagate" else torch.float64)
            torch.testing.assert_close(output.double(), expected, rtol=1e-7, atol=1e-9)
    given = good("PDGR")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        prior = given["prior"].to(dtype)
        output = pdgr()(given["features"], prior)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, pdgr()(given["features"], prior.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pdgr()(given["features"].half(), given["prior"]).dtype == torch.bfloat16


@pytest.mark.promise("C44")
@pytest.mark.parametrize("op", SUBJECTS)
@pytest.mark.parametrize("value", [-1, N, 2**31 - 1, -(2**31)])
def test_indices_out_of_range(op, value):
    given = good(op)
    for dtype in (torch.int32, torch.int64):
        given["index"] = given["index"].to(dtype)
        given["index"][0, 3, 2] = value
        rule = rf"expected 0 <= index < N = 6, got index\[0, 3, 2\] = {value}$"
        refuse(lambda: call(op, {**given, "validate": True}), ValueError, f"{op}: index ", rule)
        clamped = {**given, "index": given["index"].clamp(0, N - 1)}
        assert torch.equal(call(op, given), call(op, clamped))
    given["index"][0, 3, 2] = 2**40
    refuse(lambda: call(op, {**given, "validate": True}), ValueError, f"{op}: index ", str(2**40))
    rule = r"got index\[3, 2\] = "
    flat = {n: v[0] if v.dim() == 3 else v for n, v in given.items()}
    refuse(lambda: call(op, {**flat, "validate": True}), ValueError, f"{op}: index ", rule)


REPEATED = {
    "one node": torch.zeros(B, N, K, dtype=torch.int32),
    "itself": torch.arange(N, dtype=torch.int32)[:, None].repeat(B, 1, K),
    "twice": torch.tensor([0, 0, 5], dtype=torch.int32).repeat(B, N, 1),
}


@pytest.mark.parametrize("op", ["edge_weight", "graph_propagate"])
@pytest.mark.parametrize("kind", REPEATED)
def test_repeated_neighbours_and_the_node_itself_are_allowed(op, kind):
    inputs = {**good(op), "index": REPEATED[kind]}
    compare(SUBJECTS[op], inputs, run(SUBJECTS[op], inputs, SUBJECTS[op].function))


@pytest.mark.parametrize("norm", ["sym_row", "sym_count", "sym_inout", "row"])
@pytest.mark.parametrize("kind", REPEATED)
def test_repeated_edges_share_the_degree(norm, kind):
    index = REPEATED[kind]
    weight = good("degree_normalize", torch.float64)["weight"]
    dense = torch.zeros(B, N, N, dtype=torch.float64)
    got = dense.scatter_add(2, index.long(), ops.degree_normalize(weight, index, norm=norm))
    matrix = dense.scatter_add(2, index.long(), weight)
    row, column = matrix.sum(2, keepdim=True) + 1e-6, matrix.sum(1, keepdim=True) + 1e-6
    expected = {
        "sym_row": matrix / (row * row.mT).sqrt(),
        "sym_count": matrix / K,
        "sym_inout": matrix / (row * column).sqrt(),
        "row": matrix / row,
    }[norm]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.promise("C11")
@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf, -torch.inf])
def test_bad_edge_weights_are_named_on_request(value):
    given = good("degree_normalize")
    given["weight"][1, 2, 0] = value
    rule = rf"expected finite values >= 0, got weight\[1, 2, 0\] = {value}$"
    refuse(
        lambda: call("degree_normalize", {**given, "validate": True}), NumericalError, "degree_normalize: weight ", rule
    )
    assert call("degree_normalize", given).shape == (B, N, K)


@pytest.mark.promise("C32")
def test_weights_of_another_size_are_not_loaded():
    with pytest.raises(RuntimeError, match="size mismatch for edge_vector.*torch.Size.*5.*torch.Size.*4"):
        pdgr().load_state_dict(pdgr(edge_hidden=5).state_dict())


@pytest.mark.promise("C44")
@pytest.mark.parametrize("op", [*SUBJECTS, "PDGR"])
def test_wrong_gradients_of_the_output(op):
    given = good(op)
    name = "features" if op == "PDGR" else SUBJECTS[op].differentiable[0]

    def gradient(grad: Tensor | None) -> Tensor:
        leaf = given[name].detach().requires_grad_()
        output = call(op, {**given, name: leaf})
        return torch.autograd.grad(output, leaf, None if grad is None else grad)[0]

    shape = call(op, given).shape
    with pytest.raises(RuntimeError, match="(?i)shape"):
        gradient(torch.ones(*shape[:-1], shape[-1] + 1))
    with pytest.raises(RuntimeError, match="(?i)shape"):
        gradient(torch.ones(shape[1:]))
    with pytest.raises(RuntimeError, match="(?i)complex"):
        gradient(torch.ones(shape, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="scalar outputs"):
        gradient(None)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient(torch.ones(shape, device="meta"))
    # autograd itself turns another floating-point dtype into the output's
    torch.testing.assert_close(gradient(torch.ones(shape, dtype=torch.float64)), gradient(torch.ones(shape)))


def test_an_output_that_is_not_used_has_no_gradient():
    given = good("graph_propagate")
    x = given["x"].requires_grad_()
    unused = call("graph_propagate", given)
    assert unused.requires_grad
    (grad,) = torch.autograd.grad(x.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    assert torch.autograd.grad(x.sum(), given["coefficient"].requires_grad_(), allow_unused=True) == (None,)


def test_the_native_kernels_refuse_sizes_that_do_not_fit():
    given = good("graph_propagate")
    x, index, coefficient = given["x"], given["index"], given["coefficient"]
    backward = torch.ops.drseg.graph_propagate_backward
    for grad in (torch.ones(B, N + 1, C), torch.ones(B + 1, N, C), torch.ones(B, N, C + 1), torch.ones(N, C)):
        with pytest.raises(RuntimeError, match="drseg_native::graph_"):
            backward(grad, x, index, coefficient, False, [True, True], None, None, "native")
    for wrong in (index[:, :5], index[..., :2], index[:1], index[0]):
        with pytest.raises(RuntimeError, match="drseg_native::graph_propagate: "):
            torch.ops.drseg.graph_propagate(x, wrong, coefficient, False, None, None, "native")


@pytest.mark.promise("C15")
def test_the_native_kernels_stay_inside_columns_of_another_graph():
    given = good("graph_propagate")
    x, index, coefficient = given["x"], given["index"], given["coefficient"]
    indptr, perm = ops.csc(index)
    wild = torch.full_like(perm, 2**31 - 1).index_fill_(0, torch.arange(0, len(perm), 2), -(2**31))
    assert torch.ops.drseg.graph_propagate(x, index, coefficient, True, indptr, wild, "native").isfinite().all()
    for wrong in (indptr + 1, indptr.flip(0), torch.zeros_like(indptr), indptr * 2):
        with pytest.raises(RuntimeError, match="drseg_native::graph_propagate: indptr does not count"):
            torch.ops.drseg.graph_propagate(x, index, coefficient, True, wrong, perm, "native")
    with pytest.raises(RuntimeError, match="drseg_native::graph_propagate: perm does not match index"):
        torch.ops.drseg.graph_propagate(x, index, coefficient, True, indptr, perm[1:], "native")


@pytest.mark.promise("C3")
def test_indices_cannot_ask_for_a_gradient():
    given = good("graph_propagate")
    with pytest.raises(RuntimeError, match="floating point"):
        given["index"].requires_grad_()
    wrong = {**given, "index": given["index"].float().requires_grad_()}
    refuse(lambda: call("graph_propagate", wrong), TypeError, "graph_propagate: index ", "got float32$")
    index, score = ops.knn_graph(good("knn_graph")["prior"].requires_grad_(), GRID, K, return_score=True)
    assert not index.requires_grad and not score.requires_grad


@pytest.mark.promise("C15")
@pytest.mark.parametrize("hidden", [3, 11])
def test_editing_the_features_after_the_forward_of_pdgr(hidden):
    given = good("PDGR")
    module, leaf = pdgr(hidden=hidden), given["features"].requires_grad_()
    parameters = [leaf, *module.parameters()]
    features = leaf * 1
    output = module(features, given["prior"])
    features.add_(1)
    # the linear map has saved them as they are, as torch's own does
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.square().sum(), parameters)


@pytest.mark.promise("C16")
def test_pdgr_is_not_twice_differentiable():
    given = good("PDGR")
    leaf = given["features"].requires_grad_()
    (grad,) = torch.autograd.grad(pdgr()(leaf, given["prior"]).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="not twice differentiable") as caught:
        grad.square().sum().backward()
    assert "\n" not in str(caught.value)


@pytest.mark.promise("C23")
def test_sizes_beyond_32_bits_have_the_right_shape():
    with FakeTensorMode():
        prior, k = torch.empty(1, 2**20, 8), 2**13
        index, score = ops.knn_graph(prior, (2**10, 2**10), k, return_score=True)
        assert index.shape == score.shape == (1, 2**20, k) and index.numel() > 2**32
        weight = ops.degree_normalize(score, index)
        y = ops.graph_propagate(torch.empty(1, 2**20, 2**12), index, weight)
        assert y.shape == (1, 2**20, 2**12) and y.numel() == 2**32


@pytest.mark.promise("C44")
def test_out_of_memory_passes_through():
    with pytest.raises(RuntimeError, match="(?i)alloc.*memory"):
        ops.knn_graph(torch.ones(1, 1, 1), (1, 1), 2**50, pad=True)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.promise("C44")
def test_distributed_tensors(mesh):
    from torch.distributed.tensor import distribute_tensor

    for op, name in FLOATS:
        wrong = distribute_tensor(good(op)[name], mesh)
        rule = r"expected torch.Tensor, got a distributed one: call .to_local\(\)$"
        refuse(
            lambda op=op, name=name, wrong=wrong: call(op, {**good(op), name: wrong}), TypeError, f"{op}: {name} ", rule
        )


@pytest.mark.promise("C16")
@pytest.mark.parametrize("op", SUBJECTS)
def test_forward_mode_is_refused_and_not_dropped(op):
    for name in SUBJECTS[op].differentiable:
        given = good(op)

        def function(tensor: Tensor, name: str = name, given: dict[str, Any] = given) -> Tensor:
            return call(op, {**given, name: tensor})

        rule = "forward-mode tangent; expected reverse-mode"
        value = given[name]
        tangent = torch.ones_like(value)
        refuse(lambda f=function, v=value, t=tangent: torch.func.jvp(f, (v,), (t,)), TypeError, f"{op}: {name} ", rule)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(value, tangent)
            refuse(lambda f=function, d=dual: f(d), TypeError, f"{op}: {name} ", rule)
        # the other mode works
        leaf = value.detach().requires_grad_()
        expected = torch.autograd.grad(function(leaf).sum(), leaf)[0]
        assert torch.equal(torch.func.grad(lambda tensor, f=function: f(tensor).sum())(value), expected)


@pytest.mark.parametrize("op", SUBJECTS)
def test_vmap_gives_what_a_loop_gives(op):
    given, name = good(op), SUBJECTS[op].differentiable[0]
    several = [given[name] * scale for scale in (0.5, 1.0, 2.0)]
    expected = torch.stack([call(op, {**given, name: one}) for one in several])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.func.vmap(lambda one: call(op, {**given, name: one}))(torch.stack(several))
    assert torch.equal(got, expected)

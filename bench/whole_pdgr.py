# SPDX-License-Identifier: Apache-2.0
"""Whole PDGR, default options: the engine beside the module as the paper writes it, factored, compiled, a bound.

In which precisions: ``precision.py``. What stands beside the engine computes in the same; the gate holds the engine to
the module in float32, given the neighbours that the engine chose.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import gate, memory
from bench.contenders import FactoredPDGR, MatmulLowerBound, ScatteredPDGR, pdgr_products
from bench.one_op import OPS, forget_launches, last_launches, sizes_of
from bench.precision import PRECISIONS, Precision
from bench.record import Row, rows_of
from bench.timing import Contender, interleave
from drseg_core.nn import PDGR
from drseg_core.ops import _dispatch, last_backend, use_backend
from drseg_core.testing import Case, LiteralPDGR, dino_like_prior, generator

MODES = ("fwd", "fwd+bwd")
DATA = ("random", "dino")
# what stands beside the engine at most nodes per image: one edge tensor of the literal module is 10 GB at 16384
_MOST_NODES = {"literal": 4096, "factored": 4096, "compiled": 4096, "pyg": 4096, "matmul_lower_bound": 16384}
BESIDE = tuple(_MOST_NODES)
# rows of edges at once where the gate cannot hold all of them
_GATE_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Problem:
    """A module and what goes into it.

    Args:
        engine: PDGR with the sizes of the case.
        features: (B, C, h, w), with gradient.
        prior: (B, D, h, w).
        gradient: (B, C, h, w) that comes back to the output.
        dtype: one of ``PRECISIONS``.
    """

    engine: PDGR
    features: Tensor
    prior: Tensor
    gradient: Tensor
    dtype: str = "float32"

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.dtype]

    def in_float32(self) -> Problem:
        """The same values for a step in float32."""
        features = self.features.detach().float().requires_grad_()
        return Problem(self.engine, features, self.prior.float(), self.gradient.float())

    def in_float64(self) -> Problem:
        """The same values and weights for a step in float64."""
        features = self.features.detach().double().requires_grad_()
        engine = copy.deepcopy(self.engine).double()
        return Problem(engine, features, self.prior.double(), self.gradient.double())

    @property
    def differentiated(self) -> list[Tensor]:
        return [self.features, *self.engine.parameters()]

    @property
    def names(self) -> list[str]:
        return ["features", *(name for name, _ in self.engine.named_parameters())]


def make(case: Case, data: str, device: str = "cpu", dtype: str = "float32") -> Problem:
    """Seeded weights and inputs of a case; ``data`` is ``random`` or ``dino``, ``dtype`` one of ``PRECISIONS``."""
    random = generator(case)
    grid = (case.height, case.width)
    if data == "dino":
        nodes = dino_like_prior(case.batch, *grid, case.prior, random)
        # a backbone's map, as the adapters hand it over
        prior = nodes.transpose(1, 2).unflatten(2, grid).contiguous()
        del nodes
    else:
        prior = torch.randn(case.batch, case.prior, *grid, generator=random)
    features, gradient = (torch.randn(case.batch, case.channels, *grid, generator=random) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        engine = PDGR(case.channels, case.prior, k=case.neighbours, edge_hidden=case.hidden, keep_format=False)
    # a map at a time, so that the largest exists once
    like = PRECISIONS[dtype]
    features, prior = (value.to(device, like.maps) for value in (features, prior))
    # under autocast the output has the dtype of the linear maps
    return Problem(engine.to(device), features.requires_grad_(), prior, gradient.to(device, like.products), dtype)


def step(
    module: Callable[[Tensor, Tensor], Tensor], problem: Problem, backward: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """The output and, with ``backward``, the gradients of ``problem.differentiated``."""
    with torch.set_grad_enabled(backward), problem.precision.context(problem.prior.device.type):
        output = module(problem.features, problem.prior)
    if not backward:
        return output, ()
    # of others than the engine the output may be wider
    return output, torch.autograd.grad(output, problem.differentiated, problem.gradient.to(output.dtype))


def graph_of(problem: Problem) -> Tensor:
    """(B, N, K) neighbours that the engine chooses."""
    with torch.no_grad(), problem.precision.context(problem.prior.device.type):
        # an older version that is raced returns a pair
        index: Tensor = problem.engine.graph(problem.prior)[0]
    return index


def peak(
    case: dict[str, Any], data: str, name: str, backward: bool, backend: str | None = None, dtype: str = "float32"
) -> dict[str, float]:
    """Peak memory of one step of ``engine``, ``literal`` or ``factored`` in this process, which does nothing else.

    Returns:
        ``peak_mb`` above the loaded program and the inputs, ``process_mb`` of the whole process, both in MiB.
    """

    def run(problem: Problem) -> None:
        others: dict[str, Callable[[PDGR], Any]] = {"literal": LiteralPDGR, "factored": FactoredPDGR}
        step(problem.engine if name == "engine" else others[name](problem.engine), problem, backward)

    with use_backend(backend):
        run(make(dataclasses.replace(Case(**case), batch=1, height=4, width=4), data, dtype=dtype))
        problem = make(Case(**case), data, dtype=dtype)
        made = memory.high_water()
        before = memory.settle()
        run(problem)
        after = memory.high_water()
    return {"peak_mb": (after - before) / 2**20, "process_mb": max(made, after) / 2**20}


def _gate(
    case: Case, problem: Problem, index: Tensor, backward: bool, most_literal: int | None = None
) -> tuple[str | None, Row]:
    """What is wrong with the engine, and for its row what it was held against.

    That is the literal module up to ``most_literal`` nodes (those at which it is measured), else the factored one.
    """
    engine = problem.engine
    nodes = problem.prior.flatten(2).transpose(1, 2)
    wrong = gate.selection(index, nodes, (case.height, case.width), engine.decay / engine.gamma)
    if wrong is not None:
        return wrong, {}
    # what ran for another job; every version that can be raced has the name
    _dispatch._last.clear()
    forget_launches()
    got, got_gradients = step(engine, problem, backward)
    backends = {op: ran for op in OPS if (ran := last_backend(op)) is not None}
    launch = last_launches(backends)
    factored, exact = partial(FactoredPDGR(engine, _GATE_ROWS), index=index), problem.in_float32()
    if case.nodes <= (_MOST_NODES["literal"] if most_literal is None else most_literal):
        against = "literal"
        with gate.GivenSelection(index):
            expected, gradients = step(LiteralPDGR(engine), exact, backward)
    else:
        against = "factored"
        expected, gradients = step(factored, exact, backward)
    rounded, rounded_gradients = step(factored, problem, backward) if problem.precision.reduced else (None, None)
    difference = float((got - expected).detach().abs().max())
    wrong = gate.output(got, expected, rounded)
    if wrong is None and backward:
        wrong = gate.gradients(problem.names, got_gradients, gradients, {"edge_bias": "edge_vector"}, rounded_gradients)
    if wrong is not None and not problem.precision.reduced:
        # in float32 a ReLU at zero falls one way or the other; which of the two is right, float64 says
        against, double = f"{against}, then in float64", problem.in_float64()
        expected, gradients = step(partial(FactoredPDGR(double.engine, _GATE_ROWS), index=index), double, backward)
        wrong = gate.output(got, expected)
        if wrong is None and backward:
            wrong = gate.gradients(problem.names, got_gradients, gradients, {"edge_bias": "edge_vector"})
    return wrong, {"backends": backends, "launch": launch, "gate": {"against": against, "max_difference": difference}}


def engine(
    case: Case, data: str, mode: str, device: str, dtype: str = "float32"
) -> tuple[Callable[[], object], str | None, dict[str, str | None]]:
    """(one call, what is wrong with it, backends) of the engine alone."""
    backward = mode == "fwd+bwd"
    problem = make(case, data, device, dtype)
    wrong, fields = _gate(case, problem, graph_of(problem), backward, most_literal=0)
    return partial(step, problem.engine, problem, backward), wrong, fields.get("backends", {})


def _others(
    case: Case,
    problem: Problem,
    index: Tensor,
    mode: str,
    repeats: int,
    slow: int,
    beside: Sequence[str],
    refused: list[str],
) -> Iterator[Contender]:
    """What stands beside the engine, warm; what must not be timed goes to ``refused``."""
    backward, reduced = mode == "fwd+bwd", problem.precision.reduced
    wanted = [name for name, most in _MOST_NODES.items() if case.nodes <= most and name in beside]
    if "literal" in wanted:
        # the gate has just run it
        yield Contender("literal", partial(step, LiteralPDGR(problem.engine), problem, backward), slow, {})
    factored = FactoredPDGR(problem.engine)

    def disagrees(module: FactoredPDGR) -> str | None:
        """What another module computes otherwise than the engine from the same neighbours."""
        right, expected = step(problem.engine, problem, backward)
        got, gradients = step(partial(module, index=index), problem, backward)
        if reduced:
            return gate.roughly(problem.names, (got, gradients), (right, expected))
        wrong = gate.output(got, right)
        if wrong is None and backward:
            wrong = gate.gradients(problem.names, gradients, expected, {"edge_bias": "edge_vector"})
        return wrong

    if "factored" in wanted:
        wrong = disagrees(factored)
        if wrong is None:
            step(factored, problem, backward)
            yield Contender("factored", partial(step, factored, problem, backward), repeats, {})
        else:
            refused.append(f"factored: {wrong}")
    if "compiled" in wanted:
        expected, slopes = step(factored, problem, backward)
        # what was compiled for other cases counts towards a limit beyond which nothing is compiled
        torch._dynamo.reset()
        compiled = torch.compile(factored)
        try:
            got, gradients = step(compiled, problem, backward)
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"pdgr {case.name} compiled: left out: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            # it may choose another of two nearly equal neighbours
            if reduced:
                wrong = gate.roughly(problem.names, (got, gradients), (expected, slopes))
            else:
                wrong = gate.most_cells(got, expected)
            if wrong is None and backward and not reduced:
                wrong = gate.most_of_gradients(problem.names, gradients, slopes)
            if wrong is None:
                yield Contender("compiled", partial(step, compiled, problem, backward), repeats, {})
            else:
                refused.append(f"compiled: {wrong}")
    if "pyg" in wanted:
        try:
            scattered = ScatteredPDGR(problem.engine)
        except ImportError:
            print("pdgr: pyg is not installed, its row is left out; pip install torch-geometric", file=sys.stderr)
        else:
            wrong = disagrees(scattered)
            if wrong is None:
                step(scattered, problem, backward)
                yield Contender("pyg", partial(step, scattered, problem, backward), slow, {})
            else:
                refused.append(f"pyg: {wrong}")
    if "matmul_lower_bound" in wanted:
        like = problem.precision.products
        bound = MatmulLowerBound(pdgr_products(case, backward), problem.prior.device.type, like)
        bound()
        yield Contender("matmul_lower_bound", bound, repeats, {"note": f"matrix products only, in {str(like)[6:]}"})


def measure(
    case: Case,
    data: str,
    mode: str,
    *,
    repeats: int = 7,
    slow: int = 2,
    with_memory: bool = True,
    device: str = "cpu",
    beside: Sequence[str] = BESIDE,
    dtype: str = "float32",
) -> tuple[list[Row], list[str]]:
    """The rows of one case, and what was refused.

    Args:
        case: sizes. data: ``random`` or ``dino``. mode: ``fwd`` or ``fwd+bwd``.
        repeats: timed calls. slow: those of the literal module and of the largest case.
        with_memory: measure peaks too, on the CPU not of what is compiled first.
        device: ``cpu`` or ``cuda``.
        beside: what the engine is compared with, of ``BESIDE``.
        dtype: one of ``PRECISIONS``.
    """
    backward = mode == "fwd+bwd"
    problem = make(case, data, device, dtype)
    index = graph_of(problem)
    wrong, fields = _gate(case, problem, index, backward)
    if wrong is not None:
        return [], [f"engine: {wrong}"]
    refused: list[str] = []
    engine = Contender(
        "engine", partial(step, problem.engine, problem, backward), repeats if case.nodes <= 16384 else slow, fields
    )
    contenders = [engine, *_others(case, problem, index, mode, repeats, slow, beside, refused)]
    named = _dispatch.requested_backend("pdgr", None)
    for contender in contenders if with_memory else ():
        if device == "cuda":
            contender.fields["peak_mb"] = memory.rise(contender.run, device)
        elif contender.name in ("engine", "literal", "factored"):
            contender.fields.update(
                memory.in_child(
                    __name__,
                    "peak",
                    dataclasses.asdict(case),
                    data,
                    contender.name,
                    backward,
                    None if named == "auto" else named,
                    dtype,
                )  # fmt: skip
            )
    common = {
        "op": "pdgr",
        "case": case.name,
        "sizes": sizes_of(case) | {"layers": len(problem.engine.weights), "decay": problem.engine.decay},
        "mode": mode,
        "dtype": dtype,
        "data": data,
    }
    return rows_of(contenders, interleave(contenders, device), common, case, device), refused

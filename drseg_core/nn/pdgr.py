# SPDX-License-Identifier: Apache-2.0
"""Prior-Driven Graph Rectification (arXiv 2604.02010, Eq. 7-9)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from drseg_core.nn.resample import resample
from drseg_core.ops import (
    Graph,
    backend_names,
    degree_normalize,
    edge_coefficient,
    edge_weight,
    graph_layer,
    knn_graph,
    linear_map,
    padding_mask,
    prepare_prior,
    score_parts,
)
from drseg_core.ops._checks import check_choice, check_count, check_flag, check_grid, check_number, check_tensor, number
from drseg_core.ops.csc.api import Csc, columns_of
from drseg_core.ops.graph import check_graph
from drseg_core.ops.prepare_prior.api import PreparedPrior

Affinity = Literal["exp", "linear", "power", "product", "gauss"]
SelfLoop = Literal["in_topk", "exclude", "extra"]
Norm = Literal["sym_row", "sym_count", "sym_inout", "row", "sym_undirected"]

# options that parameters start from, and these parameters
_STARTS = {
    "edge_temperature": "edge_log_temperature",
    "edge_decay": "edge_log_decay",
    "norm_scale": "output_norm.weight",
}
# its exponential leaves room in float32 for the sum of the weights of some hundred neighbours
_LARGEST_GAMMA_OF_WEIGHTS = 80.0
# of the learned starts, of which exponentials of logarithms are taken
_SMALLEST_TEMPERATURE, _LARGEST_DECAY = 1e-38, 1e38

# How each reading of Eq. 7 orders the candidates of a row; "power" and "product" multiply by the spatial decay.
_FORM: dict[str, Literal["additive", "gauss", "multiplicative", "product"]] = {
    "exp": "additive",
    "linear": "additive",
    "power": "multiplicative",
    "product": "product",
    "gauss": "gauss",
}


def _nodes(name: str, value: Tensor, width: int, grid: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
    """The nodes (B, N, C) of a map (B, C, h, w), or of tokens on ``grid``, and the grid."""
    check_tensor("PDGR", name, value, None)
    shape = value.shape
    if len(shape) == 4 and shape[1] == width:
        own = (shape[2], shape[3])
        if grid is not None and own != grid:
            raise ValueError(f"PDGR: grid does not match {name}; expected {own} or None for a map, got {grid}")
        return value.flatten(2).transpose(1, 2), own
    if grid is None:
        forms = f"(B, {width}, h, w), or tokens with grid=(h, w)"
    elif len(shape) == 3 and shape[1] == grid[0] * grid[1] and shape[2] == width:
        return value, grid
    else:
        forms = f"(B, {width}, h, w) or (B, {grid[0] * grid[1]}, {width})"
    raise ValueError(f"PDGR: {name} has the wrong shape; expected {forms}, got {tuple(shape)}")


def _neighbours(value: object) -> int | float:
    """``k``, a count or a share."""
    share = number(value)
    if not isinstance(share, float):
        return check_count("PDGR", "k", value)
    if not 0 < share < 1:
        raise ValueError(f"PDGR: k is no share; expected an integer, or a share above 0 and below 1, got {share}")
    return share


def _ratio(share: float) -> tuple[int, int]:
    """The fraction that a number was written as, or meant: 0.13 is 13 / 100, and what 1 / 3 gives is 1 / 3 again."""
    # with larger numbers a product with the nodes would leave the 64 bits that a compiled program has
    return Fraction(repr(share)).limit_denominator(10**9).as_integer_ratio()


def _logarithm(start: float | None) -> nn.Parameter | None:
    """A learned number > 0 by its logarithm; of one dimension, as FSDP wants it."""
    return None if start is None else nn.Parameter(torch.empty(1))


def _exponential(logarithm: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype`` or its own, the wider one: float16 has no room for all numbers whose logarithms it has."""
    return torch.exp(logarithm.to(torch.promote_types(logarithm.dtype, dtype)))


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is what its parameters say, so that they are read here, and it need not be called."""
    own = type(layer)
    changed = "forward" in layer.__dict__ or own.forward is not kind.forward or own.__call__ is not nn.Module.__call__
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    # hooks of all modules
    hooked = hooked or _global_forward_hooks or _global_forward_pre_hooks
    hooked = hooked or _global_backward_hooks or _global_backward_pre_hooks
    return not (changed or hooked)


def _let_make(module: nn.Module) -> None:
    """Let prune, and the older weight_norm and spectral_norm, make the parameters of a module that is not called."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(module, None)


def _list(name: str, values: nn.Module) -> nn.ParameterList:
    """Weights or biases of the layers, as they are now."""
    if not isinstance(values, nn.ParameterList):
        raise TypeError(
            f"PDGR: {name} is another module, which would not be called; expected ParameterList, got "
            f"{type(values).__name__}"
        )
    _let_make(values)
    return values


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Rows of two weights, one below the other."""
    if first.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(first.device.type):
        # it takes what is joined to the wider dtype, and knows none of the two half ones together
        dtype = torch.get_autocast_dtype(first.device.type)
        first, second = first.to(dtype), second.to(dtype)
    return torch.cat([first, second])


def _size(name: str, value: int) -> int:
    return check_count("PDGR", name, value, positive=True)


def _number(name: str, value: object) -> float:
    return float(check_number("PDGR", name, value, positive=name == "gamma"))


def _flag(name: str, value: Any) -> Any:
    check_flag("PDGR", name, value)
    return value


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        check_choice("PDGR", name, value, choices)
        # no string of numpy, for which a compiler has no form
        return str(value)

    return check


def _backend(name: str, value: Any) -> Any:
    return None if value is None else _one_of(backend_names())(name, value)


def _start(name: str, value: object) -> float | None:
    """The start of a learned number, which a float32 can be divided by, or multiplied by."""
    if value is None:
        return None
    start = check_number("PDGR", name, value, positive=True)
    if name == "edge_temperature" and start < _SMALLEST_TEMPERATURE:
        raise ValueError(f"PDGR: {name} is too small; expected at least {_SMALLEST_TEMPERATURE}, got {start}")
    if name == "edge_decay" and start > _LARGEST_DECAY:
        raise ValueError(f"PDGR: {name} is too large; expected at most {_LARGEST_DECAY}, got {start}")
    return start


class _Option:
    """An option that is checked whenever it is set, and kept as a plain attribute.

    There is no ``__get__``: Python, and a compiler, then read that attribute itself, and older pickles have it.
    """

    name: str

    def __init__(self, check: Callable[[str, Any], Any]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, module: PDGR, value: Any) -> None:
        options = {**module.__dict__, self.name: self.check(self.name, value)}
        # while the module is made, some are missing
        if "weights" in module._modules:
            _check_scales(options, len(module.weights))
            if self.name in _STARTS and options[self.name] != module.__dict__.get(self.name):
                raise ValueError(
                    f"PDGR: {self.name} is where a learned number starts; expected it when the module is made, or "
                    f"another value of {_STARTS[self.name]}, got {value!r} for {module.__dict__.get(self.name)!r}"
                )
        module.__dict__[self.name] = options[self.name]


def _option(check: Callable[[str, Any], Any]) -> Any:
    return _Option(check)


def _check_scales(options: dict[str, Any], layers: int) -> None:
    """Refuse scales of Eq. 7 of which the scores, or the weights, would leave the range of float32."""
    affinity, gamma, decay = options["affinity"], options["gamma"], options["decay"]
    # one that counts edges does not divide by the weights, and the LayerNorm squares what all layers multiply
    most = _LARGEST_GAMMA_OF_WEIGHTS / (2 * layers if options["norm"] == "sym_count" else 1)
    if options["use_affinity_as_weight"] and affinity in ("exp", "gauss") and gamma > most:
        raise ValueError(
            f"PDGR: gamma is too large; expected gamma <= {most:.4g} with use_affinity_as_weight, "
            f"affinity {affinity} and this norm, got {gamma}"
        )
    largest = torch.finfo(torch.float32).max
    for name, value in (("gamma", gamma), ("decay", decay)):
        if value > largest:
            raise ValueError(f"PDGR: {name} is too large; expected {name} <= {largest:.4g}, got {value}")
    if affinity != "product" and decay / gamma > largest:
        raise ValueError(f"PDGR: gamma is too small; expected decay / gamma <= {largest:.4g}, got {decay} / {gamma}")


# The three start themselves: who resets a model module by module, parents first, would else draw them anew.


class _Half(nn.Linear):
    """Half of the edge MLP's first layer, on [d_i || d_j]; drawn with the fan-in of both."""

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(2 * self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


class _Maps(nn.ParameterList):
    """Linear maps, drawn as in ``torch.nn.Linear``, or biases."""

    def reset_parameters(self) -> None:
        for value in self:
            if value.dim() > 1:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))
            else:
                nn.init.zeros_(value)


class _OutputNorm(nn.LayerNorm):
    """LayerNorm whose weight starts with a given number."""

    start = 1.0

    def __init__(self, width: int, start: float) -> None:
        super().__init__(width)
        self.start = start
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, self.start)


class PDGR(nn.Module):
    """Rectifies a feature map by message passing on a graph that a frozen prior lays over it.

    Every cell is a node. Its ``k`` neighbours are the cells of highest affinity (Eq. 7), which joins the cosine of the
    prior's features with a spatial decay. A softplus MLP on the two prior features weighs each edge (Eq. 8). Then the
    features are propagated ``layers`` times with degree-normalised coefficients (Eq. 9). ReLU stands between the
    layers, LayerNorm after the last. All layers share weights and degrees.

    Gradients flow to the features and to this module's parameters, not to the prior or to the choice of neighbours.

    Args:
        channels: C, channels of the feature map.
        prior_dim: D, channels of the prior.
        k: neighbours per node; a grid with fewer cells uses all of them. A float in (0, 1) is a share of the cells, to
            the nearest number, halves upwards, and at least one.
        affinity: reading of Eq. 7. ``exp`` is ``exp(gamma cos - decay dist)``, ``linear`` is
            ``gamma cos - decay dist``, ``power`` is ``max(cos, 0)**gamma exp(-decay dist)``, ``product`` is
            ``gamma cos exp(-decay dist)``. ``gauss`` is ``exp`` with ``dist`` squared. ``dist`` is the distance of two
            cells divided by the longest on the grid.
        gamma: feature scale of Eq. 7, > 0. ``decay / gamma`` has to lie in the range of float32, but for ``product``.
        decay: spatial decay of Eq. 7 (lambda), >= 0.
        self_loop: ``in_topk`` makes the node one of its own neighbours, ``exclude`` leaves it out, ``extra`` leaves it
            out of the k and adds an edge to itself of weight one.
        norm: degree normalisation, see ``drseg_core.ops.degree_normalize``; ``sym_undirected`` symmetrises the graph.
        edge_hidden: E, hidden width of the edge MLP.
        normalize_prior: L2-normalise the prior before the edge MLP.
        layers: propagation layers.
        hidden: width between the layers; None takes ``channels``.
        bias: add a bias after each propagation.
        dropout: dropout probability between the layers.
        residual: add the input to the output.
        use_affinity_as_weight: multiply Eq. 8's weight by Eq. 7's affinity (negative affinities count as 0). With
            ``exp`` and ``gauss`` gamma is then at most 80, so that sums of weights stay in the range of float32, and
            with ``norm="sym_count"``, which does not divide by them, at most 40 over the layers.
        norm_scale: initial weight of the final LayerNorm. With ``residual`` and 0 the output is the input at first.
            Training leaves that start: the weight has a gradient, and once it is not 0 all else has one too.
        edge_temperature: start of a learned t >= 1e-38; multiplies Eq. 8's weight by ``exp((cos - 1) / t)``. None
            leaves the factor out. It is ``exp(cos / t)`` less what the degrees divide away, so that nothing overflows.
        edge_decay: start of a learned mu > 0, at most 1e38; multiplies Eq. 8's weight by ``exp(-mu dist)``. None leaves
            it out. Both are kept as logarithms, so they stay positive. The choice of neighbours knows neither.
        resample_prior: bring a prior map on another grid to the grid of the features: by means if the sizes divide,
            otherwise bilinearly. By default such a prior is refused.
        keep_format: return a map in the memory format of the features: contiguous for contiguous features, otherwise
            channels last. False always returns channels last, which spares contiguous features a copy.
        backend: kernel backend of all ops, one of ``drseg_core.ops.backend_names()``; None takes the best that can run.

    Shape:
        features (B, C, h, w) and prior (B, D, h, w) to (B, C, h, w), in the dtype of the features (under autocast: of
        the linear maps). The prior may have any floating-point dtype. B, h and w may be 0. Either may be tokens,
        (B, N, C) or (B, N, D) with N = h * w, row by row. Features as tokens need ``grid=(h, w)``, and come back as
        tokens.

    Note:
        A cell whose prior is not finite gets a NaN output and influences no other cell. One whose prior is zero has
        cosine 0 with every cell, so a small ``edge_temperature`` leaves it nearly without neighbours.

    Examples:
        >>> import torch
        >>> from drseg_core.nn import PDGR
        >>> pdgr = PDGR(channels=8, prior_dim=16, k=5)
        >>> features, prior = torch.randn(2, 8, 6, 6), torch.randn(2, 16, 6, 6)
        >>> tuple(pdgr(features, prior).shape)
        (2, 8, 6, 6)
        >>> tokens, graph = torch.randn(2, 36, 8), pdgr.graph(prior)
        >>> tuple(pdgr(tokens, graph=graph, grid=(6, 6)).shape)
        (2, 36, 8)
    """

    affinity: Affinity = _option(_one_of(get_args(Affinity)))
    self_loop: SelfLoop = _option(_one_of(get_args(SelfLoop)))
    norm: Norm = _option(_one_of(get_args(Norm)))
    gamma: float = _option(_number)
    decay: float = _option(_number)
    norm_scale: float = _option(_number)
    edge_temperature: float | None = _option(_start)
    edge_decay: float | None = _option(_start)
    normalize_prior: bool = _option(_flag)
    residual: bool = _option(_flag)
    use_affinity_as_weight: bool = _option(_flag)
    resample_prior: bool = _option(_flag)
    keep_format: bool = _option(_flag)
    backend: str | None = _option(_backend)

    def __init__(
        self,
        channels: int,
        prior_dim: int,
        *,
        k: int | float = 75,
        affinity: Affinity = "exp",
        gamma: float = 1.0,
        decay: float = 1.0,
        self_loop: SelfLoop = "in_topk",
        norm: Norm = "sym_row",
        edge_hidden: int = 128,
        normalize_prior: bool = True,
        layers: int = 2,
        hidden: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        residual: bool = False,
        use_affinity_as_weight: bool = False,
        norm_scale: float = 1.0,
        edge_temperature: float | None = None,
        edge_decay: float | None = None,
        resample_prior: bool = False,
        keep_format: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        channels, prior_dim = _size("channels", channels), _size("prior_dim", prior_dim)
        edge_hidden, layers = _size("edge_hidden", edge_hidden), _size("layers", layers)
        hidden = channels if hidden is None else _size("hidden", hidden)
        self.k = k
        self.affinity, self.self_loop, self.norm = affinity, self_loop, norm
        self.gamma, self.decay = gamma, decay
        dropout, self.norm_scale = check_number("PDGR", "dropout", dropout), norm_scale
        if dropout > 1:
            raise ValueError(f"PDGR: dropout is out of range; expected 0 <= dropout <= 1, got {dropout}")
        self.edge_temperature, self.edge_decay = edge_temperature, edge_decay
        check_flag("PDGR", "bias", bias)
        self.normalize_prior, self.residual = normalize_prior, residual
        self.use_affinity_as_weight = use_affinity_as_weight
        self.resample_prior, self.keep_format = resample_prior, keep_format
        _check_scales(self.__dict__, layers)
        self.backend = backend
        self.channels, self.prior_dim = channels, prior_dim

        # the two halves of the edge MLP's first layer, so that [d_i || d_j] never exists
        self.edge_source: nn.Linear = _Half(prior_dim, edge_hidden)
        self.edge_target: nn.Linear = _Half(prior_dim, edge_hidden, bias=False)
        self.edge_vector = nn.Parameter(torch.empty(edge_hidden))
        self.edge_bias = nn.Parameter(torch.empty(1))
        self.edge_log_temperature, self.edge_log_decay = _logarithm(edge_temperature), _logarithm(edge_decay)
        widths = [channels] + [hidden] * (layers - 1) + [channels]
        self.weights: nn.ParameterList = _Maps(
            nn.Parameter(torch.empty(out, into)) for into, out in zip(widths[:-1], widths[1:], strict=True)
        )
        self.biases = _Maps(nn.Parameter(torch.empty(out)) for out in widths[1:]) if bias else None
        self.dropout = nn.Dropout(dropout)
        self.output_norm: nn.LayerNorm = _OutputNorm(channels, self.norm_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: edge weights start near one, linear maps as in ``torch.nn.Linear``."""
        # [d_i || d_j] is one layer of width 2D: both halves are drawn with its fan-in
        bound = 1 / math.sqrt(2 * self.prior_dim)
        for half in (self.edge_source, self.edge_target):
            nn.init.uniform_(half.weight, -bound, bound)
        nn.init.uniform_(self.edge_source.bias, -bound, bound)
        nn.init.uniform_(self.edge_vector, -1 / math.sqrt(len(self.edge_vector)), 1 / math.sqrt(len(self.edge_vector)))
        nn.init.constant_(self.edge_bias, math.log(math.e - 1))
        for value, start in (
            (self.edge_log_temperature, self.edge_temperature),
            (self.edge_log_decay, self.edge_decay),
        ):
            if value is not None and start is not None:
                nn.init.constant_(value, math.log(start))
        # of older pickles the lists cannot do it themselves
        _Maps.reset_parameters(self.weights)  # type: ignore[arg-type]
        _Maps.reset_parameters(self.biases or [])  # type: ignore[arg-type]
        self.output_norm.reset_parameters()
        nn.init.constant_(self.output_norm.weight, self.norm_scale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # it was a single number in older checkpoints
        bias = state_dict.get(f"{prefix}edge_bias")
        if isinstance(bias, Tensor) and bias.dim() == 0:
            state_dict[f"{prefix}edge_bias"] = bias.view(1)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # in modules that were pickled before k was checked
        k = state.pop("k", None)
        super().__setstate__(state)
        if k is not None:
            self.k = k
        for name, parameter in inspect.signature(PDGR.__init__).parameters.items():
            if isinstance(vars(PDGR).get(name), _Option):
                # an option that came later
                self.__dict__.setdefault(name, parameter.default)

    def __prepare_scriptable__(self) -> None:
        # torch.jit.script asks every module for this first, and its own error has a dozen lines
        raise TypeError("PDGR: TorchScript cannot compile it; expected torch.export, got torch.jit.script")

    def extra_repr(self) -> str:
        starts = {"edge_temperature": self.edge_temperature, "edge_decay": self.edge_decay}
        return (
            f"{self.channels}, {self.prior_dim}, k={self.k}, affinity={self.affinity!r}, gamma={self.gamma}, "
            f"decay={self.decay}, self_loop={self.self_loop!r}, norm={self.norm!r}"
        ) + "".join(f", {name}={value}" for name, value in starts.items() if value is not None)

    @property
    def k(self) -> int | float:
        """Neighbours of a node, or their share of the cells."""
        return self._k

    @k.setter
    def k(self, value: int | float) -> None:
        self._k = _neighbours(value)
        self._share = _ratio(self._k) if isinstance(self._k, float) else (self._k, 1)

    def neighbour_count(self, nodes: int) -> int:
        """Neighbours per node on a grid of some number of cells, of which there may be fewer: ``k``, or its share.

        Examples:
            >>> from drseg_core.nn import PDGR
            >>> PDGR(8, 16, k=0.13).neighbour_count(576), PDGR(8, 16, k=0.13).neighbour_count(1)
            (75, 1)
        """
        if isinstance(self.k, int):
            return self.k
        # Integers throughout. A compiled program for every size does not know the size yet, and it may take a
        # float of the module for another such unknown, to which its gradients find no source.
        above, below = self._share
        share: Any = (2 * above * nodes + below) // (2 * below)
        return max(share, 1) if isinstance(share, int) else torch.sym_max(share, 1)

    def _check_dtype(self, features: Tensor) -> None:
        own = self.edge_bias.dtype
        cast = torch.is_autocast_enabled(features.device.type)
        # autocast leaves float64 alone
        if features.dtype != own and (not cast or torch.float64 in (own, features.dtype)):
            raise TypeError(
                f"PDGR: features have another dtype than the module; expected {own}{'' if cast else ' or autocast'}, "
                f"got {features.dtype}"
            )

    def _nodes_of_prior(self, prior: Any, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """The nodes of a prior that lies on the grid of the features, or is brought to it."""
        tokens = isinstance(prior, Tensor) and prior.dim() == 3
        nodes, own = _nodes("prior", prior, self.prior_dim, grid if tokens else None)
        if own != grid and self.resample_prior:
            nodes, own = resample(prior.detach(), grid).flatten(2).transpose(1, 2), grid
        if features.shape[0] != nodes.shape[0] or own != grid:
            wanted = (
                f"same B, h, w as {tuple(features.shape)}" if features.dim() == 4 else f"B and grid {grid} of features"
            )
            # a map on another grid can be brought to that of the features
            wanted += "" if own == grid or nodes.shape[0] != features.shape[0] or tokens else ", or resample_prior=True"
            raise ValueError(f"PDGR: prior does not match features; expected the {wanted}, got {tuple(prior.shape)}")
        if features.device != prior.device:
            raise ValueError(f"PDGR: prior is on another device; expected {features.device}, got {prior.device}")
        return nodes

    def _for_batch(self, graph: Graph, batch: int, nodes: int, columns: bool) -> tuple[Tensor, Tensor, Csc | None]:
        """Index, coefficients and columns of a given graph; a graph of one sample serves all samples of a batch."""
        check_graph("PDGR", graph)
        index, coefficient, lists = graph
        if index.dim() != 3 or index.shape[0] not in (1, batch) or index.shape[1] != nodes:
            raise ValueError(
                "PDGR: graph does not match features; "
                f"expected index ({batch} or 1, {nodes}, K), got {tuple(index.shape)}"
            )
        if index.shape[0] != batch:
            index, coefficient, lists = index.expand(batch, -1, -1), coefficient.expand(batch, -1, -1), None
        return index, coefficient, columns_of(index, self.backend) if columns and lists is None else lists

    def _affinity(self, score: Tensor) -> Tensor:
        """Eq. 7 from the score that orders the candidates."""
        if self.affinity in ("exp", "gauss"):
            return torch.exp(self.gamma * score)
        # rounding may lift a cosine above 1, of which a large power is none
        return score.clamp(0, 1) ** self.gamma if self.affinity == "power" else self.gamma * score.clamp_min(0)

    def graph(self, prior: Tensor, *, grid: tuple[int, int] | None = None, columns: bool = True) -> Graph:
        """Neighbours and propagation coefficients for a prior. Several calls may share them: ``pdgr(x, graph=graph)``.

        Its coefficients carry gradients to the parameters of the edge MLP.

        Args:
            prior: (B, D, h, w), or tokens (B, N, D) on ``grid``.
            grid: (h, w) of tokens.
            columns: also list the edges by the nodes in which they end. Without this list, gradients and all else
                that goes against the edges take longer.

        Returns:
            ``index`` (B, N, K) int32, ``coefficient`` (B, N, K) and ``csc``, with N = h * w. K is ``k``, plus one
            slot with ``self_loop="extra"``. With ``norm="sym_undirected"`` this is half of the operator, and
            ``propagate_transposed`` is the other half.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype or shape.
        """
        _let_make(self)
        nodes, grid = _nodes("prior", prior, self.prior_dim, None if grid is None else check_grid("PDGR", grid))
        index, coefficient, _, lists = self._graph(nodes, grid, columns, apart=False)
        return Graph(index, coefficient, lists)

    @torch.no_grad()
    def edges(self, prior: Tensor, *, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Neighbours and the weights of Eq. 8, before Eq. 9 divides them by degrees. To look at, without gradient.

        Args:
            prior: (B, D, h, w), or tokens (B, N, D) on ``grid``.
            grid: (h, w) of tokens.

        Returns:
            ``index`` (B, N, K) int32 as in ``graph``, ``weight`` (B, N, K), and ``real`` (B, N, K) bool, False in
            padded slots.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype or shape.
        """
        _let_make(self)
        nodes, grid = _nodes("prior", prior, self.prior_dim, None if grid is None else check_grid("PDGR", grid))
        index, edges, score = self._edges(nodes.detach(), grid)
        real = padding_mask(index, include_self=self.self_loop == "in_topk")
        index, weight, _ = self._weighted(index, edges, score, None)
        if self.self_loop == "extra":
            real = torch.cat([real, real.new_ones(*real.shape[:2], 1)], dim=2)
        return index, weight, real

    def _graph(
        self, nodes: Tensor, grid: tuple[int, int], columns: bool, apart: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Csc | None]:
        """Index, coefficients, scales that ``apart`` may leave to ``graph_layer``, and columns of a graph."""
        index, edges, score = self._edges(nodes.detach(), grid)
        lists = columns_of(index, self.backend) if columns else None
        if not self.use_affinity_as_weight and self.self_loop != "extra":
            options: dict[str, Any] = {"norm": self.norm, "csc": lists, "backend": self.backend}
            if apart:
                return index, *edge_coefficient(**edges, **options, apart=True), lists
            return index, edge_coefficient(**edges, **options), None, lists
        index, weight, lists = self._weighted(index, edges, score, lists)
        coefficient = degree_normalize(weight, index, norm=self.norm, csc=lists, backend=self.backend)
        return index, coefficient, None, lists

    def _edges(self, nodes: Tensor, grid: tuple[int, int]) -> tuple[Tensor, dict[str, Any], Tensor]:
        """Neighbours, what the MLP of Eq. 8 takes of them, and their scores."""
        count = nodes.shape[1]
        include_self = self.self_loop == "in_topk"
        decay = self.decay if self.affinity == "product" else self.decay / self.gamma
        prepared = prepare_prior(nodes, backend=self.backend)
        # without itself a node has one candidate less; a node that is alone has one padded slot, to show a NaN prior
        # a compiled program for every size does not know yet which of both is less
        lesser, greater = (min, max) if isinstance(count, int) else (torch.sym_min, torch.sym_max)
        k: Any = lesser(self.neighbour_count(count), count if include_self else greater(count - 1, 1))
        index, score = knn_graph(
            prepared,
            grid,
            k,
            decay=decay,
            form=_FORM[self.affinity],
            include_self=include_self,
            return_score=True if self.use_affinity_as_weight else "rough",
            pad=True,
            backend=self.backend,
        )
        halves, inverse_norm, bias = self._halves(nodes, prepared)
        edges: dict[str, Any] = {
            "source": halves,
            "target": None,
            "index": index,
            "vector": self.edge_vector,
            "bias": self.edge_bias,
            "inverse_norm": inverse_norm,
            "source_bias": bias,
            "score": score,
            "exponent": self._exponent(prepared, grid, index),
        }
        return index, edges, score

    def _halves(self, nodes: Tensor, prepared: PreparedPrior) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Both halves (B, N, 2 E) of Eq. 8's first layer, and what is not in them yet: inverse norms and a bias."""
        source, target = self.edge_source, self.edge_target
        if not (_is_plain(source, nn.Linear) and _is_plain(target, nn.Linear) and target.bias is None):
            # adapters, pruning, quantised layers and hooks work where a layer is called
            if self.normalize_prior:
                nodes = prepared.scaled.to(prepared.inverse_norm.dtype) * prepared.inverse_norm[..., None]
            nodes = nodes.to(self.edge_vector.dtype)
            return torch.cat([source(nodes), target(nodes)], dim=-1), None, None
        # a copy, but one product; two parameters that shared their memory would be lost to those who save them by it
        both = _stacked(source.weight, target.weight)
        if self.normalize_prior:
            return *prepared.project(both, backend=self.backend), source.bias
        return linear_map(nodes.to(both.dtype), both, backend=self.backend), None, source.bias

    def _exponent(self, prepared: PreparedPrior, grid: tuple[int, int], index: Tensor) -> Tensor | None:
        """Logarithms (B, N, K) of what multiplies the weights of Eq. 8; None where nothing does."""
        if self.edge_log_temperature is None and self.edge_log_decay is None:
            return None
        # cosines from the scores would lose digits where the decay is large
        cosine, distance = score_parts(prepared, grid, index, decay=1.0, backend=self.backend)
        exponent = torch.zeros_like(cosine)
        if self.edge_log_temperature is not None:
            # rounding may lift a cosine above 1, which a small temperature would blow up
            exponent = exponent + (cosine - 1).clamp_max(0) * _exponential(-self.edge_log_temperature, cosine.dtype)
        if self.edge_log_decay is not None:
            exponent = exponent - distance * _exponential(self.edge_log_decay, cosine.dtype)
        return exponent

    def _weighted(
        self, index: Tensor, edges: dict[str, Any], score: Tensor, lists: Csc | None
    ) -> tuple[Tensor, Tensor, Csc | None]:
        """Neighbours, with the node itself where it is an extra one, their weights and columns."""
        weight = edge_weight(**edges, csc=lists, backend=self.backend)
        if self.use_affinity_as_weight:
            weight = weight * self._affinity(score)
        if self.self_loop == "extra":
            own = torch.arange(index.shape[1], dtype=index.dtype, device=index.device)
            index = torch.cat([index, own[:, None].expand(index.shape[0], -1, 1)], dim=2)
            weight = torch.cat([weight, weight.new_ones(*weight.shape[:2], 1)], dim=2)
            lists = None if lists is None else columns_of(index, self.backend)
        return index, weight, lists

    def forward(
        self,
        features: Tensor,
        prior: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        graph: Graph | None = None,
    ) -> Tensor:
        """Rectify features along the graph of a prior.

        Args:
            features: (B, C, h, w), or tokens (B, N, C) on ``grid``.
            prior: (B, D, h, w), or tokens (B, N, D) on the grid of the features.
            grid: (h, w) of tokens.
            graph: from ``graph``, in place of a prior; of the same batch, or of one sample for all.

        Returns:
            In the shape of ``features``.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or is missing.
        """
        x, grid = _nodes("features", features, self.channels, None if grid is None else check_grid("PDGR", grid))
        weights, biases = _list("weights", self.weights), self.biases and _list("biases", self.biases)
        if biases is not None and len(biases) != len(weights):
            raise ValueError(
                f"PDGR: biases has another length; expected one for each of {len(weights)} weights, got {len(biases)}"
            )
        self._check_dtype(features)
        undirected, norm = self.norm == "sym_undirected", self.output_norm
        # another layer, or one with hooks, is called
        fused = _is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
        # what goes against the edges more than once: gradients, and the layers of an undirected graph
        columns = undirected or torch.is_grad_enabled()
        scale: Tensor | None = None
        if graph is None:
            nodes = self._nodes_of_prior(prior, features, grid)
            index, coefficient, scale, lists = self._graph(nodes, grid, columns, apart=True)
        elif prior is None:
            index, coefficient, lists = self._for_batch(graph, x.shape[0], x.shape[1], columns)
        else:
            raise ValueError("PDGR: prior and graph say the same; expected one of them, got both")
        for layer, weight in enumerate(weights):
            last = layer == len(weights) - 1
            normed = last and fused
            x = linear_map(x, weight, backend=self.backend)
            x, coefficient = graph_layer(
                x,
                index,
                coefficient,
                None if biases is None else biases[layer],
                norm.weight if normed else None,
                norm.bias if normed else None,
                activation="layer_norm" if normed else "none" if last else "relu",
                eps=norm.eps if normed else 1e-5,
                undirected=undirected,
                scale=scale,
                csc=lists,
                hand_on=True,
                backend=self.backend,
            )
            if not last:
                x = self.dropout(x)
        if not fused:
            x = norm(x)
        if features.dim() == 4:
            x = x.transpose(1, 2).unflatten(2, grid)
        if self.residual:
            x = features + x
        return x.contiguous() if self.keep_format and features.is_contiguous() else x

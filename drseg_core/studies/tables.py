# SPDX-License-Identifier: Apache-2.0
"""Studies that train: the paper's tables, and a sweep of every option it leaves open.

A study is a list of variants, and a variant is a handful of options. Variants of equal options are trained once,
whichever studies they belong to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from drseg_core.checkpoints.packaged import DINOV2, packaged_file
from drseg_core.config.methods import METHODS, method_options, published_options
from drseg_core.config.schema import DinoConfig, RemoteConfig
from drseg_core.models.dino import DinoPrior
from drseg_core.studies import paper
from drseg_core.studies.paper import PaperRow, Published
from drseg_core.studies.setting import Setting


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Args:
        name: key in results.
        title: as printed.
        options: dotted options of the configuration.
        paper: the paper's numbers.
        value: place on the axis of a sweep over numbers.
        why_not: why the variant cannot be run; None where it can.
    """

    name: str
    title: str
    options: Mapping[str, Any]
    paper: PaperRow | None = None
    value: float | None = None
    why_not: str | None = None


DRSEG = Variant("drseg", "DR-Seg", {})
"""The configuration of a setting as it is."""


class Section(NamedTuple):
    """A further table of a study's page: ``rows`` as :func:`drseg_core.evaluation.report.markdown_table` takes them."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""


@dataclass(frozen=True)
class TrainingStudy:
    """A study whose variants are trained and scored.

    Args:
        name: as typed after ``drseg study``.
        title: one line.
        variants: its rows.
        note: what a reader must know of how it differs from the paper's.
        axis: what ``Variant.value`` is, in a sweep over numbers.
        reference: name of the variant that the others are compared with.
        paper: what the paper's numbers are of.
        sections: further tables of its page.
        published: the paper's numbers set by set, by title, for its figure.
    """

    name: str
    title: str
    variants: tuple[Variant, ...]
    note: str = ""
    axis: str | None = None
    reference: str | None = None
    paper: str = paper.ABLATIONS
    sections: tuple[Section, ...] = ()
    published: Mapping[str, Published] | None = None


_BASELINE = {"model.fusion.kind": "none", "model.decoder.dino_guidance": False}
# The paper does not say what its rows without UGAF have in its place. It is no row of Table 4: +PDGR +SPSD has 37.97,
# and they have 37.21, 39.62 and 36.55. First comes what PDGR alone changes: its features take the place of the
# canonical ones, and all else stays the baseline.
_WITHOUT_UGAF: dict[str, tuple[str, dict[str, Any]]] = {
    "replace": ("the refined map in place of the canonical one", {"model.fusion.kind": "replace"}),
    "ungated": ("UGAF without its gate", {"model.fusion.gate": "none"}),
    "sum": ("the refined map added to the original ones", {"model.fusion.kind": "sum"}),
}
_WITHOUT_SPSD = {"model.spsd.semantic_ratio": 0.0}
# a control that the paper lacks: every node has itself alone, so PDGR is its linear layers and no prior has a say in it
_WITHOUT_GRAPH = {"model.graph.k": 1}
_OF_K_1 = "Rows with K 1 are none of the paper's: PDGR without a graph, so what they gain is its linear layers'."


def _quarters(setting: Setting) -> tuple[int | None, ...]:
    """The last block of the prior, and those that end its first three quarters."""
    with torch.device("meta"):
        depth = len(DinoPrior(dataclasses.replace(setting.config.model.dino, weights=None, layer=None)).encoder.blocks)
    return (None, *sorted({depth * part // 4 - 1 for part in (1, 2, 3)} - {-1, depth - 1}, reverse=True))


# sweep -> what it is, the option, its values; the defaults of model.* are among them
_SWEEPS: dict[str, tuple[str, str, tuple[Any, ...] | Callable[[Setting], tuple[Any, ...]]]] = {
    "decay": (
        "Spatial decay over feature scale (lambda / gamma of Eq. 7)",
        "model.graph.decay",
        (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
    ),
    "affinity": ("Form of the affinity (Eq. 7)", "model.graph.affinity", ("exp", "power", "product", "gauss")),
    "neighbours": ("Neighbours K, fewer than Table 6 has", "model.graph.k", (4, 8, 16, 33, 75)),
    "tau": ("Temperature of the uncertainty (Eq. 12)", "model.fusion.tau", (0.01, 0.02, 0.07, 1.0, None)),
    "gate": (
        "Form of the gate (Eq. 13)",
        "model.fusion.gate",
        ("sigmoid_proj", "residual", "direct", "feature", "proj_on_map"),
    ),
    "alpha": ("Balance of entropy and similarity (Eq. 4)", "model.spsd.alpha", (0.1, 0.3, 0.5, 0.7, 0.9)),
    "prototypes": ("Prototypes per class (Eq. 1)", "model.spsd.prototypes_per_class", (10, 100, 1000)),
    "sampling": ("How prototypes are made (Eq. 1)", "model.spsd.sampling", ("random", "image_mean", "kmeans")),
    "similarity": (
        "Inter-class similarity (Eq. 3)",
        "model.spsd.similarity",
        ("product", "neg_abs_diff", "rbf", "sign_agreement"),
    ),
    "norm": (
        "Degree normalisation (Eq. 9)",
        "model.graph.norm",
        ("sym_row", "sym_count", "sym_inout", "row", "sym_undirected"),
    ),
    "self-loop": ("Self edge (Eq. 9)", "model.graph.self_loop", ("in_topk", "exclude", "extra")),
    "edge-temperature": (
        "Weights of Eq. 8 that start as exp(cos / t), t learned",
        "model.graph.edge_temperature",
        (None, 1.0, 0.3, 0.1, 0.03),
    ),
    "edge-decay": ("Learned spatial decay of Eq. 8's weights", "model.graph.edge_decay", (None, 0.5, 2.0, 8.0)),
    "norm-scale": ("Initial weight of the graph's LayerNorm", "model.graph.norm_scale", (0.1, 0.3, 1.0, 3.0)),
    "residual": ("Residual around the graph", "model.graph.residual", (False, True)),
    "hidden": ("Width between the graph's layers", "model.graph.hidden", (None, 128, 256)),
    "edge-hidden": ("Hidden width of the edge MLP (Eq. 8)", "model.graph.edge_hidden", (32, 64, 128, 256)),
    "affinity-weight": ("Affinity as a factor of Eq. 8's weights", "model.graph.use_affinity_as_weight", (False, True)),
    "normalize-prior": ("Unit prior for the edge MLP (Eq. 8)", "model.graph.normalize_prior", (True, False)),
    "graph-layers": ("Propagation layers (Eq. 9)", "model.graph.layers", (1, 2, 3)),
    "aggregator": ("Kind of aggregator", "model.aggregator.kind", ("efficient", "swin", "conv")),
    "aggregator-layers": ("Layers of the aggregator", "model.aggregator.layers", (1, 2, 3, 5)),
    "dino-guidance": ("Guidance of the decoder by the prior", "model.decoder.dino_guidance", (False, True)),
    "original": ("Original maps that are embedded (Eq. 10)", "model.fusion.original", ("stack", "mean")),
    "detach-gate": ("Uncertainty without a gradient (Eq. 12)", "model.fusion.detach_gate", (True, False)),
    "multi-scale": ("Multi-scale block of the fusion", "model.fusion.multi_scale", ("dilation", "kernel")),
    "head": ("Head of the fusion", "model.fusion.head", ("conv1x1", "conv7x7")),
    "dino-normalization": ("Pixel normalisation of the prior", "model.dino.normalization", ("sat", "imagenet", "clip")),
    "dino-features": ("Features of the prior", "model.dino.features", ("tokens", "key", "value")),
    "dino-layer": ("Block of the prior that features come from", "model.dino.layer", _quarters),
}


def training_study(name: str, setting: Setting) -> TrainingStudy:
    """A study by its name; ``name`` is one of :func:`training_study_names`."""
    return _TABLES[name](setting) if name in _TABLES else _sweep(name.removeprefix("sweep-"), setting)


def training_study_names() -> tuple[str, ...]:
    return (*_TABLES, *(f"sweep-{name}" for name in _SWEEPS))


def training_study_title(name: str, setting: Setting) -> str:
    """Its title, without a look at any model."""
    return _TABLES[name](setting).title if name in _TABLES else _SWEEPS[name.removeprefix("sweep-")][0]


def _table1(setting: Setting) -> TrainingStudy:
    trained_on, clip = setting.data.partition(":")[0], setting.backbone or setting.config.model.clip.name
    kind = {test.name: test.spec.partition(":")[0] for test in setting.tests}
    rows, of = paper.table1(trained_on, clip, list(dict.fromkeys(kind.values())))
    order = [name for name in METHODS if name != "drseg"] + ["drseg"]
    variants = []
    for name in order:
        own, why_not = ({}, None) if setting.matched else _as_published(name, setting)
        # by the names that the tests have on the page
        known = rows[name].sets or {}
        sets = {test: known[its] for test, its in kind.items() if its in known} or None
        row = rows[name]._replace(sets=sets)
        variants.append(
            Variant(name, METHODS[name].title, {**method_options(name), **own}, row, why_not=why_not),
        )
    note = "Simplified: " + "; ".join(f"{m.title}: {m.simplified}" for k, m in METHODS.items() if k != "drseg") + "."
    published = {METHODS[name].title: row for name, row in paper.TABLE1[paper.table1_key(trained_on, clip)].items()}
    return TrainingStudy(
        "table1",
        "Comparison with other methods (Table 1)",
        tuple(variants),
        note,
        reference="drseg",
        paper=of,
        sections=(_methods(variants, setting), _published()),
        published=published,
    )


def _as_published(name: str, setting: Setting) -> tuple[dict[str, Any], str | None]:
    """A method's own prior, sizes and RemoteCLIP, and why it cannot have them."""
    released = setting.data.partition(":")[0] if setting.released else None
    options, reasons = published_options(name, setting.config.model.clip.name, released=released), []
    if METHODS[name].published.prior == "v1":
        prior, why_not = _prior_v1(setting)
        options.update(prior)
        reasons.append(why_not)
    if options.get("model.decoder.remote_clip"):
        remote, why_not = _remote_tower(setting)
        options.update(remote)
        reasons.append(why_not)
    if setting.needs_start:
        # there is one dual encoder, which all start from
        options = {option: value for option, value in options.items() if not option.startswith("model.clip.")}
    return options, " and ".join(filter(None, reasons)) or None


def _methods(variants: Sequence[Variant], setting: Setting) -> Section:
    """What each method of Table 1 has."""
    rows = []

    def named(encoder: DinoConfig | RemoteConfig) -> str:
        nothing = "random" if setting.needs_start else "not given"
        return f"{encoder.name}, {nothing if encoder.weights is None else Path(encoder.weights).name}"

    for variant in variants:
        model = setting.variant_config(dict(variant.options), 0).model
        masks, gradual, aggregator = model.proposals.kind != "none", model.decoder.kind == "gradual", model.aggregator
        sizes = model.proposals if masks else aggregator
        row: dict[str, Any] = {
            "method": variant.title,
            "CLIP": f"{model.clip.name}, {model.clip.image_size} px",
            "prior": None if model.fusion.kind == "none" else named(model.dino),
            "layers": None if gradual else str(sizes.layers),
            "heads": str(sizes.heads),
            "MLP": None if masks or gradual else str(aggregator.mlp_hidden),
            "RemoteCLIP": named(model.remote) if model.decoder.remote_clip else None,
        }
        rows.append(row)
    note = "Every method has the configuration's prior and sizes (--matched)."
    if not setting.matched:
        note = (
            "Every method has the prior and the sizes of its own files, DR-Seg those of the configuration (--matched "
            "gives them to all). Layers, heads and MLPs are of ViT-B and ViT-L; with another backbone they are the "
            "configuration's. Layers of RSKT-Seg are those of its "
            + (
                "released weights"
                if setting.released
                else "files, and its released weights have 5 on DLRSD (--released)"
            )
            + "; "
            "OVRS and GSNet are built on CAT-Seg's code and have its sizes."
        )
    return Section("What each method has", rows, note)


def _published() -> Section:
    """All rows of Table 1."""
    rows = []
    for (trained_on, backbone), methods in paper.TABLE1.items():
        for name, row in methods.items():
            cells = zip((*row.miou, row.mean_miou), (*row.macc, row.mean_macc), strict=True)
            head = {
                "trained on": paper.TRAINED_ON[trained_on],
                "backbone": backbone.replace("ViT", "ConvNeXt") if name == "sed" else backbone,
                "method": METHODS[name].title,
            }
            text = (f"{miou:.2f} / {macc:.2f}" for miou, macc in cells)
            rows.append(head | dict(zip((*paper.SETS, "mean"), text, strict=True)))
    return Section("Table 1 as published", rows, f"Percent, mIoU / mACC. {as_printed()}")


def as_printed() -> str:
    """What is said beside the published rows."""
    wrong = "; ".join(
        f"{METHODS[name].title}, {paper.TRAINED_ON[key[0]]}, {key[1]}, {metric}: {printed:.2f} (of its cells "
        f"{computed:.2f})"
        for key, name, metric, printed, computed in paper.misprinted_means()
    )
    return f"As printed, with two means that do not follow from their cells: {wrong}."


def _table2(setting: Setting) -> TrainingStudy:
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "baseline": ("baseline", _BASELINE),
        "pdgr": ("+ PDGR", {**_WITHOUT_SPSD, **_WITHOUT_UGAF["replace"][1]}),
        "pdgr_spsd": ("+ PDGR + SPSD", _WITHOUT_UGAF["replace"][1]),
        "pdgr_ugaf": ("+ PDGR + UGAF", _WITHOUT_SPSD),
        "all": ("all (DR-Seg)", {}),
    }
    variants = [Variant(name, title, options, paper.TABLE2[name]) for name, (title, options) in rows.items()]
    variants += [
        Variant(f"{name}_k1", f"{title}, K 1", {**options, **_WITHOUT_GRAPH})
        for name, (title, options) in rows.items()
        if name in ("pdgr", "all")
    ]
    note = (
        "Without SPSD the graph acts on all channels; without UGAF the refined map takes the place of the canonical "
        "one, and the rest is the baseline's. The paper does not tell what it has there; table2-readings has what else "
        "it may be. "
    ) + _OF_K_1
    return TrainingStudy("table2", "Modules (Table 2)", tuple(variants), note, reference="all")


def _table2_readings(setting: Setting) -> TrainingStudy:
    variants = [
        Variant(f"{row}_{reading}", f"{modules}, {title}", {**spsd, **options}, paper.TABLE2[row])
        for row, modules, spsd in (("pdgr", "+ PDGR", _WITHOUT_SPSD), ("pdgr_spsd", "+ PDGR + SPSD", {}))
        for reading, (title, options) in _WITHOUT_UGAF.items()
    ]
    note = (
        "The paper does not tell what Table 2 has in place of UGAF. It is none of Table 4's other fusions: 37.97 with "
        "PDGR and SPSD is neither 39.62 (mean) nor 37.21 (concat) nor 36.55 (separate)."
    )
    title = "Readings of Table 2 without UGAF"
    return TrainingStudy("table2-readings", title, tuple(variants), note, reference="pdgr_spsd_replace")


def _table2_priors(setting: Setting) -> TrainingStudy:
    """What PDGR's row of Table 2 owes to the graph of which prior."""
    own = {**_WITHOUT_SPSD, **_WITHOUT_UGAF["replace"][1]}
    real, why_not = _dinov2(setting)
    constant = {"model.dino.features": "constant"}
    variants = (
        Variant("pdgr_k1", "no graph (K 1)", {**own, **_WITHOUT_GRAPH}),
        Variant("pdgr_constant", "constant prior: distance alone", {**own, **constant}),
        Variant("pdgr", "prior of the configuration", own),
        Variant("pdgr_dinov2_k1", "DINOv2, no graph (K 1)", {**own, **real, **_WITHOUT_GRAPH}, why_not=why_not),
        Variant("pdgr_dinov2", "DINOv2", {**own, **real}, why_not=why_not),
    )
    note = (
        "All rows are Table 2's + PDGR. Without a graph no prior has a say, but its width decides which initial "
        "weights are drawn: so each width has its own such row."
    )
    return TrainingStudy("table2-priors", "PDGR with the graphs of other priors", variants, note, reference="pdgr_k1")


def _dinov2(setting: Setting) -> tuple[dict[str, Any], str | None]:
    """A real DINOv2 whose grid is that of the configuration's prior, and why it cannot be had."""
    own = setting.config.model.dino
    if setting.quick:
        # another encoder takes its place in a trial
        return {"model.dino.seed": own.seed + 1000}, None
    with torch.device("meta"):
        side = 14 * DinoPrior(dataclasses.replace(own, weights=None)).grid[0]
    options = {"name": DINOV2.name, "weights": str(packaged_file(DINOV2.name)), "image_size": side}
    options |= {"normalization": "imagenet", "layer": DINOV2.layer, "guidance_blocks": (3, 7)}
    why_not = None if packaged_file(DINOV2.name).is_file() else "DINOv2 is not here (make real fetches it)"
    return {f"model.dino.{name}": value for name, value in options.items()}, why_not


def _prior_v1(setting: Setting) -> tuple[dict[str, Any], str | None]:
    """RS-DINOv1, or what stands for it where the prior is random, and why it cannot be had."""
    options: dict[str, Any] = {"model.dino.guidance_blocks": (3, 7), "model.dino.normalization": "clip"}
    if setting.config.model.dino.weights is None:
        # as deep as DINOv1's, with fewer channels: random weights have no use for more
        return options | {"model.dino.name": "vit_small_patch8_224"}, None
    options |= {"model.dino.name": "vit_base_patch8_224", "model.dino.weights": setting.prior_v1}
    return options, None if setting.prior_v1 else "weights of RS-DINOv1 were not given (--prior-v1 FILE)"


def _table3(setting: Setting) -> TrainingStudy:
    random = setting.config.model.dino.weights is None
    first, why_not = _prior_v1(setting)
    variants = []
    for version, options, reason in (("v1", first, why_not), ("v3", {}, None)):
        for name in ("gsnet", "rskt", "drseg"):
            title = (
                f"{METHODS[name].title}, RS-DINO{version}" if not random else f"{METHODS[name].title}, prior {version}"
            )
            row = paper.TABLE3[f"{name}_{version}"]
            variants.append(
                Variant(f"{name}_{version}", title, {**method_options(name), **options}, row, why_not=reason)
            )
    # no prior has a say in what they compute, but its width decides which initial weights are drawn
    for version, options, reason in (("v1", first, why_not), ("v3", {}, None)):
        without_graph = {**method_options("drseg"), **options, **_WITHOUT_GRAPH}
        title = f"{METHODS['drseg'].title}, prior {version}, K 1"
        variants.append(Variant(f"drseg_{version}_k1", title, without_graph, why_not=reason))
    note = _OF_K_1
    if random:
        start = "random weights" if not setting.prior_steps else "weights taught alike"
        note += f" Both priors have {start} here: prior v1 is a plain vision transformer, v3 one with rotary positions."
    return TrainingStudy("table3", "Priors (Table 3)", tuple(variants), note, reference="drseg_v3")


def _table4(setting: Setting) -> TrainingStudy:
    variants = tuple(Variant(kind, kind, {"model.fusion.kind": kind}, paper.TABLE4[kind]) for kind in paper.TABLE4)
    return TrainingStudy("table4", "Fusion of the two correlations (Table 4)", variants, reference="ugaf")


def _table5(setting: Setting) -> TrainingStudy:
    variants = tuple(
        Variant(f"rho_{ratio}", f"rho {ratio}", {"model.spsd.semantic_ratio": ratio}, row, value=ratio)
        for ratio, row in paper.TABLE5.items()
    )
    return TrainingStudy("table5", "Semantic ratio (Table 5)", variants, axis="semantic ratio rho", reference="rho_0.5")


def _table6(setting: Setting) -> TrainingStudy:
    rows: dict[int, PaperRow | None] = {1: None, **paper.TABLE6}
    variants = [Variant(f"k_{k}", f"K {k}", {"model.graph.k": k}, row, value=float(k)) for k, row in rows.items()]
    note = f"K is a number of nodes, and a grid has as many nodes as CLIP has tokens: 576 in the paper. {_OF_K_1}"
    return TrainingStudy("table6", "Neighbours (Table 6)", tuple(variants), note, axis="neighbours K", reference="k_75")


def _remote_tower(setting: Setting) -> tuple[dict[str, Any], str | None]:
    """RemoteCLIP, or what stands for it where CLIP is random, and why it cannot be had."""
    clip, weights = setting.config.model.clip, setting.remote_clip or setting.config.model.remote.weights
    if setting.needs_start:
        # the tower for random weights is the small one
        small = {"name": "drseg-tiny", "image_size": clip.image_size, "guidance_blocks": clip.guidance_blocks}
        return {f"model.remote.{name}": value for name, value in small.items()}, None
    # RSKT-Seg runs it in OpenAI's code, which has QuickGELU
    options = {"model.remote.name": "ViT-B-32-quickgelu", "model.remote.weights": weights}
    return options, None if weights else "weights of RemoteCLIP were not given (--remote-clip FILE)"


def _remote_clip(setting: Setting) -> TrainingStudy:
    option = "model.decoder.remote_clip"
    options, why_not = _remote_tower(setting)
    variants = (
        Variant("remote-clip_no", "no", {option: False}),
        Variant("remote-clip_yes", "yes", {option: True, **options}, why_not=why_not),
    )
    title = "Guidance of the decoder by a second CLIP"
    reference = variants[bool(setting.config.model.decoder.remote_clip)].name
    return TrainingStudy("sweep-remote-clip", title, variants, reference=reference)


_SHARES = (0.01, 0.03, 0.06, 0.13, 0.3)


def _neighbour_share(setting: Setting) -> TrainingStudy:
    own = setting.config.model.graph.k
    given = Variant("neighbour-share_as-configured", f"K {own:g}", {"model.graph.k": own})
    shares = (
        Variant(f"neighbour-share_{share:g}", f"{100 * share:g} % of the nodes", {"model.graph.k": share})
        for share in _SHARES
        if share != own
    )
    return TrainingStudy(
        "sweep-neighbour-share", "Neighbours K as a share of the grid", (given, *shares), reference=given.name
    )


def _residual_start(setting: Setting) -> TrainingStudy:
    residual, scale = "model.graph.residual", "model.graph.norm_scale"
    variants = (
        Variant("residual-start_no", "no residual", {residual: False}),
        Variant("residual-start_1", "residual, LayerNorm from 1", {residual: True, scale: 1.0}),
        Variant("residual-start_0", "residual, LayerNorm from 0: the input at first", {residual: True, scale: 0.0}),
        Variant(
            "residual-start_match", "no residual, LayerNorm from the features' norm", {residual: False, scale: "match"}
        ),
    )
    reference = None if setting.config.model.graph.residual else variants[0].name
    return TrainingStudy("sweep-residual-start", "Residual that starts as the input", variants, reference=reference)


_TABLES = {
    "table1": _table1,
    "table2": _table2,
    "table2-readings": _table2_readings,
    "table2-priors": _table2_priors,
    "table3": _table3,
    "table4": _table4,
    "table5": _table5,
    "table6": _table6,
    "sweep-remote-clip": _remote_clip,
    "sweep-neighbour-share": _neighbour_share,
    "sweep-residual-start": _residual_start,
}


def _sweep(name: str, setting: Setting) -> TrainingStudy:
    title, option, values = _SWEEPS[name]
    values = values if isinstance(values, tuple) else values(setting)
    numeric = all(_is_number(value) for value in values)
    variants = []
    for value in values:
        place = float(value) if numeric else None
        variants.append(Variant(f"{name}_{_shown(name, value)}", _shown(name, value), {option: value}, value=place))
    own = functools.reduce(getattr, option.split("."), cast(Any, setting.config))
    reference = next((variant.name for variant in variants if variant.options[option] == own), None)
    return TrainingStudy(f"sweep-{name}", title, tuple(variants), axis=title if numeric else None, reference=reference)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return {"tau": "learned", "hidden": "channels", "dino-layer": "last"}.get(name, "off")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if _is_number(value) else str(value)

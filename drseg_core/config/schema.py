# SPDX-License-Identifier: Apache-2.0
"""Every option of the model, its training and its evaluation.

Defaults are the paper's values (arXiv 2604.02010). Where it states none, they are those of the benchmark that it
follows. Equation numbers are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Config"]


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP image and text encoder (open_clip).

    Args:
        name: open_clip architecture; ``drseg-tiny`` is the small one that ships with this package.
        weights: open_clip tag, path of a local weight file, or null for random initial weights.
        image_size: side in pixels to which images are resized before CLIP.
        guidance_blocks: two visual block indices (from 0) whose outputs guide the decoder.
        trainable: what is trained: ``attention`` means the query and value projections of both towers, ``all``
            everything, ``visual`` the image tower (SED), ``position`` its position embedding (SAN).
        template: prompt into which the class name is put.
        normalization: pixel mean and deviation: ``clip`` (OpenAI's), ``half`` (0.5 and 0.5: some of LAION's),
            ``imagenet`` or ``sat``. Null takes those of an open_clip tag, and else ``clip``.
    """

    name: str = "ViT-L-14-336-quickgelu"
    weights: str | None = "openai"
    image_size: int = 336
    guidance_blocks: tuple[int, int] = (7, 15)
    trainable: Literal["attention", "all", "visual", "position", "none"] = "attention"
    template: str = "A photo of a {} in the scene"
    normalization: Literal["clip", "half", "imagenet", "sat"] | None = None


@dataclass(frozen=True)
class DinoConfig:
    """The frozen structural prior (timm).

    Args:
        name: timm architecture; ``drseg-tiny`` is the small one that ships with this package.
        weights: ``pretrained`` (timm's hub weights), path of a local weight file, or null for random initial weights.
        image_size: side in pixels to which images are resized before DINO.
        normalization: pixel mean and deviation: ``sat`` (SAT-493M), ``imagenet``, ``clip`` or ``half``.
        features: patch ``tokens`` after the final norm, or the attention's ``key`` or ``value`` of one block.
            ``constant`` is the same everywhere, a control: what is left of a graph is distance alone.
        layer: block from which the features come, from 0; null takes the last.
        guidance_blocks: two blocks (from 0) whose outputs guide the decoder with ``decoder.dino_guidance``.
        seed: seed of random initial weights.

    The benchmark's RS-DINOv1 is ``vit_base_patch8_224`` with the path of its file in ``weights``, ``normalization``
    ``clip`` and ``guidance_blocks`` [3, 7]. Its grid of 48 x 48 is averaged to CLIP's unless ``graph.grid`` is
    ``prior``.
    """

    name: str = "vit_large_patch16_dinov3.sat493m"
    weights: str | None = "pretrained"
    image_size: int = 384
    normalization: Literal["sat", "imagenet", "clip", "half"] = "sat"
    features: Literal["tokens", "key", "value", "constant"] = "tokens"
    layer: int | None = None
    guidance_blocks: tuple[int, int] = (7, 15)
    seed: int = 0


@dataclass(frozen=True)
class RemoteConfig:
    """A second, frozen CLIP image tower that guides the decoder with ``decoder.remote_clip``.

    Args:
        name: open_clip architecture; ``drseg-tiny`` is the small one that ships with this package. RSKT-Seg runs
            RemoteCLIP in OpenAI's code, which has QuickGELU.
        weights: path of a local weight file, such as RemoteCLIP's, or null for random initial weights.
        image_size: side in pixels to which images are resized before the tower; 768 gives CLIP's grid of 24 x 24.
        guidance_blocks: two visual block indices (from 0).
    """

    name: str = "ViT-B-32-quickgelu"
    weights: str | None = None
    image_size: int = 768
    guidance_blocks: tuple[int, int] = (3, 7)


@dataclass(frozen=True)
class SPSDConfig:
    """Semantic-purity channel split, Eq. 1-6.

    Args:
        channels: path of a ranking made by ``drseg rank``; null ranks the channels when training starts.
        semantic_ratio: rho of Eq. 5, the share of semantic channels; 0 sends all channels through the graph.
        alpha: balance of entropy and similarity in Eq. 4.
        prototypes_per_class: prototypes per class (M).
        sampling: prototypes are ``random`` pixel features, the mean of each class in each image (``image_mean``), or
            the centroids of ``kmeans``.
        label_to_grid: class of a grid cell: at its centre (``nearest``), or of more than half of it (``majority``).
        entropy_activation: what makes activations non-negative in Eq. 1.
        dead_channel_entropy: entropy of a channel that no class activates.
        similarity: inter-class similarity of Eq. 3.
        rank_ties: how equal scores are ranked in Eq. 4.
    """

    channels: str | None = None
    semantic_ratio: float = 0.5
    alpha: float = 0.5
    prototypes_per_class: int = 100
    sampling: Literal["random", "image_mean", "kmeans"] = "random"
    label_to_grid: Literal["nearest", "majority"] = "nearest"
    entropy_activation: Literal["relu", "abs", "shift"] = "relu"
    dead_channel_entropy: Literal["uniform", "zero"] = "uniform"
    similarity: Literal["product", "neg_abs_diff", "rbf", "sign_agreement"] = "product"
    rank_ties: Literal["ordinal", "average"] = "ordinal"


@dataclass(frozen=True)
class GraphConfig:
    """Prior-driven graph rectification (PDGR), Eq. 7-9.

    Args:
        k: neighbours per node; a number above 0 and below 1 is a share of the nodes.
        grid: the grid whose cells are nodes. With ``clip`` the prior is averaged to CLIP's grid. With ``prior`` the
            structural channels are enlarged to the prior's finer grid, and averaged back afterwards.
        affinity: form of Eq. 7.
        gamma: feature scale of Eq. 7; only ``decay / gamma`` matters for the choice of neighbours.
        decay: strength of the spatial decay (lambda of Eq. 7).
        self_loop: ``in_topk`` keeps the node among its own neighbours, ``exclude`` leaves it out,
            ``extra`` leaves it out and adds an edge of weight one.
        norm: degree normalisation of Eq. 9.
        edge_hidden: hidden width of the edge MLP of Eq. 8.
        normalize_prior: L2-normalise the prior before the edge MLP.
        layers: number of propagation layers.
        hidden: width between the layers; null takes the number of structural channels.
        bias: bias of the layers' linear maps.
        dropout: dropout between the layers.
        residual: add the input of the graph to its output.
        use_affinity_as_weight: multiply Eq. 8's weight by Eq. 7's affinity. With ``exp`` and ``gauss`` gamma is then at
            most 80, with the norm ``sym_count`` at most 40 over the layers.
        norm_scale: initial weight of the final LayerNorm; it sets how much the rectified channels weigh in the cosine.
            ``match`` gives them the norm of CLIP's own structural channels on the training set, as measured by
            ``drseg rank``. With ``residual`` and 0 the graph changes nothing at first.
        edge_temperature: start of a learned t >= 1e-38, by which Eq. 8's weight is multiplied with
            ``exp((cos - 1) / t)``; null leaves the factor out.
        edge_decay: start of a learned mu > 0, at most 1e38, by which Eq. 8's weight is multiplied with
            ``exp(-mu dist)``, where ``dist`` is that of Eq. 7; null leaves the factor out.
        backend: kernel backend; null takes the best that can run.
    """

    k: int | float = 75
    grid: Literal["clip", "prior"] = "clip"
    affinity: Literal["exp", "linear", "power", "product", "gauss"] = "exp"
    gamma: float = 1.0
    decay: float = 1.0
    self_loop: Literal["in_topk", "exclude", "extra"] = "in_topk"
    norm: Literal["sym_row", "sym_count", "sym_inout", "row", "sym_undirected"] = "sym_row"
    edge_hidden: int = 128
    normalize_prior: bool = True
    layers: int = 2
    hidden: int | None = None
    bias: bool = True
    dropout: float = 0.0
    residual: bool = False
    use_affinity_as_weight: bool = False
    norm_scale: float | Literal["match"] = 1.0
    edge_temperature: float | None = None
    edge_decay: float | None = None
    backend: str | None = None


@dataclass(frozen=True)
class FusionConfig:
    """How the original and the refined correlation are joined (UGAF, Eq. 12-13, and the rows of Table 4).

    Args:
        kind: ``ugaf``, or ``mean``, ``concat`` or ``separate`` of Table 4. The paper does not say what Table 2 has
            without UGAF. Two readings of it are ``replace`` (the refined map takes the place of the canonical one) and
            ``sum`` (it is added to each original one). ``none`` is the baseline without prior, graph and refined
            correlation (first row of Table 2). ``cosine`` is the dual encoder alone, with scaled cosines as logits. It
            makes a CLIP out of random weights.
        branch: what the refined correlation is made of: CLIP's features rectified over the ``graph``, or the
            ``prior``'s own features in the joint space (RSKT-Seg, GSNet), without split and graph.
        original: what the fusion gets of CLIP's correlation: one map per rotation (``stack``), or their ``mean``.
        tau: temperature of Eq. 12; null makes it a learned parameter that starts at 0.01.
        gate: form of Eq. 13; ``none`` leaves the factor out.
        detach_gate: do not send gradients through the uncertainty.
        head: ``conv1x1`` with GroupNorm and ReLU, or ``conv7x7`` with sigmoid and residual.
        multi_scale: reaches of the multi-scale block: 3x3 with three dilations, or kernels 3, 5, 7.
    """

    kind: Literal["ugaf", "mean", "concat", "separate", "replace", "sum", "none", "cosine"] = "ugaf"
    branch: Literal["graph", "prior"] = "graph"
    original: Literal["stack", "mean"] = "stack"
    tau: float | None = 0.01
    gate: Literal["sigmoid_proj", "residual", "direct", "feature", "proj_on_map", "none"] = "sigmoid_proj"
    detach_gate: bool = True
    head: Literal["conv1x1", "conv7x7"] = "conv1x1"
    multi_scale: Literal["dilation", "kernel"] = "dilation"


@dataclass(frozen=True)
class AggregatorConfig:
    """Cost aggregation over space and classes.

    Args:
        kind: ``efficient`` has reduced-key spatial attention and class attention (RSKT-Seg). ``swin`` has shifted
            windows and a linear-attention class transformer (CAT-Seg, with ``heads`` 4 and ``mlp_hidden`` 512).
            ``conv`` has wide depth-wise convolutions and the same class transformer (SED).
        layers: number of aggregation layers. Published values of the benchmark's code: 3 (ViT-B) and 2 (ViT-L) in its
            files, 5 (DLRSD) and 3 or 2 (iSAID, ViT-B or L) for its released weights.
        width: channels of the aggregated cost volume.
        heads: attention heads.
        mlp_hidden: hidden width of the MLPs.
        window: side of the windows of ``swin``, in cells.
        class_pooling: side of the pooling before the class attention of ``swin`` and ``conv``, in training and in
            evaluation.
        class_slots: length to which ``swin`` and ``conv`` fill up the class axis with a learned token; 0 turns it off.
    """

    kind: Literal["efficient", "swin", "conv"] = "efficient"
    layers: int = 2
    width: int = 128
    heads: int = 8
    mlp_hidden: int = 384
    window: int = 12
    class_pooling: tuple[int, int] = (2, 1)
    class_slots: int = 256


@dataclass(frozen=True)
class DecoderConfig:
    """Two up-sampling stages, each guided by one CLIP block, and by one block of the prior where asked.

    Args:
        kind: ``upsampling``, or SED's three stages that aggregate and up-sample in turn (``gradual``). With
            ``gradual`` there is no other aggregation, and the options below have no effect. The widths of its stages
            are a half, a quarter and an eighth of ``aggregator.width``. CLIP may then be a ConvNeXt.
        widths: output channels of the two stages.
        guidance_widths: guidance channels joined in the two stages.
        guidance_hidden: channels of the up-sampled guidance before it is reduced to ``guidance_widths``.
        initial_logit: where the logits start; below zero says that most classes are absent at most pixels.
        dino_guidance: join as many channels of the prior's ``guidance_blocks`` in each stage (RSKT-Seg's decoder).
        remote_clip: join as many channels of a second CLIP's blocks in each stage (``remote``; RSKT-Seg's decoder).
        guidance_attention: weigh the guidance by what is decoded (OVRS's decoder).
        skip_correlation: join the original correlation in each stage and detach the guidance, as SED's decoder does.
    """

    kind: Literal["upsampling", "gradual"] = "upsampling"
    widths: tuple[int, int] = (64, 32)
    guidance_widths: tuple[int, int] = (32, 16)
    guidance_hidden: tuple[int, int] = (256, 128)
    initial_logit: float = 0.0
    dino_guidance: bool = False
    remote_clip: bool = False
    guidance_attention: bool = False
    skip_correlation: bool = False


@dataclass(frozen=True)
class ProposalConfig:
    """Masks first, classes second: SAN and SCAN, which have neither cost volume nor decoder.

    Args:
        kind: ``none``, ``side_adapter`` (SAN) or ``calibrated`` (SCAN).
        queries: mask proposals of an image.
        image_size: side in pixels of the image that the side network sees, in patches of 16 (SAN: 640). Null takes
            CLIP's image, in patches half as wide as CLIP's.
        width: channels of the side network.
        layers: transformer layers of the side network; the last two are supervised.
        heads: attention heads of the side network.
        hidden: width of the MLPs that make masks.
        recognition_blocks: last blocks of CLIP in which the proposals are recognised: 3 of ViT-B's, 6 of ViT-L's.
    """

    kind: Literal["none", "side_adapter", "calibrated"] = "none"
    queries: int = 100
    image_size: int | None = None
    width: int = 240
    layers: int = 8
    heads: int = 6
    hidden: int = 256
    recognition_blocks: int = 6


@dataclass(frozen=True)
class ModelConfig:
    """The whole model. ``rotations`` is 4 (0, 90, 180, 270 degrees) or 1."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    spsd: SPSDConfig = field(default_factory=SPSDConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    proposals: ProposalConfig = field(default_factory=ProposalConfig)
    rotations: Literal[1, 4] = 4


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. Defaults follow the benchmark protocol.

    Args:
        iterations: optimiser steps.
        seconds: wall-clock limit; the learning rate then follows whichever of the two limits is nearer.
        batch_size: images per step, over all processes.
        crop_size: side of the square training crop in pixels.
        learning_rate: base rate of AdamW.
        clip_learning_rate_scale: factor on the base rate for the CLIP parameters.
        weight_decay: decoupled weight decay; none for normalisation layers and embeddings.
        gradient_clip: bound on the global L2 norm of the gradient.
        edge_eps: AdamW's epsilon for the MLP of Eq. 8. The degrees divide most of its gradient away. At AdamW's usual
            1e-8, the steps of this MLP in the tiny preset are a tenth of those of other parameters.
        precision: ``float32`` (the protocol), or ``bfloat16`` for the linear maps and convolutions (autocast). Weights,
            correlations, sums and the loss stay in float32.
        loss: ``binary`` cross-entropy of every class and pixel (the protocol), or ``softmax`` cross-entropy over the
            classes at the resolution of the logits.
        alignment_weight: weight of an additional softmax cross-entropy on the original correlation (over 0.1). It
            teaches a CLIP with random weights what to match. It is 0 in the protocol, whose CLIP is trained already.
        schedule: learning rate over time.
        warmup_iterations: steps of linear warm-up.
        ignore_mode: pixels of id 255 are negative for every class (``zeros``, the protocol) or left out (``masked``).
        unlabelled: with ``ignore_mode`` ``zeros``: images without any label have no part in the loss (``left_out``), or
            are negative for every class, as in the benchmark's code (``negative``).
        color_jitter: photometric distortion of the training images.
        workers: data loading processes.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of the newest checkpoints are kept, at least 2.
        log_every: steps between log lines.
        nan_limit: non-finite losses in a row after which training stops.
    """

    iterations: int = 30_000
    seconds: float | None = None
    batch_size: int = 8
    crop_size: int = 384
    learning_rate: float = 2e-4
    clip_learning_rate_scale: float = 0.01
    weight_decay: float = 1e-4
    gradient_clip: float = 0.01
    edge_eps: float = 1e-14
    precision: Literal["float32", "bfloat16"] = "float32"
    loss: Literal["binary", "softmax"] = "binary"
    alignment_weight: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_iterations: int = 0
    ignore_mode: Literal["zeros", "masked"] = "zeros"
    unlabelled: Literal["left_out", "negative"] = "left_out"
    color_jitter: bool = True
    workers: int = 2
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 20
    nan_limit: int = 10


@dataclass(frozen=True)
class EvaluationConfig:
    """Inference and scoring.

    Args:
        mode: ``whole`` resizes the whole image into the model (the protocol); ``tile`` runs overlapping tiles at
            native resolution. ``drseg evaluate`` scores a set of your own in tiles whatever this says: there its
            ``--mode`` alone decides.
        tile_size: side of a tile in pixels.
        overlap: pixels shared by neighbouring tiles.
        batch_size: images or tiles per forward pass.
    """

    mode: Literal["whole", "tile"] = "whole"
    tile_size: int = 384
    overlap: int = 128
    batch_size: int = 4


@dataclass(frozen=True)
class ReadingConfig:
    """How the pixels of a user's own images become 8-bit RGB. A training writes the values it used into its run.

    Args:
        scale: values that become 0 and 255: ``LOW,HIGH``, three such pairs with ``;`` between them, or ``auto`` (2 and
            98 %). Null leaves 8-bit values alone and is ``auto`` for others.
        nodata: value of pixels without data, besides what the files declare.
        bands: numbers of red, green and blue from 1, such as ``4,3,2``; null finds them.
        gsd: side of a pixel in metres that the model is trained for; null takes that of the images.
        depth: type of the stored values that ``scale`` is for, such as ``uint16``; set by the training.
    """

    scale: str | None = None
    nodata: float | None = None
    bands: str | None = None
    gsd: float | None = None
    depth: str | None = None


@dataclass(frozen=True)
class Config:
    """Everything a run needs besides its data and its output folder.

    Examples:
        >>> from drseg_core.config.schema import Config
        >>> config = Config()
        >>> config.model.graph.k, config.model.spsd.semantic_ratio, config.train.crop_size
        (75, 0.5, 384)
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    seed: int = 0

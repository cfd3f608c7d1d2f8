# SPDX-License-Identifier: Apache-2.0
"""What a study is run on: a configuration, training data, test sets, seeds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drseg_core.config.load import load_config, override
from drseg_core.config.schema import Config
from drseg_core.data import SegmentationDataset, open_dataset
from drseg_core.data.protocols import Protocol, check_held_out, get_protocol, open_protocol
from drseg_core.errors import ConfigError

# CLIP alone
BARE = {"model.fusion.kind": "cosine", "model.rotations": 1, "model.decoder.remote_clip": False}
# Without published weights there is no CLIP to adapt: a dual encoder is trained on the training set first, once for
# each seed, and every variant of a study starts from it.
START = {**BARE, "train.loss": "softmax", "train.alignment_weight": 0.0}
# what follows adapts it as the benchmark adapts CLIP: gently
ADAPT = {"train.clip_learning_rate_scale": 0.2, "train.batch_size": 2}
START_STEPS, CONTRAST_STEPS, VARIANT_STEPS = 1500, 2000, 300
UNREACHED_STEPS = 1_000_000
STARTS = ("dense", "contrast")

WORLD = "synthetic:world=landscape"
# of scenes that nothing else is drawn from
PRIOR_SEED = 1000
QUICK = {
    "model.clip.image_size": 64,
    "model.dino.image_size": 64,
    "model.spsd.prototypes_per_class": 5,
    "train.crop_size": 64,
    "train.batch_size": 2,
    "train.warmup_iterations": 1,
}


@dataclass(frozen=True)
class ScoredSet:
    """Images that a study scores: a name for the table, a specification and a split."""

    name: str
    spec: str
    split: str = "val"


@dataclass(frozen=True)
class Setting:
    """Everything the variants of a study have in common.

    Args:
        config: the configuration that variants change.
        data: training data, see :func:`drseg_core.data.open_dataset`; its split ``train`` is used.
        tests: what is scored; a study reports the plain mean over them.
        seeds: each variant is trained once per seed of initial weights and order.
        start: how the dual encoder that stands for CLIP is trained where ``config`` names no weights: ``dense`` on
            pixel labels, or ``contrast`` on captions alone (see :mod:`drseg_core.studies.contrast`).
        start_steps: steps of the ``dense`` dual encoder.
        contrast_steps: steps of the other.
        protocol: name of the benchmark protocol that ``tests`` are scored by, which also says what training images
            without a label are; None scores images as they are.
        prior_v1: weight file of RS-DINOv1, for Tables 1 and 3.
        remote_clip: weight file of RemoteCLIP, for Table 1; None takes the configuration's.
        matched: whether all methods of Table 1 have the configuration's prior and sizes instead of their own.
        released: whether RSKT-Seg in Table 1 has the layers of its released weights instead of those of its files.
        prior_steps: steps for which a random prior is taught first (see :mod:`drseg_core.studies.prior`).
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; None takes CUDA where there is one.
        pieces: folder of real labelled pieces (see :mod:`drseg_core.studies.pieces`).
        quick: whether it was asked for what only shows that a study runs.
        part: name of the part of Table 1 that it is; empty where it is all of a study.
        backbone: the backbone that Table 1 is compared with; None takes that of ``config``.
    """

    config: Config
    data: str
    tests: tuple[ScoredSet, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    start: str = "dense"
    start_steps: int = START_STEPS
    contrast_steps: int = CONTRAST_STEPS
    protocol: str | None = None
    prior_v1: str | None = None
    prior_steps: int = 0
    device: str | None = None
    pieces: str | None = None
    quick: bool = False
    remote_clip: str | None = None
    matched: bool = False
    released: bool = False
    part: str = ""
    backbone: str | None = None

    @property
    def needs_start(self) -> bool:
        return self.config.model.clip.weights is None

    @property
    def steps_of_start(self) -> int:
        return self.contrast_steps if self.start == "contrast" else self.start_steps

    def start_config(self, seed: int) -> Config:
        """The dual encoder that every variant of a seed starts from."""
        if self.start == "contrast":
            return override(self.config, {**BARE, "train.iterations": self.contrast_steps, "seed": seed})
        steps = {"train.iterations": self.start_steps, "train.checkpoint_every": self.start_steps, "seed": seed}
        return override(self.config, {**START, **steps, "train.seconds": None})

    def variant_config(self, options: dict[str, Any], seed: int) -> Config:
        """The configuration of one variant, trained as the protocol's code trains."""
        if self.protocol is not None:
            options = {"train.unlabelled": get_protocol(self.protocol).unlabelled, **options}
        if self.needs_start:
            # short enough to be begun anew
            return override(
                self.config, {**ADAPT, "train.checkpoint_every": self.config.train.iterations, "seed": seed, **options}
            )
        return override(self.config, {"seed": seed, **options})

    def open_test(self, test: ScoredSet) -> tuple[SegmentationDataset, Protocol | None]:
        if self.protocol is None:
            return open_dataset(test.spec, test.split), None
        protocol = get_protocol(self.protocol)
        check_held_out(protocol, test.spec, self.data)
        return open_protocol(protocol, test.spec), protocol

    def open_train(self) -> SegmentationDataset:
        return open_dataset(self.data, "train")

    def record(self) -> dict[str, Any]:
        """What JSON keeps of it."""
        return {
            "data": self.data,
            "tests": [dataclasses.asdict(test) for test in self.tests],
            "protocol": self.protocol,
            "seeds": list(self.seeds),
            "start": self.start if self.needs_start else None,
            "start_steps": self.steps_of_start if self.needs_start else None,
            "steps": self.config.train.iterations,
            "seconds_each": self.config.train.seconds,
            "prior_steps": self.prior_steps,
            "matched": self.matched,
            "released": self.released,
        }

    @property
    def suffix(self) -> str:
        """What tells files of another prior or start, or of methods with other sizes, apart."""
        marks = {
            "-matched": self.matched,
            "-released": self.released,
            "-taught": self.prior_steps,
            "-contrast": self.start == "contrast",
        }
        return (f"-{self.part}" if self.part else "") + "".join(mark for mark, there in marks.items() if there)

    @property
    def prior_data(self) -> str:
        """Scenes on which a prior is taught."""
        return f"{self.data},seed={PRIOR_SEED}"


@functools.cache
def fingerprint(spec: str, split: str) -> str:
    """Of a data set as it is when this process first asks: its content, not its path."""
    return open_dataset(spec, split).fingerprint()


@functools.cache
def scored_fingerprint(setting: Setting, test: ScoredSet) -> str:
    """The same of a test set as it is scored."""
    dataset, _ = setting.open_test(test)
    return dataset.fingerprint()


def make_setting(
    config: str = "tiny",
    *,
    data: str | None = None,
    tests: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    start: str = "dense",
    start_steps: int | None = None,
    protocol: str | None = None,
    prior_v1: str | None = None,
    prior_steps: int = 0,
    device: str | None = None,
    pieces: str | None = None,
    quick: bool = False,
    remote_clip: str | None = None,
    matched: bool = False,
    released: bool = False,
) -> Setting:
    """A setting from what the command line has.

    Args:
        config: preset or YAML file.
        data: training data; the landscapes by default.
        tests: ``[NAME=]SPEC`` each; for the landscapes their own domain and the shifted one, all names as prompts.
        seeds: see :class:`Setting`; 0, 1 and 2 by default.
        steps: training steps of a variant; 300 where CLIP has random weights, otherwise those of the configuration.
        seconds: of training of a variant, in place of steps.
        start: see :class:`Setting`.
        start_steps: steps of the dual encoder of ``start``, where CLIP has random weights.
        protocol: see :class:`Setting`.
        prior_v1: see :class:`Setting`.
        prior_steps: see :class:`Setting`; for the landscapes and a random prior only.
        device: see :class:`Setting`.
        pieces: see :class:`Setting`.
        quick: a few tiny scenes, and a few steps and one seed where nothing else is asked for: shows that a study runs,
            and nothing else.
        remote_clip: see :class:`Setting`.
        matched: see :class:`Setting`.
        released: see :class:`Setting`.

    Raises:
        ConfigError: a test set is missing or named twice, or an option does not fit.
    """
    base = load_config(config)
    if base.model.proposals.kind != "none" or base.model.fusion.kind in ("none", "cosine"):
        raise ConfigError(
            "study: configuration is a comparison method; expected DR-Seg's (table1 has the methods), got "
            f"model.proposals.kind {base.model.proposals.kind} and model.fusion.kind {base.model.fusion.kind}"
        )
    if seconds is not None:
        if steps is not None:
            raise ConfigError(
                f"study: steps and seconds are both given; expected one of them, got {steps} and {seconds}"
            )
        # the learning rate follows the nearer of the two limits
        base, steps = override(base, {"train.seconds": seconds}), UNREACHED_STEPS
    if quick:
        steps = steps or 4
    elif steps is None and base.model.clip.weights is None:
        steps = VARIANT_STEPS
    options: dict[str, Any] = {} if steps is None else {"train.iterations": steps}
    scenes, tested, size = 400, 60, ""
    if quick:
        options, seeds = {**options, **QUICK}, (0,) if seeds is None else seeds
        scenes, tested, size = 8, 4, ",size=64"
    if data is None or data == WORLD:
        data = f"{WORLD},scenes={scenes}{size}"
        shown = f"{WORLD},scenes={tested},vocabulary=full{size}"
        tests = tests or (f"source={shown}", f"shifted={shown},domain=shifted")
    if prior_steps and (base.model.dino.weights is not None or not data.startswith(WORLD) or "seed=" in data):
        raise ConfigError(
            "study: prior_steps needs a random prior and the landscapes of seed 0; expected no --prior-steps with "
            f"weights {base.model.dino.weights!r} and data {data!r}"
        )
    if start not in STARTS or (start != "dense" and base.model.clip.weights is not None):
        raise ConfigError(
            f"study: start is not usable; expected {' or '.join(STARTS)}, and contrast only where CLIP has no weights, "
            f"got {start!r} with weights {base.model.clip.weights!r}"
        )
    if not tests:
        raise ConfigError("study: tests are missing; expected --test NAME=SPEC for data other than the landscapes")
    seeds = (0, 1, 2) if seeds is None else seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"study: seeds are not usable; expected different numbers, got {list(seeds)}")
    sets = tuple(_test_set(text) for text in tests)
    names = [test.name for test in sets]
    if len(set(names)) < len(names):
        raise ConfigError(f"study: test sets have one name; expected different names, got {', '.join(names)}")
    own = {} if start_steps is None else {start: start_steps}
    return Setting(
        config=override(base, options),
        data=data,
        tests=sets,
        seeds=tuple(seeds),
        start=start,
        start_steps=own.get("dense", 6 if quick else START_STEPS),
        contrast_steps=own.get("contrast", 6 if quick else CONTRAST_STEPS),
        protocol=protocol,
        prior_v1=prior_v1,
        prior_steps=prior_steps,
        device=device,
        pieces=pieces,
        quick=quick,
        remote_clip=remote_clip,
        matched=matched,
        released=released,
    )


def _test_set(text: str) -> ScoredSet:
    """``NAME=SPEC`` or ``SPEC``, whose name is then the set's."""
    head, _, rest = text.partition("=")
    # an equals sign inside the options of a specification is not a name's
    if rest and ":" not in head:
        return ScoredSet(head.strip(), rest.strip())
    return ScoredSet(text.partition(":")[0], text)

# SPDX-License-Identifier: Apache-2.0
"""All studies by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from drseg_core.errors import ConfigError
from drseg_core.studies.channels import activation_sparsity, channel_masking, retention
from drseg_core.studies.evidence import NAME, TITLE, evidence
from drseg_core.studies.graph import neighbour_purity
from drseg_core.studies.maps import correlation_maps
from drseg_core.studies.propagation import propagation
from drseg_core.studies.setting import make_setting
from drseg_core.studies.tables import training_study_names, training_study_title
from drseg_core.studies.training import run_training_study
from drseg_core.studies.training_free import training_free


@dataclass(frozen=True)
class Study:
    """A study that can be run.

    Args:
        name: as typed.
        title: one line.
        run: ``run(setting, out, *, jobs, command)`` writes ``NAME.json``, ``NAME.md`` and ``NAME.png`` into ``out`` and
            returns why parts of it failed, by name.
    """

    name: str
    title: str
    run: Callable[..., dict[str, str]]


@functools.cache
def studies() -> dict[str, Study]:
    """All studies by name, in the order in which they are listed."""
    found = [
        Study("channel-masking", "mIoU of CLIP without one channel (Fig. 2)", channel_masking),
        Study("retention", "mIoU of CLIP with a share of its channels (Fig. 6)", retention),
        Study("activation-sparsity", "How sparse semantic and structural channels are", activation_sparsity),
        Study("correlation-maps", "Original and refined correlation, and logits (Fig. 7)", correlation_maps),
        Study("neighbour-purity", "What the graph of a prior connects", neighbour_purity),
        Study("propagation", "Labels spread over the graph of a real prior, on real images", propagation),
        Study("training-free", "Does the graph help without training? With all controls", training_free),
        Study(NAME, TITLE, evidence),
    ]
    setting = make_setting()
    for name in training_study_names():
        title = training_study_title(name, setting)
        found.append(Study(name, title, functools.partial(run_training_study, name)))
    return {study.name: study for study in found}


def find_study(name: str) -> Study:
    """A study by its name.

    Raises:
        ConfigError: no such study.
    """
    if name not in studies():
        raise ConfigError(f"study: name is unknown; expected list or one of {', '.join(studies())}, got {name!r}")
    return studies()[name]

# SPDX-License-Identifier: Apache-2.0
"""The ops of Prior-Driven Graph Rectification and their fusions; the only way to reach a kernel."""

import importlib
import os

from drseg_core.errors import BackendUnavailableError
from drseg_core.ops._dispatch import backend_names, backend_report, last_backend, register_backend, use_backend
from drseg_core.ops.between import knn_between
from drseg_core.ops.csc.api import Csc, csc
from drseg_core.ops.decompositions import decompositions
from drseg_core.ops.degree_normalize.api import degree_normalize
from drseg_core.ops.edge_coefficient.api import edge_coefficient
from drseg_core.ops.edge_weight.api import edge_weight
from drseg_core.ops.graph import Graph
from drseg_core.ops.graph_layer.api import graph_layer
from drseg_core.ops.graph_propagate.api import graph_propagate
from drseg_core.ops.knn_graph.api import knn_graph, padding_mask
from drseg_core.ops.linear_map.api import linear_map
from drseg_core.ops.prepare_prior.api import PreparedPrior, prepare_prior
from drseg_core.ops.scores import ScoreParts, score_parts, sort_by_score

__all__ = [
    "Csc",
    "Graph",
    "PreparedPrior",
    "ScoreParts",
    "backend_names",
    "backend_report",
    "csc",
    "decompositions",
    "degree_normalize",
    "edge_coefficient",
    "edge_weight",
    "graph_layer",
    "graph_propagate",
    "knn_between",
    "knn_graph",
    "last_backend",
    "linear_map",
    "padding_mask",
    "prepare_prior",
    "register_backend",
    "score_parts",
    "sort_by_score",
    "use_backend",
]

# other people's backends register themselves when they are imported
for _module in filter(None, map(str.strip, os.environ.get("DRSEG_BACKENDS", "").split(","))):
    try:
        importlib.import_module(_module)
    except Exception as error:
        _reason = " ".join(str(error).split()) or type(error).__name__
        raise BackendUnavailableError(
            f"DRSEG_BACKENDS: {_module} cannot be imported: {_reason}; expected a module whose folder is on PYTHONPATH"
        ) from error

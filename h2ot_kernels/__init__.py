"""Exact, fast token pruning and recovery for transformers that read video. In the order of the data path:

score_tokens -> select_tokens (prune_cluster, prune_sample, prune_motion, prune_attention) -> gather_tokens
-> the transformer's blocks -> recover_attention / recover_interpolate; cluster_tokens, assign_clusters and merge_tokens
beside them.
"""

from .score import TokenScores, score_tokens  # isort: skip
from .select import prune_attention, prune_cluster, prune_motion, prune_sample, select_tokens  # isort: skip
from .gather import gather_tokens  # isort: skip
from .cluster import TokenClusters, assign_clusters, cluster_tokens, merge_tokens  # isort: skip
from .recover_attention import recover_attention  # isort: skip
from .recover_pose import recover_pose  # isort: skip
from .recover_interpolation import recover_interpolate  # isort: skip
from . import nn  # isort: skip
from .hourglass import Hourglass  # isort: skip
from . import hosts  # isort: skip
from . import dropin  # isort: skip
from . import add_norm as _add_norm  # noqa: F401  declares its operator
from . import backend as _backend
from . import graph as _graph  # noqa: F401
from .backend import can_run, env_report, explain, use_backend

__version__ = "0.1.0"
__all__ = [
    "Hourglass",
    "TokenClusters",
    "TokenScores",
    "assign_clusters",
    "can_run",
    "cluster_tokens",
    "dropin",
    "env_report",
    "explain",
    "gather_tokens",
    "hosts",
    "merge_tokens",
    "nn",
    "prune_attention",
    "prune_cluster",
    "prune_motion",
    "prune_sample",
    "recover_attention",
    "recover_interpolate",
    "recover_pose",
    "score_tokens",
    "select_tokens",
    "use_backend",
]


def __getattr__(name: str):
    """What takes time to import, at its first use: evaluation, onnx."""
    if name not in ("evaluation", "onnx"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module(f".{name}", __name__)


if _backend.interpreting() or _backend.torch.version.cuda:
    _backend.why_no_triton()
_backend.resolve_all()

"""The definition of every operation, in plain PyTorch: slow, obvious, float64 as the oracle.

Every backend is held to these functions. They also run as the backend "reference" on devices without a kernel.
`official.py` is something else: the formulation that public code uses today, the opponent in benchmarks.
"""

from .cluster import assign_clusters, merge_tokens
from .gather import gather_tokens
from .recover_attention import recover_attention
from .recover_interpolation import recover_interpolate
from .recover_pose import recover_pose, recover_tail
from .score import TokenScores, metric_tokens, pool_joints, score_tokens, squared_distances
from .select import (
    attention_scores,
    motion_scores,
    prune_attention,
    prune_cluster,
    prune_motion,
    prune_sample,
    select_ragged,
    select_tokens,
)

__all__ = [
    "TokenScores",
    "assign_clusters",
    "attention_scores",
    "gather_tokens",
    "merge_tokens",
    "metric_tokens",
    "motion_scores",
    "pool_joints",
    "prune_attention",
    "prune_cluster",
    "prune_motion",
    "prune_sample",
    "recover_attention",
    "recover_interpolate",
    "recover_pose",
    "recover_tail",
    "score_tokens",
    "select_ragged",
    "select_tokens",
    "squared_distances",
]

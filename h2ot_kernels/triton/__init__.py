"""The operations in Triton, one stem each: for any NVIDIA GPU, or with TRITON_INTERPRET=1 for CPU tensors."""

from . import (
    attention_scores,
    cluster,
    gather,
    recover_attention,
    recover_interpolation,
    recover_pose,
    recover_project,
    recover_tail,
    score,
    select,
)

__all__ = [
    "attention_scores",
    "cluster",
    "gather",
    "recover_attention",
    "recover_interpolation",
    "recover_pose",
    "recover_project",
    "recover_tail",
    "score",
    "select",
]

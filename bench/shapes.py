"""The one list of what is timed: per stem the operations, per operation the sizes, smallest first."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import python_ref
from h2ot_kernels.comparison import Comparison
from h2ot_kernels.demo import operations, recoveries
from h2ot_kernels.demo.skeleton import walking_clip
from python_ref import official

JOINTS = 17

STEMS = {
    "score": ("score_tokens", "prune_cluster"),
    "select": ("prune_step", "prune_sample", "prune_motion", "prune_attention"),
    "gather": ("gather_tokens", "gather_and_embed"),
    "cluster": ("cluster_tokens", "assign_clusters", "merge_tokens"),
    "recover_attention": ("recover_attention", "recover_pose"),
    "recover_interpolation": ("recover_interpolate",),
}

# B, N, C, K, k: HoT at batch 1, 4, 32; MotionBERT; MHFormer; FTP-Pose; TCFormer; a long one (longer: bench_large.py).
_DPC = [
    (1, 243, 512, 81, 2),
    (4, 243, 512, 81, 2),
    (16, 243, 256, 81, 2),
    (4, 576, 768, 288, 2),
    (32, 243, 512, 81, 2),
    (64, 351, 1536, 117, 2),
    (1, 3136, 256, 784, 5),
    (1, 8192, 256, 2048, 2),
]
_DPC_SIZES = [dict(zip("BNCKk", sizes, strict=True)) for sizes in _DPC]
_FRAMES = [{"B": B, "F": 243, "C": 512, "K": 81} for B in (1, 4)]

_SIZES: dict[str, list[dict[str, int]]] = {
    "score_tokens": _DPC_SIZES[:2],
    "prune_cluster": _DPC_SIZES[:2],
    "cluster_tokens": _DPC_SIZES,
    "prune_step": _FRAMES,
    "prune_sample": [{"F": 243, "K": 81}],
    "prune_motion": [{"B": B, "F": 243, "K": 81} for B in (1, 64)],
    "prune_attention": _FRAMES,
    "gather_tokens": [*_FRAMES, {"B": 32, "F": 243, "C": 512, "K": 81}],
    "gather_and_embed": _FRAMES[1:],
    "assign_clusters": _DPC_SIZES[:4],
    "merge_tokens": _DPC_SIZES[:4],
    "recover_attention": _FRAMES,
    "recover_pose": _FRAMES,
    "recover_interpolate": [{"B": B, "F": 243, "C": C, "K": 81} for B, C in ((1, 3), (4, 3), (1, 512))],
}
_KINDS = {"cluster_tokens": ("smooth", "random")}


@dataclass(frozen=True)
class Case:
    """One operation at one size and dtype. kind: "smooth" (walks with a still stretch) or "random" tokens.

    threads: of the CPU; 0: as many as the run has.
    """

    op: str
    kind: str = "smooth"
    sizes: dict[str, int] = field(default_factory=dict, hash=False)
    dtype: str = "float32"
    threads: int = 0

    def __str__(self) -> str:
        varied = self.sizes | ({"threads": self.threads} if self.threads else {})
        sizes = "-".join(f"{name}{size}" for name, size in varied.items())
        return f"{self.op}-{sizes}-{self.kind}" + ("" if self.dtype == "float32" else f"-{self.dtype}")


DTYPES = ("float32", "bfloat16", "float16")


def cases(ops: tuple[str, ...] | list[str], *, quick: bool = False, dtypes: Sequence[str] = DTYPES[:1]) -> list[Case]:
    """Every case of these operations, or only the first size of each (quick), first in the first dtype, and so on."""
    found = []
    for dtype in dtypes:
        for op in ops:
            _check_op(op)
            if op == "prune_sample" and dtype != dtypes[0]:  # no tensor goes in
                continue
            every = [(kind, sizes) for sizes in _SIZES[op] for kind in _KINDS.get(op, ("smooth",))]
            typed = "float32" if op == "prune_sample" else dtype
            found += [Case(op, *given, typed) for given in (every[:1] if quick else every)]
    return found


_STEP = {"B": 4, "F": 243, "C": 512, "K": 81}  # HoT at batch 4
_MHFORMER = {"B": 256, "F": 351, "J": 1, "C": 1536, "K": 117}
_LONG = {"B": 1, "N": 16384, "C": 1024, "K": 4096, "k": 2}
# What is asked of a GPU, the most telling first: whole pruning steps, the gather alone, the recovery, many tokens.
_GPU_CASES = [
    Case("prune_step", "smooth", _STEP),
    Case("gather_and_embed", "smooth", _STEP),
    Case("recover_pose", "smooth", _STEP),
    Case("prune_step", "smooth", _STEP, "bfloat16"),
    Case("prune_step", "smooth", _MHFORMER),
    Case("prune_step", "random", _MHFORMER),
    Case("prune_cluster", "random", _LONG, "bfloat16"),
    Case("prune_cluster", "smooth", _LONG, "bfloat16"),
    Case("gather_and_embed", "smooth", _STEP, "bfloat16"),
    Case("recover_pose", "smooth", _STEP | {"B": 1}),
    Case("recover_pose", "smooth", _STEP, "bfloat16"),
    Case("recover_pose", "smooth", _STEP | {"B": 1}, "bfloat16"),
]


def gpu_cases(ops: Sequence[str], *, quick: bool = False) -> list[Case]:
    """The sizes that only a GPU is asked for, of these operations; quick: only the first of each."""
    for op in ops:
        _check_op(op)
    found = [case for case in _GPU_CASES if case.op in ops]
    return list({case.op: case for case in reversed(found)}.values())[::-1] if quick else found


def _check_op(op: str) -> None:
    if op not in _SIZES:
        raise ValueError(f"ops: got {op!r}, wanted some of {', '.join(_SIZES)}")


def sweep(device: str) -> list[Case]:
    """prune_cluster with one size varied at a time around B 1, N 243, C 256, K 81; on a CPU threads at B 16, too."""
    middle = {"B": 1, "N": 243, "C": 256, "K": 81, "k": 2}
    varied = {"N": (128, 243, 512, 1024, 2048), "B": (1, 2, 4, 8, 16), "C": (64, 128, 256, 512, 1024)}
    varied["K"] = (9, 27, 81, 162)
    every = [middle | {name: size} for name, sizes in varied.items() for size in sizes]
    found = [Case("prune_cluster", "smooth", sizes) for i, sizes in enumerate(every) if sizes not in every[:i]]
    counts = thread_counts() if device == "cpu" else []
    return found + [Case("prune_cluster", "smooth", middle | {"B": 16}, threads=count) for count in counts]


def thread_counts() -> list[int]:
    """1, 2, 4 and so on, up to all processors that this process may use; none where that is one."""
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*counts, most] if counts else []


def all_ops() -> list[str]:
    return [op for ops in STEMS.values() for op in ops]


def _walks(B: int, N: int) -> Tensor:
    """[B, N, J, 2]: another stretch of a walk for each sample."""
    points = torch.from_numpy(walking_clip(N + 7 * B).normalised)
    return torch.stack([points[7 * b : 7 * b + N] for b in range(B)])


def _tokens(case: Case, B: int, N: int, C: int) -> Tensor:
    if case.kind == "random":
        return torch.randn(B, N, C, generator=torch.Generator().manual_seed(0))
    return operations.motion_tokens(_walks(B, N).flatten(2), C)


def build(case: Case, device: torch.device | str) -> Comparison:
    """The case's comparison, its inputs on device."""
    device, sizes, dtype = torch.device(device), dict(case.sizes), getattr(torch, case.dtype)
    K = sizes["K"]
    if case.op in ("score_tokens", "prune_cluster", "cluster_tokens", "assign_clusters", "merge_tokens"):
        B, N, C, _, k = sizes.values()
        x = _tokens(case, B, N, C).to(device, dtype)
        if case.op == "score_tokens":
            return operations.score_tokens(x, k)
        if case.op in ("prune_cluster", "cluster_tokens"):
            return getattr(operations, case.op)(x, K, k)
        return getattr(operations, case.op)(x, python_ref.prune_sample(N, K, device=device).repeat(B, 1))
    if case.op == "prune_sample":
        return operations.prune_sample(sizes["F"], K, device)

    B, F, joints = sizes["B"], sizes["F"], sizes.get("J", JOINTS)
    if joints == 1:
        return operations.prune_step(_tokens(case, B, F, sizes["C"]).to(device, dtype), 1, K)
    pose = _walks(B, F)
    if case.op == "prune_motion":
        return operations.prune_motion(pose.to(device, dtype), K)
    index = python_ref.prune_sample(F, K, device=device).repeat(B, 1)
    if case.op == "recover_interpolate":
        x = operations.motion_tokens(pose, sizes["C"]).to(device, dtype)
        return recoveries.recover_interpolate(python_ref.gather_tokens(x, index), index, F)
    frames = operations.joint_tokens(pose, sizes["C"]).to(device, dtype)
    if case.op == "prune_attention":
        return operations.prune_attention(frames, K)
    rows = frames.transpose(1, 2).flatten(0, 1).contiguous()
    if case.op == "prune_step":
        return operations.prune_step(rows, JOINTS, K)
    if case.op in ("gather_tokens", "gather_and_embed"):
        return operations.gather_tokens(rows, index, JOINTS, with_embedding=case.op == "gather_and_embed")
    return getattr(recoveries, case.op)(official.gather_frames(rows, index, JOINTS), F, JOINTS)

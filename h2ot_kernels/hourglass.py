"""The hourglass: prune frames before chosen blocks of a video transformer, give all of them back at its end."""

import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import python_ref

from . import checks
from .gather import gather_tokens
from .library import ranged
from .nn import PRUNERS, TokenRecoveringAttention, TokenRecoveringInterpolation

Kept = tuple[Tensor, ...]


class Hourglass(nn.Module):
    """Turns a transformer over frames into an hourglass, in the model's own loop over its blocks.

    num_frames: F, the frames that enter the model.
    stages: {block: tokens}: just before 0-based `block` only `tokens` frames are kept. One stage is HoT, several H2OT;
        by default {1: 121, 2: 81}, those of H2OT on MixSTE.
    pruner: "cluster" (TPC), "sampler" (TPS), "motion" (TPMo), "attention" (TPA) or "scores" (the caller's).
    recover: "attention" (TRA, on features, before the head), "interpolation" (TRI, on poses, after it), None (the kept
        frames are the result).
    pipeline: "seq2seq" (all F frames out) or "seq2frame" (the centre frame (F - 1) // 2, which every stage keeps).
    keep: input frames that every stage keeps: an int, a list, or "centre".
    k: neighbours of the cluster pruner. frame_dim, num_joints: where x holds its frames, see `nn.TokenPruning`.
    channels, num_heads: give the hourglass its own `x_token` and `cross_attention` for recover="attention"; a model
        that has them itself passes them to `recover`.

    The only state is `kept`, which travels through the loop: for each stage so far the index [B, K] or [1, K] of the
    input frames that it kept. Nothing is remembered on the module: calls are independent, torch.compile traces them.
    Raises TypeError or ValueError that name the argument. Source: HoT section 3, H2OT section 3.

    >>> import torch, h2ot_kernels as h2ot
    >>> hourglass = h2ot.Hourglass(243, stages={1: 121, 2: 81})
    >>> blocks, head = [torch.nn.Linear(32, 32) for _ in range(4)], torch.nn.Linear(32, 3)
    >>> def model(x, index=None):
    ...     kept = ()
    ...     for i, block in enumerate(blocks):
    ...         x, kept = hourglass.prune(i, x, kept, index=index)
    ...         x = block(x)
    ...     return hourglass.recover(x, kept, head), kept
    >>> pose, kept = model(torch.randn(2, 243, 17, 32))
    >>> pose.shape, [frames.shape[1] for frames in kept]
    (torch.Size([2, 243, 17, 3]), [121, 81])
    """

    def __init__(
        self,
        num_frames: int,
        stages: Mapping[int, int] | None = None,
        pruner: str = "sampler",
        recover: str | None = "interpolation",
        pipeline: str = "seq2seq",
        *,
        keep: int | Sequence[int] | str | None = None,
        k: int = 2,
        frame_dim: int = 1,
        num_joints: int | None = None,
        channels: int | None = None,
        num_heads: int = 8,
    ):
        super().__init__()
        checks.integer("num_frames", num_frames, 1)
        checks.choice("pruner", pruner, tuple(PRUNERS))
        checks.choice("recover", recover, ("attention", "interpolation", None))
        checks.choice("pipeline", pipeline, ("seq2seq", "seq2frame"))
        self.num_frames, self.pruner, self.recovery, self.pipeline = num_frames, pruner, recover, pipeline
        if channels is not None:
            checks.integer("channels", channels, 1)
        self.frame_dim, self.num_joints, self.channels = frame_dim, num_joints, channels
        self.stages = _checked_stages({1: 121, 2: 81} if stages is None else stages, num_frames)
        self.centre = (num_frames - 1) // 2
        self.keep = self._checked_keep(keep)

        layout = {"frame_dim": frame_dim, "num_joints": num_joints}
        if pruner == "cluster":
            if self.stages:
                entering = [num_frames, *self.stages.values()][-2]
                checks.integer("k", k, 1, entering, "the frames that enter the last stage")
            layout["k"] = k
        self.pruners = nn.ModuleList(PRUNERS[pruner](tokens, **layout) for tokens in self.stages.values())
        self._sampled_keep = self._keep_in_samples() if pruner == "sampler" else None
        self.interpolation = TokenRecoveringInterpolation(num_frames)
        self.x_token = self.cross_attention = None
        if channels is not None and recover == "attention":
            self.x_token = nn.Parameter(torch.zeros(1, num_frames, channels))
            self.cross_attention = TokenRecoveringAttention(channels, num_heads)

    @ranged("Hourglass.prune")
    def prune(
        self,
        block: int,
        x: Tensor,
        kept: Kept = (),
        *,
        index: Tensor | Kept | None = None,
        pos_embed: Tensor | None = None,
        pose: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        scores: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | torch.Generator | None = None,
    ) -> tuple[Tensor, Kept]:
        """x as it comes to 0-based `block` -> (x as it enters the block, kept); unchanged where no stage stands.

        index: frames to keep instead of choosing: the `kept` of an earlier call (test-time flip), or of one stage the
            tensor alone; [1, K] or one row a sample. pos_embed: [1, K, C], added to the kept tokens.
        The rest is what a pruner reads; what it does not read is not looked at, so a model can pass all that it has:
        pose [B, F, J, D] (motion); query and key [B, J, H, N, D] of the block before (attention); scores [B, F]
        (scores); mask [B, F] (cluster, scores); noise [B, F] or a generator (cluster). F may be the input frames or
        those still there.
        """
        checks.integer("block", block, 0)
        if block not in self.stages:
            return x, kept
        stage = list(self.stages).index(block)
        if len(kept) != stage:
            raise ValueError(
                f"kept: got the indices of {len(kept)} stages, wanted {stage}: "
                f"the stage before block {block} is number {stage}, and takes what the stages before it returned"
            )
        self.check_frames(x, kept)
        if index is None:
            given = {"pose": pose, "query": query, "key": key, "scores": scores, "mask": mask, "noise": noise}
            position = self._select(stage, x, kept, given)
            frames = _take(kept[-1], position) if kept else position
        else:
            frames = self._stage_index(index, stage, x.shape[0])
            position = find_frames(kept[-1], frames) if kept else frames
        return gather_tokens(x, position, pos_embed, dim=self.frame_dim), (*kept, frames)

    @ranged("Hourglass.recover")
    def recover(
        self,
        x: Tensor,
        kept: Kept,
        head: nn.Module | None = None,
        *,
        x_token: Tensor | None = None,
        cross_attention: TokenRecoveringAttention | None = None,
    ) -> Tensor:
        """The last block's output x, and head (features -> poses) where given, -> the model's result.

        recover="attention": recovers, then applies head; "interpolation": applies head, then recovers; None: head of
        the kept frames. pipeline="seq2frame": 1 frame on the frame axis, the centre.
        x_token [1, F, C], cross_attention: the model's own; default: the hourglass's (made where channels= was given).
        """
        if len(kept) != len(self.stages):
            raise ValueError(f"kept: got the indices of {len(kept)} stages, wanted {len(self.stages)}: {self.stages}")
        self.check_frames(x, kept)
        only_centre = self.pipeline == "seq2frame"
        if self.recovery == "attention":
            x_token = self.x_token if x_token is None else x_token
            cross_attention = self.cross_attention if cross_attention is None else cross_attention
            if x_token is None or cross_attention is None:
                raise ValueError("x_token, cross_attention: got None, wanted both, or Hourglass(channels=...)")
            checks.tensor("x_token", x_token, (3,), "[1, F, C]")
            checks.has_shape("x_token", x_token, (1, self.num_frames, x.shape[-1]), "[1, num_frames, C]")
            token = x_token[:, self.centre : self.centre + 1] if only_centre else x_token
            return cross_attention(token, x, frame_dim=self.frame_dim, head=head)
        if only_centre:
            centre = find_frames(kept[-1], self.centre) if kept else _position(self.centre, x)
            x = gather_tokens(x, centre, dim=self.frame_dim)
        x = x if head is None else head(x)
        if only_centre or self.recovery is None or not kept:
            return x
        return self.interpolation(x, kept[-1], frame_dim=self.frame_dim)

    def extra_repr(self) -> str:
        return (
            f"num_frames={self.num_frames}, stages={self.stages}, pruner={self.pruner!r}, recover={self.recovery!r}, "
            f"pipeline={self.pipeline!r}, keep={list(self.keep)}"
        )

    def check_frames(self, x: Tensor, kept: Kept) -> None:
        """x holds the frames that are there after `kept`."""
        checks.is_tensor("x", x)
        wanted = kept[-1].shape[1] if kept else self.num_frames
        if x.dim() <= self.frame_dim or x.shape[self.frame_dim] != wanted:
            raise ValueError(f"x: got shape {checks.shape(x)}, wanted {wanted} frames on axis {self.frame_dim}")

    def _select(self, stage: int, x: Tensor, kept: Kept, given: dict) -> Tensor:
        """The pruner's choice among the frames that are still there, as positions among them."""
        pruner = self.pruners[stage]
        missing = [name for name in pruner.needed if given[name] is None]
        if missing:
            raise ValueError(f"{', '.join(missing)}: got None, needed by pruner={self.pruner!r}")
        signals = {name: given[name] for name in (*pruner.needed, *pruner.optional) if given[name] is not None}
        for name, signal in signals.items():
            of_frames = name not in ("query", "key") and isinstance(signal, Tensor)
            if kept and of_frames and signal.shape[1:2] == (self.num_frames,):
                signals[name] = _take(signal, kept[-1])
        if self._sampled_keep is not None:
            signals["keep"] = self._sampled_keep[stage] or None
        elif self.keep:
            signals["keep"] = find_frames(kept[-1], *self.keep) if kept else self.keep
        return pruner.select(x, **signals)

    def _stage_index(self, index: Tensor | Kept, stage: int, rows: int) -> Tensor:
        if not isinstance(index, (Tensor, Sequence)):
            raise TypeError(f"index: got {type(index).__name__}, wanted an int64 tensor, or one for each stage")
        by_stage = (index,) if isinstance(index, Tensor) else tuple(index)
        if len(by_stage) != len(self.stages):
            raise ValueError(f"index: got {len(by_stage)} tensors, wanted one for each of {len(self.stages)} stages")
        frames, tokens = by_stage[stage], self.pruners[stage].num_tokens
        checks.tensor("index", frames, (2,), f"[B, {tokens}] or [1, {tokens}]", (torch.int64,))
        if frames.shape[1] != tokens:
            raise ValueError(f"index: got shape {checks.shape(frames)}, wanted [B, {tokens}] or [1, {tokens}]")
        samples = rows if self.num_joints is None else rows // self.num_joints
        if frames.shape[0] not in (1, samples, rows):
            raise ValueError(
                f"index: got shape {checks.shape(frames)}, wanted [1, {tokens}] or a row for each of {samples} samples"
            )
        return frames

    def _checked_keep(self, keep: int | Sequence[int] | str | None) -> tuple[int, ...]:
        if isinstance(keep, str):
            checks.choice("keep", keep, ("centre",))
            keep = self.centre
        listed = [] if keep is None else keep if isinstance(keep, Sequence) else [keep]
        for frame in listed:
            checks.integer("keep", frame, 0, self.num_frames - 1, "num_frames - 1")
        frames = set(map(int, listed))
        if self.pipeline == "seq2frame":
            frames.add(self.centre)
        fewest = min(self.stages.values(), default=self.num_frames)
        if len(frames) > fewest:
            raise ValueError(f"keep: got {len(frames)} frames, wanted at most {fewest}, the tokens of the last stage")
        return tuple(sorted(frames))

    def _keep_in_samples(self) -> list[list[int]]:
        """For each stage of the sampler, the positions of `keep` among the frames that enter it: known beforehand."""
        positions, frames = [], list(range(self.num_frames))
        for tokens in self.stages.values():
            positions.append([frames.index(frame) for frame in self.keep])
            sampled = python_ref.select.sampled_frames(len(frames), tokens, positions[-1])
            frames = [frames[position] for position in sampled]
        return positions


def find_frames(frames: Tensor, *wanted: Tensor | int) -> Tensor:
    """Where `wanted` (one index [B or 1, M], or M integers) stand in the rows of frames [B or 1, N].

    N, which every gather refuses, for a frame that is not there.
    """
    N = frames.shape[1]
    position = torch.arange(N, device=frames.device)
    if isinstance(wanted[0], Tensor):
        same = frames[:, None, :] == wanted[0][:, :, None]
    else:
        same = torch.stack([frames == frame for frame in wanted], 1)
    return torch.where(same, position, N).amin(-1)


def _take(x: Tensor, position: Tensor) -> Tensor:
    """x [B or 1, N, ...] at position [B or 1, K]: either may be shared by the other's samples."""
    rows = x.shape[0] if position.shape[0] == 1 else position.shape[0]
    position = position.reshape(*position.shape, *[1] * (x.dim() - 2)).expand(rows, -1, *x.shape[2:])
    return x.expand(rows, *x.shape[1:]).gather(1, position)


def _position(frame: int, x: Tensor) -> Tensor:
    return torch.full((1, 1), frame, dtype=torch.int64, device=x.device)


def _checked_stages(stages: Mapping[int, int], num_frames: int) -> dict[int, int]:
    if not isinstance(stages, Mapping):
        raise TypeError(f"stages: got {type(stages).__name__}, wanted a mapping {{block: tokens}}")
    for block in stages:
        checks.integer("stages", block, 0)
    ordered, most = dict(sorted(stages.items())), num_frames
    for block, tokens in ordered.items():
        if isinstance(tokens, bool) or not isinstance(tokens, numbers.Integral) or not 1 <= tokens <= most:
            raise ValueError(f"stages: got {tokens!r} tokens before block {block}, wanted 1 to {most} that are there")
        most = tokens
    return {int(block): int(tokens) for block, tokens in ordered.items()}


from .wrapped import WrappedBlocks, wrap  # noqa: E402, F401  (they need Hourglass)

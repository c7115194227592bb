"""FTP-Pose (arXiv 2503.05365): pose in video from three frames, whose image tokens are pruned by density peaks.

The paper's ratio, neighbours and grid are not known to us, nor any weights: they are parameters here, the defaults are
our choice, and nothing is claimed about accuracy.
"""

import math
import numbers
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import checks
from ..gather import gather_tokens
from ..nn import TokenRecoveringAttention
from ..select import prune_cluster
from .blocks import Block, check_heads
from .host import check_input
from .vit import MLP_RATIO, ViT

FRAMES = 3  # t - 1, t, t + 1
SIZES = {
    "small": {"channels": 384, "depth": 12, "num_heads": 6},
    "base": {"channels": 768, "depth": 12, "num_heads": 12},
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as backbones are trained


class FTPPose(nn.Module):
    """Three frames [B, 3, 3, height, width] -> heatmaps [B, num_joints, height / 4, width / 4] of the middle one.

    The data path: a ViT on each frame; a high-resolution branch, `high_depth` blocks over the kept tokens of all
    frames; a low-resolution branch, `low_depth` blocks over all frames' tokens averaged on a coarse grid, which carry
    the motion; cross-attention from the middle frame's full grid (the coarse one, enlarged) to the kept tokens; two
    stride-2 deconvolutions and a 1 x 1 convolution.

    size: "small" or "base"; channels, depth, num_heads (of the ViT) override it. image_size: (height, width),
    multiples of patch_size. num_joints: J.
    epsilon: the share of tokens that is pruned, 0 (the unpruned baseline) to below 1. k: neighbours of a density.
    prune_at: "encoder": after the ViT, the 3 N tokens of all frames together. A block number b: before block b of the
        ViT, each frame's N tokens alone, so that the rest of the ViT runs on fewer; the coarse tokens are then those
        before block b. Either way ceil((1 - epsilon) N) tokens a frame are kept.
    grid: (rows, columns) of the coarse tokens of a frame.
    Raises TypeError or ValueError that name the argument.

    >>> import torch
    >>> from h2ot_kernels.hosts.ftp_pose import FTPPose
    >>> model = FTPPose(image_size=(64, 48), channels=32, depth=2, num_heads=2, epsilon=0.5, prune_at=1).eval()
    >>> model(torch.randn(2, 3, 3, 64, 48)).shape
    torch.Size([2, 17, 16, 12])
    """

    def __init__(
        self,
        size: str = "small",
        *,
        image_size: tuple[int, int] = (256, 192),
        patch_size: int = 16,
        num_joints: int = 17,
        epsilon: float = 0.5,
        prune_at: int | str = 0,
        k: int = 5,
        grid: tuple[int, int] | None = None,
        high_depth: int = 1,
        low_depth: int = 2,
        head_channels: int = 256,
        **overrides: int,
    ):
        super().__init__()
        checks.choice("size", size, tuple(SIZES))
        unknown = set(overrides) - set(SIZES[size])
        if unknown:
            raise TypeError(f"{min(unknown)}: no argument of FTPPose")
        vit = {**SIZES[size], **overrides}
        channels, num_heads = vit["channels"], vit["num_heads"]
        check_heads("num_heads", num_heads, "channels", channels)
        if patch_size != 16:
            raise ValueError(f"patch_size: got {patch_size}, wanted 16: the head enlarges its grid four times")
        self.in_shape = (FRAMES, 3, *image_size)
        self.vit = ViT(image_size, patch_size, **vit)
        self.grid = grid or tuple(math.ceil(side / 2) for side in self.vit.grid)
        self.k = k
        self.set_pruning(epsilon, prune_at)

        self.frame_embed = nn.Parameter(torch.zeros(1, FRAMES, 1, channels))
        sizes = channels, num_heads, MLP_RATIO * channels
        self.high_blocks = nn.ModuleList(Block(*sizes) for _ in range(high_depth))
        self.low_blocks = nn.ModuleList(Block(*sizes) for _ in range(low_depth))
        self.query_embed = nn.Parameter(torch.zeros(1, self.tokens_per_frame, channels))
        self.cross_attention = TokenRecoveringAttention(channels, num_heads)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Sequential(
            *_doubling(channels, head_channels),
            *_doubling(head_channels, head_channels),
            nn.Conv2d(head_channels, num_joints, 1),
        )

    @property
    def tokens_per_frame(self) -> int:
        """N."""
        return self.vit.grid[0] * self.vit.grid[1]

    def set_pruning(self, epsilon: float, prune_at: int | str) -> None:
        """Prune otherwise from now on; the parameters stay."""
        if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real):
            raise TypeError(f"epsilon: got {type(epsilon).__name__}, wanted a number")
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon: got {epsilon}, wanted 0 to below 1")
        if isinstance(prune_at, str):
            checks.choice("prune_at", prune_at, ("encoder",))
        else:
            checks.integer("prune_at", prune_at, 0, len(self.vit.blocks) - 1, "the last block")
        self.epsilon, self.prune_at = epsilon, prune_at
        # A ratio such as 0.9 is a little more or less in binary: the small term keeps whole products whole.
        self.kept_per_frame = self.tokens_per_frame - math.floor(epsilon * self.tokens_per_frame + 1e-9)

    def forward(self, frames: Tensor, *, return_index: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """frames: [B, 3, 3, height, width], normalised colours (`load_frames`), of frames t - 1, t, t + 1.

        return_index: also the kept tokens: int64 [B, 3 K] in the 3 N tokens of all frames, or [3 B, K] in the N tokens
        of each frame (prune_at a block); None for epsilon 0.
        """
        checks.tensor("frames", frames, (5,), "[B, 3, 3, height, width]")
        checks.has_shape("frames", frames, (frames.shape[0], *self.in_shape), "[B, 3, 3, height, width]")
        check_input("frames", frames, "vit.patch_embed", self.vit.patch_embed)
        x = self.vit.embed(frames.flatten(0, 1))
        dense, index = x, None
        for number, block in enumerate(self.vit.blocks):
            if number == self.prune_at and self.epsilon > 0:
                dense = x
                x, index = self._pruned(x, self.kept_per_frame)
            x = block(x, dim=1)[0]
        x = self.vit.norm(x)
        if self.prune_at == "encoder" or self.epsilon == 0:
            dense = x
        # From here on the three frames of a sample are one sequence.
        high = (x.unflatten(0, (-1, FRAMES)) + self.frame_embed).flatten(1, 2)
        if self.prune_at == "encoder" and self.epsilon > 0:
            high, index = self._pruned(high, FRAMES * self.kept_per_frame)
        for block in self.high_blocks:
            high = block(high, dim=1)[0]
        joined = self.norm(self.cross_attention(self._middle(dense), high))
        heatmaps = self.head(joined.mT.unflatten(-1, self.vit.grid))
        return (heatmaps, index) if return_index else heatmaps

    def _pruned(self, x: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        index = prune_cluster(x, num_tokens, self.k)
        return gather_tokens(x, index), index

    def _middle(self, dense: Tensor) -> Tensor:
        """[3 B, N, C] -> the low-resolution branch, its middle frame enlarged to the full grid: [B, N, C]."""
        maps = dense.mT.contiguous().unflatten(-1, self.vit.grid)  # one layout, for exported graphs too
        coarse = functional.adaptive_avg_pool2d(maps, self.grid).flatten(2).mT
        low = (coarse.unflatten(0, (-1, FRAMES)) + self.frame_embed).flatten(1, 2)
        for block in self.low_blocks:
            low = block(low, dim=1)[0]
        middle = low.unflatten(1, (FRAMES, -1))[:, FRAMES // 2]
        wide = functional.interpolate(middle.mT.unflatten(-1, self.grid), self.vit.grid, mode="nearest")
        return wide.flatten(2).mT + self.query_embed


def _doubling(channels: int, out_channels: int) -> list[nn.Module]:
    """Twice the height and width."""
    deconvolution = nn.ConvTranspose2d(channels, out_channels, 4, 2, 1, bias=False)
    return [deconvolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def load_frames(frames: Sequence[str | os.PathLike | np.ndarray], image_size: tuple[int, int] = (256, 192)) -> Tensor:
    """Three images, t - 1, t, t + 1, as the input of `FTPPose`: float32 [1, 3, 3, height, width].

    frames: files that Pillow reads, or arrays [height, width, 3], uint8, or floats from 0 to 1; of any size: resized
    (bilinear, antialiased) to image_size = (height, width), then normalised by ImageNet's mean and deviation.
    Raises ValueError, TypeError or FileNotFoundError that name the frame.

    >>> import numpy as np
    >>> from h2ot_kernels.hosts.ftp_pose import load_frames
    >>> load_frames([np.zeros((480, 640, 3), np.uint8)] * 3).shape
    torch.Size([1, 3, 3, 256, 192])
    """
    if isinstance(frames, (str, os.PathLike)) or len(frames) != FRAMES:
        raise ValueError(f"frames: got {frames if isinstance(frames, str) else len(frames)}, wanted {FRAMES} images")
    images = []
    for position, frame in enumerate(frames):
        name = f"frames[{position}]"
        image = torch.from_numpy(_pixels(name, frame).copy())
        if image.dim() != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"{name}: got shape {checks.shape(image)}, wanted [height, width, 3]")
        if not (image.dtype == torch.uint8 or image.is_floating_point()):
            raise TypeError(f"{name}: got dtype {image.dtype}, wanted uint8, or floats from 0 to 1")
        colours = image.movedim(2, 0)[None].float() / (255 if image.dtype == torch.uint8 else 1)
        images.append(functional.interpolate(colours, image_size, mode="bilinear", antialias=True))
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return ((torch.cat(images) - mean) / std)[None]


def _pixels(name: str, frame: str | os.PathLike | np.ndarray) -> np.ndarray:
    if isinstance(frame, np.ndarray):
        return frame
    if not isinstance(frame, (str, os.PathLike)):
        raise TypeError(f"{name}: got {type(frame).__name__}, wanted a file or an array")
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ImportError("image files need Pillow: pip install pillow, or pass arrays") from error
    try:
        with Image.open(frame) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{name}: {os.fspath(frame)} is no image that can be read: {error}") from error


def keypoints(heatmaps: Tensor) -> Tensor:
    """[B, J, h, w] -> [B, J, 3]: x and y of each joint's maximum in pixels of the input (4 a cell), and its value.

    >>> import torch
    >>> from h2ot_kernels.hosts.ftp_pose import keypoints
    >>> heatmaps = torch.zeros(1, 1, 4, 4)
    >>> heatmaps[0, 0, 2, 3] = 0.5
    >>> keypoints(heatmaps)
    tensor([[[14.0000, 10.0000,  0.5000]]])
    """
    checks.tensor("heatmaps", heatmaps, (4,), "[B, J, h, w]")
    value, at = heatmaps.flatten(2).max(-1)
    columns = heatmaps.shape[3]
    return torch.stack([(at % columns + 0.5) * 4, (at // columns + 0.5) * 4, value], -1)

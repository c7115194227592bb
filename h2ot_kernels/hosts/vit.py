"""A vision transformer on the tokens of single frames, with the usual parameter names."""

import torch
from torch import Tensor, nn

from .blocks import Block

MLP_RATIO = 4


class ViT(nn.Module):
    """Patches of images [B, 3, height, width] as tokens [B, N, C], N = (height / patch) (width / patch), and blocks."""

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 192),
        patch_size: int = 16,
        channels: int = 384,
        depth: int = 12,
        num_heads: int = 6,
    ):
        super().__init__()
        if any(side < patch_size or side % patch_size for side in image_size):
            raise ValueError(f"image_size: got {image_size}, wanted multiples of patch_size = {patch_size}")
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid[0] * self.grid[1], channels) * 0.02)
        self.patch_embed = nn.Conv2d(3, channels, patch_size, patch_size)
        self.blocks = nn.ModuleList(Block(channels, num_heads, MLP_RATIO * channels) for _ in range(depth))
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, N, C], row by row of the grid."""
        return self.patch_embed(images).flatten(2).mT.contiguous() + self.pos_embed

"""The self-attention of SAM's image encoder without its full matrix of scores.

With q, k the query and key of cells (y, x) and (y', x') of an s x s grid, the score is

    q . k / sqrt(C) + q . down[y - y'] + q . across[x - x']

where `down` and `across` are learned tables of relative positions (Li et al., MViTv2, 2022). The official module builds
all s^4 scores of all heads, several times over: at s = 64 with 12 heads that is 805 MB each. Three ways are used here:

* On a GPU, queries and keys are extended so that one product gives the whole score: a query by its s + s products with
  the tables, a key by two one-hot vectors of its row and column. Any fused kernel takes them, and no bias is stored.
* On a CPU, a fused kernel with the positions as an additive bias for small grids, the windows.
* On a CPU and large grids, a few rows of queries at a time, whose scores fit into the processor's cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORES_AT_ONCE = 1 << 20
"""On a CPU. Four megabytes in float32; 2^19 and 2^21 took up to 7 % longer at s = 64."""


class FusedAttention(nn.Module):
    """Computes what an `Attention` of `segment_anything` or `segment_anything_hq` computes, with its parameters.

    Args:
        attention: With relative positions, for square inputs.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """Map cells (B, s, s, channels) to new ones."""
        b, side, _, _ = x.shape
        cells = side * side
        # Three times (B, heads, cells, C).
        query, key, value = self.qkv(x).view(b, cells, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        down = positions(query, self.rel_pos_h, side=side, axis=0)
        across = positions(query, self.rel_pos_w, side=side, axis=1)
        if x.device.type != "cpu":
            mixed = _extended(query, key, value, down, across)
        elif cells * cells > SCORES_AT_ONCE:
            mixed = _in_rows(query, key, value, down, across)
        else:
            bias = (down[..., :, None] + across[..., None, :]).view(b, self.num_heads, cells, cells)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(b, side, side, -1))
        return projected


def fuse_attention(encoder: nn.Module) -> None:
    """Replace the attention of every block of a ViT image encoder that has relative positions, in place.

    Parameters keep their names.
    """
    for block in encoder.blocks:  # type: ignore[union-attr]
        if block.attn.use_rel_pos:
            block.attn = FusedAttention(block.attn)


def positions(query: Tensor, table: Tensor, *, side: int, axis: int) -> Tensor:
    """Multiply queries with the relative positions of all rows (axis 0) or columns (axis 1).

    Args:
        query: (B, heads, side^2, C).
        table: (2 side - 1, C), for differences from 1 - side to side - 1.

    Returns:
        (B, heads, side^2, side): for each query, its products with the position of each row or column relative to it.
    """
    b, heads, cells, channels = query.shape
    steps = torch.arange(side, device=query.device)
    relative = table[steps[:, None] - steps + side - 1].to(query.dtype)
    grid = query.reshape(b * heads, side, side, channels)
    along = grid.transpose(1, 2) if axis else grid
    products = along.transpose(0, 1).reshape(side, -1, channels) @ relative.transpose(1, 2)
    products = products.view(side, b * heads, side, side).transpose(0, 1)
    return (products.transpose(1, 2) if axis else products).reshape(b, heads, cells, side)


def _extended(query: Tensor, key: Tensor, value: Tensor, down: Tensor, across: Tensor) -> Tensor:
    cells, channels = query.shape[-2:]
    side = down.shape[-1]
    steps = torch.eye(side, dtype=key.dtype, device=key.device)
    places = torch.cat((steps.repeat_interleave(side, 0), steps.repeat(side, 1)), 1).expand(*key.shape[:2], cells, -1)
    queries = torch.cat((query * channels**-0.5, down, across), -1)
    # Fused kernels want as many channels in values as in keys.
    mixed = F.scaled_dot_product_attention(
        queries, torch.cat((key, places), -1), F.pad(value, (0, 2 * side)), scale=1.0
    )
    return mixed[..., :channels]


def _in_rows(query: Tensor, key: Tensor, value: Tensor, down: Tensor, across: Tensor) -> Tensor:
    b, heads, cells, channels = query.shape
    side = down.shape[-1]
    at_once = max(1, SCORES_AT_ONCE // cells)
    mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
    for image in range(b):
        for head in range(heads):
            keys, values = key[image, head].T.contiguous() * channels**-0.5, value[image, head].contiguous()
            for start in range(0, cells, at_once):
                rows = slice(start, start + at_once)
                scores = (query[image, head, rows] @ keys).view(-1, side, side)
                scores += down[image, head, rows, :, None]
                scores += across[image, head, rows, None, :]
                mixed[image, head, rows] = scores.view(-1, cells).softmax(-1) @ values
    return mixed

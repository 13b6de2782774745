"""The two-way decoder of SAM, HQ-SAM and SAM 2 with less work per prompt, for inference.

Tokens (a few per prompt) and image cells (L = g^2 per prompt) attend to each other in turn. Cells are what costs. In
the official modules each of the eight projections of cells is a product of its own, with or without position embeddings
added to the cells. Here the projections of one layer are one product, and position embeddings are added after it: they
are the same for all prompts, so their projections are computed once, when the model is loaded.

What the image alone determines can't be shared among prompts that have masks, because SAM adds the embedded mask to the
cells before the first layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TwoWay(nn.Module):
    """Computes what a `TwoWayTransformer` computes, with its parameters, which keep their names.

    Args:
        transformer: Of one of the official packages.
        positions: (1, C, g, g), the position embeddings of the cells.
    """

    def __init__(self, transformer: Any, positions: Tensor) -> None:
        super().__init__()
        self.layers = transformer.layers
        self.final_attn_token_to_image = transformer.final_attn_token_to_image
        self.norm_final_attn = transformer.norm_final_attn
        places = positions.detach().flatten(2).transpose(1, 2)
        final = transformer.final_attn_token_to_image
        with torch.no_grad():
            self._of_layers = [
                _CellProjections(
                    (layer.cross_attn_token_to_image.k_proj, layer.cross_attn_image_to_token.q_proj),
                    layer.cross_attn_token_to_image.v_proj,
                    places,
                )
                for layer in self.layers
            ]
            self._of_final = _CellProjections((final.k_proj,), final.v_proj, places)

    def forward(
        self,
        image_embedding: Tensor,
        image_pe: Tensor | None,  # noqa: ARG002
        point_embedding: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run the decoder.

        Args:
            image_embedding: (N, C, g, g), cells with the embedded mask added.
            image_pe: Ignored: the positions are known since the model was loaded.
            point_embedding: (N, T, C), tokens.

        Returns:
            Tokens (N, T, C) and cells (N, L, C).
        """
        cells, tokens = image_embedding.flatten(2).transpose(1, 2).contiguous(), point_embedding
        for layer, project in zip(self.layers, self._of_layers, strict=True):
            if layer.skip_first_layer_pe:
                tokens = layer.self_attn(tokens, tokens, tokens)
            else:
                placed = tokens + point_embedding
                tokens = tokens + layer.self_attn(placed, placed, tokens)
            tokens = layer.norm1(tokens)
            key, query, value = project(cells)
            tokens = layer.norm2(
                tokens + _ask_cells(layer.cross_attn_token_to_image, tokens + point_embedding, key, value)
            )
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            back = layer.cross_attn_image_to_token
            answer = _answer_cells(query, back.k_proj(tokens + point_embedding), back.v_proj(tokens), back.num_heads)
            cells = layer.norm4(back.out_proj(answer).add_(cells))
        key, value = self._of_final(cells)
        asked = _ask_cells(self.final_attn_token_to_image, tokens + point_embedding, key, value)
        return self.norm_final_attn(tokens + asked), cells


class _CellProjections:
    """Several projections of cells as one product: those that see positions, then the one that does not."""

    def __init__(self, placed: tuple[nn.Linear, ...], plain: nn.Linear, places: Tensor) -> None:
        self.weight = torch.cat([one.weight for one in (*placed, plain)])
        of_plain = plain.bias.expand(1, places.shape[1], -1)
        self.offset = torch.cat([*(one(places) for one in placed), of_plain], dim=-1)
        self.sizes = [one.out_features for one in (*placed, plain)]

    def __call__(self, cells: Tensor) -> tuple[Tensor, ...]:
        return torch.split(F.linear(cells, self.weight).add_(self.offset), self.sizes, dim=-1)


def _ask_cells(attention: Any, tokens: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Let tokens (N, T, C) attend to cells, whose keys and values are (N, L, channels)."""
    query = attention.q_proj(tokens)
    query, key, value = (_apart(x.to(query.dtype), attention.num_heads) for x in (query, key, value))
    result: Tensor = attention.out_proj(_together(F.scaled_dot_product_attention(query, key, value)))
    return result


def _answer_cells(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Let cells attend to tokens: queries (N, L, channels), keys and values (N, T, channels).

    With so few keys, a softmax that runs over the first axis, many cells at a time, takes a third of the time of
    `scaled_dot_product_attention` on a CPU.
    """
    apart = _apart(query.to(key.dtype), heads).transpose(2, 3)
    weights = ((_apart(key, heads) * apart.shape[2] ** -0.5) @ apart).softmax(2)
    return _together(weights.transpose(2, 3).to(value.dtype) @ _apart(value, heads))


def _apart(x: Tensor, heads: int) -> Tensor:
    """(N, rows, channels) to (N, heads, rows, channels of a head)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def masks_of_cells(decoder: Any, cells: Tensor, hypernets: Tensor) -> Tensor:
    """Predict SAM's masks from its decoder's cells.

    The official decoder upscales cells twice by transposed convolutions whose kernels do not overlap: each cell becomes
    four, by itself. So cells stay where they are, and only the masks are put into the order of pixels.

    Args:
        decoder: A `MaskDecoder` of `segment_anything`, for its weights.
        cells: (N, g^2, C).
        hypernets: (N, K, C/8), the output of its hypernetworks.

    Returns:
        (N, K, 4 g, 4 g).
    """
    first, norm, activation, second, last_activation = decoder.output_upscaling
    n, count, _ = cells.shape
    side = round(count**0.5)
    fine = F.layer_norm(_four(first, cells), (first.out_channels,), norm.weight, norm.bias, norm.eps)
    finest = last_activation(_four(second, activation(fine)))
    logits = hypernets @ finest.transpose(1, 2)
    # From (row, column, half row, half column, quarter row, quarter column) to rows and columns.
    placed = logits.view(n, -1, side, side, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    masks: Tensor = placed.reshape(n, -1, 4 * side, 4 * side)
    return masks


def _four(convolution: nn.ConvTranspose2d, cells: Tensor) -> Tensor:
    """Make four cells (N, 4 L, C') of each (N, L, C), with the kernel of a transposed convolution of stride 2."""
    assert convolution.bias is not None
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    four = F.linear(cells, weight, convolution.bias.repeat(4))
    return four.view(len(cells), -1, convolution.out_channels)

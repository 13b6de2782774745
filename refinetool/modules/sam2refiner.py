"""The SAM2Refiner head (Yao et al.): three trainable modules on a frozen SAM 2 for fine detail.

Localization Augment (LA) lets the image embedding attend to the features of four enlarged quarters of the image. Prompt
Retargeting (PR) relates the decoder's embedding to the prompts once more. Mask Refinement (MR) decodes the result with
the features of the image up to the full side S.

There is no public code of the paper; where the text leaves something open, docs/design/sam2refiner.md says what was
chosen, and why. B images of side S (a multiple of 64), N prompts, C the channels of the SAM 2 model (256 in the
official ones).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.modules.detail import GIVEN, DetailHead, mask_maps
from refinetool.modules.heads import Decoded, Encode, Features, HeadAnswer, Prompted, Seen
from refinetool.modules.sam2_passes import colours_of, masks_of_tokens
from refinetool.records import BACKGROUND, FOREGROUND
from refinetool.settings import RefinerOptions

POOLING = (2, 4, 8)
"""Sides of the cells that local features are averaged over, in cells of S/8 (eq. 1)."""
HEADS = 8
BRANCHES = (3, 5, 7)
"""Lengths of the kernels of the retargeting block's branches."""
DISC = 5 / 1024
"""Radius of a click in the prompt map, in cells of S/4, relative to S; at least one cell."""


class LocalizationAugment(nn.Module):
    """Adds local context to the image embedding (eq. 1 and 2): G_re = G + CrossAttn(G, L, L), then a feed-forward part.

    L are the features of the four quarters, put back in their places and averaged over cells of 2, 4 and 8. Queries and
    keys are placed; values are not. Residuals, with last layers that start at zero, make it the identity at first: the
    frozen decoder gets the inputs that it knows.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_global, self.norm_local = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.leave = nn.Linear(channels, channels)
        self.norm_hidden = nn.LayerNorm(channels)
        self.hidden, self.last = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        for layer in (self.leave, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, embedding: Tensor, local: Tensor, place: Callable[[tuple[int, int]], Tensor]) -> Tensor:
        """Return the augmented embedding, (B, C, S/16, S/16).

        Args:
            embedding: (B, C, S/16, S/16), G.
            local: (B, C, S/8, S/8), L.
            place: Makes position embeddings (C, h, w) of a grid over the image.
        """
        pooled = [F.avg_pool2d(local, cells) for cells in POOLING]
        at = torch.cat([_cells(place(_grid(level))[None]) for level in pooled], 1).to(embedding.dtype)
        whole, tokens = _cells(embedding), self.norm_local(torch.cat([_cells(level) for level in pooled], 1))
        query: Tensor = self.query(self.norm_global(whole) + _cells(place(_grid(embedding))[None]).to(embedding.dtype))
        key, value = self.key(tokens + at), self.value(tokens)
        mixed = F.scaled_dot_product_attention(_apart(query), _apart(key), _apart(value))
        whole = whole + self.leave(mixed.transpose(1, 2).flatten(2))
        whole = whole + self.last(F.gelu(self.hidden(self.norm_hidden(whole))))
        augmented: Tensor = whole.transpose(1, 2).reshape(embedding.shape)
        return augmented


class ReceptiveFields(nn.Module):
    """Sees the object embedding at several sizes: E_a = fuse(branches(E)) + shortcut(E), at first the identity.

    The branches have kernels of (1, n) and (n, 1), n = 3, 5 and 7.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = channels // 4
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, narrow, 1),
                _ChannelNorm(narrow),
                nn.GELU(),
                nn.Conv2d(narrow, narrow, (1, n), padding=(0, n // 2)),
                nn.Conv2d(narrow, narrow, (n, 1), padding=(n // 2, 0)),
                _ChannelNorm(narrow),
                nn.GELU(),
            )
            for n in BRANCHES
        )
        self.fuse = nn.Conv2d(narrow * len(BRANCHES), channels, 1)
        self.shortcut = nn.Conv2d(channels, channels, 1)
        for layer in (self.fuse, self.shortcut):
            assert layer.bias is not None
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.shortcut.weight[:, :, 0, 0].fill_diagonal_(1.0)

    def forward(self, cells: Tensor) -> Tensor:
        """(N, C, S/16, S/16) → the same shape."""
        fields: Tensor = self.fuse(torch.cat([branch(cells) for branch in self.branches], 1))
        straight: Tensor = self.shortcut(cells)
        return fields + straight


class PromptRetargeting(nn.Module):
    """Relates the decoder's embedding to the prompts: E_r = TwoWay(tokens, E_a + E_p).

    E_a is the embedding seen at several sizes, E_p the embedded map of the clicks and the mask. The two-way block is
    one of SAM 2's, and starts from the weights of the decoder's last.
    """

    def __init__(self, channels: int, block: nn.Module) -> None:
        super().__init__()
        narrow, middle = channels // 16, channels // 4
        self.fields = ReceptiveFields(channels)
        self.embed = nn.Sequential(
            nn.Conv2d(3, narrow, 2, stride=2),
            _ChannelNorm(narrow),
            nn.GELU(),
            nn.Conv2d(narrow, middle, 2, stride=2),
            _ChannelNorm(middle),
            nn.GELU(),
            nn.Conv2d(middle, channels, 1),
        )
        self.block = copy.deepcopy(block).requires_grad_(True)

    def forward(self, prompt_map: Tensor, decoded: Decoded, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (N, K, C) and the retargeted embedding E_r, (N, C, S/16, S/16).

        Args:
            prompt_map: (N, 3, S/4, S/4), see `prompt_map`.
            positions: (1, C, S/16, S/16), position embeddings of the cells.
        """
        embedded = self.fields(decoded.cells) + self.embed(prompt_map)
        tokens, cells = self.block(
            queries=decoded.tokens,
            keys=_cells(embedded),
            query_pe=decoded.queries,
            key_pe=_cells(positions).to(embedded.dtype),
        )
        return tokens, cells.transpose(1, 2).reshape(embedded.shape)


class MaskRefinement(nn.Module):
    """Decodes the embedding at full resolution: a U-Net's decoder with the image's features, then the image itself.

    Args:
        residual, cues: See `RefinerOptions`.
    """

    def __init__(self, channels: int, *, residual: bool, cues: bool) -> None:
        super().__init__()
        widths = (channels, channels // 2, channels // 4)
        half, full = channels // 8, channels // 16
        self.blocks = nn.ModuleList(
            _Block(below + channels, width) for below, width in zip((channels, *widths[:-1]), widths, strict=True)
        )
        self.auxiliary = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in widths)
        self.to_half = nn.Sequential(nn.ConvTranspose2d(widths[-1], half, 2, stride=2), _ChannelNorm(half), nn.GELU())
        self.to_full = nn.Sequential(nn.ConvTranspose2d(half, full, 2, stride=2), nn.GELU())
        self.given = nn.Sequential(_Block(GIVEN, half), nn.Conv2d(half, half, 3, padding=1)) if cues else None
        self.low_level = nn.Sequential(
            nn.Conv2d(3, full, 3, padding=1), _ChannelNorm(full), nn.GELU(), nn.Conv2d(full, full, 3, padding=1)
        )
        self.leave = nn.Conv2d(full, 1, 3, padding=1)
        self.residual = residual
        if residual:
            assert self.leave.bias is not None
            nn.init.zeros_(self.leave.weight)
            nn.init.zeros_(self.leave.bias)

    def look(self, images: Tensor) -> Tensor:
        """Compute the low-level features of images (B, 3, S, S): (B, C/16, S, S)."""
        low_level: Tensor = self.low_level(images)
        return low_level

    def forward(
        self, cells: Tensor, pyramid: list[Tensor], low_level: Tensor, logits: Tensor, given: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return logits (N, S, S), and those of the three blocks at S/16, S/8 and S/4.

        Args:
            cells: (N, C, S/16, S/16), the object's embedding.
            pyramid: (N, C, h, w) at S/4, S/8 and S/16, of the image.
            low_level: (N, C/16, S, S), from `look`.
            logits: (N, S/4, S/4), the decoder's mask.
            given: (N, GIVEN, S/2, S/2), the maps of `detail.mask_maps`, for a head with cues.
        """
        x, auxiliary = cells, []
        for block, level, predict in zip(self.blocks, reversed(pyramid), self.auxiliary, strict=True):
            if x.shape[-1] != level.shape[-1]:
                x = F.interpolate(x, size=level.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat((x, level), 1))
            auxiliary.append(predict(x)[:, 0])
        x = self.to_half(x)
        if self.given is not None and given is not None:
            x = x + self.given(given.to(x.dtype))
        fine = self.leave(self.to_full(x) + low_level)
        if self.residual:
            fine = fine + F.interpolate(
                logits[:, None].float(), size=fine.shape[-2:], mode="bilinear", align_corners=False
            )
        return fine[:, 0], auxiliary


class Sam2RefinerHead(nn.Module):
    """LA, PR and MR on a SAM 2 model, or some of them: a `Head`.

    The model itself is not part of the head's state, and gets no gradients if its parameters are frozen.

    Args:
        options: Which modules the head has.
        sam: The `SAM2Base` that it sits on.
    """

    def __init__(self, options: RefinerOptions, sam: Any) -> None:
        super().__init__()
        self.options = options
        channels = int(sam.sam_prompt_encoder.embed_dim)
        self._borrowed = _Borrowed(sam)
        self.la = LocalizationAugment(channels) if options.la else None
        block = sam.sam_mask_decoder.transformer.layers[-1]
        self.pr = PromptRetargeting(channels, block) if options.pr else None
        self.mr = MaskRefinement(channels, residual=options.residual, cues=options.cues) if options.mr else None

    @property
    def wants_pyramid(self) -> bool:
        return self.options.mr

    @property
    def augments(self) -> bool:
        return self.options.la

    @property
    def reads_tokens(self) -> bool:
        return self.options.pr

    def look(self, features: Features, encode: Encode) -> Seen:
        """Compute the augmented embedding of each image (LA), and keep what MR needs of it."""
        embedding, maps = None, []
        if self.la is not None:
            embedding = augmented(self.la, features, encode, self._borrowed.sam)
        if self.mr is not None:
            maps = [*features.pyramid, self.mr.look(features.images)]
        if self.options.cues:
            maps.append(F.avg_pool2d(colours_of(features.images), 2))
        return Seen(embedding, maps)

    def forward(self, seen: list[Tensor], prompted: Prompted, decoded: Decoded) -> HeadAnswer:
        """Return logits at S with MR, else at S/4. The decoder's predicted IoUs are kept."""
        sam = self._borrowed.sam
        logits, cells, tokens = decoded.logits[:, 0], decoded.cells, None
        if self.pr is not None:
            drawn = prompt_map(prompted.points, logits.detach(), side=sam.image_size).to(cells.dtype)
            tokens, cells = self.pr(drawn, decoded, sam.sam_prompt_encoder.get_dense_pe())
        if self.mr is not None:
            *pyramid, low_level = seen[:4]
            given = mask_maps(seen[4], prompted.sides, logits) if self.options.cues else None
            fine, auxiliary = self.mr(cells, pyramid, low_level, logits, given)
            return HeadAnswer(fine, None, auxiliary)
        if tokens is None:
            return HeadAnswer(logits, None, [])
        first = 2 if sam.sam_mask_decoder.pred_obj_scores else 1
        single = masks_of_tokens(sam, cells, tokens[:, first : first + 1], decoded.fine_maps)
        return HeadAnswer(single[:, 0], None, [])


class AugmentedDetailHead(nn.Module):
    """The detail head on top of LA: a `Head` that is not in the paper.

    Args:
        detail: The detail head.
        sam: The `SAM2Base` that it sits on.
    """

    wants_pyramid = False
    augments = True
    reads_tokens = False

    def __init__(self, detail: DetailHead, sam: Any) -> None:
        super().__init__()
        self._borrowed = _Borrowed(sam)
        self.la = LocalizationAugment(int(sam.sam_prompt_encoder.embed_dim))
        self.detail = detail

    def look(self, features: Features, encode: Encode) -> Seen:
        """Compute the augmented embedding of each image, for the decoder and for the detail head.

        The detail head takes no gradients from the decoder's mask, so it is through its features that LA learns.
        """
        embedding = augmented(self.la, features, encode, self._borrowed.sam)
        return Seen(embedding, self.detail.look(replace(features, embedding=embedding)).maps)

    def forward(self, seen: list[Tensor], prompted: Prompted, decoded: Decoded) -> HeadAnswer:
        """Return the detail head's answer, logits at S/2."""
        answer: HeadAnswer = self.detail(seen, prompted, decoded)
        return answer


def augmented(la: LocalizationAugment, features: Features, encode: Encode, sam: Any) -> Tensor:
    """Return the embedding of images after LA, (B, C, S/16, S/16)."""
    with torch.no_grad():
        local = assemble([encode(quarter) for quarter in quarters(features.images)])
    embedding: Tensor = la(features.embedding, local, sam.sam_prompt_encoder.pe_layer)
    return embedding


class _Borrowed:
    """The model that a head sits on. Its parameters are not the head's, and copies of the head share it."""

    def __init__(self, sam: Any) -> None:
        self.sam = sam

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Borrowed":
        return self


def quarters(images: Tensor) -> list[Tensor]:
    """Crop the four quarters of images (B, 3, S, S), row by row, and enlarge each to the whole side."""
    side = images.shape[-1]
    half = side // 2
    return [
        F.interpolate(
            images[..., top : top + half, left : left + half], size=(side, side), mode="bilinear", align_corners=False
        )
        for top in (0, half)
        for left in (0, half)
    ]


def assemble(maps: list[Tensor]) -> Tensor:
    """Put the maps of four quarters, (B, C, h, w) each, in their places: (B, C, 2 h, 2 w)."""
    upper_left, upper_right, lower_left, lower_right = maps
    return torch.cat((torch.cat((upper_left, upper_right), 3), torch.cat((lower_left, lower_right), 3)), 2)


def prompt_map(points: tuple[Tensor, Tensor] | None, logits: Tensor, *, side: int) -> Tensor:
    """Draw prompts as float32 (N, 3, S/4, S/4): discs at positive and at negative clicks, and the decoder's mask.

    Boxes are not drawn: they act through their tokens.

    Args:
        points: As in `Prompted`.
        logits: (N, S/4, S/4), of the decoder's mask; its sigmoid is drawn.
        side: S.
    """
    cells = logits.shape[-1]
    mask = logits.float().sigmoid()
    if points is None:
        empty = torch.zeros_like(mask)
        return torch.stack((empty, empty, mask), 1)
    coordinates, labels = points
    centres = torch.arange(cells, device=mask.device) + 0.5
    x, y = ((coordinates.float() + 0.5) * cells / side).unbind(-1)  # in cells; SAM 2 adds half a pixel, too
    squared = (centres - x[..., None])[:, :, None, :] ** 2 + (centres - y[..., None])[:, :, :, None] ** 2
    discs = squared <= max(DISC * side, 1.0) ** 2  # (N, P, S/4, S/4)
    drawn = [(discs & (labels == kind)[..., None, None]).any(1).float() for kind in (FOREGROUND, BACKGROUND)]
    return torch.stack((*drawn, mask), 1)


class _ChannelNorm(nn.LayerNorm):
    """Normalises over the channels of maps (B, C, h, w), like SAM 2's `LayerNorm2d`, in one operation."""

    def forward(self, maps: Tensor) -> Tensor:
        normed: Tensor = super().forward(maps.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class _Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1), _ChannelNorm(outputs), nn.GELU())


def _grid(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _cells(maps: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C)."""
    return maps.flatten(2).transpose(1, 2)


def _apart(x: Tensor) -> Tensor:
    """(B, cells, C) to (B, heads, cells, C / heads)."""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

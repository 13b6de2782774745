"""The embedded model prepared for inference: everything that depends on weights alone is computed once.

The functions are those of `modules.sam2_passes.see` and `modules.detail.DetailHead`, up to rounding:

* Position embeddings of the trunk are added ready-made, instead of being interpolated for every call.
* Feature pyramid and the decoder's projections of it are linear with nothing between them, so their matrices are
  multiplied beforehand. The maps at S/4 and S/8 are then computed with 16 and 48 channels instead of 128.
* Batch normalisation becomes part of the convolution before it.
* The detail head's convolutions of image and mask maps are split: their image part is computed once per image.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from refinetool.modules.detail import FULL, DetailHead, mask_maps
from refinetool.modules.embedded import EmbeddedModel
from refinetool.modules.heads import Decoded, Encode, Features, HeadAnswer, Prompted, Seen


class _Affine(NamedTuple):
    """A linear map of channels: weight (outputs, inputs), bias (outputs,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Map (B, h, w, inputs) to (B, h, w, outputs)."""
        return F.linear(x, self.weight, self.bias)

    def after(self, other: "_Affine") -> "_Affine":
        """Return the map that applies `other` first."""
        return _Affine(self.weight @ other.weight, self.weight @ other.bias + self.bias)

    def rows(self, rows: slice) -> "_Affine":
        return _Affine(self.weight[rows], self.bias[rows])

    def to(self, dtype: torch.dtype) -> "_Affine":
        return _Affine(self.weight.to(dtype), self.bias.to(dtype))


class FoldedEncoder:
    """Computes what `modules.sam2_passes.see` computes, for one size of input, apart from the pyramid.

    Args:
        model: In evaluation mode; shares its trunk.
        dtype: Of the products.
    """

    def __init__(self, model: EmbeddedModel, *, dtype: torch.dtype) -> None:
        self.trunk = model.image_encoder.trunk
        cells = model.image_size // 4
        with torch.no_grad():
            self.position = self.trunk._get_pos_embed((cells, cells))
            laterals = [_affine(level.conv) for level in reversed(model.image_encoder.neck.convs)]
            zero, first = _affine(model.sam_mask_decoder.conv_s0), _affine(model.sam_mask_decoder.conv_s1)
            both = _Affine(torch.cat((first.weight, zero.weight)), torch.cat((first.bias, zero.bias)))
            self.middle = len(first.bias)
            # The biases of coarser levels arrive through the sum with their features.
            linear = _Affine(both.weight, torch.zeros_like(both.bias))
            at_8 = linear.after(laterals[1])
            self.at_32, self.at_16, self.down = (m.to(dtype) for m in (laterals[3], laterals[2], linear))
            bias = torch.cat((at_8.bias[: self.middle] + first.bias, at_8.bias[self.middle :]))
            self.at_8 = _Affine(at_8.weight, bias).to(dtype)
            self.at_4 = zero.after(laterals[0]).to(dtype)
            self.no_memory = model.no_mem_embed.detach().flatten()

    def see(self, images: Tensor) -> Features:
        """Embed images (B, 3, S, S), ImageNet-normalised. Maps have channels last in memory."""
        stages = self._stages(images)
        features = self._coarsest(stages)
        at_8 = _onto(self.down(features), self.at_8(stages[1]))
        fine = _onto(at_8[..., self.middle :], self.at_4(stages[0]))
        embedding = (features + self.no_memory).permute(0, 3, 1, 2)
        return Features(images, (), embedding, [fine.permute(0, 3, 1, 2), at_8[..., : self.middle].permute(0, 3, 1, 2)])

    def encode(self, images: Tensor) -> Tensor:
        """Compute the features at S/16 alone, (B, C, S/16, S/16), without the embedding for "no memory"."""
        return self._coarsest(self._stages(images)).permute(0, 3, 1, 2)

    def _stages(self, images: Tensor) -> list[Tensor]:
        x = self.trunk.patch_embed(images) + self.position
        stages = []
        for number, block in enumerate(self.trunk.blocks):
            x = block(x)
            if number in self.trunk.stage_ends:
                stages.append(x)
        return stages

    def _coarsest(self, stages: list[Tensor]) -> Tensor:
        return _onto(self.at_32(stages[3]), self.at_16(stages[2]))


class FoldedHead:
    """A detail head without batch normalisation, for inference only.

    The image part of its first convolution comes in the place of the image features at S/2: its maps do not fit
    `DetailHead`.

    Args:
        head: In evaluation mode; it is copied.
        dtype: Of the convolutions.
    """

    wants_pyramid = False
    augments = False
    reads_tokens = False

    def __init__(self, head: DetailHead, *, dtype: torch.dtype) -> None:
        head = _without_norms(copy.deepcopy(head)).requires_grad_(False)
        enter = head.enter[0]
        assert isinstance(enter, nn.Conv2d)
        taps = head.leave.weight[0].float().flip(1, 2).flatten(1)
        self.leave_image, self.leave_given = taps[:FULL], taps[FULL:]
        assert head.leave.bias is not None
        self.leave_bias = float(head.leave.bias)
        self.enter_image, self.enter_given = (_part(enter, slice(FULL)), _part(enter, slice(FULL, None)))
        self.enter_given.bias = None
        self.head = head.to(memory_format=torch.channels_last)
        for convolution in (self.enter_image, self.enter_given, *self.head.modules()):
            if isinstance(convolution, nn.Conv2d):
                convolution.to(dtype).to(memory_format=torch.channels_last)

    def look(self, features: Features, encode: Encode | None = None) -> Seen:
        """Do the same as `DetailHead.look`, apart from the maps at S/2, which the first convolution has processed."""
        colours, image, *levels = self.head.look(features, encode).maps
        return Seen(None, [colours, self.enter_image(image), *levels])

    def __call__(self, seen: list[Tensor], prompted: Prompted, decoded: Decoded) -> HeadAnswer:
        """Return mask logits (N, S/2, S/2) and predicted IoUs (N,), see `DetailHead.forward`."""
        colours, image, *features = seen
        given = mask_maps(colours, prompted.sides, decoded.logits[:, 0])
        x = self.enter_given(given.to(memory_format=torch.channels_last)).add_(image).relu_()
        refined, deepest = self.head.correct(x, features)
        # One output channel is too few for a convolution kernel: multiply for all nine offsets, then add shifted maps.
        taps = self.leave_image.T @ refined.flatten(2).float() + self.leave_given.T @ given.flatten(2)
        logits = F.fold(taps, given.shape[-2:], 3, padding=1)[:, 0] + self.leave_bias
        return HeadAnswer(logits, self.head.score(deepest), [])


def _onto(coarse: Tensor, fine: Tensor) -> Tensor:
    """Add a map (B, h, w, C) to one of twice the size, each cell to four."""
    b, height, width, channels = coarse.shape
    cells = fine.view(b, height, 2, width, 2, channels) + coarse.view(b, height, 1, width, 1, channels)
    return cells.view(fine.shape)


def _affine(convolution: nn.Conv2d) -> _Affine:
    """Return a convolution with kernels of one pixel as a linear map."""
    assert convolution.bias is not None
    return _Affine(convolution.weight.detach()[:, :, 0, 0].float(), convolution.bias.detach().float())


def _part(convolution: nn.Conv2d, inputs: slice) -> nn.Conv2d:
    """Return a convolution of some of the input channels."""
    part = copy.deepcopy(convolution)
    part.weight = nn.Parameter(convolution.weight[:, inputs].clone(), requires_grad=False)
    part.in_channels = part.weight.shape[1]
    return part


def _without_norms(head: DetailHead) -> DetailHead:
    """Merge every batch normalisation into the convolution before it, in place."""
    for module in head.modules():
        if isinstance(module, nn.Sequential):
            for place, (first, second) in enumerate(zip(list(module), list(module)[1:], strict=False)):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    module[place], module[place + 1] = fuse_conv_bn_eval(first, second), nn.Identity()
    return head

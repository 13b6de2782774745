"""The detail head: a small U-Net that sees the image, the coarse mask and the decoder's output side by side.

A SAM-type decoder gets the coarse mask on a grid of S/4 cells, mixes it into features of S/16, and predicts at S/4. A
pixel-exact coarse outline is lost on the way. The detail head compares outline and image at S/2, where both are still
fine, and uses the output and the features of the SAM 2 part, which carry knowledge about the object.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.modules.cues import colour_cue, place_cue
from refinetool.modules.heads import Decoded, Encode, Features, HeadAnswer, Prompted, Seen
from refinetool.modules.sam2_passes import colours_of

FULL, HALF, QUARTER, EIGHTH = 16, 32, 64, 128
"""Channels at S/2, S/4, S/8 and S/16."""
GIVEN = 6
"""Number of mask maps at S/2: coarse mask, decoder's output, and the colour and place cues of both."""
DECODERS_ANSWER = FULL + 1
"""Channel of the decoder's output, which follows the channels at S/2."""
LOGIT_BOUND, LOGIT_SCALE = 16.0, 4.0
"""The decoder's logits are clamped and divided, so that they have the scale of the other inputs."""
HEADS = 4


class DetailHead(nn.Module):
    """A `Head` that corrects the decoder's mask on a grid of S/2 and predicts the IoU of the result.

    An untrained head returns the decoder's mask, upsampled.

    Args:
        fine_channels: Channels of the decoder's fine maps at S/4 and S/8.
        channels: Channels of the embedding at S/16.
    """

    wants_pyramid = False
    augments = False
    reads_tokens = False

    def __init__(self, *, fine_channels: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_Block(3, FULL, stride=2), nn.Conv2d(FULL, FULL, 3, padding=1))
        self.features = nn.ModuleList(
            (
                nn.Conv2d(fine_channels[0], HALF, 1),
                nn.Conv2d(fine_channels[1], QUARTER, 1),
                nn.Conv2d(channels, EIGHTH, 1),
            )
        )
        self.enter = _Block(FULL + GIVEN, FULL)
        self.down = nn.ModuleList(
            (_Block(FULL, HALF, stride=2), _Block(HALF, QUARTER, stride=2), _Block(QUARTER, EIGHTH, stride=2))
        )
        self.encode = nn.ModuleList(
            (
                _Residual(HALF),
                nn.Sequential(_Residual(QUARTER), _Residual(QUARTER)),
                nn.Sequential(
                    _Residual(EIGHTH),
                    _Attention(EIGHTH),
                    _Residual(EIGHTH),
                    _Residual(EIGHTH),
                    _Attention(EIGHTH),
                    _Residual(EIGHTH),
                ),
            )
        )
        self.narrow = nn.ModuleList(
            (nn.Conv2d(EIGHTH, QUARTER, 1), nn.Conv2d(QUARTER, HALF, 1), nn.Conv2d(HALF, FULL, 1))
        )
        self.decode = nn.ModuleList((_Residual(QUARTER), _Residual(HALF), _Block(FULL, FULL)))
        self.leave = nn.Conv2d(FULL + GIVEN, 1, 3, padding=1)
        self.iou = nn.Sequential(nn.Linear(EIGHTH, 64), nn.ReLU(), nn.Linear(64, 1))
        self._begin_with_the_decoders_answer()

    def _begin_with_the_decoders_answer(self) -> None:
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        with torch.no_grad():
            self.leave.weight[0, DECODERS_ANSWER, 1, 1] = LOGIT_SCALE

    def look(self, features: Features, encode: Encode | None = None) -> Seen:  # noqa: ARG002
        """Compute colours at S/2, then maps at S/2, S/4, S/8 and S/16, one row per image each."""
        colours = F.avg_pool2d(colours_of(features.images), 2)
        maps = zip(self.features, (*features.fine_maps, features.embedding), strict=True)
        return Seen(None, [colours, self.stem(features.images), *(project(level) for project, level in maps)])

    def forward(self, seen: list[Tensor], prompted: Prompted, decoded: Decoded) -> HeadAnswer:
        """Return mask logits (N, S/2, S/2) and predicted IoUs (N,) in 0..1."""
        colours, image, *features = seen
        given = mask_maps(colours, prompted.sides, decoded.logits[:, 0]).to(image.dtype)
        x, deepest = self.correct(self.enter(torch.cat((image, given), 1)), features)
        return HeadAnswer(self.leave(torch.cat((x, given), 1))[:, 0], self.score(deepest), [])

    def correct(self, entered: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Run the U-Net itself on maps at S/2: returns maps at S/2 (N, FULL, h, w), and the deepest ones at S/16."""
        levels = [entered]
        for shrink, encode, feature in zip(self.down, self.encode, features, strict=True):
            levels.append(encode(shrink(levels[-1]) + feature))
        deepest = x = levels.pop()
        for narrow, decode in zip(self.narrow, self.decode, strict=True):
            wide = F.interpolate(narrow(x), scale_factor=2.0, mode="bilinear", align_corners=False)
            x = decode(wide + levels.pop())
        return x, deepest

    def score(self, deepest: Tensor) -> Tensor:
        """Predict IoUs (N,) in 0..1 from the deepest maps."""
        *hidden, last = self.iou
        features = nn.Sequential(*hidden)(deepest.float().mean((2, 3)))
        # Summed row by row, because the matrix kernel for a single output rounds differently by position in the batch.
        score: Tensor = ((features * last.weight).sum(1) + last.bias).sigmoid()
        return score


def mask_maps(colours: Tensor, coarse: Tensor, logits: Tensor) -> Tensor:
    """Return what is known of the mask at S/2, float32 (N, GIVEN, h, w): the masks, and the cues of each.

    Args:
        colours: (N, 3, h, w), RGB in 0..1.
        coarse: float32 (N, h, w): 1, -1 or 0, see `heads.Prompted`.
        logits: (N, h/2, w/2), the decoder's output.
    """
    with torch.no_grad(), torch.autocast(coarse.device.type, enabled=False):
        enlarged = F.interpolate(logits[:, None].float(), size=coarse.shape[-2:], mode="bilinear", align_corners=False)
        answer = enlarged[:, 0].clamp(-LOGIT_BOUND, LOGIT_BOUND) / LOGIT_SCALE
        both = torch.stack((coarse, answer), 1)
        of_coarse, of_answer = torch.stack([cue(colours.float(), both) for cue in (colour_cue, place_cue)], 2).unbind(1)
        known = (coarse != 0)[:, None]
        return torch.cat((both, of_coarse * known, of_answer), 1)


class _Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _Block(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class _Attention(nn.Module):
    """Residual self-attention over all cells, which relates similar parts of the mask. Initially the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.enter = nn.Linear(channels, 3 * channels)
        self.leave = nn.Linear(channels, channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        cells = self.norm(x.flatten(2).transpose(1, 2))
        query, key, value = self.enter(cells).view(n, -1, 3, HEADS, channels // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, -1, channels)
        added: Tensor = self.leave(mixed).transpose(1, 2).view(n, channels, height, width)
        return x + added

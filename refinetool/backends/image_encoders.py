"""Frozen image encoders for the reference encoder, by name: `load_image_encoder`.

An image is squashed to a square of T pixels. Its mid-level features say where things are, its high-level features what
they are; both are on the same grid. No encoder is ever trained: batch normalisation uses its stored statistics.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.backends import weights
from refinetool.backends.models import embedded_weights, is_random, misfit, pick_device, read_state, seeded
from refinetool.backends.names import suggest
from refinetool.errors import UsageError, WeightsError
from refinetool.modules.embedded import IMAGE_SIZE, build_embedded
from refinetool.modules.head_files import state_digest
from refinetool.modules.sam2_passes import normalised
from refinetool.records import ImageArray, Size


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Features of B images on one grid: mid (B, mid_channels, h, w), high (B, D, h, w)."""

    mid: Tensor
    high: Tensor

    @property
    def grid(self) -> Size:
        """(h, w)."""
        return self.mid.shape[-2], self.mid.shape[-1]

    def row(self, index: int) -> "Features":
        """Return the features of one image, with a batch axis."""
        return Features(self.mid[index : index + 1], self.high[index : index + 1])

    def expand(self, count: int) -> "Features":
        """Repeat the features of a single image, without copying them."""
        return Features(self.mid.expand(count, -1, -1, -1), self.high.expand(count, -1, -1, -1))


def stacked(several: "list[Features]") -> Features:
    """Join features of several images along the batch axis."""
    return Features(torch.cat([one.mid for one in several]), torch.cat([one.high for one in several]))


class ImageEncoder(nn.Module, ABC):
    """A frozen network. Subclasses build it, and say which of its maps are used."""

    side: int
    """T, the side of the square input in pixels."""
    mid_channels: int
    wants_checkpoint: str | None = None
    """Where to get the weights, for encoders whose weights the user has to name."""

    name: str
    fingerprint: str
    """Hash of the name and the weights."""
    network: Any
    """What has weights."""

    def pixels(self, image: ImageArray) -> Tensor:
        """Squash an image, uint8 (H, W, 3), to the input of the network, float32 (3, T, T), on its device."""
        device = next(self.parameters()).device
        values = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1).float() / 255
        square = (self.side, self.side)
        resized = F.interpolate(values[None], square, mode="bilinear", align_corners=False, antialias=True)[0]
        return normalised(resized)

    @abstractmethod
    def forward(self, pixels: Tensor) -> Features:
        """Compute the features of images (B, 3, T, T)."""

    def annotated(self, features: Features, annotation: Tensor) -> Tensor:
        """Return the high-level features of the annotated cells, (B, D, h, w), zero outside.

        Args:
            annotation: float (B, 1, h, w) of 0 and 1.
        """
        return features.high * annotation


class ResNet50(ImageEncoder):
    """torchvision's ResNet-50; layers 3 and 4 are dilated, so that layers 2 to 4 share the grid of T/8.

    The authors' release uses a ResNet with a deeper stem, whose weights are not published by a stable address.
    """

    side = 512
    mid_channels = 512 + 1024

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet50

        self.network = resnet50(replace_stride_with_dilation=[False, True, True])

    def forward(self, pixels: Tensor) -> Features:
        network = self.network
        x = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(pixels)))))
        second = network.layer2(x)
        third = network.layer3(second)
        return Features(torch.cat((second, third), dim=1), network.layer4(third))

    def annotated(self, features: Features, annotation: Tensor) -> Tensor:
        """Compute the last layer of the annotated cells alone, so that it sees nothing of their surroundings."""
        high: Tensor = self.network.layer4(features.mid[:, 512:] * annotation)
        return high * annotation


class Vgg16(ImageEncoder):
    """torchvision's VGG-16 with batch normalisation; all maps are on the grid of T/16, without the last pool."""

    side = 512
    mid_channels = 256 + 512
    wants_checkpoint = "https://download.pytorch.org/models/vgg16_bn-6c64b313.pth"

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16_bn

        self.network = vgg16_bn()

    def forward(self, pixels: Tensor) -> Features:
        layers = self.network.features
        third = layers[14:24](layers[:14](pixels))
        fourth = layers[24:34](third)
        third = F.interpolate(third, fourth.shape[-2:], mode="bilinear", align_corners=True)
        return Features(torch.cat((third, fourth), dim=1), layers[34:43](fourth))

    def annotated(self, features: Features, annotation: Tensor) -> Tensor:
        """Compute the last block of the annotated cells alone."""
        high: Tensor = self.network.features[34:43](features.mid[:, 256:] * annotation)
        return high * annotation


class DinoV2(ImageEncoder):
    """DINOv2 with ViT-B/14, built by timm: blocks 6 and 9 of 12, and the last one after the final norm, at T/14."""

    side = 518
    mid_channels = 2 * 768
    wants_checkpoint = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.network: Any = timm.create_model("vit_base_patch14_dinov2", pretrained=False, img_size=self.side)

    def forward(self, pixels: Tensor) -> Features:
        lower = self.network.get_intermediate_layers(pixels, n=[5, 8], reshape=True, norm=False)
        (last,) = self.network.get_intermediate_layers(pixels, n=1, reshape=True, norm=True)
        return Features(torch.cat(lower, dim=1), last)


class EmbeddedTrunk(ImageEncoder):
    """The trunk of the embedded model: its last two stages on the grid of T/16."""

    side = 384
    mid_channels = 128 + 256

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = build_embedded(image_size=IMAGE_SIZE).image_encoder.trunk

    def forward(self, pixels: Tensor) -> Features:
        _, _, third, fourth = self.network(pixels)
        fourth = F.interpolate(fourth, third.shape[-2:], mode="bilinear", align_corners=False)
        return Features(torch.cat((third, fourth), dim=1), fourth)


IMAGE_ENCODERS: dict[str, type[ImageEncoder]] = {
    "embedded": EmbeddedTrunk,
    "resnet50": ResNet50,
    "vgg16": Vgg16,
    "dinov2-b14": DinoV2,
}
"""All image encoders by name. To add one, add a subclass of `ImageEncoder` and a line."""

TRUNK = "image_encoder.trunk."


def find_image_encoder(name: str) -> type[ImageEncoder]:
    """Return the class of an image encoder; raises UsageError for an unknown name."""
    try:
        return IMAGE_ENCODERS[name]
    except KeyError:
        raise UsageError(f"there is no image encoder {name!r}; {suggest(name, IMAGE_ENCODERS)}") from None


def load_image_encoder(name: str, *, checkpoint: str | None, device: str) -> ImageEncoder:
    """Build an image encoder and load its weights.

    Args:
        name: One of `IMAGE_ENCODERS`.
        checkpoint: A weights file; `random:SEED`; None for the weights in the package (`embedded`) or in the cache.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: The name, the device or the seed does not exist.
        WeightsError: The weights are missing, unreadable or of another network; the message says how to get them.
    """
    kind = find_image_encoder(name)
    if is_random(checkpoint):
        encoder = seeded(checkpoint, kind)
    else:
        encoder = kind()
        path = _source(name, kind, checkpoint)
        state = _renamed(encoder, name, read_state(path))
        problem = misfit(expected=encoder.network.state_dict(), found=state)
        if problem:
            raise WeightsError(f"{path} does not fit the image encoder {name}: {problem}. Name another file")
        encoder.network.load_state_dict(state)
    encoder.name = name
    encoder.fingerprint = f"{name} {state_digest(encoder.network.state_dict())}"
    return encoder.requires_grad_(False).eval().to(pick_device(device))


def _source(name: str, kind: type[ImageEncoder], checkpoint: str | None) -> Any:
    if checkpoint is not None:
        return weights.user_path(checkpoint)
    if kind is EmbeddedTrunk:
        return embedded_weights()
    if kind.wants_checkpoint is not None:
        raise WeightsError(
            f"the image encoder {name} needs weights: download {kind.wants_checkpoint} and name the file with "
            "--encoder-checkpoint"
        )
    return weights.cached(name)[0]


def _renamed(encoder: ImageEncoder, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a published file under the names of our network."""
    if name == "embedded":
        return {key.removeprefix(TRUNK): value for key, value in state.items() if key.startswith(TRUNK)}
    if name == "dinov2-b14":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from timm.models.vision_transformer import checkpoint_filter_fn
        kept = {key: value for key, value in state.items() if key != "mask_token"}
        return dict(checkpoint_filter_fn(kept, encoder.network))
    return state

"""One step of training the embedded model: its prompts, its losses, its moving average."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from refinetool.backends.sam2 import IMAGE_MEAN, IMAGE_STD
from refinetool.modules.embedded import CHANNELS, build_embedded, decode, encode, set_image_size
from refinetool.records import ABSENT
from refinetool.settings import TrainSettings
from refinetool.train.examples import Example
from refinetool.train.losses import edge_loss, mask_loss


class PromptKinds(NamedTuple):
    """Which prompts a decoder call gives. A point left out keeps its place with label -1, as it does in use."""

    box: bool
    positive: bool
    negative: bool
    mask: bool


FULL = PromptKinds(box=True, positive=True, negative=True, mask=True)
BOX_ONLY = PromptKinds(box=True, positive=False, negative=False, mask=False)
WITHOUT_MASK = (
    BOX_ONLY,
    PromptKinds(box=False, positive=True, negative=True, mask=False),
    PromptKinds(box=False, positive=True, negative=False, mask=False),
    PromptKinds(box=True, positive=True, negative=True, mask=False),
)
"""Prompts that force the model to look at the image: with the mask, copying the coarse outline is an easy start."""
WITH_MASK = (
    PromptKinds(box=False, positive=False, negative=False, mask=True),
    PromptKinds(box=True, positive=False, negative=False, mask=True),
    PromptKinds(box=False, positive=True, negative=True, mask=True),
)


class Trainee(nn.Module):
    """The model and the edge heads that only training needs."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.model: SAM2Base = build_embedded(image_size=image_size)
        self.fine_edges = nn.Conv2d(CHANNELS // 8, 1, 3, padding=1)
        self.coarse_edges = nn.Conv2d(CHANNELS, 1, 1)


def train_step(
    trainee: Trainee,
    average: SAM2Base,
    optimizer: torch.optim.Optimizer,
    batch: Example,
    *,
    step: int,
    learning_rate: float,
    settings: TrainSettings,
) -> tuple[Tensor, Tensor]:
    """One step on a batch; returns the loss and the mean IoU of the single-mask output for full prompts.

    They stay on the device, so that the next step need not wait for this one.
    """
    device = batch.image.device
    on_host = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    noise = torch.Generator(device).manual_seed(settings.seed * 1_000_003 + step)
    trainee.train()
    set_image_size(trainee.model, batch.image.shape[-1])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

    full_iou = torch.zeros((), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        embedding, fine_maps = encode(trainee.model, normalise(batch.image))
        edges = batch.edges.float()
        edge = edge_loss(trainee.fine_edges(fine_maps[0]), edges)
        edge = edge + edge_loss(trainee.coarse_edges(embedding), F.max_pool2d(edges[:, None], 4)[:, 0])
    total = settings.edge_loss * edge
    for rows, kinds in prompt_groups(settings.prompts_per_image, on_host):
        with torch.autocast(device.type, torch.bfloat16):
            logits, predicted_iou = ask(
                trainee.model, embedding, fine_maps, batch, rows=rows, kinds=kinds, generator=noise
            )
        targets = batch.targets[:, rows].flatten(0, 1).float() / 255
        weights = batch.weights[:, rows].flatten(0, 1).float() / 40
        losses = mask_loss(logits, predicted_iou, targets, weights)
        total = total + (losses.mask + losses.iou) * len(rows) / settings.prompts_per_image
        if kinds == FULL:
            full_iou = losses.true_iou[:, 0].mean()

    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
    optimizer.step()
    decay = min(settings.average_decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(trainee.model.parameters()), 1 - decay)
    return total.detach(), full_iou


def prompt_groups(count: int, generator: torch.Generator) -> list[tuple[list[int], PromptKinds]]:
    """Split the K prompts of every image: half get all prompts, a quarter none of the mask, a quarter parts with it.

    Each group is one decoder call, so that the number of tokens in a call is what it is in use.
    """
    order = torch.randperm(count, generator=generator).tolist()
    half = count - count // 2
    middle = half + (count - half + 1) // 2
    groups = [(order[:half], FULL)]
    for rows, kinds in ((order[half:middle], WITHOUT_MASK), (order[middle:], WITH_MASK)):
        if rows:
            groups.append((rows, kinds[int(torch.randint(len(kinds), (1,), generator=generator))]))
    return groups


def ask(
    model: SAM2Base,
    embedding: Tensor,
    fine_maps: list[Tensor],
    batch: Example,
    *,
    rows: list[int],
    kinds: PromptKinds,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Decode some prompts of every image: logits (B x rows, 4, S/4, S/4) and predicted IoUs.

    A generator adds noise to the mask prompt inside the object, so that its exact values can't be relied on.
    """
    owner = torch.arange(len(embedding), device=embedding.device).repeat_interleave(len(rows))
    points = batch.points[:, rows].flatten(0, 1)
    labels = batch.labels[:, rows].flatten(0, 1).clone()
    if not kinds.positive:
        labels[:, 2] = ABSENT
    if not kinds.negative:
        labels[:, 3] = ABSENT
    if not kinds.box:
        points, labels = points[:, 2:], labels[:, 2:]
    masks = None
    if kinds.mask:
        masks = batch.masks[:, rows].flatten(0, 1)[:, None]
        if generator is not None:
            noise = torch.randn(masks.shape, generator=generator, device=masks.device)
            masks = masks + 0.5 * noise * (masks > 0)
    maps = [fine[owner] for fine in fine_maps]
    return decode(model, embedding[owner], maps, points=(points, labels), masks=masks)


def build_optimizer(trainee: Trainee, *, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW without weight decay on vectors, embeddings and tokens."""
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, parameter in trainee.named_parameters():
        exempt = parameter.ndim < 2 or "embed" in name or "token" in name
        (plain if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = next(trainee.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=fused)


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to ImageNet-normalised float32."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() / 255 - mean) / std

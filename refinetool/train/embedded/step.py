"""One training step of the embedded model: prompts, losses, and the moving average of the weights."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.backends.sam2 import IMAGE_MEAN, IMAGE_STD
from refinetool.modules.embedded import CHANNELS, EmbeddedModel, Encoded, build_embedded, decode, encode, set_image_size
from refinetool.records import ABSENT
from refinetool.settings import TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.embedded.losses import detail_loss, edge_loss, harm_loss, mask_loss


class PromptKinds(NamedTuple):
    """Which prompts a decoder call contains. An omitted point keeps its position with label -1, as in inference."""

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
"""Prompts that force the model to use the image; with a mask prompt, it could copy the coarse outline."""
WITH_MASK = (
    PromptKinds(box=False, positive=False, negative=False, mask=True),
    PromptKinds(box=True, positive=False, negative=False, mask=True),
    PromptKinds(box=False, positive=True, negative=True, mask=True),
)


class Trainee(nn.Module):
    """The model with the edge heads that are needed only for training.

    Args:
        part: What is trained: `all` of it, or only the `detail` head.
    """

    def __init__(self, image_size: int, *, part: Literal["all", "detail"]) -> None:
        super().__init__()
        self.model = build_embedded(image_size=image_size)
        self.fine_edges = nn.Conv2d(CHANNELS // 8, 1, 3, padding=1)
        self.coarse_edges = nn.Conv2d(CHANNELS, 1, 1)
        if part == "detail":
            self.requires_grad_(False)
            self.model.detail.requires_grad_(True)


def train_step(
    trainee: Trainee,
    average: EmbeddedModel,
    optimizer: torch.optim.Optimizer,
    batch: Example,
    *,
    step: int,
    learning_rate: float,
    settings: TrainSettings,
) -> tuple[Tensor, Tensor]:
    """Train one step on a batch; returns the loss and the mean IoU of the detail head's masks for full prompts.

    Both stay on the device, so that the next step need not wait for this one.
    """
    device = batch.image.device
    on_host = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    noise = torch.Generator(device).manual_seed(settings.seed * 1_000_003 + step)
    model, whole = trainee.model, settings.part == "all"
    trainee.train(whole)
    model.detail.train()
    set_image_size(model, batch.image.shape[-1])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

    total = torch.zeros((), device=device)
    groups = prompt_groups(settings.prompts_per_image, on_host)
    with torch.autocast(device.type, torch.bfloat16):
        encoded = look(model, batch.image)
        questions = [pose(encoded, batch, rows=rows, kinds=kinds, generator=noise) for rows, kinds in groups]
        answers = [answer(model, question) for question in questions]
        coarse = torch.cat([question.coarse for question in questions])
        refined, score = model.detail(
            [torch.cat(level) for level in zip(*(question.encoded.seen for question in questions), strict=True)],
            coarse,
            torch.cat([logits[:, 0] for logits, _ in answers]),
        )
        if whole:
            total = total + settings.edge_loss * edge_losses(trainee, encoded, batch.edges.float())
    if whole:
        for question, (logits, predicted_iou) in zip(questions, answers, strict=True):
            losses = mask_loss(logits, predicted_iou, question.targets, question.weights)
            total = total + (losses.mask + losses.iou) * len(question.targets) / len(refined)
    target = torch.cat([question.targets for question in questions])
    weight = torch.cat([question.weights for question in questions])
    losses = detail_loss(refined, score, target=target, weight=weight)
    total = total + losses.mask + losses.iou
    total = total + settings.harm_loss * harm_loss(refined, coarse=coarse, target=target, weight=weight)

    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
    optimizer.step()
    decay = min(settings.average_decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(_floats(average), _floats(model), 1 - decay)
    # Full prompts are the first group.
    return total.detach(), losses.true_iou[: len(questions[0].targets), 0].mean()


def _floats(model: nn.Module) -> list[Tensor]:
    """Return the averaged tensors: parameters, and the running statistics of batch normalisation."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


def edge_losses(trainee: Trainee, encoded: Encoded, edges: Tensor) -> Tensor:
    """Compute the loss of predicting edges (B, S/4, S/4) from the features at S/4 and S/16."""
    fine = edge_loss(trainee.fine_edges(encoded.fine_maps[0]), edges)
    return fine + edge_loss(trainee.coarse_edges(encoded.embedding), F.max_pool2d(edges[:, None], 4)[:, 0])


def prompt_groups(count: int, generator: torch.Generator) -> list[tuple[list[int], PromptKinds]]:
    """Split the K prompts of every image: half are full, a quarter lack the mask, a quarter have the mask and some
    others.

    Each group is one decoder call, so that the number of tokens per call is the same as in inference.
    """
    order = torch.randperm(count, generator=generator).tolist()
    half = count - count // 2
    middle = half + (count - half + 1) // 2
    groups = [(order[:half], FULL)]
    for rows, kinds in ((order[half:middle], WITHOUT_MASK), (order[middle:], WITH_MASK)):
        if rows:
            groups.append((rows, kinds[int(torch.randint(len(kinds), (1,), generator=generator))]))
    return groups


class Question(NamedTuple):
    """N = B x rows prompts of one kind.

    encoded: one row per prompt.
    points, masks: in the format of `decode`.
    coarse: (N, S/2, S/2), 1 inside the coarse mask and -1 outside, or 0 everywhere if the prompts have no mask.
    targets, weights: float32 (N, S/2, S/2), the fraction of each cell that the object covers, and its loss weight.
    """

    encoded: Encoded
    points: tuple[Tensor, Tensor]
    masks: Tensor | None
    coarse: Tensor
    targets: Tensor
    weights: Tensor


def look(model: EmbeddedModel, images: Tensor) -> Encoded:
    """Embed uint8 images (B, 3, S, S)."""
    colours = images.float() / 255
    return encode(model, normalise(colours), colours)


def pose(
    encoded: Encoded, batch: Example, *, rows: list[int], kinds: PromptKinds, generator: torch.Generator | None
) -> Question:
    """Make a question from some prompts of every image.

    A generator adds noise to the mask prompt inside the object, so that the model does not rely on its exact values.
    """
    owner = torch.arange(len(batch.image), device=batch.image.device).repeat_interleave(len(rows))
    points = batch.points[:, rows].flatten(0, 1)
    labels = batch.labels[:, rows].flatten(0, 1).clone()
    if not kinds.positive:
        labels[:, 2] = ABSENT
    if not kinds.negative:
        labels[:, 3] = ABSENT
    if not kinds.box:
        points, labels = points[:, 2:], labels[:, 2:]
    coarse = batch.coarse[:, rows].flatten(0, 1).float() * 2 - 1
    masks = None
    if kinds.mask:
        masks = batch.masks[:, rows].flatten(0, 1)[:, None]
        if generator is not None:
            noise = torch.randn(masks.shape, generator=generator, device=masks.device)
            masks = masks + 0.5 * noise * (masks > 0)
    else:
        coarse = torch.zeros_like(coarse)
    targets = batch.targets[:, rows].flatten(0, 1).float() / 255
    weights = batch.weights[:, rows].flatten(0, 1).float() / 40
    return Question(encoded.rows(owner), (points, labels), masks, coarse, targets, weights)


def answer(model: EmbeddedModel, question: Question) -> tuple[Tensor, Tensor]:
    """Run the decoder: logits (N, 4, S/4, S/4) and predicted IoUs (N, 4)."""
    return decode(model, question.encoded, points=question.points, masks=question.masks)


def refine(model: EmbeddedModel, question: Question) -> tuple[Tensor, Tensor]:
    """Run the decoder and the detail head: logits (N, S/2, S/2) and predicted IoUs (N,)."""
    logits, _ = answer(model, question)
    refined: tuple[Tensor, Tensor] = model.detail(question.encoded.seen, question.coarse, logits[:, 0])
    return refined


def build_optimizer(trainee: Trainee, *, settings: TrainSettings) -> torch.optim.Optimizer:
    """Build AdamW without weight decay on vectors, embeddings and tokens; frozen parameters are left out."""
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, parameter in trainee.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or "embed" in name or "token" in name
        (plain if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = next(trainee.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=fused)


def normalise(colours: Tensor) -> Tensor:
    """Apply ImageNet normalisation to RGB in 0..1, (B, 3, S, S)."""
    mean, std = (torch.tensor(values, device=colours.device).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (colours - mean) / std

"""Training the embedded model from random weights: set up, step, validate, save, export.

The learning rate rises, stays on a plateau and falls over the last third, so a run can be lengthened by resuming it
with more steps before the fall begins. The moving average of the weights is what is measured and shipped.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn
from torch.utils.data import DataLoader

from refinetool.backends.sam2 import IMAGE_MEAN, IMAGE_STD
from refinetool.errors import DataError
from refinetool.modules.embedded import CHANNELS, IMAGE_SIZE, build_embedded, decode, encode, set_image_size
from refinetool.records import ABSENT
from refinetool.settings import TrainSettings
from refinetool.train.data import Example, ExampleSource, index_folder
from refinetool.train.losses import edge_loss, hard_iou, mask_loss

VALIDATION_SEED = 1_000_003


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


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """One report of a run: after every step, with validation figures when there are new ones."""

    step: int
    steps: int
    loss: float
    iou: float
    images_per_second: float
    validation: dict[str, float] | None


class Trainee(nn.Module):
    """The model and the edge heads that only training needs."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.model: SAM2Base = build_embedded(image_size=image_size)
        self.fine_edges = nn.Conv2d(CHANNELS // 8, 1, 3, padding=1)
        self.coarse_edges = nn.Conv2d(CHANNELS, 1, 1)


def train_embedded(
    data: Sequence[Path],
    output: Path,
    *,
    settings: TrainSettings,
    device: str,
    resume: bool,
    on_progress: Callable[[TrainProgress], None],
) -> Path:
    """Train and export the embedded model.

    Args:
        data: Folders as `train.data` describes them; their train lists teach, their val lists are measured.
        output: Folder for `checkpoint.pt`, `metrics.jsonl` and the exported `embedded.safetensors`.
        resume: Continue from `output/checkpoint.pt`; the result equals that of an uninterrupted run on one device.

    Returns:
        The exported weights: fp16 safetensors with the recipe in the file's metadata.

    Raises:
        DataError: a folder is not as described, or `resume` finds no checkpoint.
    """
    torch.manual_seed(settings.seed)
    output.mkdir(parents=True, exist_ok=True)
    source = _source(data, "train", settings, partial(_side_of_example, settings), seed=settings.seed)
    validation = _source(data, "val", settings, _full_side, seed=VALIDATION_SEED)
    trainee = Trainee(IMAGE_SIZE).to(device)
    average = copy.deepcopy(trainee.model).eval()
    optimizer = build_optimizer(trainee, settings=settings)
    checkpoint = output / "checkpoint.pt"
    start = load_checkpoint(checkpoint, trainee, average, optimizer) if resume else 0

    began = time.monotonic()
    batches = _batches(source, settings=settings, start=start)
    for step, batch in zip(range(start + 1, settings.steps + 1), batches, strict=False):
        loss, iou = train_step(
            trainee, average, optimizer, _to(batch, device), step=step, settings=settings, device=device
        )
        figures = None
        if step % settings.validate_every == 0 or step == settings.steps:
            figures = validate(average, validation, settings=settings, device=device)
        rate = (step - start) * settings.images_per_step / (time.monotonic() - began)
        progress = TrainProgress(step, settings.steps, loss, iou, rate, figures)
        if figures or step % 50 == 0:
            with (output / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(asdict(progress)) + "\n")
        on_progress(progress)
        if step % settings.save_every == 0 or step == settings.steps:
            save_checkpoint(checkpoint, trainee, average, optimizer, step)
            export(average, output / "embedded.safetensors", step=step, settings=settings, data=data)
    return output / "embedded.safetensors"


def train_step(
    trainee: Trainee,
    average: SAM2Base,
    optimizer: torch.optim.Optimizer,
    batch: Example,
    *,
    step: int,
    settings: TrainSettings,
    device: str,
) -> tuple[float, float]:
    """One step on a batch; returns the loss and the mean IoU of the single-mask output for full prompts."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    trainee.train()
    set_image_size(trainee.model, side_at(step, settings=settings))
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * rate_at(step, settings=settings)

    total = torch.zeros((), device=device)
    full_iou = 0.0
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        embedding, fine_maps = encode(trainee.model, normalise(batch.image))
        edges = batch.edges.float()
        edge = edge_loss(trainee.fine_edges(fine_maps[0]), edges)
        edge = edge + edge_loss(trainee.coarse_edges(embedding), F.max_pool2d(edges[:, None], 4)[:, 0])
    for rows, kinds in prompt_groups(settings.prompts_per_image, generator):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits, predicted_iou = ask(
                trainee.model, embedding, fine_maps, batch, rows=rows, kinds=kinds, generator=generator
            )
        targets = batch.targets[:, rows].flatten(0, 1).float() / 255
        weights = batch.weights[:, rows].flatten(0, 1).float() / 40
        losses = mask_loss(logits, predicted_iou, targets, weights)
        total = total + (losses.mask + losses.iou) * len(rows) / settings.prompts_per_image
        if kinds == FULL:
            full_iou = float(losses.true_iou[:, 0].mean())
    total = total + settings.edge_loss * edge

    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
    optimizer.step()
    decay = min(settings.average_decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(trainee.model.parameters()), 1 - decay)
    return float(total.detach()), full_iou


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
            noise = torch.randn(masks.shape, generator=generator).to(masks.device)
            masks = masks + 0.5 * noise * (masks > 0)
    maps = [fine[owner] for fine in fine_maps]
    return decode(model, embedding[owner], maps, points=(points, labels), masks=masks)


@torch.no_grad()
def validate(model: SAM2Base, source: ExampleSource, *, settings: TrainSettings, device: str) -> dict[str, float]:
    """Mean IoU on fixed examples of the val lists: the coarse masks, full prompts, box alone, and nearly right masks.

    `harm` is the mean loss of IoU on masks that were above 0.9; `iou_error` the mean error of the predicted IoU.
    """
    sums: dict[str, list[Tensor]] = {"coarse": [], "full": [], "box": [], "score": []}
    every = list(range(settings.prompts_per_image))
    fixed = torch.utils.data.Subset(source, range(settings.validation_examples))
    for tensors in DataLoader(fixed, batch_size=settings.images_per_step):
        batch = _to(Example(*tensors), device)
        embedding, fine_maps = encode(model, normalise(batch.image))
        targets = batch.targets.flatten(0, 1)[:, None].float() / 255
        known = batch.weights.flatten(0, 1)[:, None] > 0
        for name, kinds in (("full", FULL), ("box", BOX_ONLY)):
            logits, scores = ask(model, embedding, fine_maps, batch, rows=every, kinds=kinds, generator=None)
            fine = F.interpolate(logits[:, :1].float(), size=targets.shape[-2:], mode="bilinear", align_corners=False)
            sums[name].append(hard_iou(fine > 0, targets >= 0.5, known=known)[:, 0])
            if name == "full":
                sums["score"].append(scores[:, 0].float())
        sums["coarse"].append(batch.coarse_iou.flatten())
    figures = {name: torch.cat(values) for name, values in sums.items()}
    good = figures["coarse"] > 0.9
    result = {name: float(figures[name].mean()) for name in ("coarse", "full", "box")}
    result["harm"] = float((figures["coarse"] - figures["full"])[good].mean())
    result["better"] = float((figures["full"] > figures["coarse"]).float().mean())
    result["iou_error"] = float((figures["score"] - figures["full"]).abs().mean())
    return result


def rate_at(step: int, *, settings: TrainSettings) -> float:
    """The learning rate as a share of its plateau: linear rise, plateau, cosine fall to `final_rate`."""
    fall = settings.decay_share * settings.steps
    progress = max(0.0, (step - (settings.steps - fall)) / fall)
    cosine = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, step / settings.warmup_steps) * cosine


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
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to ImageNet-normalised float32."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() / 255 - mean) / std


def save_checkpoint(
    path: Path, trainee: Trainee, average: SAM2Base, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write everything a resumed run needs, atomically."""
    state = {
        "trainee": trainee.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, trainee: Trainee, average: SAM2Base, optimizer: torch.optim.Optimizer) -> int:
    """Restore a run and return the step it had finished."""
    if not path.is_file():
        raise DataError(f"{path} does not exist, so there is nothing to resume; leave --resume out to start afresh")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    trainee.load_state_dict(state["trainee"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def export(model: SAM2Base, path: Path, *, step: int, settings: TrainSettings, data: Sequence[Path]) -> None:
    """Write the weights as fp16 safetensors, with what made them in the file's metadata."""
    tensors = {name: tensor.detach().half().contiguous().cpu() for name, tensor in model.state_dict().items()}
    recipe = {"step": str(step), "settings": json.dumps(asdict(settings)), "data": ", ".join(p.name for p in data)}
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(save(tensors, metadata=recipe))
    temporary.replace(path)


def side_at(step: int, *, settings: TrainSettings) -> int:
    """Side of the model's input at a step (from 1): small first, then the one it is used at."""
    return settings.small_side if step <= settings.small_share * settings.steps else IMAGE_SIZE


def _side_of_example(settings: TrainSettings, number: int) -> int:
    return side_at(number // settings.images_per_step + 1, settings=settings)


def _full_side(_number: int) -> int:
    return IMAGE_SIZE


def _source(
    data: Sequence[Path],
    split: Literal["train", "val"],
    settings: TrainSettings,
    side_of: Callable[[int], int],
    *,
    seed: int,
) -> ExampleSource:
    folders = [pictures for folder in data if (pictures := index_folder(folder, split))]
    if not folders:
        raise DataError(f"no {split} picture with an object in {', '.join(map(str, data))}; name other --data folders")
    return ExampleSource(folders, settings=settings, side_of=side_of, seed=seed)


def _batches(source: ExampleSource, *, settings: TrainSettings, start: int) -> Iterator[Example]:
    size = settings.images_per_step
    loader: DataLoader[Example] = DataLoader(
        torch.utils.data.Subset(source, range(start * size, settings.steps * size)),
        batch_size=size,
        num_workers=settings.workers,
        prefetch_factor=4 if settings.workers else None,
        multiprocessing_context="forkserver" if settings.workers else None,
    )
    for batch in loader:
        yield Example(*batch)


def _to(batch: Example, device: str) -> Example:
    return Example(*(tensor.to(device, non_blocking=True) for tensor in batch))

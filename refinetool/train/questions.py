"""Puts the prompts of training examples to a SAM 2 model and its head.

`look` sees the images once, `pose` makes a question of some prompts of each image, `answer` runs the decoder, and
`refine` the head after it; `put` does all of it for a batch. B images of side S, N prompts.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refinetool.modules.heads import Decoded, Head, HeadAnswer, Prompted
from refinetool.modules.sam2_passes import decode, encode, normalised, see
from refinetool.records import ABSENT, BACKGROUND, FOREGROUND
from refinetool.settings import TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.kernels import mixed_precision

SURE = 10.0
"""Logit of a coarse mask that is given as it is."""
AROUND = 0.2
"""Negative clicks fall within the object's box, enlarged by this fraction of its sides."""
MOST_CLICKS = 10


class PromptKinds(NamedTuple):
    """Which prompts a decoder call contains. An omitted mined point keeps its position with label -1.

    mask: Whether there is a mask prompt: the Gaussian mask of the method, or with `plain` the coarse mask itself.
    clicks: Number of points drawn from the ground truth, in place of the mined ones.
    """

    box: bool
    positive: bool
    negative: bool
    mask: bool
    plain: bool = False
    clicks: int = 0


FULL = PromptKinds(box=True, positive=True, negative=True, mask=True)
BOX_ONLY = PromptKinds(box=True, positive=False, negative=False, mask=False)
MASK_ONLY = PromptKinds(box=False, positive=False, negative=False, mask=True)
WITHOUT_MASK = (
    BOX_ONLY,
    PromptKinds(box=False, positive=True, negative=True, mask=False),
    PromptKinds(box=False, positive=True, negative=False, mask=False),
    PromptKinds(box=True, positive=True, negative=True, mask=False),
)
"""Prompts that force the model to use the image; with a mask prompt, it could copy the coarse outline."""
WITH_MASK = (
    MASK_ONLY,
    PromptKinds(box=True, positive=False, negative=False, mask=True),
    PromptKinds(box=False, positive=True, negative=True, mask=True),
)

Groups = list[tuple[list[int], PromptKinds]]
"""Which of the K prompts of every image are asked in one decoder call, and how. A call has one number of tokens."""


def draw_groups(settings: TrainSettings, generator: torch.Generator) -> Groups:
    """Split the prompts of an image as the settings say. The first group has the prompts of `refine`."""
    match settings.prompts:
        case "mined":
            return mined_groups(settings.prompts_per_image, generator, full_share=settings.full_share)
        case "mixed":
            return mixed_groups(settings.prompts_per_image, generator)


def mined_groups(count: int, generator: torch.Generator, *, full_share: float) -> Groups:
    """Split K prompts: a share is full, half of the others lack the mask, and half have the mask and some others.

    At least one prompt is full. An odd one lacks the mask.
    """
    order = torch.randperm(count, generator=generator).tolist()
    full = max(1, math.ceil(count * full_share))
    middle = full + (count - full + 1) // 2
    groups = [(order[:full], FULL)]
    for rows, kinds in ((order[full:middle], WITHOUT_MASK), (order[middle:], WITH_MASK)):
        if rows:
            groups.append((rows, kinds[int(torch.randint(len(kinds), (1,), generator=generator))]))
    return groups


def mixed_groups(count: int, generator: torch.Generator) -> Groups:
    """Split K prompts as evenly as can be among the method's own, boxes, 1 to 10 clicks, and coarse masks.

    The paper mixes boxes, points and coarse masks; the method's own prompts are those of `refine`, and come first.
    """
    clicks = 1 + int(torch.randint(MOST_CLICKS, (1,), generator=generator))
    kinds = (FULL, BOX_ONLY, BOX_ONLY._replace(box=False, clicks=clicks), MASK_ONLY._replace(plain=True))
    order = torch.randperm(count, generator=generator).tolist()
    return [(order[n :: len(kinds)], kind) for n, kind in enumerate(kinds) if order[n :: len(kinds)]]


class Looked(NamedTuple):
    """What model and head computed of images; one row per image, or per prompt.

    embedding, fine_maps: Inputs of the decoder.
    maps: `Seen.maps` of the head.
    """

    embedding: Tensor
    fine_maps: list[Tensor]
    maps: list[Tensor]

    def rows(self, owner: Tensor) -> "Looked":
        """Return one row per prompt; `owner` is the image index of each prompt."""
        return Looked(self.embedding[owner], [m[owner] for m in self.fine_maps], [m[owner] for m in self.maps])


class Question(NamedTuple):
    """N = B x rows prompts of one kind.

    looked: One row per prompt.
    points, masks: In the format of SAM 2's prompt encoder.
    sides: (N, S/2, S/2), see `heads.Prompted`.
    targets, weights: float32 (N, S/2, S/2), the fraction of each cell that the object covers, and its loss weight.
    truth: bool (N, S, S), the object.
    """

    looked: Looked
    points: tuple[Tensor, Tensor] | None
    masks: Tensor | None
    sides: Tensor
    targets: Tensor
    weights: Tensor
    truth: Tensor


def look(sam: Any, head: Head | None, images: Tensor) -> Looked:
    """See uint8 images (B, 3, S, S)."""
    features = see(sam, normalised(images.float() / 255))
    if head is None:
        return Looked(features.embedding, list(features.fine_maps), [])
    seen = head.look(features, partial(encode, sam))
    embedding = features.embedding if seen.embedding is None else seen.embedding
    return Looked(embedding, list(features.fine_maps), seen.maps)


def pose(
    looked: Looked, batch: Example, *, rows: list[int], kinds: PromptKinds, generator: torch.Generator | None
) -> Question:
    """Make a question from some prompts of every image.

    Args:
        generator: On the device. Adds noise to the Gaussian mask inside the object, so that the model does not rely on
            its exact values, and draws clicks; None for neither.
    """
    owner = torch.arange(len(batch.image), device=batch.image.device).repeat_interleave(len(rows))
    truth = batch.truth[:, rows].flatten(0, 1)
    coarse = batch.coarse[:, rows].flatten(0, 1)
    sides = torch.where(coarse, 1.0, -1.0) if kinds.mask else torch.zeros(coarse.shape, device=coarse.device)
    masks = None
    if kinds.plain:
        masks = SURE * torch.nn.functional.avg_pool2d(sides[:, None], 2)
    elif kinds.mask:
        masks = batch.masks[:, rows].flatten(0, 1)[:, None]
        if generator is not None:
            noise = torch.randn(masks.shape, generator=generator, device=masks.device)
            masks = masks + 0.5 * noise * (masks > 0)
    points = _points(batch, rows, kinds, truth, generator)
    targets = batch.targets[:, rows].flatten(0, 1).float() / 255
    weights = batch.weights[:, rows].flatten(0, 1).float() / 40
    return Question(looked.rows(owner), points, masks, sides, targets, weights, truth)


def _points(
    batch: Example, rows: list[int], kinds: PromptKinds, truth: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor] | None:
    """Return the points of a question, box corners first."""
    points = batch.points[:, rows].flatten(0, 1)
    labels = batch.labels[:, rows].flatten(0, 1).clone()
    if kinds.clicks:
        assert generator is not None, "clicks are drawn"
        clicked = draw_clicks(truth, count=kinds.clicks, generator=generator)
        if not kinds.box:
            return clicked
        return torch.cat((points[:, :2], clicked[0]), 1), torch.cat((labels[:, :2], clicked[1]), 1)
    if not kinds.positive:
        labels[:, 2] = ABSENT
    if not kinds.negative:
        labels[:, 3] = ABSENT
    return (points, labels) if kinds.box else (points[:, 2:], labels[:, 2:])


def draw_clicks(truth: Tensor, *, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw points from masks, bool (N, S, S): the first inside, each other inside or beside with equal probability.

    Those beside are background within the object's box, enlarged by a fifth; where there is none, they are absent.

    Returns:
        float32 (N, count, 2), (x, y) of pixels, and int32 (N, count), 1, 0 or -1.
    """
    n, height, width = truth.shape
    device = truth.device
    rows, columns = truth.any(2), truth.any(1)
    beside = ~truth & _widened(rows)[:, :, None] & _widened(columns)[:, None, :]
    inside = torch.rand(n, count, generator=generator, device=device) < 0.5
    inside[:, 0] = True
    where = torch.where(inside[..., None], truth.flatten(1)[:, None], beside.flatten(1)[:, None])  # (N, count, S S)
    drawn = [
        torch.where(where[:, k], torch.rand(n, height * width, generator=generator, device=device), -1.0).max(1)
        for k in range(count)
    ]
    best, place = (torch.stack(parts, 1) for parts in zip(*drawn, strict=True))
    points = torch.stack((place % width, place // width), 2).float()
    labels = torch.where(inside, FOREGROUND, BACKGROUND)
    return points, torch.where(best >= 0, labels, ABSENT).int()


def _widened(lines: Tensor) -> Tensor:
    """Extend the range of the true entries of lines, bool (N, L), by a fraction at both ends."""
    length = lines.shape[1]
    first = lines.int().argmax(1, keepdim=True)
    last = length - lines.flip(1).int().argmax(1, keepdim=True)
    reach = (AROUND / 2 * (last - first)).ceil()
    at = torch.arange(length, device=lines.device)
    return (at >= first - reach) & (at < last + reach)


def answer(sam: Any, question: Question) -> Decoded:
    """Run the decoder."""
    looked, encoder = question.looked, sam.sam_prompt_encoder
    sparse, dense = encoder(points=question.points, boxes=None, masks=question.masks)
    count = len(looked.embedding)
    return decode(
        sam,
        looked.embedding,
        looked.fine_maps,
        sparse=sparse.expand(count, -1, -1),
        dense=dense.expand(count, -1, -1, -1),
        positions=encoder.get_dense_pe(),
    )


def refine(sam: Any, head: Head | None, question: Question) -> tuple[Tensor, Tensor]:
    """Run the decoder and the head: logits (N, h, h) of the single mask, and predicted IoUs (N,)."""
    decoded = answer(sam, question)
    if head is None:
        return decoded.logits[:, 0], decoded.scores[:, 0]
    answered = ask(head, [question], [decoded])
    return answered.logits, decoded.scores[:, 0] if answered.scores is None else answered.scores


def put(
    sam: Any, head: Head, batch: Example, groups: Groups, *, generator: torch.Generator | None
) -> tuple[list[Question], HeadAnswer]:
    """Put the prompts of a batch to a model and its head: the questions, and the head's answers to all."""
    with mixed_precision(batch.image.device):
        looked = look(sam, head, batch.image)
        questions = [pose(looked, batch, rows=rows, kinds=kinds, generator=generator) for rows, kinds in groups]
        return questions, ask(head, questions, [answer(sam, question) for question in questions])


def ask(head: Head, questions: Sequence[Question], decoded: Sequence[Decoded]) -> HeadAnswer:
    """Ask a head several questions; the answers are in the order of their prompts.

    A head that reads no tokens answers all at once, so that batch normalisation sees every kind of prompt.
    """
    if len(questions) > 1 and head.reads_tokens:
        answers = [ask(head, [question], [one]) for question, one in zip(questions, decoded, strict=True)]
        scores = [one.scores for one in answers if one.scores is not None]
        auxiliary = [torch.cat(level) for level in zip(*(one.auxiliary for one in answers), strict=True)]
        return HeadAnswer(torch.cat([one.logits for one in answers]), torch.cat(scores) if scores else None, auxiliary)
    maps = [torch.cat(level) for level in zip(*(question.looked.maps for question in questions), strict=True)]
    sides = torch.cat([question.sides for question in questions])
    if len(questions) == 1:
        return head(maps, Prompted(questions[0].points, sides), decoded[0])
    together = {name: torch.cat([getattr(one, name) for one in decoded]) for name in ("logits", "scores", "cells")}
    none = decoded[0].tokens[:0]
    return head(maps, Prompted(None, sides), Decoded(**together, queries=none, tokens=none, fine_maps=()))

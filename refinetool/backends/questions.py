"""The prompts of some rows in the frame of a model, on its device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refinetool.records import Prompts


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """The prompts of N rows in the frame of the model, on its device.

    points: (N, P, 2) in model pixels, labels int (N, P); None if there are no points.
    boxes: (N, 4) xyxy in model pixels, or None.
    masks: (N, 1, m, m) logits, or None.
    extras: Further inputs that a model derives from its prompts, (N, ...) each.
    tokens: (N, T, C), embedded prompts, which take the place of points and boxes, or None.
    """

    points: tuple[Tensor, Tensor] | None
    boxes: Tensor | None
    masks: Tensor | None
    extras: tuple[Tensor, ...] = ()
    tokens: Tensor | None = None

    def take(self, rows: Sequence[int]) -> "Question":
        """Return some of the rows."""
        index = list(rows)
        return Question(
            None if self.points is None else (self.points[0][index], self.points[1][index]),
            None if self.boxes is None else self.boxes[index],
            None if self.masks is None else self.masks[index],
            tuple(extra[index] for extra in self.extras),
            None if self.tokens is None else self.tokens[index],
        )


def group_by_layout(prompts: Sequence[Prompts], *, mixed: bool) -> list[list[int]]:
    """Group the indices of prompts with the same number of points and the same other parts; one by one unless `mixed`.

    A decoder call may mix images but not layouts: padding the tokens of a row would change its result.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(prompts):
        layout = (one.labels.shape[1], one.boxes is None, one.masks is None, 0 if mixed else i)
        groups.setdefault(layout, []).append(i)
    return list(groups.values())


def joined(questions: Sequence[Question]) -> Question:
    """Join the rows of several questions with the same layout."""
    first = questions[0]
    points = [one.points for one in questions if one.points is not None]
    boxes = [one.boxes for one in questions if one.boxes is not None]
    masks = [one.masks for one in questions if one.masks is not None]
    return Question(
        points=(torch.cat([xy for xy, _ in points]), torch.cat([labels for _, labels in points])) if points else None,
        boxes=torch.cat(boxes) if boxes else None,
        masks=torch.cat(masks) if masks else None,
        extras=tuple(torch.cat([one.extras[n] for one in questions]) for n in range(len(first.extras))),
    )

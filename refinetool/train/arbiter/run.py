"""Trains an arbiter: `train_arbiter` gathers contests and takes all steps.

The model is frozen, so contests are gathered once. What is saved is the moving average of the weights.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.errors import DataError, first_line
from refinetool.formats.storage import new_file, refuse_clashes
from refinetool.modules.arbiter import ArbiterNet, serialise_arbiter
from refinetool.refine import load_refiner
from refinetool.settings import ArbiterTrainSettings, RefineSettings
from refinetool.train.arbiter.contests import Contests, gather_contests
from refinetool.train.data.sources import fingerprint, list_pictures
from refinetool.train.files import CHECKPOINT_FILE, METRICS_FILE, RUN_FILE, Position, read_arguments, write_arguments
from refinetool.train.kernels import mixed_precision
from refinetool.train.losses import hard_iou, harm_loss, soft_iou
from refinetool.train.ranks import ALONE
from refinetool.train.schedule import learning_rate_at
from refinetool.train.step import Loss
from refinetool.train.steps import CountedRun, Pace, TrainProgress, take_steps

WEIGHTS_FILE = "arbiter.safetensors"
MEASURED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class ArbiterRun:
    """What is trained on what, as given by the user.

    model, checkpoint: The model whose masks compete.
    """

    data: tuple[Path, ...]
    images: Path | None
    model: str
    checkpoint: str | None
    settings: ArbiterTrainSettings


def train_arbiter(
    run: ArbiterRun,
    output: Path,
    *,
    device: str,
    resume: bool,
    on_gathering: Callable[[int, int], None],
    on_progress: Callable[[TrainProgress], None],
) -> Path:
    """Train an arbiter, and return the path of its weights.

    Args:
        run: Data folders with `split.json`, COCO files or VOC roots; training splits are trained on, validation splits
            are measured on.
        output: Folder for `run.json`, `checkpoint.pt`, `metrics.jsonl` and `arbiter.safetensors`.
        device: Where the model runs; the arbiter is trained on the CPU.
        resume: Continue from the checkpoint; the run then ends like an uninterrupted one. Contests are gathered again.
        on_gathering: Called with (contests found, contests wanted).

    Raises:
        DataError: Data are not as described, have no objects, or `resume` finds no checkpoint of these data.
        UsageError: The model does not exist, or its logits are not known.
        WeightsError: Its weights can't be loaded.
        StorageError: The output can't be written.
        Interrupted: Stopped by the user, after a checkpoint.
    """
    checkpoint = output / CHECKPOINT_FILE
    if resume and not checkpoint.is_file():
        raise DataError(f"{checkpoint} does not exist, so there is nothing to resume; leave --resume out")
    refuse_clashes(
        {name: output / name for name in (RUN_FILE, CHECKPOINT_FILE, METRICS_FILE, WEIGHTS_FILE)},
        {f"data {path}": path for path in run.data},
    )
    training, validation = gathered(run, device=device, on_progress=on_gathering)
    trainer = _Trainer(run, output, training, validation)
    if resume:
        trainer.restore(checkpoint)
    write_arguments(run, output / RUN_FILE)
    settings = run.settings
    pace = Pace(settings.steps, settings.contests_per_step, settings.validate_every, settings.save_every)
    take_steps(trainer, output, pace=pace, device="cpu", ranks=ALONE, on_progress=on_progress)
    return output / WEIGHTS_FILE


def read_record(folder: Path) -> ArbiterRun:
    """Read the arguments of the run in a folder; raises DataError if there is none."""
    return read_arguments(
        folder, lambda content: ArbiterRun(**{**content, "settings": ArbiterTrainSettings(**content["settings"])})
    )


def gathered(run: ArbiterRun, *, device: str, on_progress: Callable[[int, int], None]) -> tuple[Contests, Contests]:
    """Gather the contests to train on, and those to measure on."""
    settings = run.settings
    refiner = load_refiner(
        run.model, checkpoint=run.checkpoint, device=device, precision="auto", settings=RefineSettings()
    )
    pictures = [
        picture
        for path in run.data
        for picture in list_pictures(
            path,
            images=run.images,
            validation_share=settings.validation_share,
            max_pixels=settings.max_pixels,
            min_object_px=settings.min_object_px,
        )
    ]
    measured = min(settings.validation_contests, settings.contests)
    total = settings.contests + measured

    def gather(validation: bool, count: int, before: int) -> Contests:
        return gather_contests(
            [picture for picture in pictures if picture.validation == validation],
            refiner,
            count=count,
            settings=settings,
            on_progress=lambda done, _: on_progress(before + done, total),
        )

    training = gather(False, settings.contests, 0)
    return training, gather(True, measured, settings.contests)


def network_arguments(contests: Contests) -> dict[str, Tensor]:
    """Return the arguments of `ArbiterNet.forward`."""
    return {
        "logits": contests.logits.float(),
        "denied": contests.denied.float(),
        "coarse": contests.coarse.float() / 255,
        "others": contests.others.float() / 255,
        "pixels": contests.pixels,
        "exclusive": contests.exclusive,
    }


def settled_logits(network: nn.Module, contests: Contests, *, weight: float) -> Tensor:
    """Return the logits after competition and the network, float32 (n, h, w)."""
    moved: Tensor = network(**network_arguments(contests))
    return lowered_logits(contests, weight=weight) + moved.float()


def lowered_logits(contests: Contests, *, weight: float) -> Tensor:
    """Return the logits after competition alone, float32 (n, h, w); with a weight of 0 as they were."""
    return contests.logits.float() + weight * contests.denied.float()


def contest_loss(logits: Tensor, contests: Contests, *, settings: ArbiterTrainSettings) -> Loss:
    """Return what settled logits cost, and the mean IoU of their masks.

    The loss is cross-entropy, higher where others claim a cell, plus 1 - IoU of probabilities, plus by how much that
    IoU is lower than it was before, or would be by the weight alone, times `settings.harm_weight`, and lower than that
    of the coarse mask, times `settings.coarse_harm_weight`. Void does not count.
    """
    truth, known = contests.truth.float() / 255, contests.known
    weights = 1 + settings.contested_weight * (contests.denied.float() < settings.contested_below)
    entropy = (F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * weights * known).mean()
    found = soft_iou(logits.sigmoid(), truth, known=known)
    before, lowered = (
        soft_iou(lowered_logits(contests, weight=weight).sigmoid(), truth, known=known)
        for weight in (0.0, settings.competition)
    )
    harm = settings.harm_weight * (torch.maximum(before, lowered) - found).relu()
    inside = contests.coarse.float() / 255 - 0.5
    below_coarse = settings.coarse_harm_weight * harm_loss(logits, coarse=inside, target=truth, weight=known)
    return Loss(
        entropy + (1 - found + harm).mean() + below_coarse,
        hard_iou(logits > 0, truth > 0.5, known=known).mean(),
    )


class _Trainer(CountedRun):
    """The state of a run between two steps."""

    def __init__(self, run: ArbiterRun, output: Path, training: Contests, validation: Contests) -> None:
        self.run, self.output, self.settings, self.steps = run, output, run.settings, run.settings.steps
        self.training, self.validation = training, validation
        torch.manual_seed(run.settings.seed)
        self.network = ArbiterNet()
        self.average = copy.deepcopy(self.network).eval()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=run.settings.learning_rate, weight_decay=run.settings.weight_decay
        )
        self.position = Position(0, 0.0, _digest(run))

    def draw(self, step: int) -> Contests:
        """Draw the contests of a step, half of the steps mirrored; they depend on nothing but seed and step."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        rows = torch.randint(len(self.training), (self.settings.contests_per_step,), generator=generator)
        drawn = self.training.rows(rows)
        return drawn.mirrored() if torch.rand((), generator=generator) < 0.5 else drawn

    def take(self, step: int, batch: Contests) -> Loss:
        """Take a step."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_at(step, self.share(), settings=settings)
        with mixed_precision(torch.device("cpu")):
            logits = settled_logits(self.network, batch, weight=settings.competition)
        loss = contest_loss(logits.float(), batch, settings=settings)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        decay = min(settings.average_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        return Loss(loss.total.detach(), loss.iou)

    def measured(self, step: int) -> dict[str, float]:  # noqa: ARG002 - the protocol's
        """Measure the mean IoU on the validation contests: by the arbiter, by the weight alone, and without either."""
        sums = torch.zeros(3)
        for start in range(0, len(self.validation), MEASURED_AT_ONCE):
            some = self.validation.rows(torch.arange(start, min(start + MEASURED_AT_ONCE, len(self.validation))))
            alone, lowered = (lowered_logits(some, weight=weight) for weight in (0.0, self.settings.competition))
            with torch.inference_mode():
                moved = settled_logits(self.average, some, weight=self.settings.competition)
            truth = some.truth.float() / 255
            each = [hard_iou(logits > 0, truth > 0.5, known=some.known) for logits in (alone, lowered, moved)]
            sums += torch.stack(each).sum(1)
        without, by_weight, settled = (sums / len(self.validation)).tolist()
        return {"full": settled, "by_weight": by_weight, "alone": without}

    def save(self) -> None:
        """Write a checkpoint and the weights."""
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": asdict(self.position),
        }
        with new_file(self.output / CHECKPOINT_FILE) as file:
            torch.save(state, file)
        about = {
            "data": [path.name for path in self.run.data],
            "model": self.run.model,
            "contests": len(self.training),
            "steps": self.position.step,
            "settings": asdict(self.settings),
        }
        with new_file(self.output / WEIGHTS_FILE) as file:
            file.write(serialise_arbiter(self.average, about))

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; raises DataError if it can't be read, or was made with other data."""
        data = self.position.data
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            self.network.load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.position = Position(**state["position"])
        except Exception as error:
            raise DataError(f"{path}: can't be read as a checkpoint ({first_line(error)}); start afresh.") from error
        if self.position.data != data:
            raise DataError(f"{path}: the run began with other data; put them back, or start afresh without --resume.")


def _digest(run: ArbiterRun) -> str:
    described: Sequence[object] = [*map(fingerprint, run.data), run.model, run.checkpoint]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()

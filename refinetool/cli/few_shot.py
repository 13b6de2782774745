"""`refinetool eval --protocol few-shot`."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refinetool.cli import console
from refinetool.errors import DataError, UsageError
from refinetool.settings import FewShotSettings, RefineSettings

if TYPE_CHECKING:
    from refinetool.train.reference.few_shot import Row

FEW_SHOT = FewShotSettings()
BASELINES = ("prototype", "grabcut")
SHIPPED = "embedded"


def evaluate_few_shot(
    method: str,
    data: Path,
    *,
    images: Path | None,
    episodes: Path | None,
    count: int,
    shots: Sequence[int],
    kinds: Sequence[str],
    classes: Sequence[str],
    seed: int,
    refine: bool,
    model: str,
    checkpoint: str | None,
    encoder_checkpoint: str | None,
    device: str,
    as_json: bool,
    as_markdown: bool,
    quiet: bool,
) -> None:
    """Measure a reference encoder, or a baseline, on episodes of annotated images, and print a table."""
    from refinetool.backends.models import load_backend
    from refinetool.backends.reference import load_prompter
    from refinetool.refine import Refiner
    from refinetool.settings import ReferenceSettings
    from refinetool.train.reference.annotations import named_kinds
    from refinetool.train.reference.data import classes_of, list_class_pictures, named_classes
    from refinetool.train.reference.episodes import fixed_episodes, index_classes, read_episodes, write_episodes
    from refinetool.train.reference.few_shot import ByEncoder, ByGrabCut, ByPrototype, FewShotMethod, run_episodes

    settings = replace(FEW_SHOT, episodes=count, seed=seed)
    pictures = list_class_pictures(
        data, images=images, validation_share=settings.validation_share, max_pixels=settings.max_pixels
    )
    wanted = named_classes(classes, known=classes_of(pictures)) if classes else classes_of(pictures)
    if episodes is not None and episodes.exists():
        asked = read_episodes(episodes)
        refuse_unknown_pictures(asked, {picture.key: set(picture.areas) for picture in pictures}, episodes)
    else:
        index = index_classes(
            [picture for picture in pictures if picture.validation],
            pictures,
            classes=wanted,
            min_area=settings.min_area,
        )
        if not index.targets:
            raise DataError(f"{data}: no class has a validation image and another image; name others with --classes.")
        asked = fixed_episodes(index, count=settings.episodes, shots=max(shots), kinds=("mask",), seed=settings.seed)
        if episodes is not None:
            write_episodes(asked, episodes)
    backend = load_backend(model, checkpoint=checkpoint, device=device, precision="auto")
    prompter = load_prompter(
        weights_of(method),
        image_encoder=None,
        encoder_checkpoint=encoder_checkpoint,
        backend=backend,
        settings=ReferenceSettings(),
    )
    run: FewShotMethod
    if method == "prototype":
        run = ByPrototype(settings)
    elif method == "grabcut":
        run = ByGrabCut(prompter, settings)
    else:
        run = ByEncoder(prompter, backend, prompter.recipe.threshold)
    with console.counting("measuring", unit="targets", quiet=quiet) as tell:
        rows = run_episodes(
            asked,
            pictures,
            run,
            prompter,
            kinds=named_kinds(kinds),
            shots=sorted(set(shots)),
            refiner=Refiner(backend, RefineSettings()) if refine else None,
            on_progress=tell,
        )
    trained = sorted(set(asked_classes(asked)) - set(prompter.recipe.held_out))
    report(rows, trained=() if method in BASELINES else trained, as_json=as_json, as_markdown=as_markdown)


def weights_of(method: str) -> str | None:
    """Return the weights of the reference encoder: baselines use none, and so any."""
    if method in BASELINES:
        return "random:0"
    return None if method == SHIPPED else method


def asked_classes(episodes: Sequence[Any]) -> list[str]:
    """Return the classes of episodes, sorted."""
    return sorted({episode.name for episode in episodes})


def refuse_unknown_pictures(episodes: Sequence[Any], areas: dict[str, set[str]], path: Path) -> None:
    """Raise DataError if an episode names an image that is not there, or has not the class."""
    for episode in episodes:
        for key in (episode.target, *episode.references):
            if episode.name not in areas.get(key, set()):
                raise DataError(f"{path}: names {key}, which is no image with a {episode.name}; draw episodes anew.")


def report(rows: Sequence["Row"], *, trained: Sequence[str], as_json: bool, as_markdown: bool) -> None:
    """Print a row per kind of annotation and number of shots."""
    if as_json:
        console.dump({"rows": [as_record(row) for row in rows], "seen_in_training": list(trained)})
        return
    with_refined = any(row.refined is not None for row in rows)
    headings = ("annotation", "shots", "mIoU", "FB-IoU", *(("refined mIoU", "refined FB-IoU") if with_refined else ()))
    cells = []
    for row in rows:
        scores = [row.scores, *([row.refined] if row.refined is not None else [])]
        figures = (f"{100 * value:.1f}" for one in scores for value in (one.mean_iou, one.foreground_background_iou))
        cells.append((row.kind, str(row.shots), *figures))
    show = console.markdown if as_markdown else console.table
    show("", headings, cells, numbers=range(1, len(headings)))
    first = rows[0].scores
    console.say(f"{first.episodes} episodes, {len(first.classes)} classes", markup=False)
    if trained:
        console.say(f"seen in training: {', '.join(trained)}", markup=False)


def as_record(row: "Row") -> dict[str, object]:
    """Convert a row to what JSON can hold."""
    record: dict[str, object] = {"kind": row.kind, "shots": row.shots, "episodes": row.scores.episodes}
    for name, scores in (("labels", row.scores), ("refined", row.refined)):
        if scores is not None:
            record[name] = {
                "mean_iou": scores.mean_iou,
                "foreground_background_iou": scores.foreground_background_iou,
                "classes": {label: {**asdict(one), "iou": one.iou} for label, one in scores.classes.items()},
            }
    return record


def check_usage(*, coarse: object, candidates: object, plot: object) -> None:
    """Raise UsageError for options of `eval` that compare files of masks."""
    for option, value in (("--coarse", coarse), ("--candidates", candidates), ("--plot", plot)):
        if value is not None:
            raise UsageError(f"{option} compares files of masks; --protocol few-shot has none, so leave it out.")

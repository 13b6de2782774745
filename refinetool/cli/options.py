"""Options that the commands share, grouped by their panel in `--help`.

They are type aliases. Options of refinement settings are in `settings_options`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from refinetool.errors import UsageError
from refinetool.formats import FORMATS
from refinetool.locations import location
from refinetool.settings import JobSettings, MethodName, RefineSettings

JOB, REFINE = JobSettings(), RefineSettings()

FILES = "Files"
MODEL = "Model"
RUN = "Run"
METHOD = "Refinement"
GUARD = "Guard: when the coarse mask is kept"
PROMPTS = "Prompts mined from the coarse mask"


def optional(*names: str, text: str, panel: str, default: object = None, **more: Any) -> Any:
    """Make an option that is None unless given; `default` is only shown in the help."""
    shown = "" if default is None else f" [dim]\\[default: {default}][/dim]"
    return typer.Option(*names, help=text + shown, rich_help_panel=panel, show_default=False, **more)


def worker_count(text: str) -> int | Literal["auto"]:
    """Parse the value of `--workers`."""
    if text == "auto":
        return "auto"
    if text.isdecimal() and 1 <= len(text) <= 4 and int(text):
        return int(text)
    raise UsageError(f"--workers is {text!r}; expected a number from 1 to 9999, or auto")


def flag(*names: str, text: str, panel: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, metavar="")


# --- files

Coarse: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="COARSE",
        help="File or folder of masks: COCO (also panoptic), VOC, DAVIS, YOLO, LabelMe, Cityscapes, or mask images.",
        parser=location,
    ),
]
Images: TypeAlias = Annotated[
    Path | None,
    optional(
        "--images",
        metavar="PATH",
        text="Image folder, on a disk or in a store such as s3://. Without it, images are looked for beside the masks.",
        panel=FILES,
        parser=location,
    ),
]
Output: TypeAlias = Annotated[
    Path | None,
    optional(
        "--output",
        "-o",
        metavar="PATH",
        text="File or folder to write.",
        default="COARSE.refined.json, COARSE-refined",
        panel=FILES,
    ),
]
Format: TypeAlias = Annotated[
    str,
    typer.Option(
        "--format", help=f"Format of the masks: auto, {', '.join(FORMATS)}.", metavar="NAME", rich_help_panel=FILES
    ),
]
Sizes: TypeAlias = Annotated[
    Path | None,
    optional("--sizes", metavar="PATH", text="COCO JSON that lists the images, for COCO results.", panel=FILES),
]
FollowLinks: TypeAlias = Annotated[
    bool,
    flag("--follow-links", text="Follow links in the folders of images and masks that lead out of them.", panel=FILES),
]
Categories: TypeAlias = Annotated[
    list[str] | None,
    optional(
        "--categories",
        metavar="NAME",
        text="Refine only this category, given by name or id; repeat the option or separate several by commas.",
        panel=METHOD,
    ),
]
MaskSuffix: TypeAlias = Annotated[
    str,
    typer.Option(
        "--mask-suffix",
        help="Suffix of the names of mask files that their images lack: _mask for a_mask.png and a.jpg. Files without "
        "it are not masks.",
        metavar="TEXT",
        rich_help_panel=FILES,
        show_default=False,
    ),
]
Record: TypeAlias = Annotated[
    Path | None,
    optional("--record", metavar="PATH", text="CSV file to write: the status of every mask.", panel=FILES),
]
Overwrite: TypeAlias = Annotated[bool, flag("--overwrite", text="Replace an existing output.", panel=FILES)]

# --- model

ModelName: TypeAlias = Annotated[
    str, typer.Option("--model", help="Model name; see refinetool models list.", metavar="NAME", rich_help_panel=MODEL)
]
Checkpoint: TypeAlias = Annotated[
    str | None,
    optional(
        "--checkpoint",
        text="Weights file, or random:SEED. Without it, the published weights, or those in the package.",
        panel=MODEL,
        metavar="PATH",
    ),
]
Device: TypeAlias = Annotated[
    str, typer.Option("--device", help="Device: auto, cpu, cuda or cuda:N.", metavar="DEVICE", rich_help_panel=MODEL)
]
Precision: TypeAlias = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option("--precision", help="Precision of the model; auto is bf16 on a GPU.", rich_help_panel=MODEL),
]
Head: TypeAlias = Annotated[
    str,
    typer.Option(
        "--head",
        help="Head of a SAM 2 model: auto, none, detail, sam2refiner, or a file that refinetool train head wrote.",
        metavar="HEAD",
        rich_help_panel=MODEL,
    ),
]
IouAdapter: TypeAlias = Annotated[
    Path | None,
    optional("--iou-adapter", metavar="PATH", text="File that refinetool adapt-iou wrote for this model.", panel=MODEL),
]
Arbiter: TypeAlias = Annotated[
    Path | None,
    optional(
        "--arbiter",
        metavar="PATH",
        text="File that refinetool train arbiter wrote, instead of the model's own ones.",
        panel=MODEL,
    ),
]

# --- run

Limit: TypeAlias = Annotated[
    int | None, optional("--limit", metavar="N", text="Process only the first N images.", panel=RUN, min=1)
]
DryRun: TypeAlias = Annotated[bool, flag("--dry-run", text="Show what would be done; write nothing.", panel=RUN)]
Resume: TypeAlias = Annotated[bool, flag("--resume", text="Continue an unfinished run.", panel=RUN)]
Fresh: TypeAlias = Annotated[bool, flag("--fresh", text="Discard the finished images of an earlier run.", panel=RUN)]
Threads: TypeAlias = Annotated[
    int | None,
    optional(
        "--threads",
        metavar="N",
        text="Threads per process that read images and encode masks.",
        panel=RUN,
        default="CPU cores, at most 8",
        min=1,
    ),
]
Compile: TypeAlias = Annotated[
    bool,
    flag(
        "--compile",
        text="Compile the encoder with torch first. It takes a minute or more per process and needs a C++ compiler.",
        panel=RUN,
    ),
]
CacheEmbeddings: TypeAlias = Annotated[
    Path | None,
    optional(
        "--cache-embeddings",
        metavar="FOLDER",
        text="Keep the embeddings of images here, and use those that are here: another run on the same images, with "
        "other settings, skips the encoder.",
        panel=RUN,
    ),
]
CacheGigabytes: TypeAlias = Annotated[
    float,
    typer.Option(
        "--cache-gigabytes",
        metavar="GB",
        help="Maximum size of the folder of --cache-embeddings; the least recently used files are deleted.",
        rich_help_panel=RUN,
        min=0.001,
    ),
]
Workers: TypeAlias = Annotated[
    str,
    typer.Option(
        "--workers",
        metavar="N",
        help="Processes that run the model: a number, or auto for one per GPU (or per four CPU cores where there is "
        "none).",
        rich_help_panel=RUN,
    ),
]
RayAddress: TypeAlias = Annotated[
    str | None,
    optional(
        "--ray-address",
        metavar="ADDRESS",
        text="Use the workers of a running Ray cluster: its address, or auto for the one on this machine.",
        panel=RUN,
    ),
]
Quiet: TypeAlias = Annotated[bool, flag("--quiet", "-q", text="Show no progress and no summary.", panel=RUN)]
AsJson: TypeAlias = Annotated[bool, flag("--json", text="Print the result as JSON.", panel=RUN)]

# --- refinement

Method: TypeAlias = Annotated[
    MethodName,
    typer.Option("--method", help="samrefiner, or a baseline for comparison.", rich_help_panel=METHOD),
]
Truth: TypeAlias = Annotated[
    Path | None,
    optional("--truth", metavar="PATH", text="Ground truth, for --selection oracle.", panel=METHOD),
]
Candidates: TypeAlias = Annotated[
    Path | None,
    optional(
        "--candidates", metavar="PATH", text="JSON Lines file to write: all candidates of each mask.", panel=FILES
    ),
]
Compat: TypeAlias = Annotated[
    Literal["release"] | None,
    optional("--compat", text="Imitate the released code of SAMRefiner's authors, for comparison.", panel=METHOD),
]

# --- guard

NoGuard: TypeAlias = Annotated[
    bool, flag("--no-guard", text="Accept every refined mask that is not empty.", panel=GUARD)
]

"""`refinetool refine`."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import typer

from refinetool.cli import console, options
from refinetool.cli.app import app
from refinetool.cli.options import JOB
from refinetool.cli.settings_options import changed, with_settings
from refinetool.errors import DataError, Interrupted, UsageError
from refinetool.settings import METHODS, NO_GUARD, RELEASE


@app.command(
    help="Refine coarse masks. The output is the same file with better masks.\n\n"
    "Ids, order and everything else stay as they are. A mask that can't be refined, or whose refined version is "
    "doubtful, stays coarse, and the summary says why. If images can't be read, the exit code is 1. Continue an "
    "interrupted run with --resume."
)
@with_settings()
def refine(
    *,
    coarse: options.Coarse,
    images: options.Images = None,
    output: options.Output = None,
    file_format: options.Format = "auto",
    sizes: options.Sizes = None,
    follow_links: options.FollowLinks = False,
    mask_suffix: options.MaskSuffix = "",
    categories: options.Categories = None,
    record: options.Record = None,
    candidates: options.Candidates = None,
    overwrite: options.Overwrite = False,
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    device: options.Device = JOB.device,
    precision: options.Precision = JOB.precision,
    head: options.Head = JOB.head,
    iou_adapter: options.IouAdapter = None,
    arbiter: options.Arbiter = None,
    limit: options.Limit = None,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    fresh: options.Fresh = False,
    compile_encoder: options.Compile = False,
    cache_embeddings: options.CacheEmbeddings = None,
    cache_gigabytes: options.CacheGigabytes = JOB.embeddings_gigabytes,
    workers: options.Workers = str(JOB.workers),
    ray_address: options.RayAddress = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    method: options.Method = "samrefiner",
    compat: options.Compat = None,
    truth: options.Truth = None,
    no_guard: options.NoGuard = False,
    changes: Mapping[str, object],
) -> None:
    if compat == "release" and method != "samrefiner":
        raise UsageError(f"--compat release works only with the method samrefiner; drop it or --method {method}")
    base = RELEASE if compat == "release" else METHODS[method]
    settings = changed(replace(base, guard=NO_GUARD) if no_guard else base, changes)
    destination = output or default_output(coarse)
    try:
        with console.listening(waiting="loading the model", quiet=quiet or dry_run) as listener:
            from refinetool.backends.models import find_model
            from refinetool.running.run import refine_dataset

            find_model(model)
            summary = refine_dataset(
                coarse,
                images=images,
                output=destination,
                model=model,
                checkpoint=checkpoint,
                device=device,
                precision=precision,
                head=head,
                settings=settings,
                format=None if file_format == "auto" else file_format,
                sizes=sizes,
                follow_links=follow_links,
                mask_suffix=mask_suffix,
                categories=categories or [],
                limit=limit,
                resume=resume,
                fresh=fresh,
                overwrite=overwrite,
                dry_run=dry_run,
                record=record,
                candidates=candidates,
                truth=truth,
                iou_adapter=iou_adapter,
                arbiter=arbiter,
                compile=compile_encoder,
                cache_embeddings=cache_embeddings,
                cache_gigabytes=cache_gigabytes,
                workers=options.worker_count(workers),
                ray_address=ray_address,
                threads=threads,
                on_progress=listener,
            )
    except Interrupted as interrupted:
        raise Interrupted(f"{interrupted}\nContinue with: {resume_command(sys.argv[1:])}") from None
    if as_json:
        console.dump(console.as_json(summary))
    elif dry_run:
        console.foretell(summary, model=model, output=destination)
    elif not quiet:
        console.summarise(summary)
    if summary.failed:
        console.complain_of_images(summary)
        raise typer.Exit(DataError.exit_code)


def resume_command(arguments: list[str]) -> str:
    """Return the command line that continues an interrupted run."""
    kept = [argument for argument in arguments if argument not in ("--fresh", "--resume")]
    return shlex.join(["refinetool", *kept, "--resume"])


def default_output(coarse: Path) -> Path:
    """`masks.json` -> `masks.refined.json`; folder `masks` -> `masks-refined`."""
    absolute = coarse.absolute()
    if coarse.is_dir():
        return absolute.with_name(f"{absolute.name}-refined")
    return coarse.with_name(f"{coarse.stem}.refined{coarse.suffix}")

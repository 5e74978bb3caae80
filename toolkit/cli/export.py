"""The export, publish and sync commands."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.inference import log
from toolkit.cli.options import AsJson, ModelPath, RunPath, Tta, output
from toolkit.errors import EXIT_FAILURE, EXIT_OK, UserError

if TYPE_CHECKING:
    from toolkit.runs import Run


@command
def export(
    run: ModelPath,
    style: Annotated[str, typer.Option("--format", metavar="FORMAT", help="onnx, torch-export, safetensors or timm.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FOLDER", parser=output, help="Output folder. Default: RUN/export/FORMAT."),
    ] = None,
    epoch: Annotated[
        str, typer.Option(metavar="EPOCH", help="Weights to export: best (the selected epoch) or last (the last one).")
    ] = "best",
    tta: Tta = None,
    as_json: AsJson = False,
) -> None:
    """Export a run's best or last model for use in other programs.

    Also writes the preprocessing. Before the folder is moved into place, the exported model is loaded again and
    compared with the original on 64 images; logits must agree within 1e-4.

    Example: toolkit export runs/quickstart/20260102-030405-abcd --format onnx -o digits-onnx
    """
    from toolkit.inference.export import LIMIT
    from toolkit.inference.export import export as write

    done = write(run, style, out, epoch, tta)
    for note in done.notes:
        log(note)
    if as_json:
        content = {
            "folder": str(done.folder),
            "format": style,
            "epoch": epoch,
            "files": done.files(),
            "images": done.images,
        }
        print(json.dumps({**content, "max_abs_difference": done.difference}, indent=2))
        return
    for name, size in done.files().items():
        print(f"{done.folder / name}  {size:,} bytes")
    print(f"checked on {done.images}: logits differ by at most {done.difference:.1e} (limit {LIMIT:g})")


@command
def publish(
    run: RunPath,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hugging Face Hub, OWNER/NAME.")],
    license_: Annotated[
        str, typer.Option("--license", metavar="ID", help="The Hub's license identifier: mit, apache-2.0, ...")
    ] = "unknown",
    private: Annotated[bool, typer.Option("--private", help="Visible only to you or your organization.")] = False,
    no_push: Annotated[bool, typer.Option("--no-push", help="Write the folder without pushing it.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FOLDER", parser=output, help="Output folder. Default: RUN/publish."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Publish a run's best model on the Hugging Face Hub.

    Writes weights, preprocessing, recipe and a model card to a folder, and pushes it if you are logged in
    (hf auth login); otherwise prints the command to push it later.

    Example: toolkit publish runs/quickstart/20260102-030405-abcd lab/digits --license mit
    """
    from toolkit.inference.publish import how_to_push
    from toolkit.inference.publish import publish as write

    done = write(run, repo, out, license_id=license_, private=private, push=not no_push)
    if license_ == "unknown":
        log("the model card says that no license is stated; set one with --license")
    if done.local_paths:
        log(f"model.json contains a path on this machine, of model.args: {', '.join(done.local_paths)}")
    if done.url is None:
        log(f"not pushed, since {done.why_not}; {how_to_push(done.folder, repo)}")
    if as_json:
        print(json.dumps({"folder": str(done.folder), "url": done.url, "why_not_pushed": done.why_not}, indent=2))
    else:
        print(done.url or done.folder)


@command
def sync(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="Runs, studies, run roots, or latest. Default: runs."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Upload runs to W&B that were tracked offline.

    Each run is uploaded once, from its metrics.jsonl, under its original id; a run that is still training is skipped.
    After an incomplete upload, or once the run has continued, the same command uploads the rest. MLflow runs of
    finished runs are ended if their process was killed before it did.

    Example: toolkit sync runs/quickstart
    """
    from toolkit.slurm.job_status import find_runs
    from toolkit.wandb_sync import ServerUnreachable
    from toolkit.wandb_sync import sync as upload

    folders = runs or [Path("runs")]
    found = [run for folder in folders for run in find_runs(folder)]
    if not found:
        log(f"no runs in {', '.join(map(str, folders))}")
    done = []
    for run in found:
        _end_mlflow_run(run)
        try:
            done.append(upload(run, log))
        except ServerUnreachable:
            raise
        except UserError as error:  # one damaged run must not stop the others
            log(str(error))
            continue
        if not as_json:
            print(done[-1].text(), flush=True)
    if as_json:
        print(json.dumps([asdict(each) for each in done], indent=2))
    return EXIT_OK if len(done) == len(found) else EXIT_FAILURE


def _end_mlflow_run(run: Run) -> None:
    """End the MLflow run of a finished run if it is open; errors are logged, because W&B may still get the run."""
    from toolkit.mlflow_tracker import end_open_run

    try:
        if end_open_run(run):
            log(f"{run.path}: its MLflow run was still RUNNING, and is FINISHED now")
    except UserError as error:
        log(f"warning: {error}")

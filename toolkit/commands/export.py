"""export, publish, sync: what leaves this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from toolkit.commands.use import ModelArgument, RunArgument, say
from toolkit.errors import EXIT_OK
from toolkit.train import AsJson, Debug, end, report_errors


def export(
    run: ModelArgument,
    style: Annotated[str, typer.Option("--format", help="onnx, torch-export, safetensors or timm.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to make. Default: RUN/export/FORMAT.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a run's best model for other programs.

    The preprocessing is written beside it. Before the folder gets its name, the model is read back and both are run on
    64 images; logits must agree within 1e-4.

    Example: toolkit export runs/quickstart/20260102-030405-abcd --format onnx -o digits-onnx
    """

    def work() -> int:
        from toolkit.export import LIMIT
        from toolkit.export import export as write

        done = write(run, style, out or run / "export" / style)
        for note in done.notes:
            say(note)
        if as_json:
            content = {"folder": str(done.folder), "format": style, "files": done.files(), "images": done.images}
            print(json.dumps({**content, "max_abs_difference": done.difference}, indent=2))
            return EXIT_OK
        for name, size in done.files().items():
            print(f"{done.folder / name}  {size:,} bytes")
        print(f"checked on {done.images}: logits differ by {done.difference:.1e} at most (limit {LIMIT:g})")
        return EXIT_OK

    end(report_errors(work, debug=debug))


def publish(
    run: RunArgument,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hugging Face Hub, OWNER/NAME.")],
    license_: Annotated[
        str, typer.Option("--license", help="The Hub's identifier of the licence you give: mit, apache-2.0, ...")
    ] = "unknown",
    private: Annotated[bool, typer.Option("--private", help="Seen by you, or your organisation, alone.")] = False,
    no_push: Annotated[bool, typer.Option("--no-push", help="Only write the folder.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to make. Default: RUN/publish.")] = None,
    debug: Debug = False,
) -> None:
    """Publish a run's best model on the Hugging Face Hub.

    Writes weights, preprocessing, recipe and a model card into a folder, and pushes it where you are logged in
    (hf auth login); else it says how to push it later.

    Example: toolkit publish runs/quickstart/20260102-030405-abcd lab/digits --license mit
    """

    def work() -> int:
        from toolkit.publish import how_to_push
        from toolkit.publish import publish as write

        done = write(run, repo, out, license_id=license_, private=private, push=not no_push)
        if license_ == "unknown":
            say("the card says that no licence is stated; give one with --license")
        if done.url is None:
            say(f"not pushed, since {done.why_not}; {how_to_push(done.folder, repo)}")
        print(done.url or done.folder)
        return EXIT_OK

    end(report_errors(work, debug=debug))

"""The evaluate, predict and explain commands."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, BatchSize, DataRoot, ImagePaths, ModelPath, RunPath, Tta, Workers, output
from toolkit.error_handling import is_first_process
from toolkit.errors import EXIT_FAILURE, EXIT_OK, UserError, missing_package
from toolkit.filenames import escape_control_characters
from toolkit.similar_names import did_you_mean

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolkit.inference.explain import CamInput, CamResult
    from toolkit.inference.predict import Predictions
    from toolkit.recipe.schema import TrainConfig
    from toolkit.training.trained_model import TrainedModel

FORMATS = ("csv", "json", "jsonl")
DEFAULT_WORST = 16
MAX_EXPLAINED = 256
"""Maximum number of images per call, since each one produces a file."""


def log(text: str) -> None:
    """Print a line to stderr on rank 0."""
    if is_first_process():
        print(escape_control_characters(text), file=sys.stderr, flush=True)


@command
def evaluate(
    run: RunPath,
    split: Annotated[
        str | None,
        typer.Option(metavar="SPLIT", help="test, validation or train. Default: test; with --data, all images."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE|FOLDER|TABLE",
            help="Another labeled data set: a recipe's [data], class folders, or a table of paths and labels.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --data: name of the evaluation. Default: the name of the data."),
    ] = None,
    ignore_unknown_classes: Annotated[
        bool, typer.Option(help="With --data: leave out images of classes that the model does not have.")
    ] = False,
    tta: Tta = None,
    store: Annotated[
        bool, typer.Option("--store", help="Store --tta in model.json: predict, evaluate and export then use it.")
    ] = False,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> int:
    """Evaluate a run's model again, or on another data set.

    Each metric that the run recorded for this split is recomputed and compared with the summary: equal, different by
    rounding, or different. Exit status 1 if one is different.

    With --data, the model is evaluated on other images, whose classes are matched by name. Metrics and predictions are
    written to RUN/evaluations/NAME and shown in the run's report: toolkit evaluate RUN --data photos/

    With --tta, the model is evaluated without and with test-time augmentation: toolkit evaluate RUN --tta flip

    Example: toolkit evaluate runs/quickstart/20260102-030405-abcd --split validation

    On several processes: accelerate launch -m toolkit evaluate RUN
    """
    if data is None and (name is not None or ignore_unknown_classes):
        raise UserError("--name and --ignore-unknown-classes need --data, which selects another data set")
    if data is not None and data_root is not None:
        raise UserError("--data-root is the folder of the run's own images, which are not read with --data")
    if store and tta is None:
        raise UserError("--store needs --tta, which it stores")
    from toolkit.runs import open_run
    from toolkit.tta import parse_tta, store_tta

    parse_tta([] if tta in (None, ["none"]) else tta or [])
    opened = open_run(run)
    recipe = opened.recipe
    # torch is imported only here, once the run is known to be readable.
    from toolkit.distributed.context import distributed_context
    from toolkit.inference.evaluate import check_split, evaluate_run
    from toolkit.inference.evaluate_data import evaluate_data

    check_split(split or "test")
    with distributed_context(recipe.train) as accelerator:
        if data is not None:
            settings = {"split": split, "name": name, "ignore_unknown_classes": ignore_unknown_classes, "tta": tta}
            found = evaluate_data(opened, data, accelerator, **settings)  # type: ignore[arg-type]
            text, differs = found.json(opened) if as_json else found.text(opened), False
        else:
            report = evaluate_run(opened, split or "test", accelerator, data_root, tta=tta)
            text, differs = report.json(opened) if as_json else report.text(), report.differs
        if accelerator.is_main_process:
            print(text, flush=True)
            if store:
                store_tta(opened, tta or [])
    return EXIT_FAILURE if differs else EXIT_OK


@command
def predict(
    run: ModelPath,
    paths: ImagePaths = None,
    list_: Annotated[
        list[Path] | None,
        typer.Option("--list", metavar="FILE", help="Text file with one path per line; the same as @FILE."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "-k",
            "--top-k",
            min=1,
            metavar="K",
            help="Number of most probable classes per image. Default: 1; with several labels per image, all labels "
            "whose probability is at least their threshold.",
        ),
    ] = None,
    style: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="csv, json (one array) or jsonl (one object per line).")
    ] = "csv",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", parser=output, help="Output file. Default: stdout.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    batch_size: BatchSize = None,
    workers: Workers = None,
    tta: Tta = None,
) -> int:
    """Predict images with a run's best model.

    Images are preprocessed as in the run; the preprocessing is stored with the weights. Files that cannot be read are
    reported on stderr and skipped; the exit status is then 1.

    Example: toolkit predict runs/quickstart/20260102-030405-abcd photos/ --top-k 5 -o predictions.csv

    On several processes: accelerate launch -m toolkit predict RUN photos/
    """
    chosen = "json" if as_json else style
    _check_style(chosen)
    arguments = [*(paths or []), *(f"@{path}" for path in list_ or [])]
    from toolkit.distributed.context import distributed_context
    from toolkit.inference.tta import with_tta
    from toolkit.training.trained_model import load_model

    trained = with_tta(load_model(run), tta)
    if trained.caution:
        log(trained.caution)
    train, own_batch_size = run_settings(run)
    with distributed_context(train) as accelerator:
        predictions = _predict(trained, arguments, accelerator, train, top_k, batch_size or own_batch_size, workers)
        _output(accelerator, predictions, chosen, out)
    for file in predictions.failed:
        log(f"{predictions.paths[file.position]}: {file.reason}")
    if predictions.failed:
        log(f"{len(predictions.failed)} of {len(predictions.paths)} files could not be predicted; skipped")
    return EXIT_FAILURE if predictions.failed else EXIT_OK


def _check_style(style: str) -> None:
    if style not in FORMATS:
        hint = did_you_mean(style, FORMATS, prefix="; ")
        raise UserError(f"--format {style}: expected {', '.join(FORMATS)}{hint}")


def run_settings(path: Path) -> tuple[TrainConfig, int]:
    """Return the training settings and the batch size per process: the run's, or defaults for an exported model."""
    from toolkit.recipe.schema import TrainConfig
    from toolkit.runs import Run

    if not ((path / "recipe.toml").is_file() and (path / "checkpoints").is_dir()):
        return TrainConfig(epochs=1, batch_size=64, precision="no", channels_last=False), 64
    run = Run(path)
    return run.recipe.train, run.images_per_process


def _predict(
    trained: TrainedModel,
    arguments: list[str],
    accelerator: Accelerator,
    train: TrainConfig,
    top_k: int | None,
    batch_size: int,
    workers: int | None,
) -> Predictions:
    from toolkit.distributed.process import autocast_dtype, main_only
    from toolkit.inference.predict import collect, predict
    from toolkit.training.console import Console

    paths = main_only(accelerator, lambda: collect(arguments, sys.stdin.buffer.read, log))
    with Console(is_main=accelerator.is_main_process).bar("images", len(paths)) as bar:
        return predict(
            trained,
            trained.files(paths),
            accelerator.device,
            top_k=top_k,
            batch_size=batch_size,
            workers=workers,
            autocast_dtype=autocast_dtype(accelerator.mixed_precision),
            channels_last=train.channels_last,
            advance=lambda images: bar.advance(images * accelerator.num_processes),
        )


def _output(accelerator: Accelerator, predictions: Predictions, style: str, out: Path | None) -> None:
    """Write the predictions on the main process. Collective: a write error is raised on all ranks."""
    from toolkit.distributed.process import main_only
    from toolkit.writing import write_atomically

    def write() -> None:
        text = predictions.text(style)
        if out is None:
            print(text, end="", flush=True)
            return
        try:
            write_atomically(out, text.encode(errors="backslashreplace"))
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from None
        log(f"{out}: {len(predictions.paths) - len(predictions.failed)} predictions")

    main_only(accelerator, write)


@command
def explain(
    run: ModelPath,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Images, folders, @LIST, - for stdin. Default: the worst mistakes."),
    ] = None,
    worst: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Explain the run's N worst mistakes on its test images. Default: 16."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the last layer with spatial maps.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FOLDER", parser=output, help="Folder of the images. Default: RUN/figures/explain."
        ),
    ] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> int:
    """Explain predictions with Grad-CAM heat maps.

    Draws one figure per image: the image as the model receives it, a heat map of the evidence for the prediction, and
    one for the label if that is another class. Needs the extra explain.

    Example: toolkit explain runs/quickstart/20260102-030405-abcd --worst 16
    """
    if paths and worst is not None:
        raise UserError("give either images or --worst, not both")
    if importlib.util.find_spec("captum") is None:  # before torch is imported
        raise missing_package("toolkit explain", "captum", "explain")
    from toolkit.inference.explain import explain_run
    from toolkit.training.trained_model import load_model

    trained = load_model(run)
    if trained.caution:
        log(trained.caution)
    subjects, count = _subjects(run, trained, paths, worst, data_root)
    folder = out or run / "figures" / "explain"
    used_layer, found, files = explain_run(trained, subjects, layer, folder, log) if subjects else (None, [], [])
    if used_layer is not None:
        log(f"layer {used_layer.name}")
    if as_json:
        _print_explanations(trained, found, files)
    else:
        print(*files, sep="\n")
    return EXIT_OK if len(subjects) == count else EXIT_FAILURE


def _subjects(
    run: Path, trained: TrainedModel, paths: list[str] | None, worst: int | None, data_root: Path | None
) -> tuple[list[CamInput], int]:
    """Return the images to explain, and the number of images that were requested."""
    from toolkit.inference.explain import subjects_from_files, worst_mistakes
    from toolkit.inference.predict import collect
    from toolkit.runs import open_run

    if not paths:
        found = worst_mistakes(open_run(run), trained, worst or DEFAULT_WORST, data_root)
        return found, len(found)
    files = collect(paths, sys.stdin.buffer.read, log)
    if len(files) > MAX_EXPLAINED:
        raise UserError(f"{len(files)} images are too many to explain at once; specify at most {MAX_EXPLAINED}")
    return subjects_from_files(trained, files, log), len(files)


def _print_explanations(trained: TrainedModel, found: list[CamResult], files: list[Path]) -> None:
    rows = [
        {
            "path": each.subject.name,
            "label": None if each.subject.label is None else trained.classes[each.subject.label],
            **({} if each.subject.labels is None else {"labels": [trained.classes[k] for k in each.subject.labels]}),
            "prediction": trained.classes[each.prediction],
            "probability": round(each.probability, 6),
            "figure": str(file),
        }
        for each, file in zip(found, files, strict=True)
    ]
    print(json.dumps(rows, indent=2))

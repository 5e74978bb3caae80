"""The embed command."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.inference import log, run_settings
from toolkit.cli.options import AsJson, BatchSize, DataRoot, ImagePaths, ModelPath, Workers, output
from toolkit.errors import EXIT_FAILURE, EXIT_OK, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolkit.inference.embed import DatasetImages, Embeddings, Neighbor
    from toolkit.inference.predict import ImagesToPredict
    from toolkit.training.trained_model import TrainedModel


@command
def embed(
    run: ModelPath,
    paths: ImagePaths = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE|FOLDER|TABLE",
            help="Instead of PATHs, a labeled data set: a recipe's [data], class folders (also in a zip or tar file), "
            "or a table of paths and labels.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="SPLIT", help="Only this split of --data or, without --data, of the run's own images."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", parser=output, help="File of the features: .parquet or .npy."),
    ] = None,
    neighbors: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Print the K training images nearest to each image; with --query, the K nearest images.",
        ),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="With --neighbors: find the neighbors of this image among the given images."),
    ] = None,
    data_root: DataRoot = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> int:
    """Write the features of images, or find their nearest neighbors.

    Features are the inputs of the model's last layer. A Parquet file has a row per image: path, prediction, label if it
    is known, and features. An .npy file has the features alone, and a .txt file next to it the path of each row.
    Neighbors are printed as CSV, by decreasing cosine similarity.

    Example: toolkit embed runs/quickstart photos/ -o features.parquet

    Nearest training images of each photo: toolkit embed RUN photos/ --neighbors 5
    """
    if sum((bool(paths), data is not None or split is not None)) != 1:
        raise UserError("give one of these: PATHs, --data, or --split for the run's own images")
    if out is None and neighbors is None:
        raise UserError("give -o FILE.parquet or -o FILE.npy for the features, or --neighbors K")
    if query and neighbors is None:
        raise UserError("--query needs --neighbors K")
    from toolkit.distributed.context import distributed_context
    from toolkit.distributed.process import main_only
    from toolkit.inference.embed import check_file, write_features
    from toolkit.inference.embed import neighbors as nearest
    from toolkit.training.trained_model import load_model

    if out is not None:
        check_file(out)
    trained = load_model(run)
    if trained.caution:
        log(trained.caution)
    with distributed_context(run_settings(run)[0]) as accelerator:
        job = _Job(run, trained, accelerator, batch_size, workers)
        found = job.embed(job.files(paths) if paths else job.dataset(data, split, data_root))
        if out is not None:
            for file in main_only(accelerator, lambda: write_features(found, out)):
                log(f"{file}: {found.features.shape[1]} features of each of {len(found.paths)} images")
        if neighbors is not None:
            others = job.embed(job.files(query) if query else job.dataset(None, "train", data_root))
            images, among = (others, found) if query else (found, others)
            if accelerator.is_main_process:
                _print(nearest(images, among, neighbors), as_json)
    return EXIT_FAILURE if job.failures else EXIT_OK


class _Job:
    """Computes features with a run's model. Its methods are collective."""

    def __init__(
        self, run: Path, trained: TrainedModel, accelerator: Accelerator, batch_size: int | None, workers: int | None
    ) -> None:
        self.run, self.trained, self.accelerator = run, trained, accelerator
        self.train, own_batch_size = run_settings(run)
        self.batch_size, self.workers = batch_size or own_batch_size, workers
        self.failures = 0
        """Number of images that could not be read."""

    def files(self, arguments: list[str]) -> ImagesToPredict:
        """Return the images that command-line arguments name."""
        from toolkit.distributed.process import main_only
        from toolkit.inference.predict import collect

        return self.trained.files(main_only(self.accelerator, lambda: collect(arguments, sys.stdin.buffer.read, log)))

    def dataset(self, data: str | None, split: str | None, data_root: Path | None) -> DatasetImages:
        """Return the images of a data set, or of a split of the run's own data set."""
        from toolkit.inference.embed import DatasetImages
        from toolkit.inference.evaluate import check_split, split_images
        from toolkit.inference.evaluate_data import open_data
        from toolkit.runs import open_run

        if not (self.run / "recipe.toml").is_file():
            raise UserError(f"{self.run} is an exported model, which has no training images and no recipe: give PATHs")
        run = open_run(self.run)
        if split is not None:
            check_split(split)
        if data is not None:
            _, dataset, indices = open_data(run.recipe, self.trained, data, split, self.accelerator)
            return DatasetImages(dataset, indices)
        assert split is not None
        if not run.split[split]:
            raise UserError(f"{run.path} has no {split} images")
        return DatasetImages(*split_images(run, split, self.trained, data_root))

    def embed(self, images: ImagesToPredict) -> Embeddings:
        """Return the features of the images that can be read, and report the others."""
        from toolkit.distributed.process import autocast_dtype
        from toolkit.inference.embed import Embeddings
        from toolkit.inference.predict import predict
        from toolkit.training.console import Console

        with Console(is_main=self.accelerator.is_main_process).bar("images", len(images)) as bar:
            found = predict(
                self.trained,
                images,
                self.accelerator.device,
                top_k=None,
                batch_size=self.batch_size,
                workers=self.workers,
                autocast_dtype=autocast_dtype(self.accelerator.mixed_precision),
                channels_last=self.train.channels_last,
                with_features=True,
                advance=lambda count: bar.advance(count * self.accelerator.num_processes),
            )
        for file in found.failed:
            log(f"{found.paths[file.position]}: {file.reason}")
        if found.failed:
            log(f"{len(found.failed)} of {len(found.paths)} files could not be read; skipped")
        if not len(found.readable):
            raise UserError("none of the images can be read")
        self.failures += len(found.failed)
        return Embeddings.of(found, images)


def _print(found: list[Neighbor], as_json: bool) -> None:
    """Print neighbors as CSV, or as a JSON array."""
    if as_json:
        print(json.dumps([each._asdict() for each in found], indent=2))
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("path", "rank", "neighbor", "neighbor_class", "similarity"))
    writer.writerows((*each[:-1], f"{each.similarity:.6f}") for each in found)

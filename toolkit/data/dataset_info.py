"""Facts about each data set that are known without opening it, as constants without further imports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """A data set as published by its authors."""

    description: str
    classes: int | None
    """Number of classes; None if it depends on the folders."""
    images: tuple[int, int] | None
    """Images in the official training and test lists, 0 if there is no such list; None if it depends on the folders."""
    size: int | None
    """Height and width of all images in pixels; None if they differ."""
    channels: int
    source: str
    """Where the data come from."""


DATASETS = {
    "digits": DatasetInfo(
        "handwritten digits (UCI; scikit-learn)", 10, (1797, 0), 8, 1, "part of scikit-learn, nothing to download"
    ),
    "cifar10": DatasetInfo(
        "objects in 10 classes (Krizhevsky 2009)", 10, (50_000, 10_000), 32, 3, "downloaded to data.root (163 MiB)"
    ),
    "cifar100": DatasetInfo(
        "objects in 100 classes (Krizhevsky 2009)", 100, (50_000, 10_000), 32, 3, "downloaded to data.root (161 MiB)"
    ),
    "fashion_mnist": DatasetInfo(
        "articles of clothing (Xiao et al. 2017)", 10, (60_000, 10_000), 28, 1, "downloaded to data.root (30 MiB)"
    ),
    "caltech101": DatasetInfo(
        "objects in 101 classes (Li et al. 2004); one more with data.background_class",
        101,
        None,
        None,
        3,
        "unpacked by you into data.root/caltech101, from https://doi.org/10.22002/D1.20086",
    ),
    "imagefolder": DatasetInfo(
        "your own images, one folder per class", None, None, None, 3, "data.root/[train|val|test/]<class>/<image>"
    ),
}
"""Data sets by their name in ``data.dataset``."""


def known_classes(dataset: str, *, background_class: bool) -> int | None:
    """Return the number of classes of a data set without opening it; None if it depends on the folders."""
    classes = DATASETS[dataset].classes
    return classes + 1 if classes and dataset == "caltech101" and background_class else classes

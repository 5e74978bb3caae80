"""What is known of each data set without opening it. Plain values: nothing is imported, nothing is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """One data set, as its authors published it."""

    description: str
    classes: int | None
    """None: the folders decide."""
    images: tuple[int, int] | None
    """Images of the official training and test lists; 0: there is no such list. None: the folders decide."""
    size: int | None
    """Height and width of all images, pixels; None where they differ."""
    channels: int
    source: str
    """How it comes to this machine."""


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
        "your own images, one folder a class", None, None, None, 3, "data.root/[train|val|test/]<class>/<image>"
    ),
}
"""By the name that ``data.dataset`` gives."""


def known_classes(dataset: str, *, background_class: bool) -> int | None:
    """Classes of a data set that has not been opened; None where only its folders tell."""
    classes = DATASETS[dataset].classes
    return classes + 1 if classes and dataset == "caltech101" and background_class else classes

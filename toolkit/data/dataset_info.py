"""The data sets: one record of constants for each. Importing this module imports neither torch nor other libraries."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.data.torchvision_info import PROVIDED_BY_USER, TORCHVISION_SETS


@dataclass(frozen=True)
class DatasetInfo:
    """A data set as published by its authors."""

    title: str
    """Display name."""
    description: str
    classes: int | None
    """Number of classes, without a background class; None if it depends on the folders."""
    images: tuple[int, int] | None
    """Images in the official training and test lists, 0 if there is no such list; None if it depends on the folders."""
    size: int | None
    """Height and width of all images in pixels; None if they differ."""
    channels: int
    source: str
    """Where the data come from: a download, a library, or files that the user provides."""
    opener: str
    """Function that :func:`toolkit.data.datasets.open_dataset` calls with the recipe's [data] table."""
    torchvision_class: str | None = None
    """Class in torchvision.datasets that reads it."""

    def class_count(self, *, background_class: bool) -> int | None:
        """Return the number of classes without opening the data set; None if it depends on the folders."""
        return self.classes if self.classes is None else self.classes + background_class


_TORCHVISION = "toolkit.data.torchvision_sets.open_torchvision"

DATASETS = {
    "digits": DatasetInfo(
        title="Optical Recognition of Handwritten Digits",
        description="handwritten digits (UCI; scikit-learn)",
        classes=10,
        images=(1797, 0),
        size=8,
        channels=1,
        source="part of scikit-learn, nothing to download",
        opener="toolkit.data.datasets.open_digits",
    ),
    "cifar10": DatasetInfo(
        title="CIFAR-10",
        description="objects in 10 classes (Krizhevsky 2009)",
        classes=10,
        images=(50_000, 10_000),
        size=32,
        channels=3,
        source="downloaded to data.root (163 MiB)",
        opener=_TORCHVISION,
        torchvision_class="CIFAR10",
    ),
    "cifar100": DatasetInfo(
        title="CIFAR-100",
        description="objects in 100 classes (Krizhevsky 2009)",
        classes=100,
        images=(50_000, 10_000),
        size=32,
        channels=3,
        source="downloaded to data.root (161 MiB)",
        opener=_TORCHVISION,
        torchvision_class="CIFAR100",
    ),
    "fashion_mnist": DatasetInfo(
        title="Fashion-MNIST",
        description="articles of clothing (Xiao et al. 2017)",
        classes=10,
        images=(60_000, 10_000),
        size=28,
        channels=1,
        source="downloaded to data.root (30 MiB)",
        opener=_TORCHVISION,
        torchvision_class="FashionMNIST",
    ),
    "kmnist": DatasetInfo(
        title="Kuzushiji-MNIST",
        description="cursive Japanese characters (Clanuwat et al. 2018)",
        classes=10,
        images=(60_000, 10_000),
        size=28,
        channels=1,
        source="downloaded to data.root (21 MiB)",
        opener=_TORCHVISION,
        torchvision_class="KMNIST",
    ),
    "caltech101": DatasetInfo(
        title="Caltech-101",
        description="objects in 101 classes (Li et al. 2004); one more with data.background_class",
        classes=101,
        images=None,
        size=None,
        channels=3,
        source="unpacked by you into data.root/caltech101, from https://doi.org/10.22002/D1.20086",
        opener="toolkit.data.datasets.open_caltech101",
    ),
    "torchvision": DatasetInfo(
        title="a data set of torchvision",
        description="a classification data set of torchvision, selected by data.name",
        classes=None,
        images=None,
        size=None,
        channels=3,
        source="data.root, in torchvision's layout; `toolkit datasets torchvision/` lists the names",
        opener=_TORCHVISION,
    ),
    "huggingface": DatasetInfo(
        title="a data set of Hugging Face",
        description="a data set of the library `datasets`: a folder, one saved to disk, or one on the Hub",
        classes=None,
        images=None,
        size=None,
        channels=3,
        source="data.name: a folder, or a name on the Hub, downloaded to the library's cache",
        opener="toolkit.data.huggingface_source.open_huggingface",
    ),
    "imagefolder": DatasetInfo(
        title="the author's own images",
        description="your own images, one folder per class",
        classes=None,
        images=None,
        size=None,
        channels=3,
        source="data.root/[train|val|test/]<class>/<image>",
        opener="toolkit.data.datasets.open_imagefolder",
    ),
    "table": DatasetInfo(
        title="the author's own images",
        description="your own images, listed in a CSV, TSV, JSON lines or Parquet file",
        classes=None,
        images=None,
        size=None,
        channels=3,
        source="data.table, and the image files that it lists",
        opener="toolkit.data.table_source.open_table",
    ),
    "shards": DatasetInfo(
        title="the author's own images",
        description="your own images in tar or Parquet files, such as those of toolkit pack or WebDataset",
        classes=None,
        images=None,
        size=None,
        channels=3,
        source="data.root, a folder or a URL such as s3://bucket/images",
        opener="toolkit.data.shard_source.open_shards",
    ),
    "plugin": DatasetInfo(
        title="the author's own images",
        description="your own code: a data set with __len__ and __getitem__, registered as a plugin",
        classes=None,
        images=None,
        size=None,
        channels=3,
        source="the plugin that data.name names",
        opener="toolkit.data.plugin_dataset.open_plugin_dataset",
    ),
}
"""Data sets by their name in ``data.dataset``."""


def info_of(dataset: str, name: str | None) -> DatasetInfo:
    """Return the information on a recipe's data set, from ``data.dataset`` and ``data.name``."""
    general, found = DATASETS[dataset], TORCHVISION_SETS.get(name or "")
    if dataset != "torchvision" or name is None or found is None:
        return general
    return DatasetInfo(
        title=name,
        description=found.description,
        classes=found.classes,
        images=None,
        size=found.size,
        channels=found.channels,
        source="you put the files into data.root" if name in PROVIDED_BY_USER else "downloaded to data.root",
        opener=general.opener,
        torchvision_class=name,
    )


PAGES = {
    "digits": "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    "caltech101": "https://doi.org/10.22002/D1.20086",
}
"""Pages of data sets that are not of torchvision."""


def page_of(dataset: str, name: str | None) -> str | None:
    """Return the URL of the data set's page, from ``data.dataset`` and ``data.name``; None if none is known."""
    torchvision_class = info_of(dataset, name).torchvision_class
    if torchvision_class is None:
        return PAGES.get(dataset)
    return f"https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.{torchvision_class}.html"

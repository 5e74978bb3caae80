"""Classification data sets of torchvision, each with its official splits (:mod:`toolkit.data.torchvision_info`).

torchvision's classes download and locate the files. If the images are files, only their paths are taken from these
classes, and the toolkit decodes them; the other data sets are arrays.
"""

from __future__ import annotations

import inspect
import io
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from toolkit.data.dataset_info import DATASETS
from toolkit.data.datasets import Dataset, encoded_images
from toolkit.data.encoded_sources import ImageFiles, PartIndex
from toolkit.data.image_sources import ImageSource, InMemoryImages, Pixels
from toolkit.data.torchvision_info import TORCHVISION_SETS
from toolkit.errors import UserError, first_line, missing_package
from toolkit.filenames import encode_name
from toolkit.locks import held, is_held
from toolkit.recipe.schema import DataConfig

_SPLITS = ("train", "validation", "test")


class HDF5Images:
    """Images stored as arrays in HDF5 files; an EncodedSource that returns each image as a PPM file.

    They are not loaded into memory, because PCAM has 7 GB of them.
    """

    def __init__(self, paths: Sequence[str], key: str) -> None:
        """``paths``: files with an array uint8 [N, h, w, 3] named ``key``."""
        self.paths, self.key = list(paths), key
        self._index = PartIndex([len(array) for array in self._arrays()])
        self._opened: tuple[int, list[Any]] = (0, [])
        """Process ID, and the arrays that this process has opened: HDF5 file handles must not be used after a fork."""

    def _arrays(self) -> list[Any]:
        import h5py

        return [h5py.File(path)[self.key] for path in self.paths]

    def __len__(self) -> int:
        return len(self._index)

    def open(self, i: int) -> BinaryIO:
        """Open image i as a PPM file in memory."""
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), self._arrays()
        file, row = self._index.locate(i)
        pixels = self._opened[1][file][row]
        return io.BytesIO(b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes())

    def name(self, i: int) -> str:
        """Return the file name and the row number, such as "camelyonpatch_level_2_split_test_x.h5/7"."""
        file, row = self._index.locate(i)
        return encode_name(f"{os.path.basename(self.paths[file])}/{row}")

    def location(self, i: int) -> str:
        """Return the path of the file that contains image i, encoded."""
        return encode_name(self.paths[self._index.locate(i)[0]])

    def size_and_version(self, i: int) -> tuple[int, int]:
        """Return the size of the HDF5 file in bytes and its modification time in nanoseconds. Raises OSError."""
        state = os.stat(self.paths[self._index.locate(i)[0]])
        return state.st_size, state.st_mtime_ns


Images = list[str] | Pixels | HDF5Images
"""Paths of files, an array uint8 [N, H, W] or [N, H, W, 3], or images in an HDF5 file."""


def open_torchvision(table: DataConfig) -> Dataset:
    """Open a data set of torchvision.datasets, without the official splits that the recipe disables."""
    kind = DATASETS[table.dataset].torchvision_class or table.name
    if kind is None or kind not in TORCHVISION_SETS:
        raise UserError(f"data.name = {table.name!r} is not a data set of torchvision: see `toolkit datasets`")
    found = _fetch(kind, table)
    name = table.dataset if table.dataset != "torchvision" else kind
    images: dict[str, Images] = {}
    numbers: dict[str, npt.NDArray[Any]] = {}
    names = _class_names(found["train"], table.args)
    for split, dataset in found.items():
        images[split], labels = _read(dataset, table.args)
        if any(label is None for label in labels):
            hint = f"; set data.split.{split} = 0 to leave it out" if split != "train" else ""
            raise UserError(f"the {split} list of {name} has images without labels{hint}")
        numbers[split] = np.asarray(labels, dtype=np.int64)
        if _class_names(dataset, table.args) != names:
            raise UserError(
                f"the {split} list of {name} does not have the same classes as the training list: is it complete?"
            )
    for split, labels in numbers.items():
        if isinstance(paths := images[split], list):  # torchvision's order may be that of the file system
            order = sorted(range(len(paths)), key=paths.__getitem__)
            images[split], numbers[split] = [paths[i] for i in order], labels[order]
    ends = np.cumsum([0, *map(len, numbers.values())])
    lists = {split: np.arange(*ends[at : at + 2]) for at, split in enumerate(numbers)}
    labels, notes = np.concatenate(list(numbers.values())), list[str]()
    if labels.ndim == 2 and names is not None:
        classes, labels = names, labels.astype(np.uint8)
    else:
        used, labels = np.unique(labels, return_inverse=True)
        classes = [str(number) if names is None else names[number] for number in used]
        unused = [name for number, name in enumerate(names or ()) if number not in used]
        notes = [f"classes that are left out, because they have no images: {', '.join(unused)}"] if unused else []
    facts = TORCHVISION_SETS[kind]
    table = table.model_copy(update={"channels": table.channels or facts.channels})
    source = _joined(list(images.values()), name, table)
    return Dataset(name, classes, source, labels, lists, facts.size, facts.channels, tuple(notes))


def _joined(images: list[Images], name: str, table: DataConfig) -> ImageSource:
    """Return the images of all official splits as one collection."""
    if isinstance(images[0], list):
        root = os.path.expanduser(table.root_folder)
        paths = [os.path.relpath(path, root) for one in images if isinstance(one, list) for path in one]
        if len(set(paths)) < len(paths):
            raise UserError(f"{name}: two of its lists contain the same image")
        return encoded_images(ImageFiles(Path(root), paths), table)
    if isinstance(first := images[0], HDF5Images):
        files = [path for one in images if isinstance(one, HDF5Images) for path in one.paths]
        return encoded_images(HDF5Images(files, first.key), table)
    pixels = np.concatenate([np.asarray(one) for one in images]) if len(images) > 1 else np.asarray(images[0])
    return InMemoryImages(pixels, name, table.channels or 3)


# -- finding the files ------------------------------------------------------------------------------------------------


def _fetch(name: str, table: DataConfig) -> dict[str, Any]:
    """Return torchvision's data set for each split, downloading missing data first if ``download`` is true."""
    from torchvision import datasets

    kind, root = getattr(datasets, name), Path(table.root_folder).expanduser()
    shown = table.dataset if table.dataset != "torchvision" else name
    lock = root / f".{shown}.lock"
    accepted = {key for base in kind.__mro__[:-1] for key in inspect.signature(base.__init__).parameters}
    selected = _selections(name, table)
    arguments = {key: value for key, value in table.args.items() if key != TORCHVISION_SETS[name].selector}
    arguments |= {"loader": str} if "loader" in accepted else {}  # makes the class return the path of each image

    def read(download: bool) -> dict[str, Any]:
        extra = {"download": download} if "download" in accepted else {}
        found = {split: kind(str(root), **choice, **arguments, **extra) for split, choice in selected.items()}
        for dataset in found.values():
            first = dataset[0][0] if "loader" in accepted else None
            if first is not None and not os.path.exists(first):
                raise FileNotFoundError(f"{first} does not exist")
        return found

    if name == "PCAM" and find_spec("h5py") is None:
        raise missing_package('data.name = "PCAM"', "h5py", "pcam")
    advice = f"put it there as described for {name} in torchvision.datasets, or set data.root to the folder that has it"
    if is_held(lock):  # another process is downloading or unpacking the data, which are incomplete until it is done
        with held(lock):
            pass
    try:
        if name == "ImageNet" and os.access(root, os.W_OK):  # unpacks archives, which only one process may do
            with held(lock):
                if not all((root / str(choice["split"])).is_dir() for choice in selected.values()):
                    read(download=False)
        return read(download=False)
    except Exception as error:  # damaged files raise exceptions of many types
        missing = f"{shown} is not in data.root = {table.root_folder!r}, or is incomplete"
        if "download" not in accepted:
            text = f"{missing} ({first_line(error)}), and torchvision cannot download it: {advice}"
            raise UserError(text) from error
        if not table.download:
            raise UserError(
                f"{missing}, but data.download is false ({first_line(error)}); "
                "run once with --set data.download=true and network access, or copy the files there"
            ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Several processes may get here at once: one downloads, the others wait and then find the data.
        with held(lock):
            return read(download=True)
    except Exception as error:
        raise UserError(
            f"{shown} is not in data.root = {table.root_folder!r}, or is damaged, and could not be downloaded: "
            f"{first_line(error)}; remove the files there, or download them on a machine with a network and copy the "
            "folder, or set data.root to the folder that has them"
        ) from error


def _selections(name: str, table: DataConfig) -> dict[str, dict[str, str | bool]]:
    """Return, for each split that the recipe uses, the argument that selects its official images, if it has any."""
    facts = TORCHVISION_SETS[name]
    if not facts.lists:
        return {"train": {}}
    lists = facts.lists_for(table.args.get(facts.selector) if facts.selector != "train" else None)
    if lists is None:
        raise UserError(f"data.args.{facts.selector} = {table.args[facts.selector]!r} is not a training list of {name}")
    unread = [split for split in _SPLITS[1:] if getattr(table.split, split) == 0]
    named = zip(_SPLITS, lists, strict=True)
    return {split: {facts.selector: value} for split, value in named if value is not None and split not in unread}


# -- reading what torchvision found -----------------------------------------------------------------------------------


def _read(dataset: Any, arguments: dict[str, Any]) -> tuple[Images, Any]:
    """Return the images of one official split and their class indices; for CelebA, 1 for each attribute of an image."""
    match type(dataset).__name__:
        case "Caltech256":
            names = dataset.categories
            rows = zip(dataset.y, dataset.index, strict=True)
            folder = os.path.join(dataset.root, "256_ObjectCategories")
            return [os.path.join(folder, names[y], f"{y + 1:03d}_{n:04d}.jpg") for y, n in rows], dataset.y
        case "CelebA":
            folder = os.path.join(dataset.root, dataset.base_folder, "img_align_celeba")
            return [os.path.join(folder, name) for name in dataset.filename], dataset.attr.numpy()
        case "OxfordIIITPet":
            is_binary = arguments.get("target_types") == "binary-category"
            return list(map(str, dataset._images)), dataset._bin_labels if is_binary else dataset._labels
        case "PCAM":
            files, folder = dataset._FILES[dataset._split], dataset._base_folder
            with dataset.h5py.File(folder / files["targets"][0]) as targets:
                labels = targets["y"][:].ravel()
            return HDF5Images([str(folder / files["images"][0])], "x"), labels
        case "Omniglot":  # torchvision takes its class order from the file system
            ranks = np.argsort(np.argsort(dataset._characters))
            pairs = [dataset[i] for i in range(len(dataset))]
            return [path for path, _ in pairs], [int(ranks[label]) for _, label in pairs]
        case "GTSRB":
            return [path for path, _ in dataset._samples], [label for _, label in dataset._samples]
        case "FER2013":
            return np.stack([np.asarray(image) for image, _ in dataset._samples]), [y for _, y in dataset._samples]
    if hasattr(dataset, "loader"):
        pairs = [dataset[i] for i in range(len(dataset))]
        return [path for path, _ in pairs], [label for _, label in pairs]
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 4 and pixels.shape[3] != 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels)
    return np.ascontiguousarray(pixels), labels if labels.ndim == 1 else labels[:, 0]  # QMNIST: column 0 is the class


def _class_names(dataset: Any, arguments: dict[str, Any]) -> list[str] | None:
    """Return the class names in the order of their indices; None if torchvision has none."""
    match type(dataset).__name__:
        case "Caltech256":
            return [name.partition(".")[2] for name in dataset.categories]
        case "CelebA":
            return [name for name in dataset.attr_names if name]  # the last one is empty
        case "INaturalist":
            (level,) = dataset.target_type
            if level != "full":
                return list(dataset.categories_index[level])
            return list(dataset.all_categories)
        case "Omniglot":
            return sorted(dataset._characters)
        case "OxfordIIITPet" if arguments.get("target_types") == "binary-category":
            return list(dataset.bin_classes)
    names = getattr(dataset, "classes", None)
    if names is None:
        return None
    if hasattr(dataset, "wnids"):  # ImageNet: classes have several names, and two classes are named crane
        names = [synonyms[0] for synonyms in names]
        wnids = zip(names, dataset.wnids, strict=True)
        return [f"{name} ({wnid})" if names.count(name) > 1 else name for name, wnid in wnids]
    return [re.sub("^/[a-z]/", "", name) for name in names]  # Places365: /a/abbey

"""Layout of image folders: which folders are splits and which are classes.

An unambiguous layout is read, and a note says how. Any other raises an error that says what was found and what to do.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from toolkit.data.folder_walk import FORMATS, FolderWalk, identity, join, list_folder
from toolkit.errors import UserError
from toolkit.formatting import plural

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Names of split folders, case-insensitive. ``_set``, ``data``, ``images`` etc. may follow, as in ``Training_Set``."""

_SUFFIX = re.compile(r"[ _-]*(data[ _-]*set|set|data|split|folder|images?|imgs?)$")
_LIKE_A_SPLIT = re.compile(
    r"(?<![a-z])(train|training|trainval|val|valid|validation|dev|eval|evaluation|tests?|testing)(?![a-z])"
)
SHOWN = 5
"""Maximum number of folder names in a message."""


class Layout(NamedTuple):
    """The splits, classes and images found below a root folder."""

    root: Path
    """The folder that paths are relative to."""
    classes: list[str]
    files: dict[str, dict[str, list[str]]]
    """Sorted paths of the images, by split (always including "train") and class."""
    notes: list[str]
    """Notes for the log, one line each."""


def read_layout(root: Path, class_folders: str = "auto", unread: Collection[str] = ()) -> Layout:
    """Find the images of a folder data set by split and class, with any of the usual folder names.

    ``class_folders`` defines which folders are classes: "top", those directly in the root or the split folder; "leaf",
    every folder that contains images itself; "auto", the same as "top" if the layout allows no other interpretation.
    Folders of splits in ``unread`` are not read and count as empty. Raises UserError for an ambiguous layout.
    """
    root, notes = _unwrapped(root, lambda only: split_of(only) is not None)
    splits, more = _split_folders(root)
    notes += more
    notes += [f"{splits[split]}/ is not read: data.split.{split} is 0" for split in unread if split in splits]
    walk = FolderWalk(root)
    for folder in splits.values():
        if folder:
            walk.mark_as_parent_of_groups(folder)
    if "" not in splits.values():
        walk.above_classes("")
    files: dict[str, dict[str, list[str]]] = {}
    for split, folder in splits.items():
        files[split] = {}
        if split not in unread:
            files[split], more = _classes(walk, folder, class_folders, files["train"])
            notes += more
    classes = sorted(files["train"])
    for split in files:
        _check_known(split, root / splits[split], list(files[split]), classes)
    for split in files:
        absent = [name for name in classes if name not in files[split]]
        if absent and split not in unread:
            notes.append(
                f"{splits[split]}/ has no images of {len(absent)} of {len(classes)} classes: {_shown(absent, '')}"
            )
    return Layout(root, classes, files, [*notes, *walk.notes()])


def split_of(name: str) -> str | None:
    """Return the split that a folder name usually stands for; None if it is not the name of a split."""
    stem = _SUFFIX.sub("", name.lower())
    return next((split for split, names in SPLIT_NAMES.items() if stem in names), None)


def _unwrapped(folder: Path, is_final: Callable[[str], bool]) -> tuple[Path, list[str]]:
    """Descend through folders that contain only one folder, as left by archives. Returns the innermost, and notes."""
    notes: list[str] = []
    visited = {identity(folder)}
    while True:
        listing = list_folder(folder)
        if len(listing.folders) != 1 or listing.images or is_final(listing.folders[0]):
            return folder, notes
        inner = folder / listing.folders[0]
        content = list_folder(inner)
        if content.images or not content.folders or identity(inner) in visited:
            return folder, notes
        beside = [name for kind, name in listing.left_out if kind.endswith("file")]
        also = f" (not read: {_shown(beside, '')})" if beside else ""
        notes.append(f"{folder} holds a single folder, {inner.name}/: the images are read from {inner}{also}")
        visited.add(identity(inner))
        folder = inner


def _split_folders(root: Path) -> tuple[dict[str, str], list[str]]:
    """Return the folder of each split relative to the root ("" for the root itself), "train" always, and notes."""
    folders = list_folder(root).folders
    named = {name: split for name in folders if (split := split_of(name)) is not None}
    others = [name for name in folders if name not in named]
    if not named:
        _check_no_lookalikes(root, others)
        return {"train": ""}, []
    classes = [name for name in others if FolderWalk(root).images(name, name)]
    if len(named) == 1 and len(classes) > 1 and list_folder(root / next(iter(named))).images:
        note = f"{_shown(named)} holds images directly and is next to {_shown(classes)}: it is a class, not a split"
        return {"train": ""}, [note]
    if classes:
        raise UserError(
            f"{root} holds folders named like splits ({_shown(named)}) and other folders with images "
            f"({_shown(classes)}), so it is not clear what the classes are. Put every class into the folder of a split "
            "(train/<class>/), or rename or move away what does not belong there"
        )
    splits: dict[str, str] = {}
    for split in SPLIT_NAMES:
        names = [name for name, other in named.items() if other == split]
        if len(names) > 1:
            raise UserError(f"{root} has both {' and '.join(f'{name}/' for name in names)}; keep one of them")
        if names:
            splits[split] = names[0]
    if "train" not in splits:
        raise UserError(f"{root} has {_shown(splits.values())} but no train/")
    notes = ["splits by folders: " + ", ".join(f"{split} is {name}/" for split, name in splits.items())]
    if others:
        notes.append(f"not read, because they hold no images: {_shown(others)}")
    return splits, notes


def _check_no_lookalikes(root: Path, folders: list[str]) -> None:
    """Raise UserError if folders seem to be splits by names such as seg_train, train2017 and val_256."""
    alike = [name for name in folders if _LIKE_A_SPLIT.search(name.lower())]
    if alike and (len(alike) == len(folders) or any(not list_folder(root / name).images for name in alike)):
        raise UserError(
            f"{root} holds {_shown(folders)}; {_shown(alike)} may be splits, but these names are not known. If they "
            "are splits, rename them to train/, val/ and test/; if they are classes, give them other names"
        )


def _classes(
    walk: FolderWalk, folder: str, class_folders: str, known: Collection[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return each class below one split's folder with its images, and notes; ``known`` are the training classes."""
    notes: list[str] = []
    if folder and class_folders != "leaf":  # names of "leaf" classes include all folders below the split's
        inner, notes = _unwrapped(Path(walk.root, folder), lambda only: only in known)
        if notes:
            folder = inner.relative_to(walk.root).as_posix()
            walk.mark_as_parent_of_groups(folder)
    path, listing = Path(walk.root, folder), walk.above_classes(folder)
    if not listing.folders:
        held = f"it holds {plural(len(listing.images), 'image')} directly" if listing.images else "it is empty"
        split = split_of(folder.partition("/")[0])
        away = f". If they have no labels, set data.split.{split} = 0: then {folder}/ is not read" if known else ""
        raise UserError(f"{path} has no class folders, {held}: images belong in {path}/<class>/{away}")
    found = {name: walk.images(join(folder, name), join(folder, name)) for name in listing.folders}
    if not all(found.values()):
        raise UserError(_no_images(path, found))
    start = len(folder) + 1 if folder else 0
    if class_folders == "leaf":
        leaves = defaultdict(list)
        for file in sorted(file for paths in found.values() for file in paths):
            leaves[file[start:].rpartition("/")[0]].append(file)
        return dict(sorted(leaves.items())), notes
    below = {}
    for name, paths in found.items():
        rests = (file[start + len(name) + 1 :] for file in paths)
        below[name] = Counter(rest.partition("/")[0] if "/" in rest else "" for rest in rests)
    if class_folders == "auto":
        _check_depth(path, below)
    deep = sum(counts.total() - counts[""] for counts in below.values())
    if deep:
        notes.append(f"{path}: {plural(deep, 'image')} in folders within class folders, taken as images of that class")
    return found, notes


def _no_images(path: Path, found: dict[str, list[str]]) -> str:
    """Return the error message for class folders that hold no images."""
    empty = [name for name, files in found.items() if not files]
    full = [name for name, files in found.items() if files]
    if len(full) == 1 and not list_folder(path / full[0]).images:
        return (
            f"in {path} only {full[0]}/ holds images, in subfolders; {_shown(empty)} hold none. Set data.root to "
            f"{path / full[0]} if its folders are the classes"
        )
    if len(empty) == 1:
        return f"the class folder {path / empty[0]} holds no image {FORMATS}; fill or remove it"
    return (
        f"{len(empty)} of {len(found)} folders in {path} hold no image {FORMATS}: {_shown(empty)}; fill or remove them"
    )


def _check_depth(path: Path, below: dict[str, Counter[str]]) -> None:
    """Raise UserError if it is not clear whether the folders in ``path`` are the classes, or folders within them.

    ``below`` counts for each folder the images directly in it, under "", and those below each of its subfolders.
    """
    inner = {name: sorted(one for one in counts if one) for name, counts in below.items()}
    splits = [f"{name}/{one}" for name, ones in inner.items() for one in ones if split_of(one)]
    if splits:
        raise UserError(
            f"{path} has folders named like splits within class folders ({_shown(splits)}): move their images to "
            'train/<class>/, val/<class>/ and test/<class>/; or set data.class_folders = "top" to take all as one class'
        )
    nested = [name for name, counts in below.items() if not counts[""]]
    if not nested:
        return
    first = inner[nested[0]]
    is_same = all(inner[name] == first for name in nested)
    if is_same and len(first) == 1 and len(nested) == len(below):
        return  # such as <class>/images/<image>
    if is_same and len(nested) > 1:
        what = f"the same folders ({_shown(first)}). If these are versions of one data set"
        remedy = f"data.root to one of them, such as {path / nested[0]}"
    else:
        what = f"no images themselves but folders ({_shown(f'{name}/{inner[name][0]}' for name in nested)})"
        what, remedy = f"{what}. If every folder that holds images is a class", 'data.class_folders = "leaf"'
    raise UserError(
        f"it is not clear which folders are the classes: in {path}, {_shown(nested)} hold {what}, set {remedy}; if the "
        f'folders in {path.name}/ are the classes, with all that is below them, set data.class_folders = "top"'
    )


def _check_known(split: str, folder: Path, names: list[str], classes: list[str]) -> None:
    """Raise UserError if a split has class folders that the training images do not have."""
    unknown = sorted(set(names) - set(classes))
    if not unknown:
        return
    if len(unknown) == len(names):
        raise UserError(
            f"{folder} has class folders that the training images do not have: {_shown(unknown, '')}, and none that "
            f"they have ({_shown(classes, '')}). Sort its images into {folder}/<class>/, or set "
            f"data.split.{split} = 0: then it is not read"
        )
    raise UserError(
        f"{folder} has class folders that the training images do not have: {', '.join(unknown[:10])}; "
        "a model can only learn classes that it is trained on"
    )


def _shown(names: Iterable[str], end: str = "/") -> str:
    """Format the first few names for a message; ``end`` is appended to each."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"{name}{end}" for name in names[:SHOWN]) + more

"""Recursive search for images: which files count as images, which folders are read, and what is skipped."""

from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from toolkit.data.archives import FOLDER, find_archive
from toolkit.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".icb", ".vda", ".vst", ".qoi"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".pcx", ".dcx", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".ico", ".icns"),
    *(".cur", ".dds", ".blp", ".ftc", ".ftu", ".psd", ".xbm", ".xpm", ".msp", ".im", ".gbr", ".pxr", ".pcd"),
    *(".fits", ".fit", ".fli", ".flc", ".iim", ".npy"),
)
"""Case-insensitive suffixes of image files: all formats that Pillow decodes without plugins, and NumPy arrays."""

FORMATS = f"({', '.join(IMAGE_SUFFIXES[:6])} or another format that Pillow reads)"
"""Description of the formats for messages."""

_JUNK = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""Folders created by systems and archivers. Like hidden folders they are not read."""


class FolderListing(NamedTuple):
    """The content of one folder, names sorted by code point."""

    folders: list[str]
    """Visible folders and links to folders."""
    links: set[str]
    """Names in ``folders`` that are links."""
    images: list[str]
    left_out: list[tuple[str, str]]
    """Kind and name of everything else: hidden folders, other files, and special files (pipes, sockets, devices)."""


def list_folder(path: str | Path) -> FolderListing:
    """List the content of a folder. Raises UserError if it cannot be read or contains a broken link.

    A broken link that is named like an image counts as an image, and is reported by the check of the images.
    """
    found = FolderListing([], set(), [], [])
    try:
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                _sort_in(entry, found)
    except NotADirectoryError as error:
        if (within := find_archive(path)) is None:
            raise UserError(f"the folder {path} cannot be read: {error.strerror}") from None
        archive, folder = within
        for name, row in sorted(archive.folders[folder].items()):
            if not _leave_out_hidden(name, row == FOLDER, found):
                _add(name, row == FOLDER, row >= 0, found)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be read: {error.strerror}") from None
    return found


def _sort_in(entry: os.DirEntry[str], found: FolderListing) -> None:
    """Add one directory entry to the listing of its folder."""
    name = entry.name
    if _leave_out_hidden(name, entry.is_dir(follow_symlinks=False), found):
        return
    if entry.is_symlink():
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if not _is_image(name):
                raise UserError(
                    f"the link {entry.path} leads to {os.readlink(entry.path)}, which cannot be opened "
                    f"({error.strerror}): correct or remove the link"
                ) from None
            mode = stat.S_IFREG
        is_folder, is_file = stat.S_ISDIR(mode), stat.S_ISREG(mode)
        found.links.update([name] if is_folder else [])
    else:
        is_folder, is_file = entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False)
    _add(name, is_folder, is_file, found)


def _leave_out_hidden(name: str, is_folder: bool, found: FolderListing) -> bool:
    """Return whether an entry is hidden or created by an operating system, and leave it out of the listing if so."""
    if not name.startswith(".") and name not in _JUNK:
        return False
    if is_folder:
        found.left_out.append(("hidden folder", name))
    elif _is_image(name):
        found.left_out.append(("hidden file", name))
    return True


def _add(name: str, is_folder: bool, is_file: bool, found: FolderListing) -> None:
    """Add a visible entry to a listing; if it is neither a folder nor a file, it is a special file."""
    if is_folder:
        found.folders.append(name)
    elif not is_file:
        found.left_out.append(("special file", name))
    elif _is_image(name):
        found.images.append(name)
    else:
        found.left_out.append((f"{Path(name).suffix.lower()} file".strip(), name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


class FolderWalk:
    """Recursive search below one root folder, which follows links and visits each folder at most once."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        real = Path(os.path.realpath(root))
        self._owners: dict[tuple[int, int], tuple[str | None, str]] = {
            identity(folder): (None, str(folder)) for folder in (real, *real.parents)
        }
        """By device and inode: the group that a folder belongs to (None: it contains several groups), and its path."""
        self._left_out: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def mark_as_parent_of_groups(self, folder: str) -> None:
        """Mark a folder as containing several groups, so that links to it from within a group are not followed.

        Raises UserError if the folder already has another role under another path.
        """
        owner = self._owners.setdefault(identity(self._path(folder)), (None, folder))
        if owner != (None, folder):
            raise UserError(f"{self._path(folder)} and {self._path(owner[1])} are the same folder: remove one of them")

    def images(self, folder: str, group: str) -> list[str]:
        """Return the sorted paths, relative to the root, of all images at any depth below ``folder`` ("" is the root).

        Links to the root, to folders above it or containing groups, and to folders already visited are skipped and
        counted. Raises UserError if a folder was already found for another group, or cannot be read.
        """
        found: list[str] = []
        pending, links = [folder], list[str]()
        while pending or links:
            is_link, folder = not pending, pending.pop() if pending else links.pop(0)
            if is_link and self._leads_back(folder):
                self._leave_out("repeated folder", folder)
                continue
            if not self._visit(folder, group):
                continue
            listing = self._list(folder)
            found += [join(folder, name) for name in listing.images]
            for name in listing.folders:
                (links if name in listing.links else pending).append(join(folder, name))
        return sorted(found)

    def above_classes(self, folder: str) -> FolderListing:
        """List a folder of class folders; images directly in it have no label and are counted as left out."""
        listing = self._list(folder)
        for name in listing.images:
            self._leave_out("unlabeled image", join(folder, name))
        return listing

    def _list(self, folder: str) -> FolderListing:
        listing = list_folder(self._path(folder))
        for kind, name in listing.left_out:
            self._leave_out(kind, join(folder, name))
        return listing

    def _leave_out(self, kind: str, name: str) -> None:
        self._left_out[kind] += 1
        self._examples.setdefault(kind, name)

    def notes(self) -> list[str]:
        """Return one line about everything that was left out; [] if nothing was."""
        if not self._left_out:
            return []
        kinds = [
            f"{count} {kind}{'' if count == 1 else 's'} ({self._examples[kind]}{'' if count == 1 else ', ...'})"
            for kind, count in sorted(self._left_out.items(), key=lambda item: (-item[1], item[0]))
        ]
        more = f" and {len(kinds) - 10} more kinds" if len(kinds) > 10 else ""
        return [f"left out of the images: {', '.join(kinds[:10])}{more}"]

    def _visit(self, folder: str, group: str) -> bool:
        """Return whether to read the folder, and mark it visited. Raises UserError if another group has it."""
        key = identity(self._path(folder))
        if not folder:
            return True
        if key not in self._owners:
            self._owners[key] = (group, folder)
            return True
        owner, first = self._owners[key]
        if owner is None and folder == group:
            raise UserError(
                f"{self._path(folder)} is a link to {self._path(first)}, which contains several splits or classes: "
                "remove the link"
            )
        if owner not in (None, group):
            raise UserError(
                f"{self._path(folder)} and {self._path(first)} are the same folder, so its images would be both in "
                f"{group} and in {owner}: remove one of the two"
            )
        self._leave_out("repeated folder", folder)
        return False

    def _leads_back(self, link: str) -> bool:
        """Return whether a link leads to a folder that contains the link; real paths are compared."""
        real = os.path.realpath(self._path(link))
        return Path(os.path.realpath(os.path.dirname(self._path(link)))).is_relative_to(real)

    def _path(self, folder: str) -> str:
        return os.path.join(self.root, folder) if folder else self.root


def identity(folder: str | Path) -> tuple[int, int]:
    """Return the device and inode of a folder. Raises UserError if it cannot be read.

    For a folder in an archive, return two numbers that identify it in the same way.
    """
    try:
        state = os.stat(folder)
    except NotADirectoryError as error:
        if (within := find_archive(folder)) is None:
            raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from None
        archive, inner = within
        return -os.stat(archive.path).st_ino, archive.numbers[inner]
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from None
    return state.st_dev, state.st_ino


def join(folder: str, name: str) -> str:
    """Join a folder and a name; the folder "" is the one that paths are relative to."""
    return f"{folder}/{name}" if folder else name

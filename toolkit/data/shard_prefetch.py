"""Fetching the next shard before data workers need it, so that they do not wait for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from toolkit.data.image_sources import EncodedImages, ImageSource
from toolkit.data.sampling import IntArray
from toolkit.data.shard_files import FetchedShards


class ShardPrefetch:
    """A thread that fetches one shard more than the batches that were already requested need.

    It decides only when shards are fetched, never which images are used. A shard that cannot be fetched is left to the
    data worker that needs it, which reports the fault. All processes of a machine may prefetch the same shard: one
    fetches it under its lock, and the others find it.
    """

    def __init__(self, files: FetchedShards, needs: Iterator[IntArray]) -> None:
        """``needs``: the shards of each batch, in order."""
        self._files, self._needs = files, needs
        self._changed, self._requested, self._is_stopped = threading.Condition(), 0, False
        self._thread = threading.Thread(target=self._run, name="shard prefetch", daemon=True)
        self._thread.start()

    def advance(self, requested: int) -> None:
        """Tell that batches before number ``requested`` have been requested from the data workers."""
        with self._changed:
            self._requested = requested
            self._changed.notify()

    def finish(self) -> None:
        """Wait for the thread after all batches were loaded, so that it does not run while processes are forked."""
        self._thread.join()

    def stop(self) -> None:
        """Fetch no more shards; one that is being fetched is finished in the background."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def _run(self) -> None:
        for number, shards in enumerate(self._needs):
            for shard in shards.tolist():
                if self._is_stopped:
                    return
                if self._files.path(shard).exists():
                    continue
                with contextlib.suppress(OSError):
                    self._files.open(shard).close()
                with self._changed:
                    self._changed.wait_for(lambda: self._is_stopped or number < self._requested)  # noqa: B023


def shard_prefetch(images: ImageSource, indices: IntArray, batches: Sequence[IntArray]) -> ShardPrefetch | None:
    """Return a prefetch for batches of positions in ``indices``; None if the images are not in fetched shards."""
    source = images.source if isinstance(images, EncodedImages) else None
    files, stored_in = getattr(source, "files", None), getattr(source, "stored_in", None)
    if not isinstance(files, FetchedShards) or stored_in is None:
        return None
    shards: npt.NDArray[np.int32] = stored_in
    return ShardPrefetch(files, (np.unique(shards[indices[positions]]) for positions in batches))

"""Measure writing the cache to memory that the system has just provided, and to memory that was just freed.

Each round writes `--mb` megabytes to a new file, in blocks of 32 images of 224 pixels, and removes it. A virtual
machine that returns freed memory to its host pays for each page in the first round, and again after a pause.

    python benchmarks/fresh_memory.py --folder /tmp --mb 1000
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from toolkit.cache.store import CacheEntryWriter

IMAGES, BYTES = 32, 32 * 224 * 224 * 3


def main() -> None:
    """Parse the command line and print the times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    block = np.random.default_rng(0).integers(0, 256, BYTES, dtype=np.uint8)
    blocks = arguments.mb * 2**20 // BYTES
    found = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(arguments.rounds):
            writer = CacheEntryWriter(Path(folder), "images-benchmark")
            before = os.times()
            for _ in range(blocks):
                writer.add(block)
            after = os.times()
            writer.discard()
            found.append((after.user + after.system - before.user - before.system) / (blocks * IMAGES) * 1e3)
    print(json.dumps({"ms of CPU time per image, round by round": [round(one, 3) for one in found]}))


if __name__ == "__main__":
    main()

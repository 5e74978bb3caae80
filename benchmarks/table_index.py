"""Measure opening and splitting 1.3 million images of 20,000 classes, and the memory of its workers.

The images are listed in a table, or are in a zip file. The image files are not needed, because opening reads none of
them. Each format is opened in its own process. The results are its CPU time, its peak memory in addition to that of
the imports, and the private memory of two forked workers that then read all names.

    python benchmarks/table_index.py [--rows 1300000] [--classes 20000]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from toolkit.data.datasets import open_dataset
from toolkit.data.splits import split_dataset, split_hash
from toolkit.recipe.schema import DataConfig

WORKERS = 2
CSV_COLUMNS = ("{}", '{"group": "group"}', '{"keep": ["group"]}')
"""[data.columns] of the measurements as JSON; formats other than CSV: only the first."""


def write_tables(folder: Path, rows: int, classes: int) -> list[Path]:
    """Write the same rows in random order, like those of exported tables, as CSV, JSON lines, Parquet and zip."""
    import pyarrow as pa
    from pyarrow import parquet

    labels = np.random.default_rng(0).permutation(np.arange(rows) % classes).tolist()
    names = [f"n{label:08d}" for label in range(classes)]
    table = pa.table({
        "image": [f"train/{names[label]}/{names[label]}_{i:08d}.JPEG" for i, label in enumerate(labels)],
        "label": [names[label] for label in labels],
        "group": [f"p{i % 100_000}" for i in range(rows)],
    })  # fmt: skip
    parquet.write_table(table, folder / "images.parquet")
    with open(folder / "images.csv", "w", newline="") as file, open(folder / "images.jsonl", "w") as lines:
        writer = csv.writer(file)
        writer.writerow(table.column_names)
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
            writer.writerow(row)
            lines.write(json.dumps(dict(zip(table.column_names, row, strict=True))) + "\n")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name in table["image"].to_pylist():
            archive.writestr(name, b"-")
    return [folder / f"images.{suffix}" for suffix in ("csv", "jsonl", "parquet", "zip")]


def status(key: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def private_bytes() -> int:
    """Return the memory that this process does not share with any other, in bytes."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(kb) for kb in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


def measure(table: Path, columns: dict[str, object]) -> dict[str, float]:
    """Open a table or zip file in this process; return seconds of CPU time (open_wall_s: wall-clock time) and MB."""
    source = {"dataset": "table", "table": str(table), "columns": columns}
    config = DataConfig.model_validate(
        {"dataset": "imagefolder", "root": str(table)} if table.suffix == ".zip" else source
    )
    if table.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began, wall = status("VmRSS"), time.process_time(), time.perf_counter()
    dataset = open_dataset(config)
    wall = time.perf_counter() - wall
    opened, peak, kept = time.process_time(), status("VmHWM") - before, status("VmRSS") - before
    splits = split_dataset(dataset, config)
    split, split_peak = time.process_time(), status("VmHWM") - before
    split_hash(dataset, splits)
    hashed = time.process_time()
    return {
        "open_wall_s": wall,
        "open_s": opened - began,
        "peak_mb": peak / 1e6,
        "kept_mb": kept / 1e6,
        "split_s": split - opened,
        "split_peak_mb": split_peak / 1e6,
        "hash_s": hashed - split,
        "worker_mb": max(worker(dataset) for _ in range(WORKERS)) / 1e6,
    }


def worker(dataset: object) -> int:
    """Return the private memory, in bytes, that a forked worker has after reading every name and label."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        before = private_bytes()
        for i in range(len(dataset.labels)):  # type: ignore[attr-defined]
            dataset.images.name(i), dataset.labels[i]  # type: ignore[attr-defined]
        os.write(write_end, str(private_bytes() - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(read_end, 100))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--columns", type=json.loads, default={}, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.columns)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for table in write_tables(Path(folder), arguments.rows, arguments.classes):
            for columns in CSV_COLUMNS if table.suffix == ".csv" else CSV_COLUMNS[:1]:
                command = [sys.executable, __file__, "--measure", str(table), "--columns", columns]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                size = table.stat().st_size / 1e6
                print(f"{table.name} ({size:.0f} MB) {columns}", {k: round(v, 1) for k, v in found.items()})


if __name__ == "__main__":
    main()

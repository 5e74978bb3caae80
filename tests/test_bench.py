"""toolkit bench: its metrics must be consistent, and its operation counts equal those computed by hand."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from cli import toolkit
from distributed import launch
from torch import nn

from toolkit import bench
from toolkit.errors import RunFailed
from toolkit.recipe import load

pytestmark = pytest.mark.long

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.toml"


def test_metrics_of_the_quickstart_are_consistent() -> None:
    recipe = load(QUICKSTART, ["train.batch_size=16", "data.images_per_class=8"]).recipe
    speeds = bench.bench(recipe, steps=2, repeats=1)
    # 8x8 pixels, 3x3 kernels: 1 to 32 and 32 to 64 channels; pooled to 4x4: 64 to 128; pooled to 2x2: a linear layer.
    forward = 2 * 9 * (64 * 1 * 32 + 64 * 32 * 64 + 16 * 64 * 128) + 2 * 4 * 128 * 10
    first_layer = 2 * 9 * 64 * 1 * 32  # needs no gradient of its input
    assert speeds.gflop_per_image == pytest.approx((3 * forward - first_layer) / 1e9, rel=1e-6)
    assert speeds.steps == 2
    assert 0 <= speeds.waiting_for_data <= 1
    assert speeds.data_images_per_s > speeds.step_images_per_s
    assert speeds.utilization is None
    assert "whole step" in bench.bench_text(speeds, {"step_images_per_s": speeds.step_images_per_s / 2})


def test_processes_of_a_launcher_measure_together_and_one_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    arguments = [QUICKSTART, "--steps", "2", "--repeats", "1", "--json", "-o", tmp_path / "results.json"]
    first, second = launch(2, toolkit, "bench", *arguments)
    assert first.status == second.status == 0, first.stderr + second.stderr
    assert json.loads(first.stdout) == json.loads((tmp_path / "results.json").read_text())
    assert second.stdout == ""


def test_a_grouped_convolution_counts_the_operations_of_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(), nn.Linear(128, 2)
    )
    step = torch.randn(5, 8, 4, 4)
    monkeypatch.setattr(bench, "_train", lambda *_: grouped(step).sum().backward())
    pointwise, depthwise, linear = 2 * 8 * 8 * 16, 2 * 9 * 8 * 16, 2 * 128 * 2
    counted = bench._flops(cast(Any, None), [(cast(Any, SimpleNamespace(own=5)), None)])
    assert counted == 2 * pointwise + 3 * depthwise + 3 * linear  # the first layer's input needs no gradient


def test_each_repetition_continues_the_stream_of_batches() -> None:
    epochs: list[int] = []

    def epoch(number: int) -> Iterator[int]:
        epochs.append(number)
        yield from (10 * number, 10 * number + 1, 10 * number + 2)

    stream = bench._EndlessLoader(SimpleNamespace(epoch=epoch))
    assert [list(itertools.islice(stream.epoch(0), 2)) for _ in range(3)] == [[0, 1], [2, 10], [11, 12]]
    assert epochs == [0, 1]


@pytest.mark.extended
def test_comparing_with_the_plain_loop_needs_no_source_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop is a module of the package, so that --compare works from an installed one, in any folder."""
    monkeypatch.chdir(tmp_path)
    few = ["train.batch_size=16", "data.images_per_class=8"]
    found = bench.compare_with_plain_loop(str(QUICKSTART), few, 1, 1)
    assert found["step_images_per_s"] > 0


def test_comparing_a_multi_label_recipe_is_refused_before_anything_is_measured() -> None:
    refused = toolkit("bench", QUICKSTART.with_name("two_digits.toml"), "--compare")
    assert refused.status == 2
    assert refused.stderr == '--compare: the plain loop trains with task.kind = "single_label" only\n'


def test_of_progressive_sizes_the_last_one_is_measured_and_the_output_says_so() -> None:
    few = ["train.batch_size=16", "data.images_per_class=8", "data.image_size=8", "data.progressive_sizes=[6, 8]",
           'model={ source = "timm", name = "test_resnet" }']  # fmt: skip
    speeds = bench.bench(load(QUICKSTART, few).recipe, steps=1, repeats=1)
    assert "input size       8 x 8, the last of data.progressive_sizes" in bench.bench_text(speeds)


def test_a_failure_of_the_plain_loop_is_reported_with_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2; echo 'ValueError: no data' >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RunFailed, match=r"the plain loop failed: ValueError: no data$"):
        bench.compare_with_plain_loop(str(QUICKSTART), [], 1, 1)


def test_an_invalid_recipe_is_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('[recipe]\nname = "wrong"\n')
    assert toolkit("bench", path).status == 2

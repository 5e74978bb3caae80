"""toolkit bench: figures that must hang together, and arithmetic that can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import toolkit

from toolkit import bench
from toolkit.errors import UserError
from toolkit.recipe import load

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.toml"


def test_figures_of_the_quickstart() -> None:
    recipe = load(QUICKSTART, ["train.batch_size=16", "data.images_per_class=8"]).recipe
    speeds = bench.bench(recipe, steps=2, repeats=1)
    # 8x8 pixels, 3x3 kernels: 1 to 32 and 32 to 64 channels; pooled to 4x4: 64 to 128; pooled to 2x2: a linear layer.
    forward = 2 * 9 * (64 * 1 * 32 + 64 * 32 * 64 + 16 * 64 * 128) + 2 * 4 * 128 * 10
    first_layer = 2 * 9 * 64 * 1 * 32  # needs no gradient of its input
    assert speeds.gflop_per_image == pytest.approx((3 * forward - first_layer) / 1e9, rel=1e-6)
    assert speeds.steps == 2
    assert 0 <= speeds.waiting_for_data <= 1
    assert speeds.data_images_per_s > speeds.step_images_per_s
    assert speeds.utilisation is None
    assert "whole step" in bench.bench_text(speeds, {"step_images_per_s": speeds.step_images_per_s / 2})


def test_a_plain_loop_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "PLAIN_LOOP", tmp_path / "plain_loop.py")
    with pytest.raises(UserError, match="--compare needs plain_loop"):
        bench.compare_with_plain_loop("recipe.toml", [], 1, 1)


def test_a_recipe_that_is_wrong_is_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('[recipe]\nname = "wrong"\n')
    assert toolkit("bench", path).status == 2

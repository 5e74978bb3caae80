"""The whitening first convolution: its filters decorrelate patches of training images; every process has them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import launch
from finished import train_on_files

from toolkit.data.datasets import open_dataset
from toolkit.data.image_sources import InMemoryImages
from toolkit.data.preprocessing import Preprocessing
from toolkit.data.splits import split_dataset
from toolkit.recipe import loads_recipe
from toolkit.training.checkpoint import load_weights
from toolkit.training.fit import fit
from toolkit.training.whitening import EPS, whitening_filters

MODEL = """
[model]
source = "toolkit"

[model.convnet]
blocks = [{ channels = 24, kernel = 2, padding = 0, whiten = true }, { channels = 6, batch_norm = true, pool = 2 }]
activation = "gelu"

[transfer]
freeze = ["blocks.0.conv.weight"]
"""
HALF = (0.5, 0.5, 0.5)


def test_outputs_are_uncorrelated_with_unit_mean_square() -> None:
    """Smooth images: neighboring pixels and channels are correlated. The oracle is torch's convolution."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(40, 14, 14, 1)) + 0.3 * random.normal(size=(40, 14, 14, 3))
    smooth = noise[:, 2:, 2:] + noise[:, 1:-1, 2:] + noise[:, 2:, 1:-1]
    pixels = np.clip(128 + 30 * smooth, 0, 255).astype(np.uint8)
    inputs = Preprocessing(3, (12, 12), None, True, "bilinear", HALF, HALF)
    filters = whitening_filters(InMemoryImages(pixels, "toy", 3), np.arange(40), inputs, 2)
    assert filters.shape == (24, 3, 2, 2)
    assert torch.equal(filters[12:], -filters[:12])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    outputs = torch.nn.functional.conv2d(images, filters[:12]).permute(1, 0, 2, 3).flatten(1).double()
    products = outputs @ outputs.T / outputs.shape[1]
    patches = torch.nn.functional.unfold(images, 2).permute(1, 0, 2).flatten(1).double()
    values = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1]).flip(0)
    torch.testing.assert_close(products, torch.diag(values / (values + EPS)), atol=1e-4, rtol=1e-4)
    assert products.diagonal().min() > 0.9


def test_a_frozen_whitening_convolution_is_stored_with_the_weights(tmp_path: Path) -> None:
    run = train_on_files(tmp_path, MODEL, "train.epochs=1", "data.channels=3")
    weights = load_weights(run.best_weights)
    recipe = run.recipe
    dataset = open_dataset(recipe.data)
    inputs = Preprocessing(3, (16, 16), 16, True, "bilinear", HALF, HALF)
    expected = whitening_filters(dataset.images, split_dataset(dataset, recipe.data)["train"], inputs, 2)
    assert torch.equal(weights["blocks.0.conv.weight"], expected)
    assert weights["blocks.0.conv.bias"].any(), "the bias is trained"


def trained(folder: Path, text: str) -> dict[str, np.ndarray]:
    with contextlib.redirect_stderr(io.StringIO()):
        run = fit(loads_recipe(text, [f'recipe.run_root="{folder}/{torch.distributed.is_initialized()}"']))
    return {name: value.numpy() for name, value in load_weights(run.best_weights).items()}


@pytest.mark.extended
def test_every_process_has_the_same_filters(tmp_path: Path) -> None:
    text = (
        MODEL.replace("24", "8")
        + """
[recipe]
name = "whitening"
[data]
dataset = "digits"
[optimizer]
lr = 0.05
[train]
epochs = 1
batch_size = 60
[tracking]
trackers = []
"""
    )
    one, two = (launch(world, trained, tmp_path / str(world), text)[0] for world in (1, 2))
    assert np.array_equal(one["blocks.0.conv.weight"], two["blocks.0.conv.weight"])
    for name, value in one.items():
        np.testing.assert_allclose(value, two[name], rtol=1e-4, atol=1e-5, err_msg=name)

"""Every architecture that is listed can be used: a sample on the CPU, and all of them without memory (slow)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from accelerate import init_empty_weights
from architectures import CLASSES, check_explained, check_export, check_step, check_structure, trained
from timm.models import get_pretrained_cfg

from toolkit.errors import UserError
from toolkit.export import FORMATS
from toolkit.models.build import BuiltModel, build_model
from toolkit.recipe import catalog
from toolkit.recipe.schema import ModelTable

# SAMPLE#

NEEDS = {name: {"rope_rescale_coords": 1.0} for name in timm.list_models("vit_*_sapiens2")}
"""Arguments without which the toolkit refuses them: they scale positions at random."""


def table_of(source: str, name: str) -> ModelTable:
    return ModelTable.model_validate({"source": source, "name": name, "args": NEEDS.get(name, {})})


@pytest.mark.parametrize(("source", "name", "size"), chosen())
def test_sample(source: str, name: str, size: int, tmp_path: Path) -> None:
    """Build, one step, every parameter in one group in the order of use, head, Grad-CAM's layer, export."""
    torch.manual_seed(0)
    table = table_of(source, name)
    built = build_model(table, len(CLASSES), 3, size)
    check_structure(built, size)
    check_step(built, size)
    model = trained(built, table, size)
    check_explained(model, built)
    check_export(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name", "size"), SMALL)
def test_all_small_ones(source: str, name: str, size: int, tmp_path: Path) -> None:
    """As the sample, and torch.export's program computes the same."""
    test_sample(source, name, size, tmp_path)
    table = table_of(source, name)
    model = trained(build_model(table, len(CLASSES), 3, size), table, size)
    program = FORMATS["torch-export"]
    program.write(model, tmp_path)
    images = torch.randn(3, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(program.read(tmp_path)(images), model.module(images), rtol=1e-3, atol=1e-4)


def build_without_memory(table: ModelTable, size: int) -> BuiltModel:
    """On the meta device; where a constructor computes with its tensors, its parameters alone are there."""
    try:
        with torch.device("meta"):
            return build_model(table, len(CLASSES), 3, size)
    except UserError:
        with init_empty_weights(include_buffers=False):
            return build_model(table, len(CLASSES), 3, size)


def native_size(source: str, name: str) -> int:
    if source == "timm":
        config: Any = get_pretrained_cfg(name)
        return int(config.input_size[-1])
    return 518 if name == "vit_h_14" else 224


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("source", ["torchvision", "timm"])
@pytest.mark.parametrize("part", range(8))
def test_every_architecture_that_is_listed(source: str, part: int) -> None:
    """Without memory for its parameters: it builds, and its head, stages and groups are right."""
    faults = []
    for name in catalog.model_names(source)[part::8]:
        try:
            check_structure(build_without_memory(table_of(source, name), size := native_size(source, name)), size)
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


def test_all_that_the_libraries_have_is_listed_or_has_a_reason() -> None:
    excluded = catalog.excluded_models()
    assert {*catalog.model_names("timm"), *excluded} == set(timm.list_models())
    assert not set(catalog.model_names("timm")) & set(excluded)
    assert catalog.model_names("torchvision") == sorted(torchvision.models.list_models(module=torchvision.models))
    assert all(excluded.values())


def test_what_is_not_listed_has_no_classifier() -> None:
    for name in catalog.excluded_models():
        with torch.device("meta"), pytest.raises(UserError, match=f"timm's {name} has no classifier"):
            build_model(ModelTable(source="timm", name=name), len(CLASSES), 3, 224)

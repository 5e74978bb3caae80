"""Test-time augmentation (TTA): names of augmentations, and results in a run's tta.json. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from toolkit.errors import UserError
from toolkit.reading import Shape, read_json
from toolkit.runs import Run
from toolkit.similar_names import did_you_mean

FILE = "tta.json"
KINDS = ("five_crop", "translate", "scales", "flip")
"""Names, in the order in which they are applied to an image."""


def parse_tta(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the kinds of ``names`` in the order of :data:`KINDS`, with the values of scales. Raises UserError.

    A name is ``flip``, ``five_crop``, ``translate`` or ``scales=1,1.15`` (factors of height and width, 0.25..4).
    """
    found: dict[str, tuple[float, ...]] = {}
    for text in names:
        name, sign, values = text.partition("=")
        if name not in KINDS or (name == "scales") != bool(sign) or name in found:
            again = " once" if name in found else ""
            hint = "" if name in KINDS else did_you_mean(name, KINDS, prefix="; ")
            raise UserError(f"--tta {text}: expected flip, five_crop, translate or scales=1,1.15{again}{hint}")
        try:
            found[name] = tuple(float(value) for value in values.split(",")) if sign else ()
        except ValueError:
            found[name] = (0.0,)
        if not all(0.25 <= value <= 4 for value in found[name]):
            raise UserError(
                f"--tta {text}: scales are numbers from 0.25 to 4, separated by commas, such as scales=1,1.15"
            )
    return {kind: found[kind] for kind in KINDS if kind in found}


class TtaResult(Shape):
    """Accuracy of a run's best model without and with test-time augmentation, on one of its splits."""

    tta: list[str]
    split: str
    images: int = Field(ge=1)
    accuracy: float
    """Without test-time augmentation, 0..1."""
    accuracy_with_tta: float
    only_without: int
    """Number of images that are classified correctly only without it."""
    only_with: int


class _File(Shape):
    """Schema of tta.json."""

    results: list[TtaResult]


def read_tta(run: Run) -> list[TtaResult]:
    """Return the results in a run's tta.json; none if there is no file. Raises UserError if it is damaged."""
    path = run.path / FILE
    return _File.model_validate(read_json(path, _File)).results if path.exists() else []


def write_tta(run: Run, result: TtaResult) -> None:
    """Add a result to tta.json, in place of an earlier one of the same augmentation and split."""
    others = [each for each in read_tta(run) if (each.tta, each.split) != (result.tta, result.split)]
    run.write_json(FILE, _File(results=[*others, result]).model_dump())


def store_tta(run: Run, names: Sequence[str]) -> None:
    """Store test-time augmentation in a run's model.json; ["none"] removes it."""
    if not run.is_finished:
        raise UserError(f"{run.path} has not finished: test-time augmentation can be stored when training has finished")
    card = {key: value for key, value in run.model_card.items() if key != "tta"}
    run.write_json("checkpoints/model.json", card | ({} if [*names] == ["none"] else {"tta": [*names]}))

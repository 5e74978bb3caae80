"""The calibrate command."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.errors import command
from toolkit.cli.options import AsJson, DataRoot, RunPath

if TYPE_CHECKING:
    from toolkit.calibration import TemperatureScaling


@command
def calibrate(
    run: RunPath,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the temperature from the model.")] = False,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Calibrate a run's probabilities by temperature scaling.

    Chooses the temperature that minimizes the negative log-likelihood of the validation images, and stores it in
    model.json. Afterwards predict, evaluate, export and publish divide the logits by it; no predicted class changes.

    Example: toolkit calibrate runs/quickstart/20260102-030405-abcd
    """
    from toolkit.runs import open_run

    opened = open_run(run)
    recipe = opened.recipe
    from toolkit.distributed.context import distributed_context
    from toolkit.inference.calibrate import calibrate as choose
    from toolkit.inference.calibrate import remove_calibration

    if remove:
        remove_calibration(opened)
        print("the model has no temperature")
        return
    with distributed_context(recipe.train) as accelerator:
        found = choose(opened, accelerator, data_root)
        if accelerator.is_main_process:
            print(json.dumps(found.model_dump(), indent=2) if as_json else _text(found), flush=True)


def _text(found: TemperatureScaling) -> str:
    """Format the temperature, and a table of NLL and expected calibration error (ECE) before and after."""
    from toolkit.training.console import table

    rows = [
        (name, str(split.images), f"{split.before.nll:.4f}", f"{split.after.nll:.4f}",
         f"{100 * split.before.ece:.2f} %", f"{100 * split.after.ece:.2f} %")
        for name, split in found.splits.items()
    ]  # fmt: skip
    header = ("split", "images", "NLL before", "NLL after", "ECE before", "ECE after")
    lines = table(rows, header, frozenset(range(1, 6)))
    return f"temperature {found.temperature:.4f}, stored in checkpoints/model.json\n{lines}"

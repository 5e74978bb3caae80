"""The recipe of `toolkit train DATA`, which the main process writes and all processes use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from toolkit.distributed.launcher import ProcessInfo, read_process_info
from toolkit.errors import UserError
from toolkit.new_recipe.source import find_source, given_keys
from toolkit.new_recipe.write import new_recipe
from toolkit.recipe.layers import parse_overrides
from toolkit.runs import open_run, runs_of


class WrittenRecipe(NamedTuple):
    """A recipe, as TOML text."""

    name: str
    text: str


def recipe_for_training(
    argument: str, overrides: Sequence[str] = (), *, resume: str | None, log: Callable[[str], None]
) -> WrittenRecipe:
    """Return the recipe for data, the same on all processes that the launcher started (a collective).

    ``overrides``: arguments of ``--set``; those for [data] say how the data are read. ``resume``: return the recipe of
    this run, or with "auto" of the newest unfinished one on these data, if there is one, because the choices might be
    different now. Raises UserError, on all processes, if the data cannot be trained on.
    """
    given = given_keys(overrides)
    info = read_process_info()
    world = 1 if info is None else info.world

    def write() -> WrittenRecipe:
        kept = None if resume is None else _kept(argument, given, overrides, resume)
        if kept is not None:
            return kept
        found = new_recipe(argument, processes=world, given=given, log=log)
        return WrittenRecipe(found.name, found.text)

    return write() if info is None or world == 1 else _shared(info, write)


def _kept(argument: str, given: Mapping[str, Any], overrides: Sequence[str], resume: str) -> WrittenRecipe | None:
    """Return the recipe that was written for a run to be resumed; None if there is no such run, or it has none."""
    name = find_source(argument, given).name
    folder = {"run_root": "runs", "name": name}
    for layer in parse_overrides(overrides):
        folder |= layer.data.get("recipe", {})
    runs = [open_run(resume)] if resume != "auto" else runs_of(folder["run_root"], folder["name"])
    kept = (run for run in runs if not run.is_finished and run.written_recipe.is_file())
    run = next(kept, None)
    return None if run is None else WrittenRecipe(name, run.written_recipe.read_text(encoding="utf-8"))


def _shared(info: ProcessInfo, write: Callable[[], WrittenRecipe]) -> WrittenRecipe:
    """Return what ``write`` returns on the main process, or raise its UserError, on all processes (a collective).

    The process group, over gloo, is used only for this: training creates its own with the backend of the recipe.
    """
    import torch.distributed as dist

    from toolkit.distributed.failure_detection import close_failure_detector
    from toolkit.distributed.rendezvous import join

    join(info, "gloo")
    result: WrittenRecipe | UserError | None = None
    if info.rank == 0:
        try:
            result = write()
        except UserError as error:
            result = error
    box = [result]
    dist.broadcast_object_list(box, src=0)
    shared = box[0]
    if isinstance(shared, UserError):
        raise shared
    close_failure_detector()
    dist.destroy_process_group()
    assert shared is not None
    return shared

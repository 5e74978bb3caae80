"""The recipe of `toolkit train DATA`, which the main process writes and all processes use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from toolkit.distributed.launcher import ProcessInfo, read_process_info
from toolkit.errors import UserError
from toolkit.new_recipe.source import find_source
from toolkit.new_recipe.write import new_recipe
from toolkit.runs import runs_of


class WrittenRecipe(NamedTuple):
    """A recipe, as TOML text."""

    name: str
    text: str


def recipe_for_training(
    argument: str, given: Mapping[str, Any] | None = None, *, resume: bool, log: Callable[[str], None]
) -> WrittenRecipe:
    """Return the recipe for data, the same on all processes that the launcher started (a collective).

    ``given``: see :func:`toolkit.new_recipe.write.new_recipe`. ``resume``: return the recipe of the newest unfinished
    run on these data, if there is one, because the choices might be different now. Raises UserError, on all processes,
    if the data cannot be trained on.
    """
    info = read_process_info()
    world = 1 if info is None else info.world

    def write() -> WrittenRecipe:
        kept = _unfinished(argument, given) if resume else None
        if kept is not None:
            return kept
        found = new_recipe(argument, processes=world, given=given, log=log)
        return WrittenRecipe(found.name, found.text)

    return write() if info is None or world == 1 else _shared(info, write)


def _unfinished(argument: str, given: Mapping[str, Any] | None) -> WrittenRecipe | None:
    """Return the recipe of the newest unfinished run of these data, None if there is none in runs/."""
    name = find_source(argument, given).name
    kept = (run for run in runs_of("runs", name) if not run.is_finished and run.written_recipe.is_file())
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

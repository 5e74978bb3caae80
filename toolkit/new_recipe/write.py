"""Writing the choices as a recipe, in TOML with a comment line above each choice."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from toolkit.data.splits import SPLITS
from toolkit.errors import UserError
from toolkit.formatting import batch_split, plural
from toolkit.new_recipe.data_rules import CHANNELS, INPUT, SPLIT
from toolkit.new_recipe.facts import DataFacts, look
from toolkit.new_recipe.machine import Machine, this_machine
from toolkit.new_recipe.rules import choose, first
from toolkit.new_recipe.situation import Choice, Goal, Situation
from toolkit.new_recipe.source import find_source
from toolkit.recipe import Recipe, loads_recipe
from toolkit.recipe.toml_writer import toml_key, toml_value

TABLES = ("task", "data", "augment", "model", "model.convnet", "transfer", "optimizer", "scheduler", "train",
          "early_stopping")  # fmt: skip
"""Topics in the order of the file."""

MANY = 20_000
"""Number of images from which the training time on CPUs is measured: it may be hours."""

HOUR_S = 3600

GPU_SHARE = 0.8
"""Fraction of a GPU's memory that a step may use; the rest is for libraries and fragmentation."""


@dataclass(frozen=True)
class NewRecipe:
    """A recipe with the reasons for its settings."""

    name: str
    text: str
    """Content of the file."""
    choices: list[Choice]
    facts: DataFacts
    processes: int

    @property
    def recipe(self) -> Recipe:
        """The checked recipe."""
        return loads_recipe(self.text)

    def next_command(self, path: str) -> str:
        """Return the command that trains the recipe at ``path``."""
        if self.processes == 1:
            return f"toolkit train {shlex.quote(path)}"
        return f"torchrun --standalone --nproc-per-node {self.processes} -m toolkit.train {shlex.quote(path)}"


def new_recipe(
    argument: str,
    goal: Goal = "accuracy",
    processes: int | None = None,
    given: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
    machine: Machine | None = None,
) -> NewRecipe:
    """Write a recipe for data: a folder, archive, table, shards, or the name of a data set (:mod:`.source`).

    ``processes``: number of training processes, by default one per GPU. ``given``: keys of [data] that are not chosen.
    ``machine``: by default this one. ``log`` is called with messages about the data. Raises UserError if the data
    cannot be found, read or trained on.
    """
    machine = machine or this_machine()
    count = processes or max(1, machine.gpus)
    facts = look(find_source(argument, given))
    log(f"{argument}: {_seen(facts)}")
    for name, fault in facts.unreadable:
        log(f"warning: {name}: {fault}")
    situation = Situation(facts, machine, goal, count, facts.images)
    split, images = _split(situation)
    situation = replace(situation, images=images)
    choices = [*_data(facts), *_not_given([split, *_unreadable(facts), *choose(situation)], given or {})]
    header = [
        f"Written by: toolkit new {shlex.quote(argument)} --goal {goal}{f' --processes {count}' if count > 1 else ''}",
        f"Seen: {_seen(facts)}; {machine.text}. The line above each choice says why.",
    ]

    def text() -> str:
        return recipe_text(facts.source.name, header, choices)

    recipe = loads_recipe(text())
    if not machine.gpus and facts.total >= MANY:
        header.append(_time_on_cpus(recipe, situation, argument))
        log(header[-1])
    if machine.gpus and recipe.transfer.mode != "linear_probe":
        choices.append(gpu_memory(recipe, machine, count))
    return NewRecipe(facts.source.name, text(), choices, facts, count)


def data_choices(argument: str, given: Mapping[str, Any], log: Callable[[str], None]) -> tuple[str, list[Choice], bool]:
    """Return a name for data, the choices for [data] that suit any pretrained backbone, and whether it is multi-label.

    Arguments and errors as for :func:`new_recipe`.
    """
    facts = look(find_source(argument, given))
    log(f"{argument}: {_seen(facts)}")
    situation = Situation(facts, Machine(1), "accuracy", 1, facts.images)
    split, _ = _split(situation)
    choices = [split, *_unreadable(facts)]
    for topic, rules in (("channels", CHANNELS), ("input", INPUT)):
        rule = first(rules, situation)
        keys = {key: value for key, value in rule.sets(situation).items() if key != "data.image_size"}
        choices += [Choice(topic, keys, rule.why(situation), rule.source)] if keys else []
    return facts.source.name, [*_data(facts), *_not_given(choices, given)], facts.is_multi_label


def _seen(facts: DataFacts) -> str:
    """Describe the data in one line."""
    sizes = sorted(facts.sizes)
    low, high = ("x".join(map(str, size)) for size in (sizes[0], sizes[-1]))
    lists = ", ".join(f"{facts.images[name]:,} {name}" for name in SPLITS if name in facts.images)
    of = f", headers of {facts.sampled:,} read" if 0 < facts.sampled < facts.total else ""
    shown = low if low == high else f"{low} to {high}"
    return f"{plural(facts.classes, 'class', 'classes')}, {facts.total:,} images ({lists}), {shown} pixels{of}"


def _data(facts: DataFacts) -> list[Choice]:
    """Return the choices for the keys that select the data."""
    source = facts.source
    default = f"{plural(facts.classes, 'class folder')}"
    if "test" in facts.images or "validation" in facts.images:
        default += f" below each of the folders for {', '.join(facts.images)}"
    own = {key: value for key, value in source.keys.items() if key not in source.more and key != "channels"}
    found = [
        Choice("data", {f"data.{key}": value for key, value in own.items()}, source.why or default, "docs/data.md")
    ]
    for key, why in source.more.items():
        found.append(Choice(key, {f"data.{key}": source.keys[key]}, why, "docs/data.md"))
    return found


def _not_given(choices: Iterable[Choice], given: Mapping[str, Any]) -> list[Choice]:
    """Return the choices without the keys of [data] that are given."""
    names = {f"data.{key}" for key in given}
    left = (
        choice._replace(keys={key: value for key, value in choice.keys.items() if key not in names})
        for choice in choices
    )
    return [choice for choice in left if choice.keys]


def _split(s: Situation) -> tuple[Choice, dict[str, int]]:
    """Return the choice for the splits, and the number of images in each. Raises UserError if none is possible."""
    rule = first(SPLIT, s)
    table, why = s.facts.source.keys.get("split") or rule.sets(s)["data.split"], rule.why(s)
    try:
        images = s.facts.split(table)
    except UserError:
        if not s.facts.groups:
            raise
        table = {**table, "method": "random"}
        images, why = s.facts.split(table), f"{why}; a class is in too few groups to be in each split, so at random"
    return Choice("split", {"data.split": table}, why, rule.source), images


def _unreadable(facts: DataFacts) -> list[Choice]:
    if not facts.unreadable:
        return []
    share = len(facts.unreadable) / facts.sampled
    keys = {"data.on_bad_image": "skip", "data.max_bad_fraction": max(0.01, round(2 * share, 2))}
    names = ", ".join(name for name, _ in facts.unreadable[:3])
    why = f"{len(facts.unreadable):,} of {facts.sampled:,} inspected images cannot be read ({names})"
    return [Choice("unreadable", keys, why, "docs/data.md")]


def _time_on_cpus(recipe: Recipe, s: Situation, argument: str) -> str:
    """Return a sentence about the training time, with a faster goal if it is long."""
    from toolkit.estimate.cpu_time import cpu_time

    seconds, text = cpu_time(recipe, s.processes, s.facts.classes, s.images)
    if seconds > HOUR_S and s.goal != "fast":
        text += f". Less: toolkit new {shlex.quote(argument)} --goal fast"
    return f"Time on this machine: {text}"


def gpu_memory(recipe: Recipe, machine: Machine, processes: int) -> Choice:
    """Return the number of accumulation steps for which a step fits into a GPU's memory, as `toolkit plan` does."""
    from toolkit.estimate.resources import plan

    batch, parts = recipe.train.batch_size, 1
    while True:
        train = recipe.train.model_copy(update={"grad_accum_steps": parts})
        needed = plan(recipe.model_copy(update={"train": train}), processes).memory.total
        each = batch // processes // parts
        if needed <= GPU_SHARE * machine.gpu_memory or each % 2:
            break
        parts *= 2
    why = (
        f"{needed / 2**30:.2g} of {machine.gpu_memory / 2**30:.3g} GiB of a GPU are needed for "
        f"{batch_split(batch, processes, parts)} (toolkit plan)"
    )
    return Choice("memory", {"train.grad_accum_steps": parts}, why, "toolkit plan")


def recipe_text(name: str, header: Iterable[str], choices: Iterable[Choice]) -> str:
    """Return the TOML text: the tables in their usual order, each with its choices and their reasons."""
    parts = ["\n".join(f"# {_one_line(line)}" for line in header), f"[recipe]\nname = {toml_value(name)}"]
    choices = list(choices)
    for table in TABLES:
        lines = []
        for choice in choices:
            keys = {key.rpartition(".")[2]: value for key, value in choice.keys.items() if _table_of(key) == table}
            if keys and _table_of(next(iter(choice.keys))) == table:
                lines.append(f"# {_one_line(choice.why)}")
            lines += [f"{toml_key(key)} = {_value(value)}" for key, value in keys.items()]
        if lines:
            parts.append("\n".join([f"[{table}]", *lines]))
    return "\n\n".join(parts) + "\n"


def _table_of(key: str) -> str:
    return key.rpartition(".")[0]


def _one_line(text: str) -> str:
    """Return a comment without line breaks and control characters, which file names may contain."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _value(value: Any) -> str:
    """Format a value; if it is a list of several tables, each is on its own line."""
    if isinstance(value, list) and len(value) > 1 and all(isinstance(item, dict) for item in value):
        return "[\n" + "".join(f"  {toml_value(item)},\n" for item in value) + "]"
    return toml_value(value)

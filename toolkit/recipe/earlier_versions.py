"""Keys and metrics that have been renamed since earlier versions, and defaults that have changed.

A user's recipe with an old key is rejected with a message that names the new key. Files written by earlier versions
(a run's resolved recipe, summary and metrics, a study's record) are converted when they are read.
"""

from __future__ import annotations

from typing import Any

KeyPath = tuple[str, ...]

RENAMED: dict[KeyPath, str] = {
    ("expect",): "expected_metrics",
    ("data", "views"): "fixed_views",
    ("augment", "on"): "run_on",
    ("augment", "mix_p"): "mixup_prob",
    ("augment", "cutmix_share"): "mixup_switch_prob",
    ("augment", "train", "at"): "stage",
    ("augment", "validation", "at"): "stage",
    ("augment", "test", "at"): "stage",
    ("model", "head", "replaces"): "scope",
    ("scheduler", "warmup_start"): "warmup_start_factor",
    ("scheduler", "peak_at"): "pct_start",
    ("train", "accumulation"): "grad_accum_steps",
    ("train", "clip_norm"): "max_grad_norm",
    ("train", "select"): "best_metric",
    ("study", "published", "figures"): "metrics",
}
"""Renamed recipe keys: old path, without list indices, and new last part."""

RENAMED_VALUES = {"frozen_classifier": "backbone_only"}

DEFAULTS: dict[KeyPath, dict[str, Any]] = {
    ("data",): {"exif": "ignore", "value_range": [0, 65535]},
    ("model", "convnet"): {"bias": True},
    ("model", "head"): {"bias": True},
}
"""Values of keys that are missing in resolved recipes written by earlier versions."""


def renamed_key(path: tuple[str | int, ...]) -> str | None:
    """Return the new name of an old key's last part; None if the key was not renamed."""
    return RENAMED.get(tuple(part for part in path if isinstance(part, str)))


def renamed_metric(name: str) -> str:
    """Return a metric's current name: ``stopped_test_class_accuracy`` is now ``last_test_balanced_accuracy``."""
    name = name.replace("class_accuracy", "balanced_accuracy")
    is_of_last_model = name == "stopped" or (name.startswith("stopped_") and name != "stopped_early")
    return "last" + name.removeprefix("stopped") if is_of_last_model else name


def update_recipe(content: dict[str, Any]) -> None:
    """Update the content of a resolved recipe in place."""
    _rename_keys(content, ())
    for path in DEFAULTS:
        _fill_in(content, path, path)
    scheduler = content.get("scheduler")
    if isinstance(scheduler, dict) and scheduler.get("name") == "plateau":
        scheduler.setdefault("threshold_mode", "abs")
    for name, key in (("train", "best_metric"), ("scheduler", "metric"), ("early_stopping", "metric")):
        table = content.get(name)
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = renamed_metric(table[key])
    transfer = content.get("transfer")
    if isinstance(transfer, dict) and transfer.get("mode") in RENAMED_VALUES:
        transfer["mode"] = RENAMED_VALUES[transfer["mode"]]
    if isinstance(content.get("expected_metrics"), dict):
        content["expected_metrics"] = update_metrics(content["expected_metrics"])


def update_model(model: object) -> None:
    """Update the table ``model`` in place, as stored in model.json."""
    if isinstance(model, dict):
        _rename_keys(model, ("model",))
        for path in DEFAULTS:
            if path[0] == "model":
                _fill_in(model, path[1:], path)


def update_metrics(value: Any) -> Any:
    """Rename metrics in dictionary keys and in strings of lists, at any depth."""
    if isinstance(value, dict):
        return {renamed_metric(key): update_metrics(item) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed_metric(item) if isinstance(item, str) else update_metrics(item) for item in value]
    return value


def update_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the content of summary.json with current names."""
    updated: dict[str, Any] = update_metrics(summary)
    if "shortcuts" in updated:
        updated["cached"] = updated.pop("shortcuts")
    return updated


def update_study(record: dict[str, Any]) -> dict[str, Any]:
    """Return the content of study.json with current names."""
    if isinstance(record.get("study"), dict):
        _rename_keys(record["study"], ("study",))
    updated: dict[str, Any] = update_metrics(record)
    return updated


def _rename_keys(content: dict[str, Any], path: KeyPath) -> None:
    for key in list(content):
        value = content[key]
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                _rename_keys(item, (*path, key))
        if (new := RENAMED.get((*path, key))) is not None:
            content[new] = content.pop(key)


def _fill_in(content: dict[str, Any], path: KeyPath, defaults: KeyPath) -> None:
    table: Any = content
    for key in path:
        table = table.get(key) if isinstance(table, dict) else None
    if isinstance(table, dict):
        table.update(DEFAULTS[defaults] | table)

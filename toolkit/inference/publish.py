"""Publication of a run's best model on the Hugging Face Hub: weights, preprocessing, recipe and a model card."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData, constants, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, StrictUndefined, UndefinedError
from torch.utils._pytree import tree_leaves

import toolkit
from toolkit.data.dataset_info import info_of, page_of
from toolkit.errors import RunFailed, UserError, first_line
from toolkit.inference.export import FORMATS, images_to_compare, new_folder, portable, write_checked
from toolkit.inference.timm_config import fits_timm
from toolkit.inference.tta import with_tta
from toolkit.metrics import MEASURES, measures_of
from toolkit.models.pretrained import is_file_reference
from toolkit.plugins import find
from toolkit.reading import UnreadableFile
from toolkit.recipe import Recipe, resolved_toml
from toolkit.recipe.resolve import resolved_content
from toolkit.runs import Run, open_run
from toolkit.training.resume import check_recipe
from toolkit.training.trained_model import TrainedModel, load_model

TEMPLATE = Path(__file__).with_name("model_card.md")
MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~]")
"""Characters with a special meaning in Markdown."""

HUB_DATASETS = "https://huggingface.co/datasets/"

SPLITS = {"val": "validation", "test": "test"}
"""Names of the splits in the table of metrics, by metric prefix."""

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class PublishResult:
    """Result of publishing."""

    folder: Path
    url: str | None
    """URL of the repository; None if it was not pushed."""
    why_not: str = ""
    """Why the repository was not pushed; empty if it was."""
    local_paths: tuple[str, ...] = ()
    """Paths on this machine in model.args, which model.json must keep, because the model is built with them."""


def publish(path: Path, repo: str, folder: Path | None, *, license_id: str, private: bool, push: bool) -> PublishResult:
    """Write the repository's files and, if ``push`` is set and there is a login, push them.

    ``folder`` must be new; None means RUN/publish, which is replaced each time. Raises UserError for an unfinished run
    and for names that the Hub does not accept; RunFailed if the push fails, in which case the folder is kept.
    """
    _check_names(repo, license_id)
    run = open_run(path)
    if not run.is_finished:
        raise UserError(f"{run.path} is not finished: it has no metrics for a model card")
    trained, recipe, summary = load_model(path), run.recipe, run.summary
    name = "timm" if fits_timm(trained) else "safetensors"
    check_recipe(run)
    if name == "timm":
        trained = replace(trained, tta=())  # timm's models cannot contain it
    inputs, _ = images_to_compare(path, with_tta(trained))
    target = folder or run.path / "publish"
    with new_folder(target, replace=folder is None) as unfinished:
        write_checked(FORMATS[name], trained, unfinished, inputs, name)
        (unfinished / "recipe.toml").write_text(resolved_toml(shareable(recipe)), encoding="utf-8")
        try:
            card = model_card(run, trained, recipe, summary, repo, license_id)
        except UndefinedError as error:
            raise UnreadableFile(run.path / "summary.json", error) from None
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    why_not = _cannot_push() if push else "--no-push was given"
    paths = tuple(value for value in tree_leaves(trained.table.args) if is_local_path(value))
    return PublishResult(target, None if why_not else _push(target, repo, private), why_not, paths)


def _check_names(repo: str, license_id: str) -> None:
    if "/" not in repo:
        raise UserError(f"REPO {repo!r} lacks its owner: give OWNER/NAME, such as lab/{repo or 'digits'}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"REPO {repo!r} is not a repository name, such as lab/resnet50-caltech: {error}") from None
    if not LICENSE.fullmatch(license_id):
        raise UserError(
            f"--license {license_id!r} is not a license identifier of the Hub, such as mit, apache-2.0, cc-by-4.0, "
            "other or unknown (https://huggingface.co/docs/hub/repositories-licenses)"
        )


PATHS = (("data", "name"), ("data", "table"), ("data", "class_names"), ("data", "root"))
"""Keys whose value may be a path on this machine."""

ARGUMENTS = (("data", "args"), ("model", "args"), ("optimizer", "args"), ("scheduler", "args"), ("train", "loss_args"),
             *(("augment", split) for split in ("train", "validation", "test")))  # fmt: skip
"""Keys with arguments of any kind, which may contain such paths."""


def shareable(recipe: Recipe) -> Recipe:
    """Return the recipe without paths, accounts and trackers of its author; of a path, the last name remains."""
    plain = recipe.model_copy(
        update={
            "recipe": recipe.recipe.model_copy(update={"run_root": "runs"}),
            "model": portable(recipe.model),
            "tracking": type(recipe.tracking)(trackers=[]),
            "slurm": None,
            "study": None,
        }
    )
    content = resolved_content(plain)
    if isinstance(content["data"]["root"], str):
        content["data"]["root"] = "data"
    for table, key in (*PATHS, *ARGUMENTS):
        value = content[table].get(key)
        is_list_of_names = key == "class_names" and isinstance(value, list)
        if value is not None and not is_list_of_names:
            content[table][key] = _without_folders(value)
    if content.get("distillation"):
        content["distillation"] = _without_folders(content["distillation"])
    return Recipe.model_validate(content)


def _without_folders(value: Any) -> Any:
    """Replace each path in a value that is absolute, or leaves the working directory, by its last name, as ./NAME."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return f"./{PurePath(value).name}" if is_local_path(value) else value


def is_local_path(value: Any) -> bool:
    """Return whether a value is a path that tells about this machine: absolute, in a home folder, or with ``..``."""
    if not isinstance(value, str):
        return False
    path = PurePath(value)
    return bool(path.name) and (path.is_absolute() or path.parts[0].startswith("~") or ".." in path.parts)


# -- push -------------------------------------------------------------------------------------------------------------


def _cannot_push() -> str:
    """Return why pushing is not possible; empty if it can be tried."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return "" if get_token() else "there is no login for the Hugging Face Hub"


def _push(folder: Path, repo: str, private: bool) -> str:
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=f"By toolkit {toolkit.__version__}")
    except Exception as error:  # from the client, its HTTP library or the system
        raise RunFailed(
            f"{repo} was not pushed ({first_line(error)}). The folder {folder} is ready; {how_to_push(folder, repo)}"
        ) from error
    return str(made)


def how_to_push(folder: Path, repo: str) -> str:
    """Return the command that pushes the folder later."""
    return f"to push it later: hf auth login, then hf upload {repo} {folder} ."


# -- model card -------------------------------------------------------------------------------------------------------


def model_card(
    run: Run,
    trained: TrainedModel,
    recipe: Recipe,
    summary: dict[str, Any],
    repo: str,
    license_id: str,
    *,
    alias: str = "",
) -> str:
    """Return README.md: use, data, recipe, metrics, limits and license; for the Hub, its front matter comes first.

    With an ``alias``, best or last, ``repo`` is the name of a W&B artifact, and the card is that of its version with
    this alias. Raises jinja2.UndefinedError if the summary lacks a value.
    """
    environment = Environment(  # autoescape is for HTML; the card is Markdown
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["markdown"] = lambda text: MARKDOWN.sub(r"\\\g<0>", text)
    title, model = repo.rpartition("/")[2], recipe.model
    architectures = {
        "toolkit": "A ConvNet that `recipe.toml` describes",
        "plugin": f"`{model.name}`, a model whose code is not part of the toolkit",
    }
    record = find("model", model.name).record if model.source == "plugin" else {}
    dataset = hub_dataset(recipe)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=_front_matter(trained, recipe, summary, title, license_id) if not alias else "",
        title=title,
        architecture=architectures.get(model.source, f"`{model.name}` of {model.source}"),
        plugin=record.get("loaded_with") or record.get("file"),
        info=info_of(recipe.data.dataset, recipe.data.name),
        hub_dataset=dataset,
        page=HUB_DATASETS + dataset if dataset else page_of(recipe.data.dataset, recipe.data.name),
        run=run,
        repo=repo,
        alias=alias,
        license_id=license_id,
        recipe=recipe,
        summary=summary,
        best=summary["best"],
        is_timm=fits_timm(trained),
        classes=trained.classes,
        is_multi_label=trained.task.kind == "multi_label",
        temperature=trained.task.temperature,
        preprocessing=trained.preprocessing,
        weights=portable(model).weights,
        measures=_measures(trained),
        splits={key: name for key, name in SPLITS.items() if f"{key}_loss" in summary["best"]},
    )


METRIC_TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "macro_f1": ("f1", {"average": "macro"}),
    "micro_f1": ("f1", {"average": "micro"}),
    "map": ("average_precision", {"average": "macro"}),
    "auroc": ("roc_auc", {"average": "macro"}),
}
"""Names on the Hub of the measures that are not accuracies, with arguments named as in scikit-learn."""


LABELS = {
    "single_label": {"loss": "cross-entropy", "accuracy": "top-1 accuracy"},
    "multi_label": {"loss": "binary cross-entropy", "accuracy": "subset accuracy"},
}
"""Labels of measures in model cards that differ from those in tables, by kind of task."""


def _measures(trained: TrainedModel) -> dict[str, str]:
    """Return the labels of the measures in model cards, by measure."""
    kind = trained.task.kind
    return {name: LABELS[kind].get(name, measure.label) for name, measure in measures_of(kind).items()}


def _front_matter(trained: TrainedModel, recipe: Recipe, summary: dict[str, Any], title: str, license_id: str) -> str:
    results, dataset = _eval_results(trained, recipe, summary["best"]), hub_dataset(recipe)
    tags = ["image-classification", recipe.model.source, recipe.model.name, recipe.transfer.mode]
    data = ModelCardData(
        license=license_id,
        library_name="timm" if fits_timm(trained) else "toolkit",
        pipeline_tag="image-classification",
        tags=[*tags, *(["multi-label"] if trained.task.kind == "multi_label" else [])],
        datasets=[dataset] if dataset else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=title,
        eval_results=results or None,
        base_model=_base_model(recipe),
    )
    return str(data.to_yaml())


def _eval_results(trained: TrainedModel, recipe: Recipe, best: dict[str, Any]) -> list[EvalResult]:
    """Return the metrics on the test images, or without any on the validation images, in the Hub's format."""
    prefix = next((prefix for prefix in ("test", "val") if f"{prefix}_loss" in best), "")
    dataset, multi_label = hub_dataset(recipe), trained.task.kind == "multi_label"
    results = []
    for name, label in _measures(trained).items():
        if MEASURES[name].unit != "%" or f"{prefix}_{name}" not in best:
            continue
        metric, arguments = METRIC_TYPES.get(name, ("accuracy", None))
        results.append(
            EvalResult(
                task_type="image-classification",
                task_name="multi-label image classification" if multi_label else None,
                dataset_type=dataset or recipe.data.dataset,
                dataset_name=dataset or info_of(recipe.data.dataset, recipe.data.name).title,
                dataset_config=recipe.data.args.get("name") if dataset else None,
                dataset_revision=recipe.data.args.get("revision") if dataset else None,
                dataset_split=SPLITS[prefix],
                metric_type=metric,
                metric_name=label,
                metric_args=arguments,
                metric_value=round(best[f"{prefix}_{name}"], 6),
            )
        )
    return results


def hub_dataset(recipe: Recipe) -> str | None:
    """Return the id of the data set on the Hugging Face Hub; None if it is none that is known to be there."""
    name = recipe.data.name or ""
    if recipe.data.dataset != "huggingface" or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _base_model(recipe: Recipe) -> str | None:
    """Return the Hub id of the initial weights; None if they are not from the Hub."""
    if recipe.model.source != "timm" or recipe.model.weights == "none" or is_file_reference(recipe.model.weights):
        return None
    from timm.models import get_pretrained_cfg

    tag = "" if recipe.model.weights == "DEFAULT" else f".{recipe.model.weights}"
    config = get_pretrained_cfg(recipe.model.name if "." in recipe.model.name else recipe.model.name + tag)
    return config.hf_hub_id if config is not None else None

"""Checks across keys: combinations that cannot work or are likely mistakes. One function per recipe table or topic."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from math import ceil, floor

from toolkit.data.dataset_info import info_of
from toolkit.errors import UserError
from toolkit.recipe import augment_checks, catalog_checks, input_checks, task_checks, training_checks
from toolkit.recipe.diagnostics import Issue, error, warning
from toolkit.recipe.gpu_support import is_random
from toolkit.recipe.image_size import convnet_output_size, input_size
from toolkit.recipe.schema import DataConfig, Recipe, TransferConfig
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value

LONGEST_LABEL = 128
"""W&B's limit for run names, groups and other labels, in characters."""


def transfer(recipe: Recipe) -> Iterator[Issue]:
    """Check that the transfer mode, the weights and the keys of [transfer] fit together."""
    table, weights = recipe.transfer, recipe.model.weights
    mode, at = table.mode, table.unfreeze_at
    if mode == "scratch" and weights != "none":
        hint = 'set transfer.mode = "finetune" to use the weights, or model.weights = "none" to train from scratch'
        text = '"scratch" contradicts model.weights, which names pretrained weights'
        yield error("transfer.mode", text, "model.weights", hint=hint)
    elif mode == "finetune" and weights == "none":
        text = '"finetune" without pretrained weights is the same as "scratch"'
        yield warning("transfer.mode", text, "model.weights", hint="set model.weights")
    elif mode not in ("scratch", "finetune") and weights == "none":
        text = f'"{mode}" needs pretrained weights, but model.weights is "none"'
        yield error("transfer.mode", text, "model.weights", hint='set model.weights, or transfer.mode = "scratch"')
    if mode == "gradual" and not at:
        hint = "for example unfreeze_at = [5, 10]"
        yield error("transfer.mode", '"gradual" needs unfreeze_at', "transfer.unfreeze_at", hint=hint)
    if mode != "gradual" and at:
        text = f'only mode "gradual" uses it, not "{mode}"'
        yield error("transfer.unfreeze_at", text, "transfer.mode", at="key")
    if any(later <= earlier for earlier, later in pairwise(at)):
        yield error("transfer.unfreeze_at", "the epochs must be increasing")
    epochs = recipe.train.epochs
    if at and epochs is not None and max(at) > ceil(epochs):
        text = f"epoch {max(at)} is beyond the run's {recipe.train.length_text}"
        yield error("transfer.unfreeze_at", text, "train.epochs")
    yield from _lp_ft(recipe)
    if table.layer_decay_by == "block" and table.layer_decay == 1:
        text = '"block" has no effect, because transfer.layer_decay is 1'
        yield warning("transfer.layer_decay_by", text, "transfer.layer_decay", hint="for example layer_decay = 0.75")
    if table.l2_sp and weights == "none":
        text = 'needs pretrained weights, but model.weights is "none"'
        yield error("transfer.l2_sp", text, "model.weights", hint="set optimizer.weight_decay")
    elif table.l2_sp and mode in ("linear_probe", "logistic", "knn") and not table.train:
        text = f'has no effect with mode "{mode}", which trains no pretrained parameters'
        yield error("transfer.l2_sp", text, "transfer.mode", at="key")
    elif table.l2_sp and mode == "lora":
        text = 'with mode "lora", optimizer.weight_decay already pulls the model toward the pretrained one'
        yield error("transfer.l2_sp", text, "transfer.mode", at="key")
    for key in ("lora_rank", "lora_alpha", "lora_targets"):
        if mode != "lora" and getattr(table, key) != getattr(TransferConfig(), key):
            yield error(f"transfer.{key}", f'only mode "lora" uses it, not "{mode}"', "transfer.mode", at="key")
    if table.new_layer == "freeze" and mode != "backbone_only":
        text = f'only mode "backbone_only" uses it, not "{mode}"'
        yield error("transfer.new_layer", text, "transfer.mode", at="key")


def _lp_ft(recipe: Recipe) -> Iterator[Issue]:
    """Check that mode "lp_ft" has a probe and epochs after it, and that other modes do not have keys of the probe."""
    table, epochs, default = recipe.transfer, recipe.train.epochs, TransferConfig()
    if table.mode != "lp_ft":
        for key in ("probe_epochs", "probe_lr", "probe_augment", "wise"):
            if getattr(table, key) != getattr(default, key):
                text = f'only mode "lp_ft" uses it, not "{table.mode}"'
                yield error(f"transfer.{key}", text, "transfer.mode", at="key")
        return
    if table.probe_epochs is None:
        hint = "for example probe_epochs = 5"
        yield error("transfer.mode", '"lp_ft" needs probe_epochs', "transfer.probe_epochs", hint=hint)
    elif epochs is not None and table.probe_epochs >= epochs:
        text = f"a probe of {table.probe_epochs} epochs leaves none of the run's {epochs:g} epochs for fine-tuning"
        yield error("transfer.probe_epochs", text, "train.epochs")
    if len(table.wise) > 1 and recipe.train.best_metric == "last":
        text = 'choosing among several values needs a validation metric, but train.best_metric is "last"'
        yield error("transfer.wise", text, "train.best_metric", hint="give one value, such as wise = [0.5]")
    if recipe.train.grad_accum_steps == "auto":
        text = '"auto" is not possible with transfer.mode = "lp_ft", whose two phases need different memory'
        yield error("train.grad_accum_steps", text, "transfer.mode", hint="give a number")
    if recipe.data.progressive_sizes:
        text = 'is not possible with transfer.mode = "lp_ft", whose probe needs images of one size'
        yield error("data.progressive_sizes", text, "transfer.mode", at="key")


def fitted_head(recipe: Recipe) -> Iterator[Issue]:
    """Check that modes "logistic" and "knn", which fit once to fixed features, are not combined with other settings."""
    table, train, augment = recipe.transfer, recipe.train, recipe.augment
    for key, modes in {"C": ("logistic",), "k": ("knn",), "refit": ("logistic", "knn")}.items():
        if table.mode not in modes and getattr(table, key) != getattr(TransferConfig(), key):
            only = "only mode " + " and ".join(f'"{mode}"' for mode in modes)
            text = f'{only} {"uses" if len(modes) == 1 else "use"} it, not "{table.mode}"'
            yield error(f"transfer.{key}", text, "transfer.mode", at="key")
    if not table.is_fitted:
        return
    head = recipe.model.head
    impossible = {
        "train.epochs": (train.epochs != 1, "the layer is fitted once: set epochs = 1"),
        "train.loss": (train.loss != "cross_entropy", 'the loss is "cross_entropy"'),
        "train.class_weights": (train.class_weights != "none", "classes are not weighted"),
        "train.sampling": (train.sampling == "balanced", "each image counts once"),
        "train.ema": (train.ema is not None, "there are no steps to average over"),
        "train.swa_start": (train.swa_start is not None, "there are no steps to average over"),
        "optimizer.sam": (recipe.optimizer.sam is not None, "the optimizer takes no steps"),
        "optimizer.lookahead": (recipe.optimizer.lookahead is not None, "the optimizer takes no steps"),
        "optimizer.schedule_free": (recipe.optimizer.schedule_free is not None, "the optimizer takes no steps"),
        "augment.label_smoothing": (augment.label_smoothing > 0, "labels are not smoothed"),
        "augment.mixup": (augment.mixup > 0, "features of mixed images cannot be computed once"),
        "augment.cutmix": (augment.cutmix > 0, "features of mixed images cannot be computed once"),
        "augment.repeats": (augment.repeats > 1, "each image counts once"),
        "augment.train": (is_random("train", augment), "training images must not be augmented randomly"),
        "data.cache": (recipe.data.cache == "off", "features are computed once and kept in the cache"),
        "data.progressive_sizes": (bool(recipe.data.progressive_sizes), "all images are used at one size"),
        "model.head": (bool(head.hidden or head.batch_norm or head.dropout), "the head is one Linear"),
        "task.kind": (recipe.task.kind != "single_label", "each image has exactly one class"),
        "transfer.freeze": (bool(table.freeze), "exactly the last layer is fitted"),
        "transfer.train": (bool(table.train), "exactly the last layer is fitted"),
        "transfer.frozen_batch_norm": (table.frozen_batch_norm == "update", "features must not change"),
    }
    for key, (is_set, reason) in impossible.items():
        if is_set:
            yield error(key, f'with transfer.mode = "{table.mode}", {reason}', "transfer.mode")
    key, example = ("C", "C = [1.0]") if table.mode == "logistic" else ("k", "k = [20]")
    if len(getattr(table, key)) > 1 and recipe.data.split.validation == 0:
        text = "choosing among several values needs validation images, but data.split.validation is 0"
        yield error(f"transfer.{key}", text, "data.split.validation", hint=f"give one value, such as {example}")
    if table.refit and recipe.data.split.validation == 0:
        text = "has no effect without validation images: data.split.validation is 0"
        yield warning("transfer.refit", text, "data.split.validation", at="key")


def model(recipe: Recipe) -> Iterator[Issue]:
    """Check that head, stem and ConvNet fit the architecture, and that images are large enough for the ConvNet."""
    table = recipe.model
    architecture = ("model.name", "model.source")
    has_classifier = table.source == "torchvision" and table.name.startswith(("alexnet", "vgg"))
    if table.head.scope == "classifier" and not has_classifier:
        text = f'"classifier" is for torchvision\'s alexnet and vgg, not {toml_value(table.name)}'
        yield error("model.head.scope", text, *architecture, hint='set "last_layer"')
    if table.stem == "small" and not table.name.startswith(("resnet", "resnext", "wide_resnet")):
        yield error("model.stem", f'"small" is for ResNets, not {toml_value(table.name)}', *architecture)
    elif table.stem == "small" and table.weights != "none":
        text = '"small" replaces the first convolution, whose pretrained weights are lost'
        yield warning("model.stem", text, "model.weights")
    size = input_size(recipe)
    if table.convnet is not None and table.source != "toolkit":  # may be inherited
        message = f'model.convnet has no effect with source = "{table.source}"'
        yield Issue(message, ("model", "convnet"), (("model", "source"),), severity="warning")
    elif table.convnet is not None and size is not None:
        try:
            convnet_output_size(table.convnet, size)
        except UserError as fault:
            yield error("model.convnet.blocks", str(fault), "data.image_size")


def splits(recipe: Recipe) -> Iterator[Issue]:
    """Check that the splits leave training images, and that drop_last leaves a step, if their number is known."""
    images, split, train = info_of(recipe.data.dataset, recipe.data.name).images, recipe.data.split, recipe.train
    if split.folds is None and split.fold:
        yield error("data.split.fold", "needs data.split.folds", hint="for example folds = 5", at="key")
    elif split.folds is not None and split.fold >= split.folds:
        text = f"{split.fold} is not one of the {split.folds} folds, which are numbered from 0"
        yield error("data.split.fold", text, "data.split.folds", hint=f"set 0 to {split.folds - 1}")
    if split.folds is not None and split.test != "auto" and split.validation == 0:
        text = "with a fixed data.split.test, the fold is the validation split, but data.split.validation is 0"
        yield error("data.split.folds", text, "data.split.test", "data.split.validation", hint='set test = "auto"')
    if split.train_images_per_class is not None:
        for key, default in (("folds", None), ("test", "auto")):
            if getattr(split, key) != default:
                text = "contradicts data.split.train_images_per_class, which leaves all other images for the test split"
                yield error(f"data.split.{key}", text, "data.split.train_images_per_class")
        if split.method == "official":
            text = "contradicts data.split.train_images_per_class, which draws from all lists"
            yield error(
                "data.split.method", text, "data.split.train_images_per_class", hint='remove it, or "stratified"'
            )
    if images is None or split.train_images_per_class is not None:
        return
    test = 0 if images[1] else 0.2 if split.test == "auto" else split.test
    shares = {"validation": split.validation, "test": test}
    if split.folds is not None:
        shares["test" if split.test == "auto" and not images[1] else "validation"] = 1 / split.folds
    counts = {key: value for key, value in shares.items() if isinstance(value, int)}
    if sum(counts.values()) >= images[0]:
        asked = " and ".join(f"{count} for {key}" for key, count in counts.items() if count)
        key = max(counts, key=lambda name: counts[name])
        yield error(f"data.split.{key}", f"{asked} of {images[0]} images leaves no training images", "data.dataset")
    count = images[0] - _split_size(shares["test"], images[0])
    is_alternate = split.method == "alternate" and split.validation and split.folds is None
    count -= count // 2 if is_alternate else _split_size(shares["validation"], count)
    if train.drop_last and 0 < count < train.batch_size:
        text = (
            f"{train.batch_size} is more than the {count} training images, and train.drop_last drops incomplete "
            "batches: an epoch would have no steps"
        )
        hint = f"set train.batch_size to {count} or less, or train.drop_last = false"
        yield error("train.batch_size", text, "train.drop_last", "data.dataset", hint=hint)


def _split_size(share: float, images: int) -> int:
    """Return the number of images for a fraction (0..1) or number, as toolkit.data.splits computes it."""
    return share if isinstance(share, int) else floor(share * images + 0.5)


def data(recipe: Recipe) -> Iterator[Issue]:
    """Warn about keys of [data] that have no effect."""
    table = recipe.data
    if table.fixed_views is not None and not is_random("train", recipe.augment):
        text = "has no effect, since training images are not augmented randomly: all views are the same"
        yield warning("data.fixed_views", text, "augment.train", at="key")
    no_effect = f'has no effect with dataset = "{table.dataset}"'
    if table.dataset == "huggingface" and table.root != DataConfig.model_fields["root"].default:
        text = 'has no effect with dataset = "huggingface", whose folder is data.name'
        yield warning("data.root", text, "data.dataset", at="key")
    if not isinstance(table.root, str) and table.dataset != "imagefolder":
        text = f'several folders are only possible with dataset = "imagefolder", not "{table.dataset}"'
        yield error("data.root", text, "data.dataset")
    if len(set(table.roots)) < len(table.roots):
        yield error("data.root", "a folder is listed twice")
    if table.background_class and table.dataset != "caltech101":
        yield warning("data.background_class", no_effect, "data.dataset", at="key")
    if table.class_folders != "auto" and table.dataset != "imagefolder":
        yield warning("data.class_folders", no_effect, "data.dataset", at="key")
    users = {"table": ("table",), **dict.fromkeys(("name", "args"), ("torchvision", "huggingface", "plugin"))}
    users |= dict.fromkeys(("columns", "class_names", "label_separator"), ("table", "huggingface", "shards"))
    users |= dict.fromkeys(("shuffle_shards", "cache_limit"), ("shards",))
    for key, names in users.items():
        if table.dataset not in names and getattr(table, key) != DataConfig.model_fields[key].default:
            yield warning(f"data.{key}", no_effect, "data.dataset", at="key")
    if table.dataset == "table":
        yield from _table(table)
    if table.dataset == "plugin" and table.name is None:
        hint = "the name of your own data set, see docs/plugins.md"
        yield error("data.name", 'must be given with dataset = "plugin"', "data.dataset", hint=hint, at="table")


def _table(table: DataConfig) -> Iterator[Issue]:
    """Check that data.table is set, and that the keys about it do not contradict one another."""
    if table.table is None:
        hint = 'for example table = "labels.csv"'
        yield error("data.table", 'must be given with dataset = "table"', "data.dataset", hint=hint, at="table")
    if isinstance(table.columns.label, list):
        if len(set(table.columns.label)) < len(table.columns.label):
            yield error("data.columns.label", "a column is listed twice")
        for key in ("label_separator", "class_names"):
            if getattr(table, key) is not None:
                text = "has no effect with several label columns, whose names are the classes"
                yield warning(f"data.{key}", text, "data.columns.label", at="key")


def early_stopping(recipe: Recipe) -> Iterator[Issue]:
    """Warn if early stopping cannot happen within the run, or has a min_delta but no patience."""
    table, epochs = recipe.early_stopping, recipe.scheduled_epochs
    if table.patience is not None and table.patience >= epochs:
        text = f"{table.patience} epochs without improvement cannot occur in a run of {epochs:g}"
        yield warning("early_stopping.patience", text, "train.epochs")
    if table.patience is None and table.min_delta:
        text = "has no effect without patience"
        yield warning("early_stopping.min_delta", text, "early_stopping.patience", at="key")


def monitored_metrics(recipe: Recipe) -> Iterator[Issue]:
    """Check that best_metric, schedule and early stopping use metrics that the run computes and that are meaningful."""
    best_metric, plateau = recipe.train.best_metric, recipe.scheduler.name == "plateau"
    if best_metric == "last" and recipe.early_stopping.patience is not None:
        text = (
            '"last" keeps the last epoch, but early stopping ends a run some epochs after its best: '
            "the two contradict each other"
        )
        hint = "remove early_stopping.patience, or select by a validation metric"
        yield error("train.best_metric", text, "early_stopping.patience", hint=hint)
    mixes = [key for key in ("mixup", "cutmix") if getattr(recipe.augment, key)]
    watched = {"early_stopping.metric": recipe.early_stopping.patience and recipe.early_stopping.metric}
    watched |= {"scheduler.metric": recipe.scheduler.metric} if plateau else {}
    for key, metric in watched.items():
        if mixes and metric == "train/accuracy":
            text = f"with {' and '.join(mixes)}, train/accuracy is measured on mixed images"
            related = (*(f"augment.{mix}" for mix in mixes), "early_stopping.patience")
            yield warning(key, text, *related, hint="monitor a validation metric")
    if recipe.data.split.validation != 0:
        return
    if best_metric != "last":
        text = f"{toml_value(best_metric)} needs validation images, but data.split.validation is 0"
        hint = 'set train.best_metric = "last", or hold out some images for validation'
        yield error("train.best_metric", text, "data.split.validation", hint=hint)
    if plateau and recipe.scheduler.metric.startswith("val/"):
        text = f"{toml_value(recipe.scheduler.metric)} is not measured with data.split.validation = 0"
        hint = 'set "train/loss", or use another schedule'
        yield error("scheduler.metric", text, "data.split.validation", "scheduler.name", hint=hint)


def disabled_splits(recipe: Recipe) -> Iterator[Issue]:
    """Warn about keys that refer to a split that is disabled."""
    no_effect = "has no effect with data.split.{} = 0"
    if recipe.data.split.validation == 0 and recipe.augment.validation:
        yield warning("augment.validation", no_effect.format("validation"), "data.split.validation", at="key")
    if recipe.data.split.test == 0 and recipe.data.test_images_per_class is not None:
        yield warning("data.test_images_per_class", no_effect.format("test"), "data.split.test", at="key")
    for split, prefix in (("validation", "val_"), ("test", "test_")):
        for metric in recipe.expected_metrics if getattr(recipe.data.split, split) == 0 else ():
            if metric.removeprefix("last_").startswith(prefix):
                text = f"is not compared, since data.split.{split} = 0"
                yield warning(("expected_metrics", metric), text, f"data.split.{split}", at="key")


def labels(recipe: Recipe) -> Iterator[Issue]:
    """Check that labels and paths have no line breaks or control characters, and that labels fit W&B's limits."""
    tracking = recipe.tracking
    found: dict[KeyPath, str | None] = {
        ("tracking", key): getattr(tracking, key) for key in ("entity", "group", "run_name")
    }
    found |= {("tracking", "tags", index): tag for index, tag in enumerate(tracking.tags)}
    for path, text in found.items():
        longest = 64 if "tags" in path else LONGEST_LABEL
        if text is not None and not 1 <= len(text) <= longest:
            yield error(path, f"expected text of 1 to {longest} characters, found {len(text)}")
    found |= {("recipe", "description"): recipe.recipe.description, ("recipe", "run_root"): recipe.recipe.run_root}
    roots = recipe.data.root
    found |= {("data", "root"): roots} if isinstance(roots, str) else {}
    found |= {("data", "root", at): root for at, root in enumerate(roots)} if isinstance(roots, list) else {}
    found |= {("data", "table"): recipe.data.table}
    found |= {("model", "weights"): recipe.model.weights}
    for path, text in found.items():
        if text and any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in text):
            yield error(path, "line breaks and control characters are not allowed here")


RULES = (
    catalog_checks.model,
    catalog_checks.weights,
    catalog_checks.optimizer,
    catalog_checks.loss,
    catalog_checks.torchvision_dataset,
    catalog_checks.huggingface_dataset,
    catalog_checks.transforms,
    catalog_checks.stages,
    catalog_checks.auto_augment,
    catalog_checks.expected_metrics,
    task_checks.task,
    task_checks.unknown_metrics,
    transfer,
    fitted_head,
    model,
    input_checks.image_size,
    input_checks.channels,
    splits,
    input_checks.normalization,
    training_checks.averages,
    training_checks.optimizer,
    training_checks.scheduler,
    early_stopping,
    monitored_metrics,
    disabled_splits,
    augment_checks.augment,
    training_checks.train,
    training_checks.distillation,
    data,
    labels,
)


def check(recipe: Recipe) -> Iterator[Issue]:
    """Yield the errors and warnings about combinations of keys, for a recipe whose tables are each valid."""
    for rule in RULES:
        yield from rule(recipe)

"""Checks across keys: combinations that cannot work or are likely mistakes. One small function per rule."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from math import floor
from typing import Any

from toolkit.data.dataset_info import DATASETS
from toolkit.errors import UserError
from toolkit.recipe import catalog_checks
from toolkit.recipe.catalog import weights_input
from toolkit.recipe.catalog_checks import MODEL, SOURCE, WEIGHTS
from toolkit.recipe.diagnostics import Issue, dotted
from toolkit.recipe.gpu_support import is_random, unsupported_on_gpu
from toolkit.recipe.image_size import convnet_output_size, input_size
from toolkit.recipe.schema import NormalizeValues, Recipe, SchedulerConfig
from toolkit.recipe.toml_positions import KeyPath
from toolkit.recipe.toml_writer import toml_value

MODE = ("transfer", "mode")
EPOCHS = ("train", "epochs")
IMAGE_SIZE = ("data", "image_size")
SELECT = ("train", "best_metric")
VALIDATION = ("data", "split", "validation")
NORMALIZATIONS = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "half": ([0.5] * 3, [0.5] * 3),
    "none": ([0.0] * 3, [1.0] * 3),
}
"""Mean and standard deviation of the named choices of data.normalize."""

SCHEDULE_KEYS = {
    "step_size": ("step",),
    "gamma": ("step", "exponential", "plateau"),
    "min_lr": ("cosine", "plateau"),
    "metric": ("plateau",),
    "patience": ("plateau",),
    "threshold": ("plateau",),
    "threshold_mode": ("plateau",),
    "pct_start": ("one_cycle",),
    "start_factor": ("one_cycle",),
    "end_factor": ("one_cycle",),
}
"""The schedules that use each key; keys not listed apply to all schedules."""

LONGEST_LABEL = 128
"""W&B's limit for run names, groups and similar, in characters."""


def mode_fits_weights(recipe: Recipe) -> Iterator[Issue]:
    """Check that pretrained weights are set if the transfer mode needs them, and not set for scratch."""
    mode, weights = recipe.transfer.mode, recipe.model.weights
    if mode == "scratch" and weights != "none":
        hint = 'set transfer.mode = "finetune" to use the weights, or model.weights = "none" to train from scratch'
        yield Issue(
            'transfer.mode: "scratch" contradicts model.weights, which names pretrained weights', MODE, (WEIGHTS,), hint
        )
    elif mode == "finetune" and weights == "none":
        message = 'transfer.mode: "finetune" without pretrained weights is the same as "scratch"'
        yield Issue(message, MODE, (WEIGHTS,), "set model.weights", severity="warning")
    elif mode not in ("scratch", "finetune") and weights == "none":
        message = f'transfer.mode: "{mode}" needs pretrained weights, but model.weights is "none"'
        yield Issue(message, MODE, (WEIGHTS,), 'set model.weights, or transfer.mode = "scratch"')


def unfreezing_fits_mode(recipe: Recipe) -> Iterator[Issue]:
    """Check that unfreeze_at is only used with mode gradual, is increasing, and ends within the run."""
    mode, at = recipe.transfer.mode, recipe.transfer.unfreeze_at
    path = ("transfer", "unfreeze_at")
    if mode == "gradual" and not at:
        yield Issue('transfer.mode: "gradual" needs unfreeze_at', MODE, (path,), "for example unfreeze_at = [5, 10]")
    if mode != "gradual" and at:
        yield Issue(f'transfer.unfreeze_at: only mode "gradual" uses it, not "{mode}"', path, (MODE,), at="key")
    if any(later <= earlier for earlier, later in pairwise(at)):
        yield Issue("transfer.unfreeze_at: the epochs must be increasing", path)
    if at and max(at) > recipe.train.epochs:
        message = f"transfer.unfreeze_at: epoch {max(at)} is beyond the run's {recipe.train.epochs} epochs"
        yield Issue(message, path, (EPOCHS,))


def new_layer_fits_mode(recipe: Recipe) -> Iterator[Issue]:
    """Check that new_layer is only used with mode backbone_only."""
    if recipe.transfer.new_layer == "freeze" and recipe.transfer.mode != "backbone_only":
        message = f'transfer.new_layer: only mode "backbone_only" uses it, not "{recipe.transfer.mode}"'
        yield Issue(message, ("transfer", "new_layer"), (MODE,), at="key")


def head_fits_model(recipe: Recipe) -> Iterator[Issue]:
    """Check that scope = "classifier" is only used with AlexNet and VGG, whose classifiers have several layers."""
    model, path = recipe.model, ("model", "head", "scope")
    has_classifier = model.source == "torchvision" and model.name.startswith(("alexnet", "vgg"))
    if model.head.scope == "classifier" and not has_classifier:
        message = f'model.head.scope: "classifier" is for torchvision\'s alexnet and vgg, not {toml_value(model.name)}'
        yield Issue(message, path, (MODEL, SOURCE), 'set "last_layer"')


def convnet_has_effect(recipe: Recipe) -> Iterator[Issue]:
    """Warn about a [model.convnet], perhaps inherited, that is unused because the source is another library."""
    source = recipe.model.source
    if source != "toolkit" and recipe.model.convnet is not None:
        message = f'model.convnet has no effect with source = "{source}"'
        yield Issue(message, ("model", "convnet"), (SOURCE,), severity="warning")


def stem_fits_model(recipe: Recipe) -> Iterator[Issue]:
    """Check that the small stem is only used with ResNets; warn if it replaces a pretrained layer."""
    model, path = recipe.model, ("model", "stem")
    if model.stem != "small":
        return
    if not model.name.startswith(("resnet", "resnext", "wide_resnet")):
        yield Issue(f'model.stem: "small" is for ResNets, not {toml_value(model.name)}', path, (MODEL, SOURCE))
    elif model.weights != "none":
        message = 'model.stem: "small" replaces the first convolution, whose pretrained weights are lost'
        yield Issue(message, path, (WEIGHTS,), severity="warning")


def image_size_is_known(recipe: Recipe) -> Iterator[Issue]:
    """Require image_size if neither the data set nor the pretrained weights determine a square input size."""
    has_expected_size = recipe.model.source != "toolkit" and recipe.model.weights != "none"
    if input_size(recipe) is None and not has_expected_size:
        message = f'data.image_size: must be given, since the images of "{recipe.data.dataset}" differ in size'
        related = (("data", "dataset"), MODEL, WEIGHTS)
        yield Issue(message, IMAGE_SIZE, related, "for example image_size = 224", at="table")
    model = recipe.model
    expected = weights_input(model.source, model.name, model.weights) if has_expected_size else None
    if recipe.data.image_size is None and expected and expected.height:
        message = (
            f"data.image_size: must be given, since the weights were trained on {expected.height} x "
            f"{expected.image_size} pixels (height x width), but the model's input is square: images will be squashed"
        )
        yield Issue(
            message, IMAGE_SIZE, (MODEL, WEIGHTS), f"for example image_size = {expected.image_size}", at="table"
        )


def images_reach_every_layer(recipe: Recipe) -> Iterator[Issue]:
    """Check that images are large enough for every convolution and pooling layer of [model.convnet]."""
    size, model = input_size(recipe), recipe.model
    if model.source != "toolkit" or model.convnet is None or size is None:
        return
    try:
        convnet_output_size(model.convnet, size)
    except UserError as error:
        yield Issue(f"model.convnet.blocks: {error}", ("model", "convnet", "blocks"), (IMAGE_SIZE,))


def resize_gives_image_size(recipe: Recipe) -> Iterator[Issue]:
    """Check that the resize produces images of data.image_size if there is no crop."""
    data, size = recipe.data, input_size(recipe)
    # The transforms of a split may determine its image size.
    is_plain = not (recipe.augment.train and recipe.augment.validation and recipe.augment.test)
    if data.crop != "none" or data.resize in (None, "none") or size is None or not is_plain:
        return
    resized = data.resize if isinstance(data.resize, list) else [data.resize, data.resize]
    if resized != [size, size]:
        shown = " x ".join(map(str, resized)) if isinstance(data.resize, list) else f"a short side of {data.resize}"
        message = (
            f'data.resize: with crop = "none" images would have {shown} pixels, but the model takes {size} x {size}'
        )
        yield Issue(message, ("data", "resize"), (("data", "crop"), IMAGE_SIZE), 'set crop = "center"')


def splits_leave_images(recipe: Recipe) -> Iterator[Issue]:
    """Check that the validation and test splits leave training images, if the size of the data set is known."""
    images, split = DATASETS[recipe.data.dataset].images, recipe.data.split
    if images is None:
        return
    taken = {"validation": split.validation, "test": 0 if images[1] else split.test}
    counts = {key: value for key, value in taken.items() if isinstance(value, int)}
    if sum(counts.values()) >= images[0]:
        asked = " and ".join(f"{count} for {key}" for key, count in counts.items() if count)
        key = max(counts, key=lambda name: counts[name])
        message = f"data.split.{key}: {asked} of {images[0]} images leaves no training images"
        yield Issue(message, ("data", "split", key), (("data", "dataset"),))


def an_epoch_has_a_step(recipe: Recipe) -> Iterator[Issue]:
    """Check that drop_last leaves at least one batch per epoch, if the number of training images is known."""
    images, split, table = DATASETS[recipe.data.dataset].images, recipe.data.split, recipe.train
    if images is None or not table.drop_last:
        return
    count = images[0]
    if not images[1]:
        count -= _taken(0.2 if split.test == "auto" else split.test, count)
    count -= count // 2 if split.method == "alternate" and split.validation else _taken(split.validation, count)
    if 0 < count < table.batch_size:
        message = (
            f"train.batch_size: {table.batch_size} is more than the {count} training images, and train.drop_last "
            "drops incomplete batches: an epoch would have no steps"
        )
        related = (("train", "drop_last"), ("data", "dataset"))
        hint = f"set train.batch_size to {count} or less, or train.drop_last = false"
        yield Issue(message, ("train", "batch_size"), related, hint)


def _taken(share: float, images: int) -> int:
    """Return the number of images for a fraction (0..1) or number, as toolkit.data.splits computes it."""
    return share if isinstance(share, int) else floor(share * images + 0.5)


def channels_of(recipe: Recipe) -> int:
    """Return the model's input channels: as set, else 3 with pretrained weights, else those of the data set."""
    if recipe.data.channels:
        return recipe.data.channels
    return DATASETS[recipe.data.dataset].channels if recipe.model.weights == "none" else 3


def normalization_has_all_channels(recipe: Recipe) -> Iterator[Issue]:
    """Check that explicit normalization constants have one value per channel."""
    values, channels = recipe.data.normalize, channels_of(recipe)
    if isinstance(values, NormalizeValues) and len(values.mean) != channels:
        related: tuple[KeyPath, ...] = (("data", "channels"), ("data", "dataset"), WEIGHTS)
        message = f"data.normalize: {len(values.mean)} values for {channels} channel{'s' if channels > 1 else ''}"
        yield Issue(message, ("data", "normalize"), related, "give one value per channel")


def normalization_fits_weights(recipe: Recipe) -> Iterator[Issue]:
    """Warn if the normalization differs from what the pretrained weights were trained with."""
    model, choice = recipe.model, recipe.data.normalize
    if choice == "auto" or model.source == "toolkit" or channels_of(recipe) != 3:
        return
    expected = weights_input(model.source, model.name, model.weights)
    if expected is None:
        return
    wanted = f"mean {toml_value(expected.mean)} and std {toml_value(expected.std)}"
    if choice == "dataset":
        given = "those of the training images"
    else:
        mean, std = (choice.mean, choice.std) if isinstance(choice, NormalizeValues) else NORMALIZATIONS[choice]
        if _close(mean, expected.mean) and _close(std, expected.std):
            return
        given = f"mean {toml_value(mean)} and std {toml_value(std)}"
    message = f"data.normalize: the weights {model.weights} of {model.name} expect {wanted}; the recipe gives {given}"
    yield Issue(
        message,
        ("data", "normalize"),
        (MODEL, SOURCE, WEIGHTS),
        'normalize = "auto" follows the weights',
        severity="warning",
    )


def _close(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-3 for a, b in zip(one, other, strict=True))


def warmup_fits_run(recipe: Recipe) -> Iterator[Issue]:
    """Check that the warm-up is shorter than the run."""
    warmup, epochs = recipe.scheduler.warmup_epochs, recipe.train.epochs
    if warmup >= epochs:
        message = f"scheduler.warmup_epochs: a warm-up of {warmup:g} epochs is not shorter than the run of {epochs}"
        yield Issue(message, ("scheduler", "warmup_epochs"), (EPOCHS,))


def step_fits_run(recipe: Recipe) -> Iterator[Issue]:
    """Warn if the learning rate is never stepped within the run."""
    table, epochs = recipe.scheduler, recipe.train.epochs
    if table.name == "step" and table.step_size is not None and table.step_size >= epochs:
        message = f"scheduler.step_size: a period of {table.step_size} epochs has no effect in a run of {epochs}"
        yield Issue(message, ("scheduler", "step_size"), (EPOCHS, ("scheduler", "name")), severity="warning")


def schedule_uses_keys(recipe: Recipe) -> Iterator[Issue]:
    """Warn about keys that the chosen schedule does not use."""
    table, default = recipe.scheduler, SchedulerConfig()
    for key, users in SCHEDULE_KEYS.items():
        if table.name not in users and getattr(table, key) != getattr(default, key):
            message = f'scheduler.{key}: has no effect with name = "{table.name}"; it is for {" and ".join(users)}'
            yield Issue(message, ("scheduler", key), (("scheduler", "name"),), severity="warning", at="key")


def lowest_rate_is_below(recipe: Recipe) -> Iterator[Issue]:
    """Check that min_lr is not above lr."""
    low, high = recipe.scheduler.min_lr, recipe.optimizer.lr
    if low > high and recipe.scheduler.name in SCHEDULE_KEYS["min_lr"]:
        message = f"scheduler.min_lr: {low:g} is above optimizer.lr, {high:g}"
        yield Issue(message, ("scheduler", "min_lr"), (("optimizer", "lr"), ("scheduler", "name")))


def stopping_fits_run(recipe: Recipe) -> Iterator[Issue]:
    """Warn if early stopping cannot happen within the run, or has a min_delta but no patience."""
    table, epochs = recipe.early_stopping, recipe.train.epochs
    path = ("early_stopping", "patience")
    if table.patience is not None and table.patience >= epochs:
        message = (
            f"early_stopping.patience: {table.patience} epochs without improvement cannot occur in a run of {epochs}"
        )
        yield Issue(message, path, (EPOCHS,), severity="warning")
    if table.patience is None and table.min_delta:
        message = "early_stopping.min_delta: has no effect without patience"
        yield Issue(message, ("early_stopping", "min_delta"), (path,), severity="warning", at="key")


def selection_is_measured(recipe: Recipe) -> Iterator[Issue]:
    """Check that model selection and the schedule do not need a missing validation split.

    Also reject early stopping together with best_metric = "last".
    """
    best_metric = recipe.train.best_metric
    if best_metric == "last" and recipe.early_stopping.patience is not None:
        message = (
            'train.best_metric: "last" keeps the last epoch, but early stopping ends a run some epochs after its best: '
            "the two contradict each other"
        )
        hint = "remove early_stopping.patience, or select by a validation metric"
        yield Issue(message, SELECT, (("early_stopping", "patience"),), hint)
    if recipe.data.split.validation != 0:
        return
    if best_metric != "last":
        message = (
            f"train.best_metric: {toml_value(best_metric)} needs validation images, but data.split.validation is 0"
        )
        yield Issue(
            message, SELECT, (VALIDATION,), 'set train.best_metric = "last", or hold out some images for validation'
        )
    if recipe.scheduler.name == "plateau" and recipe.scheduler.metric.startswith("val/"):
        message = (
            f"scheduler.metric: {toml_value(recipe.scheduler.metric)} is not measured with data.split.validation = 0"
        )
        path = ("scheduler", "metric")
        yield Issue(message, path, (VALIDATION, ("scheduler", "name")), 'set "train/loss", or use another schedule')
    if recipe.augment.validation:
        message = "augment.validation: has no effect with data.split.validation = 0"
        yield Issue(message, ("augment", "validation"), (VALIDATION,), severity="warning", at="key")


def expectations_are_measured(recipe: Recipe) -> Iterator[Issue]:
    """Warn about [expected_metrics] and test_images_per_class of a split that is disabled."""
    for split, prefix in (("validation", "val_"), ("test", "test_")):
        path = ("data", "split", split)
        if getattr(recipe.data.split, split) != 0:
            continue
        if split == "test" and recipe.data.test_images_per_class is not None:
            message = "data.test_images_per_class: has no effect with data.split.test = 0"
            yield Issue(message, ("data", "test_images_per_class"), (path,), severity="warning", at="key")
        for figure in recipe.expected_metrics:
            if figure.removeprefix("last_").startswith(prefix):
                message = f"expected_metrics.{figure}: is not compared, since data.split.{split} = 0"
                yield Issue(message, ("expected_metrics", figure), (path,), severity="warning", at="key")


def metric_is_measured_plainly(recipe: Recipe) -> Iterator[Issue]:
    """Warn if train/accuracy is monitored while mixup or CutMix is on, as mixed images have no single label."""
    mixes = [key for key in ("mixup", "cutmix") if getattr(recipe.augment, key)]
    watched = {("early_stopping", "metric"): recipe.early_stopping.patience and recipe.early_stopping.metric}
    if recipe.scheduler.name == "plateau":
        watched["scheduler", "metric"] = recipe.scheduler.metric
    for path, metric in watched.items():
        if mixes and metric == "train/accuracy":
            related: tuple[KeyPath, ...] = (*(("augment", key) for key in mixes), ("early_stopping", "patience"))
            message = f"{dotted(path)}: with {' and '.join(mixes)}, train/accuracy is measured on mixed images"
            yield Issue(message, path, related, "monitor a validation metric", severity="warning")


def mixing_keys_have_effect(recipe: Recipe) -> Iterator[Issue]:
    """Warn about mixup_prob and mixup_switch_prob if mixup and CutMix are off."""
    table = recipe.augment
    related: tuple[KeyPath, ...] = (("augment", "mixup"), ("augment", "cutmix"))
    if table.mixup_prob != 1 and not (table.mixup or table.cutmix):
        message = "augment.mixup_prob: has no effect without mixup or cutmix"
        yield Issue(message, ("augment", "mixup_prob"), related, severity="warning", at="key")
    if table.mixup_switch_prob != 0.5 and not (table.mixup and table.cutmix):
        message = "augment.mixup_switch_prob: has no effect unless both mixup and cutmix are on"
        yield Issue(message, ("augment", "mixup_switch_prob"), related, severity="warning", at="key")


def augmentation_fits_device(recipe: Recipe) -> Iterator[Issue]:
    """Check that every transform supports whole batches if run_on = "device"."""
    if recipe.augment.run_on != "device":
        return
    for split in ("train", "validation", "test"):
        obstacle = unsupported_on_gpu(split, recipe.augment)
        if obstacle is not None:
            message = f'augment.run_on: "device" does not support {obstacle}'
            yield Issue(message, ("augment", "run_on"), (("augment", split),), 'set "auto" or "workers", or remove it')


def batch_divides(recipe: Recipe) -> Iterator[Issue]:
    """Check that the batch size is a multiple of grad_accum_steps."""
    batch, parts = recipe.train.batch_size, recipe.train.grad_accum_steps
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        hint = f"for example batch_size = {f'{below} or ' if below else ''}{above}"
        message = f"train.batch_size: {batch} is not divisible by train.grad_accum_steps = {parts}"
        yield Issue(message, ("train", "batch_size"), (("train", "grad_accum_steps"),), hint)


def balance_is_not_doubled(recipe: Recipe) -> Iterator[Issue]:
    """Warn about balanced sampling with balanced class weights, which favor rare classes twice."""
    if recipe.train.sampling == "balanced" and recipe.train.class_weights == "balanced":
        message = 'train.class_weights: with sampling = "balanced" rare classes are favored twice'
        yield Issue(message, ("train", "class_weights"), (("train", "sampling"),), severity="warning")


def data_keys_have_effect(recipe: Recipe) -> Iterator[Issue]:
    """Warn about data keys without effect: background_class, class_folders and fixed_views."""
    data = recipe.data
    if data.fixed_views is not None and not is_random("train", recipe.augment):
        message = (
            "data.fixed_views: has no effect, since training images are not augmented randomly: all views are the same"
        )
        yield Issue(message, ("data", "fixed_views"), (("augment", "train"),), severity="warning", at="key")
    if data.background_class and data.dataset != "caltech101":
        message = f'data.background_class: has no effect with dataset = "{data.dataset}"'
        yield Issue(message, ("data", "background_class"), (("data", "dataset"),), severity="warning", at="key")
    if data.class_folders != "auto" and data.dataset != "imagefolder":
        message = f'data.class_folders: has no effect with dataset = "{data.dataset}"'
        yield Issue(message, ("data", "class_folders"), (("data", "dataset"),), severity="warning", at="key")


def labels_are_one_line(recipe: Recipe) -> Iterator[Issue]:
    """Check that labels and paths have no line breaks or control characters, and that labels fit W&B's limits."""
    tracking = recipe.tracking
    labels: dict[KeyPath, str | None] = {
        ("tracking", key): getattr(tracking, key) for key in ("entity", "group", "run_name")
    }
    labels |= {("tracking", "tags", index): tag for index, tag in enumerate(tracking.tags)}
    for path, text in labels.items():
        longest = 64 if "tags" in path else LONGEST_LABEL
        if text is not None and not 1 <= len(text) <= longest:
            yield Issue(f"{dotted(path)}: expected text of 1 to {longest} characters, found {len(text)}", path)
    labels |= {("recipe", "description"): recipe.recipe.description, ("recipe", "run_root"): recipe.recipe.run_root}
    labels |= {("data", "root"): recipe.data.root, WEIGHTS: recipe.model.weights}
    for path, text in labels.items():
        if text and any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in text):
            yield Issue(f"{dotted(path)}: line breaks and control characters are not allowed here", path)


RULES = (
    catalog_checks.model_is_known,
    catalog_checks.weights_are_known,
    catalog_checks.model_arguments_are_free,
    catalog_checks.optimizer_is_known,
    catalog_checks.transforms_are_known,
    catalog_checks.places_are_free,
    catalog_checks.policy_is_known,
    catalog_checks.figures_are_known,
    mode_fits_weights,
    unfreezing_fits_mode,
    new_layer_fits_mode,
    head_fits_model,
    convnet_has_effect,
    stem_fits_model,
    image_size_is_known,
    images_reach_every_layer,
    resize_gives_image_size,
    splits_leave_images,
    an_epoch_has_a_step,
    normalization_has_all_channels,
    normalization_fits_weights,
    warmup_fits_run,
    step_fits_run,
    schedule_uses_keys,
    lowest_rate_is_below,
    stopping_fits_run,
    selection_is_measured,
    expectations_are_measured,
    metric_is_measured_plainly,
    mixing_keys_have_effect,
    augmentation_fits_device,
    batch_divides,
    balance_is_not_doubled,
    data_keys_have_effect,
    labels_are_one_line,
)


def check(recipe: Recipe) -> Iterator[Issue]:
    """Yield all errors and warnings across the keys of a recipe whose tables are valid by themselves."""
    for rule in RULES:
        yield from rule(recipe)

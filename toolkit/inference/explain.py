"""Grad-CAM (Selvaraju et al. 2017), computed by captum: heat maps of the evidence for a prediction."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from toolkit.data.image_sources import Pixels, UnreadableImageError
from toolkit.data.preprocessing import image_area
from toolkit.errors import UserError, first_line
from toolkit.inference.evaluate import split_images
from toolkit.reading import UnreadableFile
from toolkit.recipe.image_size import Size
from toolkit.report.label_predictions import read_label_predictions
from toolkit.report.plot_style import plot_style, save, short
from toolkit.report.run_data import read_predictions
from toolkit.runs import Run
from toolkit.similar_names import did_you_mean
from toolkit.training.trained_model import TrainedModel

BATCH_SIZE = 16
"""Number of images explained at once."""
MAX_PREFIX_TOKENS = 2
"""Number of leading non-spatial tokens to try: class and distillation token; more if the model declares them."""
SKIPPED = (
    nn.Identity,
    nn.Linear,
    nn.Dropout,
    nn.Flatten,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
"""Types of layers that are not considered, since they compute no features or are part of a larger layer."""


@dataclass(frozen=True)
class CamInput:
    """An image to be explained."""

    name: str
    input: Tensor
    """Preprocessed image, float32 [C, H, W]."""
    label: int | None
    """Index of the true class; None if unknown."""
    area: tuple[slice, slice] = (slice(None), slice(None))
    """Rows and columns of the model's input that contain the image; the rest is padding."""
    labels: tuple[int, ...] | None = None
    """Indices of the true labels for a multi-label model; None if unknown, or for a single-label model."""


@dataclass(frozen=True)
class CamResult:
    """An image with its prediction and the evidence for it.

    For a multi-label model there is one result per label that is predicted or missed; ``prediction`` is that label.
    """

    subject: CamInput
    prediction: int
    probability: float
    heat: np.ndarray
    """Evidence for the prediction in the image's area of the input, scaled to a maximum of 1, float32 [h, w]."""
    heat_of_label: np.ndarray | None
    """The same for the true label; None if the label is unknown or equals the prediction."""


@dataclass(frozen=True)
class CamLayer:
    """A layer whose output can be converted to spatial maps."""

    name: str
    kind: str
    """Layout of the output: channels_first [n, C, h, w], channels_last [n, h, w, C], tokens [n, prefix + h x w, C]."""
    prefix: int = 0
    """Number of leading non-spatial tokens (class token, registers)."""
    grid: Size = (0, 0)
    """Number of rows and columns of the tokens."""

    def to_maps(self, output: Tensor) -> Tensor:
        """Convert the layer's output to [n, C, h, w]."""
        if self.kind == "channels_first":
            return output
        if self.kind == "channels_last":
            return output.permute(0, 3, 1, 2)
        maps: Tensor = output[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return maps

    def from_maps(self, maps: Tensor, output: Tensor) -> Tensor:
        """Convert maps back, inverting :meth:`to_maps`; non-spatial tokens are taken from ``output``."""
        if self.kind == "channels_first":
            return maps.clone()  # the next layer may be an in-place operation
        if self.kind == "channels_last":
            return maps.permute(0, 2, 3, 1)
        return torch.cat([output[:, : self.prefix], maps.flatten(2).transpose(1, 2)], 1)


# -- images -----------------------------------------------------------------------------------------------------------


def subjects_from_files(trained: TrainedModel, paths: Sequence[str], log: Callable[[str], None]) -> list[CamInput]:
    """Load images from files; log and skip those that cannot be read."""
    images, transform = trained.files(paths), trained.transform
    found = []
    for index in range(len(images)):
        try:
            pixels = images.load(index)
            found.append(CamInput(images.name(index), transform(pixels), None, _area(trained, pixels)))
        except (UnreadableImageError, UserError) as error:
            log(str(error) if isinstance(error, UnreadableImageError) else f"{images.name(index)}: {error}")
    return found


def worst_mistakes(run: Run, trained: TrainedModel, count: int, data_root: Path | None = None) -> list[CamInput]:
    """Return the misclassified test images with the highest probabilities in predictions.csv, highest first."""
    if not run.has_test:
        raise UserError(f"{run.path} has no test images, so there are no mistakes to explain: specify images")
    is_multi_label = trained.task.kind == "multi_label"
    found = (read_label_predictions if is_multi_label else read_predictions)(run, trained.classes)
    worst = found.worst(count)
    if not len(worst):
        raise UserError(f"{run.path} misclassified none of its test images: specify images to explain")
    dataset, indices = split_images(run, "test", trained, data_root)
    index = {dataset.images.name(int(i)): int(i) for i in indices}
    if unknown := next((found.names[row] for row in worst if found.names[row] not in index), None):
        raise UnreadableFile(run.path / "predictions.csv", f"{unknown} is not a test image of this run")
    transform = trained.transform
    subjects: list[CamInput] = []
    for row in worst:
        pixels = dataset.images.load(index[found.names[row]])
        present = np.flatnonzero(found.labels[row]).tolist() if is_multi_label else None
        label, labels = (None, tuple(present)) if present is not None else (int(found.labels[row]), None)
        subjects.append(CamInput(found.names[row], transform(pixels), label, _area(trained, pixels), labels))
    return subjects


def _area(trained: TrainedModel, pixels: Pixels) -> tuple[slice, slice]:
    """Return the part of the input that contains the image; all of it if the recipe's own transforms may move it."""
    if trained.transforms:
        return slice(None), slice(None)
    return image_area(trained.preprocessing, (pixels.shape[0], pixels.shape[1]))


# -- layer ------------------------------------------------------------------------------------------------------------


def find_layer(trained: TrainedModel, sample: Tensor, wanted: str | None = None) -> CamLayer:
    """Return the layer ``wanted``, or the last one with spatial maps (more than 1x1) that the prediction depends on.

    For a ConvNet, VGG or ResNet that is the end of its convolutions; for a transformer that classifies by its class
    token, the input of the last attention, since patch tokens after it have no gradient. ``sample`` is one input
    [C, H, W]. Raises UserError if there is none.
    """
    module = trained.module
    score, outputs = _outputs(module, sample)
    if wanted is not None:
        return _named(trained, wanted, outputs, sample)
    layers = [_as_layer(module, name, output, sample) for name, output in outputs.items()]
    candidates = [layer for layer in layers if layer is not None and _may_be_explained(module, layer.name)]
    tensors = [outputs[layer.name] for layer in candidates]
    gradients = torch.autograd.grad(score, tensors, allow_unused=True) if tensors else ()
    for layer, gradient in reversed([*zip(candidates, gradients, strict=True)]):
        if gradient is not None and layer.to_maps(gradient).any():
            return layer
    raise UserError(
        f"{trained.table.name} has no layer with maps larger than 1x1; select one with --layer "
        f"(the last ones are {', '.join([*outputs][-6:])})"
    )


def _outputs(module: nn.Module, sample: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the largest logit of one image.

    Also return, in order, the output of each submodule that is called exactly once and returns one tensor, by name.
    """
    found: dict[str, list[Any]] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, arguments, output: found.setdefault(name, []).append(output)

    handles = [layer.register_forward_hook(recorder(name)) for name, layer in module.named_modules() if name]
    try:
        with torch.enable_grad():
            score = module(sample[None].detach().requires_grad_()).max()
    finally:
        for handle in handles:
            handle.remove()
    return score, {
        name: outputs[0] for name, outputs in found.items() if len(outputs) == 1 and isinstance(outputs[0], Tensor)
    }


def _as_layer(module: nn.Module, name: str, output: Tensor, sample: Tensor) -> CamLayer | None:
    """Return how a module's output for one image converts to maps of the image's shape; None if it does not."""
    shape, size = tuple(output.shape), (sample.shape[1], sample.shape[2])
    if len(shape) == 4 and shape[0] == 1 and _is_grid((shape[2], shape[3]), size):
        return CamLayer(name, "channels_first")
    if len(shape) == 4 and shape[0] == 1 and _is_grid((shape[1], shape[2]), size):
        return CamLayer(name, "channels_last")
    if len(shape) == 3 and shape[0] == 1:
        # Class and register tokens come first. Try the number the model declares, then the fewest that leave a grid.
        declared = int(getattr(module, "num_prefix_tokens", 0))
        for prefix in (declared, *range(MAX_PREFIX_TOKENS + 1)):
            if grid := _token_grid(shape[1] - prefix, size):
                return CamLayer(name, "tokens", prefix, grid)
    return None


def _is_grid(grid: Size, image: Size) -> bool:
    """Return whether maps of this size, larger than 1x1, have the shape of the image, up to rounding if not square."""
    if image[0] == image[1]:
        return grid[0] == grid[1] > 1
    scale = math.sqrt(math.prod(grid) / math.prod(image))
    return math.prod(grid) > 1 and all(abs(side - scale * whole) <= 1 for side, whole in zip(grid, image, strict=True))


def _token_grid(tokens: int, image: Size) -> Size | None:
    """Return the rows and columns of tokens that cover the image; None if no grid has its shape."""
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    found = [grid for grid in grids if _is_grid(grid, image)]
    return min(found, key=lambda grid: abs(grid[0] * image[1] - grid[1] * image[0]), default=None)


def _may_be_explained(module: nn.Module, name: str) -> bool:
    """Return whether Grad-CAM may use a layer: not one of :data:`SKIPPED`, and not inside an attention block.

    Outputs inside attention may look like spatial maps without being any.
    """
    layer = module.get_submodule(name)
    inside = set(name.split(".")) & {"attn", "self_attention", "attention", "token_mixer"}
    return not isinstance(layer, SKIPPED) and not inside


def _named(trained: TrainedModel, wanted: str, outputs: dict[str, Tensor], sample: Tensor) -> CamLayer:
    if wanted not in outputs:
        last = f"; the last ones are {', '.join([*outputs][-6:])}"
        hint = did_you_mean(wanted, outputs, 3, prefix="; ", otherwise=last)
        raise UserError(
            f"--layer {wanted}: {trained.table.name} has no layer of this name that is called exactly once{hint}"
        )
    layer = _as_layer(trained.module, wanted, outputs[wanted], sample)
    if layer is None:
        raise UserError(
            f"--layer {wanted} returns {list(outputs[wanted].shape)} for one image; Grad-CAM needs maps larger than "
            "1x1: [1, C, h, w], [1, h, w, C] or [1, tokens, C]"
        )
    return layer


@contextmanager
def _maps_of(module: nn.Module, layer: CamLayer) -> Iterator[nn.Module]:
    """Insert an identity module that the layer's output passes through as [n, C, h, w], and yield it."""
    maps = nn.Identity()

    def pass_through(_: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return layer.from_maps(maps(layer.to_maps(output)), output)

    handle = module.get_submodule(layer.name).register_forward_hook(pass_through)
    try:
        yield maps
    finally:
        handle.remove()


# -- Grad-CAM ---------------------------------------------------------------------------------------------------------


def heat_maps(trained: TrainedModel, layer: CamLayer, inputs: Tensor, classes: Tensor) -> Tensor:
    """Compute Grad-CAM of each input [n, C, H, W] for its class [n]: nonnegative, [n, H, W], in units of the logit.

    The heat map is the ReLU of the layer's maps, summed with the mean gradients of the logit as weights, interpolated
    to the input size.
    """
    from captum.attr import LayerAttribution, LayerGradCam

    with _maps_of(trained.module, layer) as maps, torch.enable_grad():
        found = LayerGradCam(trained.module, maps).attribute(inputs, classes, relu_attributions=True)
    size = (inputs.shape[2], inputs.shape[3])
    heat: Tensor = LayerAttribution.interpolate(found.detach(), size, "bilinear")[:, 0]
    return heat


def explain(trained: TrainedModel, subjects: Sequence[CamInput], layer: CamLayer) -> list[CamResult]:
    """Predict each image and compute heat maps for its prediction and, if it differs, for its true label.

    For a multi-label model, compute one for each label that is predicted or missed, or for the most probable label if
    there is none.
    """
    pairs = list(_predicted(trained, subjects))
    found: list[CamResult] = []
    for start in range(0, len(pairs), BATCH_SIZE):
        part, chosen, probabilities = zip(*pairs[start : start + BATCH_SIZE], strict=True)
        inputs, predictions = torch.stack([subject.input for subject in part]), torch.tensor(chosen)
        labels = torch.tensor([int(p) if s.label is None else s.label for s, p in zip(part, predictions, strict=True)])
        heat, of_label = (heat_maps(trained, layer, inputs, classes) for classes in (predictions, labels))
        for i, subject in enumerate(part):
            is_wrong = int(labels[i]) != int(predictions[i])
            own, other = _scaled(heat[i][subject.area]), _scaled(of_label[i][subject.area]) if is_wrong else None
            found.append(CamResult(subject, int(predictions[i]), float(probabilities[i]), own, other))
    return found


def _predicted(trained: TrainedModel, subjects: Sequence[CamInput]) -> Iterator[tuple[CamInput, int, float]]:
    """Yield each image with its prediction and the probability; for a multi-label model, once per label to explain."""
    for start in range(0, len(subjects), BATCH_SIZE):
        part = subjects[start : start + BATCH_SIZE]
        with torch.inference_mode():
            logits = trained.module(torch.stack([subject.input for subject in part]))
        for subject, row in zip(part, trained.task.probabilities(logits).numpy(), strict=True):
            ranking = np.argsort(-row, kind="stable")
            chosen = ranking[:1]
            if trained.task.decision_thresholds is not None:
                is_chosen = row >= trained.task.decision_thresholds
                is_chosen[list(subject.labels or ())] = True
                chosen = ranking[is_chosen[ranking]] if is_chosen.any() else chosen
            for k in chosen.tolist():
                yield subject, k, float(row[k])


def _scaled(heat: Tensor) -> np.ndarray:
    """Divide a map by its maximum; a map of zeros is returned unchanged."""
    scaled: np.ndarray = (heat / heat.max().clamp_min(1e-12)).numpy()
    return scaled


# -- figures ----------------------------------------------------------------------------------------------------------


def draw(
    trained: TrainedModel, found: Sequence[CamResult], layer: CamLayer, folder: Path, log: Callable[[str], None]
) -> list[Path]:
    """Write one PNG per image: the image as the model receives it, and an overlaid heat map per class."""
    files: list[Path] = []
    with plot_style(log):
        for number, explanation in enumerate(found, 1):
            stem = re.sub(r"[^\w.-]+", "-", Path(explanation.subject.name).with_suffix("").as_posix()).strip("-.")
            name = f"{number:0{len(str(len(found)))}d}-{stem[-60:] or 'image'}"
            files += save(_figure(trained, explanation, layer), folder, name, ("png",))
    return files


def _figure(trained: TrainedModel, found: CamResult, layer: CamLayer) -> Figure:
    classes, subject = trained.classes, found.subject
    heats = [(found.heat, f"for {short(classes[found.prediction], 28)}")]
    if found.heat_of_label is not None and subject.label is not None:
        heats.append((found.heat_of_label, f"for {short(classes[subject.label], 28)} (label)"))
    figure = Figure(figsize=(0.4 + 2.8 * (1 + len(heats)), 3.5), layout="constrained")
    axes = figure.subplots(1, 1 + len(heats))
    names = [classes[k] for k in subject.labels or ([] if subject.label is None else [subject.label])]
    label = f"label{'s' if len(names) > 1 else ''}: {short(', '.join(names), 28)}\n" if names else ""
    thresholds = trained.task.decision_thresholds
    is_missed = thresholds is not None and found.probability < thresholds[found.prediction]
    prediction = f"{'not predicted' if is_missed else 'prediction'}: {short(classes[found.prediction], 28)}"
    prediction += f", {found.probability:.3f}"
    titles = [label + prediction, *(title for _, title in heats)]
    image = _pixels(trained, subject.input)[subject.area]
    for panel, title in zip(axes, titles, strict=True):
        panel.imshow(image, cmap="gray", vmin=0, vmax=1)
        panel.set_title(title, fontsize=9, parse_math=False)
        panel.set_axis_off()
    for panel, (heat, _) in zip(axes[1:], heats, strict=True):
        shown = panel.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6)
    figure.colorbar(shown, ax=axes[-1], shrink=0.75, label="evidence, share of maximum")
    figure.supxlabel(f"{short(subject.name, 70)}; Grad-CAM at {layer.name}", fontsize=7, parse_math=False)
    return figure


def _pixels(trained: TrainedModel, inputs: Tensor) -> np.ndarray:
    """Undo the normalization: values 0..1, [H, W, 3] of the first three channels, or [H, W] of the first one."""
    mean, std = (
        torch.tensor(values).reshape(-1, 1, 1) for values in (trained.preprocessing.mean, trained.preprocessing.std)
    )
    image: np.ndarray = (inputs * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return image[:, :, :3] if image.shape[2] >= 3 else image[:, :, 0]


def explain_run(
    trained: TrainedModel,
    subjects: Sequence[CamInput],
    layer_name: str | None,
    folder: Path,
    log: Callable[[str], None],
) -> tuple[CamLayer, list[CamResult], list[Path]]:
    """Find the layer, explain the images, and write the figures to ``folder``."""
    layer = find_layer(trained, subjects[0].input, layer_name)
    try:
        found = explain(trained, subjects, layer)
    except (
        RuntimeError,
        AssertionError,
        TypeError,
    ) as error:  # for example an architecture that unpacks the layer's output
        raise UserError(
            f"Grad-CAM does not work at {layer.name} of {trained.table.name} ({first_line(error)}); choose another "
            "layer with --layer"
        ) from error
    return layer, found, draw(trained, found, layer, folder, log)

"""Generate catalog.json. Only the functions of this module import torch; importing the package does not."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable
from tempfile import TemporaryDirectory
from typing import Any

from toolkit.data.torchvision_info import TORCHVISION_SETS
from toolkit.signatures import describe_argument, plain

EXCLUDED_TRANSFORMS = {
    "ClampBoundingBoxes": "is for bounding boxes",
    "ClampKeyPoints": "is for key points",
    "Compose": "is a container: list its transforms in the recipe instead",
    "ConvertBoundingBoxFormat": "is for bounding boxes",
    "ConvertImageDtype": "changes the type, which the toolkit does itself",
    "CutMix": "mixes examples: use augment.cutmix",
    "FiveCrop": "makes several images from one",
    "Lambda": "runs code, which a recipe must not contain",
    "LinearTransformation": "takes a matrix, which a recipe cannot hold",
    "MixUp": "mixes examples: use augment.mixup",
    "Normalize": "is done last by the toolkit: use data.normalize",
    "PILToTensor": "changes the type, which the toolkit does itself",
    "RandomApply": "is a container: use apply_p with the transform",
    "RandomChoice": "is a container: name one transform",
    "RandomIoUCrop": "is for bounding boxes",
    "RandomOrder": "is a container: list its transforms in the recipe instead",
    "SanitizeBoundingBoxes": "is for bounding boxes",
    "SanitizeKeyPoints": "is for key points",
    "SetClampingMode": "is for bounding boxes",
    "TenCrop": "makes several images from one",
    "ToDtype": "changes the type, which the toolkit does itself",
    "ToImage": "changes the type, which the toolkit does itself",
    "ToPILImage": "changes the type, which the toolkit does itself",
    "ToPureTensor": "changes the type, which the toolkit does itself",
    "ToTensor": "changes the type, which the toolkit does itself",
    "Transform": "is the base of the other classes",
    "UniformTemporalSubsample": "is for videos",
}
"""Transforms that a recipe cannot use on single images, each with the reason as text for an error message."""

_DETECTION, _SEGMENTATION = "has boxes, not classes of images", "has classes of pixels, not of images"
_CAPTIONS, _VIDEO = "has captions, not classes", "has videos"
_FLOW, _STEREO = "is for optical flow", "is for stereo matching"
EXCLUDED_DATASETS = {
    "Caltech101": 'is data.dataset = "caltech101" here',
    "Cityscapes": _SEGMENTATION,
    "CocoCaptions": _CAPTIONS,
    "CocoDetection": _DETECTION,
    "DatasetFolder": 'is data.dataset = "imagefolder" here',
    "FakeData": "has random images",
    "Flickr30k": _CAPTIONS,
    "Flickr8k": _CAPTIONS,
    "HMDB51": _VIDEO,
    "ImageFolder": 'is data.dataset = "imagefolder" here',
    "Kinetics": _VIDEO,
    "Kitti": _DETECTION,
    "LFWPairs": "has pairs of faces, not classes",
    "LFWPeople": "has no person in both its training and its test list",
    "LSUN": "is a folder of LMDB databases, which this program does not read",
    "LSUNClass": "is one class of LSUN",
    "MovingMNIST": _VIDEO,
    "PhotoTour": "has pairs of patches, not classes",
    "SBDataset": _SEGMENTATION,
    "SBU": _CAPTIONS,
    "UCF101": _VIDEO,
    "VOCDetection": _DETECTION,
    "VOCSegmentation": _SEGMENTATION,
    "VisionDataset": "is the base of the other classes",
    "WIDERFace": _DETECTION,
    "wrap_dataset_for_transforms_v2": "is a function",
    **dict.fromkeys(("FlyingChairs", "FlyingThings3D", "HD1K", "KittiFlow", "Sintel"), _FLOW),
    **dict.fromkeys(
        (
            *("CREStereo", "CarlaStereo", "ETH3DStereo", "FallingThingsStereo", "InStereo2k", "Kitti2012Stereo"),
            *("Kitti2015Stereo", "Middlebury2014Stereo", "SceneFlowStereo", "SintelStereo"),
        ),
        _STEREO,
    ),
}
"""Data sets of torchvision that a recipe cannot use, each with the reason as text for an error message."""

OWN_DATASET_KEYS = {
    *("root", "download", "train", "transform", "transforms", "target_transform", "loader", "is_valid_file"),
    *("allow_empty", "extensions", "what", "compat"),
}
"""Arguments of torchvision's data sets that other recipe keys set, or that take code."""

OWN_OPTIMIZER_KEYS = {"self", "params", "lr", "weight_decay", "momentum", "nesterov", "maximize", "differentiable"}
"""Arguments that other recipe keys set (lr, nag), or that would break training."""


def generate() -> str:
    """Return the text of catalog.json for the installed versions."""
    import timm
    import torch
    import torchvision

    inputs: dict[str, int] = {}  # input configurations as JSON, and their index
    excluded_optimizers = _excluded_optimizers()
    content = {
        "versions": {module.__name__: _release(module.__version__) for module in (torch, torchvision, timm)},
        "torchvision": {"models": _torchvision_models(inputs)},
        "timm": {"models": _timm_models(inputs)},
        "excluded_models": excluded_models(),
        "inputs": [json.loads(text) for text in inputs],
        "transforms": _transforms(EXCLUDED_TRANSFORMS),
        "excluded_transforms": EXCLUDED_TRANSFORMS,
        "datasets": _datasets(),
        "excluded_datasets": EXCLUDED_DATASETS,
        "optimizers": _optimizers(excluded_optimizers),
        "excluded_optimizers": excluded_optimizers,
    }
    return _layout(content) + "\n"


def _release(version: str) -> str:
    """Strip the local part of a version: 2.11.0+cpu becomes 2.11.0."""
    return str(version).split("+")[0]


def _layout(value: Any, depth: int = 0) -> str:
    """Format JSON with one entry per line down to the third level of nesting, for readable diffs."""
    if depth == 3 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, separators=(",", ":"))
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in value) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}:{_layout(item, depth + 1)}" for key, item in value.items()) + "\n}"


def excluded_models() -> dict[str, str]:
    """Return the timm architectures that a recipe cannot use, and why."""
    import timm

    reason = "encodes images for a language model and has no classifier"
    return dict.fromkeys(sorted(timm.list_models("*_enc")), reason)


def _index(inputs: dict[str, int], row: list[Any]) -> int:
    """Return the index of an input configuration, which is added if it is new."""
    return inputs.setdefault(json.dumps(row), len(inputs))


def _torchvision_models(inputs: dict[str, int]) -> dict[str, dict[str, int]]:
    """Return the weights of each classification model, default first, with the index of their input configuration."""
    from torchvision import models

    found = {}
    for name in sorted(models.list_models(module=models)):
        weights = models.get_model_weights(name)
        ordered = sorted(weights, key=lambda entry: (entry is not weights.DEFAULT, entry.name))
        found[name] = {entry.name: _index(inputs, _preset_row(entry.transforms())) for entry in ordered}
    return found


def _preset_row(preset: Any) -> list[Any]:
    return [
        preset.crop_size[0],
        preset.resize_size[0],
        preset.interpolation.value,
        list(map(float, preset.mean)),
        list(map(float, preset.std)),
    ]


def _timm_models(inputs: dict[str, int]) -> dict[str, dict[str, int]]:
    """Return the tags of each architecture, default first, with the index of their input configuration."""
    import timm
    from timm.models import get_pretrained_cfg

    excluded = excluded_models()
    found: dict[str, dict[str, int]] = {name: {} for name in sorted(timm.list_models()) if name not in excluded}
    for full_name in timm.list_pretrained():
        name, _, tag = full_name.partition(".")
        if name in excluded:
            continue
        default = get_pretrained_cfg(name)
        row = _index(inputs, _timm_row(get_pretrained_cfg(full_name)))
        if default is not None and default.tag == tag:
            found[name] = {tag: row, **found[name]}
        else:
            found[name][tag] = row
    return found


def _timm_row(config: Any) -> list[Any]:
    height, size = config.input_size[-2:]
    resize = math.floor(size / (config.crop_pct or 0.875))
    row = [size, resize, config.interpolation, list(map(float, config.mean)), list(map(float, config.std))]
    is_usual = config.crop_mode == "center" and height == size
    return row if is_usual else [*row, config.crop_mode, height if height != size else None]


def _transforms(excluded: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the arguments of each transform of single images."""
    from torchvision.transforms import v2

    classes = {name: value for name, value in vars(v2).items() if inspect.isclass(value)}
    return {
        name: {parameter.name: describe_argument(parameter) for parameter in _parameters(cls)}
        for name, cls in sorted(classes.items())
        if issubclass(cls, v2.Transform) and name not in excluded
    }


def _parameters(cls: type) -> Iterable[inspect.Parameter]:
    skipped = ("self", "inplace")
    parameters = inspect.signature(cls.__init__, eval_str=True).parameters.values()  # type: ignore[misc]
    return [p for p in parameters if p.name not in skipped and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _datasets() -> dict[str, dict[str, Any]]:
    """Return the arguments of each classification data set of torchvision, its base classes' included."""
    from torchvision import datasets

    found = {}
    for name in sorted(set(datasets.__all__) - set(EXCLUDED_DATASETS)):
        cls = getattr(datasets, name)
        own: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__:
            for parameter in _parameters(base) if issubclass(base, datasets.VisionDataset) else ():
                own.setdefault(parameter.name, parameter)
        arguments = {key: _dataset_argument(cls, one) for key, one in own.items() if key not in OWN_DATASET_KEYS}
        selector, lists = TORCHVISION_SETS[name].selector, TORCHVISION_SETS[name].lists
        if name == "CelebA":
            del arguments["target_type"]  # the attributes are labels; identities differ between its lists
        if selector in arguments:
            first, *others = (training for training, _, _ in lists)
            arguments[selector] |= {"default": first, "choices": [first, *others]}
            if not others:
                del arguments[selector]
        found[name] = arguments
    return found


def _dataset_argument(cls: Any, parameter: inspect.Parameter) -> dict[str, Any]:
    """Describe an argument; its choices are those that the class itself names when it refuses another value."""
    argument = describe_argument(parameter)
    if "text" not in argument["kinds"]:
        return argument
    argument["kinds"] = ["text"]  # a list asks for several labels per image
    with TemporaryDirectory() as root:
        try:
            cls(root, **{parameter.name: "?"})
        except ValueError as error:
            listed = re.search(r"Valid values are \{(.*)\}", str(error))
            choices = re.findall("'([^']*)'", listed[1]) if listed else []
            argument["choices"] = [one for one in choices if one != "segmentation"]
        except (RuntimeError, OSError):
            pass  # the class opens its files first
    return argument


def _excluded_optimizers() -> dict[str, str]:
    from timm.optim import get_optimizer_info, list_optimizers

    reasons = {}
    for name in list_optimizers():
        if name.startswith("bnb"):
            reasons[name] = "needs the package bitsandbytes and a GPU"
        elif name.startswith("fused"):
            reasons[name] = "needs NVIDIA's apex"
        elif get_optimizer_info(name).second_order:
            reasons[name] = "needs second derivatives, which the training loop does not compute"
    return reasons


def _optimizers(excluded: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return all optimizers: sgd, nag, adam and adamw from PyTorch, the others from timm."""
    import torch
    from timm.optim import get_optimizer_info, list_optimizers

    own = {
        "sgd": (torch.optim.SGD, "Stochastic gradient descent with classical momentum."),
        "nag": (torch.optim.SGD, "Stochastic gradient descent with Nesterov's accelerated gradient."),
        "adam": (torch.optim.Adam, "Adam (Kingma & Ba 2015); weight decay is an L2 penalty."),
        "adamw": (torch.optim.AdamW, "AdamW (Loshchilov & Hutter 2019); weight decay is decoupled."),
    }
    found = {name: _optimizer(cls, text) for name, (cls, text) in own.items()}
    for name in sorted(set(list_optimizers()) - set(excluded) - set(own)):
        info = get_optimizer_info(name)
        found[name] = _optimizer(info.opt_class, info.description)
    return found


def _optimizer(cls: Any, description: str) -> dict[str, Any]:
    if isinstance(cls, type):
        parameters = {parameter.name: parameter for parameter in _parameters(cls)}
    else:  # timm binds some options with functools.partial
        parameters = dict(inspect.signature(cls).parameters)
    args = {
        name: _json_default(parameter.default)
        for name, parameter in parameters.items()
        if name not in OWN_OPTIMIZER_KEYS and parameter.kind is not parameter.VAR_KEYWORD
    }
    return {"momentum": "momentum" in parameters, "description": description, "args": args}


def _json_default(value: Any) -> Any:
    """Return the default as a TOML value; None (null) for None and for values that TOML cannot represent."""
    default = plain(value)
    return default if isinstance(default, bool | int | float | str | list) else None

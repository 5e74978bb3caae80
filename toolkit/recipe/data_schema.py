"""Schema of [data] and [augment]: which images are read, and how they are split, preprocessed and augmented."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from toolkit.data.dataset_info import DATASETS
from toolkit.recipe.base import IMAGES, PIXELS, ConfigModel, Fraction, FractionBelowOne, Seed

if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]

ColumnName = Annotated[str, Field(min_length=1)]

PREDICTION_NAMES = ("path", "label", "labels", "prediction", "predictions", "row", "seed", "fold")
"""Columns of predictions.csv and of the out-of-fold predictions of a study, besides probabilities."""

MAX_CHANNELS = 32
"""Maximum number of input channels."""

ImageSize = Annotated[int, Field(ge=4, le=4096)]
"""Height or width of images, in pixels."""

Root = Annotated[str, Field(min_length=1)]
"""Path of a folder, or of a zip or tar file."""

HeightWidth = Annotated[list[ImageSize], Field(min_length=2, max_length=2)]
"""[height, width] of images, in pixels."""


class SplitConfig(ConfigModel):
    """How images are split into training, validation and test sets. Depends on the recipe alone."""

    method: Literal["auto", "official", "stratified", "random", "alternate"] = Field(
        "auto",
        description="How the validation images are chosen. official: the data set's own validation list. stratified: "
        "the same fraction of every class (multi-label: iterative stratification). random: uniformly at random. "
        "alternate: odd list positions are used for validation, even ones for training. auto: official if the data "
        "set has one, else stratified.",
    )
    validation: FractionBelowOne | Annotated[int, Field(ge=0)] = Field(
        0.1,
        description="Fraction (0..1) or number of training images held out for validation. 0: no validation split, "
        'regardless of the method; requires train.best_metric = "last".',
    )
    test: FractionBelowOne | Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Fraction (0..1) or number of images held out for testing, if the data set has no official test "
        "list. 0: no test split; an official test list is not used either. auto: 0.2, but no test split if the data "
        "set has a validation list and no test list.",
    )
    train_images_per_class: int | None = Field(
        None,
        ge=1,
        description="Draw this many images of each class at random for training and validation together; all others "
        "are the test split, including those of an official test list. The usual protocol for Caltech-101 draws 30 "
        "(Kornblith et al. 2019, arXiv:1805.08974). Cannot be combined with test or folds.",
        json_schema_extra=IMAGES,
    )
    folds: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="Number of folds for cross-validation: the training images are divided into this many parts of "
        "equal size. With test = auto and no official test list, the fold is the test split, and validation images are "
        "drawn from the other folds; otherwise the fold is the validation split.",
    )
    fold: int = Field(0, ge=0, description="Fold of this run, from 0 to folds - 1.")
    seed: Seed | Literal["recipe.seed"] = Field(
        0,
        description="Seed of the split, independent of recipe.seed so that runs with different seeds share one "
        'split. "recipe.seed": use recipe.seed, so that each seed has its own split.',
    )


NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation of the three color channels, for the names that data.normalize allows."""


class NormalizeValues(ConfigModel):
    """Explicit normalization constants."""

    mean: list[Annotated[float, Field(ge=-10, le=10)]] = Field(
        min_length=1, max_length=MAX_CHANNELS, description="Mean of each channel, for pixel values in 0..1."
    )
    std: list[Annotated[float, Field(ge=1e-4, le=1e4)]] = Field(
        min_length=1,
        max_length=MAX_CHANNELS,
        description="Standard deviation of each channel, for pixel values in 0..1.",
    )


class ColumnsConfig(ConfigModel):
    """Names of the columns of a table."""

    image: ColumnName | None = Field(
        None,
        description="Paths of the image files, relative to data.root; or, in a Parquet file, the images themselves, as "
        "bytes or {bytes, path}. Default: whichever of image, path, file, filename and file_name exists.",
    )
    label: ColumnName | Annotated[list[ColumnName], Field(min_length=2)] = Field(
        "label",
        description="Class of each image, as a name or a number. Multi-label: lists of names or numbers, text with "
        "data.label_separator, or several columns, listed here, that contain 1 for their label and 0 otherwise.",
    )
    split: ColumnName | None = Field(
        None,
        description="Split of each image: train, validation, test, or another usual name such as val. Default: the "
        "splits are drawn at random.",
    )
    group: ColumnName | None = Field(
        None, description="Group of each image, such as a patient: random splits never divide a group."
    )
    weight: ColumnName | None = Field(None, description="Weight of each image in the training loss, at least 0.")
    keep: list[ColumnName] = Field(
        [],
        description="Other columns, such as the hospital or the camera, that are copied to predictions.csv; the report "
        "shows the metrics for each of their values.",
    )

    @field_validator("keep")
    @classmethod
    def _names_are_not_those_of_predictions(cls, names: list[str]) -> list[str]:
        for name in names:
            if name in PREDICTION_NAMES or name.startswith("probability"):
                raise ValueError(f"predictions.csv has its own column {name!r}: rename the one in the table")
            if names.count(name) > 1:
                raise ValueError(f"the column {name!r} is listed twice")
        return names


class DataConfig(ConfigModel):
    """Data set, split, preprocessing and caching."""

    dataset: DatasetName = Field(description="Name of the data set; `toolkit datasets` describes each.")
    name: str | None = Field(
        None,
        min_length=1,
        description="torchvision: class in torchvision.datasets, such as OxfordIIITPet. huggingface: a folder that the "
        "library `datasets` reads (images with metadata.csv, Parquet, Arrow, saved by save_to_disk), or the name of a "
        "data set on the Hub, such as ylecun/mnist. plugin: name of your own data set (docs/plugins.md).",
    )
    args: dict[str, Any] = Field(
        {},
        description='torchvision: arguments of the class, such as { annotation_level = "family" } of FGVCAircraft; '
        "split (INaturalist: version) selects one of several training lists. `toolkit datasets torchvision/` lists "
        "them. huggingface: arguments of load_dataset: name (the configuration), revision, data_dir, data_files, "
        "split. plugin: arguments of the data set.",
    )
    root: Root | Annotated[list[Root], Field(min_length=1)] = Field(
        "data",
        description="Data folder; `digits` does not need one. imagefolder: also a zip file, an uncompressed tar file, "
        "or a list of folders and archives whose images are combined. table: image paths are relative to it; default: "
        "the table's own folder. shards: a folder of tar or Parquet files, or a URL (s3://, gs://, hf://, https://, "
        "...).",
    )
    table: str | None = Field(
        None,
        min_length=1,
        description="table: file with one row per image (.csv, .tsv, .jsonl or .parquet); its columns are selected in "
        "[data.columns].",
    )
    columns: ColumnsConfig = Field(
        ColumnsConfig(),
        description="table, Parquet shards: the columns to read. Tar shards without an index: the keys of their JSON "
        "files to read.",
    )
    class_names: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=2)] | None = Field(
        None,
        description="table, shards without an index: class names in the order of their indices, as a list or a text "
        "file with one name per line; labels are names or indices, from 0. Default: the names in the metadata of a "
        "Parquet file that the library `datasets` wrote, else the labels in the data, sorted.",
    )
    label_separator: str | None = Field(
        None,
        min_length=1,
        max_length=10,
        description='table, shards without an index: separator between the labels of an image, such as ; in "cat;dog"; '
        "makes the data set multi-label.",
    )
    shuffle_shards: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="shards: number of shards that each batch is drawn from, approximately, so that shards can be "
        "downloaded one after the other; 10 is usual. Default: all shards, which must then all fit in the cache folder "
        "or be in data.root.",
        json_schema_extra={"unit": "shards"},
    )
    cache_limit: float | None = Field(
        None,
        gt=0,
        description="shards at a URL, Parquet shards: maximum size of this data set's shards in the cache folder. "
        "Default: half of the free disk space.",
        json_schema_extra={"unit": "GiB"},
    )
    download: bool = Field(True, description="Download the data if it is missing and a download is available.")
    split: SplitConfig = Field(
        SplitConfig(), description="How images are split into training, validation and test sets."
    )
    images_per_class: int | None = Field(
        None,
        ge=1,
        description="Use only the first N training and validation images of each class.",
        json_schema_extra=IMAGES,
    )
    test_images_per_class: int | None = Field(
        None, ge=1, description="Use only the first N test images of each class.", json_schema_extra=IMAGES
    )
    class_folders: Literal["auto", "top", "leaf"] = Field(
        "auto",
        description="imagefolder: which folders are classes. top: the direct subfolders of data.root or of a split's "
        "folder, each with all images below it. leaf: every folder that directly contains images, named by its "
        'path, such as "a/abbey". auto: top, but a class folder whose images are all in subfolders is an error.',
    )
    background_class: bool = Field(False, description="caltech101: keep BACKGROUND_Google as a class.")
    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] | None = Field(
        None,
        description="Number of input channels of the model. Grayscale images are repeated to fill 3 channels, color "
        "images are converted to grayscale for 1; any other number must be that of the images (TIFF, .npy; 4: RGBA). "
        "Default: 3 with pretrained weights, else that of the data set "
        f"(1 for {', '.join(name for name, info in DATASETS.items() if info.channels == 1)}, 3 for the others).",
    )
    image_size: ImageSize | HeightWidth | None = Field(
        None,
        description="Size of the model's input: one number for a square, or [height, width]. Default: the size that "
        "the pretrained weights expect, else the data set's native size.",
        json_schema_extra=PIXELS,
    )
    eval_image_size: ImageSize | HeightWidth | None = Field(
        None,
        description="Input size for validation, test and prediction. Networks are often more accurate at a larger size "
        "than in training, such as 224 after 176 (Touvron et al. 2019). Default: image_size.",
        json_schema_extra=PIXELS,
    )
    progressive_sizes: Annotated[list[ImageSize | HeightWidth], Field(min_length=2, max_length=100)] | None = Field(
        None,
        description="Input sizes for training, such as [128, 160, 192, 224]: the epochs are divided into as many equal "
        "stages (Tan & Le 2021, EfficientNetV2). The last size must be image_size. Default: image_size in all epochs.",
        json_schema_extra=PIXELS,
    )
    resize: ImageSize | HeightWidth | Literal["none", "letterbox"] | None = Field(
        None,
        description="Size before the crop: length of the shorter side, or [height, width] regardless of aspect "
        "ratio, or none. letterbox: the whole image fits into image_size with its aspect ratio, centered on a "
        "background of data.fill. Default: what the pretrained weights expect (some fix both sides, or fix the longer "
        "side and pad the image), else image_size / 0.875 (small images: image_size), with the aspect ratio kept.",
        json_schema_extra=PIXELS,
    )
    fill: Literal["mean", "black"] | Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=1)] = Field(
        "mean",
        description='Background color with resize = "letterbox". mean: the mean that normalize subtracts, so that the '
        "background is about 0 in the model's input. black: 0. Or one value from 0 to 255 per channel.",
    )
    crop: Literal["center", "none"] = Field(
        "center",
        description="center: crop to image_size after the resize. none: the resize must already produce that size.",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = Field(
        None, description="Interpolation of the resize. Default: what the pretrained weights expect, else bilinear."
    )
    normalize: Literal["auto", "imagenet", "half", "dataset", "none"] | NormalizeValues = Field(
        "auto",
        description="Mean and standard deviation. auto: what the pretrained weights expect, else half. imagenet: "
        "those of ImageNet. half: 0.5 and 0.5. dataset: computed from the training images. Or { mean = [...], std = "
        "[...] }.",
    )
    exif: Literal["apply", "ignore"] = Field(
        "apply",
        description="EXIF orientation tag of image files. apply: rotate images upright, as viewers do. ignore: keep "
        "pixels as stored, as torchvision and timm do.",
    )
    page: Annotated[int, Field(ge=0, le=9999)] | Literal["channels"] = Field(
        0,
        description="Page to read from files with several pages (TIFF, GIF, ...), from 0. channels: the pages of a "
        "TIFF file are the channels of one image.",
    )
    value_range: Annotated[list[float], Field(min_length=2, max_length=2)] | Literal["auto"] = Field(
        "auto",
        description="[BLACK, WHITE]: the values mapped to 0 and 255 in images with more than 8 bits per sample "
        "(16-bit, 32-bit, float). auto: one range for the whole data set, from its largest value: 0 to 255, 1023, "
        "4095, 16383 or 65535; 0 to 1 for float images; an error before training if the values are ambiguous.",
    )
    workers: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = Field(
        "auto", description="Data-loading workers per training process; auto: from the number of available CPUs."
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error",
        description="How to treat an unreadable image file. error: stop and name the file. skip: exclude it from all "
        "splits, and report the number.",
    )
    max_bad_fraction: Fraction = Field(
        0.01, description="With on_bad_image = skip: stop if more than this fraction of the images is unreadable."
    )
    cache: Literal["auto", "off", "disk", "memory", "device"] = Field(
        "auto",
        description="Where to cache results that do not change between epochs (decoded and resized images, features "
        "of frozen layers). They are computed once and stored in the cache folder; images are read from disk, from "
        "memory or from the device, falling back to the next with enough space. auto: if it is worthwhile and fits. "
        "off: no caching.",
    )
    fixed_views: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Number of fixed augmented views per training image, used in rotation: epoch e uses view e mod "
        "fixed_views. Allows caching features of frozen layers despite augmentation. Default: a new random view "
        "every epoch.",
    )

    @model_validator(mode="before")
    @classmethod
    def _images_are_next_to_the_table(cls, values: Any) -> Any:
        """Set the default of ``root`` to the folder of the table."""
        if not isinstance(values, dict) or values.get("dataset") != "table" or "root" in values:
            return values
        table = values.get("table")
        return {**values, "root": os.path.dirname(table) or "."} if isinstance(table, str) else values

    @model_validator(mode="after")
    def _mean_and_std_have_equal_length(self) -> DataConfig:
        if isinstance(self.normalize, NormalizeValues) and len(self.normalize.mean) != len(self.normalize.std):
            raise ValueError("normalize: mean and std must have the same number of values")
        return self

    @model_validator(mode="after")
    def _black_below_white(self) -> DataConfig:
        if self.value_range != "auto" and not self.value_range[0] < self.value_range[1]:
            raise ValueError("value_range: the first value, of black, must be smaller than the second, of white")
        return self

    @property
    def roots(self) -> list[str]:
        """All roots, as a list."""
        return [self.root] if isinstance(self.root, str) else self.root

    @property
    def root_folder(self) -> str:
        """The root of a data set that can have only one."""
        return self.roots[0]

    @property
    def known_range(self) -> tuple[float, float] | None:
        """``value_range`` as (black, white); None if it has to be determined from the data."""
        return None if self.value_range == "auto" else (self.value_range[0], self.value_range[1])


class TransformConfig(BaseModel):
    """One augmentation: a class in torchvision.transforms.v2 or a plugin, with its arguments as further keys."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    name: str = Field(
        description="Class in torchvision.transforms.v2; `toolkit transforms` lists them. plugin:NAME: code of your "
        "own (docs/plugins.md)."
    )
    apply_p: Fraction = Field(1.0, description="Probability of applying it to an image.")
    stage: Literal["before_resize", "before_crop", "crop", "resize_crop", "after_crop", "tensor"] | None = Field(
        None,
        description="Position in the preprocessing pipeline: before_resize, before_crop (after the resize), crop "
        "(replaces the crop), resize_crop (replaces both), after_crop, tensor (after scaling to 0..1, before "
        "normalization). Default: after_crop; tensor for transforms that need a tensor.",
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the transform class."""
        return dict(self.model_extra or {})


class AugmentConfig(ConfigModel):
    """Random transforms for each split, mixup, CutMix and label smoothing."""

    train: list[TransformConfig] = Field([], description="Applied to training images, in this order.")
    validation: list[TransformConfig] = Field([], description="Applied to validation images.")
    test: list[TransformConfig] = Field([], description="Applied to test images.")
    auto_augment: str | None = Field(
        None,
        description="timm policy string such as rand-m9-mstd0.5, augmix-m3-w3 or original, applied after the crop.",
    )
    random_erasing: Fraction = Field(
        0.0, description="Probability of erasing a rectangle of a training image (after normalization)."
    )
    alternating_flip: bool = Field(
        False,
        description="Flip each training image horizontally in every second epoch; whether in the odd or the even "
        "epochs is random. In two epochs the model sees both versions of each image (Jordan 2024, "
        "arXiv:2404.00498). Applied after the crop, before the other transforms.",
    )
    repeats: int = Field(
        1,
        ge=1,
        le=100,
        description="Repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335): each batch contains this many "
        "augmented versions of each of its images, as with torchvision's RASampler. An epoch has as many steps as "
        "without it, and therefore uses 1 / repeats of the images.",
    )
    run_on: Literal["auto", "workers", "device"] = Field(
        "auto",
        description="Where transforms run. device: on whole batches, on the training device. workers: image by "
        "image, in the data-loading workers. auto: device if every transform of the split supports it (the log names "
        "those that do not); else workers up to the crop and device after it, or workers throughout if the "
        "transforms after the crop do not support batches. Workers and device draw different random numbers.",
    )
    mixup: float = Field(
        0.0, ge=0, le=1000, description="Mixup: alpha of Beta(alpha, alpha); 0 disables (Zhang et al. 2018)."
    )
    cutmix: float = Field(
        0.0, ge=0, le=1000, description="CutMix: alpha of Beta(alpha, alpha); 0 disables (Yun et al. 2019)."
    )
    mixup_prob: Fraction = Field(1.0, description="Probability of applying mixup or CutMix to a batch.")
    mixup_switch_prob: Fraction = Field(
        0.5, description="If both are enabled: fraction of mixed batches that use CutMix."
    )
    label_smoothing: FractionBelowOne = Field(
        0.0,
        description="Probability mass distributed uniformly over all classes in the training loss. multi_label: the "
        "targets 0 and 1 of each label become label_smoothing / 2 and 1 - label_smoothing / 2.",
    )

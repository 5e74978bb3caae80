"""Checks across keys: each one reports its invalid case, and nothing for a similar valid case."""

from __future__ import annotations

import pytest

from toolkit.recipe import RecipeError, loads_recipe
from toolkit.recipe.cross_checks import RULES, check
from toolkit.recipe.input_checks import channels_of
from toolkit.recipe.schema import NORMALIZATIONS, Recipe

BASE = """\
[recipe]
name = "example"
[data]
dataset = "caltech101"
[model]
source = "torchvision"
name = "resnet18"
weights = "IMAGENET1K_V1"
[transfer]
mode = "finetune"
[optimizer]
lr = 0.01
[train]
epochs = 30
batch_size = 64
"""
PLAIN = ['model.weights="none"', 'transfer.mode="scratch"']
FOLDER = ['data.dataset="imagefolder"', "data.image_size=16"]
MIXED = ["augment.mixup=0.2", "early_stopping.patience=3"]
CONVNET = [*PLAIN, 'model.source="toolkit"', 'model.name="convnet"', "model.convnet={blocks=[{channels=4}]}"]


def issues(*overrides: str) -> list[str]:
    """Return severity and message of all issues of BASE with these overrides."""
    try:
        recipe = loads_recipe(BASE, overrides)
    except RecipeError as error:
        return [f"{item.severity}: {item.message}" for item in error.diagnostics]
    return [f"{item.severity}: {item.message}" for item in check(recipe)]


LOGISTIC = ['transfer.mode="logistic"', "train.epochs=1", "augment={}", "scheduler={}"]
KNN = ['transfer.mode="knn"', *LOGISTIC[1:]]

CASES: list[tuple[str, list[str], list[str]]] = [
    # the issue, overrides that cause it, similar overrides that do not cause it
    (
        'error: train.epochs: with transfer.mode = "logistic", the layer is fitted once: set epochs = 1',
        [*LOGISTIC, "train.epochs=2"],
        LOGISTIC,
    ),
    (
        'error: augment.train: with transfer.mode = "logistic", training images must not be augmented randomly',
        [*LOGISTIC, 'augment.train=[{name="RandomRotation", degrees=3}]'],
        LOGISTIC,
    ),
    (
        'error: augment.mixup: with transfer.mode = "logistic", features of mixed images',
        [*LOGISTIC, "augment.mixup=0.2"],
        LOGISTIC,
    ),
    (
        'error: data.cache: with transfer.mode = "logistic", features are computed once',
        [*LOGISTIC, 'data.cache="off"'],
        LOGISTIC,
    ),
    (
        'error: train.loss: with transfer.mode = "logistic", the loss is "cross_entropy"',
        [*LOGISTIC, 'train.loss="focal"'],
        LOGISTIC,
    ),
    (
        "error: transfer.C: choosing among several values needs validation images",
        [*LOGISTIC, "data.split.validation=0", 'train.best_metric="last"'],
        [*LOGISTIC, "data.split.validation=0", 'train.best_metric="last"', "transfer.C=[1.0]"],
    ),
    (
        'error: transfer.C: only mode "logistic" uses it, not "finetune"',
        ["transfer.C=[1.0]"],
        [],
    ),
    (
        'error: transfer.k: only mode "knn" uses it, not "logistic"',
        [*LOGISTIC, "transfer.k=[5]"],
        [*KNN, "transfer.k=[5]"],
    ),
    (
        "error: transfer.k: choosing among several values needs validation images",
        [*KNN, "data.split.validation=0", 'train.best_metric="last"'],
        [*KNN, "data.split.validation=0", 'train.best_metric="last"', "transfer.k=[5]"],
    ),
    (
        'error: transfer.refit: only mode "logistic" and "knn" use it, not "finetune"',
        ["transfer.refit=true"],
        [*LOGISTIC, "transfer.refit=true"],
    ),
    (
        "warning: transfer.refit: has no effect without validation images",
        [*LOGISTIC, "data.split.validation=0", 'train.best_metric="last"', "transfer.C=[1.0]", "transfer.refit=true"],
        [*LOGISTIC, "transfer.refit=true"],
    ),
    (
        'error: transfer.l2_sp: with mode "lora", optimizer.weight_decay already pulls',
        ['transfer.mode="lora"', "transfer.l2_sp=0.1"],
        ["transfer.l2_sp=0.1"],
    ),
    (
        'error: transfer.lora_rank: only mode "lora" uses it, not "finetune"',
        ["transfer.lora_rank=4"],
        ['transfer.mode="lora"', "transfer.lora_rank=4", 'transfer.lora_targets=["layer4.*"]'],
    ),
    ("error: model.name: torchvision has no model", ['model.name="resnet19"'], ['model.name="resnet34"']),
    ("error: model.name: torchvision has no model", ['model.name="hf-hub:evil/model"'], []),
    ("error: model.name: source", [*CONVNET, 'model.name="x"'], CONVNET),
    ("error: model.weights: resnet18 has no weights", ['model.weights="IMAGENET1K_V2"'], ['model.weights="DEFAULT"']),
    (
        "error: model.weights: resnet10t has no weights",
        ['model.source="timm"', 'model.name="resnet10t"', 'model.weights="a1_in1k"'],
        ['model.source="timm"', 'model.name="resnet10t"', 'model.weights="c3_in1k"'],
    ),
    (
        "error: model.weights: vit_base_patch16_xp_224 has no pretrained",
        ['model.source="timm"', 'model.name="vit_base_patch16_xp_224"', 'model.weights="x"'],
        ['model.source="timm"', 'model.name="vit_base_patch16_xp_224"', *PLAIN],
    ),
    (
        "error: model.name: qwen3_vit_88m_enc encodes images for a language model and has no classifier",
        ['model.source="timm"', 'model.name="qwen3_vit_88m_enc"', "data.image_size=224", *PLAIN],
        ['model.source="timm"', 'model.name="qwen3_vit_88m"', "data.image_size=224", *PLAIN],
    ),
    (
        "error: model.weights_key: has no effect with weights",
        ['model.weights_key="state_dict_ema"'],
        ['model.weights_key="state_dict_ema"', 'model.weights="file:w.pth"'],
    ),
    (
        "error: model.args: kwargs_filter cannot be given here",
        ["model.args={kwargs_filter=['in_chans']}"],
        ["model.args={drop_path_rate=0.1}"],
    ),
    (
        "error: data.image_size: torchvision's vit_b_16 accepts only square images, not 32 x 64 pixels",
        ['model.name="vit_b_16"', "data.image_size=[32, 64]"],
        ['model.name="vit_b_16"', "data.image_size=64"],
    ),
    (
        'error: data.resize: "letterbox" pads images to image_size instead of cropping them',
        ['data.resize="letterbox"', 'data.crop="none"'],
        ['data.resize="letterbox"'],
    ),
    (
        "error: data.progressive_sizes: the last size is 48 x 48, but it must be data.image_size, which is 64 x 64",
        ['model.name="resnet18"', "data.image_size=64", "data.progressive_sizes=[32, 48]"],
        ['model.name="resnet18"', "data.image_size=64", "data.progressive_sizes=[32, 64]"],
    ),
    (
        "error: data.progressive_sizes: 3 sizes need at least 3 epochs",
        ['model.name="resnet18"', "data.image_size=64", "data.progressive_sizes=[32, 48, 64]", "train.epochs=2"],
        ['model.name="resnet18"', "data.image_size=64", "data.progressive_sizes=[32, 48, 64]"],
    ),
    (
        "error: data.eval_image_size: the ConvNet accepts only inputs of 8 x 8 pixels",
        [*CONVNET, "data.image_size=8", "data.eval_image_size=16"],
        [*CONVNET, "data.image_size=8", "data.eval_image_size=8"],
    ),
    (
        'error: data.channels: the images of "cifar10" have 3 channels, not 5',
        ['data.dataset="cifar10"', "data.channels=5"],
        ['data.dataset="cifar10"', "data.channels=1"],
    ),
    (
        "error: augment.train[0]: ColorJitter needs images with 1 or 3 channels, not 5",
        [*FOLDER, "data.channels=5", 'augment.train=[{name="ColorJitter", hue=0.1}]'],
        [*FOLDER, "data.channels=5", 'augment.train=[{name="RandomRotation", degrees=3}]'],
    ),
    (
        "error: augment.auto_augment: timm's policies need images with 1 or 3 channels, not 5",
        [*FOLDER, "data.channels=5", 'augment.auto_augment="rand-m9"'],
        [*FOLDER, "data.channels=3", 'augment.auto_augment="rand-m9"'],
    ),
    (
        "warning: data.fill: has no effect without resize",
        ['data.fill="black"'],
        ['data.fill="black"', 'data.resize="letterbox"'],
    ),
    (
        "error: data.fill: 2 values for 3 channels",
        ["data.fill=[0, 0]", 'data.resize="letterbox"', "data.channels=3"],
        ["data.fill=[0, 0, 0]", 'data.resize="letterbox"', "data.channels=3"],
    ),
    (
        'error: augment.run_on: "device" does not support augment.train[0]: ElasticTransform',
        ['augment.run_on="device"', 'augment.train=[{name="ElasticTransform"}]'],
        ['augment.run_on="device"', 'augment.train=[{name="RandomRotation", degrees=3}]'],
    ),
    (
        'error: augment.run_on: "device" does not support augment.auto_augment',
        ['augment.run_on="device"', 'augment.auto_augment="rand-m9"'],
        ['augment.run_on="auto"', 'augment.auto_augment="rand-m9"'],
    ),
    (
        "error: augment.train[1].stage: augment.train[0].stage already replaces the crop",
        ['augment.train=[{name="RandomCrop", stage="crop"}, {name="RandomResizedCrop", stage="resize_crop"}]'],
        ['augment.train=[{name="RandomCrop", stage="crop"}]', 'augment.test=[{name="CenterCrop", stage="crop"}]'],
    ),
    (
        'error: augment.train[0].stage: "before_crop" is not possible if',
        ['augment.train=[{name="RGB", stage="before_crop"}, {name="RandomResizedCrop", stage="resize_crop"}]'],
        ['augment.train=[{name="RGB", stage="before_crop"}, {name="RandomCrop", stage="crop"}]'],
    ),
    (
        "error: augment.train[0].stage: GaussianNoise needs a tensor",
        ['augment.train=[{name="GaussianNoise", stage="after_crop"}]'],
        ['augment.train=[{name="GaussianNoise"}]'],
    ),
    ("warning: model.convnet has no effect", [*PLAIN, "model.convnet={blocks=[{channels=4}]}"], CONVNET),
    ("error: model.weights: source", [*CONVNET, 'model.weights="DEFAULT"'], [*CONVNET, 'model.weights="file:a.pt"']),
    (
        "error: model.weights: expected a file",
        ['model.weights="file:a.pkl"'],
        ['model.weights="file:../a.safetensors"'],
    ),
    ("error: model.weights: expected package", ['model.weights="package:a.pth"'], ['model.weights="package:a/b.pth"']),
    ("error: model.weights: expected package", ['model.weights="package:/etc/b.pth"'], []),
    ("error: model.weights: expected package", ['model.weights="package:a/../../b.pth"'], []),
    ("error: model.args: pretrained", ["model.args.pretrained=true"], ["model.args.drop_path_rate=0.1"]),
    ("warning: model.args: has no effect", [*CONVNET, "model.args.x=1"], ["model.args.x=1"]),
    ("error: optimizer.name: unknown", ['optimizer.name="sdg"'], ['optimizer.name="lamb"']),
    ("error: optimizer.name: bnbadam needs", ['optimizer.name="bnbadam"'], ['optimizer.name="adam"']),
    ("error: optimizer.name: adahessian needs", ['optimizer.name="adahessian"'], []),
    (
        "error: optimizer.momentum",
        ['optimizer.name="adamw"', "optimizer.momentum=0.9"],
        ['optimizer.name="rmsprop"', "optimizer.momentum=0.9"],
    ),
    (
        "error: optimizer.args: adam takes no argument",
        ['optimizer.name="adam"', "optimizer.args.dampening=0.1"],
        ['optimizer.name="adam"', "optimizer.args.amsgrad=true"],
    ),
    ("error: optimizer.args: nesterov cannot", ["optimizer.args.nesterov=true"], ['optimizer.name="nag"']),
    (
        "error: optimizer.args.betas: expected a list of 2",
        ['optimizer.name="adam"', "optimizer.args.betas=[0.9]"],
        ['optimizer.name="adam"', "optimizer.args.betas=[0.9, 1]"],
    ),
    (
        "error: augment.test[0].name: unknown",
        ['augment.test=[{name="Crop"}]'],
        ['augment.test=[{name="CenterCrop", size=8}]'],
    ),
    (
        "error: augment.train[0]: RandomRotation needs degrees",
        ['augment.train=[{name="RandomRotation"}, {name="RandomCrop"}]'],
        ['augment.train=[{name="RandomRotation", degrees=[3, 4]}, {name="RandomCrop"}]'],
    ),
    (
        "error: augment.train[0].bits: expected a whole",
        ['augment.train=[{name="RandomPosterize", bits=4.5}]'],
        ['augment.train=[{name="RandomPosterize", bits=4}]'],
    ),
    (
        "error: augment.train[0].degrees: expected",
        ['augment.train=[{name="RandomRotation", degrees=true}]'],
        ['augment.train=[{name="RandomRotation", degrees=30}]'],
    ),
    (
        "error: augment.train[0].policy: expected",
        ['augment.train=[{name="AutoAugment", policy="cifar"}]'],
        ['augment.train=[{name="AutoAugment", policy="cifar10"}]'],
    ),
    (
        "error: augment.auto_augment: unknown policy",
        ['augment.auto_augment="ran-m9"'],
        ['augment.auto_augment="rand-m9-n3-mstd0.5-inc1"'],
    ),
    (
        "error: augment.auto_augment: augmix",
        ['augment.auto_augment="augmix-m3.5"'],
        ['augment.auto_augment="augmix-m3-w4-d2"'],
    ),
    (
        "error: [expected_metrics]: a run has no metric",
        ['expected_metrics.accuracy={value=0.9,source="x"}'],
        ['expected_metrics.last_test_balanced_accuracy={value=0.9,source="x"}'],
    ),
    (
        "error: expected_metrics.test_accuracy.at_least",
        ['expected_metrics.test_accuracy={at_least=95,source="x"}'],
        ['expected_metrics.seconds={at_most=95,source="x"}'],
    ),
    ('error: transfer.mode: "scratch" contradicts', ['transfer.mode="scratch"'], PLAIN),
    ('warning: transfer.mode: "finetune" without', ['model.weights="none"'], []),
    *(
        (
            f'error: transfer.mode: "{mode}" needs',
            ['model.weights="none"', f'transfer.mode="{mode}"'],
            [f'transfer.mode="{mode}"'],
        )
        for mode in ("linear_probe", "feature_extractor", "backbone_only")
    ),
    ('error: transfer.mode: "gradual" needs pretrained', ['model.weights="none"', 'transfer.mode="gradual"'], []),
    (
        'warning: transfer.layer_decay_by: "block" has no effect',
        ['transfer.layer_decay_by="block"'],
        ['transfer.layer_decay_by="block"', "transfer.layer_decay=0.75"],
    ),
    (
        'error: transfer.mode: "gradual" needs unfreeze_at',
        ['transfer.mode="gradual"'],
        ['transfer.mode="gradual"', "transfer.unfreeze_at=[1]"],
    ),
    (
        "error: transfer.unfreeze_at: only",
        ["transfer.unfreeze_at=[3]"],
        ['transfer.mode="gradual"', "transfer.unfreeze_at=[3]"],
    ),
    (
        "error: transfer.unfreeze_at: the epochs must be increasing",
        ['transfer.mode="gradual"', "transfer.unfreeze_at=[3, 3]"],
        ['transfer.mode="gradual"', "transfer.unfreeze_at=[3, 4]"],
    ),
    (
        "error: transfer.unfreeze_at: epoch 31",
        ['transfer.mode="gradual"', "transfer.unfreeze_at=[31]"],
        ['transfer.mode="gradual"', "transfer.unfreeze_at=[30]"],
    ),
    (
        'error: transfer.mode: "lp_ft" needs probe_epochs',
        ['transfer.mode="lp_ft"'],
        ['transfer.mode="lp_ft"', "transfer.probe_epochs=5"],
    ),
    (
        "error: transfer.probe_epochs: a probe of 30 epochs leaves none",
        ['transfer.mode="lp_ft"', "transfer.probe_epochs=30"],
        ['transfer.mode="lp_ft"', "transfer.probe_epochs=29"],
    ),
    *(
        (
            f'error: transfer.{key}: only mode "lp_ft" uses it',
            [f"transfer.{key}={value}"],
            [f"transfer.{key}={value}", 'transfer.mode="lp_ft"', "transfer.probe_epochs=3"],
        )
        for key, value in (("probe_lr", "0.1"), ("probe_augment", "true"))
    ),
    (
        'error: transfer.wise: only mode "lp_ft" uses it',
        ["transfer.wise=[0.5]"],
        ["transfer.wise=[0.5]", 'transfer.mode="lp_ft"', "transfer.probe_epochs=3"],
    ),
    (
        "error: transfer.wise: choosing among several values needs a validation metric",
        ["transfer.wise=[0.5,1]", 'transfer.mode="lp_ft"', "transfer.probe_epochs=3", 'train.best_metric="last"'],
        ["transfer.wise=[0.5]", 'transfer.mode="lp_ft"', "transfer.probe_epochs=3", 'train.best_metric="last"'],
    ),
    (
        'error: train.grad_accum_steps: "auto" is not possible',
        ['transfer.mode="lp_ft"', "transfer.probe_epochs=5", 'train.grad_accum_steps="auto"'],
        ['transfer.mode="lp_ft"', "transfer.probe_epochs=5", "train.grad_accum_steps=2"],
    ),
    (
        "error: data.progressive_sizes: is not possible",
        ['transfer.mode="lp_ft"', "transfer.probe_epochs=5", "data.image_size=64", "data.progressive_sizes=[32,64]"],
        ["data.image_size=64", "data.progressive_sizes=[32,64]"],
    ),
    (
        "error: scheduler.warmup_epochs: a warm-up of 5 epochs is not shorter than the run of 5",
        ['transfer.mode="lp_ft"', "transfer.probe_epochs=25", "scheduler.warmup_epochs=5"],
        ['transfer.mode="lp_ft"', "transfer.probe_epochs=24", "scheduler.warmup_epochs=5"],
    ),
    (
        "error: transfer.l2_sp: needs pretrained weights",
        ["transfer.l2_sp=0.1", *PLAIN],
        ["transfer.l2_sp=0.1"],
    ),
    (
        'error: transfer.l2_sp: has no effect with mode "linear_probe"',
        ["transfer.l2_sp=0.1", 'transfer.mode="linear_probe"'],
        ["transfer.l2_sp=0.1", 'transfer.mode="linear_probe"', 'transfer.train=["layer4.*"]'],
    ),
    (
        "error: transfer.new_layer",
        ['transfer.new_layer="freeze"'],
        ['transfer.new_layer="freeze"', 'transfer.mode="backbone_only"'],
    ),
    (
        "error: model.head.scope",
        ['model.head.scope="classifier"'],
        ['model.name="vgg16"', 'model.head.scope="classifier"'],
    ),
    ('error: model.stem: "small" is for', ['model.stem="small"', 'model.name="vgg16"'], ['model.stem="small"']),
    ('warning: model.stem: "small" replaces', ['model.stem="small"'], ['model.stem="small"', *PLAIN]),
    (
        "error: data.normalize: 1 values for 3",
        ["data.normalize={mean=[0.5],std=[0.5]}"],
        ["data.normalize={mean=[0.5],std=[0.5]}", "data.channels=1"],
    ),
    (
        "error: data.normalize: 3 values for 1",
        ['data.dataset="digits"', "data.normalize={mean=[0,0,0],std=[1,1,1]}", *PLAIN],
        ['data.dataset="digits"', "data.normalize={mean=[0,0,0],std=[1,1,1]}"],
    ),
    ("warning: data.normalize: the weights", ['data.normalize="half"'], ['data.normalize="imagenet"']),
    ("warning: data.normalize: the weights", ['data.normalize="dataset"'], ['data.normalize="dataset"', *PLAIN]),
    (
        "warning: data.normalize: the weights",
        ["data.normalize={mean=[0.5,0.5,0.5],std=[0.2,0.2,0.2]}"],
        ["data.normalize={mean=[0.485,0.456,0.406],std=[0.229,0.224,0.225]}"],
    ),
    (
        "warning: data.normalize: the weights augreg_in21k_ft_in1k",
        [
            'model.source="timm"',
            'model.name="vit_small_patch16_224"',
            'model.weights="augreg_in21k_ft_in1k"',
            'data.normalize="imagenet"',
        ],
        [
            'model.source="timm"',
            'model.name="vit_small_patch16_224"',
            'model.weights="augreg_in21k_ft_in1k"',
            'data.normalize="half"',
        ],
    ),
    ("error: scheduler.warmup_epochs", ["scheduler.warmup_epochs=30"], ["scheduler.warmup_epochs=29.5"]),
    (
        "warning: scheduler.step_size: a period",
        ['scheduler.name="step"', "scheduler.step_size=30"],
        ['scheduler.name="step"', "scheduler.step_size=29"],
    ),
    (
        "warning: scheduler.milestones: a milestone at epoch 30",
        ['scheduler.name="multi_step"', "scheduler.milestones=[10, 30]"],
        ['scheduler.name="multi_step"', "scheduler.milestones=[10, 29.5]"],
    ),
    (
        "error: [scheduler]: milestones must be increasing",
        ['scheduler.name="multi_step"', "scheduler.milestones=[20, 10]"],
        ['scheduler.name="multi_step"', "scheduler.milestones=[10, 20]"],
    ),
    (
        "warning: scheduler.T_0: the first cycle ends at epoch 30",
        ['scheduler.name="cosine_restarts"', "scheduler.T_0=28", "scheduler.warmup_epochs=2"],
        ['scheduler.name="cosine_restarts"', "scheduler.T_0=27", "scheduler.warmup_epochs=2"],
    ),
    ("error: [scheduler]: name = 'cosine_restarts' needs T_0", ['scheduler.name="cosine_restarts"'], []),
    ("error: [scheduler]: name = 'multi_step' needs milestones", ['scheduler.name="multi_step"'], []),
    (
        "warning: scheduler.step_size: has no effect",
        ['scheduler.name="cosine"', "scheduler.step_size=3"],
        ['scheduler.name="step"', "scheduler.step_size=3"],
    ),
    (
        "warning: scheduler.pct_start: has no effect",
        ["scheduler.pct_start=0.5"],
        ['scheduler.name="one_cycle"', "scheduler.pct_start=0.5"],
    ),
    (
        "error: scheduler.min_lr",
        ['scheduler.name="cosine"', "scheduler.min_lr=0.02"],
        ['scheduler.name="cosine"', "scheduler.min_lr=0.01"],
    ),
    ("warning: early_stopping.patience", ["early_stopping.patience=30"], ["early_stopping.patience=29"]),
    (
        "warning: early_stopping.min_delta",
        ["early_stopping.min_delta=0.1"],
        ["early_stopping.min_delta=0.1", "early_stopping.patience=3"],
    ),
    (
        "warning: early_stopping.metric: with mixup",
        [*MIXED, 'early_stopping.metric="train/accuracy"'],
        [*MIXED, 'early_stopping.metric="train/loss"'],
    ),
    (
        "warning: early_stopping.metric",
        ['early_stopping.metric="train/accuracy"', *MIXED],
        ['early_stopping.metric="train/accuracy"', "early_stopping.patience=3"],
    ),
    (
        "warning: scheduler.metric: with cutmix",
        ["augment.cutmix=1.0", 'scheduler.name="plateau"', 'scheduler.metric="train/accuracy"'],
        ['scheduler.name="plateau"', 'scheduler.metric="train/accuracy"'],
    ),
    ("warning: augment.mixup_prob", ["augment.mixup_prob=0.5"], ["augment.mixup_prob=0.5", "augment.cutmix=1.0"]),
    (
        "warning: augment.mixup_switch_prob",
        ["augment.mixup_switch_prob=0.3", "augment.mixup=1.0"],
        ["augment.mixup_switch_prob=0.3", "augment.mixup=1.0", "augment.cutmix=1.0"],
    ),
    (
        'error: train.best_metric: "val/accuracy" needs validation images',
        ["data.split.validation=0"],
        ["data.split.validation=0", 'train.best_metric="last"'],
    ),
    (
        'error: train.best_metric: "last" keeps the last epoch, but early stopping ends',
        ['train.best_metric="last"', "early_stopping.patience=3"],
        ['train.best_metric="last"'],
    ),
    (
        'error: scheduler.metric: "val/loss" is not measured with data.split.validation = 0',
        ["data.split.validation=0", 'train.best_metric="last"', 'scheduler.name="plateau"'],
        ["data.split.validation=0", 'train.best_metric="last"', 'scheduler={name="plateau", metric="train/loss"}'],
    ),
    (
        "warning: augment.validation: has no effect with data.split.validation = 0",
        [
            "data.split.validation=0",
            'train.best_metric="last"',
            'augment.validation=[{name="RandomRotation", degrees=9}]',
        ],
        ['augment.validation=[{name="RandomRotation", degrees=9}]'],
    ),
    (
        "warning: data.test_images_per_class: has no effect with data.split.test = 0",
        ["data.split.test=0", "data.test_images_per_class=3"],
        ["data.test_images_per_class=3"],
    ),
    (
        "warning: expected_metrics.last_val_loss: is not compared, since data.split.validation = 0",
        [
            "data.split.validation=0.0",
            'train.best_metric="last"',
            'expected_metrics.last_val_loss={at_most=1.0, source="x"}',
        ],
        ['expected_metrics.last_val_loss={at_most=1.0, source="x"}'],
    ),
    (
        "error: train.batch_size: 64 is not divisible by train.grad_accum_steps = 5",
        ["train.grad_accum_steps=5"],
        ["train.grad_accum_steps=4"],
    ),
    (  # 1797 digits without 359 for the test and 144 for validation
        "error: train.batch_size: 1295 is more than the 1294 training images",
        [*CONVNET, 'data.dataset="digits"', "train.drop_last=true", "train.batch_size=1295"],
        [*CONVNET, 'data.dataset="digits"', "train.drop_last=true", "train.batch_size=1294"],
    ),
    (
        "error: train.batch_size: 899 is more than the 898 training images",
        [
            *CONVNET,
            'data.dataset="digits"',
            "train.drop_last=true",
            "train.batch_size=899",
            "data.split.validation=899",
            "data.split.test=0",
        ],
        [*CONVNET, 'data.dataset="digits"', "train.batch_size=899", "data.split.validation=899", "data.split.test=0"],
    ),
    (  # the fold replaces the fifth for the test: 1797 - 899 - 90
        "error: train.batch_size: 809 is more than the 808 training images",
        [*CONVNET, 'data.dataset="digits"', "train.drop_last=true", "train.batch_size=809", "data.split.folds=2"],
        [*CONVNET, 'data.dataset="digits"', "train.drop_last=true", "train.batch_size=808", "data.split.folds=2"],
    ),
    (
        "error: data.split.fold: 5 is not one of the 5 folds, which are numbered from 0",
        ["data.split.folds=5", "data.split.fold=5"],
        ["data.split.folds=5", "data.split.fold=4"],
    ),
    ("error: data.split.fold: needs data.split.folds", ["data.split.fold=1"], ["data.split.fold=0"]),
    (
        "error: data.split.folds: with a fixed data.split.test, the fold is the validation split",
        ["data.split.folds=5", "data.split.test=0", "data.split.validation=0", 'train.best_metric="last"'],
        ["data.split.folds=5", "data.split.validation=0", 'train.best_metric="last"'],
    ),
    (
        "warning: train.class_weights",
        ['train.sampling="balanced"', 'train.class_weights="balanced"'],
        ['train.class_weights="balanced"'],
    ),
    (
        "warning: data.background_class",
        ["data.background_class=true", 'data.dataset="cifar10"'],
        ["data.background_class=true"],
    ),
    ("error: tracking.tags[1]: expected text of 1 to 64", ['tracking.tags=["a", ""]'], ['tracking.tags=["a", "b"]']),
    ("error: tracking.group: line breaks", ['tracking.group="a\\nb"'], ['tracking.notes="a\\nb"']),
    ("error: data.root: line breaks", ['data.root="a\\u0000b"'], ['data.root="a b/ü"']),
]


@pytest.mark.parametrize(("found", "there", "not_there"), CASES)
def test_a_check_reports_its_case_but_no_similar_valid_one(found: str, there: list[str], not_there: list[str]) -> None:
    assert any(line.startswith(found) for line in issues(*there)), issues(*there)
    assert not any(line.startswith(found) for line in issues(*not_there)), issues(*not_there)


def test_the_base_recipe_has_no_issue() -> None:
    assert issues() == []


def test_every_check_is_tested_once() -> None:
    assert len(set(RULES)) == len(RULES)
    assert all(rule.__doc__ for rule in RULES)


def test_an_invalid_value_causes_no_follow_up_errors() -> None:
    """Weights of a wrong type are one error, without "linear_probe without weights" too; likewise a misspelled key."""
    assert len(issues('transfer.mode="linear_probe"', "model.weights=3")) == 1
    no_weights = BASE.replace("weights =", "weigths =").replace('"finetune"', '"linear_probe"')
    with pytest.raises(RecipeError) as caught:
        loads_recipe(no_weights)
    assert [item.message for item in caught.value.diagnostics] == ["unknown key model.weigths"]
    assert len(issues("train.epochs=0", "scheduler.warmup_epochs=50", "early_stopping.patience=99")) == 1


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("multistep", "multi_step"),
        ("MultiStepLR", "multi_step"),
        ("CosineAnnealingLR", "cosine"),
        ("cosine_annealing", "cosine"),
        ("CosineAnnealingWarmRestarts", "cosine_restarts"),
        ("OneCycleLR", "one_cycle"),
        ("ReduceLROnPlateau", "plateau"),
        ("PolynomialLR", "polynomial"),
        ("poly", "polynomial"),
        ("StepLR", "step"),
        ("none", "constant"),
    ],
)
def test_names_of_schedules_in_other_libraries_are_understood(name: str, schedule: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads_recipe(BASE, overrides=[f'scheduler.name="{name}"'])
    (found,) = caught.value.diagnostics
    assert found.hint == f'did you mean "{schedule}"?'


def test_errors_in_one_table_do_not_hide_others() -> None:
    found = issues(
        'optimizer.name="sdg"', 'optimizer.lr="x"', 'model.name="resnet19"', "train.epochs=0", "data.spilt=3"
    )
    assert len(found) == 5


@pytest.mark.parametrize(("overrides", "channels"), [([], 3), (["data.channels=1"], 1), (['data.dataset="digits"'], 3)])
def test_channels_follow_the_pretrained_weights(overrides: list[str], channels: int) -> None:
    assert channels_of(loads_recipe(BASE, overrides)) == channels
    assert channels_of(loads_recipe(BASE, [*PLAIN, 'data.dataset="digits"'])) == 1


def test_named_normalizations_equal_timms() -> None:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

    assert NORMALIZATIONS["imagenet"] == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert NORMALIZATIONS["half"] == (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)


def test_all_normalization_names_but_two_have_fixed_values() -> None:
    choices = {"auto", "imagenet", "half", "dataset", "none"}
    assert set(NORMALIZATIONS) == choices - {"auto", "dataset"}
    for choice in choices:
        assert isinstance(loads_recipe(BASE, [f'data.normalize="{choice}"']), Recipe)

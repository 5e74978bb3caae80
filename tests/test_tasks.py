"""Losses with arguments, class and example weights, metrics and thresholds of single-label and multi-label tasks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn import metrics as oracle
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from toolkit.data.datasets import Dataset
from toolkit.data.image_sources import InMemoryImages
from toolkit.data.sampling import SamplingPlan
from toolkit.errors import UserError
from toolkit.models.keyed_dropout import DropoutKeys
from toolkit.recipe.diagnostics import RecipeError
from toolkit.recipe.load import load, loads_recipe
from toolkit.recipe.schema import AugmentConfig, TrainConfig
from toolkit.recipe.training_schema import LossConfig
from toolkit.training.build_trainer import class_weights, example_weights
from toolkit.training.classification_metrics import multi_label_metrics, ranking_curve, ranking_curves
from toolkit.training.losses import binary_loss, training_loss
from toolkit.training.task import EvalResult, MultiLabel, SingleLabel, check_label_splits, check_labels
from toolkit.training.train_step import RunningMetrics, TrainCallbacks, TrainStep, TrainStepConfig

RANDOM = np.random.default_rng(0)


def loss_table(loss: str, **args: Any) -> TrainConfig:
    return TrainConfig(epochs=1, batch_size=8, loss=loss, loss_args=LossConfig(**args))  # type: ignore[arg-type]


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def multi_hot() -> Tensor:
    return (torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.4).to(torch.uint8)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.5, 0.9), (0.0, 0.5)])
def test_the_focal_loss_equals_torchvision_s(logits: Tensor, multi_hot: Tensor, gamma: float, alpha: float) -> None:
    found = training_loss(loss_table("focal", gamma=gamma, alpha=alpha), 0.0, None, multi_label=True)(logits, multi_hot)
    torch.testing.assert_close(found, sigmoid_focal_loss(logits, multi_hot.float(), alpha, gamma).mean(1))


@pytest.mark.parametrize(("negative", "positive", "clip"), [(4.0, 0.0, 0.05), (4.0, 1.0, 0.0), (2.0, 0.5, 0.2)])
def test_the_asymmetric_loss_equals_timm_s(
    logits: Tensor, multi_hot: Tensor, negative: float, positive: float, clip: float
) -> None:
    table = loss_table("asymmetric", gamma_negative=negative, gamma_positive=positive, clip=clip)
    found = training_loss(table, 0.0, None, multi_label=True)(logits, multi_hot)
    expected = AsymmetricLossMultiLabel(gamma_neg=negative, gamma_pos=positive, clip=clip)
    torch.testing.assert_close(found.mean() * 5, expected(logits, multi_hot.float()))


@pytest.mark.parametrize("loss", ["bce", "focal", "asymmetric"])
def test_binary_losses_take_a_class_like_its_one_hot_vector_and_are_linear_in_mixed_targets(
    logits: Tensor, loss: str
) -> None:
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    one_hot = nn.functional.one_hot(labels, 5)
    single = training_loss(loss_table(loss), 0.1, None)
    torch.testing.assert_close(single(logits, labels), single(logits, one_hot))
    multi = training_loss(loss_table(loss), 0.1, None, multi_label=True)
    other = one_hot.flip(0)
    mixed = multi(logits, 0.3 * one_hot + 0.7 * other)
    torch.testing.assert_close(mixed, 0.3 * multi(logits, one_hot) + 0.7 * multi(logits, other))


def test_smoothing_of_labels_is_toward_one_half(logits: Tensor, multi_hot: Tensor) -> None:
    found = training_loss(loss_table("bce"), 0.2, None, multi_label=True)(logits, multi_hot)
    smooth = multi_hot * 0.8 + 0.1
    expected = nn.functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(1)
    torch.testing.assert_close(found, expected)


def test_with_a_threshold_every_label_of_a_mixed_image_is_present(logits: Tensor, multi_hot: Tensor) -> None:
    other = multi_hot.flip(0)
    loss = training_loss(loss_table("bce", target_threshold=0.2), 0.1, None, multi_label=True)
    present = (multi_hot.bool() | other.bool()).float()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, present, reduction="none").mean(1)
    torch.testing.assert_close(loss(logits, 0.3 * multi_hot + 0.7 * other), expected)


@pytest.mark.parametrize("loss", ["bce", "focal", "asymmetric"])
def test_losses_and_gradients_are_finite_for_extreme_logits(loss: str) -> None:
    logits = torch.tensor([[-200.0, 200.0, -200.0, 200.0]], requires_grad=True)
    args = {"gamma": 0.5} if loss == "focal" else {"gamma_negative": 0.5} if loss == "asymmetric" else {}
    losses = training_loss(loss_table(loss, **args), 0.0, None, multi_label=True)(logits, torch.tensor([[1, 1, 0, 0]]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# -- weights ----------------------------------------------------------------------------------------------------------


def setup(labels: np.ndarray, given: Any, weights: np.ndarray | None = None, count: int = 3) -> Any:
    """Return what class and example weights need of a run; all images are training images but the last."""
    images = InMemoryImages(np.zeros((len(labels), 2, 2), dtype=np.uint8), "digits", 1)
    classes = [f"class {k}" for k in range(count)]
    dataset = Dataset("digits", classes, images, labels, {}, 2, 1, weights=weights)
    task = MultiLabel(count, np.full(count, 0.5)) if labels.ndim == 2 else SingleLabel(count)
    train = np.arange(len(labels) - 1)
    recipe = SimpleNamespace(train=SimpleNamespace(class_weights=given))
    return SimpleNamespace(
        dataset=dataset, task=task, recipe=recipe, splits={"train": train}, labels=lambda split: labels[train]
    )


def test_class_weights_are_balanced_or_given_by_position_or_by_name() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    assert class_weights(setup(labels, "none")) is None
    assert class_weights(setup(labels, "balanced")).tolist() == pytest.approx([6 / 9, 6 / 6, 6 / 3])  # type: ignore[union-attr]
    assert class_weights(setup(labels, [1.0, 2.0, 3.0])).tolist() == [1, 2, 3]  # type: ignore[union-attr]
    assert class_weights(setup(labels, {"class 1": 5.0})).tolist() == [1, 5, 1]  # type: ignore[union-attr]


def test_balanced_weights_of_labels_make_present_and_absent_ones_weigh_the_same() -> None:
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=np.uint8)
    weights = class_weights(setup(labels, "balanced"))
    assert weights is not None
    present = labels[:4].sum(0)
    np.testing.assert_allclose(weights[1] * present, [2, 2, 2])
    np.testing.assert_allclose(weights[0] * (4 - present), [2, 2, 2])


def test_class_weights_that_do_not_fit_the_classes_are_refused() -> None:
    labels = np.array([0, 1, 2, 0])
    with pytest.raises(UserError, match=r"train.class_weights has 2 values, but there are 3 classes"):
        class_weights(setup(labels, [1.0, 2.0]))
    with pytest.raises(UserError, match=r"contains 'klass 1', which is not a class of the data set.*class 1"):
        class_weights(setup(labels, {"klass 1": 2.0}))


def test_weights_of_labels_multiply_the_terms_of_present_and_absent_ones(logits: Tensor, multi_hot: Tensor) -> None:
    weights = torch.rand(2, 5)
    found = binary_loss(logits, multi_hot, weights=weights)
    each = torch.where(multi_hot.bool(), weights[1], weights[0])
    expected = nn.functional.binary_cross_entropy_with_logits(logits, multi_hot.float(), each, reduction="none").mean(1)
    torch.testing.assert_close(found, expected)


def test_example_weights_have_mean_one_over_the_training_images() -> None:
    labels = np.array([0, 1, 2, 0])
    assert example_weights(setup(labels, "none")) is None
    found = example_weights(setup(labels, "none", np.array([1.0, 2.0, 3.0, 100.0])))
    assert found is not None
    assert found.tolist() == [0.5, 1.0, 1.5]
    with pytest.raises(UserError, match="all training images have weight 0"):
        example_weights(setup(labels, "none", np.array([0.0, 0.0, 0.0, 1.0])))


class Loader:
    """20 images of class 0 and 20 of class 1."""

    def __init__(self, *, mixing: bool) -> None:
        self.plan = SamplingPlan(size=40, seed=0, batch_size=8, mixing=mixing)

    def epoch(self, epoch: int, first_step: int) -> Any:
        for micro, positions, draws in self.plan.epoch(epoch, first_step):
            at = torch.from_numpy(positions)
            yield micro, SimpleNamespace(images=torch.zeros(len(at), 1, 4, 4), labels=at % 2, draws=draws, positions=at)


class Constant(nn.Module):
    """A model with the same logits for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_example_weights_scale_the_gradient_of_each_image_also_of_mixed_ones(mixup: float) -> None:
    """Class 0 has 3/4 of the weight: at equal logits, the gradient of its logit is 1/2 - 3/4."""
    module, accelerator = Constant(), Accelerator(cpu=True)
    settings = TrainStepConfig(
        seed=0, task=SingleLabel(2), loss=training_loss(loss_table("cross_entropy"), 0.0, None),
        augment=AugmentConfig(mixup=mixup), max_grad_norm=None, channels_last=False, cuda_graphs=False,
        steps_per_epoch=5, log_every=0, example_weights=torch.tensor([1.5, 0.5]).repeat(20),
    )  # fmt: skip
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    step = TrainStep(accelerator, module, module, optimizer, DropoutKeys(0, 0), None, settings)
    sums = RunningMetrics.zero(accelerator.device)
    hooks = TrainCallbacks(lambda epoch: None, lambda step, sums: False, lambda *_: None)
    step.train_epoch(Loader(mixing=mixup > 0), 0, 0, sums, hooks)
    gradient = -module.logits.detach() / (1e-4 * 5)
    # Mixing pairs of unlike weight changes the products of weight and share a little, not their sum over the batch.
    assert gradient.tolist() == pytest.approx([-0.25, 0.25], abs=1e-3 if not mixup else 0.1)
    assert sums.means(accelerator)[0] == pytest.approx(np.log(2), rel=1e-3 if not mixup else 0.1)


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_single_label_metrics_equal_scikit_learn_s() -> None:
    """Class 3 never occurs, class 4 is never predicted, and class 5 is only predicted."""
    labels = RANDOM.choice([0, 1, 2, 4], 500, p=[0.6, 0.2, 0.1, 0.1])
    predictions = RANDOM.choice([0, 1, 2, 5], 500)
    outcomes = np.stack([RANDOM.random(500), predictions, RANDOM.random(500), RANDOM.random(500) < 0.9], 1)
    task, result = SingleLabel(6), EvalResult(outcomes.astype(np.float32), labels)
    found = task.metrics(result, "")
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predictions), abs=1e-9)
    recall = oracle.recall_score(labels, predictions, average="macro", labels=[0, 1, 2, 4])
    assert found["balanced_accuracy"] == pytest.approx(recall, abs=1e-9)
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(labels, predictions, average="macro"), abs=1e-9)
    assert found["top5_accuracy"] == outcomes[:, 3].mean()
    of_class, _ = task.class_metrics(result)
    expected = oracle.precision_recall_fscore_support(labels, predictions, labels=range(6), zero_division=0)
    for mine, theirs in zip(
        (of_class.precision, of_class.recall, of_class.f1, of_class.support), expected, strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-9)


def test_top5_accuracy_equals_scikit_learn_s() -> None:
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(RANDOM.integers(0, 8, 200))
    result = EvalResult(SingleLabel(8).outcomes(logits, labels).numpy(), labels.numpy())
    expected = oracle.top_k_accuracy_score(labels, logits.numpy(), k=5, labels=range(8))
    assert SingleLabel(8).metrics(result, "")["top5_accuracy"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("digits", [1, 7], ids=["many equal scores", "distinct scores"])
def test_multi_label_metrics_equal_scikit_learn_s(digits: int) -> None:
    """Label 4 is never present, and label 5 always."""
    labels = (RANDOM.random((300, 6)) < [0.5, 0.1, 0.3, 0.02, 0.0, 1.0]).astype(np.uint8)
    scores = np.round(np.clip(RANDOM.random((300, 6)) * 0.7 + 0.3 * labels, 0, 1), digits).astype(np.float32)
    thresholds = np.array([0.5, 0.3, 0.7, 0.5, 0.4, 0.95])
    decided = scores >= thresholds
    found = multi_label_metrics(labels, decided, ranking_curves(labels, scores))
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(labels, decided), abs=1e-9)
    for average in ("macro", "micro"):
        expected = oracle.f1_score(labels, decided, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected, abs=1e-9)
    precisions = [oracle.average_precision_score(labels[:, k], scores[:, k]) for k in (0, 1, 2, 3, 5)]
    assert found["map"] == pytest.approx(np.mean(precisions), abs=1e-9)
    areas = [oracle.roc_auc_score(labels[:, k], scores[:, k]) for k in range(4)]
    assert found["auroc"] == pytest.approx(np.mean(areas), abs=1e-9)
    result = EvalResult(np.concatenate([np.zeros((300, 1), np.float32), scores], 1), labels)
    of_label, others = MultiLabel(6, thresholds).class_metrics(result)
    expected = oracle.precision_recall_fscore_support(labels, decided, zero_division=0)
    for mine, theirs in zip(
        (of_label.precision, of_label.recall, of_label.f1, of_label.support), expected, strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-9)
    np.testing.assert_allclose(others["average_precision"][[0, 1, 2, 3, 5]], precisions, atol=1e-9)
    np.testing.assert_allclose(others["auroc"][:4], areas, atol=1e-9)
    assert np.isnan(others["average_precision"][4])
    assert np.isnan(others["auroc"][4:]).all()


def test_chosen_thresholds_have_the_highest_f1_of_all() -> None:
    labels = (RANDOM.random((80, 4)) < [0.5, 0.1, 0.3, 0.0]).astype(np.uint8)
    scores = np.round(np.clip(RANDOM.random((80, 4)) * 0.8 + 0.2 * labels, 0, 1), 2).astype(np.float32)
    for k, curve in enumerate(ranking_curves(labels, scores)):
        candidates = [*np.unique(scores[:, k]), 0.0]
        best = max(oracle.f1_score(labels[:, k], scores[:, k] >= t, zero_division=0) for t in candidates)
        found = oracle.f1_score(labels[:, k], scores[:, k] >= curve.best_threshold, zero_division=0)
        assert found == pytest.approx(best, abs=1e-12)
        assert curve.best_threshold not in scores[:, k] or k == 3
    assert ranking_curve(labels[:, 3], scores[:, 3]).best_threshold == 0.5, "a label that is never present"
    assert ranking_curve(np.ones(5), np.array([0.9, 0.4, 0.2, 0.6, 0.3])).best_threshold == pytest.approx(0.1)


# -- what does not fit together ----------------------------------------------------------------------------------------

RECIPE = """
[recipe]
name = "task"
[task]
kind = "{kind}"
[data]
dataset = "digits"
[model]
source = "toolkit"
convnet = {{ blocks = [{{ channels = 2 }}] }}
[optimizer]
lr = 0.1
[train]
epochs = 1
batch_size = 8
{more}
"""


def issues(folder: Path, kind: str, more: str = "") -> list[str]:
    """Return the errors and warnings about a recipe."""
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(kind=kind, more=more))
    try:
        return [warning.message for warning in load(path).warnings]
    except RecipeError as error:
        return [each.message for each in error.diagnostics]


def test_the_defaults_suit_the_kind_of_task() -> None:
    recipe = loads_recipe(RECIPE.format(kind="multi_label", more="[study]\nseeds = 2"))
    assert (recipe.train.loss, recipe.train.best_metric) == ("bce", "val/map")
    assert recipe.study is not None
    assert recipe.study.output.best_by == "val/map"
    recipe = loads_recipe(RECIPE.format(kind="single_label", more="[study]\nseeds = 2"))
    assert (recipe.train.loss, recipe.train.best_metric) == ("cross_entropy", "val/accuracy")


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("multi_label", 'loss = "cross_entropy"', "train.loss: cross-entropy needs images with exactly one class"),
        ("multi_label", 'sampling = "balanced"', "train.sampling: balanced sampling needs images with exactly one"),
        ("multi_label", 'best_metric = "val/top5_accuracy"', "train.best_metric: top-5 accuracy is not computed with"),
        ("single_label", 'best_metric = "val/map"', "train.best_metric: mAP is not computed with task.kind"),
        ("single_label", '[early_stopping]\nmetric = "val/auroc"', "early_stopping.metric: AUROC is not computed"),
        ("multi_label", '[study]\nseeds = 2\n[study.output]\ncolumns = ["test_balanced_accuracy"]',
         "study.output.columns[0]: balanced accuracy is not computed"),
        ("single_label", "[train.loss_args]\ngamma = 1.0", "train.loss_args.gamma: has no effect with train.loss"),
    ],
)  # fmt: skip
def test_what_does_not_suit_the_kind_of_task_is_named(tmp_path: Path, kind: str, more: str, message: str) -> None:
    found = issues(tmp_path, kind, more)
    assert any(text.startswith(message) for text in found), found


def test_labels_of_the_other_kind_are_refused() -> None:
    images = InMemoryImages(np.zeros((4, 2, 2), dtype=np.uint8), "digits", 1)
    one = Dataset("digits", ["a", "b"], images, np.zeros(4, dtype=np.int64), {}, 2, 1)
    several = Dataset("digits", ["a", "b"], images, np.zeros((4, 2), dtype=np.uint8), {}, 2, 1)
    check_labels(one, "single_label")
    check_labels(several, "multi_label")
    with pytest.raises(UserError, match=r'have exactly one class each.*set task.kind = "single_label"'):
        check_labels(one, "multi_label")
    with pytest.raises(UserError, match=r'may have several labels.*set task.kind = "multi_label"'):
        check_labels(several, "single_label")
    with pytest.raises(UserError, match="no label is present in some of the 4 test images and absent from others"):
        check_label_splits(several, {"test": np.arange(4)})
    named = Dataset("digits", ["a;b", "c"], images, several.labels, {}, 2, 1)
    with pytest.raises(UserError, match="the label 'a;b' contains ';'"):
        check_labels(named, "multi_label")

"""Class weights with mixed images, averaged model weights, and runs without any training step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cli import toolkit
from finished import CONVNET, train, train_on_files
from timm.loss import BinaryCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trainers import FROZEN, write_recipe

from toolkit.data.sampling import SamplingPlan
from toolkit.errors import UserError
from toolkit.models.keyed_dropout import DropoutKeys
from toolkit.recipe.schema import AugmentConfig, TrainConfig
from toolkit.recipe.training_schema import LossConfig
from toolkit.training.checkpoint import find_latest, load_checkpoint
from toolkit.training.ema import ModelEma, decay_at, short_run_warning
from toolkit.training.losses import training_loss
from toolkit.training.task import SingleLabel
from toolkit.training.train_step import RunningMetrics, TrainCallbacks, TrainStep, TrainStepConfig, _means
from toolkit.training.trained_model import load_model

IMAGES, CLASSES = 400, 2


def table(loss: Any) -> TrainConfig:
    return TrainConfig(epochs=1, batch_size=40, loss=loss)


# -- class weights ----------------------------------------------------------------------------------------------------


class Loader:
    """90 % of the images are of class 0."""

    def __init__(self, mixing: bool) -> None:
        self.plan = SamplingPlan(size=IMAGES, seed=0, batch_size=40, mixing=mixing)
        self.labels = (torch.arange(IMAGES) % 10 == 0).long()
        self.images = torch.randn(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def epoch(self, epoch: int, first_step: int) -> Any:
        for micro, positions, draws in self.plan.epoch(epoch, first_step):
            chosen = torch.from_numpy(positions)
            yield micro, SimpleNamespace(images=self.images[chosen], labels=self.labels[chosen], draws=draws)


class Constant(nn.Module):
    """A model with the same logits for every image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def gradient(mixing: AugmentConfig | None, *, smoothing: float = 0.0, weights: Tensor | None, logits: Tensor) -> Tensor:
    """Return the gradient of an epoch's mean loss by the logits: the weighted difference of prediction and target."""
    module, accelerator = Constant(logits.clone()), Accelerator(cpu=True)
    steps = 10
    settings = TrainStepConfig(
        seed=0, task=SingleLabel(CLASSES), loss=training_loss(table("cross_entropy"), smoothing, weights),
        augment=mixing or AugmentConfig(), max_grad_norm=None, channels_last=False, cuda_graphs=False,
        steps_per_epoch=steps, log_every=0,
    )  # fmt: skip
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    trainer = TrainStep(accelerator, module, module, optimizer, DropoutKeys(0, 0), None, settings)
    hooks = TrainCallbacks(lambda epoch: None, lambda step, sums: False, lambda *_: None)
    sums = RunningMetrics.zero(accelerator.device)
    trainer.train_epoch(Loader(mixing is not None), 0, 0, sums, hooks)
    return (logits - module.logits.detach()) / (1e-4 * steps)


WEIGHTS = torch.tensor([1 / 1.8, 5.0])
"""Inverse frequency of 9:1, with mean 1 over the images."""


@pytest.mark.parametrize(
    "mixing",
    [
        None,
        AugmentConfig(mixup=1.0),
        AugmentConfig(cutmix=1.0),
        AugmentConfig(mixup=0.4, cutmix=1.0, mixup_prob=0.8),
    ],
    ids=["none", "mixup", "cutmix", "both"],
)
def test_balanced_class_weights_give_each_of_two_classes_half_of_the_loss(mixing: AugmentConfig | None) -> None:
    """At equal logits each class's gradient is (mass of both targets) / 2 - (mass of its own): 0 if they are equal.

    Weighting an image's whole loss by its own label would give 0.69 : 0.31 with mixup.
    """
    found = gradient(mixing, weights=WEIGHTS, logits=torch.zeros(CLASSES))
    assert found.abs().max() < 1e-3
    unweighted = gradient(mixing, weights=None, logits=torch.zeros(CLASSES))
    assert unweighted.tolist() == pytest.approx([-0.4, 0.4], abs=1e-2), "0.5 - 0.9 and 0.5 - 0.1"


def test_label_smoothing_is_weighted_as_in_torch() -> None:
    """Compared with torch's own cross-entropy of hard labels over all images at once."""
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    labels = Loader(mixing=False).labels
    losses = nn.functional.cross_entropy(
        logits.expand(IMAGES, -1), labels, weight=WEIGHTS, label_smoothing=0.2, reduction="sum"
    )
    (expected,) = torch.autograd.grad(losses / IMAGES, logits)
    found = gradient(None, smoothing=0.2, weights=WEIGHTS, logits=logits.detach())
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_smoothed_mixed_targets_are_weighted_class_by_class() -> None:
    """With equal logits the gradient shows the weighted mass of the targets, which mixing does not change."""
    smoothing = 0.2
    shares = torch.tensor([0.9, 0.1]) * (1 - smoothing) + smoothing / CLASSES
    mass = shares * WEIGHTS
    expected = mass.sum() / 2 - mass
    found = gradient(
        AugmentConfig(mixup=1.0),
        smoothing=smoothing,
        weights=WEIGHTS,
        logits=torch.zeros(2),
    )
    torch.testing.assert_close(found, expected, rtol=0.05, atol=2e-3)


def test_binary_cross_entropy_equals_timm_s() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    mixed = torch.rand(6, 5).softmax(1)
    for smoothing in (0.0, 0.1):
        binary_loss = training_loss(table("bce"), smoothing, None)
        expected = BinaryCrossEntropy(smoothing=smoothing, reduction="none")(logits, labels)
        torch.testing.assert_close(binary_loss(logits, labels), expected.mean(1))
    for smoothing, threshold in ((0.0, 0.2), (0.1, 0.5), (0.1, 0.01)):
        loss = TrainConfig(epochs=1, batch_size=40, loss="bce", loss_args=LossConfig(target_threshold=threshold))
        own, timm = training_loss(loss, smoothing, None), BinaryCrossEntropy(smoothing, threshold, reduction="none")
        torch.testing.assert_close(own(logits, labels), timm(logits, labels).mean(1))
        if not smoothing:  # timm smooths the labels of mixed images while mixing
            torch.testing.assert_close(own(logits, mixed), timm(logits, mixed).mean(1))
    dense = BinaryCrossEntropy(smoothing=0.0, reduction="none")(logits, mixed).mean(1)
    torch.testing.assert_close(training_loss(table("bce"), 0.0, None)(logits, mixed), dense)


def test_class_weights_apply_to_each_class_of_the_binary_cross_entropy() -> None:
    logits, labels, weights = torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([0.5, 3.0])
    found = training_loss(table("bce"), 0.0, weights)(logits, labels)
    torch.testing.assert_close(found, torch.full((2,), np.log(2.0) * 3.5 / 2))


def test_a_run_with_binary_cross_entropy_learns_and_is_validated_by_cross_entropy(tmp_path: Path) -> None:
    run = train_on_files(tmp_path, CONVNET, 'train.loss="bce"', "optimizer.lr=1.0", epochs=6)
    losses = [record["train/loss"] for record in run.epoch_records()]
    assert losses[0] < np.log(2) * 1.1, "ten classes, of which nine are negative"
    assert losses[-1] < 0.8 * losses[0]
    assert run.summary["best"]["val_loss"] > 1.0, "cross-entropy is several times as large"


def test_a_mean_over_no_images_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no images"):
        _means(torch.zeros(1, 3, dtype=torch.float64), Accelerator(cpu=True))


# -- averaged model weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_averaged_weights_equal_those_of_timm_s_ema_with_warmup(decay: float) -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    model_ema, timm_ema = ModelEma(module, decay), ModelEmaV3(module, decay=decay, use_warmup=True)
    for update in range(1, 60):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        model_ema.update(module, update)
        timm_ema.update(module, step=update)
        assert decay_at(decay, update) == pytest.approx(timm_ema.get_decay(update), abs=1e-12)
    for name, value in timm_ema.module.state_dict().items():
        torch.testing.assert_close(model_ema.averages[name], value)
    assert decay_at(decay, 1) == 0.0, "the initial weights have no influence after the first update"
    assert decay_at(decay, 10**9) == decay


@pytest.mark.parametrize("every", [1, 3])
def test_averaged_weights_without_warmup_equal_those_of_torch_s_ema(every: int) -> None:
    """torch's AveragedModel copies the weights at its first update, as torchvision's training script uses it."""
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    model_ema = ModelEma(module, 0.8, every=every, warmup=False)
    torch_ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for step in range(1, 20):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        model_ema.update(module, step)
        if (step - 1) % every == 0:
            torch_ema.update_parameters(module)
    assert int(torch_ema.n_averaged) == 1 + 18 // every
    for name, value in torch_ema.module.state_dict().items():
        torch.testing.assert_close(model_ema.averages[name], value)


def test_ema_steps_and_ema_warmup_reach_the_average_of_a_run(tmp_path: Path) -> None:
    """500 images in batches of 80: 7 steps per epoch, and updates after steps 1 and 9 of 14."""
    settings = (f'recipe.run_root="{tmp_path}"', *SMALL, "data.images_per_class=50", "train.batch_size=80")
    settings = (*settings, "train.epochs=2", "checkpoint.every_steps=1", "checkpoint.keep=99")
    run = train(RECIPES / "quickstart.toml", *settings, "train.ema=0.2", "train.ema_steps=8", "train.ema_warmup=false")
    content = load_checkpoint(find_latest(run.checkpoints, lambda line: None))
    first, ninth = (
        load_checkpoint(next(run.checkpoints.glob(f"{epoch:04d}-{step:06d}-*.pt")))["model"]
        for epoch, step in ((0, 1), (1, 2))
    )
    assert run.epoch_records()[-1]["step"] == 14
    for name, value in content["ema"].items():
        torch.testing.assert_close(value, 0.2 * first[name] + 0.8 * ninth[name])


def averaged(**keys: Any) -> TrainConfig:
    return TrainConfig(epochs=1, batch_size=40, **keys)


def test_an_average_over_more_steps_than_the_run_has_gives_a_warning() -> None:
    assert short_run_warning(averaged(), 1) is None
    assert short_run_warning(averaged(ema=0.9), 31) is None
    assert short_run_warning(averaged(ema=0.9), 25) is not None
    assert short_run_warning(averaged(ema=0.999), 105) == (
        "warning: train.ema = 0.999 is an average over about 1,000 steps, but the run has only 105: the decay "
        "reaches 0.955, an average over about the last 22"
    )
    assert short_run_warning(averaged(ema=0.9, ema_steps=32), 32 * 30 + 1) is None
    assert short_run_warning(averaged(ema=0.99, ema_steps=32, ema_warmup=False), 32 * 101) == (
        "warning: train.ema = 0.99 is an average over about 100 updates, 32 steps apart, but the run has only 101: "
        "the weights at the first one keep a share of 37%"
    )
    with pytest.raises(UserError, match=r"train\.ema_steps = 32 is not less than the 32 steps of the run"):
        short_run_warning(averaged(ema=0.99, ema_steps=32), 32)


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SMALL = ("tracking={trackers=[]}", "train.epochs=5")


def test_averaged_weights_of_a_short_run_do_not_contain_the_random_start(tmp_path: Path) -> None:
    """The quickstart for 5 epochs: without the warmup of the decay, the averaged weights had chance accuracy, 0.10."""
    run = train(RECIPES / "quickstart.toml", f'recipe.run_root="{tmp_path}"', *SMALL, "train.ema=0.999")
    assert run.summary["last"]["test_accuracy"] > 0.95
    assert "warning: train.ema = 0.999 is an average over about 1,000 steps" in run.log_file.read_text()


def test_the_last_averaged_model_of_a_cached_linear_probe_is_that_of_the_run(tmp_path: Path) -> None:
    """With cached features only the tail is trained; checkpoints named its averages without the tail's prefix."""
    recipe = write_recipe(tmp_path, FROZEN)
    settings = ("train.ema=0.9", "train.epochs=2", "recipe.seed=0")
    run = train(recipe, *settings)
    assert "inputs of head computed once" in " ".join(run.summary["cached"])
    exported = toolkit("export", run.path, "--format", "safetensors", "--epoch", "last")
    assert exported.status == 0, exported.stderr
    content = load_checkpoint(find_latest(run.checkpoints, lambda line: None))
    assert content["ema"].keys() <= content["model"].keys()
    last = load_model(run.path / "export" / "safetensors-last").module.state_dict()
    assert all(torch.equal(last[name], value) for name, value in content["ema"].items())
    assert not all(torch.equal(content["model"][name], value) for name, value in content["ema"].items())


# -- nothing to train on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["--dry-run", "--no-report"])
def test_dropping_the_only_batch_of_an_epoch_is_refused(tmp_path: Path, mode: str) -> None:
    settings = (
        "data.images_per_class=20",
        "train.batch_size=300",
        "train.drop_last=true",
        f'recipe.run_root="{tmp_path}"',
        *SMALL,
    )
    outcome = toolkit(
        "train", RECIPES / "quickstart.toml", mode, *(part for setting in settings for part in ("--set", setting))
    )
    assert outcome.status == 2
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("train.drop_last = true leaves nothing to train on: 200 training images are fewer than one")
    assert "set train.batch_size to 200 or less" in last
    assert not list(tmp_path.iterdir()), "no run directory"


def test_the_summary_contains_the_number_of_images_per_epoch(tmp_path: Path) -> None:
    """Of 1,294 images, two full batches of 500 are used; train accuracy is over these 1,000."""
    settings = ("train.batch_size=500", "train.drop_last=true", f'recipe.run_root="{tmp_path}"', "train.epochs=1")
    run = train(RECIPES / "quickstart.toml", *settings, "tracking={trackers=[]}")
    assert (run.summary["images_per_epoch"], run.summary["images"]["train"]) == (1000, 1294)
    assert run.epoch_records()[0]["train/accuracy"] * 1000 == pytest.approx(
        round(run.epoch_records()[0]["train/accuracy"] * 1000)
    )


# -- one image and batch norm -----------------------------------------------------------------------------------------

HEAD = CONVNET + "\n[model.head]\nhidden = [8]\nbatch_norm = true\n"
DIGITS = """
[recipe]
name = "lone"
run_root = "{root}"
[data]
dataset = "digits"
images_per_class = {images}
test_images_per_class = 3
split = {{ validation = 30, test = 0.2 }}
[optimizer]
name = "sgd"
lr = 0.05
[train]
epochs = 1
batch_size = 16
precision = "no"
[tracking]
trackers = []
"""


def train_on_images(
    tmp_path: Path, model: str, *settings: str, mode: str = "--dry-run", images: int = 9
) -> tuple[int, str]:
    """Return exit status and last line of a run on ``images`` images in each of 10 classes."""
    path = tmp_path / "recipe.toml"
    path.write_text(DIGITS.format(root=tmp_path / "runs", images=images) + model)
    outcome = toolkit("train", path, mode, *(part for setting in settings for part in ("--set", setting)))
    return outcome.status, outcome.stderr.splitlines()[-1]


def test_a_last_batch_of_one_image_is_refused_with_batch_sizes_that_avoid_it(tmp_path: Path) -> None:
    """With 90 training images in batches of 89."""
    status, last_line = train_on_images(tmp_path, HEAD, "train.batch_size=89")
    assert status == 2
    assert last_line == (
        "the last batch of an epoch has 1 image (90 training images, train.batch_size = 89), and batch norm needs more "
        "than one value per channel: head.1 would get one. Set train.batch_size = 88 or 90, or train.drop_last = true"
    )
    for remedy in ("train.batch_size=88", "train.batch_size=90", "train.drop_last=true"):
        settings = ["train.batch_size=89"] * remedy.startswith("train.drop") + [remedy]
        status, last_line = train_on_images(tmp_path, HEAD, *settings, mode="--no-report")
        assert status == 0, last_line


def test_micro_batches_of_one_image_are_refused(tmp_path: Path) -> None:
    status, last_line = train_on_images(tmp_path, HEAD, "train.batch_size=16", "train.grad_accum_steps=16")
    assert status == 2
    assert last_line.startswith("every batch has 16 images, of which a forward pass gets 1 (90 training images")
    assert "a smaller train.grad_accum_steps" in last_line


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (CONVNET, ["train.batch_size=89"]),
        (CONVNET.replace("batch_norm = true", "batch_norm = false"), ["train.batch_size=89"]),
        (HEAD.replace("batch_norm = true\n", "batch_norm = false\n"), ["train.batch_size=89"]),
    ],
    ids=["batch norm over pixels", "none", "none in the head"],
)
def test_a_model_that_can_train_on_one_image_is_not_refused(tmp_path: Path, model: str, settings: list[str]) -> None:
    status, last_line = train_on_images(tmp_path, model, *settings, mode="--no-report")
    assert status == 0, last_line


def test_frozen_batch_norm_can_take_one_image_unless_its_statistics_are_updated(tmp_path: Path) -> None:
    from toolkit.runs import open_run

    train_on_images(tmp_path, HEAD, mode="--no-report")
    (folder,) = (tmp_path / "runs" / "lone").iterdir()
    frozen = ['transfer.mode="linear_probe"', f'model.weights="file:{open_run(folder).best_weights}"',
              "data.channels=1", 'transfer.freeze=["head.0.*", "head.1.*"]', "train.batch_size=89"]  # fmt: skip
    assert train_on_images(tmp_path, HEAD, *frozen, mode="--no-report")[0] == 0
    status, last_line = train_on_images(tmp_path, HEAD, *frozen, 'transfer.frozen_batch_norm="update"')
    assert (status, "head.1 would get one" in last_line) == (2, True)


@pytest.mark.parametrize(
    ("world", "sync", "grad_accum_steps", "count", "is_lone"),
    [
        (1, True, 1, 1, True), (1, True, 1, 2, False), (1, True, 4, 7, True), (1, True, 4, 8, False),
        (2, True, 1, 2, False), (2, False, 1, 2, True), (2, False, 1, 3, True), (2, False, 1, 4, False),
        (4, True, 1, 1, True), (4, False, 1, 3, False), (4, False, 2, 7, True), (4, True, 2, 7, False),
    ],
)  # fmt: skip
def test_the_number_of_images_per_norm_equals_that_of_the_sampling_plan(
    world: int, sync: bool, grad_accum_steps: int, count: int, is_lone: bool
) -> None:
    """Compared with the sampling plan; in a replicated micro-batch, synchronized batch norm counts all processes."""
    from toolkit.data.sampling import plan_epoch
    from toolkit.recipe.schema import TrainConfig
    from toolkit.training.single_value_batches import _is_affected

    table = TrainConfig(epochs=1, batch_size=count, grad_accum_steps=grad_accum_steps, sync_batch_norm=sync)
    assert _is_affected(count, table, world) == is_lone
    plans = [
        list(plan_epoch(count, batch_size=count, grad_accum_steps=grad_accum_steps, drop_last=False, world=world,
                        rank=rank,
                        mixing=False))
        for rank in range(world)
    ]  # fmt: skip
    seen = []
    for parts in zip(*plans, strict=True):
        shared = sync and world > 1 and not parts[0].replicated
        seen += [sum(micro.own for micro in parts)] if shared else [micro.own for micro in parts]
    assert (min(seen) == 1) == is_lone
    assert np.min(seen) >= 1


@pytest.mark.parametrize("sync", ["true", "false"])
def test_synchronized_batch_norm_counts_images_over_all_processes(tmp_path: Path, sync: str) -> None:
    """With a last batch of two images on two processes, each has one, which only synchronized batch norm can handle."""
    from trainers import Trainers

    path = tmp_path / "recipe.toml"
    path.write_text(DIGITS.format(root=tmp_path / "runs", images=9) + HEAD)
    trainers = Trainers(2, tmp_path, path, "--set", "train.batch_size=44", "--set", f"train.sync_batch_norm={sync}")
    statuses = trainers.wait()
    if sync == "true":
        assert statuses == [0, 0], trainers.text()
        return
    assert statuses == [2, 2]
    assert (
        "the last batch of an epoch has 2 images, of which a forward pass gets 1 (90 training images, train.batch_size "
        "= 44, 2 processes)" in trainers.text()
    )

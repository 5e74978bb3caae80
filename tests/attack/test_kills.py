"""200 kills at random moments, over eighteen combinations of settings on one and two processes.

For each, no file under its final name is incomplete, a signal that asks to stop ends all processes with status 3,
and the run, resumed until it finishes, has byte for byte the weights, metrics, predictions and summary of an
uninterrupted one. Run with -m slow; -s shows the counts.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from killing import ADAMW, Chains, Combination
from trainers import FROZEN, GRADUAL, STATEFUL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEED = 13
KILLS = 216
EMA = ("train.ema=0.9", "train.max_grad_norm=1.0", 'train.best_metric="val/loss"')
PLAIN = """
[model]
source = "toolkit"

[model.convnet]
blocks = [{{ channels = 6, batch_norm = true, pool = 2, dropout = 0.1 }}, {{ channels = 8, pool = 2 }}]
"""

COMBINATIONS = (
    Combination("mixup, EMA, plateau", 1, STATEFUL, EMA),
    Combination("mixup, EMA, plateau on two", 2, STATEFUL, EMA),
    Combination("bf16, AdamW", 1, STATEFUL, ('train.precision="bf16"', *EMA), optimizer=ADAMW),
    Combination("bf16 and accumulation on two", 2, STATEFUL, ('train.precision="bf16"', "train.grad_accum_steps=2")),
    Combination("checkpoint at every step", 1, STATEFUL, ("train.grad_accum_steps=2", "checkpoint.every_steps=1")),
    Combination("early stopping", 1, PLAIN,
                ("optimizer.lr=0.2", "early_stopping.patience=2", 'early_stopping.metric="val/accuracy"'), 20),
    Combination("early stopping on two", 2, PLAIN,
                ("optimizer.lr=0.2", "early_stopping.patience=2", 'early_stopping.metric="val/accuracy"'), 20),
    Combination("files, no cache, two workers", 1, STATEFUL, ("data.workers=2", 'data.cache="off"'), 6, True),
    Combination("files, cache in memory on two", 2, PLAIN, ("data.workers=0", 'data.cache="memory"'), 8, True),
    Combination("files, cache on disk", 1, PLAIN, ("data.workers=0", 'data.cache="disk"'), 8, True),
    Combination("linear probe on cached features", 1, FROZEN, ("train.ema=0.9",)),
    Combination("gradual unfreezing, AdamW on two", 2, GRADUAL, ("train.ema=0.9",), optimizer=ADAMW),
    Combination("last epoch, no validation, no test", 1, PLAIN,
                ('train.best_metric="last"', "data.split.validation=0", "data.split.test=0")),
    Combination("drop_last, balanced sampling, class weights on two", 2, PLAIN,
                ("train.drop_last=true", 'train.sampling="balanced"', 'train.class_weights="balanced"')),
    Combination("checkpoints after epochs only, one kept", 1, STATEFUL,
                ("checkpoint.every_steps=0", "checkpoint.keep=1")),
    Combination("batch norm per process, CutMix on two", 2, PLAIN,
                ("train.sync_batch_norm=false", "augment.cutmix=1.0", "checkpoint.every_steps=2")),
    Combination("nag, one cycle", 1, PLAIN, ('optimizer.name="nag"', 'scheduler.name="one_cycle"')),
    Combination("RandAugment by workers, not channels_last", 1, PLAIN,
                ('augment.auto_augment="rand-m9-mstd0.5"', "train.channels_last=false", "data.workers=1"), 6, True),
)  # fmt: skip


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda combination: combination.name)
def test_a_killed_and_resumed_run_gives_the_same_bytes(
    combination: Combination, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    counts: Counter[str] = Counter()
    began = time.monotonic()
    kills = -(-KILLS // len(COMBINATIONS))
    faults = Chains(combination, tmp_path, kills, SEED).run_all(counts)
    print(
        f"\n{combination.name}: {dict(counts)}, {len(faults)} wrong, {time.monotonic() - began:.0f} s",
        *faults,
        sep="\n",
    )
    assert not faults, "\n".join(faults)
    made = sum(number for what, number in counts.items() if " while " in what)
    in_training = sum(number for what, number in counts.items() if what.endswith("while training"))
    assert made == kills
    assert in_training > kills / 2, "most kills must hit training or writing"

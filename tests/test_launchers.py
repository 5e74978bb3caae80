"""Options of a launcher that the recipe does not contain are followed or refused, never ignored."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from distributed import launch
from trainers import STATEFUL, Trainers, only_run, write_recipe

from toolkit.distributed import failure_detection, launcher, precision
from toolkit.distributed.launcher import check_environment, check_launch, read_process_info
from toolkit.errors import UserError
from toolkit.recipe import load
from toolkit.recipe.schema import TrainConfig
from toolkit.training import fit

pytestmark = pytest.mark.long

BIN = Path(sys.executable).parent
TRAIN_COMMAND = ["-m", "toolkit.train", "recipe.toml", "--set", "train.epochs=1"]
Launched = Callable[..., None]


def trained(**values: Any) -> TrainConfig:
    return TrainConfig(epochs=1, batch_size=8, **values)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the variables of launchers and Accelerate's configuration file."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "SLURM_", "OMPI_", "PMI_", "MPI_", "MV2_", "MASTER_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Return a function that makes this process look like one of `accelerate launch OPTIONS -m toolkit.train ...`."""

    def started(*options: str, **environment: str) -> None:
        command = [sys.executable, str(BIN / "accelerate"), "launch", *options, *TRAIN_COMMAND]
        monkeypatch.setattr(launcher, "_ancestor_commands", lambda: iter([["bash"], command, ["init"]]))
        monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return started


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (["python", "/venv/bin/accelerate", "launch", "--cpu", "x.py"], ["--cpu", "x.py"]),
        (["/venv/bin/accelerate-launch", "--cpu", "x.py"], ["--cpu", "x.py"]),
        (["python", "-m", "accelerate.commands.launch", "x.py"], ["x.py"]),
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "x.py"], ["x.py"]),
        (["python", "-m", "toolkit.train", "accelerate", "launch"], None),
        (["accelerate", "config"], None),
        (["vim", "accelerate.commands.launch"], None),
        ([], None),
    ],
)
def test_command_lines_of_accelerate_launch_are_recognized(command: list[str], arguments: list[str] | None) -> None:
    if command[-1:] == ["launch"]:  # here "launch" is a recipe's name, an argument of toolkit.train
        command = [*command[:3], "recipe.toml", *command[3:]]
    assert launcher._launch_arguments(command) == arguments


OPTIONS: list[tuple[list[str], dict[str, Any], str]] = [
    (["--mixed_precision", "no"], {"precision": "bf16"}, "mixed_precision = no, but the recipe has "
     "train.precision = 'bf16'"),
    (["--gradient_accumulation_steps", "4"], {}, "gradient_accumulation_steps = 4, but the recipe has "
     "train.grad_accum_steps = 1"),
    (["--gradient_clipping", "1.0"], {}, "gradient_clipping = 1.0, but the recipe has no train.max_grad_norm"),
    (["--gradient_clipping", "1.0"], {"max_grad_norm": 2.5}, "gradient_clipping = 1.0, but the recipe has "
     "train.max_grad_norm = 2.5"),
    (["--dynamo_backend", "no"], {"compile": True}, "dynamo_backend = no, but the recipe has train.compile = true"),
    (["--dynamo_backend", "no"], {"cuda_graphs": True}, "dynamo_backend = no, but the recipe has "
     "train.cuda_graphs = true"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "table", "message"), OPTIONS)
def test_launcher_options_that_contradict_the_recipe_are_refused(
    launched: Launched, options: list[str], table: dict[str, Any], message: str
) -> None:
    launched(*options)
    with pytest.raises(UserError) as refused:
        check_launch(trained(**table))
    assert f"accelerate launch was given {message}" in str(refused.value)
    assert f"leave out {options[0]} " in str(refused.value)


@pytest.mark.parametrize(
    ("options", "table"),
    [
        ([], {"precision": "bf16", "grad_accum_steps": 4, "max_grad_norm": 1.0, "compile": True}),
        (["--mixed_precision", "no"], {"precision": "no"}),
        (["--mixed_precision", "no"], {"precision": "auto"}),
        (["--mixed_precision", "bf16"], {"precision": "bf16"}),
        (["--gradient_accumulation_steps", "4"], {"grad_accum_steps": 4}),
        (["--gradient_clipping", "1.0"], {"max_grad_norm": 1.0}),
        (["--dynamo_backend", "no"], {}),
        (["--num_processes", "1"], {}),
    ],
)
def test_launcher_options_that_agree_with_the_recipe_are_accepted(
    launched: Launched, options: list[str], table: dict[str, Any]
) -> None:
    launched(*options)
    check_launch(trained(**table))


def test_no_mixed_precision_contradicts_auto_if_auto_means_bf16(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "resolve_precision", lambda wanted: "bf16")
    launched("--mixed_precision", "no")
    with pytest.raises(
        UserError, match=r"the recipe has train\.precision = 'auto', which means 'bf16' on this machine"
    ):
        check_launch(trained(precision="auto"))


@pytest.mark.parametrize(
    ("variables", "table", "meant", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "no"}, "no", "mixed_precision = bf16, but the recipe "
         "has train.precision = 'no'."),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "auto"}, "no", "mixed_precision = bf16, but the recipe "
         "has train.precision = 'auto', which means 'no' on this machine."),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"precision": "bf16"}, "bf16", "mixed_precision = fp16, but"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "auto"}, "bf16", None),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16"}, "bf16", None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"precision": "bf16"}, "bf16", None),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "no", "dynamo_backend = inductor, but the recipe has "
         "train.compile = false."),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}, "no", None),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, {"compile": True}, "no", "dynamo_backend = eager, but the recipe has "
         "train.compile = true."),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "no", "gradient_accumulation_steps = 4, but"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "no", "the launcher is configured for FSDP"),
    ],
)  # fmt: skip
def test_variables_of_accelerate_that_contradict_the_recipe_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], table: dict[str, Any], meant: str, message: str | None
) -> None:
    """Including bf16 in Accelerate's default file, which is accepted if auto means bf16."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    train = trained(**table)
    if message is None:
        check_environment(train, meant)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            check_environment(train, meant)


# -- the number of processes ------------------------------------------------------------------------------------------


def configuration(path: Path, **values: object) -> Path:
    lines = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "'NO'", "num_machines": 1, **values}
    path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return path


@pytest.mark.parametrize("cpu", [False, True])
def test_processes_that_accelerate_did_not_start_are_reported(launched: Launched, cpu: bool) -> None:
    launched("--num_processes", "2", *(["--cpu"] if cpu else []), ACCELERATE_USE_CPU=str(cpu))
    with pytest.raises(UserError) as refused:
        check_launch(trained())
    text = str(refused.value)
    assert "accelerate launch was asked for 2 processes but started only this process" in text
    command = "torchrun --standalone --nproc-per-node 2 -m toolkit.train RECIPE"
    assert f"This command starts 2 processes: {'ACCELERATE_USE_CPU=true ' if cpu else ''}{command}" in text
    assert "accelerate launch --config_file launch/cpu.yaml --num_processes 2 -m toolkit.train RECIPE" in text


def test_a_program_that_calls_fit_is_refused_too(launched: Launched, tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path, STATEFUL)).recipe
    for options, message in (
        (("--mixed_precision", "fp16"), "accelerate launch was given mixed_precision = fp16"),
        (("--num_processes", "2"), "accelerate launch was asked for 2 processes but started only this process"),
    ):
        launched(*options)
        with pytest.raises(UserError, match=message):
            fit.fit(recipe)
    assert not list((tmp_path / "runs").iterdir())


def test_machines_that_would_each_train_alone_are_refused(launched: Launched) -> None:
    launched("--num_machines", "2", "--machine_rank", "0", "--main_process_ip", "node1")
    with pytest.raises(UserError) as refused:
        check_launch(trained())
    assert "accelerate launch was asked for 2 machines but started only this process" in str(refused.value)
    assert "launch/nodes.yaml --num_machines 2 -m toolkit.train RECIPE" in str(refused.value)


def test_several_started_processes_are_accepted(launched: Launched) -> None:
    launched("--multi_gpu", "--num_processes", "2", RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    check_launch(trained())


def test_the_number_of_processes_in_a_configuration_file_is_checked(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = configuration(tmp_path / "default.yaml", num_processes=3)
    launched("--config_file", str(path))
    with pytest.raises(UserError, match="was asked for 3 processes but started only this process"):
        check_launch(trained())
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(path))
    launched()
    with pytest.raises(UserError, match="was asked for 3 processes but started only this process"):
        check_launch(trained())
    launched("--cpu")  # with this option, Accelerate does not read the default file
    check_launch(trained())
    launched("--num_processes", "1")
    check_launch(trained())


def test_a_configuration_file_without_mixed_precision_is_accepted_with_a_note(
    launched: Launched, tmp_path: Path
) -> None:
    """`accelerate config` writes mixed_precision: 'no' if the user does not choose one."""
    path = configuration(tmp_path / "default.yaml", num_processes=1, mixed_precision="'no'")
    launched("--config_file", str(path), ACCELERATE_MIXED_PRECISION="no")
    check_launch(trained(precision="bf16"))
    check_environment(trained(precision="bf16"), "bf16")
    note = "note: Accelerate's configuration file has mixed_precision: no, but the recipe is used: bf16"
    assert launcher.unused_precision_line("bf16") == note
    assert launcher.unused_precision_line("no") is None
    launched("--config_file", str(configuration(path, num_processes=1)))
    assert launcher.unused_precision_line("bf16") is None


@pytest.mark.extended
def test_the_command_line_of_a_real_accelerate_launch_is_read(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, STATEFUL)
    command = [str(BIN / "accelerate"), "launch", "--num_processes", "2", "-m", "toolkit.train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "accelerate launch was asked for 2 processes but started only this process" in done.stderr
    assert "returned non-zero exit status 2" in done.stderr
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "setting", "message"),
    [
        (["--mixed_precision", "no"], 'train.precision="bf16"', "was given mixed_precision = no, but"),
        (["--mixed_precision", "bf16"], 'train.precision="auto"', "was given mixed_precision = bf16, but"),
        (["--gradient_accumulation_steps", "4"], "train.epochs=3", "was given gradient_accumulation_steps = 4, but"),
        (["--gradient_clipping", "2"], "train.epochs=3", "was given gradient_clipping = 2.0, but"),
        (["--dynamo_backend", "inductor"], "train.epochs=3", "was given dynamo_backend = inductor, but"),
        (
            ["--num_processes", "2", "--cpu"],
            "train.epochs=3",
            "was asked for 2 processes but started only this process",
        ),
    ],
)
def test_options_of_a_real_accelerate_launch_are_checked(
    tmp_path: Path, options: list[str], setting: str, message: str
) -> None:
    recipe = write_recipe(tmp_path, STATEFUL)
    train_command = ["-m", "toolkit.train", str(recipe), "--set", setting]
    command = [str(BIN / "accelerate"), "launch", *options, *train_command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert message in done.stderr
    assert "returned non-zero exit status 2" in done.stderr
    assert not list((tmp_path / "runs").iterdir())


# -- srun and mpirun --------------------------------------------------------------------------------------------------


def test_tasks_of_srun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        check_launch(trained())
    assert "srun started 2 tasks, each of which would train alone" in str(refused.value)
    assert "srun --ntasks 1 torchrun --standalone --nproc-per-node 2 -m toolkit.train RECIPE" in str(refused.value)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a script does that sets torchrun's variables itself
    check_launch(trained())


MPI = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
                 "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    "MVAPICH2": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
                 "MV2_COMM_WORLD_LOCAL_RANK"),
}  # fmt: skip


def under_mpirun(names: tuple[str, ...], size: int, rank: int, local_size: int, local_rank: int) -> dict[str, str]:
    return dict(zip(names, map(str, (size, rank, local_size, local_rank)), strict=True))


@pytest.mark.parametrize("names", MPI.values(), ids=MPI)
def test_the_variables_of_mpirun_give_rank_and_world_size(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(os, "environ", os.environ | under_mpirun(names, 4, 3, 4, 3))
    assert read_process_info() == launcher.ProcessInfo(3, 4, 3, "127.0.0.1", 29500, is_on_one_machine=True)
    assert launcher.is_distributed()


def test_mpirun_on_several_machines_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | under_mpirun(MPI["Open MPI"], 4, 3, 2, 1))
    with pytest.raises(UserError, match="started 4 processes on several machines, but MASTER_ADDR is not set"):
        read_process_info()
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert read_process_info() == launcher.ProcessInfo(3, 4, 1, "node1", 29500, is_on_one_machine=False)


def test_mpi_without_a_local_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {"PMI_SIZE": "2", "PMI_RANK": "1"})
    assert read_process_info() is None
    with pytest.raises(UserError, match="an MPI launcher started 2 processes but gave them no local rank"):
        check_launch(trained())


def test_processes_of_mpirun_train_one_run_together(tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        port = os.environ["MASTER_PORT"]
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        os.environ.update(under_mpirun(MPI["Open MPI"], 2, rank, 2, rank), MASTER_PORT=port)

    trainers = Trainers(2, tmp_path, write_recipe(tmp_path, STATEFUL), "--set", "train.epochs=2", prepare=prepare)
    assert trainers.wait() == [0, 0], trainers.text()
    assert only_run(tmp_path).summary["processes"] == 2


# -- exit ----------------------------------------------------------------------------------------------------------


def dry_run_and_exit(recipe: str) -> tuple[bool, bool]:
    fit.dry_run(load(recipe).recipe)
    return failure_detection.current is None, dist.is_initialized()


def test_a_dry_run_on_two_processes_ends_its_threads_and_process_group(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, STATEFUL))
    assert launch(2, dry_run_and_exit, recipe) == [(True, False), (True, False)]

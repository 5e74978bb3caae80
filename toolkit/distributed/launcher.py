"""Settings of the launcher (torchrun, accelerate launch, srun, mpirun), as seen by a process that it started.

This module does not import torch, so that wrong settings are reported immediately.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.recipe.schema import TrainConfig

MPI_VARIABLES = {
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
}
"""torchrun's environment variables, and the equivalents of Open MPI, MPICH (also Intel MPI) and MVAPICH2."""
MPI_PORT = "29500"
"""MASTER_PORT under mpirun, which does not set it; also torchrun's default."""


@dataclass(frozen=True)
class ProcessInfo:
    """Rank of this process and rendezvous address, from torchrun's environment variables."""

    rank: int
    world: int
    """Number of processes of the run."""
    local_rank: int
    address: str
    port: int
    """Port of the store through which the processes find each other, served by rank 0 or by torchrun's agent."""
    is_on_one_machine: bool
    """Whether all processes of the run are on this machine."""


def read_process_info() -> ProcessInfo | None:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; return None for a single process.

    Under mpirun these are first set from MPI's own variables. Raises UserError if a variable is missing, not a number,
    or out of range.
    """
    _translate_mpi_variables()
    if not any(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    world = _number("WORLD_SIZE", 1, None, 1)
    rank = _number("RANK", 0, world - 1, 0)
    if world == 1 and not os.environ.get("LOCAL_RANK"):
        return None
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        given = [f"{name}={os.environ[name]}" for name in needed if name not in missing]
        raise UserError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}: a process of a distributed run "
            "needs all of them. Start it with torchrun or accelerate launch, which set them, or unset them to train "
            "alone"
        )
    local_world = _number("LOCAL_WORLD_SIZE", 1, world, world)
    address = os.environ["MASTER_ADDR"].strip()
    is_loopback = address in ("localhost", "::1") or address.startswith("127.")
    return ProcessInfo(
        rank,
        world,
        _number("LOCAL_RANK", 0, local_world - 1, 0),
        address,
        _number("MASTER_PORT", 1, 65535, 1),
        is_loopback or ("LOCAL_WORLD_SIZE" in os.environ and local_world == world),
    )


def _translate_mpi_variables() -> None:
    """Set torchrun's variables from those of mpirun, because all other modules read only torchrun's.

    Accelerate would do this too, but only on CPUs, without a time limit, and after the rank is first needed.
    """
    if any(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) or _mpi_size() < 2:
        return
    found = {name: next((os.environ[some] for some in names if os.environ.get(some)), None)
             for name, names in MPI_VARIABLES.items()}  # fmt: skip
    values = {name: value for name, value in found.items() if value is not None}
    if len(values) < len(MPI_VARIABLES):
        return  # check_launch refuses this
    if values["LOCAL_WORLD_SIZE"] == values["WORLD_SIZE"]:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    elif not os.environ.get("MASTER_ADDR"):
        raise UserError(
            f"mpirun started {values['WORLD_SIZE']} processes on several machines, but MASTER_ADDR is not set: set it "
            "to a host name of the machine of rank 0 that the others can reach, e.g. mpirun -x MASTER_ADDR=HOST"
        )
    os.environ.setdefault("MASTER_PORT", MPI_PORT)
    os.environ.update(values)


def _mpi_size() -> int:
    """Return the number of processes that mpirun started; 0 without mpirun."""
    return max(positive_number(name) for name in MPI_VARIABLES["WORLD_SIZE"])


def _number(name: str, lowest: int, highest: int | None, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if name == "MASTER_PORT" and text == "0":
        raise UserError(
            "MASTER_PORT = 0: each process would choose a port of its own, so they could not find each other. "
            "With torchrun, use --standalone instead of --master-port 0, or set a free port, e.g. --master-port 29501"
        )
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name} = {text!r} in the environment is not a whole number; the launcher sets it")
    value = int(text)
    if value < lowest or (highest is not None and value > highest):
        sizes = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE", "LOCAL_WORLD_SIZE": "WORLD_SIZE"}
        limit = f"from {lowest} to {highest}" if highest is not None else f"{lowest} or more"
        size = f" ({sizes[name]} is {os.environ.get(sizes[name], 'not set')})" if name in sizes else ""
        raise UserError(f"{name} = {value} in the environment is out of range: it must be {limit}{size}")
    return value


def is_distributed() -> bool:
    """Return whether WORLD_SIZE is greater than 1. Never raises, because error handlers call it."""
    text = os.environ.get("WORLD_SIZE", "").strip()
    return text.isascii() and text.isdigit() and int(text) > 1


def check_launch(train: TrainConfig) -> None:
    """Compare the launcher's settings with the recipe and with the number of processes.

    Raises UserError if an option of `accelerate launch` contradicts the recipe, or if several processes were requested
    but each would train alone.
    """
    check_accelerate_launch(train)
    _check_task_count()


def check_accelerate_launch(train: TrainConfig) -> None:
    """Raise UserError if options of `accelerate launch` contradict the recipe or the number of processes."""
    options = accelerate_options()
    if options is not None:
        _check_options(options, train)
        _check_accelerate_count(options)


def _settings(train: TrainConfig, precision: str) -> list[tuple[str, str, object, str]]:
    """Return the options of `accelerate launch` that the recipe determines: (option, its default, value, recipe key).

    ``precision``: what train.precision means on this machine.
    """
    is_auto = train.precision == "auto"
    compiled = "train.cuda_graphs = true" if train.cuda_graphs else f"train.compile = {str(train.compile).lower()}"
    clipping = train.max_grad_norm
    return [
        ("mixed_precision", "no", precision, f"train.precision = {train.precision!r}"
         + (f", which means {precision!r} on this machine" if is_auto else "")),
        ("gradient_accumulation_steps", "1", train.grad_accum_steps,
         f"train.grad_accum_steps = {train.grad_accum_steps}"),
        ("dynamo_backend", "no", "inductor" if train.compile or train.cuda_graphs else "no", compiled),
        ("gradient_clipping", "none", clipping,
         "no train.max_grad_norm" if clipping is None else f"train.max_grad_norm = {clipping:g}"),
    ]  # fmt: skip


def _check_options(options: argparse.Namespace, train: TrainConfig) -> None:
    """Raise UserError for options of `accelerate launch` that contradict the recipe."""
    from toolkit.distributed.precision import resolve_precision

    for option, _, value, recipe in _settings(train, resolve_precision(train.precision)):
        found = getattr(options, option)
        found = found.lower() if isinstance(found, str) else found
        if found not in (None, value):
            raise _contradiction(option, found, recipe)


def check_environment(train: TrainConfig, precision: str) -> None:
    """Raise UserError if Accelerate's environment variables, which a configuration file may set, contradict the recipe.

    A variable with Accelerate's default is not compared, because Accelerate also sets it if the option was not given.
    DeepSpeed, FSDP and Megatron-LM are refused. ``precision``: what train.precision means on this machine.
    """
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP"),
                           ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):  # fmt: skip
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise UserError(
                f"the launcher is configured for {name}, but the toolkit trains with DDP: "
                f"remove {name} from the settings"
            )
    for option, default, value, recipe in _settings(train, precision):
        found = os.environ.get(f"ACCELERATE_{option.upper()}", default).lower()
        if found not in (default, str(value)):
            raise _contradiction(option, found, recipe)


def _contradiction(option: str, value: object, recipe: str) -> UserError:
    return UserError(
        f"accelerate launch was given {option} = {value}, but the recipe has {recipe}. These settings come from the "
        f"recipe alone: leave out --{option} (or the line {option} of Accelerate's configuration file), or change the "
        "recipe, for instance with --set"
    )


def _check_accelerate_count(options: argparse.Namespace) -> None:
    """Raise UserError if `accelerate launch --num_processes N` silently started one process, as without --multi_gpu."""
    if os.environ.get("RANK") or _mpi_size() > 1:
        return
    processes, machines = _requested_count(options, "num_processes"), _requested_count(options, "num_machines")
    if max(processes, machines) < 2:
        return
    program = "-m toolkit.train RECIPE"
    cpu = "ACCELERATE_USE_CPU=true " if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" else ""
    if machines > 1:
        asked = f"{machines} machines"
        command = (
            f"{cpu}accelerate launch --config_file launch/nodes.yaml --num_machines {machines} {program} "
            "(toolkit recipes copy launch/nodes.yaml writes the file)"
        )
    else:
        asked = f"{processes} processes"
        command = (
            f"{cpu}torchrun --standalone --nproc-per-node {processes} {program} "
            f"(or accelerate launch --config_file launch/cpu.yaml --num_processes {processes} {program}, "
            "with the file that toolkit recipes copy launch/cpu.yaml writes)"
        )
    raise UserError(
        f"accelerate launch was asked for {asked} but started only this process, which would train alone: with --cpu, "
        "with distributed_type NO or MULTI_CPU, and if it finds fewer than two GPUs, it starts several only through "
        f"MPI. This command starts {asked}: {command}; to train on one process, give --num_processes 1 "
        "--num_machines 1"
    )


def _requested_count(options: argparse.Namespace, name: str) -> int:
    """Return num_processes or num_machines from the option or else from Accelerate's configuration file; 0 if unset."""
    value = getattr(options, name)
    if value is None and (configuration := _configuration(options)) is not None:
        value = getattr(configuration, name)
    return int(value or 0)


def _configuration(options: argparse.Namespace) -> Any:
    """Load the configuration file that `accelerate launch` has read; None if there is none."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    # As in Accelerate, the default file is not read with --cpu.
    if options.config_file is None and (options.cpu or not os.path.isfile(default_config_file)):
        return None
    with contextlib.suppress(Exception):  # unreadable from here, e.g. a relative path
        return load_config_from_file(options.config_file)
    return None


def unused_precision_line(precision: str) -> str | None:
    """Return a note if Accelerate's configuration file has mixed_precision: no but ``precision`` is used; else None.

    This is not an error, because `accelerate config` writes that line by default.
    """
    options = accelerate_options() if precision != "no" else None
    if options is None or options.mixed_precision is not None:
        return None
    configuration = _configuration(options)
    if configuration is None or str(configuration.mixed_precision) != "no":
        return None
    return f"note: Accelerate's configuration file has mixed_precision: no, but the recipe is used: {precision}"


def accelerate_options() -> argparse.Namespace | None:
    """Return the options of the `accelerate launch` that started this process; None if none did.

    They are read from the command lines of this process's ancestors, because the environment is not enough: Accelerate
    sets the same variables for defaults as for explicit options, and none for --num_processes and
    --gradient_accumulation_steps.
    """
    if "ACCELERATE_DYNAMO_MODE" not in os.environ:  # accelerate launch always sets it
        return None
    for command in _ancestor_commands():
        arguments = _launch_arguments(command)
        if arguments is not None:
            from accelerate.commands.launch import launch_command_parser

            with contextlib.suppress(SystemExit, argparse.ArgumentError):  # another version's options
                options: argparse.Namespace = launch_command_parser().parse_args(arguments)
                return options
    return None


def _ancestor_commands() -> Iterator[list[str]]:
    import psutil

    with contextlib.suppress(psutil.Error):
        for ancestor in psutil.Process().parents():
            yield ancestor.cmdline()


def _launch_arguments(command: list[str]) -> list[str] | None:
    """Return the arguments after `accelerate launch`, `accelerate-launch` or `-m accelerate.commands.launch`."""
    for position, word in enumerate(command[:4]):
        name = os.path.basename(word)
        if name == "accelerate-launch" or (word == "accelerate.commands.launch" and command[position - 1] == "-m"):
            return command[position + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command[position + 1 :][:1] == ["launch"]:
            return command[position + 2 :]
    return None


def _check_task_count() -> None:
    """Raise UserError if srun or mpirun started several tasks without torchrun's variables: each would train alone."""
    if os.environ.get("WORLD_SIZE"):
        return
    tasks = positive_number("SLURM_STEP_NUM_TASKS") if "SLURM_STEP_ID" in os.environ else 0
    if tasks > 1:
        raise UserError(
            f"srun started {tasks} tasks, each of which would train alone in a run directory of its own. To train one "
            f"run on {tasks} processes: {_commands_for(tasks, 'SLURM_STEP_NUM_NODES', 'srun --ntasks 1 ')}. "
            "To train on one process: srun --ntasks 1"
        )
    if (size := _mpi_size()) > 1:
        raise UserError(
            f"an MPI launcher started {size} processes but gave them no local rank, so each would train alone in a run "
            f"directory of its own: use torchrun --standalone --nproc-per-node {size} -m toolkit.train RECIPE"
        )


def unused_tasks_line() -> str | None:
    """Return a note for a single process, started without srun, in a SLURM job with several tasks; else None."""
    tasks = positive_number("SLURM_NTASKS")
    if tasks < 2 or "SLURM_STEP_ID" in os.environ or is_distributed():
        return None
    return (
        f"note: SLURM granted {tasks} tasks, but this is a single process: it was started without srun. To train on "
        f"{tasks} processes: {_commands_for(tasks, 'SLURM_JOB_NUM_NODES', '')}"
    )


def _commands_for(tasks: int, nodes_variable: str, prefix: str) -> str:
    """Return commands that start ``tasks`` processes of one run on the nodes that SLURM allocated."""
    nodes = max(1, positive_number(nodes_variable))
    here = f"{prefix}torchrun --standalone --nproc-per-node {tasks} -m toolkit.train RECIPE"
    submit = f"toolkit submit RECIPE --nodes {nodes} --processes-per-node {-(-tasks // nodes)} (or --gpus-per-node)"
    return f"{submit}, or in this job {here}" if nodes == 1 else submit


def positive_number(name: str) -> int:
    """Return a whole number from an environment variable, 0 if it is unset or not a number. Never raises."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else 0

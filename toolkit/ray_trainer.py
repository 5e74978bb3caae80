"""Train a recipe on a Ray cluster: `toolkit submit RECIPE --to ray`.

Ray Train starts the processes with torchrun's environment variables, and starts all of them again after one was lost.
Each of them calls :func:`toolkit.training.fit.fit` with the same run directory, which is therefore created beforehand
and must be on a file system that all nodes share. Ray's own checkpoints are not used. The command's process waits for
the end, and forwards stop requests through the stop file. Importing this module imports neither torch nor ray.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from toolkit.data.sampling import check_batch_size
from toolkit.distributed.signals import STOP_FILE, GracefulStop
from toolkit.error_handling import is_first_process, run_with_error_handling
from toolkit.errors import EXIT_INTERRUPTED, EXIT_OK, Interrupted, RunFailed, UserError, first_line, missing_package
from toolkit.formatting import plural
from toolkit.reading import read_json
from toolkit.recipe import Recipe, loads_recipe, resolved_toml
from toolkit.runs import Run, create_run, open_run, runs_of

STARTS = "ray/starts"
"""File of the run directory with one line for each start of the processes: host and process id of rank 0."""
OUTCOME = "ray/outcome.json"
"""File of the run directory with exit status and message, if training ended for a reason that a restart would not
change."""
MAX_RESTARTS = 3
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # reports to Ray's authors
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints every line twice
    # A warning each second if Ray runs without its dashboard.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Failed to query Ray Train Controller actor state",
}
"""Environment variables of Ray, unless they are set already."""
POLL_S = 0.5


def train(recipe: Recipe, origins: dict[str, Any], *, processes: int | None = None, resume: str | None = None) -> Run:
    """Train a recipe on a Ray cluster, wait for the end, and return the finished run.

    The cluster is that of RAY_ADDRESS, or the one that runs on this machine; without either, Ray is started here for
    this run. There is one process for each GPU of the cluster, or one without GPUs, unless ``processes`` says
    otherwise. ``resume``: a run directory, or "auto" for the recipe's most recent unfinished run.

    Raises UserError, RunFailed (also if processes were lost more often than slurm.max_restarts, by default 3 times)
    and Interrupted, as :func:`toolkit.training.fit.fit` does.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)  # before the import, which reads some of them
    try:
        import ray
        import ray.train
    except ImportError:
        raise missing_package("toolkit submit --to ray", "ray[train]", "ray") from None
    ray.init(include_dashboard=False, logging_level="warning")
    try:
        scaling = _scaling(ray.cluster_resources(), processes)
        check_batch_size(recipe.train, scaling.num_workers)
        run = _run_to_train(recipe, origins, resume)
        print(f"run directory {run.path}", file=sys.stderr, flush=True)
        _wait_for(run, functools.partial(_fit_with_ray, recipe, run, scaling))
    finally:
        ray.shutdown()
    return run


def _scaling(resources: dict[str, float], processes: int | None) -> Any:
    """Return Ray's configuration of the processes, and print a line if the cluster is too small for them now."""
    from ray.train import ScalingConfig

    gpus = 0 if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") else int(resources.get("GPU", 0))
    processes = processes or max(1, gpus)
    kind, found = ("GPU", gpus) if gpus else ("CPU", int(resources.get("CPU", 0)))
    print(f"Ray: {plural(processes, 'process', 'processes')}, one {kind} each", file=sys.stderr)
    if found < processes:
        print(f"the Ray cluster has {found} {kind}s now; training starts when it has {processes}", file=sys.stderr)
    return ScalingConfig(num_workers=processes, use_gpu=gpus > 0)


def _run_to_train(recipe: Recipe, origins: dict[str, Any], resume: str | None) -> Run:
    """Return the run to resume or a new one, without traces of an earlier submission."""
    root, name = str(Path(recipe.recipe.run_root).absolute()), recipe.recipe.name
    run = None
    if resume == "auto":
        run = next((run for run in runs_of(root, name) if not run.is_finished), None)
    elif resume is not None:
        run = Run(open_run(resume).path.absolute())
    if run is None:
        run = create_run(root, name)
        run.write_text("recipe.toml", resolved_toml(recipe))
        run.write_json("origins.json", origins)
    if run.is_finished:
        raise UserError(f"{run.path} is finished: there is nothing to resume")
    shutil.rmtree(run.path / "ray", ignore_errors=True)
    (run.path / "ray").mkdir()
    return run


def _fit_with_ray(recipe: Recipe, run: Run, scaling: Any) -> None:
    """Train on Ray's workers; raise Ray's TrainingFailedError if they were lost too often."""
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    restarts = None if recipe.slurm is None else recipe.slurm.max_restarts
    settings = {
        "run": str(run.path),
        "recipe": resolved_toml(recipe),
        "folder": os.getcwd(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("TOOLKIT_")}
        | ({} if scaling.use_gpu else {"ACCELERATE_USE_CPU": "true"}),
    }
    TorchTrainer(
        train_on_worker,
        train_loop_config=settings,
        scaling_config=scaling,
        run_config=RunConfig(
            name=run.id,
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(max_failures=MAX_RESTARTS if restarts is None else restarts),
        ),
    ).fit()


def _wait_for(run: Run, work: Any) -> None:
    """Call ``work`` in a thread, create the stop file when this process is to stop, and raise the run's error."""
    errors: list[Exception] = []

    def call() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    # Not in the main thread, where Ray handles SIGINT by ending the processes without a checkpoint.
    thread = threading.Thread(target=call, daemon=True)
    with GracefulStop() as stop:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if stop.is_wanted() and thread.is_alive():
                if not (run.path / STARTS).exists():
                    raise Interrupted(f"stopped by {stop.reason} before Ray had started the processes of {run.path}")
                (run.path / STOP_FILE).touch()  # again and again, because starting processes remove an old one
    (run.path / STOP_FILE).unlink(missing_ok=True)
    if (outcome := _outcome(run)) is not None:
        _raise(run, outcome["status"], outcome["message"])
    if errors:
        failures = getattr(errors[0], "worker_failures", {})
        reason = "; ".join(f"rank {rank}: {first_line(error)}" for rank, error in sorted(failures.items()))
        raise RunFailed(
            f"Ray gave up: {reason or first_line(errors[0])}\nThe last checkpoint is kept; continue with --resume "
            f"{run.path}. --max-restarts N allows more restarts"
        )


def _raise(run: Run, status: int, message: str) -> None:
    """Raise the error that ended the processes; one that prevented any training removes the new run directory."""
    if status == EXIT_INTERRUPTED:
        raise Interrupted(f"{message}\nor, on Ray: toolkit submit RECIPE --to ray --resume {run.path}")
    if status == UserError.exit_status:
        if not run.log_file.exists():
            shutil.rmtree(run.path)
        raise UserError(message)
    raise RunFailed(message)


def _outcome(run: Run) -> dict[str, Any] | None:
    path = run.path / OUTCOME
    return read_json(path) if path.exists() else None


# -- on the workers -----------------------------------------------------------------------------------------------


def train_on_worker(settings: dict[str, Any]) -> None:
    """Train in one of Ray's processes: the training function of TorchTrainer.

    An exception makes Ray start all processes again. An error that would then occur again, and a stop request, are
    recorded in the run directory instead, for the process that waits and for restarted processes, which then return.
    """
    run = Run(Path(settings["run"]))
    if not run.path.is_dir():
        raise RuntimeError(
            f"{socket.gethostname()} does not see {run.path}: recipe.run_root must be on a file system that all nodes "
            "share"
        )
    if _outcome(run) is not None:
        return
    os.environ.update(settings["environment"])
    status = run_with_error_handling(lambda: _fit(run, settings))
    if status != EXIT_OK and _outcome(run) is None:
        raise RuntimeError(f"the process on {socket.gethostname()} failed; its message is in the output above")


def _fit(run: Run, settings: dict[str, Any]) -> None:
    from toolkit.distributed import failure_detection
    from toolkit.slurm.job_worker import wait_for_run
    from toolkit.training import fit

    failure_detection.on_leave = functools.partial(_record_silence, run)
    try:
        with contextlib.suppress(FileNotFoundError):  # only needed if the recipe has relative paths
            os.chdir(settings["folder"])
        if is_first_process():
            wait_for_run(run)  # processes of the previous start may not have ended yet
            with open(run.path / STARTS, "a", encoding="utf-8") as starts:
                starts.write(f"{socket.gethostname()} {os.getpid()}\n")
        fit.fit(loads_recipe(settings["recipe"]), resume=run.path)
    except (UserError, RunFailed, Interrupted) as error:
        _record(run, error.exit_status, str(error))
        raise


def _record(run: Run, status: int, message: str) -> None:
    if is_first_process() or _outcome(run) is None:
        run.write_json(OUTCOME, {"status": status, "message": message})


def _record_silence(run: Run, status: int, message: str) -> None:
    """Record that a stop was requested and another process did not answer; after a loss, processes start again."""
    if status == EXIT_INTERRUPTED:
        _record(run, status, message)

"""Accelerate's MLflow tracker, changed so that a resumed run continues its MLflow run."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from accelerate.tracking import MLflowTracker

from toolkit.errors import EXIT_OK, Interrupted, UserError, first_line
from toolkit.recipe.schema import Recipe
from toolkit.runs import Run

DATABASE = "mlflow.db"
"""MLflow's database in a run directory, used without ``MLFLOW_TRACKING_URI``."""


class MLflowRun(MLflowTracker):  # type: ignore[misc]  # Accelerate's classes have no types
    """Accelerate's MLflow tracker; a resumed run continues its MLflow run.

    MLflow chooses the ids of its runs, so the run is found by its tag ``toolkit.run``. All methods must be called in
    the same thread.
    """

    def __init__(self, recipe: Recipe, folder: Path, run_id: str) -> None:
        table = recipe.tracking
        notes = table.notes or recipe.recipe.description
        super().__init__(table.project, run_name=table.run_name or run_id, description=notes)
        own = {"toolkit.run": run_id, "group": table.group or recipe.recipe.name, "tags": ", ".join(table.tags)}
        self.tags: dict[str, str] = (self.tags or {}) | {key: value for key, value in own.items() if value}
        self.database, self.key = folder.absolute() / DATABASE, run_id
        self.params: set[str] = set()
        self.last_steps: dict[str, int] = {}
        """Params of the MLflow run, and the last logged step of each metric."""

    def start(self) -> None:
        """Start a run at ``MLFLOW_TRACKING_URI`` (default: a database in the run directory), or continue it."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout is reserved for results
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(uri or f"sqlite:///{self.database}")
        if not uri:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # set by MLflow, but the next run has its own database
        client = mlflow.MlflowClient()
        with contextlib.suppress(mlflow.MlflowException):  # it exists; another run may create it at the same time
            client.create_experiment(self.experiment_name)
        experiment = client.get_experiment_by_name(self.experiment_name).experiment_id
        for run in client.search_runs([experiment], f"tags.`toolkit.run` = '{self.key}'", max_results=1):
            self.run_id, self.params = run.info.run_id, set(run.data.params)
            for key in run.data.metrics:
                self.last_steps[key] = max(one.step for one in client.get_metric_history(self.run_id, key))
        super().start()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Log params that the run does not have yet; MLflow does not allow changing logged params."""
        super().store_init_configuration({key: value for key, value in values.items() if key not in self.params})

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log the numbers in ``values``, except for steps that were already logged before the run was resumed."""
        new = {key: value for key, value in values.items() if step is None or step > self.last_steps.get(key, -1)}
        super().log({key: value for key, value in new.items() if isinstance(value, (int, float))}, step=step, **kwargs)

    def end(self, exit_code: int) -> None:
        """End the run as FINISHED, KILLED (interrupted) or FAILED."""
        import mlflow

        mlflow.end_run({EXIT_OK: "FINISHED", Interrupted.exit_status: "KILLED"}.get(exit_code, "FAILED"))


def end_open_run(run: Run) -> bool:
    """End the MLflow run of a finished run, with its final metrics; return whether it was still open.

    That happens if the process is killed after it wrote the summary and before it closed its trackers. Raises UserError
    if MLflow's server or database does not respond.
    """
    server, database = os.environ.get("MLFLOW_TRACKING_URI"), run.path.absolute() / DATABASE
    if not run.is_finished or not (server or database.exists()):
        return False
    recipe = run.recipe
    if "mlflow" not in recipe.tracking.trackers:
        return False
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its default retries for minutes
    from toolkit.trackers import flatten  # which imports this module

    metrics = {key: value for key, value in flatten(run.summary).items() if isinstance(value, (int, float))}
    try:
        import mlflow

        client = mlflow.MlflowClient(server or f"sqlite:///{database}")
        experiment = client.get_experiment_by_name(recipe.tracking.project)
        tag = f"tags.`toolkit.run` = '{recipe.recipe.name}-{run.id}'"
        found = client.search_runs([experiment.experiment_id], tag) if experiment else []
        still_open = [one.info.run_id for one in found if one.info.status == "RUNNING"]
        for run_id in still_open:
            for key, value in metrics.items():
                client.log_metric(run_id, key, value)
            client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # of the client, its HTTP library or the database
        raise UserError(
            f"{run.path}: MLflow could not be asked whether its run is open: {first_line(error)}"
        ) from error
    return bool(still_open)

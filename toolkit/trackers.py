"""W&B, TensorBoard and MLflow, through Accelerate's trackers. They get a copy of metrics.jsonl, the primary record.

W&B is online if there is a login and its server responds, otherwise offline; it never prompts. Each tracker has its own
thread, so that training does not wait for it. Any failure results in one warning, and training continues.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import queue
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from accelerate import Accelerator

from toolkit.errors import Interrupted, UserError, first_line
from toolkit.mlflow_tracker import MLflowRun
from toolkit.recipe.schema import Recipe
from toolkit.runs import Run
from toolkit.wandb_results import record_step, results_step, send_results, uploads

CONNECT_SECONDS = 3
INIT_SECONDS = 15
MAX_LABEL = 128
"""Maximum length of a run's name and job type on W&B."""
OFFLINE_ATTEMPTS, OFFLINE_PAUSE_S = 10, 3.0
FINISH_SECONDS = 7
"""Seconds to wait for uploads at the end: a stopped run must exit within 10 s. `toolkit sync` can upload the rest."""
LEAVE_SECONDS = FINISH_SECONDS + 0.5
"""Maximum number of seconds for closing all trackers, in case one hangs in its client."""
UPLOAD_SECONDS = 300
"""Maximum number of seconds to wait for the upload of a finished run's results. The other processes wait in a barrier
meanwhile, which NCCL ends after ten minutes. `toolkit sync` can upload the rest."""
TENSORBOARD_SECONDS = 60
"""Maximum number of seconds to wait until TensorBoard's files have a finished run's results."""
BACKLOG = 100_000
"""Maximum number of lines queued for a slow tracker; about 50 MB."""

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow-skinny"}
"""Package to install for each tracker; the module has the tracker's name."""

Call = Callable[[Any], None]
"""Function that performs an operation on one of Accelerate's trackers."""


def require_packages(trackers: Sequence[str]) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f'tracking.trackers: "{name}" is not installed: pip install {PACKAGES[name]}')


class TrackerThread:
    """Background thread that makes the calls to one tracker, in order."""

    def __init__(self, tracker: Any, log: Callable[[str], None]) -> None:
        self.tracker, self.log_message = tracker, log
        self.failed = False
        self.calls: queue.SimpleQueue[tuple[Call, bool]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, call: Call) -> None:
        """Queue a call; after a failure calls are dropped."""
        if self.calls.qsize() >= BACKLOG:
            self._fail(f"{BACKLOG} lines are waiting")
        if not self.failed:
            self.calls.put((call, False))

    def close(self, call: Call) -> None:
        """Queue the last call, which is made even after a failure."""
        self.calls.put((call, True))

    def wait(self, seconds: float) -> None:
        """Wait at most ``seconds`` for the last call."""
        self.thread.join(max(0.0, seconds))
        if self.thread.is_alive():
            self._fail("it did not close in time")

    def _work(self) -> None:
        is_last = False
        while not is_last:
            call, is_last = self.calls.get()
            if is_last or not self.failed:
                try:
                    call(self.tracker)
                except Exception as error:  # whatever a tracker raises must not end a training run
                    self._fail(first_line(error))

    def _fail(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            self.log_message(f"warning: {self.tracker.name} logging has stopped ({reason}); metrics.jsonl is complete")


class Tracking:
    """The trackers of one run. Every process may create one; only the main process logs."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe, folder: Path, run_id: str, log: Callable[[str], None]):
        self.accelerator = accelerator
        self.names: list[str] = list(recipe.tracking.trackers) if accelerator.is_main_process else []
        self.log_message = log
        self.threads: list[TrackerThread] = []
        self.wandb_mode, self.offline_reason = "", ""
        self.results_of: Run | None = None
        """The run whose results W&B has been given."""
        self.has_results = "results" in uploads(Run(folder)) if self.names else False
        """Whether trackers get more than metrics."""
        if "wandb" in self.names:
            self.wandb_mode, self.offline_reason = wandb_mode(recipe.tracking.mode)
            if self.wandb_mode == "disabled":
                self.names.remove("wandb")
            elif self.offline_reason:
                log(f"W&B is offline: {self.offline_reason}. To upload later: toolkit sync {folder}")
        config = flatten(recipe.model_dump(mode="json", exclude_none=True))
        if set(self.names) - {"mlflow"}:
            self._start(recipe, folder, run_id, config)
        if "mlflow" in self.names:
            self._start_mlflow(MLflowRun(recipe, folder, run_id), config)

    def _start_mlflow(self, tracker: MLflowRun, config: dict[str, Any]) -> None:
        """Start MLflow in its own thread, because its client has one active run per thread.

        Waits for at most ``INIT_SECONDS``: data workers should not be forked while the thread imports modules.
        """
        started = threading.Event()

        def start(tracker: Any) -> None:
            try:
                tracker.start()
                tracker.store_init_configuration(config)
            finally:
                started.set()

        self.threads.append(TrackerThread(tracker, self.log_message))
        self.threads[-1].submit(start)
        started.wait(INIT_SECONDS)

    def _start(self, recipe: Recipe, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        settings = wandb_settings(recipe, Run(folder), run_id, self.wandb_mode, folder)
        self.accelerator.log_with = _tracker_types([name for name in self.names if name != "mlflow"])
        try:
            self._init(recipe, settings, config, folder)
        except Exception as error:  # whatever a tracker raises must not end a training run
            if self.wandb_mode != "online":
                self._fail(error)
                return
            self.offline_reason = f"W&B did not respond ({first_line(error)})"
            self.log_message(f"{self.offline_reason}; logging offline instead")
            self.wandb_mode = settings["mode"] = "offline"
            self._init_offline(recipe, settings, config, folder)

    def _init_offline(self, recipe: Recipe, settings: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
        """Start W&B offline after its server did not respond.

        Retries, because the client that is still waiting for the server keeps the run's id for a while.
        """
        import wandb

        for attempt in range(OFFLINE_ATTEMPTS):
            try:
                wandb.teardown()
                self._init(recipe, settings, config, folder)
                return
            except Exception as error:
                if attempt == OFFLINE_ATTEMPTS - 1:
                    self._fail(error)
                else:
                    time.sleep(OFFLINE_PAUSE_S)

    def _fail(self, error: Exception) -> None:
        self.log_message(f"warning: the trackers could not start ({first_line(error)}); metrics.jsonl is complete")

    def _init(self, recipe: Recipe, wandb: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
        # Accelerate passes one project name to all trackers, which TensorBoard uses as a folder name.
        self.accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
        self.accelerator.trackers = []
        if "tensorboard" in self.names:
            config = scalars(config)
        self.accelerator.init_trackers(recipe.tracking.project, config, {"wandb": wandb})
        if "wandb" in self.names:
            define_axes(self.accelerator.get_tracker("wandb", unwrap=True))
        self.threads = [TrackerThread(tracker, self.log_message) for tracker in self.accelerator.trackers]

    def log(self, record: dict[str, Any], step: int) -> None:
        """Log one line of metrics.jsonl; ``step`` is the number of optimizer steps so far."""
        for thread in self.threads:
            thread.submit(lambda tracker: tracker.log(record, step=step))

    def log_text(self, text: str) -> None:
        """Add a message of the run to its console output on W&B, which can be read there during training."""
        for thread in self.threads:
            if self.has_results and thread.tracker.name == "wandb":
                thread.submit(lambda tracker: tracker.tracker.write_logs(text))

    def summarize(self, metrics: dict[str, Any]) -> None:
        """Add the run's final metrics to W&B's summary and to MLflow's metrics."""
        flat = flatten(metrics)
        for thread in self.threads:
            if thread.tracker.name == "wandb":
                thread.submit(lambda tracker: tracker.tracker.summary.update(flat))
            elif thread.tracker.name == "mlflow":
                thread.submit(lambda tracker: tracker.log(flat))

    def send_results(self, run: Run, is_stopped: Callable[[], bool]) -> None:
        """Give TensorBoard and W&B the results of a finished run, and wait for the upload until a stop is requested.

        W&B gets nothing if it is offline without being asked to: `toolkit sync` creates them when it uploads the run.
        """
        self._log_to_tensorboard(run, is_stopped)
        thread = next((thread for thread in self.threads if thread.tracker.name == "wandb"), None)
        if thread is None or self.offline_reason:
            return
        is_done, is_abandoned = threading.Event(), threading.Event()

        def send(tracker: Any) -> None:
            try:
                if uploads(run):
                    send_results(tracker.tracker, run, results_step(run), self.log_message, is_abandoned.is_set)
                    self.results_of = None if is_abandoned.is_set() else run
            except Exception as error:  # whatever fails here must not end a training run
                reason = f"{first_line(error)}); toolkit sync {run.path} tries again"
                self.log_message(f"warning: W&B did not get the run's tables, images and artifacts ({reason}")
            finally:
                is_done.set()

        thread.submit(send)
        deadline = time.monotonic() + UPLOAD_SECONDS
        while not is_done.wait(0.1) and not thread.failed:
            if is_stopped() or time.monotonic() > deadline:
                is_abandoned.set()
                self.log_message(f"W&B has not received everything; to upload the rest: toolkit sync {run.path}")
                return

    def _log_to_tensorboard(self, run: Run, is_stopped: Callable[[], bool]) -> None:
        thread = next((thread for thread in self.threads if thread.tracker.name == "tensorboard"), None)
        if thread is None or not self.has_results:
            return
        is_done = threading.Event()

        def log(tracker: Any) -> None:
            from toolkit.tensorboard_results import log_results

            try:
                log_results(tracker.tracker, run)
            finally:
                is_done.set()

        thread.submit(log)
        deadline = time.monotonic() + TENSORBOARD_SECONDS
        while not (is_done.wait(0.1) or thread.failed or is_stopped() or time.monotonic() > deadline):
            pass

    def finish(self, exit_code: int) -> None:
        """Close the trackers with the run's exit status (0 done, 3 interrupted, else failed)."""
        for thread in self.threads:
            thread.close(lambda tracker: _close(tracker, exit_code))
        deadline = time.monotonic() + LEAVE_SECONDS
        for thread in self.threads:
            thread.wait(deadline - time.monotonic())
            if thread.tracker.name == "wandb" and self.results_of is not None and not thread.failed:
                record_step(self.results_of, results_step(self.results_of), complete=self.wandb_mode == "online")


def _close(tracker: Any, exit_code: int) -> None:
    if tracker.name == "mlflow":
        tracker.end(exit_code)
        return
    if tracker.name != "wandb":
        tracker.finish()
        return
    if exit_code == Interrupted.exit_status and "WANDB_SWEEP_ID" not in os.environ:
        tracker.tracker.mark_preempting()  # not in a sweep, which stops poor runs and would start them again
    try:
        tracker.tracker.finish(exit_code=exit_code)
    except TimeoutError:
        run = Path(tracker.tracker.dir).parents[2]  # of RUN/wandb/run-TIME-ID/files
        raise TimeoutError(f"its server has not received everything; to upload the rest: toolkit sync {run}") from None


def define_axes(run: Any) -> None:
    """Make W&B plot every metric over epochs."""
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")


def wandb_settings(recipe: Recipe, run: Run, run_id: str, mode: str, folder: Path) -> dict[str, Any]:
    """Return the arguments of ``wandb.init``, whose client writes to ``folder``; a resumed run keeps its id.

    Runs of a study are named after row, seed and fold, and their job type is the row.
    """
    import wandb

    from toolkit.study.directory import member_of

    table, member = recipe.tracking, member_of(run)
    name = f"{recipe.recipe.name} {run.id}" if member is None else f"{recipe.recipe.name}: {member.title}"
    return {
        "mode": mode,
        "id": re.sub(r"[^\w-]", "-", run_id),
        "resume": "allow",
        "dir": os.path.abspath(folder),  # the client's service keeps the working directory in which it was started
        "name": table.run_name or name[:MAX_LABEL],
        "job_type": "train" if member is None else member.row[:MAX_LABEL],
        "group": table.group or recipe.recipe.name,
        "entity": table.entity,
        "tags": list(table.tags),
        "notes": table.notes or recipe.recipe.description,
        "settings": wandb.Settings(
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1,
            silent=True,
            console="off",
        ),
    }


def wandb_mode(wanted: str) -> tuple[str, str]:
    """Return online, offline or disabled, and the reason if it is offline without being asked to. Never prompts."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if wanted == "auto" and mode in ("online", "offline", "disabled", "dryrun"):
        return ("offline" if mode == "dryrun" else mode), ""
    if wanted in ("offline", "disabled"):
        return wanted, ""
    why = offline_reason()
    return ("offline", why) if why else ("online", "")


def offline_reason() -> str:
    """Return why W&B cannot be used online; empty if it can. Never prompts."""
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True, mode="online"))  # overrides WANDB_MODE
        known = wandb.login(prompt=False, verify=False)
    except Exception as error:  # a malformed key raises one of several types
        return f"the W&B login does not work ({first_line(error)})"
    if not known:
        return "there is no W&B login"
    server = urlparse(wandb.setup().settings.base_url)
    fault = _server_error(server.geturl())
    return f"its server {server.hostname} {fault}" if fault else ""


def _server_error(url: str) -> str:
    """Return why a server is unavailable: no connection, or no response in time. Empty if it sent any response.

    W&B's client would wait for an unavailable server and keep the run's id in the meantime.
    """
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""
    except TimeoutError:
        return f"did not answer within {CONNECT_SECONDS} s"
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return ""  # the client has its own certificates
        return f"cannot be reached ({error.reason})"
    except (OSError, http.client.HTTPException) as error:
        return f"cannot be reached ({error})"


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to ``table.key`` entries, which W&B shows as columns."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def scalars(config: dict[str, Any]) -> dict[str, Any]:
    """Convert values to numbers and text, which TensorBoard's hparams accept."""
    return {key: v if isinstance(v, (int, float, str, bool)) else str(v) for key, v in config.items()}


def _tracker_types(names: list[str]) -> list[Any]:
    from accelerate.utils import LoggerType

    return [LoggerType(name) for name in names]

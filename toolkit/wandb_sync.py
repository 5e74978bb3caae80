"""Upload of offline runs to W&B: its client logs the lines of metrics.jsonl to one run.

W&B's offline files are not used: an interrupted run has several with the same id, and W&B would keep only one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import EXIT_OK, Interrupted, RunFailed, UserError, first_line
from toolkit.reading import Shape, read_bytes, read_json
from toolkit.run_directory import RunInUse
from toolkit.runs import Run
from toolkit.trackers import define_axes, flatten, offline_reason, wandb_settings
from toolkit.wandb_results import record_step, results_step, send_results, sent_step, uploads
from toolkit.writing import write_atomically

INIT_SECONDS = 60
FINISH_SECONDS = 300
SHOWN_SECONDS = 60.0
"""Seconds to wait for the server to show uploaded data."""


@dataclass(frozen=True)
class SyncResult:
    """Result of syncing one run."""

    run: str
    state: str
    """uploaded, already (uploaded before), training (skipped) or untracked (nothing to upload)."""
    lines: int = 0
    """Number of lines of metrics.jsonl sent by this call."""
    url: str | None = None

    def text(self) -> str:
        """Format as one line."""
        match self.state:
            case "uploaded":
                return f"{self.run}: {self.lines} lines uploaded, {self.url}"
            case "already":
                return f"{self.run}: already uploaded, {self.url}"
            case "training":
                return f"{self.run}: is still training; skipped"
        return f"{self.run}: was not tracked by W&B; nothing to upload"


class _Marker(Shape):
    """Schema of wandb/synced.json: hash of the data and URL of the last upload."""

    digest: str
    url: str | None = None


class ServerUnreachable(UserError):
    """Raised if there is no login or the server does not respond."""


def sync(run: Run, log: Callable[[str], None]) -> SyncResult:
    """Upload the part of a run that W&B lacks, unless it is still training or unchanged since the last upload.

    ``log`` is called with results that cannot be uploaded, and why.
    Raises ServerUnreachable if there is no login or the server does not respond, another UserError if the run is
    damaged, and RunFailed if the upload is incomplete; the next call then sends the rest.
    """
    wandb_id = wandb_run_id(run)
    if wandb_id is None:
        return SyncResult(str(run.path), "untracked")
    try:
        lock = run.lock()
    except RunInUse:
        return SyncResult(str(run.path), "training")
    try:
        digest, marker = _digest(run), run.path / "wandb" / "synced.json"
        done = read_json(marker, _Marker) if marker.exists() else {}
        if done.get("digest") == digest and not _lacks_results(run):
            return SyncResult(str(run.path), "already", url=done.get("url"))
        _require_server()
        sent = _upload(run, wandb_id, log)
        content = {"digest": digest, "url": sent.url, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_atomically(marker, (json.dumps(content, indent=2) + "\n").encode())
        return sent
    finally:
        lock.release()


def _lacks_results(run: Run) -> bool:
    """Return whether a finished run has results that were not sent completely."""
    return run.is_finished and bool(uploads(run)) and sent_step(run) is None


def _require_server() -> None:
    if why := offline_reason():
        raise ServerUnreachable(
            f"cannot upload: {why}. Log in with: wandb login (or set WANDB_API_KEY, and WANDB_BASE_URL for a server of "
            "your own)"
        )


def wandb_run_id(run: Run) -> str | None:
    """Return the id under which W&B's client logged the run on this machine; None if it did not."""
    log = next(run.path.glob("wandb/*run-*/run-*.wandb"), None)
    return None if log is None else log.stem.removeprefix("run-")


def _digest(run: Run) -> str:
    """Return a hash of everything that is uploaded; it changes when the run is resumed."""
    files = (run.path / "recipe.toml", run.metrics_file, run.path / "summary.json")
    return hashlib.sha256(b"\0".join(read_bytes(path) if path.exists() else b"" for path in files)).hexdigest()


def _upload(run: Run, wandb_id: str, log: Callable[[str], None]) -> SyncResult:
    """Send the lines that the server lacks, and verify that they have arrived."""
    import wandb

    lines, recipe = run.metric_records(), run.recipe
    if damaged := next((line for line in lines if not isinstance(line.get("step"), int)), None):
        raise UserError(f"{run.metrics_file} is damaged: a line has no step: {json.dumps(damaged)[:60]}")
    metrics = flatten(run.summary) if run.is_finished else {}
    with tempfile.TemporaryDirectory(prefix="toolkit-sync-") as folder:
        arguments = wandb_settings(recipe, run, wandb_id, "online", Path(folder)) | {"settings": _settings(wandb, run)}
        try:
            remote = wandb.init(project=recipe.tracking.project, **arguments)
            remote.config.update(flatten(recipe.model_dump(mode="json", exclude_none=True)), allow_val_change=True)
            define_axes(remote)
            missing = [line for line in lines if line["step"] >= remote.starting_step]
            for line in missing:
                remote.log(line, step=line["step"])
            remote.summary.update(metrics)
            last, sends_results = (
                max((line["step"] for line in lines), default=-1),
                run.is_finished and bool(uploads(run)),
            )
            if sends_results:
                last, is_new = _results_step(run, remote.starting_step)
                if is_new:
                    send_results(remote, run, last, log)
            url, path = remote.url, remote.path
            remote.finish(exit_code=EXIT_OK if run.is_finished else Interrupted.exit_status)
            _wait_until_shown(wandb.Api(), path, last)
            if sends_results:
                record_step(run, last, complete=True)
        except Exception as error:  # of the client, its HTTP library or the system
            raise RunFailed(
                f"{run.path}: the upload is incomplete ({first_line(error)}); run toolkit sync again to send the rest"
            ) from error
        finally:
            wandb.teardown()
    return SyncResult(str(run.path), "uploaded", len(missing), url)


def _results_step(run: Run, next_step: int) -> tuple[int, bool]:
    """Return the step of the run's results on W&B, and whether they must be sent.

    ``next_step``: the one after the last step that the server has. If an earlier upload was interrupted after the
    server got the step, but perhaps not all files, the results are sent again, at a new step.
    """
    sent = sent_step(run)
    if sent is not None and next_step > sent:
        return sent, False
    return max(results_step(run), next_step), True


def _settings(wandb: Any, run: Run) -> Any:
    """Return settings with longer timeouts than in training.

    They exclude data about this machine, which need not be the one that trained the run, whose commit they have.
    """
    git = None
    with contextlib.suppress(UserError):  # environment.json is missing or damaged
        git = run.environment.get("git")
    return wandb.Settings(
        git_commit=git["commit"] if git else None,
        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True,
        silent=True, console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True, disable_code=True,
    )  # fmt: skip


def _wait_until_shown(api: Any, path: str, last_step: int) -> None:
    """Wait for the server to show the last step: if an upload is rejected midway, the client raises no error."""
    deadline = time.monotonic() + SHOWN_SECONDS
    while (shown := api.run(path).lastHistoryStep) < last_step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"its server shows step {shown} of {last_step} after {SHOWN_SECONDS:g} s")
        time.sleep(min(1.0, SHOWN_SECONDS / 10))

"""The train command, also `python -m toolkit.train RECIPE` under any launcher, and error handling for all commands."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from toolkit.distributed.launcher import check_launch, is_distributed, read_process_info
from toolkit.errors import EXIT_FAILURE, EXIT_OK, Interrupted, RunFailed, UserError
from toolkit.filenames import escape_control_characters
from toolkit.terminal import open_closed_streams, outliving_terminal

if TYPE_CHECKING:
    from toolkit.runs import Run

OTHERS_WAIT_S = 3.0
"""Rank 0 reports errors common to all processes; other ranks print theirs only if still alive after this delay."""

LOSS_WAIT_S = 1.0
"""How long to wait, after a broken connection, for the message that says which process failed or was lost."""

NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO)
"""File system errors that the user can fix."""

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a key; the value is TOML, so text needs quotes."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the stack trace of every error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="TOML file; not needed with --resume RUN.")
    ] = None,
    set_: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Run to resume (as for toolkit evaluate), or auto: the newest unfinished one."
        ),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even if the recipe or the data changed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build everything, try one batch, write nothing.")] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="With --dry-run: do not load pretrained weights.")
    ] = False,
    show_module: Annotated[bool, typer.Option("--show-module", help="Print the whole module before training.")] = False,
    report: Annotated[bool, typer.Option(help="Write figures and report.html at the end.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a recipe on the processes started by the launcher.

    Example: accelerate launch -m toolkit.train recipes/resnet50_caltech.toml --set train.epochs=5

    Exit status: 0 done, 2 bad input, 3 interrupted but resumable, 1 anything else.
    """

    def work() -> int:
        from toolkit.cli.options import chosen_run
        from toolkit.recipe import load

        read_process_info()  # rejects invalid launcher variables before anything else reads them
        run_to_resume = resume if resume in (None, "auto") else str(chosen_run(resume))
        path = _recipe_path(recipe, run_to_resume)
        loaded = load(path, set_ or [])
        if is_first_process():
            for warning in loaded.warnings:
                print(warning, file=sys.stderr)
        if loaded.recipe.study is not None:
            raise UserError(f"{recipe} is a study of many runs: toolkit study {recipe}")
        check_launch(loaded.recipe.train)
        # torch is imported only here, once the recipe is known to be valid.
        from toolkit.training import fit

        if dry_run:
            fit.dry_run(loaded.recipe, load_weights=not random_weights, show_module=show_module)
            return EXIT_OK
        run = fit.fit(
            loaded.recipe,
            resume=run_to_resume,
            allow_changes=allow_changes,
            show_module=show_module,
            origins=loaded.origins_dict(path),
            began=process_start(),
        )
        if is_first_process():
            if report:
                report_at_end(run)
            show_outcome(run, as_json=as_json)
        return EXIT_OK

    with outliving_terminal():
        status = run_with_error_handling(work, debug=debug)
    exit_with_status(status)


def process_start() -> float:
    """Return when this process started, on the time.monotonic() clock, since the wall clock may be adjusted."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # since the machine started, see proc(5)
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        import psutil

        age = time.time() - psutil.Process().create_time()
    return time.monotonic() - max(age, 0.0)


def report_at_end(run: Run) -> None:
    """Write the figures and report of a finished run; any failure is reduced to one warning."""
    try:
        from toolkit.report.run_report import write_report

        written = write_report(run, log=lambda line: print(line, file=sys.stderr))
        for line in written.missing:
            print(f"not shown in the report: {line}", file=sys.stderr)
    except (Exception, KeyboardInterrupt) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"warning: no report ({reason}); to try again: toolkit report {run.path}", file=sys.stderr)


def _recipe_path(recipe: str | None, resume: str | None) -> str:
    """Return the given recipe, or that of the run to resume."""
    if recipe is not None:
        return recipe
    if resume in (None, "auto"):
        raise UserError("no recipe given: name the TOML file to train, e.g. toolkit train recipes/quickstart.toml")
    return os.path.join(resume, "recipe.toml")


def show_outcome(run: Run, *, as_json: bool) -> None:
    """Print the final table and the path of the run directory, or the summary as JSON, to stdout."""
    from toolkit.training.fit import closing_text

    if as_json:
        print(json.dumps({"run": str(run.path), **run.summary}, indent=2))
    else:
        print(closing_text(run.recipe, run.summary))
        print(run.path)


def run_with_error_handling(work: Callable[[], int], *, debug: bool) -> int:
    """Run ``work`` and return its exit status; print expected errors as one message, others with a stack trace."""
    try:
        return work()
    except Interrupted as interrupted:
        if is_first_process() or not interrupted.agreed:
            print(interrupted, file=sys.stderr, flush=True)
        return interrupted.exit_status
    except (UserError, RunFailed) as error:
        if debug:
            traceback.print_exc()
        print_error_once(str(error))
        return error.exit_status
    except BrokenPipeError:
        raise  # the reader of stdout (head, less) has exited: typer ends the command quietly
    except Exception as error:
        print_error_once(environment_error_message(error) or traceback.format_exc())
        return EXIT_FAILURE


def environment_error_message(error: Exception) -> str | None:
    """Return a one-line message for environment errors (disk full, no access, lost peer); None for others."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, OSError) and error.filename is not None and error.errno in NO_ACCESS:
        return f"cannot use {error.filename}: {error.strerror}"
    peers = sys.modules.get("toolkit.distributed.failure_detection")  # if absent, torch is not imported either
    if peers is None or not peers.is_peer_lost_error(error):
        return None
    assert peers.current is not None
    peers.current.failure_reported.wait(LOSS_WAIT_S)
    return str(peers.peer_lost_message())


def print_error_once(message: str) -> None:
    """Print an error once; errors common to all processes are reported by rank 0.

    A process that fails only because another one did prints nothing, so that the cause remains the last message.
    """
    rank, several = os.environ.get("RANK", "0"), is_distributed()
    peers = sys.modules.get("toolkit.distributed.failure_detection")
    watch = None if peers is None else peers.current
    if watch is not None and not is_first_process():
        watch.failure_reported.wait(OTHERS_WAIT_S)
    elif not is_first_process():
        time.sleep(OTHERS_WAIT_S)
    if watch is not None and watch.failure_reported.is_set():
        return
    message = escape_control_characters(f"rank {rank}: {message}" if several else message)
    print(message, file=sys.stderr, flush=True)
    write_torchelastic_error(message)
    if watch is not None:
        watch.report_failure()


def write_torchelastic_error(message: str) -> None:
    """Write the message to the file that torchrun and accelerate launch read to report the failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # The launchers show only the call stack field; the message includes a stack trace where one is useful.
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def is_first_process() -> bool:
    """Return whether this is rank 0, according to the launcher's environment variables."""
    return os.environ.get("RANK", "0") == "0"


def exit_with_status(status: int) -> NoReturn:
    """Exit with ``status``; after a failure of a distributed run, skip the interpreter's shutdown.

    A collective may never return, and shutting down while a thread is in one may abort the process (status -6).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status != EXIT_OK and is_distributed():
        os._exit(status)
    raise typer.Exit(status)


def show_any_name() -> None:
    """Make stdout and stderr escape characters that the terminal's encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run `python -m toolkit.train`."""
    open_closed_streams()
    show_any_name()
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(train)
    app()


if __name__ == "__main__":
    main()

"""How errors end a process: one message, from the process that knows the cause, and an exit status."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable

from toolkit.distributed.launcher import is_distributed
from toolkit.errors import EXIT_FAILURE, EXIT_OK, Interrupted, RunFailed, UserError
from toolkit.filenames import escape_control_characters

OTHERS_WAIT_S = 3.0
"""Seconds that other ranks wait before printing an error common to all processes, which rank 0 normally reports."""

LOSS_WAIT_S = 1.0
"""Seconds to wait, after a connection broke, for the message that says which process failed or was lost."""

NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO)
"""File system errors that the user can fix."""


def run_with_error_handling(work: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run ``work`` and return its exit status; print expected errors as one message, others with a stack trace.

    With ``debug`` all errors have a stack trace.
    """
    try:
        return work() or EXIT_OK
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
    except SystemExit:  # of a user's own code: its status must not pass for that of the command
        print_error_once(traceback.format_exc())
        return EXIT_FAILURE
    except Exception as error:
        print_error_once(environment_error_message(error) or traceback.format_exc())
        return EXIT_FAILURE


def environment_error_message(error: Exception) -> str | None:
    """Return a one-line message for errors of the environment (disk full, no access, lost process); None for others."""
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

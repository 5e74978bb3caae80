"""The processes of a run: Accelerate, devices, precision, collectives for objects, and agreement on stopping."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from toolkit.distributed.cpu_count import available_cpus
from toolkit.distributed.failure_detection import close_failure_detector, start_failure_detector
from toolkit.distributed.launcher import check_environment, positive_number, read_process_info
from toolkit.distributed.malloc import tune_malloc
from toolkit.distributed.precision import on_gpu, resolve_precision
from toolkit.distributed.rendezvous import join
from toolkit.distributed.signals import GracefulStop
from toolkit.errors import RunFailed, UserError, first_line
from toolkit.formatting import plural
from toolkit.recipe.schema import TrainConfig

T = TypeVar("T")


def init_accelerator(train: TrainConfig, stop: GracefulStop | None = None) -> Accelerator:
    """Join the processes that the launcher started, and set up device and precision according to the recipe.

    If one process fails from now on, the others end too. Raises UserError if the launcher's settings contradict the
    recipe or the precision is not supported, RunFailed if a process does not join in time, and Interrupted if ``stop``
    is requested before all have joined.
    """
    info = read_process_info()
    _set_threads(train)
    # Accelerate keeps one state per Python process; in a notebook the next fit may have another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = resolve_precision(train.precision)
    check_environment(train, precision)
    if train.cuda_graphs and not on_gpu():
        raise UserError("train.cuda_graphs = true needs a GPU, and none is used here: leave it out")
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(train.deterministic)  # also resets it after another run in this process
    torch.backends.cudnn.benchmark = not train.deterministic
    # torch 2.15 renames the argument; torch 2.11 and Accelerate do not know the new name.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
    if info is not None and not dist.is_initialized():
        join(info, "nccl" if on_gpu() else "gloo", stop)
    accelerator = Accelerator(
        cpu=not on_gpu(),
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.device.type == "cpu":  # on a GPU, tensors are not allocated by glibc
        tune_malloc()
    start_failure_detector(stop)
    return accelerator


def local_processes() -> int:
    """Return the number of training processes on this machine, including runs that a study trains concurrently."""
    beside = int(os.environ.get("TOOLKIT_RUNS_AT_ONCE", "1"))
    return max(1, (positive_number("LOCAL_WORLD_SIZE") or 1) * beside)


def _set_threads(train: TrainConfig) -> None:
    """Divide the available CPUs among the machine's training processes, unless the user has set OMP_NUM_THREADS.

    With virtual processes, each process uses one thread on CPUs, because results depend on the number of threads.
    """
    if train.virtual_processes is not None and not on_gpu():
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cpus(local_processes()))


def describe_processes(accelerator: Accelerator) -> list[str]:
    """Return one line per process: rank, host, device (a collective)."""
    device = str(accelerator.device)
    if accelerator.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(accelerator.device)})"
    mine = f"rank {accelerator.process_index} of {accelerator.num_processes} on {socket.gethostname()}, device {device}"
    return [str(line) for line in gather_objects(mine)]


def gather_objects(value: Any) -> list[Any]:
    """Return ``value`` of every process, in rank order (a collective)."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Return the main process's ``value`` on every process (a collective)."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class StopTraining(Exception):
    """Raised on all processes if a stop is requested during evaluation or precomputation."""


class StepConsensus:
    """Agreement of all processes, once per step, on whether to stop, to checkpoint, or to fail.

    Each step's flags are reduced in the background and read at the next step, over gloo in CPU memory, so that the GPU
    is never waited for. All processes must call :meth:`exchange` the same number of times.
    """

    def __init__(self, stop: GracefulStop) -> None:
        self.stop = stop
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self.group = group
        self.pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, *, save: bool = False, non_finite: bool = False) -> tuple[bool, bool, bool]:
        """Submit this step's flags and return the previous step's, each combined by logical OR over all processes.

        The flags are: stop (requested), save, non_finite. A single process gets this step's flags.
        """
        stop = self.stop.is_wanted()
        if self.group is None:
            return stop, save, non_finite
        agreed = self.wait()
        flags = torch.tensor([stop, save, non_finite], dtype=torch.int32)
        self.pending = (dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group, async_op=True), flags)
        return agreed

    def wait(self) -> tuple[bool, bool, bool]:
        """Wait for the pending reduction, if any, and return its flags."""
        if self.pending is None:
            return False, False, False
        work, flags = self.pending
        work.wait()
        self.pending = None
        stop, save, non_finite = (bool(flag) for flag in flags)
        return stop, save, non_finite

    def stop_aware(self, batches: Iterable[Any], rounds: int) -> Iterator[Any]:
        """Yield ``batches``; raise StopTraining on all processes if a stop is requested on any of them (a collective).

        The processes check ``rounds`` times, which must be equal on all of them; their numbers of batches may differ.
        """
        waiting = iter(batches)
        for _ in range(rounds):
            batch = next(waiting, None)
            if batch is not None:
                yield batch
            if self.exchange()[0]:
                raise StopTraining
        if self.wait()[0]:
            raise StopTraining


def leave(accelerator: Accelerator) -> None:
    """Close the failure detector and leave the process group (a collective)."""
    close_failure_detector()
    accelerator.wait_for_everyone()
    if dist.is_initialized():
        dist.destroy_process_group()


def main_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Call ``work()`` on the main process, then on the others (a collective).

    Each process returns its own result. A UserError on the main process is raised on all.
    """
    done = main_only(accelerator, lambda: [work()], share=False)
    return done[0] if done else work()


def main_only(accelerator: Accelerator, work: Callable[[], T], *, share: bool = True) -> T:
    """Call ``work()`` on the main process and return its result on all; a UserError is raised on all (a collective).

    With ``share=False`` the other processes get None instead of the result, which then need not be picklable.
    """
    if accelerator.num_processes == 1:
        return work()
    error: UserError | None = None
    result: Any = None
    if accelerator.is_main_process:
        try:
            result = work()
        except UserError as failure:
            error = failure
    message, shared = broadcast_object((None if error is None else str(error), result if share else None))
    if message is not None:
        raise error or UserError(message)
    return result if accelerator.is_main_process else shared  # type: ignore[no-any-return]


@contextlib.contextmanager
def out_of_memory_explained(train: TrainConfig, processes: int) -> Iterator[None]:
    """Turn out-of-memory errors in this context into a RunFailed that suggests what to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        steps = train.grad_accum_steps
        images = "" if steps == "auto" else f" with {train.batch_size // processes // steps} images at once"
        raise RunFailed(
            f"out of memory{images} in each process (train.batch_size = {train.batch_size} over "
            f"{plural(processes, 'process', 'processes')} and train.grad_accum_steps = {steps!r}): "
            f"{first_line(error):.200}\n"
            "Try a larger train.grad_accum_steps (same experiment, fewer images at once), train.precision = 'bf16', a "
            "smaller train.eval_batch_size, or a smaller train.batch_size"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the machine has too little free memory."""
    known = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(some in str(error) for some in known)


def autocast_dtype(precision: str | None) -> torch.dtype | None:
    """Return the low-precision dtype of mixed precision, None for full precision."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or "no")

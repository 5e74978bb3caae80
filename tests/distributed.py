"""Several processes over gloo within a test: forked, so that torch is not imported again for each."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_on(world: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """``work(*arguments)`` on ``world`` processes joined by gloo; their results in order of rank."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_run, args=(rank, world, folder, pipes[rank][1], work, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        results = []
        try:
            for rank, (receive, _) in enumerate(pipes):
                assert receive.poll(timeout_s), f"rank {rank} gave no result within {timeout_s} s"
                failed, result = receive.recv()
                assert not failed, f"rank {rank} failed:\n{result}"
                results.append(result)
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    return results


def _run(rank: int, world: int, folder: str, pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        if world > 1:
            store = f"file://{Path(folder) / 'store'}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        pipe.send((False, work(*arguments)))
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
    except Exception:
        pipe.send((True, traceback.format_exc()))

"""Run functions on several gloo processes within a test; they are forked, so that torch is imported only once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_on(world: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """Run ``work(*arguments)`` on ``world`` processes joined by gloo; return their results in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        return launch(world, _joined, f"file://{Path(folder) / 'store'}", work, arguments, timeout_s=timeout_s)


def launch(world: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """Run ``work(*arguments)`` on ``world`` processes with torchrun's variables; return results in order of rank."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    port = free_port()
    processes = [
        context.Process(target=_run, args=(rank, world, port, pipes[rank][1], work, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    results = []
    try:
        for rank, (receive, _) in enumerate(pipes):
            assert receive.poll(timeout_s), f"rank {rank} gave no result within {timeout_s} s"
            failed, result = pickle.loads(receive.recv_bytes())
            assert not failed, f"rank {rank} failed:\n{result}"
            results.append(result)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return results


def free_port() -> int:
    """Return a TCP port on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _joined(store: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:
        return work(*arguments)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    result = work(*arguments)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _run(rank: int, world: int, port: int, pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        outcome = (False, work(*arguments))
    except Exception:
        outcome = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))  # by value: a tensor sent directly requires that this process stays alive

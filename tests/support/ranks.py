"""Run a function on several ranks: real processes, a real gloo process group.

A fork server imports once what ranks need; each rank is forked from it in a moment. Nothing is
mocked: ranks find each other through the variables torchrun sets, and accelerate makes the
process group.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from .patience import Watch

__all__ = ["free_port", "run_and_kill", "run_ranks"]

_TESTS = Path(__file__).resolve().parents[1]

_context = multiprocessing.get_context("forkserver")
_JOBS = ("failing", "noise_jobs", "parallel_jobs", "resume_jobs", "sequence_jobs", "zero_jobs")
_LOADED_ON_FIRST_USE = (
    "accelerate.utils.fsdp_utils",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
)
# What is not installed, such as DeepSpeed, it leaves out.
_context.set_forkserver_preload(
    [*(f"support.{job}" for job in _JOBS), *_LOADED_ON_FIRST_USE, "support.frozen"]
)


def _start_server() -> None:
    """Start the fork server where it can import our jobs: it does not take over ``sys.path``."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_TESTS), before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run_ranks(
    job: Callable[..., Any], world_size: int, *, still_after: float = 120, **kwargs: Any
) -> list[Any]:
    """Call ``job(**kwargs)`` on every rank and give back what each returned.

    Args:
        job: A function that can be imported, such as one of ``support.rank_jobs``.
        world_size: How many processes.
        still_after: Seconds without progress of any rank after which all are killed: a hang is a
            failure, not a wait. On a busy machine a rank may take its time, see `Watch`.
        **kwargs: Picklable arguments of the job.
    """
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            # No daemons: those may not have loader workers.
            _context.Process(target=_be_rank, args=(job, kwargs, rank, world_size, port, folder))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        watch = Watch([p.pid for p in processes if p.pid], still_after=still_after)
        lost = ""
        try:
            while any(p.exitcode is None for p in processes) and not lost:
                lost = watch.why_lost()
                if any(p.exitcode not in (None, 0) for p in processes):
                    time.sleep(1)  # the others may still say what is wrong with them
                    break
                time.sleep(0.02)
        finally:
            hung = [rank for rank, p in enumerate(processes) if p.exitcode is None]
            for process in processes:
                process.kill()
                process.join()
        codes = [p.exitcode for p in processes]
        if any(codes):
            texts = [_read(Path(folder, f"{rank}.txt")) for rank in range(world_size)]
            told = "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(texts))
            why = f" ({lost})" if lost else ""
            raise AssertionError(f"ranks ended with {codes}, still running: {hung}{why}\n{told}")
        return [
            pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(world_size)
        ]


def _be_rank(
    job: Callable[..., Any], kwargs: Any, rank: int, world_size: int, port: int, folder: str
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    if world_size == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    with Path(folder, f"{rank}.txt").open("w", buffering=1) as text:
        os.dup2(text.fileno(), 1)
        os.dup2(text.fileno(), 2)
        import torch
        import torch.distributed as dist

        # As in a process that a user starts; ours would start a fork server for its loader workers.
        multiprocessing.set_start_method("fork", force=True)
        torch.set_num_threads(1)
        try:
            result = job(**kwargs)
            Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


def free_port() -> int:
    """Return a port that nobody listens on, and that no other worker of the tests is given.

    One that the system chooses is given away again to whoever asks next, before a rank listens on
    it. So it is below the range from which the system chooses, and each worker has a part of it.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20
    first = 20_000 + 500 * worker
    for port in random.Random().sample(range(first, first + 500), 500):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError(f"no free port from {first} to {first + 499}")


def _read(path: Path) -> str:
    return path.read_text()[-9000:] if path.exists() else ""


def run_and_kill(
    job: Callable[..., Any],
    *,
    begun: Path,
    delay: float | None,
    **kwargs: Any,
) -> int:
    """Run a job in a process of its own and send it SIGKILL some time after it has begun.

    Args:
        job: As for `run_ranks`.
        begun: File the job makes when its training begins.
        delay: Seconds from then on; None lets it run to its end.
        **kwargs: Arguments of the job.

    Returns:
        The exit code, -9 if it was killed.
    """
    _start_server()
    begun.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        process = _context.Process(target=_be_rank, args=(job, kwargs, 0, 1, 0, folder))
        process.start()
        watch, lost = Watch([process.pid or 0]), ""
        while not (lost or process.exitcode is not None or (delay is not None and begun.exists())):
            time.sleep(0.005)
            lost = watch.why_lost()
        if delay is not None and not lost:
            process.join(delay)
        if process.exitcode is None:
            process.kill()
            process.join()
            assert not lost, f"the job hung, it {lost}:\n{_read(Path(folder, '0.txt'))}"
        if process.exitcode not in (0, -9):
            raise AssertionError(_read(Path(folder, "0.txt")))
        return int(process.exitcode or 0)

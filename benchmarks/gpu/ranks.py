"""Process groups on one device: NCCL with one rank, and two ranks that share it through gloo.

NCCL refuses two ranks on one device, so what several ranks exchange is run on it with one rank that
is told it has company: DDP is wrapped, counts, outcomes and gradients go through its collectives.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import Setting

NUM_RANKS = {"torchrun": 1, "two-on-one-device": 2}
SECONDS = 110


def launch(setting: Setting, *, kind: str) -> dict[str, Any]:
    """Start the ranks of a kind, wait for them, and return what rank 0 found."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        job = ["-m", "benchmarks.gpu.rank_job", setting.device, kind, str(out)]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # The machine may have no network at all, or names that lead nowhere.
        local = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        if kind == "torchrun":
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "1"]
            launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
            _wait_for([_start([*launcher, *job], local)])
        else:
            size = str(NUM_RANKS[kind])
            of_all = {**local, **address, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            ranks = [
                # All of them are the first of the device that there is.
                _start(job, {**of_all, "RANK": str(rank), "LOCAL_RANK": "0"})
                for rank in range(NUM_RANKS[kind])
            ]
            _wait_for(ranks)
        figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def _start(arguments: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], env={**os.environ, **variables})


def _wait_for(processes: list[subprocess.Popen[bytes]]) -> None:
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * len(codes), f"ranks ended with {codes}; the log of this group says more"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""A disk that is really full: a small file system is mounted and filled to its last byte."""

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.disks import Ballast, small_disk, why_no_disk
from support.patience import HUNG_AFTER_SECONDS
from support.tiny import make_trainer, ragged_rows, tiny_llama
from transformers import TrainerCallback

from hf_gradacc import CheckpointError
from hf_gradacc.safety.checkpoints import find_damage
from hf_gradacc.safety.signals import StopSignals
from hf_gradacc.safety.storage_errors import find_storage_fault
from hf_gradacc.tracking.run_files import LOG_NAME, RunFile, read_log

ROWS = ragged_rows(60, seed=5)


@pytest.fixture
def disk(tmp_path):
    why = why_no_disk()
    if why is not None:
        pytest.skip(f"no file system can be mounted here: {why}")
    with small_disk(tmp_path / "disk", megabytes=3) as folder:
        yield folder


def train(disk, **filled):
    trainer = make_trainer(
        disk / "out",
        ROWS,
        model=tiny_llama(),
        callbacks=[Ballast(disk, **filled)],
        effective_batch_size=10,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    trainer.train()
    return trainer


def kinds(disk):
    return [(row["kind"], row["step"]) for row in read_log(disk / "out" / LOG_NAME)]


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_row(disk):
    trainer = train(disk, full_from=3, free_from=5)
    assert trainer.state.global_step == 6
    checkpoints = sorted((disk / "out").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-5", "checkpoint-6"]
    assert [find_damage(path) for path in checkpoints] == [None, None]
    found = kinds(disk)
    assert [step for kind, step in found if kind == "train"] == [1, 2, 3, 4, 5, 6]
    assert [step for kind, step in found if kind == "event"] == [4, 5]  # two were not saved


def test_a_disk_that_stays_full_keeps_the_last_checkpoints_and_says_where_the_model_is(disk):
    trainer = train(disk, full_from=3)
    assert trainer.state.global_step == 6
    checkpoints = sorted((disk / "out").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    assert [find_damage(path) for path in checkpoints] == [None, None]
    assert [step for kind, step in kinds(disk) if kind == "train"][:2] == [1, 2]
    with pytest.raises(CheckpointError) as caught:
        trainer.save_model()
    for part in ("No space left", "checkpoint-2 is whole", "save again", "output.dir"):
        assert part in str(caught.value)
    trainer.save_model(str(disk.parent / "elsewhere"))
    assert (disk.parent / "elsewhere" / "model.safetensors").is_file()


class ReadOnly(TrainerCallback):
    """Remounts a disk read-only after an update, as the system does when it fails."""

    def __init__(self, disk, *, after):
        self.disk, self.after = disk, after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            command = ["mount", "-o", "remount,ro", str(self.disk)]
            subprocess.run(command, check=True)


def test_a_disk_that_becomes_read_only_ends_no_run_and_is_named(disk, monkeypatch):
    # The lock keeps a file open, and then nobody but a failing disk itself may do that.
    monkeypatch.setattr(
        "hf_gradacc.trainer.checkpoints.choosing.hold_folder",
        lambda folder: contextlib.nullcontext(),
    )
    trainer = make_trainer(
        disk / "out",
        ROWS,
        model=tiny_llama(),
        callbacks=[ReadOnly(disk, after=3)],
        effective_batch_size=20,
        save_strategy="steps",
        save_steps=2,
        num_train_epochs=2,
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert [path.name for path in (disk / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(CheckpointError, match=r"Read-only file system \(EROFS\)"):
        trainer.save_model()


def test_errors_are_told_apart_by_number_and_place(disk, tmp_path):
    values = {"a": torch.zeros(2_000_000)}  # more than the disk holds

    def fault_of(write, folder):
        try:
            write(folder)
        except Exception as error:
            return find_storage_fault(error, folder)

    def by_torch(folder):
        torch.save(values, folder / "a.pt")

    def by_safetensors(folder):
        save_file(values, folder / "a.safetensors")

    assert fault_of(by_safetensors, disk) == "No space left on device (ENOSPC)"
    for file in disk.iterdir():
        file.unlink()
    assert fault_of(by_torch, disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for write in (by_torch, by_safetensors):
        assert fault_of(write, disk) == "Read-only file system (EROFS)"
    assert fault_of(by_torch, tmp_path / "nowhere")  # torch: "Parent directory does not exist"
    for wrong in (OSError("no such model"), RuntimeError("shapes"), ConnectionError("hub")):
        assert find_storage_fault(wrong, tmp_path) is None
    assert not [path for path in tmp_path.iterdir() if "probe" in path.name]


WANDB_SCRIPT = """
import os
from pathlib import Path
from support.disks import Ballast
from support.tracked import tracked_trainer
disk = Path(os.environ["WANDB_DIR"])
tracked_trainer(sys.argv[1], callbacks=[Ballast(disk, full_from=3)], max_steps=60).train()
print("trained to the end")
"""


@pytest.mark.slow
def test_wandb_on_a_full_disk_does_not_end_the_run(disk, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(disk))
    tests = Path(__file__).parents[1]
    script = f"import sys\nsys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n{WANDB_SCRIPT}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=HUNG_AFTER_SECONDS,
        check=False,
    )
    assert "trained to the end" in done.stdout, done.stderr[-2000:]
    rows = [row for row in read_log(tmp_path / "out" / LOG_NAME) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 61))


def test_a_row_that_fits_only_in_part_leaves_no_part(tmp_path):
    run_file = RunFile(tmp_path)
    run_file.start(step=0)
    run_file.append({"kind": "train", "step": 1})
    size = run_file.log_path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            run_file.append({"kind": "train", "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run_file.log_path.stat().st_size == size
    run_file.append({"kind": "train", "step": 2})
    assert [row["step"] for row in read_log(run_file.log_path)] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("bar", [False, True], ids=["rows", "progress bar"])
def test_output_to_a_full_disk_goes_unsaid(tmp_path, monkeypatch, bar):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    trainer = make_trainer(
        tmp_path, ROWS, model=tiny_llama(), effective_batch_size=10, disable_tqdm=not bar
    )
    with Path("/dev/full").open("wb", buffering=0) as full:
        written = io.TextIOWrapper(full, write_through=True)
        monkeypatch.setattr(sys, "stdout", written)
        monkeypatch.setattr(sys, "stderr", written)
        with pytest.raises(OSError, match="No space left"):
            print("anything")
        trainer.train()
        with monkeypatch.context() as patch:
            signals = StopSignals()
            patch.setattr(os, "write", lambda descriptor, text: full.write(text))
            signals._note(signal.SIGTERM, None)
        monkeypatch.undo()
    assert signals.received == signal.SIGTERM
    assert trainer.state.global_step == 6
    assert len([row for row in read_log(tmp_path / LOG_NAME) if row["kind"] == "train"]) == 6

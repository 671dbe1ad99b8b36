"""A checkpoint that somebody changed on purpose resumes; one that was torn does not."""

import os
from pathlib import Path

import pytest
import safetensors.torch
from support.resume_jobs import train_and_report

from hf_gradacc.errors import CheckpointError


def rotten(path):
    """Other bytes, at the time they were written."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_that_nobody_wrote_since_is_damaged_if_its_bytes_are_others(tmp_path):
    train_and_report(str(tmp_path), stop=2)
    rotten(tmp_path / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt holds other bytes"):
        train_and_report(str(tmp_path), resume=str(tmp_path / "checkpoint-2"))


def halved(path):
    """Weights cast to another type and written again."""
    weights = safetensors.torch.load_file(path)
    cast = {name: weight.half() for name, weight in weights.items()}
    safetensors.torch.save_file(cast, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("optimizer.pt", Path.unlink, "the optimizer and the learning rate schedule start anew"),
        ("rng_state.pth", Path.unlink, "random numbers, as dropout draws them, start from the see"),
        ("model.safetensors", halved, "it was changed since and is taken as it is"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_checkpoint_changed_on_purpose_is_resumed_by_name_only(
    tmp_path, monkeypatch, name, edit, words
):
    train_and_report(str(tmp_path), stop=2)
    edit(tmp_path / "checkpoint-2" / name)
    with pytest.raises(CheckpointError, match=r"was changed since it was written.*by name"):
        train_and_report(str(tmp_path), resume=True)
    said = []
    monkeypatch.setattr("hf_gradacc.trainer.checkpoints.choosing.logger.warning", said.append)
    report = train_and_report(str(tmp_path), resume=str(tmp_path / "checkpoint-2"), stop=4)
    assert report["step"] == 4
    assert [line.count(words) for line in said] == [1]
    assert f"checkpoint-2 is not as it was written: {name}" in said[0]

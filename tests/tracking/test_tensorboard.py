"""TensorBoard gets the numbers that W&B gets, by the same path: a real event file, read back."""

from __future__ import annotations

import struct

import pytest
from support.tracked import tracked_trainer

pytest.importorskip("tensorboardX")

from tensorboardX.proto.event_pb2 import Event

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def read_scalars(folder):
    """The scalars of an event file, ``(step, tag) -> value``.

    A record is its length (8 bytes), a checksum (4), an `Event`, and a checksum (4).
    """
    (path,) = folder.rglob("events.out.tfevents.*")
    data, at, scalars = path.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars[event.step, value.tag] = value.simple_value
    return scalars


def test_tensorboard_gets_every_number_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = tracked_trainer(
        tmp_path / "out",
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=2,
        noise_scale_every=1,
    )
    trainer.train()
    scalars = read_scalars(tmp_path / "events")
    told = 0
    for row in trainer.state.log_history:
        for key, value in row.items():
            if key == "step" or "train_runtime" in row:
                continue
            section = "eval" if key.startswith("eval_") else "train"
            tag = f"{section}/{key.removeprefix('eval_')}"
            assert scalars[row["step"], tag] == pytest.approx(value, rel=1e-6), key
            told += 1
    assert told > 4 * 15
    for key in ("tokens_per_update", "effective_batch_size", "padding_fraction", "data_seconds"):
        assert (4, f"train/{key}") in scalars

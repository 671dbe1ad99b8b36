"""What an update holds, and that the loader may pin all of it."""

from collections import namedtuple

import pytest
import torch
from support.tiny import pad, ragged_rows
from torch.utils.data import DataLoader

from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.loader import build_loader
from hf_gradacc.updates.targets import TargetCounts, TargetRule
from hf_gradacc.updates.update import MicroBatch, Update, UpdateStats, start_copies

ROWS = ragged_rows(10, seed=31)
Grid = namedtuple("Grid", ["height", "width"])


def test_counts_survive_the_way_over_ranks():
    stats = UpdateStats(1, 2, 3, 4, 5, 6)
    assert UpdateStats.from_counts(stats.counts() + stats.counts()) == stats + stats


def test_micro_batches_without_a_target_are_left_out_of_the_update():
    inputs = pad(ROWS[:2])
    full = MicroBatch(inputs, TargetCounts(next_token=3, same_token=4), 2, 9, 1)
    bare = MicroBatch(inputs, TargetCounts(next_token=0, same_token=1), 2, 9, 1)
    update = Update([full, bare], num_left_out=1)
    assert update.with_targets(TargetRule.NEXT_TOKEN).micro_batches == [full]
    assert update.with_targets(TargetRule.NEXT_TOKEN).num_left_out == 3
    assert update.with_targets(TargetRule.SAME_TOKEN).micro_batches == [full, bare]


class PinnedTensor(torch.Tensor):
    """What pinning makes of a tensor here, where no accelerator could reach pinned memory."""


@pytest.fixture
def _accelerator(monkeypatch):
    """Let torch's DataLoader find an accelerator, and mark the tensors it pins."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t.as_subclass(PinnedTensor))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def nested(rows):
    """Inputs as multimodal collators nest them, and one entry that is no tensor."""
    batch = pad(rows)
    images = [torch.full((2, 3), float(len(row["input_ids"]))) for row in rows]
    grid = Grid(torch.tensor([4]), torch.tensor([6]))
    return {**batch, "images": images, "extra": {"grid": grid, "name": "a"}}


def load(collate, *, pinned, workers=0):
    loader = build_loader(
        ROWS,
        UpdateCollator(collate, max_sequences=2),
        effective_batch_size=4,
        tokens_per_update=None,
        incomplete_update="keep",
        seed=3,
        num_workers=workers,
        pin_memory=pinned,
    )
    return list(loader)


@pytest.mark.usefixtures("_accelerator")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_pins_every_tensor_of_every_micro_batch_and_changes_nothing(workers):
    plain = load(pad, pinned=False)
    pinned = load(pad, pinned=True, workers=workers)
    assert [len(update) for update in pinned] == [len(update) for update in plain] == [2, 2, 1]
    for ours, theirs in zip(pinned, plain, strict=True):
        assert ours.stats(TargetRule.NEXT_TOKEN) == theirs.stats(TargetRule.NEXT_TOKEN)
        assert (ours.index, ours.epoch) == (theirs.index, theirs.epoch)
        for mine, its in zip(ours, theirs, strict=True):
            assert (mine.rows, mine.lengths, mine.targets) == (its.rows, its.lengths, its.targets)
            assert set(mine.inputs) == set(its.inputs) == {"input_ids", "attention_mask", "labels"}
            for key, value in its.inputs.items():
                assert type(value) is torch.Tensor
                assert type(mine.inputs[key]) is PinnedTensor
                assert torch.equal(mine.inputs[key].as_subclass(torch.Tensor), value)


@pytest.mark.usefixtures("_accelerator")
def test_tensors_within_lists_and_dicts_of_a_micro_batch_are_pinned_too():
    batches = [MicroBatch(nested(ROWS[i : i + 2]), TargetCounts(), 2, 9, 1) for i in (0, 2)]
    (update,) = DataLoader([Update(batches)], batch_size=None, pin_memory=True)
    for micro_batch in update:
        found = list(tensors_in(micro_batch.inputs))
        assert len(found) == 3 + 2 + 2
        assert {type(tensor) for tensor in found} == {PinnedTensor}
        assert micro_batch.inputs["extra"]["name"] == "a"
        assert type(micro_batch.inputs["extra"]["grid"]) is Grid


def test_a_tensor_under_two_names_is_copied_once():
    labels, ids = torch.ones(2), torch.zeros(2)
    inputs = {"labels": labels, "shift_labels": labels, "input_ids": ids, "note": "text"}
    copied, positions = start_copies(inputs, labels, torch.device("meta"))
    assert copied["labels"] is copied["shift_labels"]
    assert copied["labels"] is not copied["input_ids"]
    assert {copied["labels"].device.type, positions.device.type} == {"meta"}
    assert copied["note"] == "text"
    assert start_copies(inputs, None, torch.device("meta"))[1] is None

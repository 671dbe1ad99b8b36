"""Which rows share an update: a matter of the recipe alone, through the loader as it trains."""

import datasets
import pytest
from support.tiny import make_trainer, pad, ragged_rows

from hf_gradacc.updates.collator import UpdateCollator
from hf_gradacc.updates.loader import build_loader

ROWS = ragged_rows(53, seed=4)
FORMS = {
    "list": lambda: ROWS,
    "dataset": lambda: datasets.Dataset.from_list(ROWS),
    "shards": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3),
    "shuffle buffer": lambda: (
        datasets.Dataset.from_list(ROWS)
        .to_iterable_dataset(num_shards=3)
        .shuffle(seed=5, buffer_size=9)
    ),
}
SIZES = [
    {"effective_batch_size": 8, "tokens_per_update": None},
    {"effective_batch_size": None, "tokens_per_update": 40},
]


def updates(form, *, world_size=1, packed=False, epoch=0, size=SIZES[0], workers=None, **limits):
    """The input ids of each update's rows, over all ranks."""
    found = {}
    for rank in range(world_size):
        collator = UpdateCollator(pad, **{"max_sequences": 4, **limits})
        collator.packed = packed
        loader = build_loader(
            FORMS[form](),
            collator,
            **size,
            incomplete_update="keep",
            seed=3,
            rank=rank,
            world_size=world_size,
            hidden_size=16,
            **workers or {},
        )
        loader.set_epoch(epoch)
        for update in loader:
            rows = found.setdefault(update.index, [])
            for micro_batch in update:
                mask = micro_batch.inputs["attention_mask"].bool()
                ids = micro_batch.inputs["input_ids"]
                rows += [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
    return [sorted(found[index]) for index in sorted(found)]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=["sequences", "tokens"])
def test_neither_ranks_nor_cut_nor_layout_nor_workers_move_a_row_to_another_update(form, size):
    one = updates(form, size=size)
    assert sorted(row for update in one for row in update) == sorted(
        tuple(row["input_ids"]) for row in ROWS
    )
    for world_size in (2, 3, 4, 8):
        assert updates(form, size=size, world_size=world_size) == one
    assert updates(form, size=size, world_size=3, packed=True, max_tokens=30) == one
    assert updates(form, size=size, world_size=2, max_sequences=1) == one
    for workers in (1, 2):
        assert updates(form, size=size, workers={"num_workers": workers}, max_sequences=2) == one
    is_shuffled = form != "shards"
    assert (updates(form, size=size, epoch=1) != one) == is_shuffled


@pytest.mark.slow
def test_a_stream_reaches_a_worker_that_is_no_fork():
    """Python 3.14 starts them so."""
    workers = {"num_workers": 1, "multiprocessing_context": "forkserver"}
    assert updates("shards", workers=workers) == updates("shards")


def members(tmp_path, **options):
    """The dataset's rows in each update of the first pass, by the trainer's own loader."""
    trainer = make_trainer(tmp_path, ROWS, effective_batch_size=8, **options)
    loader = trainer.get_train_dataloader().updates
    return [sorted(row for mb in update for row in mb.rows) for update in loader]


def test_a_seed_for_the_data_goes_before_the_seed(tmp_path):
    plain = members(tmp_path, seed=1)
    assert members(tmp_path, seed=2) != plain
    assert members(tmp_path, seed=2, data_seed=1) == plain
    assert members(tmp_path, seed=1, data_seed=2) != plain


def test_grouping_by_length_changes_nobody_s_update(tmp_path):
    plain = members(tmp_path, seed=1)
    for strategy in ("group_by_length", "batch_rebalance"):
        assert members(tmp_path, seed=1, train_sampling_strategy=strategy) == plain

"""Streams: no gradient leaks from one pass into the next, and a short stream is no endless loop."""

import random
import time
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, log_rows, make_trainer, pad, ragged_rows, tiny_llama
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_gradacc import DataError
from hf_gradacc.updates.dealing import deal_by_cost
from hf_gradacc.updates.stream import UpdateStream, fixed_size

ROWS = ragged_rows(7, seed=6)


class Stream(IterableDataset):
    def __init__(self, rows, claims=None):
        self.rows = rows
        self.claims = claims

    def __iter__(self):
        return iter(self.rows)


class StreamWithLength(Stream):
    def __len__(self):
        return self.claims


class OneShot(IterableDataset):
    """A socket, say: asked for an iterator it gives itself, and a row read is gone."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __iter__(self):
        return self

    def __next__(self):
        if not self.rows:
            raise StopIteration
        return self.rows.pop(0)


def train(tmp_path, stream, **options):
    recorder = Recorder()
    callbacks = [recorder, *options.pop("callbacks", ())]
    settings = {"learning_rate": 0.0, "effective_batch_size": 3, "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, stream, callbacks=callbacks, **settings | options)
    with float64_everywhere():
        trainer.train()
    return trainer, recorder.gradients


def whole_gradient(rows):
    model = tiny_llama().train()
    with float64_everywhere():
        return reference_gradient(model, rows, pad)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "make",
    [Stream, lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(2)],
    ids=["torch", "datasets"],
)
def test_the_rows_left_at_the_end_of_a_pass_make_an_update_of_their_own(tmp_path, make, workers):
    trainer, gradients = train(tmp_path, make(ROWS), max_steps=5, dataloader_num_workers=workers)
    assert [row["effective_batch_size"] for row in log_rows(trainer)] == [3, 3, 1, 3, 3]
    first_pass = [ROWS[:3], ROWS[3:6], ROWS[6:]]
    for gradient, rows in zip(gradients, first_pass + first_pass[:2], strict=True):
        assert relative_error(gradient, whole_gradient(rows)) <= 1e-10


def test_drop_leaves_out_the_rows_at_the_end_of_a_pass(tmp_path):
    trainer, gradients = train(tmp_path, Stream(ROWS), max_steps=3, incomplete_update="drop")
    assert [row["effective_batch_size"] for row in log_rows(trainer)] == [3, 3, 3]
    assert relative_error(gradients[2], whole_gradient(ROWS[:3])) <= 1e-10


def test_a_stream_shorter_than_an_update_is_trained_as_it_is(tmp_path):
    trainer, gradients = train(tmp_path, Stream(ROWS[:2]), max_steps=2, effective_batch_size=50)
    assert trainer.state.global_step == 2
    assert relative_error(gradients[1], whole_gradient(ROWS[:2])) <= 1e-10


def test_a_stream_shorter_than_an_update_is_refused_if_short_updates_are_dropped(tmp_path):
    with pytest.raises(DataError, match="ended before it gave one update of 50 sequences"):
        train(
            tmp_path,
            Stream(ROWS),
            max_steps=2,
            effective_batch_size=50,
            incomplete_update="drop",
        )


def test_an_empty_stream_is_refused(tmp_path):
    with pytest.raises(DataError, match="it is empty, or shorter"):
        train(tmp_path, Stream([]), max_steps=2)


@pytest.mark.parametrize("claimed", [4, 7, 9])
def test_a_wrong_length_leaks_nothing(tmp_path, claimed):
    _, gradients = train(tmp_path, StreamWithLength(ROWS, claimed), num_train_epochs=2)
    assert relative_error(gradients[0], whole_gradient(ROWS[:3])) <= 1e-10
    second_pass = {4: 2, 7: 3, 9: 3}[claimed]
    assert relative_error(gradients[second_pass], whole_gradient(ROWS[:3])) <= 1e-10


def test_stopping_an_epoch_leaks_nothing(tmp_path):
    class StopEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 1

    _, gradients = train(tmp_path, Stream(ROWS), max_steps=3, callbacks=[StopEpoch()])
    for gradient, rows in zip(gradients, [ROWS[:3], ROWS[:3], ROWS[3:6]], strict=True):
        assert relative_error(gradient, whole_gradient(rows)) <= 1e-10


def test_no_row_of_a_one_shot_stream_is_lost_to_asking_the_model(tmp_path):
    _, gradients = train(tmp_path, OneShot(ROWS), max_steps=3)
    for gradient, rows in zip(gradients, [ROWS[:3], ROWS[3:6], ROWS[6:]], strict=True):
        assert relative_error(gradient, whole_gradient(rows)) <= 1e-10


class Generator(IterableDataset):
    """Gives the same generator, or what an open file would give, each time it is asked."""

    def __init__(self, rows, *, wrapped):
        self.rows = iter(rows)
        self.wrapped = wrapped

    def __iter__(self):
        return (row for row in self.rows) if self.wrapped else self.rows


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("wrapped", [True, False])
def test_no_row_of_a_generator_is_lost_to_asking_the_model(tmp_path, wrapped, workers):
    stream = Generator(ROWS, wrapped=wrapped)
    _, gradients = train(tmp_path, stream, max_steps=3, dataloader_num_workers=workers)
    for gradient, members in zip(gradients, (ROWS[:3], ROWS[3:6], ROWS[6:]), strict=True):
        assert relative_error(gradient, whole_gradient(members)) <= 1e-10


def test_a_stream_is_cut_by_target_tokens_as_well(tmp_path):
    trainer, gradients = train(
        tmp_path, Stream(ROWS), max_steps=2, effective_batch_size=None, tokens_per_update=15
    )
    targets = [sum(label != -100 for label in row["labels"][1:]) for row in ROWS]
    first = next(n for n in range(1, 8) if sum(targets[:n]) >= 15)
    assert log_rows(trainer)[0]["effective_batch_size"] == first
    assert relative_error(gradients[0], whole_gradient(ROWS[:first])) <= 1e-10


def test_a_measured_update_of_a_stream_is_dealt_at_random_to_all_ranks():
    rows = list(range(20))

    def dealt(rank, every):
        stream = UpdateStream(
            rows,
            take=partial(fixed_size, effective_batch_size=10),
            length_of=int,
            deal=deal_by_cost,
            rank=rank,
            world_size=2,
            seed=3,
            noise_scale_every=every,
        )
        return [list(share) for share in stream], [share.indices for share in stream]

    plain, measured = (
        [dealt(rank, None) for rank in range(2)],
        [dealt(rank, 2) for rank in range(2)],
    )
    for (shares, indices), (before, _) in zip(measured, plain, strict=True):
        assert shares == indices, "rows keep the places they have in the stream"
        assert shares[1] == before[1], "the second update is not measured"
        assert shares[0] != before[0]
        assert len(shares[0]) == 5
    assert sorted(measured[0][0][0] + measured[1][0][0]) == rows[:10]


class Jittered(IterableDataset):
    """Augments its rows, with numbers of the process."""

    def __iter__(self):
        return ({"input_ids": [1], "x": i + random.random()} for i in range(40))


class Shuffled(IterableDataset):
    """Shuffles its rows in a buffer, with numbers of the process, and not from the first on."""

    def __iter__(self):
        rows, buffer = iter(range(40)), []
        order = np.random.permutation(3).tolist()
        for row in rows:
            buffer.append(row)
            if len(buffer) > 9:
                yield {"input_ids": order, "x": buffer.pop(int(torch.randint(10, ())))}
        yield from ({"input_ids": order, "x": row} for row in buffer)


class ShuffledAtOnce(IterableDataset):
    """Chooses the order of its rows before the first is asked for."""

    def __iter__(self):
        return iter([{"input_ids": [1], "x": x} for x in random.sample(range(40), 40)])


def read_drawn(kind, *, epoch=0, rank=0, done=0, peek=False, position=None):
    torch.manual_seed(time.perf_counter_ns() % 2**32)
    random.seed(time.perf_counter_ns())
    np.random.seed(time.perf_counter_ns() % 2**32)
    stream = UpdateStream(
        kind(),
        take=partial(fixed_size, effective_batch_size=8),
        length_of=lambda row: 1,
        deal=deal_by_cost,
        rank=rank,
        world_size=2,
        seed=5,
    )
    if peek:
        stream.peek(3)
    stream.set_epoch(epoch)
    if done:
        stream.start_at(epoch, updates=done, position=position)
    updates = [share for share in stream if share]
    return {i: row for share in updates for i, row in zip(share.indices, share, strict=True)}


@pytest.mark.parametrize("kind", [Jittered, Shuffled, ShuffledAtOnce])
def test_what_a_stream_draws_is_the_same_on_every_rank_and_after_a_resume(kind):
    rows = read_drawn(kind) | read_drawn(kind, rank=1)
    assert sorted(rows) == list(range(40))
    assert len({round(row["x"], 9) for row in rows.values()}) == 40
    assert read_drawn(kind, peek=True).items() <= rows.items()
    resumed = read_drawn(kind, done=2, position={"rows": 16}, peek=True)
    assert len(resumed) == 12
    assert resumed.items() <= rows.items()
    assert read_drawn(kind, epoch=1) != read_drawn(kind)

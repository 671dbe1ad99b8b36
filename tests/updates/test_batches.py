"""The train loader in other people's hands: looked at, counted, wrapped, and trained with."""

import pytest
from accelerate.data_loader import BatchSamplerShard
from support.line import LineRows, LineStream, fit_line
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, log_rows, make_trainer, pad, ragged_rows, tiny_llama
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.updates.batches import count_batches

ROWS = ragged_rows(22, seed=9)
SIZES = [
    {"effective_batch_size": 8, "per_device_train_batch_size": 3},
    {"effective_batch_size": 8, "max_tokens_per_micro_batch": 30},
    {"tokens_per_update": 40, "per_device_train_batch_size": 2},
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
]


class Chain:
    def __init__(self, *loaders):
        self.loaders = loaders

    def __len__(self):
        return sum(map(len, self.loaders))

    def __iter__(self):
        for loader in self.loaders:
            yield from loader


class Wrapped(GradAccTrainer):
    """The usual way to change batches on their way: a loader around the trainer's own."""

    def get_train_dataloader(self):
        return Chain(super().get_train_dataloader())


def gradients(tmp_path, trainer_class, **options):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, ROWS, trainer_class=trainer_class, callbacks=[recorder], learning_rate=0.0,
        **options,
    )  # fmt: skip
    with float64_everywhere():
        trainer.train()
    return trainer, recorder.gradients


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_loader_around_ours_trains_the_same_updates(tmp_path, size):
    plain, expected = gradients(tmp_path / "plain", GradAccTrainer, **size)
    wrapped, found = gradients(tmp_path / "wrapped", Wrapped, **size)
    assert len(found) == len(expected) > 1
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-12
    sizes = [
        [row["effective_batch_size"] for row in log_rows(trainer)] for trainer in (wrapped, plain)
    ]
    assert sizes[0] == sizes[1]
    members = plain.get_train_dataloader().updates.batch_sampler.membership(0)
    whole = tiny_llama().train()
    with float64_everywhere():
        reference = reference_gradient(whole, [ROWS[i] for i in members[0]], pad)
    assert relative_error(found[0], reference) <= 1e-10


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_accumulation_of_its_length_is_an_update(tmp_path, size):
    trainer = make_trainer(tmp_path, ROWS, **size)
    loader = trainer.get_train_dataloader()
    steps = trainer.args.gradient_accumulation_steps
    assert -(-len(loader) // steps) == len(loader.updates)
    trainer.train()
    assert trainer.state.global_step == len(loader.updates)


@pytest.mark.parametrize("num_rows", [1, 5, 16, 66])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_are_counted_as_accelerate_counts_them(num_rows, batch_size, world_size):
    batches = BatchSampler(SequentialSampler(range(num_rows)), batch_size, drop_last=False)
    shard = BatchSamplerShard(batches, num_processes=world_size, process_index=0)
    counted = count_batches(
        num_rows, batch_size=batch_size, world_size=world_size, num_updates=99, steps_per_update=9
    )
    assert counted == len(shard)


def test_looking_at_batches_leaves_the_run_as_it_was(tmp_path):
    ends = []
    for looks in (False, True):
        trainer, found = None, Recorder()
        trainer = make_trainer(
            tmp_path, ROWS, callbacks=[found], effective_batch_size=6, num_train_epochs=2
        )
        if looks:
            loader = trainer.get_train_dataloader()
            assert next(iter(loader))["input_ids"].ndim == 2
            assert len(list(loader)) >= len(loader)
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert relative_error(ends[1], ends[0]) == 0


def test_each_pass_by_hand_has_its_own_order(tmp_path):
    trainer = fit_line(GradAccTrainer, tmp_path, train=32)
    loader = trainer.get_train_dataloader()
    first, second = ([batch["input_x"].tolist() for batch in loader] for _ in range(2))
    assert first != second
    loader.set_epoch(0)
    assert [batch["input_x"].tolist() for batch in loader] == first


def test_asking_for_the_loader_twice_loses_no_row_of_a_stream_that_gives_each_once(tmp_path):
    seen = []

    class Keeps(GradAccTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.extend(inputs["input_x"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = fit_line(Keeps, tmp_path, train=LineStream(64, one_shot=True), max_steps=8)
    trainer.get_train_dataloader()
    trainer.get_train_dataloader()
    trainer.train()
    assert sorted(seen) == sorted(LineRows(64).x.tolist())


def of_batches(trainer):
    return DataLoader(ROWS, batch_size=3, collate_fn=pad)


def of_a_batch_sampler(trainer):
    batches = BatchSampler(SequentialSampler(ROWS), 3, drop_last=False)
    return DataLoader(ROWS, batch_sampler=batches, collate_fn=pad)


def prepared(trainer):
    return trainer.accelerator.prepare(GradAccTrainer.get_train_dataloader(trainer))


@pytest.mark.parametrize("make", [of_batches, of_a_batch_sampler, prepared])
@pytest.mark.parametrize(("size", "steps"), [(6, 4), (9, 3), (3, 8), (2, 8)])
def test_batches_of_a_loader_of_ones_own_make_updates_of_the_size_asked_for(
    tmp_path, size, steps, make
):
    class Own(GradAccTrainer):
        get_train_dataloader = make

    trainer = make_trainer(
        tmp_path, ROWS, trainer_class=Own, effective_batch_size=size, per_device_train_batch_size=3
    )
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert log_rows(trainer)[0]["effective_batch_size"] == max(size, 3)


def test_the_attributes_are_those_of_the_stock_loader(tmp_path):
    trainer = fit_line(
        GradAccTrainer, tmp_path, train=66, per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    loader = trainer.get_train_dataloader()
    assert isinstance(loader, DataLoader)
    assert loader.dataset is trainer.train_dataset
    assert (loader.batch_size, loader.total_batch_size, loader.total_dataset_length) == (4, 4, 66)
    whole = fit_line(
        GradAccTrainer, tmp_path, train=66, arguments_class=GradAccArguments,
        effective_batch_size=10, per_device_train_batch_size=4,
    ).get_train_dataloader()  # fmt: skip
    assert (whole.batch_size, whole.total_batch_size, len(whole)) == (4, 10, 7)

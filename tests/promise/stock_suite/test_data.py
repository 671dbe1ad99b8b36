"""Loaders, samplers, collators and columns, in training and evaluation."""

import datasets
import numpy as np
import pytest
import torch
from support.line import LineConfig, LineModel, LineRows, LineStream, PlainLine, fit_line, fitted
from torch.utils.data import DataLoader, SequentialSampler
from transformers import default_data_collator


def rows_seen(kind):
    """A class whose runs keep which rows each micro-batch held."""

    class Keeps(kind):
        seen = ()

        def training_step(self, model, inputs, *args, **kwargs):
            self.seen += (inputs["input_x"].tolist(),)
            return super().training_step(model, inputs, *args, **kwargs)

    return Keeps


def test_the_loaders_know_their_batch_size(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, per_device_train_batch_size=16, per_device_eval_batch_size=32
    )
    assert trainer.get_train_dataloader().total_batch_size == 16
    assert trainer.get_eval_dataloader().total_batch_size == 32


def test_the_loaders_know_the_length_of_their_data(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, train=66, evaluate=74)
    assert trainer.get_train_dataloader().total_dataset_length == 66
    assert trainer.get_eval_dataloader().total_dataset_length == 74


@pytest.mark.parametrize(("drop", "train", "evaluate"), [(False, 5, 3), (True, 4, 2)])
def test_the_last_batch_is_dropped_if_asked(kind, tmp_path, drop, train, evaluate):
    trainer = fit_line(
        kind,
        tmp_path,
        train=66,
        evaluate=74,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        dataloader_drop_last=drop,
    )
    assert len(trainer.get_train_dataloader()) == train
    assert len(trainer.get_eval_dataloader()) == evaluate
    assert len(trainer.get_eval_dataloader(LineRows(128))) == 4


@pytest.mark.parametrize("steps", [1, 4])
def test_the_train_loader_counts_micro_batches(kind, tmp_path, steps):
    trainer = fit_line(
        kind, tmp_path, train=66, per_device_train_batch_size=4, gradient_accumulation_steps=steps
    )
    assert len(trainer.get_train_dataloader()) == 17


@pytest.mark.parametrize("steps", [1, 4])
def test_the_train_loader_gives_micro_batches_to_who_iterates_it(kind, tmp_path, steps):
    trainer = fit_line(
        kind, tmp_path, train=66, per_device_train_batch_size=4, gradient_accumulation_steps=steps
    )
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 17
    assert {len(batch["input_x"]) for batch in batches} == {4, 2}
    assert sorted(x for batch in batches for x in batch["input_x"].tolist()) == sorted(
        LineRows(66).x.tolist()
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_a_schedule_made_of_the_loaders_length_ends_with_the_run(kind, tmp_path, steps):
    """As in many programs: batches // accumulation * epochs."""
    trainer = fit_line(
        kind,
        tmp_path,
        train=72,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=steps,
        num_train_epochs=2,
    )
    num_steps = len(trainer.get_train_dataloader()) // steps * 2
    trainer.create_optimizer_and_scheduler(num_training_steps=num_steps)
    trainer._created_lr_scheduler = False  # as if it had been passed in
    trainer.train()
    assert trainer.state.global_step == num_steps
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_every_row_is_trained_once_an_epoch(kind, tmp_path):
    trainer = fit_line(
        rows_seen(kind), tmp_path, train=30, per_device_train_batch_size=4,
        gradient_accumulation_steps=3, num_train_epochs=2,
    )  # fmt: skip
    trainer.train()
    rows = [x for batch in trainer.seen for x in batch]
    assert sorted(rows) == sorted(2 * LineRows(30).x.tolist())
    assert max(map(len, trainer.seen)) == 4


def test_each_epoch_has_its_own_order(kind, tmp_path):
    trainer = fit_line(rows_seen(kind), tmp_path, train=32, num_train_epochs=2)
    trainer.train()
    assert trainer.seen[:4] != trainer.seen[4:]


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_sampling_strategies_train_every_row(kind, tmp_path, strategy):
    class Widths(PlainLine):
        main_input_name = "input_x"

    lengths = [3, 9, 1, 7, 5, 2, 8, 4]
    rows = [{"input_ids": [1.0] * n, "input_x": float(n), "labels": 2.0 * n} for n in lengths]
    trainer = fit_line(
        rows_seen(kind),
        tmp_path,
        model=Widths(),
        train=rows,
        data_collator=lambda part: default_data_collator(
            [{k: row[k] for k in ("input_x", "labels")} for row in part]
        ),
        remove_unused_columns=False,
        train_sampling_strategy=strategy,
        per_device_train_batch_size=2,
        num_train_epochs=1,
    )
    trainer.train()
    order = [x for batch in trainer.seen for x in batch]
    assert sorted(order) == sorted(map(float, lengths))
    if strategy == "sequential":
        assert order == lengths


def test_a_sampler_of_ones_own_orders_the_rows(kind, tmp_path):
    class Own(rows_seen(kind)):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset)

    trainer = fit_line(Own, tmp_path, train=16, num_train_epochs=1)
    trainer.train()
    assert [x for batch in trainer.seen for x in batch] == LineRows(16).x.tolist()


class Chain:
    """Several loaders as one, without a dataset."""

    def __init__(self, loaders):
        self.loaders = loaders

    def __len__(self):
        return sum(map(len, self.loaders))

    def __iter__(self):
        for loader in self.loaders:
            yield from loader


def test_a_loader_needs_no_dataset(kind, tmp_path):
    class Own(rows_seen(kind)):
        def get_train_dataloader(self):
            return Chain([super().get_train_dataloader(), super().get_train_dataloader()])

        def get_eval_dataloader(self, eval_dataset=None):
            first = super().get_eval_dataloader(eval_dataset)
            return Chain([first, super().get_eval_dataloader(eval_dataset)])

    trainer = fit_line(Own, tmp_path, train=32, evaluate=16, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 8
    assert sorted(x for b in trainer.seen for x in b) == sorted(2 * LineRows(32).x.tolist())
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_loader_of_ones_own_gives_the_batches(kind, tmp_path):
    class Own(rows_seen(kind)):
        def get_train_dataloader(self):
            return DataLoader(
                self.train_dataset, batch_size=5, shuffle=False, collate_fn=self.data_collator
            )

    trainer = fit_line(Own, tmp_path, train=20, num_train_epochs=1)
    trainer.train()
    assert [len(batch) for batch in trainer.seen] == [5, 5, 5, 5]
    assert [x for batch in trainer.seen for x in batch] == LineRows(20).x.tolist()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("persistent", [False, True])
def test_eval_loaders_are_kept_only_with_persistent_workers(kind, tmp_path, persistent):
    first, second = LineRows(8), LineRows(6)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = fit_line(
        kind, tmp_path, evaluate={"first": first, "second": second}, **workers if persistent else {}
    )
    trainer.accelerator.prepare = lambda loader: loader
    loaders = [trainer.get_eval_dataloader(name) for name in ("first", "first", "second")]
    assert [loader.dataset for loader in loaders] == [first, first, second]
    assert (loaders[0] is loaders[1]) == persistent


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_may_be_loaded_by_workers(kind, tmp_path, workers):
    trainer = fit_line(
        rows_seen(kind), tmp_path, train=24, dataloader_num_workers=workers, num_train_epochs=1
    )
    trainer.train()
    assert sorted(x for b in trainer.seen for x in b) == sorted(LineRows(24).x.tolist())


def columns(rows):
    return datasets.Dataset.from_list([{k: float(v) for k, v in row.items()} for row in rows])


def test_columns_the_model_does_not_take_are_removed(kind, tmp_path):
    class Narrow(LineModel):
        def forward(self, input_x, labels=None):
            return super().forward(input_x, labels)

    rows = columns([{**LineRows(16)[i], "extra": 1.0} for i in range(16)])
    trainer = fit_line(kind, tmp_path, model=Narrow(LineConfig()), train=rows, evaluate=rows,
                       num_train_epochs=1)  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_columns_stay_if_asked(kind, tmp_path):
    class NeedsExtra(LineModel):
        def forward(self, input_x, labels=None, extra=None):
            assert extra is not None
            return super().forward(input_x, labels)

    rows = [{**LineRows(8)[i], "extra": 1.0} for i in range(8)]
    trainer = fit_line(kind, tmp_path, model=NeedsExtra(LineConfig()), train=rows,
                       remove_unused_columns=False, num_train_epochs=1)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_label_column_may_be_called_label(kind, tmp_path):
    rows = [
        {"input_x": row["input_x"], "label": row["labels"]}
        for row in map(LineRows(16).__getitem__, range(16))
    ]
    trainer = fit_line(kind, tmp_path, train=rows, evaluate=rows, num_train_epochs=1)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_columns_no_model_takes_are_named(kind, tmp_path):
    class Narrow(LineModel):
        def forward(self, input_x, labels=None):
            return super().forward(input_x, labels)

    rows = columns([{"foo": 1.0, "bar": 2.0}] * 8)
    trainer = fit_line(kind, tmp_path, model=Narrow(LineConfig()), train=rows)
    with pytest.raises(ValueError, match="No columns in the dataset match"):
        trainer.train()


def test_the_number_of_examples_is_told(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, train=66, evaluate=74)
    assert trainer.num_examples(trainer.get_train_dataloader()) == 66
    assert trainer.num_examples(trainer.get_eval_dataloader()) == 74


@pytest.mark.parametrize(
    "config",
    [
        {"split_batches": True},
        {"dispatch_batches": False, "even_batches": False},
        {"use_seedable_sampler": True},
        {"non_blocking": True},
    ],
    ids=str,
)
def test_settings_of_accelerate_are_taken(kind, tmp_path, config):
    trainer = fit_line(kind, tmp_path, accelerator_config=config, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 8
    for name, value in config.items():
        assert getattr(trainer.args.accelerator_config, name) == value


def test_accelerate_may_not_accumulate_by_itself(kind, tmp_path):
    config = {"gradient_accumulation_kwargs": {"num_steps": 10}}
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        fit_line(kind, tmp_path, accelerator_config=config, gradient_accumulation_steps=5)
        # Whoever does not refuse must not take the 10 either.


def test_sync_each_batch_trains_the_same(kind, tmp_path):
    config = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    ends = []
    for options in ({}, {"accelerator_config": config}):
        trainer = fit_line(kind, tmp_path, gradient_accumulation_steps=2, max_steps=3, **options)
        trainer.train()
        ends.append(fitted(trainer))
    assert ends[1] == pytest.approx(ends[0])


def test_a_stream_may_have_columns_the_model_does_not_take(kind, tmp_path):
    class Narrow(LineModel):
        def forward(self, input_x, labels=None):
            return super().forward(input_x, labels)

    stream = LineStream(labels=("labels", "extra"))
    fit_line(kind, tmp_path, model=Narrow(LineConfig()), train=stream, max_steps=4).train()


def test_a_list_of_rows_is_a_dataset(kind, tmp_path):
    rows = [{"input_x": np.float32(i), "labels": np.float32(2 * i)} for i in range(8)]
    trainer = fit_line(rows_seen(kind), tmp_path, train=rows, num_train_epochs=1)
    trainer.train()
    assert sorted(trainer.seen[0]) == list(range(8))


def test_rows_of_tensors_are_stacked(kind, tmp_path):
    rows = [{"input_x": torch.tensor([float(i), 1.0]), "labels": torch.zeros(2)} for i in range(8)]
    trainer = fit_line(kind, tmp_path, train=rows, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_batch_of_one_row_trains_every_row(kind, tmp_path):
    trainer = fit_line(
        rows_seen(kind), tmp_path, train=10, per_device_train_batch_size=1,
        gradient_accumulation_steps=4, num_train_epochs=1,
    )  # fmt: skip
    trainer.train()
    assert sorted(x for b in trainer.seen for x in b) == sorted(LineRows(10).x.tolist())
    assert trainer.state.global_step == 3

"""Bad input: one clear error that names field, value and way out, before any training."""

import pytest
import torch
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_gradacc import ConfigError, DataError, GradAccArguments

ROWS = ragged_rows(6)


class NothingTrained(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        pytest.fail("an update was trained")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"effective_batch_size": 0}, "effective_batch_size = 0 is below 1"),
        ({"effective_batch_size": 2.5}, "effective_batch_size = 2.5 is not a whole number"),
        ({"tokens_per_update": -1}, "tokens_per_update = -1 is below 1"),
        ({"noise_scale_every": 0}, "noise_scale_every = 0 is below 1"),
        ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch = 0 is below 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size = 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0"),
        (
            {"effective_batch_size": 8, "gradient_accumulation_steps": 4},
            "both say how large an update is: leave gradient_accumulation_steps out",
        ),
        ({"effective_batch_size": 8, "tokens_per_update": 9}, "keep one of them"),
        ({"incomplete_update": "maybe"}, "use 'keep' or 'drop'"),
        (
            {"incomplete_update": "keep", "dataloader_drop_last": True},
            "contradicts dataloader_drop_last",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_options_are_refused_when_they_are_written(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        GradAccArguments(output_dir=str(tmp_path), **options)


def test_all_problems_of_the_options_come_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        GradAccArguments(
            output_dir=str(tmp_path), effective_batch_size=0, incomplete_update="maybe"
        )
    assert len(str(error.value).splitlines()) == 2


def test_what_loads_batches_in_stock_has_no_effect_and_that_is_said(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("hf_gradacc.trainer.data.logger.warning_once", lines.append)
    options = {"accelerator_config": {"split_batches": True}, "max_steps": 1}
    make_trainer(tmp_path, ragged_rows(4), **options).train()
    assert [line.partition(" has")[0] for line in lines] == [
        "accelerator_config.split_batches = True"
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "the training dataset is empty: it has 0 rows"),
        ([{"labels": [1, 2]}], "failed on row 0 of the training dataset"),
        ([{**row, "labels": [-100] * 30} for row in ROWS], "none of the 6 training rows"),
    ],
    ids=["empty", "no input_ids", "no target"],
)
def test_data_that_cannot_be_trained_is_refused_before_training(tmp_path, rows, words):
    trainer = make_trainer(tmp_path, rows, callbacks=[NothingTrained()])
    with pytest.raises(DataError, match=words):
        trainer.train()


def test_rows_that_collate_to_no_input_name_the_keys_there_are(tmp_path):
    rows = [{"labels": [1, 2]}] * 3

    def collate(batch):
        return {"labels": pad([{**ROWS[0], **row} for row in batch])["labels"]}

    trainer = make_trainer(tmp_path, rows, data_collator=collate)
    with pytest.raises(DataError, match=r"no `input_ids`.*the data collator returns \['labels'\]"):
        trainer.train()


def test_an_update_without_a_target_is_skipped_and_counted_and_nothing_moves(tmp_path):
    from support.tiny import log_rows

    bare = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS[:2]]
    model = tiny_llama()
    weights = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(model.lm_head.weight.detach().clone())

    trainer = make_trainer(
        tmp_path,
        [*ROWS[:2], *bare, *ROWS[2:4]],
        model=model,
        effective_batch_size=2,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        callbacks=[Watch()],
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert bool((weights[0] == weights[1]).all())
    assert not bool((weights[1] == weights[2]).all())
    rows = log_rows(trainer)
    assert [row["tokens_per_update"] > 0 for row in rows] == [True, False, True]
    assert [row.get("skipped_updates") for row in rows] == [None, 1, 1]
    assert rows[-1]["sequences_without_target"] == 2


def test_no_optimizer_is_called_for_an_update_without_a_target(tmp_path):
    class Counting(torch.optim.SGD):
        calls = 0

        def step(self, closure=None):
            Counting.calls += 1
            return super().step(closure)

    model = tiny_llama()
    bare = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS[:2]]
    optimizer = Counting(model.parameters(), lr=0.1)
    run(
        tmp_path,
        [*ROWS[:2], *bare, *ROWS[2:4]],
        model=model,
        effective_batch_size=2,
        train_sampling_strategy="sequential",
        trainer_options={"optimizers": (optimizer, None)},
    )
    assert Counting.calls == 2


def test_a_skipped_update_does_not_pull_the_logged_loss_towards_zero(tmp_path):
    from support.tiny import log_rows

    bare = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS[:2]]
    options = {
        "effective_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.0,
    }
    apart = log_rows(run(tmp_path, ROWS[:4], **options))
    together = log_rows(run(tmp_path, [*ROWS[:2], *bare, *ROWS[2:4]], logging_steps=3, **options))
    assert together[0]["loss"] == pytest.approx(sum(row["loss"] for row in apart) / 2, rel=1e-6)


def run(tmp_path, rows, **options):
    trainer = make_trainer(tmp_path, rows, **options)
    trainer.train()
    return trainer


class Broken(list):
    """Rows of which one lies on a bad block."""

    def __getitem__(self, index):
        if index == 27:
            raise OSError(5, "Input/output error")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_is_named(tmp_path, workers):
    trainer = make_trainer(
        tmp_path,
        Broken(ragged_rows(30)),
        effective_batch_size=6,
        dataloader_num_workers=workers,
    )
    with pytest.raises(DataError) as caught:
        trainer.train()
    assert "row 27 of the training dataset cannot be read" in str(caught.value)
    assert "OSError: [Errno 5] Input/output error" in str(caught.value)


@pytest.mark.slow
def test_a_stream_that_breaks_says_how_far_it_was_read(tmp_path):
    class Breaking(IterableDataset):
        def __iter__(self):
            yield from ragged_rows(20)
            raise ConnectionError("the server went away")

    trainer = make_trainer(tmp_path, Breaking(), effective_batch_size=6, max_steps=9)
    with pytest.raises(DataError, match="failed after 20 rows of epoch 0: ConnectionError: the"):
        trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_the_collator_fails_on_are_named(tmp_path, workers):
    rows = ragged_rows(30)
    rows[27]["labels"] = [*rows[27]["labels"][:-1], "x"]
    trainer = make_trainer(
        tmp_path,
        rows,
        effective_batch_size=6,
        per_device_train_batch_size=1,
        dataloader_num_workers=workers,
    )
    with pytest.raises(DataError, match="the data collator failed on rows 27 of the training"):
        trainer.train()

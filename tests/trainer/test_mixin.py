"""Drop-in: what people write for the stock Trainer runs, and sees what they asked for."""

import datasets
import numpy as np
import pytest
import torch
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, log_rows, make_trainer, pad, ragged_rows, tiny_llama
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_gradacc import GradAccArguments, GradAccMixin, GradAccOptions, GradAccTrainer

ROWS = ragged_rows(10, seed=2)
WHOLE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5, "learning_rate": 0.0}


def whole_gradient(rows=ROWS, loss_of=None):
    model = tiny_llama().train()
    with float64_everywhere():
        extra = {} if loss_of is None else {"loss_of": loss_of}
        return reference_gradient(model, rows, pad, **extra)


def train(tmp_path, rows=ROWS, **options):
    recorder = Recorder()
    callbacks = [recorder, *options.pop("callbacks", ())]
    trainer = make_trainer(tmp_path, rows, callbacks=callbacks, **{**WHOLE, **options})
    with float64_everywhere():
        trainer.train()
    return trainer, recorder


class AsMap(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.mark.parametrize(
    "wrap",
    [list, AsMap, datasets.Dataset.from_list],
    ids=["list", "map dataset", "datasets.Dataset"],
)
def test_every_kind_of_map_dataset_trains_to_the_same_gradient(tmp_path, wrap):
    _, recorder = train(tmp_path, wrap(ROWS))
    assert relative_error(recorder.gradients[0], whole_gradient()) <= 1e-10


@pytest.mark.slow
def test_columns_that_forward_does_not_take_are_left_out_as_in_stock(tmp_path):
    rows = [{**row, "source": f"row {i}"} for i, row in enumerate(ROWS)]
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        _, recorder = train(tmp_path, dataset)
        assert relative_error(recorder.gradients[0], whole_gradient()) <= 1e-10


@pytest.mark.slow
def test_rows_may_hold_tensors_and_arrays(tmp_path):
    for convert in (torch.tensor, np.array):
        rows = [{k: convert(v) for k, v in row.items()} for row in ROWS]

        def collate(batch):
            return pad([{k: v.tolist() for k, v in row.items()} for row in batch])

        _, recorder = train(tmp_path, rows, data_collator=collate)
        assert relative_error(recorder.gradients[0], whole_gradient()) <= 1e-10


def test_the_default_collator_works_where_stock_has_it(tmp_path):
    rows = [{k: torch.tensor(v) for k, v in row.items()} for row in ragged_rows(40, seed=3)]
    rows = [row for row in rows if len(row["labels"]) == 9]
    assert len(rows) > 2
    _, recorder = train(tmp_path, rows, data_collator=default_data_collator)
    expected = whole_gradient([{k: v.tolist() for k, v in row.items()} for row in rows])
    assert relative_error(recorder.gradients[0], expected) <= 1e-10


def test_a_collator_that_makes_the_labels_is_counted_after_it_has(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    _, recorder = train(
        tmp_path, rows, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)
    )
    full = [{**row, "labels": row["input_ids"]} for row in ROWS]
    assert relative_error(recorder.gradients[0], whole_gradient(full)) <= 1e-10


def test_random_masks_are_a_function_of_the_update_not_of_what_ran_before(tmp_path):
    tokenizer = make_tokenizer()
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.4)
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    seen = []
    for workers in (0, 2):
        trainer = make_trainer(
            tmp_path, rows, data_collator=collator, dataloader_num_workers=workers, **WHOLE
        )
        torch.rand(1 + workers)
        loader = trainer.get_train_dataloader().updates
        seen.append([mb.inputs["input_ids"].tolist() for update in loader for mb in update])
    assert seen[0] == seen[1]


def make_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<mask>", "<unk>", *(f"w{i}" for i in range(45))]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", mask_token="<mask>", unk_token="<unk>"
    )


def test_padding_that_is_learned_is_said_and_still_exact(tmp_path):
    def careless(rows):
        batch = pad(rows)
        return {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 0)}

    trainer, recorder = train(tmp_path, data_collator=careless)
    model = tiny_llama().train()
    with float64_everywhere():
        expected = reference_gradient(model, ROWS, careless)
    assert relative_error(recorder.gradients[0], expected) <= 1e-10
    assert any("learns to predict padding" in line for line in trainer.facts.warnings)


# ---- losses people write -----------------------------------------------------------------------


def cross_entropy(outputs, labels, reduction):
    logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction=reduction)


def mean_loss(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs, labels, "mean")


def sum_over_count(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs, labels, "sum") / num_items_in_batch


def either(outputs, labels, num_items_in_batch=None):
    if num_items_in_batch is None:
        return cross_entropy(outputs, labels, "mean")
    return cross_entropy(outputs, labels, "sum") / num_items_in_batch


@pytest.mark.parametrize("loss", [mean_loss, sum_over_count, either])
def test_a_compute_loss_func_may_use_the_count_or_ignore_it(tmp_path, loss):
    _, recorder = train(tmp_path, trainer_options={"compute_loss_func": loss})
    assert relative_error(recorder.gradients[0], whole_gradient()) <= 1e-10


class Doubled(GradAccTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


class Counting(GradAccTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = 2 * cross_entropy(outputs, labels, "sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("trainer_class", [Doubled, Counting])
def test_an_overridden_compute_loss_is_weighted_like_any_other(tmp_path, trainer_class):
    _, recorder = train(tmp_path, trainer_class=trainer_class)
    expected = {name: 2 * g for name, g in whole_gradient().items()}
    assert relative_error(recorder.gradients[0], expected) <= 1e-10


def test_a_batch_without_labels_counts_what_the_model_takes_its_mean_over(tmp_path):
    class OwnTargets(nn.Module):
        """Predicts the next token of its input; is never given labels."""

        def __init__(self):
            super().__init__()
            self.llama = tiny_llama()

        def forward(self, input_ids, attention_mask):
            labels = input_ids.masked_fill(attention_mask == 0, -100)
            return {"loss": self.llama(input_ids, attention_mask, labels=labels).loss}

    rows = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in ROWS]
    _, recorder = train(tmp_path, rows, model=OwnTargets())
    full = [{**row, "labels": row["input_ids"]} for row in ROWS]
    expected = {f"llama.{name}": g for name, g in whole_gradient(full).items()}
    assert relative_error(recorder.gradients[0], expected) <= 1e-10


def test_label_smoothing_is_that_of_the_whole_batch(tmp_path):
    def smoothed(model, batch, epsilon=0.2):
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        return nn.functional.cross_entropy(logits, labels, label_smoothing=epsilon)

    _, recorder = train(tmp_path, label_smoothing_factor=0.2)
    assert relative_error(recorder.gradients[0], whole_gradient(loss_of=smoothed)) <= 1e-10


# ---- callbacks, arguments, subclasses ----------------------------------------------------------


def test_callbacks_hear_every_event_in_the_order_of_stock(tmp_path):
    heard = []
    for trainer_class, arguments_class in (
        (Trainer, TrainingArguments),
        (GradAccTrainer, GradAccArguments),
    ):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path,
            ROWS,
            callbacks=[recorder],
            trainer_class=trainer_class,
            arguments_class=arguments_class,
            eval_dataset=ROWS[:4],
            eval_strategy="epoch",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
        )
        trainer.train()
        heard.append(recorder.events)
    assert heard[1] == heard[0]
    assert heard[1].count("substep_end") == 4


def test_everyone_but_the_stock_loop_sees_what_the_user_asked_for(tmp_path):
    class Look(TrainerCallback):
        seen = set()

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.add((args.gradient_accumulation_steps, args.logging_nan_inf_filter))
            self.seen.add(args.to_dict()["gradient_accumulation_steps"])

    look = Look()
    trainer, _ = train(tmp_path, callbacks=[look], save_strategy="steps", save_steps=1)
    assert look.seen == {(5, True), 5}
    assert trainer.args.gradient_accumulation_steps == 5
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.gradient_accumulation_steps == 5


def test_the_users_settings_come_back_when_training_fails(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("stop here")

    trainer = make_trainer(tmp_path, ROWS, callbacks=[Fail()], **WHOLE)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.train()
    assert trainer.args.gradient_accumulation_steps == 5


def test_the_mixin_goes_before_any_trainer_and_the_options_before_any_arguments(tmp_path):
    from dataclasses import dataclass

    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    @dataclass
    class Arguments(GradAccOptions, Seq2SeqTrainingArguments):
        pass

    class Mixed(GradAccMixin, Seq2SeqTrainer):
        pass

    options = {**WHOLE, "gradient_accumulation_steps": 1, "effective_batch_size": 10}
    _, recorder = train(tmp_path, trainer_class=Mixed, arguments_class=Arguments, **options)
    assert relative_error(recorder.gradients[0], whole_gradient()) <= 1e-10


def test_the_sampler_of_a_subclass_decides_the_order(tmp_path):
    class Weighted(GradAccTrainer):
        def _get_train_sampler(self, train_dataset=None):
            weights = [1.0, 1.0] + [0.0] * 8
            return WeightedRandomSampler(weights, 6, generator=torch.Generator().manual_seed(0))

    trainer, _ = train(tmp_path, trainer_class=Weighted, gradient_accumulation_steps=1)
    assert trainer.state.global_step == 3


def test_a_random_sampler_that_says_more_than_shuffle_is_kept(tmp_path):
    class Few(GradAccTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return RandomSampler(self.train_dataset, num_samples=4)

    trainer, _ = train(tmp_path, trainer_class=Few, gradient_accumulation_steps=1)
    assert trainer.state.global_step == 2


def test_the_loader_of_a_subclass_keeps_its_micro_batches_and_gets_exact_weights(tmp_path):
    class Own(GradAccTrainer):
        def get_train_dataloader(self):
            return DataLoader(ROWS, batch_size=3, collate_fn=pad)

    trainer, recorder = train(
        tmp_path, trainer_class=Own, gradient_accumulation_steps=4, per_device_train_batch_size=3
    )
    assert trainer.state.global_step == 1
    assert relative_error(recorder.gradients[0], whole_gradient()) <= 1e-10
    trainer, recorder = train(
        tmp_path, trainer_class=Own, gradient_accumulation_steps=3, num_train_epochs=2
    )
    assert [len(recorder.gradients), trainer.state.epoch] == [4, 2.0]
    assert relative_error(recorder.gradients[2], whole_gradient(ROWS[:9])) <= 1e-10


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_every_sampling_strategy_of_stock_is_taken(tmp_path, strategy):
    trainer, _ = train(tmp_path, train_sampling_strategy=strategy, gradient_accumulation_steps=2)
    members = trainer.get_train_dataloader().updates.batch_sampler.membership(0)
    in_order = sorted(i for update in members for i in update)
    assert in_order == list(range(10))
    assert (members[0] == [0, 1, 2, 3]) is (strategy == "sequential")


def test_tokens_seen_and_operations_are_counted_as_by_stock(tmp_path):
    for kind in ("all", "non_padding"):
        trainer, _ = train(tmp_path, include_num_input_tokens_seen=kind)
        window = log_rows(trainer)[0]
        used = window["input_tokens_per_update"]
        computed = used / (1 - window["padding_fraction"])
        assert used == sum(len(row["input_ids"]) for row in ROWS)
        assert trainer.state.num_input_tokens_seen == round(used if kind != "all" else computed)
        parameters = trainer.model.num_parameters(exclude_embeddings=True)
        assert trainer.state.total_flos == 6 * round(computed) * parameters


def test_the_learning_rate_logged_is_the_one_the_update_used(tmp_path):
    trainer, _ = train(
        tmp_path,
        ragged_rows(30),
        learning_rate=0.4,
        lr_scheduler_type="linear",
        gradient_accumulation_steps=4,
    )
    assert [row["learning_rate"] for row in log_rows(trainer)] == pytest.approx(
        [0.4 * (1 - u / 4) for u in range(4)]
    )


def test_the_final_report_counts_the_rows_that_were_trained(tmp_path):
    trainer, _ = train(tmp_path, ragged_rows(9), gradient_accumulation_steps=8, num_train_epochs=5)
    last = trainer.state.log_history[-1]
    trained = last["train_samples_per_second"] * last["train_runtime"]
    assert trained == pytest.approx(45, rel=0.02)

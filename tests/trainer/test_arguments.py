"""A trainer takes the arguments that the trainer behind it would, and adds our options to them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from support.reference import float64_everywhere
from support.tiny import PLAIN, make_trainer, pad, ragged_rows, tiny_llama
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_gradacc import ConfigError, GradAccArguments, GradAccMixin, GradAccTrainer
from hf_gradacc.arguments import GradAccOptions, add_options

ROWS = ragged_rows(8, seed=2)
KINDS = [TrainingArguments, Seq2SeqTrainingArguments, GradAccArguments]


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_any_class_train_the_same_updates(tmp_path, kind):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    weights = []
    for arguments_class in (GradAccArguments, kind):
        trainer = make_trainer(
            tmp_path / arguments_class.__name__, ROWS, arguments_class=arguments_class, **options
        )
        with float64_everywhere():
            trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
        assert trainer.state.global_step == 1
    assert all(torch.equal(p, weights[1][n]) for n, p in weights[0].items())


def test_the_object_stays_the_users_own(tmp_path):
    """Whoever made it goes on setting what the trainer reads."""
    written = TrainingArguments(output_dir=str(tmp_path), **PLAIN)
    trainer = GradAccTrainer(tiny_llama(), written, train_dataset=ROWS, data_collator=pad)
    assert trainer.args is written
    assert isinstance(written, GradAccArguments)
    written.max_tokens_per_micro_batch = 32
    trainer.train()
    assert trainer.update_collator.max_tokens == 32


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_copied_and_pickled_with_the_options(tmp_path, kind):
    arguments = kind(output_dir=str(tmp_path), learning_rate=0.25)
    add_options(arguments)
    arguments.tokens_per_update = 99
    for copied in (copy.deepcopy(arguments), pickle.loads(pickle.dumps(arguments))):
        assert type(copied) is type(arguments)
        assert isinstance(copied, kind)
        assert isinstance(copied, GradAccOptions)
        assert copied.to_dict() == arguments.to_dict()
        assert (copied.learning_rate, copied.tokens_per_update) == (0.25, 99)


def test_a_checkpoint_holds_them(tmp_path):
    trainer = make_trainer(
        tmp_path,
        ROWS,
        arguments_class=Seq2SeqTrainingArguments,
        save_strategy="steps",
        save_steps=1,
        hub_token="hf_planted",
    )
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert isinstance(saved, Seq2SeqTrainingArguments)
    assert (saved.layout, saved.hub_token) == ("auto", None)


def test_a_mixin_trainer_takes_no_arguments_where_the_one_behind_it_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Ours(GradAccMixin, Trainer):
        pass

    trainer = Ours(tiny_llama(), train_dataset=ROWS, data_collator=pad)
    assert isinstance(trainer.args, GradAccArguments)
    assert trainer.get_total_train_batch_size(trainer.args) == 8


@dataclass
class OptionsLast(TrainingArguments, GradAccOptions):
    """Stock's own check never hands on to ours."""


def test_options_behind_the_stock_arguments_are_checked_too(tmp_path):
    arguments = OptionsLast(output_dir=str(tmp_path), use_cpu=True, layout="squashed")
    with pytest.raises(ConfigError, match="layout = 'squashed': use 'auto', 'padded', 'packed'"):
        GradAccTrainer(tiny_llama(), arguments)

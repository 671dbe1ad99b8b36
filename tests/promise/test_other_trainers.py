"""The mixin before other trainers of Transformers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from support.bytes_tokenizer import bytes_tokenizer
from support.reference import assert_same_updates, float64_everywhere
from support.tiny import PLAIN, Recorder
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_gradacc import GradAccMixin, GradAccOptions
from hf_gradacc.errors import DataError
from hf_gradacc.loss.refusals import refuse_by_name


@dataclass
class Seq2SeqArguments(GradAccOptions, Seq2SeqTrainingArguments):
    pass


class MixedSeq2Seq(GradAccMixin, Seq2SeqTrainer):
    pass


def translate(out, *, mixed, in_little_memory=False, **options):
    draw = random.Random(0)

    def ids(shortest, longest):
        return [draw.randrange(3, 48) for _ in range(draw.randint(shortest, longest))]

    rows = [{"input_ids": ids(2, 12), "labels": ids(1, 9)} for _ in range(14)]
    with float64_everywhere():
        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=48,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
        )
        model = BartForConditionalGeneration(config)
        model.generation_config = GenerationConfig(
            max_new_tokens=4, pad_token_id=0, eos_token_id=2, decoder_start_token_id=2
        )
        tokenizer = bytes_tokenizer()
        recorder = Recorder()
        arguments = Seq2SeqArguments if mixed else Seq2SeqTrainingArguments
        trainer = (MixedSeq2Seq if mixed else Seq2SeqTrainer)(
            model=model,
            args=arguments(output_dir=str(out), predict_with_generate=True, **PLAIN | options),
            train_dataset=rows,
            eval_dataset=rows[:5],
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            compute_metrics=lambda prediction: {"tokens": float(prediction.predictions.size)},
            callbacks=[recorder],
        )
        trainer.train()
        if in_little_memory:
            model.model.decoder.register_forward_pre_hook(_refuse_more_than_two, with_kwargs=True)
        return recorder.gradients, trainer.evaluate()


def _refuse_more_than_two(module, args, kwargs):
    if not module.training and len(kwargs["input_ids"]) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.slow
def test_generation_that_runs_out_of_memory_goes_on_with_fewer_rows_and_gives_the_same(tmp_path):
    options = {"mixed": True, "effective_batch_size": 14, "per_device_eval_batch_size": 5}
    options |= {"generation_max_length": 9}
    _, calm = translate(tmp_path / "calm", **options)
    _, tight = translate(tmp_path / "tight", in_little_memory=True, **options)
    assert tight["eval_loss"] == pytest.approx(calm["eval_loss"], rel=1e-12)
    assert tight["eval_tokens"] == calm["eval_tokens"]


def test_seq2seq_gives_the_gradient_of_the_whole_update_and_still_generates(tmp_path):
    gradients, evaluation = translate(
        tmp_path, mixed=True, per_device_train_batch_size=3, effective_batch_size=14
    )
    expected, whole = translate(tmp_path, mixed=False, per_device_train_batch_size=14)
    assert_same_updates(gradients, expected)
    assert evaluation["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-12)
    assert evaluation["eval_tokens"] == whole["eval_tokens"] > 0


def test_several_datasets_in_one_dictionary_are_refused():
    with pytest.raises(DataError, match=r"the datasets \['a', 'b'\].*concatenate_datasets"):
        refuse_by_name(SimpleNamespace(train_dataset={"a": [], "b": []}))

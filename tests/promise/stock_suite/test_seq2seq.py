"""The stock trainer of encoder-decoders, and the mixin before it."""

import pytest
import torch
from support.line import QUIET
from transformers import (
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_gradacc import GradAccMixin


class Ours(GradAccMixin, Seq2SeqTrainer):
    pass


KINDS = {"stock": Seq2SeqTrainer, "ours": Ours}
ROWS = [
    {"input_ids": list(range(3, 3 + n)), "labels": [*range(5, 5 + m), 1]}
    for n, m in ((4, 2), (7, 3), (2, 5), (5, 1), (6, 4))
]


@pytest.fixture(params=list(KINDS))
def kind(request):
    return KINDS[request.param]


def collate(rows):
    def pad(key, fill):
        width = max(len(row[key]) for row in rows)
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    ids = pad("input_ids", 0)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": pad("labels", -100)}


def make(kind, out, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    arguments = {key: options.pop(key) for key in list(options) if key != "compute_metrics"}
    return kind(
        T5ForConditionalGeneration(config),
        Seq2SeqTrainingArguments(str(out), **QUIET, **arguments),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=collate,
        **options,
    )


def test_generated_tokens_are_given_to_the_metrics(kind, tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["shape"], seen["kind"] = prediction.predictions.shape, prediction.predictions.dtype
        return {"one": 1.0}

    trainer = make(
        kind, tmp_path, predict_with_generate=True, generation_max_length=6,
        compute_metrics=compute_metrics, per_device_eval_batch_size=2,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_one"} <= set(metrics)
    assert seen["shape"][0] == 5
    assert seen["kind"].kind == "i"


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_sequences_as_asked_for_are_generated(kind, tmp_path, count):
    trainer = make(
        kind, tmp_path, predict_with_generate=True, per_device_eval_batch_size=2,
        compute_metrics=lambda prediction: {"samples": len(prediction.predictions)},
    )  # fmt: skip
    config = GenerationConfig(
        max_new_tokens=3, num_beams=3, num_return_sequences=count, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    metrics = trainer.evaluate(generation_config=config)
    assert metrics["eval_samples"] == len(ROWS) * count


def test_a_bad_generation_config_is_refused_at_once(kind, tmp_path):
    config = GenerationConfig(do_sample=False, top_p=0.9)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        make(kind, tmp_path, predict_with_generate=True, generation_config=config)


def test_training_evaluates_by_generating(kind, tmp_path):
    trainer = make(
        kind, tmp_path, predict_with_generate=True, eval_strategy="steps", eval_steps=2,
        max_steps=4, per_device_train_batch_size=2, generation_max_length=4,
        compute_metrics=lambda prediction: {"longest": prediction.predictions.shape[1]},
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_longest" in row]
    assert [row["step"] for row in rows] == [2, 4]


@pytest.mark.parametrize("counts", ["all", "non_padding"])
def test_tokens_of_the_encoder_are_counted(kind, tmp_path, counts):
    trainer = make(
        kind, tmp_path, include_num_input_tokens_seen=counts, per_device_train_batch_size=5,
        num_train_epochs=1,
    )  # fmt: skip
    trainer.train()
    own = sum(len(row["input_ids"]) for row in ROWS)
    assert trainer.state.num_input_tokens_seen == (own if counts == "non_padding" else 5 * 7)

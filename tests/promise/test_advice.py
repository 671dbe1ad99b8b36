"""What an error advises is followed to the letter, and the run trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets
import pytest
import torch
import transformers as T
from support.reference import float64_everywhere
from support.tiny import PLAIN, pad, ragged_rows, tiny_llama

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.errors import GradAccError

ROWS = ragged_rows(9, seed=3)
EIGHT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def scorer():
    config = T.BertConfig(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    return T.BertForSequenceClassification(config)


def score_rows():
    return [{"input_ids": [5, 6, 7 + i], "labels": float(i)} for i in range(9)]


def texts():
    return [{"text": " ".join(map(str, row["input_ids"]))} for row in ROWS]


def read_texts(rows):
    ids = [[int(word) for word in row["text"].split()] for row in rows]
    return pad([{"input_ids": x, "attention_mask": [1] * len(x), "labels": x} for x in ids])


def read(rows):
    return [
        {"input_ids": x, "attention_mask": [1] * len(x), "labels": x}
        for x in ([int(word) for word in row["text"].split()] for row in rows)
    ]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ROWS


@dataclass
class Fault:
    """Settings that are refused, what the error says, and each way out that it names.

    A way out sets options; None takes one away.
    """

    says: str
    options: dict[str, Any]
    ways_out: list[dict[str, Any]]
    model: Any = tiny_llama
    rows: Any = field(default_factory=lambda: ROWS)
    collate: Any = pad


FAULTS = {
    "two sizes": Fault(
        "keep one of them",
        {"effective_batch_size": 4, "tokens_per_update": 30},
        [{"tokens_per_update": None}, {"effective_batch_size": None}],
    ),
    "size and steps": Fault(
        "leave gradient_accumulation_steps out",
        {"effective_batch_size": 4, **EIGHT},
        [{"gradient_accumulation_steps": None}],
    ),
    "no limit": Fault(
        "use at least 1, or leave it out",
        {"max_tokens_per_micro_batch": 0},
        [{"max_tokens_per_micro_batch": 1}, {"max_tokens_per_micro_batch": None}],
    ),
    "a word for a number": Fault(
        "use a whole number, 'auto', or leave it out",
        {"max_tokens_per_micro_batch": "many"},
        [{"max_tokens_per_micro_batch": x} for x in (64, "auto", None)],
    ),
    "keep and drop": Fault(
        "leave one of them out",
        {"incomplete_update": "keep", "dataloader_drop_last": True},
        [{"incomplete_update": None}, {"dataloader_drop_last": None}],
    ),
    "chunks of all logits": Fault(
        "Leave target_only_logits out, or chunked_loss",
        {"chunked_loss": True, "target_only_logits": False},
        [{"target_only_logits": None}, {"chunked_loss": None}],
    ),
    "remembers nothing": Fault(
        "set it to 'auto'",
        {"remember_tuned_budget": True},
        [{"max_tokens_per_micro_batch": "auto"}],
    ),
    "nothing left": Fault(
        "Use 'keep' and leave dataloader_drop_last out, or take more rows",
        {"incomplete_update": "drop", "effective_batch_size": 10},
        [
            {"incomplete_update": "keep"},
            {"effective_batch_size": 9},
            {"rows": ragged_rows(10)},
        ],
    ),
    "nothing left, by stock's option": Fault(
        "leave dataloader_drop_last out",
        {"dataloader_drop_last": True, "effective_batch_size": 10},
        [{"dataloader_drop_last": None}, {"effective_batch_size": 9}, {"rows": ragged_rows(10)}],
    ),
    "a short stream": Fault(
        "Use 'keep' and leave dataloader_drop_last out, or a smaller",
        {"incomplete_update": "drop", "effective_batch_size": 10, "max_steps": 1},
        [{"incomplete_update": "keep"}, {"effective_batch_size": 9}],
        rows=Stream(),
    ),
    "a short stream, by stock's option": Fault(
        "leave dataloader_drop_last out",
        {"dataloader_drop_last": True, "effective_batch_size": 10, "max_steps": 1},
        [{"dataloader_drop_last": None}, {"effective_batch_size": 9}],
        rows=Stream(),
    ),
    "smooth numbers": Fault(
        "Leave it out",
        {"label_smoothing_factor": 0.1, **EIGHT},
        [{"label_smoothing_factor": None}],
        model=scorer,
        rows=score_rows(),
        collate=T.default_data_collator,
    ),
    "lengths unknown": Fault(
        "max_tokens_per_micro_batch = 40: how many tokens",
        {"max_tokens_per_micro_batch": 40, "effective_batch_size": 4},
        [{"max_tokens_per_micro_batch": None}, {"rows": read(texts()), "collate": pad}],
        rows=texts(),
        collate=read_texts,
    ),
    "text": Fault(
        "Tokenize the dataset first, or give a data_collator that does",
        {},
        [{"rows": read(texts()), "collate": pad}, {"collate": read_texts}],
        rows=texts(),
        collate=lambda rows: {"text": [row["text"] for row in rows]},
    ),
    "steps inside of backward": Fault(
        "Use another optimizer, or one micro-batch per update",
        {"optim": "lomo", **EIGHT},
        [{"optim": "sgd"}],
    ),
    "datasets by name": Fault(
        "Join them with datasets.concatenate_datasets",
        {},
        [
            {
                "rows": datasets.concatenate_datasets(
                    [datasets.Dataset.from_list(ROWS[:4]), datasets.Dataset.from_list(ROWS[4:])]
                )
            }
        ],
        rows={
            "a": datasets.Dataset.from_list(ROWS[:4]),
            "b": datasets.Dataset.from_list(ROWS[4:]),
        },
    ),
    "not a number": Fault(
        "set on_non_finite = 'skip'",
        {"learning_rate": 1e300, **EIGHT, "num_train_epochs": 3},
        [{"learning_rate": 0.1}, {"on_non_finite": "skip", "max_skipped_updates_in_a_row": 99}],
    ),
}


def train(out, fault, changes):
    changes = dict(changes)
    rows, collate = changes.pop("rows", fault.rows), changes.pop("collate", fault.collate)
    options = {"remove_unused_columns": False, **fault.options, **changes}
    options = PLAIN | {key: value for key, value in options.items() if value is not None}
    with float64_everywhere():
        torch.manual_seed(0)
        trainer = GradAccTrainer(
            fault.model().double(),
            GradAccArguments(output_dir=str(out), **options),
            train_dataset=rows,
            data_collator=collate,
        )
        trainer.train()
    return trainer


@pytest.mark.parametrize("name", FAULTS)
def test_what_an_error_advises_trains(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    fault = FAULTS[name]
    with pytest.raises(GradAccError) as raised:
        train(tmp_path / "fault", fault, {})
    assert fault.says in str(raised.value)
    for i, way_out in enumerate(fault.ways_out):
        trainer = train(tmp_path / str(i), fault, way_out)
        assert trainer.state.global_step > 0

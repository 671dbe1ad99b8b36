"""How the trainer asks the model: in the precision it computes in, and about its own loss."""

import random
import time

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_gradacc import ConfigError, DataError, GradAccTrainer
from hf_gradacc.loss.asking import ask as asking
from hf_gradacc.loss.asking.ask import dtype_computed_in
from hf_gradacc.loss.asking.rows import choose_probe_rows
from hf_gradacc.updates.loader import build_loader
from hf_gradacc.updates.targets import TargetRule

ROWS = ragged_rows(12, seed=61)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        (torch.float32, {}, torch.float32),
        (torch.float32, {"bf16": True}, torch.bfloat16),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.float64, {}, torch.float64),
    ],
    ids=str,
)
def test_rounding_is_expected_of_the_dtype_a_forward_runs_in(tmp_path, weights, options, expected):
    model = tiny_llama(dtype=weights)
    trainer = make_trainer(tmp_path, ROWS, model=model, effective_batch_size=6, **options)
    kinds = {"bf16": trainer.args.bf16, "fp16": trainer.args.fp16}
    assert dtype_computed_in(model, **kinds) == expected
    trainer.train()
    facts = trainer.facts
    assert facts.rule is TargetRule.NEXT_TOKEN
    assert not facts.pad_to_one_width
    assert not facts.warnings


def test_one_coarse_weight_is_enough_to_expect_coarse_rounding():
    model = tiny_llama(dtype=torch.float32)
    model.lm_head.to(torch.bfloat16)
    assert dtype_computed_in(model, bf16=False, fp16=False) == torch.bfloat16


def test_label_smoothing_does_not_disturb_the_answer(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, effective_batch_size=6, label_smoothing_factor=0.3)
    trainer.train()
    assert trainer.facts.rule is TargetRule.NEXT_TOKEN
    assert not trainer.facts.warnings


# ---- what a few rows may hide ------------------------------------------------------------------


def mean_of_row_means(outputs, labels, num_items_in_batch=None):
    """Rows without a target left out, as careful people write it."""
    rows = zip(outputs["logits"].float(), labels, strict=True)
    return torch.stack([cross_entropy(x[:-1], y[1:]) for x, y in rows if y[1:].max() >= 0]).mean()


def alike(count):
    """Rows of one length that all have four targets, but for one that is not among those asked."""
    row = {"input_ids": list(range(3, 11)), "attention_mask": [1] * 8}
    rows = [{**row, "labels": [-100] * 4 + [7 + i % 5, 8, 9, 10]} for i in range(count)]
    rows[10] = {**row, "labels": [-100] * 7 + [10]}
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [alike(30), ROWS], ids=["alike", "ragged"])
def test_a_mean_over_rows_is_told_from_one_over_tokens(tmp_path, rows, dtype):
    """Where all rows asked have as many targets, the two are one figure."""
    for function, rule in ((mean_of_row_means, "sequence"), (None, "next_token")):
        trainer = make_trainer(
            tmp_path,
            rows,
            model=tiny_llama(dtype=dtype),
            trainer_options={"compute_loss_func": function},
            max_steps=1,
        )
        trainer.train()
        assert trainer.facts.rule == rule
        assert not trainer.facts.warnings


def classes(count, *, sort):
    rows = [{**row, "labels": i % 3} for i, row in enumerate(ragged_rows(count, seed=3))]
    return sorted(rows, key=lambda row: row["labels"]) if sort else rows


def collate_classes(rows):
    ids = pad([{**row, "labels": row["input_ids"]} for row in rows])
    return {**ids, "labels": torch.tensor([row["labels"] for row in rows])}


def collate_positions(rows):
    ids = pad([{**row, "labels": row["input_ids"]} for row in rows])
    positions = {
        name: torch.tensor([row[name] for row in rows])
        for name in ("start_positions", "end_positions")
    }
    return {**{key: value for key, value in ids.items() if key != "labels"}, **positions}


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, (1.0, 5.0, 0.2)], ids=["plain", "weighted"])
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_weights_are_read_off_the_call(tmp_path, weights, sort, dtype):
    """The head is zero, as some begin: all losses are log 3, and only gradients tell."""

    def loss(outputs, labels, num_items_in_batch=None):
        weight = None if weights is None else torch.tensor(weights)
        return cross_entropy(outputs["logits"].float(), labels, weight=weight)

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=64, num_attention_heads=2, num_labels=3, **sizes)
    model = BertForSequenceClassification(config).to(dtype)
    torch.nn.init.zeros_(model.classifier.weight)
    trainer = make_trainer(
        tmp_path,
        classes(60, sort=sort),
        model=model,
        data_collator=collate_classes,
        trainer_options={"compute_loss_func": loss},
        max_steps=1,
    )
    trainer.train()
    assert trainer.facts.rule is TargetRule.SEQUENCE
    assert not trainer.facts.warnings
    found = trainer.facts.class_weights
    assert (None if found is None else found.weights) == (weights and pytest.approx(weights))


def test_rows_to_ask_are_unlike_each_other_and_from_all_over(tmp_path):
    from hf_gradacc.updates.collator import UpdateCollator

    rows = [{"input_ids": [1] * 4, "label": 0} for _ in range(50)]
    rows += [{"input_ids": [1] * 9, "label": 1}, *[{"input_ids": [1] * 4, "label": 1}] * 49]
    rows += [{"input_ids": [1] * 6, "label": 2}]
    collator = UpdateCollator(list, max_sequences=2)
    loader = build_loader(
        rows,
        collator,
        effective_batch_size=4,
        tokens_per_update=None,
        incomplete_update="keep",
        seed=0,
    )
    chosen = choose_probe_rows(loader, collator)
    assert {len(row["input_ids"]) for row in chosen} > {4}
    classes = sorted(row["label"] for row in chosen)
    assert len(set(classes)) == 2  # two of one class, whose rows may influence each other
    assert len(classes) == 3


@pytest.mark.slow
def test_rows_whose_only_label_is_the_first_are_refused_before_training(tmp_path):
    """They have a label, and a causal LM predicts none of it."""
    rows = [{**row, "labels": [5] + [-100] * (len(row["input_ids"]) - 1)} for row in ROWS]
    trainer = make_trainer(tmp_path, rows)
    with pytest.raises(DataError, match="none of the 12 training rows has a target: all labels"):
        trainer.train()
    make_trainer(tmp_path, [*rows, ROWS[0]]).train()


def test_smoothing_what_are_no_classes_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_labels=1,
    )  # fmt: skip

    def collate(rows):
        batch = collate_classes(rows)
        return {**batch, "labels": batch["labels"].double()}

    trainer = make_trainer(
        tmp_path,
        classes(6, sort=False),
        model=BertForSequenceClassification(config).double(),
        data_collator=collate,
        label_smoothing_factor=0.1,
    )
    with pytest.raises(ConfigError, match=r"label_smoothing_factor = 0.1: there is nothing"):
        trainer.train()


class Counting(torch.nn.Module):
    """Counts its forwards: in place, by a new tensor, and draws a number in each."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 3)
        self.calls = 0
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x, labels=None):
        self.in_place += 1
        self.replaced = self.replaced + 1
        self.calls += 1
        self.drawn = (torch.rand(()), np.random.rand(), random.random())
        logits = self.fc(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_asking_leaves_no_trace_in_buffers_counters_log_rows_or_random_states(tmp_path):
    class Logs(GradAccTrainer):
        def compute_loss(self, *args, **kwargs):
            self.log({"aux": 1.0})
            self.losses = [*getattr(self, "losses", []), 1.0]
            return super().compute_loss(*args, **kwargs)

    rows = [{"x": torch.randn(4), "labels": i % 3} for i in range(8)]
    trainer = make_trainer(
        tmp_path,
        rows,
        model=Counting(),
        trainer_class=Logs,
        data_collator=default_data_collator,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert (int(trainer.model.in_place), int(trainer.model.replaced)) == (4, 4)
    assert (trainer.model.calls, len(trainer.losses)) == (4, 4)
    assert sum("aux" in row for row in trainer.state.log_history) == 4
    set_seed(1)
    trainer._ask(trainer.model, trainer._training_data.sample_inputs)
    after = (torch.rand(()), np.random.rand(), random.random())
    set_seed(1)
    assert after == (torch.rand(()), np.random.rand(), random.random())


# ---- what asking costs -------------------------------------------------------------------------

KINDS = ["llama", "llama bf16", "gpt2", "lora", "classifier", "bert", "router", "t5", "qa"]
LONG_ROWS = [
    {key: value * 4 for key, value in row.items()} for row in ROWS if len(row["labels"]) > 9
]


def counted(kind, rows=ROWS):
    """A model of some kind, its rows, and what collates them."""
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    sizes["num_attention_heads"] = 2
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)), rows, pad
    if kind == "lora":
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
        return get_peft_model(tiny_llama(dtype=torch.float32), config), rows, pad
    if kind == "classifier":
        rows = [{**row, "labels": i % 3} for i, row in enumerate(rows)]
        config = BertConfig(num_labels=3, **sizes)
        return BertForSequenceClassification(config), rows, collate_classes
    if kind == "qa":
        rows = [
            {
                "input_ids": row["input_ids"],
                "attention_mask": row["attention_mask"],
                "start_positions": 1,
                "end_positions": len(row["input_ids"]) - 1 - i % 2,
            }
            for i, row in enumerate(rows)
        ]
        return BertForQuestionAnswering(BertConfig(**sizes)), rows, collate_positions
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**sizes)), rows, pad
    if kind == "router":
        config = MixtralConfig(output_router_logits=True, num_key_value_heads=2, **sizes)
        return MixtralForCausalLM(config), rows, pad
    if kind == "t5":
        config = T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        return T5ForConditionalGeneration(config), rows, pad
    return tiny_llama(dtype=torch.bfloat16 if "bf16" in kind else torch.float32), rows, pad


def count_layers(out, kind, rows=ROWS, **options):
    """Train nothing; return how often the layers ran before, with how many tokens, and the run."""
    model, rows, collate = counted(kind, rows)
    runs = []
    first_layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    first_layer.register_forward_hook(
        lambda module, args, output: runs.append(args[0].shape[:2].numel())
    )

    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.runs = list(runs)

    stop = Stop()
    trainer = make_trainer(
        out,
        rows,
        model=model,
        data_collator=collate,
        effective_batch_size=6,
        max_steps=1,
        callbacks=[stop],
        **options,
    )
    trainer.train()
    return stop.runs, trainer


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", 5),
        ("llama bf16", 8),
        ("gpt2", 5),
        ("lora", 5),
        ("classifier", 4),
        ("bert", 4),
        ("router", 9),
        ("t5", 4),
        ("qa", 6),
    ],
)
def test_asking_takes_few_forwards(tmp_path, kind, expected):
    """Of the layers, shortcuts included; before they ran 12, 16, 12, 12, 5, 5, 21, 5, 8 times."""
    runs, trainer = count_layers(tmp_path, kind)
    assert len(runs) == expected
    assert trainer.facts.pad_to_one_width == (kind == "qa")


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_model_is_large_asking_costs_five_forwards_of_a_few_short_rows(
    tmp_path, monkeypatch, kind
):
    ordinary, small = count_layers(tmp_path / "small", kind, LONG_ROWS)
    monkeypatch.setattr(asking, "_COSTLY", 0)
    runs, large = count_layers(tmp_path / "large", kind, LONG_ROWS)
    both = small, large
    assert len({trainer.facts.rule for trainer in both}) == 1
    assert len({trainer.facts.weighing for trainer in both}) == 1
    assert [bool(trainer.facts.misfit) for trainer in both] == [False, False]
    taken = [vars(trainer.shortcuts) for trainer in both]
    names = ("target_only_logits", "chunked_loss", "drop_mask", "packed", "refused")
    assert [taken[0][name] for name in names] == [taken[1][name] for name in names]
    assert len(runs) <= {"llama bf16": 6, "router": 7, "qa": 6}.get(kind, 5)
    assert sum(runs) <= 5 * ordinary[0]
    assert runs[0] <= 3 * 35 or kind == "qa"  # positions, so rows are not cut


def test_asking_that_takes_over_two_seconds_says_how_far_it_is(tmp_path, capfd):
    model = tiny_llama()
    forwards = []

    def sleep(*_):
        if len(forwards) < 4:
            time.sleep(0.75)
        forwards.append(None)

    hook = model.register_forward_pre_hook(sleep)
    trainer = make_trainer(tmp_path, ROWS, model=model, effective_batch_size=6, max_steps=1)
    trainer.train()
    told = [line for line in capfd.readouterr().err.splitlines() if "forward" in line]
    assert told == ["asking the model how its loss counts: forward 3 of about 4 ..."]
    hook.remove()
    quick = make_trainer(tmp_path / "quick", ROWS, model=model, effective_batch_size=6, max_steps=1)
    quick.train()
    assert "asking" not in capfd.readouterr().err

"""Rows that begin alike, computed as trees by the real trainer, have the gradient of the update."""

import contextlib
import functools
import json

import peft
import pytest
import torch
from support import zoo_configs
from support.alike import counting_trees, paths, rows_alike
from support.class_weights import TOKEN_WEIGHTS
from support.losses_by_hand import focal, smoothed, targets_of
from support.reference import (
    float64_everywhere,
    reference_gradient,
    relative_error,
)
from support.tiny import (
    VOCABULARY,
    Recorder,
    log_rows,
    make_trainer,
    pad,
    ragged_rows,
    tiny_llama,
)
from support.windows import windows_of
from support.zoo import case_named
from support.zoo_runs import train_ours
from torch.nn import functional
from transformers import CONFIG_MAPPING

from hf_gradacc import GradAccTrainer
from hf_gradacc.errors import ConfigError
from hf_gradacc.trainer import step
from hf_gradacc.trainer.step import MicroBatchStep

EXACT = 1e-12
AS_TREES = {"layout": "shared_prefix", "per_device_train_batch_size": 5}


def labelled(unit):
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels_of(ids, n % 4)}
        for n, ids in enumerate(paths(unit=unit, low=3, high=VOCABULARY))
    ]


def labels_of(ids, masked):
    return [-100] * masked + ids[masked:]


ROWS = labelled(3)
"""Tokens that rows share are targets of some of them."""

LONG_ROWS = labelled(7)
"""Rows with so much in common that it pays to share it."""


def as_rows(monkeypatch):
    """Keep the cut of trees, but compute their rows."""
    monkeypatch.setattr(MicroBatchStep, "_trees_of", lambda self, inputs: None)


@functools.cache
def narrow(name):
    """A case whose windows and chunks are five tokens; its rows are up to 32 long."""
    case = case_named(name)
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"this release of Transformers has no {case.model_type}")
    model_type = zoo_configs.TEXT_PART.get(case.model_type, case.model_type)
    return case, model_type, windows_of(model_type, 5)


def run_case(monkeypatch, name, **options):
    case, model_type, windows = narrow(name)
    own = zoo_configs.OVERRIDES.get(model_type, {})
    monkeypatch.setitem(zoo_configs.OVERRIDES, model_type, {**own, **windows})
    with float64_everywhere():
        model, rows = case.build(), rows_alike(case.head, unit=4)
        collator = case.collator(model)
        expected = reference_gradient(model, rows, collator)
        with counting_trees() as computed:
            run = train_ours(case.build(), rows, collator, **AS_TREES | options)
    return run, expected, computed


MODELS = ["llama-causal", "qwen3-causal", "gemma2-causal", "gemma3_text-causal"]
MODELS += ["mistral-causal", "gpt2-causal", "opt-causal", "llama4-causal", "phi3-causal"]
MODELS += ["smollm3-causal", "gpt_oss-causal", "qwen3_moe-causal", "llama-tok", "llama-single"]
MODELS += ["qwen3-regression", "gpt2-multilabel"]


@pytest.mark.parametrize("name", MODELS)
def test_trees_have_the_gradient_of_the_whole_update(monkeypatch, name):
    run, expected, computed = run_case(monkeypatch, name)
    assert len(computed) >= 2
    assert relative_error(run.gradient, expected) <= EXACT


@pytest.mark.parametrize("name", ["llama-causal", "gemma2-causal", "mistral-causal", "gpt2-single"])
def test_trees_have_the_gradient_of_padded_rows(monkeypatch, name):
    run, _, computed = run_case(monkeypatch, name)
    padded, _, none = run_case(monkeypatch, name, layout="padded")
    assert computed
    assert not none
    assert relative_error(run.gradient, padded.gradient) <= EXACT
    assert run.loss == pytest.approx(padded.loss, rel=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "flint", "olmoe"])
def test_experts_are_balanced_over_the_rows_and_not_over_the_trees(monkeypatch, name):
    run, expected, computed = run_case(monkeypatch, f"{name}-causal-router")
    assert computed
    assert relative_error(run.gradient, expected) <= EXACT


def test_a_router_loss_of_each_micro_batch_is_that_of_its_rows(monkeypatch):
    run, _, computed = run_case(monkeypatch, "mixtral-causal-router", update_passes=1)
    as_rows(monkeypatch)
    same_cut, _, none = run_case(monkeypatch, "mixtral-causal-router", update_passes=1)
    assert computed
    assert not none
    assert relative_error(run.gradient, same_cut.gradient) <= EXACT


# ---- the same with other losses, wrappers and settings -------------------------------------------


def train(tmp_path, *, model=None, rows=ROWS, **options):
    """Train one update in float64; return the trainer, its gradient and the trees it computed."""
    recorder = Recorder()
    options = {"effective_batch_size": len(rows), "max_steps": 1} | AS_TREES | options
    with float64_everywhere(), counting_trees() as computed:
        trainer = make_trainer(
            tmp_path, rows, model=model or tiny_llama(), callbacks=[recorder], **options
        )
        trainer.train()
    return trainer, recorder.gradients[0], computed


def expect(loss_of=None, *, model=None, rows=ROWS):
    with float64_everywhere():
        options = {} if loss_of is None else {"loss_of": loss_of}
        return reference_gradient(model or tiny_llama(), rows, pad, **options)


def assert_exact(trained, expected, *, rows=ROWS):
    trainer, gradient, computed = trained
    assert len(computed) >= 2, trainer.shortcuts.reason("shared_prefix")
    assert sum(trees.num_tokens for trees in computed) < sum(len(r["input_ids"]) for r in rows)
    assert relative_error(gradient, expected) <= EXACT


def test_label_smoothing(tmp_path):
    assert_exact(train(tmp_path, label_smoothing_factor=0.1), expect(smoothed))


def test_a_loss_of_a_subclass(tmp_path):
    class Focal(GradAccTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
            labels = inputs["labels"][:, 1:].flatten()
            loss = focal(outputs.logits[:, :-1].flatten(0, 1), labels)
            return (loss, outputs) if return_outputs else loss

    expected = expect(lambda model, batch: focal(*targets_of(model, batch)))
    assert_exact(train(tmp_path, trainer_class=Focal), expected)


def test_a_loss_function(tmp_path):
    def loss_func(outputs, labels, num_items_in_batch=None):
        return focal(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    trained = train(tmp_path, trainer_options={"compute_loss_func": loss_func})
    assert_exact(trained, expect(lambda model, batch: focal(*targets_of(model, batch))))


def test_a_weighted_mean(tmp_path):
    def weighted(logits, labels):
        return functional.cross_entropy(logits, labels, weight=TOKEN_WEIGHTS)

    def loss_func(outputs, labels, num_items_in_batch=None):
        return weighted(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    trained = train(tmp_path, trainer_options={"compute_loss_func": loss_func})
    assert_exact(trained, expect(lambda model, batch: weighted(*targets_of(model, batch))))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again(tmp_path, monkeypatch, reentrant):
    # What is computed again in a backward knows nothing of `float64_everywhere`: without it, both.
    monkeypatch.setitem(globals(), "float64_everywhere", contextlib.nullcontext)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    again, once = tmp_path / "again", tmp_path / "once"
    assert_exact(train(again, gradient_checkpointing=True, **options), train(once)[1])


def adapted():
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    )
    return model.double()


def test_adapters(tmp_path):
    assert_exact(train(tmp_path, model=adapted()), expect(model=adapted()))


def test_a_budget_of_tokens(tmp_path):
    options = {"max_tokens_per_micro_batch": 60, "per_device_train_batch_size": 8}
    assert_exact(train(tmp_path, **options), expect())


def test_all_logits(tmp_path):
    assert_exact(train(tmp_path, target_only_logits=False), expect())


def test_trees_are_taken_by_themselves_where_rows_begin_alike(tmp_path):
    trained = train(tmp_path, layout="auto", rows=LONG_ROWS)
    assert_exact(trained, expect(rows=LONG_ROWS), rows=LONG_ROWS)


def test_a_run_of_several_updates_follows_the_same_weights(tmp_path):
    rows = ROWS * 2
    weights = []
    for layout in ("shared_prefix", "padded"):
        options = {"effective_batch_size": 9, "max_steps": 4, "optim": "adamw_torch"}
        trainer, *_ = train(tmp_path / layout, rows=rows, layout=layout, **options)
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    assert relative_error(*weights) <= 1e-10


def test_a_target_of_many_rows_counts_as_often(tmp_path):
    """One row ten times, beside another: its targets weigh ten times as much."""
    rows = [*[ROWS[0]] * 10, *ROWS[1:3]]
    _, gradient, computed = train(tmp_path, rows=rows)
    assert len(computed) >= 2
    assert relative_error(gradient, expect(rows=rows)) <= EXACT
    once = expect(rows=ROWS[:3])
    assert relative_error(gradient, once) > 1e-2


def test_the_log_tells_what_was_computed(tmp_path):
    trainer, _, computed = train(tmp_path)
    (row,) = log_rows(trainer)
    assert row["micro_batches_per_update"] == len(computed)
    assert row["computed_tokens_per_update"] == sum(trees.ids.numel() for trees in computed)
    distinct = sum(trees.num_tokens for trees in computed)
    assert row["input_tokens_per_update"] == sum(
        len(row["input_ids"]) for row in ROWS if any(label >= 0 for label in row["labels"][1:])
    )
    assert row["shared_fraction"] == 1 - distinct / row["input_tokens_per_update"]


# ---- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "mamba-causal": "carry a state",
    "rwkv-causal": "no position_ids",
    "qwen3_next-causal": "carry a state",
    "bloom-causal": "no position_ids",
    "bert-mlm": "does not go by the mask",
    "bart-seq2seq": "no position_ids",
    "llama-qa": "padding changes the loss",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_says_so_once_where_it_was_asked_for_by_name(name):
    case = case_named(name)
    with float64_everywhere():
        model = case.build()
        rows, collator = rows_alike(case.head), case.collator(model)
        with pytest.raises(ConfigError) as caught:
            train_ours(model, rows, collator, **AS_TREES)
    assert "layout = 'shared_prefix' would not give the same gradient" in str(caught.value)
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_it_trains_on_in_silence_where_nobody_asked(name, caplog):
    case, trainers = case_named(name), []

    class Kept(GradAccTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    with float64_everywhere():
        model, rows = case.build(), rows_alike(case.head, unit=7)
        collator = case.collator(model)
        expected = reference_gradient(model, rows, collator)
        with counting_trees() as computed:
            run = train_ours(
                case.build(), rows, collator, trainer_class=Kept, per_device_train_batch_size=5
            )
    assert computed == []
    assert relative_error(run.gradient, expected) <= 1e-10
    assert REFUSED[name] in trainers[0].shortcuts.reason("shared_prefix")
    assert "shared_prefix" not in caplog.text


@pytest.mark.parametrize(
    ("layout", "why"), [("auto", "do not begin alike"), ("padded", "layout = 'padded'")]
)
def test_where_trees_were_not_tried_the_reason_says_so(tmp_path, layout, why):
    trainer, _, _ = train(tmp_path, rows=ragged_rows(12), layout=layout)
    assert why in trainer.shortcuts.reason("shared_prefix")


def test_a_prompt_in_front_is_refused(tmp_path):
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ConfigError, match="not given rows of tokens alone"):
        train(tmp_path, model=peft.get_peft_model(tiny_llama(), prompt).double())


def test_dropout_is_refused_unless_trees_were_asked_for_by_name(tmp_path):
    trainer, _, computed = train(
        tmp_path, model=tiny_llama(attention_dropout=0.1), rows=LONG_ROWS, layout="auto"
    )
    assert "dropout" in trainer.shortcuts.reason("shared_prefix")
    assert computed == []
    _, _, computed = train(tmp_path, model=tiny_llama(attention_dropout=0.1))
    assert computed


def test_rows_that_do_not_begin_alike_are_not_tried(tmp_path):
    rows = [{**row, "input_ids": [3 + n, *row["input_ids"]]} for n, row in enumerate(ROWS)]
    rows = [{k: [1, *v] if k == "attention_mask" else v for k, v in row.items()} for row in rows]
    rows = [{**row, "labels": [-100, *row["labels"]]} for row in rows]
    _, gradient, computed = train(tmp_path, rows=rows, layout="auto")
    assert computed == []
    assert relative_error(gradient, expect(rows=rows)) <= EXACT


class ChangesItsMind(GradAccTrainer):
    """Calls its model with embeddings, but only once it trains."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if torch.is_grad_enabled() and self.state.max_steps and self.is_running:
            inputs = dict(inputs)
            ids = inputs.pop("input_ids")
            inputs["inputs_embeds"] = self.model.get_input_embeddings()(ids)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    is_running = False

    def training_step(self, *args, **kwargs):
        self._ask_first(*args)
        return super().training_step(*args, **kwargs)

    def _ask_first(self, *args):
        self.is_running = self.facts is not None


def test_rows_that_were_planned_as_trees_and_never_reached_the_model_are_named(
    tmp_path, monkeypatch
):
    lines = []
    monkeypatch.setattr(step.logger, "warning_once", lines.append)
    options = {"trainer_class": ChangesItsMind, "max_steps": 2, "effective_batch_size": 13}
    with float64_everywhere():
        trainer = make_trainer(tmp_path, ROWS * 2, **AS_TREES | options)
        trainer.train()
    assert any("so they were computed as they are" in line for line in lines)
    assert json.dumps(log_rows(trainer))

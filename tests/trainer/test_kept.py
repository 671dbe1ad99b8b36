"""A beginning kept over the micro-batches of an update has the gradient of all rows behind it."""

import contextlib

import peft
import pytest
import torch
from support import zoo_configs
from support.kept_rows import KEEPING, keeping_always, rows_behind, watching_kept
from support.losses_by_hand import focal, smoothed, targets_of
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, make_trainer, pad
from support.tiny import tiny_llama as tiny_llama_of
from support.windows import windows_of
from support.zoo import case_named
from transformers import CONFIG_MAPPING

EXACT = 1e-12
ROWS = rows_behind()
BEGINNINGS = [13, 11]  # the longer one has a row that is it and nothing else


def tiny_llama(**options):
    return tiny_llama_of(attn_implementation="sdpa", **options)


@pytest.fixture(autouse=True)
def keep_short_beginnings():
    with keeping_always():
        yield


def train(tmp_path, *, model=None, rows=ROWS, **options):
    """Train one update in float64; return the trainer, its gradient and what was kept."""
    recorder = Recorder()
    options = {"effective_batch_size": len(rows), "max_steps": 1} | KEEPING | options
    with float64_everywhere(), watching_kept() as kept:
        trainer = make_trainer(
            tmp_path, rows, model=model or tiny_llama(), callbacks=[recorder], **options
        )
        trainer.train()
    return trainer, recorder.gradients[0], kept


def expect(loss_of=None, *, model=None, rows=ROWS):
    with float64_everywhere():
        options = {} if loss_of is None else {"loss_of": loss_of}
        return reference_gradient(model or tiny_llama(), rows, pad, **options)


def assert_exact(trained, expected):
    trainer, gradient, kept = trained
    assert sorted(kept) == sorted(BEGINNINGS), trainer.shortcuts.reason("kept_beginnings")
    assert relative_error(gradient, expected) <= EXACT


MODELS = ["llama-causal", "qwen3-causal", "gemma3_text-causal", "mistral-causal"]
MODELS += ["gpt2-causal", "opt-causal", "llama4-causal", "phi3-causal", "smollm3-causal"]
MODELS += ["llama-tok", "qwen3-single", "qwen3_moe-causal"]


def run_case(tmp_path, monkeypatch, name, **options):
    case = case_named(name)
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"this release of Transformers has no {case.model_type}")
    model_type = zoo_configs.TEXT_PART.get(case.model_type, case.model_type)
    own = zoo_configs.OVERRIDES.get(model_type, {})
    windows = windows_of(model_type, 5)  # shorter than the beginnings
    monkeypatch.setitem(zoo_configs.OVERRIDES, model_type, {**own, **windows})
    with float64_everywhere():
        model = case.build()
        rows = rows_behind(low=10, high=60)
        if case.head == "single":
            rows = [{**row, "labels": n % 2} for n, row in enumerate(rows)]
        if case.head == "tok":
            rows = [
                {**row, "labels": [x if x == -100 else x % 3 for x in row["labels"]]}
                for row in rows
            ]
        collator = case.collator(model)
        expected = reference_gradient(model, rows, collator)
        trained = train(tmp_path, model=case.build(), rows=rows, data_collator=collator, **options)
    return trained, expected


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_has_the_gradient_of_the_whole_update(tmp_path, monkeypatch, name):
    assert_exact(*run_case(tmp_path, monkeypatch, name))


def test_attention_that_is_masked_over_a_tree_keeps_nothing(tmp_path):
    def eager():
        return tiny_llama_of(attn_implementation="eager")

    trainer, gradient, kept = train(tmp_path, model=eager())
    assert kept == []
    assert "row by row" in trainer.shortcuts.reason("kept_beginnings")
    assert trainer.shortcuts.bodies  # trees go on
    assert relative_error(gradient, expect(model=eager())) <= EXACT


def test_a_router_loss_of_each_micro_batch_is_that_of_its_rows(tmp_path, monkeypatch):
    name, options = "mixtral-causal-router", {"update_passes": 1}
    (_, gradient, kept), _ = run_case(tmp_path / "a", monkeypatch, name, **options)
    assert sorted(kept) == sorted(BEGINNINGS)
    monkeypatch.setattr("hf_gradacc.trainer.step.MicroBatchStep._trees_of", lambda *_: None)
    (_, same_cut, kept), _ = run_case(tmp_path / "b", monkeypatch, name, **options)
    assert kept == []
    assert relative_error(gradient, same_cut) <= EXACT


def test_a_router_loss_over_the_update_takes_two_passes_and_keeps_nothing(tmp_path, monkeypatch):
    (trainer, gradient, kept), expected = run_case(tmp_path, monkeypatch, "mixtral-causal-router")
    assert kept == []
    assert "two passes" in trainer.shortcuts.reason("kept_beginnings")
    assert relative_error(gradient, expected) <= EXACT


def test_label_smoothing(tmp_path):
    assert_exact(train(tmp_path, label_smoothing_factor=0.1), expect(smoothed))


def test_a_loss_function_of_ones_own(tmp_path):
    def loss_func(outputs, labels, num_items_in_batch=None):
        return focal(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    trained = train(tmp_path, trainer_options={"compute_loss_func": loss_func})
    assert_exact(trained, expect(lambda model, batch: focal(*targets_of(model, batch))))


def adapted(**options):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(tiny_llama(), config).double()


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [1]}], ids=["all", "last"])
def test_adapters(tmp_path, options):
    assert_exact(train(tmp_path, model=adapted(**options)), expect(model=adapted(**options)))


def frozen_below():
    model = tiny_llama()
    for parameter in [*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()]:
        parameter.requires_grad_(False)
    return model.double()


def test_layers_that_do_not_train(tmp_path):
    assert_exact(train(tmp_path, model=frozen_below()), expect(model=frozen_below()))


def test_a_head_that_trains_alone_sends_nothing_back(tmp_path):
    def head_alone():
        model = tiny_llama()
        model.model.requires_grad_(False)
        return model.double()

    _, gradient, kept = train(tmp_path, model=head_alone())
    assert sorted(kept) == sorted(BEGINNINGS)
    assert relative_error(gradient, expect(model=head_alone())) <= EXACT


def test_a_budget_of_tokens(tmp_path):
    assert_exact(train(tmp_path, max_tokens_per_micro_batch=30), expect())


def test_all_logits(tmp_path):
    assert_exact(train(tmp_path, target_only_logits=False), expect())


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again(tmp_path, monkeypatch, reentrant):
    # What is computed again in a backward knows nothing of `float64_everywhere`: without it, both.
    monkeypatch.setitem(globals(), "float64_everywhere", contextlib.nullcontext)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer, gradient, kept = train(tmp_path, gradient_checkpointing=True, **options)
    assert kept == ([] if reentrant else BEGINNINGS) or sorted(kept) == sorted(BEGINNINGS)
    assert ("use_reentrant" in trainer.shortcuts.reason("kept_beginnings")) == reentrant
    once = train(tmp_path / "once")[1]
    assert relative_error(gradient, once) <= (1e-6 if reentrant else EXACT)

"""A beginning kept over the micro-batches of an update has the gradient of all rows behind it."""

import peft
import pytest
import torch
from support import zoo_configs
from support.alike import counting_trees
from support.kept_rows import KEEPING, keeping_always, rows_behind, watching_kept
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, log_rows, make_trainer, pad, tiny_llama
from support.windows import windows_of
from support.zoo import case_named
from torch.nn import functional
from transformers import CONFIG_MAPPING

EXACT = 1e-12
ROWS = rows_behind()
BEGINNINGS = [13, 11]  # the longer one has a row that is it and nothing else


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


MODELS = ["llama-causal", "qwen3-causal", "gemma2-causal", "gemma3_text-causal", "mistral-causal"]
MODELS += ["gpt2-causal", "opt-causal", "llama4-causal", "phi3-causal", "smollm3-causal"]
MODELS += ["llama-tok", "qwen3-single"]


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
        collator = case.collator(model)
        expected = reference_gradient(model, rows, collator)
        trained = train(tmp_path, model=case.build(), rows=rows, data_collator=collator, **options)
    return trained, expected


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_has_the_gradient_of_the_whole_update(tmp_path, monkeypatch, name):
    assert_exact(*run_case(tmp_path, monkeypatch, name))

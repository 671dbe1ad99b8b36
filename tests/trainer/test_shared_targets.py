"""Targets that rows share go through the head once, and the gradient is that of the rows."""

import contextlib
from types import SimpleNamespace

import peft
import pytest
import torch
from support.alike import paths
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import VOCABULARY, Recorder, make_trainer, pad, tiny_llama
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from hf_gradacc.loss.shortcuts import chunked
from hf_gradacc.loss.shortcuts.chunked import ChunkedLoss
from hf_gradacc.loss.trees import targets as tree_targets
from hf_gradacc.loss.trees.targets import TreeTargets, merge_targets
from hf_gradacc.trainer.loss.asked import Asked
from hf_gradacc.trainer.step import MicroBatchStep

EXACT = 1e-12


def rows_of(masked):
    tokens = enumerate(paths(low=3, high=VOCABULARY))
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * k + ids[k:]}
        for ids, k in ((ids, masked(n, ids)) for n, ids in tokens)
    ]


ALL = rows_of(lambda n, ids: 0)
"""Every token is a target, as in plain text."""

SOME = rows_of(lambda n, ids: 4 * (n % 2))
"""What rows share is a target in some of them and masked in the others."""

LAST = list({tuple(row["input_ids"]): row for row in rows_of(lambda n, ids: len(ids) - 1)}.values())
"""One target in each row, none of them shared."""


def biased():
    model = tiny_llama()
    model.lm_head = nn.Linear(16, VOCABULARY, dtype=torch.float64)
    return model


def adapted():
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    return peft.get_peft_model(tiny_llama(), config).double()


def qwen3():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    config = Qwen3Config(
        **sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0
    )
    return Qwen3ForCausalLM(config).double()


MODELS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "bias": biased,
    "LoRA": adapted,
    "qwen3": qwen3,
}


@pytest.fixture
def heads(monkeypatch):
    """Targets, rows of the head and what they weigh together, for each micro-batch."""
    seen = []
    stock = TreeTargets.weigh

    def weigh(self, hidden, labels):
        flat, right, weights = stock(self, hidden, labels)
        seen.append((labels.numel(), len(flat), None if weights is None else float(weights.sum())))
        return flat, right, weights

    monkeypatch.setattr(TreeTargets, "weigh", weigh)
    return seen


def train(tmp_path, rows, *, make=tiny_llama, in_float64=True, callbacks=(), **options):
    recorder = Recorder()
    options = {"effective_batch_size": len(rows), "per_device_train_batch_size": 8} | options
    with float64_everywhere():
        model = make()
    with float64_everywhere() if in_float64 else contextlib.nullcontext():
        options |= {"callbacks": [recorder, *callbacks], "layout": "shared_prefix"}
        trainer = make_trainer(tmp_path, rows, model=model, **options)
        trainer.train()
    assert trainer.shortcuts.chunked_loss
    return recorder.gradients[0]


def of_rows(rows, make=tiny_llama):
    with float64_everywhere():
        return reference_gradient(make(), rows, pad)


@pytest.mark.parametrize("rows", [ALL, SOME], ids=["all targets", "some masked"])
@pytest.mark.parametrize("name", MODELS)
def test_merged_targets_have_the_gradient_of_the_rows(tmp_path, heads, name, rows):
    gradient = train(tmp_path, rows, make=MODELS[name])
    assert relative_error(gradient, of_rows(rows, MODELS[name])) <= EXACT
    targets, in_head, weights = zip(*heads, strict=True)
    assert len(set(targets)) == 2  # micro-batches, of unequal size
    assert sum(in_head) < 0.8 * sum(targets)
    assert weights == targets


# ---- broken on purpose ---------------------------------------------------------------------------


class OfLossAlone(ChunkedLoss):
    """Weighs the loss, but not the gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, wants, onednn, expected, weights):
        given = (hidden, weight, bias, labels)
        ChunkedLoss.forward(ctx, *given, wants, onednn, expected)
        return ChunkedLoss.forward(SimpleNamespace(), *given, False, onednn, 1.0, weights)


def without_weights(self, hidden, labels, *, stock=TreeTargets.weigh):
    return (*stock(self, hidden, labels)[:2], None)


def by_distinct(hidden, labels, *, weights, stock=chunked._mean_loss, **options):
    if weights is not None:
        options["num_items"] = len(labels)
    return stock(hidden, labels, weights=weights, **options)


BROKEN = {
    "weights ignored": (TreeTargets, "weigh", without_weights),
    "weights of the loss alone": (chunked, "ChunkedLoss", OfLossAlone),
    "labels ignored": (tree_targets, "merge_targets", lambda n, y: merge_targets(n, 0 * y)),
    "divided by distinct targets": (chunked, "_mean_loss", by_distinct),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_merging_does_not_have_that_gradient(tmp_path, monkeypatch, name):
    monkeypatch.setattr(*BROKEN[name])
    assert relative_error(train(tmp_path, ALL), of_rows(ALL)) > 1e-2


# ---- where nothing is to be merged ---------------------------------------------------------------


def test_targets_of_single_rows_have_the_bits_they_had(tmp_path, monkeypatch, heads):
    def make():
        return tiny_llama(dtype=torch.float32)

    tree = train(tmp_path / "tree", LAST, make=make, in_float64=False)
    assert {weights for *_, weights in heads} == {None}
    monkeypatch.setattr(TreeTargets, "read", lambda self, hidden: None)
    rows = train(tmp_path / "rows", LAST, make=make, in_float64=False)
    assert all(torch.equal(tree[name], rows[name]) for name in rows)


class Writes(TrainerCallback):
    """Lets a hook of the user's write into what the model is given, once it trains."""

    def __init__(self, name):
        self.name = name

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.handle = model.register_forward_pre_hook(self.write, with_kwargs=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.handle.remove()

    def write(self, model, args, kwargs):
        if self.name == "other labels":
            kwargs["shift_labels"] = kwargs["shift_labels"].clone()
        if self.name == "tokens":
            kwargs["input_ids"][1::2, 0] = 4
        else:
            kwargs["shift_labels"][0, ::3] = 4
        return args, kwargs


@pytest.mark.parametrize("name", ["other labels", "labels in place", "tokens"])
def test_what_a_hook_has_written_into_is_not_merged(tmp_path, monkeypatch, heads, name):
    monkeypatch.setattr(Asked, "look_again", lambda *args, **kwargs: None)  # nobody sees the hook
    gradient = train(tmp_path / "tree", ALL, callbacks=[Writes(name)])
    assert {weights for *_, weights in heads} == {None}
    monkeypatch.setattr(MicroBatchStep, "_trees_of", lambda self, inputs: None)
    expected = train(tmp_path / "rows", ALL, callbacks=[Writes(name)])
    assert relative_error(gradient, expected) <= EXACT
    assert relative_error(gradient, of_rows(ALL)) > 1e-2

"""A model that a callback changes after it was asked, and its training, on one rank or several."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from .kept_rows import KEEPING, NUM_ROWS, keeping_always, rows_behind
from .programs import warnings_of
from .reference import float64_everywhere, reference_gradient
from .tiny import Recorder, make_trainer, pad, tiny_llama


def network():
    return tiny_llama(attn_implementation="sdpa")


def focal(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    targets = shift_labels.reshape(-1)
    losses = cross_entropy(logits.reshape(-1, vocab_size), targets, reduction="none")
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return (losses * (1 - torch.exp(-losses)) ** 2).sum() / count


def summed(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")


def another_loss(model):
    model.loss_function = focal


def a_sum_of_losses(model):
    model.loss_function = summed


def a_hook_that_scales_logits(model):
    model.lm_head.register_forward_hook(lambda module, args, logits: 0.5 * logits)


def a_hook_by_place(model):
    def add(module, args, states):
        return states + 0.05 * torch.arange(states.shape[1])[None, :, None]

    model.model.layers[0].register_forward_hook(add)


def a_hook_on_gradients(model):
    def fold(module, grads, outer):
        return (grads[0].abs(),)

    model.model.layers[0].mlp.register_full_backward_hook(fold)


def another_forward(model):
    stock = model.forward

    def forward(**inputs):
        outputs = stock(**inputs)
        sums = outputs.logits[:, :-1].square().sum(-1)[inputs["labels"][:, 1:] != -100]
        outputs["loss"] = outputs["loss"] + sums.mean()
        return outputs

    model.forward = forward


def a_wider_vocabulary(model):
    torch.manual_seed(3)
    model.resize_token_embeddings(64)


def a_head_of_two_layers(model):
    torch.manual_seed(4)
    wide = nn.Linear(16, 16, bias=False)
    model.lm_head = nn.Sequential(wide, model.lm_head)


def a_layer_less(model):
    model.model.layers = model.model.layers[:1]


CHANGES = [
    another_loss,
    a_sum_of_losses,
    a_hook_that_scales_logits,
    a_hook_by_place,
    a_hook_on_gradients,
    another_forward,
    a_wider_vocabulary,
    a_head_of_two_layers,
    a_layer_less,
]


class Changes(TrainerCallback):
    """Changes a model when a run begins, or in front of its update number `at`."""

    def __init__(self, change, at=None):
        self.change, self.at = change, at

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.at is None:
            self.change(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.at == state.global_step:
            self.change(model)


def train(out, *callbacks, rows=None, **options):
    """Train updates of three rows a micro-batch; give the trainer, gradients and warnings."""
    recorder, rows = Recorder(), rows or rows_behind()
    options = {"effective_batch_size": NUM_ROWS, "train_sampling_strategy": "sequential"} | options
    with float64_everywhere(), keeping_always(), warnings_of("hf_gradacc") as warnings:
        trainer = make_trainer(
            out,
            rows,
            model=options.pop("model", None) or network(),
            callbacks=[*callbacks, recorder],
            **KEEPING | options,
        )
        trainer.train()
    return trainer, recorder.gradients, warnings


def wanted(change, rows=None):
    with float64_everywhere():
        model = network()
        change(model)
        return reference_gradient(model, rows or rows_behind(), pad)


def train_as_rank(out, at):
    """A job for `support.ranks`: one update of all rows in each of two epochs."""
    options = {"num_train_epochs": 2, "learning_rate": 0.0}
    trainer, gradients, warnings = train(out, Changes(another_loss, at=at), **options)
    named = [{k.removeprefix("module."): g for k, g in one.items()} for one in gradients]
    return named, trainer.shortcuts.chunked_loss, bool(trainer.shortcuts.bodies), warnings

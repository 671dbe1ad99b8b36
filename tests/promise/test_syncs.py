"""Nothing per micro-batch makes the host wait for the device.

There is no accelerator in the tests, so what would wait on one is counted on the CPU instead:
reading a number of a tensor, asking whether it is true, or moving it to the host. Layout happens
on the CPU by design and is left out of the count.
"""

import contextlib
import itertools

import pytest
import torch
from support.host_reads import Waits
from support.ranks import run_ranks
from support.tiny import make_trainer, ragged_rows, tiny_llama
from support.waits import count_of_update

from hf_gradacc import GradAccTrainer
from hf_gradacc.loss.shortcuts import chunked
from hf_gradacc.loss.shortcuts.choose import Shortcuts
from hf_gradacc.trainer import step
from hf_gradacc.trainer.runner import UpdateRunner
from hf_gradacc.updates.update import start_copies

ROWS = ragged_rows(12, seed=3)


def count_waits(tmp_path, monkeypatch, *, size, **options):
    """Count over one update, from its first micro-batch to its last."""
    model = tiny_llama(attn_implementation=options.pop("attention", "sdpa"))
    trainer = make_trainer(
        tmp_path,
        ROWS,
        model=model,
        effective_batch_size=12,
        per_device_train_batch_size=size,
        max_steps=1,
        **options,
    )
    waits, stock_run, stock_shape = Waits(), UpdateRunner.run_micro_batches, Shortcuts.shape

    def shape(self, inputs, **how):
        waits.paused = True
        try:
            return stock_shape(self, inputs, **how)
        finally:
            waits.paused = False

    def run(*args, **kwargs):
        with waits:
            return stock_run(*args, **kwargs)

    monkeypatch.setattr(chunked, "_reads_for_free", lambda device_type: False)  # as on a GPU
    monkeypatch.setattr(Shortcuts, "shape", shape)
    monkeypatch.setattr(UpdateRunner, "run_micro_batches", run)
    trainer.train()
    return sum(waits.counts.values())


def per_micro_batch(tmp_path, monkeypatch, **options):
    """Waits that each further micro-batch adds: 12 of them against 2."""
    with monkeypatch.context() as patch:
        many = count_waits(tmp_path, patch, size=1, **options)
    with monkeypatch.context() as patch:
        few = count_waits(tmp_path, patch, size=6, **options)
    return (many - few) / 10


@pytest.mark.slow
def test_we_add_no_wait_per_micro_batch_to_what_the_model_does(tmp_path, monkeypatch):
    model = tiny_llama(attn_implementation="sdpa", use_cache=False)
    labels = torch.tensor([[3, 4, 5]])
    with contextlib.ExitStack() as stack:
        waits = stack.enter_context(Waits())
        model(input_ids=labels, labels=labels).loss.backward()
    own = sum(waits.counts.values())  # Transformers looks for packed rows in position_ids
    assert per_micro_batch(tmp_path, monkeypatch) <= own


@pytest.mark.slow
def test_a_wait_per_micro_batch_would_be_seen(tmp_path, monkeypatch):
    plain = per_micro_batch(tmp_path, monkeypatch)
    hook = torch.nn.Module.__call__

    def call(self, *args, **kwargs):
        out = hook(self, *args, **kwargs)
        if type(self).__name__ == "LlamaForCausalLM" and self.training:
            float(out["loss"].detach())
        return out

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", call)
        assert per_micro_batch(tmp_path, monkeypatch) == pytest.approx(plain + 1)


def test_a_micro_batch_goes_to_the_device_in_its_own_turn(tmp_path, monkeypatch):
    """Stock moves all micro-batches of an update at once."""
    events = []

    def watched_copies(*args):
        events.append("copy")
        return start_copies(*args)

    monkeypatch.setattr(step, "start_copies", watched_copies)

    class Watched(GradAccTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.model.training:
                events.append("forward")
            return super().compute_loss(*args, **kwargs)

    trainer = make_trainer(
        tmp_path,
        ROWS,
        trainer_class=Watched,
        effective_batch_size=12,
        per_device_train_batch_size=4,
    )
    trainer.train()
    turns = [event for event, _ in itertools.groupby(events)]
    assert turns == ["copy", "forward"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 6])
def test_one_process_waits_for_its_device_once_an_update_for_the_norm(size):
    (waits,) = run_ranks(count_of_update, 1, size=size)
    assert waits == {"gradients._can_pass: tolist": 1}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 6])
def test_two_ranks_wait_three_times_an_update_however_it_is_cut(size):
    """For the counts, for the outcome, for the norm: what the host has to know to go on."""
    for waits in run_ranks(count_of_update, 2, size=size):
        assert waits == {
            "collectives.sum_over_ranks: cpu": 1,
            "outcome.agree: tolist": 1,
            "gradients._can_pass: tolist": 1,
        }


@pytest.mark.slow
def test_a_wait_of_a_subclass_would_be_counted_once_a_micro_batch():
    (waits,) = run_ranks(count_of_update, 1, size=4, reads=True)
    assert waits["waits.training_step: __float__"] == 3

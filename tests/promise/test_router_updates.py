"""A router loss in real updates: the log, noise and checkpointing, out of memory, ranks.

The promise for each architecture is in `test_architectures`; what a router loss adds up from in
`tests/loss/test_router`.
"""

import copy
import functools

import pytest
import torch
from support import reference
from support.ranks import run_ranks
from support.reference import float64_everywhere, relative_error
from support.router_jobs import SHARES, tiny_mixtral, train_on_ranks, train_router
from support.tiny import Recorder, make_trainer, pad, ragged_rows

ROWS = ragged_rows(7, seed=3)


@functools.cache
def whole(num_rows: int, skipped: int = 0) -> dict[str, torch.Tensor]:
    rows = ragged_rows(num_rows, seed=3)[skipped:]
    with float64_everywhere():
        return reference.reference_gradient(tiny_mixtral(), rows, pad)


def train(tmp_path, model, rows=ROWS, **options):
    recorder = Recorder()
    options = {"effective_batch_size": 7, "per_device_train_batch_size": 2, **options}
    trainer = make_trainer(tmp_path, rows, model=model, callbacks=[recorder], **options)
    trainer.train()
    return trainer, recorder.gradients[0]


def test_the_log_row_holds_the_router_loss_of_the_update_and_the_loads_of_its_experts():
    run = train_router(num_rows=7, effective_batch_size=7)
    with float64_everywhere(), torch.no_grad():
        outputs = tiny_mixtral()(**pad(ROWS))
    assert run["row"]["router_loss"] == pytest.approx(float(outputs.aux_loss), abs=1e-6)
    assert run["row"]["loss"] == pytest.approx(float(outputs.loss), abs=1e-6)
    assert 0 <= run["row"]["expert_load_min"] < 0.25 < run["row"]["expert_load_max"] <= 0.5
    assert relative_error(run["gradient"], whole(7)) <= 1e-10
    one_pass = train_router(num_rows=2, effective_batch_size=2, update_passes=1)
    assert "router_loss" not in one_pass["row"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_passes_draw_the_same_noise(tmp_path, checkpointing):
    """Dropped attention and jittered routers: what was counted is what is trained."""
    rows = [{**row, "input_ids": row["input_ids"][:3], "labels": [5, 6, 7]} for row in ROWS]
    rows = [{**row, "attention_mask": [1, 1, 1]} for row in rows]
    logits = []

    def note(module, args, outputs):
        if module.training and outputs[0].requires_grad:  # checkpointing computes each again
            logits.append(outputs[0].detach())

    # Not in `float64_everywhere`: what is computed again in the backward would not be in it.
    model = tiny_mixtral(attention_dropout=0.4, router_jitter_noise=0.2)
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(note)
    trainer = train(tmp_path, model, rows, gradient_checkpointing=checkpointing)[0]
    weights = torch.cat(logits).softmax(-1)
    assert len(weights) == 7 * 3 * 2 * (2 if checkpointing else 1)
    chosen = torch.bincount(weights.topk(2).indices.reshape(-1), minlength=4)
    expected = 4 * (chosen * weights.sum(0)).sum() / len(weights) ** 2
    assert trainer.state.log_history[0]["router_loss"] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("in_first_pass", [True, False])
def test_out_of_memory_in_either_pass_leaves_no_trace(tmp_path, in_first_pass):
    calls = []

    def fail_once(module, args, kwargs):
        if module.training and torch.is_grad_enabled() is not in_first_pass:
            calls.append(len(kwargs["input_ids"]))
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    with float64_everywhere():
        model = tiny_mixtral()
        model.register_forward_pre_hook(fail_once, with_kwargs=True)
        gradient = train(tmp_path, model)[1]
    assert calls[:2] == [2, 2]
    assert len(calls) > 4 + 2
    assert relative_error(gradient, whole(7)) <= 1e-10


@functools.cache
def ranks(sharded: bool):
    return run_ranks(train_on_ranks, 2, sharded=sharded)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_ranks_balance_experts_together(share, sharded):
    first, second = (rank[share] for rank in ranks(sharded))
    options = SHARES[share]
    last = options["num_rows"] % options["effective_batch_size"] or options["num_rows"]
    expected = whole(options["num_rows"], options["num_rows"] - last)
    for rank in (first, second):
        assert relative_error(rank["gradient"], expected) <= 1e-10
    alone = train_router(**options)["row"]
    for key in ("router_loss", "expert_load_max", "expert_load_min"):
        assert first["row"][key] == second["row"][key] == pytest.approx(alone[key], abs=1e-9)


def test_half_precision_is_balanced_over_the_update_too(tmp_path):
    model = tiny_mixtral(dtype=torch.bfloat16)
    expected = reference.reference_gradient(copy.deepcopy(model).double(), ROWS, pad)
    trainer, gradient = train(tmp_path, model)
    assert trainer.facts.coupling is not None
    assert relative_error(gradient, expected) < 0.1

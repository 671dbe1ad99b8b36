"""Gradients of bfloat16 and float16 weights: summed, reduced and clipped in float32."""

import pytest
import torch
from support.failing import Failure
from support.precision import gradient_error, train_in_bf16_on_ranks
from support.ranks import run_ranks
from support.reference import reference_gradient, relative_error
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama
from torch import nn

from hf_gradacc import GradAccTrainer
from hf_gradacc.safety.precision import Float32Gradients

ROWS = ragged_rows(64, seed=2)


def run(tmp_path, *, dtype=torch.bfloat16, **options):
    model = tiny_llama(dtype=dtype)
    recorder = Recorder()
    settings = {"effective_batch_size": 64, "per_device_train_batch_size": 1}
    settings["low_precision_updates"] = "plain"
    trainer = make_trainer(tmp_path, ROWS, model=model, callbacks=[recorder], **settings | options)
    before = reference_gradient(tiny_llama(dtype=dtype).double(), ROWS, pad)
    trainer.train()
    return relative_error(recorder.gradients[0], before), recorder, trainer


@pytest.mark.slow
def test_a_sum_in_float32_is_closer_than_one_in_bfloat16(tmp_path):
    ours, recorder, _ = run(tmp_path)
    low, _, _ = run(tmp_path, accumulate_grads_in_fp32=False)
    floor = gradient_error(ROWS)
    assert ours < 0.6 * low
    assert ours < 1.3 * floor  # what one bf16 backward per row costs, summed or not
    assert {g.dtype for g in recorder.gradients[0].values()} == {torch.bfloat16}


def test_identical_rows_keep_their_norm():
    """512 times the same bf16 gradient: the sum stops growing in bf16."""
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    row = torch.tensor([1.0, 0.3, 0.01, 0.007], dtype=torch.bfloat16)
    ratios = {}
    for in_float32 in (True, False):
        weight.grad = None
        sums = Float32Gradients([weight])
        if in_float32:
            sums.begin()
        for _ in range(512):
            (weight * row / 512).sum().backward()
        sums.cast_to_weights()
        ratios[in_float32] = float(weight.grad.float().norm() / row.float().norm())
    assert ratios[True] == pytest.approx(1.0, abs=4e-3)  # half a step of bf16, at the end
    assert ratios[False] < 0.8


@pytest.mark.slow
def test_one_micro_batch_costs_no_more_memory(tmp_path):
    seen = []

    class Look(GradAccTrainer):
        def _clip_grad_norm(self, model):
            seen.append({p.grad.dtype for p in model.parameters()})
            return super()._clip_grad_norm(model)

    for size in (64, 32):
        run(tmp_path, trainer_class=Look, per_device_train_batch_size=size, max_grad_norm=1.0)
    assert seen == [{torch.bfloat16}, {torch.float32}]  # clipped in float32


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_the_optimizer_gets_gradients_in_the_dtype_of_its_weights(tmp_path, optim):
    _, recorder, trainer = run(
        tmp_path, optim=optim, num_train_epochs=2, per_device_train_batch_size=16
    )
    assert trainer.state.global_step == len(recorder.gradients) == 2
    dtypes = {g.dtype for gradient in recorder.gradients for g in gradient.values()}
    assert dtypes == {torch.bfloat16}


def test_float32_weights_are_left_alone(tmp_path):
    _, recorder, trainer = run(tmp_path, dtype=torch.float32, per_device_train_batch_size=16)
    assert trainer._update_runner.float32.parameters == []
    assert {g.dtype for g in recorder.gradients[0].values()} == {torch.float32}


@pytest.mark.slow
def test_an_adapter_in_float32_on_a_bf16_base_needs_nothing(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), LoraConfig(target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path, ROWS, model=model, per_device_train_batch_size=8)
    trainer.train()
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert len(trainer._update_runner.float32.parameters) == (
        0 if trained == {torch.float32} else 4
    )


@pytest.mark.slow
def test_an_update_that_ran_out_of_memory_still_sums_in_float32(tmp_path):
    _, expected, _ = run(tmp_path, per_device_train_batch_size=2)
    model = tiny_llama(dtype=torch.bfloat16)
    Failure(model, lambda rows, width, seen: seen == 1)
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        ROWS,
        model=model,
        callbacks=[recorder],
        effective_batch_size=64,
        per_device_train_batch_size=2,
        low_precision_updates="plain",
    )
    trainer.train()
    assert trainer.token_budget.cap is not None
    assert relative_error(recorder.gradients[0], expected.gradients[0]) < 6e-3


@pytest.mark.slow
def test_ranks_sum_and_reduce_in_float32():
    first, second = run_ranks(train_in_bf16_on_ranks, 2)
    for name in first["weights"]:
        assert torch.equal(first["weights"][name], second["weights"][name])
    assert first["reduced"] == second["reduced"] == {torch.float32}
    assert first["error"] < 0.75 * first["error_in_bf16"]


# ---- float16 and its GradScaler ----------------------------------------------------------------


class Scaled(GradAccTrainer):
    """float16 on a CPU, which accelerate does not offer: with torch's own GradScaler."""

    scale = 2.0**10

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        accelerator = self.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=99)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        self.optimizer.__init__(
            self.optimizer.optimizer, device_placement=False, scaler=accelerator.scaler
        )
        return prepared


@pytest.fixture
def _plain_state_after():
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@pytest.mark.slow
@pytest.mark.usefixtures("_plain_state_after")
def test_float16_weights_train_with_a_scaler(tmp_path):
    error, recorder, trainer = run(
        tmp_path,
        dtype=torch.float16,
        trainer_class=Scaled,
        max_grad_norm=1.0,
        per_device_train_batch_size=8,
        low_precision_updates="master",
    )
    assert error < 3e-3
    assert {g.dtype for g in recorder.gradients[0].values()} == {torch.float32}
    assert set(trainer.optimizer_steps.masters) == {n for n, _ in trainer.model.named_parameters()}
    assert trainer.accelerator.scaler.get_scale() == 2.0**10


@pytest.mark.slow
@pytest.mark.usefixtures("_plain_state_after")
def test_an_update_the_scaler_skips_is_counted_and_no_error(tmp_path):
    class High(Scaled):
        scale = 2.0**26  # gradients on their way through float16 layers overflow

    _, _, trainer = run(
        tmp_path,
        dtype=torch.float16,
        trainer_class=High,
        per_device_train_batch_size=32,
        max_grad_norm=1.0,
        num_train_epochs=12,
        logging_steps=12,
    )
    [row] = [row for row in trainer.state.log_history if "loss" in row]
    assert 0 < row["skipped_updates"] < 12
    assert row["loss"] == pytest.approx(3.87, abs=0.1)  # a mean over those that trained
    scale = trainer.accelerator.scaler.get_scale()
    assert scale == 2.0 ** (26 - row["skipped_updates"])

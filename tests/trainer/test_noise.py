"""The noise scale as the trainer measures it: same gradient, same figure as by hand, and kept."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.noise_jobs import ROWS, measure_as_rank
from support.ranks import run_ranks
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, log_rows, make_trainer, pad, tiny_llama

from hf_gradacc import GradAccTrainer, UpdateSampler
from hf_gradacc.tracking.noise_scale import measure_noise
from hf_gradacc.updates.targets import TargetRule, count_targets


def train(tmp_path, **options):
    recorder = Recorder()
    settings = {"effective_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, ROWS, callbacks=[recorder], **settings | options)
    with float64_everywhere():
        trainer.train(resume_from_checkpoint=options.pop("resume", None))
    return trainer, recorder.gradients


def squared_norm(gradient):
    return sum(float(g.square().sum()) for g in gradient.values())


@pytest.mark.parametrize("every", [None, 2])
def test_an_update_that_is_not_measured_pays_nothing(tmp_path, every):
    """No hook on any weight, the cheapest plan, rows dealt as ever."""
    hooks, plans = [], []

    class Watching(GradAccTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            hooks.append(sum(len(p._backward_hooks or {}) for p in model.parameters()))
            return super().training_step(model, inputs, num_items_in_batch)

        def training_update(self, model, update):
            plans.append([micro_batch.rows for micro_batch in update])
            hooks.append("|")
            return super().training_update(model, update)

    options = {"effective_batch_size": 8, "max_tokens_per_micro_batch": 30, "learning_rate": 0.0}
    trainer = make_trainer(
        tmp_path, ROWS, trainer_class=Watching, noise_scale_every=every, **options
    )
    trainer.train()
    first, second = (part for part in "".join(map(str, hooks)).split("|")[1:])
    assert set(second) == {"0"}
    assert (set(first) == {"0"}) == (every is None)
    assert (trainer._noise_listener.record is None) == (every is None)
    sampler = UpdateSampler(16, effective_batch_size=8, seed=42)
    for members, plan in list(zip(sampler, plans, strict=True))[1 if every else 0 :]:
        pieces = trainer.update_collator.plan([ROWS[i] for i in members])
        assert plan == [tuple(members[i] for i in piece) for piece in pieces]


@pytest.mark.parametrize("every", [1, 2])
def test_measuring_changes_no_gradient(tmp_path, every):
    _, plain = train(tmp_path / "plain")
    trainer, measured = train(tmp_path / "measured", noise_scale_every=every)
    for a, b in zip(plain, measured, strict=True):
        assert relative_error(b, a) <= 1e-10
    assert len(trainer._noise_listener.record.meter.measurements) == 2 // every


def test_an_update_to_be_measured_may_hold_no_row(tmp_path):
    """It has no target, or another rank has all of its rows."""
    bare = {**ROWS[0], "labels": [-100] * len(ROWS[0]["labels"])}
    rows = [bare, *ROWS[:2], bare, *ROWS[2:5]]
    trainer = make_trainer(
        tmp_path,
        rows,
        effective_batch_size=1,
        max_tokens_per_micro_batch=40,
        noise_scale_every=3,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert trainer.state.global_step == len(rows)
    assert log_rows(trainer)[-1]["skipped_updates"] == 2


def test_the_figure_is_that_of_the_micro_batches_cut_in_the_order_dealt(tmp_path):
    trainer, gradients = train(tmp_path, noise_scale_every=2)
    members = next(iter(trainer.get_train_dataloader().updates.batch_sampler))
    model = tiny_llama().train()
    weighted, counts = [], []
    with float64_everywhere():
        for start in range(0, 8, 2):
            batch = [ROWS[i] for i in members[start : start + 2]]
            counts.append(count_targets(pad(batch), TargetRule.NEXT_TOKEN))
            weighted.append(squared_norm(reference_gradient(model, batch, pad)))
    expected = measure_noise(
        weighted, counts, squared_norm_of_update=squared_norm(gradients[0]), num_sequences=8
    )
    (actual,) = trainer._noise_listener.record.meter.measurements
    assert actual.noise == pytest.approx(expected.noise, rel=1e-9)
    assert actual.signal == pytest.approx(expected.signal, rel=1e-9)


def measured_by_hand(model, orders, per_micro_batch):
    """One measurement of several ranks' shares, from each micro-batch's gradient by itself."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    squares, counts, update = [], [], 0.0
    for rows in orders:
        for start in range(0, len(rows), per_micro_batch):
            batch = pad([ROWS[i] for i in rows[start : start + per_micro_batch]])
            counts.append(count_targets(batch, TargetRule.NEXT_TOKEN))
            gradients = torch.autograd.grad(model(**batch).loss, parameters)
            flat = torch.cat([g.flatten().double() for g in gradients])
            squares.append(float(flat @ flat))
            update = update + counts[-1] * flat
    update = update / sum(counts)
    return measure_noise(
        squares,
        counts,
        squared_norm_of_update=float(update @ update),
        num_sequences=sum(map(len, orders)),
    )


def lora():
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(lora, 1e-9), (lambda: tiny_llama(dtype=torch.bfloat16), 0.02)],
    ids=["lora", "bf16 weights, float32 sums"],
)
def test_only_what_is_trained_is_measured_and_sums_may_be_wider_than_weights(
    tmp_path, make, tolerance
):
    options = {"effective_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, ROWS, model=make(), noise_scale_every=2, **options)
    model = make().train()  # outside: weights are drawn in the default dtype
    with float64_everywhere():
        trainer.train()
        order = list(next(iter(trainer.get_train_dataloader().updates.batch_sampler)))
        expected = measured_by_hand(model, [order], 2)
    (actual,) = trainer._noise_listener.record.meter.measurements
    # Both are differences: what rounding does to them is measured by what they are taken from.
    whole = expected.signal + expected.noise / expected.num_targets
    assert actual.signal == pytest.approx(expected.signal, abs=tolerance * whole)
    assert actual.noise == pytest.approx(
        expected.noise, abs=tolerance * whole * expected.num_targets
    )


@pytest.mark.slow
def test_two_real_ranks_measure_what_their_micro_batches_say(tmp_path):
    """Seven rows in random order on two ranks, four against three: one figure, on both."""
    told = run_ranks(measure_as_rank, 2, out=str(tmp_path))
    assert told[0] == told[1]
    options = {"effective_batch_size": 7, "seed": 42, "world_size": 2, "noise_scale_every": 1}
    orders = [list(next(iter(UpdateSampler(16, rank=rank, **options)))) for rank in range(2)]
    model = tiny_llama().train()
    with float64_everywhere():
        expected = measured_by_hand(model, orders, 1)
    noise, signal, *counts = told[0][0]
    assert signal == pytest.approx(expected.signal, rel=1e-9)
    assert noise == pytest.approx(expected.noise, rel=1e-9)
    assert counts == [expected.num_targets, 7, expected.num_pairs]


@pytest.mark.slow
def test_the_figure_stands_in_the_log_beside_the_batch(tmp_path):
    trainer, _ = train(
        tmp_path,
        noise_scale_every=1,
        num_train_epochs=20,
        learning_rate=0.3,
        effective_batch_size=16,
    )
    rows = log_rows(trainer)
    assert any("gradient_noise_scale" in row for row in rows)
    plain, _ = train(tmp_path / "off")
    assert not any("gradient_noise_scale" in row for row in log_rows(plain))


@pytest.mark.slow
def test_measurements_survive_a_checkpoint(tmp_path):
    options = {"noise_scale_every": 1, "num_train_epochs": 2}
    whole, _ = train(tmp_path / "whole", **options)
    train(tmp_path / "half", **options, save_strategy="steps", save_steps=2)
    trainer = make_trainer(
        tmp_path / "half",
        ROWS,
        effective_batch_size=8,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        save_strategy="steps",
        save_steps=2,
        **options,
    )
    with float64_everywhere():
        trainer.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    expected = torch.tensor(whole._noise_listener.record.meter.state())
    actual = torch.tensor(trainer._noise_listener.record.meter.state())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

"""The noise scale as the trainer measures it: same gradient, same figure as by hand, and kept."""

import pytest
import torch
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, log_rows, make_trainer, pad, ragged_rows, tiny_llama

from hf_gradacc.noise_scale import measure_from_sums
from hf_gradacc.targets import count_targets

ROWS = ragged_rows(16, seed=41)


def train(tmp_path, **options):
    recorder = Recorder()
    settings = {"effective_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, ROWS, callbacks=[recorder], **settings | options)
    with float64_everywhere():
        trainer.train(resume_from_checkpoint=options.pop("resume", None))
    return trainer, recorder.gradients


def squared_norm(gradient):
    return sum(float(g.square().sum()) for g in gradient.values())


@pytest.mark.parametrize("every", [1, 2])
def test_measuring_changes_no_gradient(tmp_path, every):
    _, plain = train(tmp_path / "plain")
    trainer, measured = train(tmp_path / "measured", noise_scale_every=every)
    for a, b in zip(plain, measured, strict=True):
        assert relative_error(b, a) <= 1e-10
    assert len(trainer._noise.meter.measurements) == 2 // every


def test_the_figure_is_that_of_the_micro_batches_cut_in_drawn_order(tmp_path):
    trainer, gradients = train(tmp_path, noise_scale_every=2)
    members = sorted_as_drawn(trainer)
    model = tiny_llama().train()
    weighted, counts = 0.0, []
    with float64_everywhere():
        for start in range(0, 8, 2):
            batch = [ROWS[i] for i in members[start : start + 2]]
            counts.append(int(count_targets(pad(batch)["labels"])))
            weighted += counts[-1] * squared_norm(reference_gradient(model, batch, pad))
    expected = measure_from_sums(weighted, 4, squared_norm(gradients[0]), sum(counts), 8)
    (actual,) = trainer._noise.meter.measurements
    assert actual.noise == pytest.approx(expected.noise, rel=1e-9)
    assert actual.signal == pytest.approx(expected.signal, rel=1e-9)


def sorted_as_drawn(trainer):
    return trainer.get_train_dataloader().batch_sampler.membership(0)[0]


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
    expected = torch.tensor(whole._noise.meter.state())
    actual = torch.tensor(trainer._noise.meter.state())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

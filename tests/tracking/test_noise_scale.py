"""The noise scale against models whose noise is known in closed form, and against torch itself.

Linear regression: x ~ N(0, I_d), y = x·w* + ε with ε ~ N(0, σ²). The gradient of one target's
loss ½(x·w - y)² at w = w* + δ is x (x·δ - ε). Its mean is δ and the trace of its covariance
(d + 1)|δ|² + d σ², so the noise scale is (d + 1) + d σ² / |δ|².
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny import pad, spaced_rows
from support.tracked import tracked_trainer

from hf_gradacc import UpdateSampler
from hf_gradacc.tracking.noise_meter import NoiseScaleMeter
from hf_gradacc.tracking.noise_scale import (
    NoiseMeasurement,
    NoiseScale,
    judge_batch,
    measure_noise,
    smooth_noise_scale,
)
from hf_gradacc.updates.collator import UpdateCollator

DIM, SIGMA = 8, 1.5
SIZES = [1, 2, 5, 9, 3]


def closed_form(delta):
    signal = float(delta @ delta)
    noise = (DIM + 1) * signal + DIM * SIGMA**2
    return noise, signal


def micro_batch_gradients(rng, delta, sizes, *, copies=1):
    """Mean gradients ``[micro-batches, DIM]``; each draw is repeated `copies` times in a row."""
    gradients = []
    for size in sizes:
        x = rng.standard_normal((size, DIM)).repeat(copies, axis=0)
        epsilon = (SIGMA * rng.standard_normal(size)).repeat(copies)
        gradients.append((x * (x @ delta - epsilon)[:, None]).mean(0))
    return np.stack(gradients)


def measure(rng, delta, sizes, *, copies=1):
    gradients = micro_batch_gradients(rng, delta, sizes, copies=copies)
    counts = [size * copies for size in sizes]
    update = np.average(gradients, axis=0, weights=counts)
    return measure_noise(
        (gradients**2).sum(1).tolist(),
        counts,
        squared_norm_of_update=float(update @ update),
        num_sequences=sum(sizes),
    )


def many(delta, sizes=SIZES, *, count=4000, seed=0, copies=1):
    rng = np.random.default_rng(seed)
    return [measure(rng, delta, sizes, copies=copies) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[1, 1], [4, 4, 4], SIZES, [1, 30]], ids=str)
@pytest.mark.parametrize("length", [0.3, 2.0])
def test_noise_and_signal_are_unbiased_for_micro_batches_of_any_sizes(sizes, length):
    delta = np.full(DIM, length / np.sqrt(DIM))
    noise, signal = closed_form(delta)
    measured = many(delta, sizes)
    for found, true in (
        (np.array([m.noise for m in measured]), noise),
        (np.array([m.signal for m in measured]), signal),
    ):
        standard_error = found.std() / np.sqrt(len(found))
        assert abs(found.mean() - true) < 4 * standard_error
        assert standard_error < 0.25 * noise  # or the line above would pass for anything


def test_the_unbiased_estimate_is_told_from_its_broken_variants():
    delta = np.full(DIM, 2.0 / np.sqrt(DIM))
    noise, _ = closed_form(delta)
    rng = np.random.default_rng(1)
    sizes = np.array(SIZES)
    right, of_all_pairs, alike = [], [], []
    for _ in range(4000):
        gradients = micro_batch_gradients(rng, delta, SIZES)
        update = np.average(gradients, axis=0, weights=sizes)
        squares, whole, total = (gradients**2).sum(1), update @ update, sizes.sum()
        between = total**2 * whole - (sizes**2 * squares).sum()
        right.append(total * (whole - between / (total**2 - (sizes**2).sum())))
        of_all_pairs.append(total * (whole - between / total**2))
        alike.append(sizes.mean() * (squares - whole).sum() / (len(sizes) - 1))
    assert np.mean(right) == pytest.approx(noise, rel=0.05)
    assert np.mean([m.noise for m in many(delta, seed=1)]) == pytest.approx(np.mean(right))
    assert np.mean(of_all_pairs) > 1.15 * noise
    assert abs(np.mean(alike) / noise - 1) > 0.15


def test_targets_that_resemble_each_other_in_a_sequence_count_as_the_noise_they_make():
    """Sequences of 6 equal targets: an update of N targets is as noisy as one of N / 6."""
    delta = np.full(DIM, 1.0 / np.sqrt(DIM))
    noise, signal = closed_form(delta)
    scale = smooth_noise_scale(many(delta, copies=6), decay=1.0)
    assert scale.target_tokens == pytest.approx(6 * noise / signal, rel=0.05)
    assert scale.sequences == pytest.approx(noise / signal, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "cap"), [(1, 8), (8, 3)])
def test_the_figure_is_the_noise_of_real_updates_however_they_are_cut_and_dealt(world_size, cap):
    """Rows of 2 to 100 targets that resemble each other, long rows unlike short ones.

    Truth is how far the mean gradients of updates lie from that of all rows. An estimate that takes
    the targets of a row for independent draws falls with the size of micro-batches.
    """
    found, independent, true = noise_of_updates(world_size=world_size, cap=cap)
    assert found == pytest.approx(true, rel=0.1)
    assert independent < (0.75 if world_size > 1 else 0.95) * true


def noise_of_updates(*, world_size, cap, size=32, epochs=20, count=4_000):
    """Noise scale as measured, as if targets were independent, and as the updates have it."""
    rng = np.random.default_rng(0)
    lengths = rng.geometric(0.08, size=count) + 1
    own = 1 + 0.02 * (lengths - lengths.mean())  # along the signal; the rest is noise
    rows = np.concatenate([own[:, None], 1.4 * rng.standard_normal((count, 8))], 1)
    sums, collator = rows * lengths[:, None], UpdateCollator(None, max_sequences=cap)
    sums[:, 1:] -= lengths[:, None] * sums[:, 1:].sum(0) / lengths.sum()
    true = sums.sum(0) / lengths.sum()
    options = {"lengths": lengths, "world_size": world_size, "noise_scale_every": 1}
    ranks = [
        UpdateSampler(count, effective_batch_size=size, rank=rank, **options)
        for rank in range(world_size)
    ]
    found, independent, distances = [], [], []
    for epoch in range(epochs):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        for shares in zip(*ranks, strict=True):
            pieces = [
                np.array(share)[piece]
                for share in shares
                for piece in collator.cut(lengths[share].tolist(), at_random=True)
            ]
            counts = np.array([lengths[piece].sum() for piece in pieces])
            totals = np.array([sums[piece].sum(0) for piece in pieces])
            update, total = totals.sum(0) / counts.sum(), counts.sum()
            squares, whole = ((totals / counts[:, None]) ** 2).sum(1), float(update @ update)
            found.append(
                measure_noise(
                    squares.tolist(),
                    counts.tolist(),
                    squared_norm_of_update=whole,
                    num_sequences=size,
                )
            )
            noise = (counts @ squares - total * whole) / (len(counts) - 1)
            independent.append((noise, whole - noise / total))
            distances.append(total * ((update - true) ** 2).sum())
    scale = smooth_noise_scale(found, decay=1.0)
    noise, signal = np.mean(independent, axis=0)
    return scale.target_tokens, noise / signal, np.mean(distances) / (true @ true)


def test_the_scale_is_a_ratio_of_means_not_a_mean_of_ratios():
    delta = np.full(DIM, 0.5 / np.sqrt(DIM))
    noise, signal = closed_form(delta)
    measured = many(delta, [8] * 4)
    assert any(m.signal < 0 for m in measured)
    blocks = [measured[start : start + 500] for start in range(0, 4000, 500)]
    ratios_of_means = [smooth_noise_scale(b, decay=1.0).target_tokens for b in blocks]
    means_of_ratios = [np.mean([m.noise / m.signal for m in b]) for b in blocks]
    assert ratios_of_means == pytest.approx([noise / signal] * 8, rel=0.2)
    assert max(abs(mean / (noise / signal) - 1) for mean in means_of_ratios) > 1


def test_the_first_measurements_are_not_pulled_to_zero():
    one = NoiseMeasurement(noise=8.0, signal=2.0, num_targets=10, num_sequences=5, num_pairs=80)
    assert smooth_noise_scale([one]).target_tokens == 4.0
    assert smooth_noise_scale([one] * 3).target_tokens == pytest.approx(4.0)


def test_newer_measurements_weigh_more():
    old = NoiseMeasurement(noise=1.0, signal=1.0, num_targets=10, num_sequences=5, num_pairs=80)
    new = NoiseMeasurement(noise=9.0, signal=1.0, num_targets=10, num_sequences=5, num_pairs=80)
    assert smooth_noise_scale([old] * 50 + [new] * 50).target_tokens > 8
    assert smooth_noise_scale([new] * 50 + [old] * 50).target_tokens < 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [12, 60])
def test_the_band_holds_the_truth_as_often_as_it_says(count):
    delta = np.full(DIM, 1.5 / np.sqrt(DIM))
    noise, signal = closed_form(delta)
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        measured = [measure(rng, delta, [16] * 6) for _ in range(count)]
        scale = smooth_noise_scale(measured, decay=0.97, confidence=0.9)
        held += scale.low <= noise / signal <= scale.high
    assert 0.83 <= held / 300 <= 0.96


def test_without_a_signal_the_band_has_no_upper_end():
    scale = smooth_noise_scale(many(np.zeros(DIM), count=40))
    assert scale.high == float("inf")
    assert scale.low > 10


def test_too_few_measurements_have_no_band():
    scale = smooth_noise_scale(many(np.ones(DIM), count=3))
    assert scale.low is None
    assert scale.high is None
    assert judge_batch(scale, tokens_per_update=100).word == "unclear"


def test_one_micro_batch_says_nothing_about_noise():
    with pytest.raises(ValueError, match="at least 2"):
        measure_noise([1.0], [3], squared_norm_of_update=1.0, num_sequences=1)


@pytest.mark.parametrize(
    ("tokens", "word"),
    [(1_000, "too small"), (9_000, "right"), (30_000, "right"), (300_000, "larger than useful")],
)
def test_a_batch_is_judged_by_the_band_not_by_the_estimate_alone(tokens, word):
    scale = NoiseScale(20_000, 200, low=14_000, high=30_000, num_measurements=30)
    verdict = judge_batch(scale, tokens_per_update=tokens)
    assert verdict.word == word
    assert f"{tokens:,}" in verdict.text


# --- the meter -----------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """One weight used twice, so that a norm per use would be wrong."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)
        self.mix = torch.nn.Linear(4, 4)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)

    def forward(self, ids):
        return self.frozen(self.mix(self.embed(ids))) @ self.embed.weight.T


def losses(model, sizes, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        ids = torch.randint(11, (size,), generator=generator)
        yield torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 11)


def test_the_meter_sees_each_micro_batch_as_torch_gives_it_alone():
    torch.manual_seed(0)
    model = Tied().double()
    trainable = [p for p in model.parameters() if p.requires_grad]
    alone = [torch.autograd.grad(loss, trainable) for loss in losses(model, SIZES)]
    weights = [size / sum(SIZES) for size in SIZES]
    update = [
        sum(w * g for w, g in zip(weights, gs, strict=True)) for gs in zip(*alone, strict=True)
    ]
    expected = measure_noise(
        [sum(float(g.square().sum()) for g in gs) for gs in alone],
        SIZES,
        squared_norm_of_update=sum(float(g.square().sum()) for g in update),
        num_sequences=7,
    )
    meter = NoiseScaleMeter()
    meter.before_update(model.parameters())
    for size, weight, loss in zip(SIZES, weights, losses(model, SIZES), strict=True):
        (weight * loss).backward()
        meter.after_micro_batch(num_targets=size, weight=weight)
    actual = meter.after_update(model.parameters(), num_sequences=7)
    assert actual.noise == pytest.approx(expected.noise, rel=1e-12)
    assert actual.signal == pytest.approx(expected.signal, rel=1e-12)
    assert (actual.num_targets, actual.num_sequences) == (sum(SIZES), 7)
    for parameter, grad in zip(trainable, update, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-12, atol=1e-14)


def test_ranks_add_up_to_one_measurement():
    """Two ranks with their micro-batches give what one process with all of them gives."""
    torch.manual_seed(0)
    model = Tied().double()
    whole = measured(model, range(5))
    share = [measured_sums(model, part) for part in (range(2), range(2, 5))]
    total = sum(share)
    torch.testing.assert_close(total, measured_sums(model, range(5)), rtol=1e-12, atol=0)
    assert total[2] == 5, "micro-batches"
    assert whole is not None


def measured_sums(model, part):
    seen = []
    measured(model, part, sum_over_ranks=lambda v: (seen.append(v), v)[1])
    return seen[0]


def measured(model, part, **kwargs):
    model.zero_grad()
    meter = NoiseScaleMeter()
    meter.before_update(model.parameters())
    for index, (size, loss) in enumerate(zip(SIZES, losses(model, SIZES), strict=True)):
        if index in part:
            (loss * size / sum(SIZES)).backward()
            meter.after_micro_batch(num_targets=size, weight=size / sum(SIZES))
    return meter.after_update(model.parameters(), num_sequences=len(part), **kwargs)


def test_outside_a_measured_update_nothing_listens():
    model = Tied()
    meter = NoiseScaleMeter()

    def hooks():
        return sum(len(p._backward_hooks or {}) for p in model.parameters())

    assert hooks() == 0
    meter.before_update(model.parameters())
    assert hooks() == 3
    meter.after_update(model.parameters(), num_sequences=0)
    assert hooks() == 0
    meter.before_update(model.parameters())
    meter.abandon()
    assert hooks() == 0


def test_a_non_finite_gradient_is_no_measurement():
    model = Tied()
    meter = NoiseScaleMeter()
    meter.before_update(model.parameters())
    for size, loss in zip(SIZES, losses(model, SIZES), strict=True):
        (loss * float("nan")).backward()
        meter.after_micro_batch(num_targets=size, weight=0.1)
    assert meter.after_update(model.parameters(), num_sequences=3) is None
    assert meter.metrics() == {}
    assert meter.verdict() is None


def test_bf16_gradients_are_summed_in_float32():
    weight = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    meter = NoiseScaleMeter()
    meter.before_update([weight])
    for _ in range(2):
        weight.grad = None
        (weight.sum() * 1.0).backward()
        meter.after_micro_batch(num_targets=1, weight=0.5)
    assert float(meter._weighted_squares) == pytest.approx(2 * 4 * 100_000, rel=1e-3)


def test_measurements_survive_a_checkpoint():
    meter = NoiseScaleMeter()
    meter.measurements.extend(many(np.ones(DIM), count=8))
    other = NoiseScaleMeter()
    other.load_state(meter.state())
    assert other.metrics() == meter.metrics()
    assert set(meter.metrics()) == {
        "gradient_noise_scale",
        "gradient_noise_scale_sequences",
        "gradient_noise_scale_low",
        "gradient_noise_scale_high",
    }


# --- in the trainer ------------------------------------------------------------------------


def test_the_trainer_measures_the_update_it_trains(tmp_path):
    """Against the gradients of the very same micro-batches, each computed by itself."""
    options = {"noise_scale_every": 2, "effective_batch_size": 8, "learning_rate": 0.0}
    trainer = tracked_trainer(tmp_path, report_to="none", max_steps=3, **options)
    model, rows = trainer.model.double(), spaced_rows()
    trainer.train()
    measured = trainer._noise_listener.record.meter.measurements
    assert len(measured) == 2, "of updates 0, 1 and 2 the first and the third"
    sampler = UpdateSampler(
        len(rows), effective_batch_size=8, seed=trainer.args.seed, noise_scale_every=2
    )
    for actual, members in zip(measured, list(sampler)[::2], strict=True):
        drawn = [rows[i] for i in members]
        collator = trainer.update_collator
        pieces = collator.cut(collator.measure(drawn), at_random=True)
        assert [i for piece in pieces for i in piece] == list(range(8)), "in the order dealt"
        squares, counts, update = [], [], 0
        for piece in pieces:
            batch = pad([drawn[i] for i in piece])
            count = int((batch["labels"][:, 1:] != -100).sum())
            grads = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
            flat = torch.cat([grad.flatten() for grad in grads])
            squares.append(float(flat @ flat))
            counts.append(count)
            update = update + flat * count
        update = update / sum(counts)
        expected = measure_noise(
            squares, counts, squared_norm_of_update=float(update @ update), num_sequences=8
        )
        assert actual.noise == pytest.approx(expected.noise, rel=1e-6)
        assert actual.signal == pytest.approx(expected.signal, rel=1e-5)
        assert (actual.num_targets, actual.num_sequences) == (sum(counts), 8)


@pytest.mark.slow
def test_measuring_does_not_change_what_is_trained(tmp_path):
    losses = []
    for every in (None, 1):
        options = {"noise_scale_every": every, "max_steps": 6}
        trainer = tracked_trainer(tmp_path / str(every), report_to="none", **options)
        trainer.model.double()
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        said = [row for row in trainer.state.log_history if "gradient_noise_scale_low" in row]
        assert bool(said) == (every == 1)
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

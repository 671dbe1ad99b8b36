"""Check the gradient noise scale against models where it is known, and draw what came out.

    python benchmarks/noise_scale.py            # two minutes on one core

1. Linear regression, whose noise scale has a closed form (`tests/tracking/test_noise_scale.py`
   derives it).
2. A small Llama half way through learning word problems, its weights held still: the meter's
   estimates against a direct one from the gradient of every single row.
3. What a measured update costs on that model.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradacc.tracking.noise_meter import NoiseScaleMeter
from hf_gradacc.tracking.noise_scale import measure_noise, smooth_noise_scale

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "design-notes" / "noise-scale-validation.png"
DIM, SIGMA, SIZES = 16, 1.0, [3, 14, 6, 9, 1, 11, 8, 12]
MICRO_BATCHES, ROWS = 8, 32


def regression(length: float, *, updates: int, seed: int = 0):
    """Estimate and true noise scale at distance `length` from the optimum."""
    rng = np.random.default_rng(seed)
    delta = np.full(DIM, length / np.sqrt(DIM))
    measured = []
    for _ in range(updates):
        gradients = []
        for size in SIZES:
            x = rng.standard_normal((size, DIM))
            error = x @ delta - SIGMA * rng.standard_normal(size)
            gradients.append((x * error[:, None]).mean(0))
        update = np.average(gradients, axis=0, weights=SIZES)
        squares = [float(g @ g) for g in gradients]
        options = {"squared_norm_of_update": float(update @ update), "num_sequences": sum(SIZES)}
        measured.append(measure_noise(squares, SIZES, **options))
    true = DIM + 1 + DIM * SIGMA**2 / length**2
    return true, smooth_noise_scale(measured, decay=0.99), measured


def word_problems(*, longest: int = 240, count: int = 600):
    """Rows of bytes, the question masked."""
    rows = []
    lines = (ROOT / "recipes" / "data" / "word_problems.jsonl").read_text("utf-8").splitlines()
    for line in lines:
        row = json.loads(line)
        question, answer = row["question"].encode() + b"\n", row["answer"].encode()
        if len(question) + len(answer) <= longest:
            ids = [*question, *answer]
            rows.append((ids, [-100] * len(question) + list(answer)))
    return rows[:count]


def mean_loss(model, rows):
    """Mean loss per target of padded rows, and the number of targets."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return model(input_ids=ids, labels=labels).loss, int((labels[:, 1:] != -100).sum())


def run_update(model, pieces, meter=None):
    """Accumulate an update's gradient as the trainer does, measured or not."""
    total = sum(
        sum(label != -100 for label in labels[1:]) for piece in pieces for _, labels in piece
    )
    model.zero_grad(set_to_none=True)
    if meter is not None:
        meter.before_update(model.parameters())
    for piece in pieces:
        loss, targets = mean_loss(model, piece)
        (loss * (targets / total)).backward()
        if meter is not None:
            meter.after_micro_batch(num_targets=targets, weight=targets / total)
    if meter is not None:
        meter.after_update(model.parameters(), num_sequences=sum(map(len, pieces)))


def cut(rows):
    """Cut rows into equally many per micro-batch, in the order given."""
    size = len(rows) // MICRO_BATCHES
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def half_trained(rows, *, updates: int = 60):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(1)
    for _ in range(updates):
        run_update(model, cut(sorted(draw(rng, rows), key=lambda row: len(row[0]))))
        optimizer.step()
    return model


def draw(rng, rows):
    return [rows[i] for i in rng.integers(len(rows), size=ROWS)]


def direct_estimate(model, rows):
    """Noise scale in target tokens from every row's own gradient.

    A row's residual is ``n_s (g_s - G)``; an update of S rows and N targets then has the noise
    ``S · mean |residual|² / N²``, which is ``tr Σ / N`` for ``tr Σ = mean |residual|² / mean n``.
    """
    sums, counts = [], []
    for row in rows:
        model.zero_grad(set_to_none=True)
        loss, targets = mean_loss(model, [row])
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        sums.append((gradient * targets).half())
        counts.append(targets)
    counts = torch.tensor(counts, dtype=torch.float32)
    mean = sum(s.float() for s in sums) / counts.sum()
    squares = [
        float((s.float() - n * mean).square().sum()) for s, n in zip(sums, counts, strict=True)
    ]
    noise = statistics.fmean(squares) / float(counts.mean())
    # Rows are drawn with replacement from just these, so their mean is the true signal.
    return noise, float(mean.square().sum())


def main() -> None:
    torch.set_num_threads(1)
    lengths = [0.15, 0.3, 0.6, 1.2, 2.5, 5.0]
    closed = [regression(length, updates=400, seed=n) for n, length in enumerate(lengths)]
    for true, scale, _ in closed:
        print(
            f"closed form {true:8.1f}  estimate {scale.target_tokens:8.1f}  "
            f"band {scale.low:.1f} to {scale.high:.1f}"
        )

    rows = word_problems()
    model = half_trained(rows)
    noise, signal = direct_estimate(model, rows)
    direct = noise / signal
    meters = {
        "cut at random": NoiseScaleMeter(decay=1.0),
        "sorted by length": NoiseScaleMeter(decay=1.0),
    }
    rng = np.random.default_rng(2)
    seconds = {"off": [], "on": []}
    for number in range(80):
        drawn = draw(rng, rows)
        run_update(model, cut(drawn), meters["cut at random"])
        ordered = cut(sorted(drawn, key=lambda row: len(row[0])))
        run_update(model, ordered, meters["sorted by length"])
        if number % 4:
            continue
        for name, meter in (("off", None), ("on", NoiseScaleMeter())):
            started = time.process_time()
            run_update(model, ordered, meter)
            seconds[name].append(time.process_time() - started)
    print(
        f"\nLlama, {len(rows)} rows: direct {direct:,.0f} target tokens "
        f"(noise {noise:.4g}, signal {signal:.4g})"
    )
    for name, meter in meters.items():
        scale = meter.scale
        print(
            f"{name:18} {scale.target_tokens:,.0f}  band {scale.low:,.0f} to {scale.high:,.0f}, "
            f"{scale.sequences:,.1f} sequences"
        )
    off, on = (statistics.median(seconds[name]) for name in ("off", "on"))
    ratios = [b / a for a, b in zip(seconds["off"], seconds["on"], strict=True)]
    print(
        f"a measured update: {on / off - 1:+.1%} of medians ({off * 1e3:.0f} ms without), "
        f"{statistics.median(ratios) - 1:+.1%} median of pairs"
    )
    picture(closed, direct, meters)


def picture(closed, direct, meters) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    true = [t for t, _, _ in closed]
    found = [s.target_tokens for _, s, _ in closed]
    errors = [
        [s.target_tokens - s.low for _, s, _ in closed],
        [s.high - s.target_tokens for _, s, _ in closed],
    ]
    left.plot([10, 1000], [10, 1000], color="#9aa4ad", linewidth=1, label="equal")
    left.errorbar(
        true,
        found,
        yerr=errors,
        fmt="o",
        ms=5,
        color="#2a6fdb",
        capsize=3,
        label="estimate, 90 % band",
    )
    wrong = [
        statistics.fmean(m.noise for m in ms)
        / statistics.fmean(m.signal + m.noise / m.num_targets for m in ms)
        for _, _, ms in closed
    ]
    left.plot(true, wrong, "x", color="#d9622b", label="signal not corrected for noise")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="closed form, targets",
        ylabel="measured, targets",
        title="Linear regression, micro-batches of 1 to 14",
    )
    right.axhline(direct, color="#1d2327", linewidth=1.2, label="from every row's gradient")
    for (name, meter), colour in zip(meters.items(), ("#2a6fdb", "#d9622b"), strict=True):
        history = list(meter.measurements)
        scales = [smooth_noise_scale(history[:n], decay=1.0) for n in range(5, len(history) + 1)]
        xs = range(5, len(history) + 1)
        right.plot(
            xs, [s.target_tokens for s in scales], color=colour, label=f"micro-batches {name}"
        )
        highs = [min(s.high, 4 * direct) for s in scales]
        right.fill_between(
            xs, [s.low for s in scales], highs, color=colour, alpha=0.14, linewidth=0
        )
    right.set(
        ylim=(0, 2.2 * direct),
        xlabel="updates measured",
        ylabel="target tokens",
        title="Small Llama, weights held still",
    )
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    main()

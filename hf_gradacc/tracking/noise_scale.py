"""The gradient noise scale: how large an update is worth making it (arXiv 1812.06162).

Let the gradient of one target be a random vector with mean ``G`` and covariance ``Σ``. The mean
gradient of ``n`` targets then has noise ``tr Σ / n`` around a signal ``|G|²``, and the noise scale

    B = tr Σ / |G|²        in target tokens

is the size at which both are equal. Far below it, twice the targets in an update do almost twice
the good; far above it, almost none. An update of ``N`` targets needs ``1 + B / N`` times the
fewest possible updates and ``1 + N / B`` times the fewest possible targets to get equally far.

Accumulation gives the mean gradients ``g_i`` of micro-batches with ``n_i`` targets for free, and
``g = Σ (n_i / N) g_i`` of the update. Two micro-batches have nothing in common but ``G``, so
products of different ones have the expectation ``|G|²``, whatever their sizes, and whatever the
noise of each. All of them together are

    Σ_{i≠j} n_i n_j g_i · g_j  =  N² |g|² - Σ n_i² |g_i|²     with  N² - Σ n_i²  pairs of targets,

and their mean is unbiased, as is what then is left of ``|g|²``, the noise that the update had:

    |G|² ≈ (N² |g|² - Σ n_i² |g_i|²) / (N² - Σ n_i²)        tr Σ ≈ N (|g|² - |G|²)

Targets of one sequence resemble each other, and micro-batches hold whole sequences. What is
measured is thus the noise of targets *as they come in sequences*: that is the noise an update of
so many targets really has, into however many micro-batches it is cut, on however many ranks. It
needs micro-batches cut at random; sorted by length they differ in more than chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

__all__ = [
    "NoiseMeasurement",
    "NoiseScale",
    "Verdict",
    "judge_batch",
    "measure_from_sums",
    "measure_noise",
    "smooth_noise_scale",
]


@dataclass(frozen=True)
class NoiseMeasurement:
    """One update's unbiased estimates.

    Attributes:
        noise: ``tr Σ`` of one target, in squared gradient units.
        signal: ``|G|²``, likewise; chance can make either negative.
        num_targets: Targets of the update, all ranks.
        num_sequences: Sequences of the update, all ranks.
        num_pairs: Ordered pairs of targets from different micro-batches, which say the signal.
    """

    noise: float
    signal: float
    num_targets: int
    num_sequences: int
    num_pairs: int


@dataclass(frozen=True)
class NoiseScale:
    """The noise scale over several measurements.

    Attributes:
        target_tokens: ``B``; infinite where no signal rises above the noise yet.
        sequences: The same in sequences of mean length.
        low: Lower end of the confidence band, in target tokens; None with too few measurements.
        high: Upper end, infinite where the signal is not distinguishable from none.
        num_measurements: How many went in.
    """

    target_tokens: float
    sequences: float
    low: float | None
    high: float | None
    num_measurements: int

    @property
    def targets_per_sequence(self) -> float | None:
        """Return the target tokens of a sequence of mean length; None without a finite scale.

        By so much the scale may be too high. Where long rows have another gradient than short
        ones, an update that drew many targets differs from the rest in its signal too, and the
        noise of an update is what its own signal leaves. See the design note.
        """
        if not 0 < self.sequences < math.inf:
            return None
        return self.target_tokens / self.sequences


def measure_noise(
    squared_norms: Sequence[float],
    num_targets: Sequence[int],
    *,
    squared_norm_of_update: float,
    num_sequences: int,
) -> NoiseMeasurement:
    """Estimate noise and signal from one update's micro-batches; see the top of this file.

    Args:
        squared_norms: ``|g_i|²`` of each micro-batch's mean gradient.
        num_targets: ``n_i``, its targets.
        squared_norm_of_update: ``|g|²`` of the weighted mean.
        num_sequences: Sequences in the update.

    Raises:
        ValueError: With fewer than two micro-batches; one alone says nothing about noise.

    >>> measure_noise([7.0, 5.5], [1, 3], squared_norm_of_update=5.125, num_sequences=2)
    NoiseMeasurement(noise=3.5, signal=4.25, num_targets=4, num_sequences=2, num_pairs=6)
    """
    weighted = math.fsum(n * n * s for n, s in zip(num_targets, squared_norms, strict=True))
    return measure_from_sums(
        weighted,
        sum(n * n for n in num_targets),
        len(num_targets),
        squared_norm_of_update,
        sum(num_targets),
        num_sequences,
    )


def measure_from_sums(
    weighted_squares: float,
    squared_targets: int,
    num_micro_batches: int,
    squared_norm_of_update: float,
    num_targets: int,
    num_sequences: int,
) -> NoiseMeasurement:
    """Do what `measure_noise` does, from sums over ranks: ``Σ n_i² |g_i|²``, ``Σ n_i²``, ..."""
    if num_micro_batches < 2:
        raise ValueError(
            f"num_micro_batches = {num_micro_batches}: noise shows only between at least 2."
        )
    num_pairs = num_targets**2 - squared_targets
    signal = (num_targets**2 * squared_norm_of_update - weighted_squares) / num_pairs
    noise = num_targets * (squared_norm_of_update - signal)
    return NoiseMeasurement(noise, signal, num_targets, num_sequences, num_pairs)


def smooth_noise_scale(
    measurements: Sequence[NoiseMeasurement], *, decay: float = 0.95, confidence: float = 0.9
) -> NoiseScale:
    """Combine measurements, the newest weighing most, into a ratio of means with its band.

    The mean of ratios would be badly biased, since a small signal may come out near zero or
    negative. Means of noise and of signal are unbiased each; weights ``decay ** age`` that sum to
    one keep them so from the first measurement on. The signal's mean is over pairs of targets: an
    update that drew many targets drew rows that differ from the rest, so it must not count like
    one that drew few. The band is Fieller's: all ratios ``B`` for which ``noise - B · signal`` is
    compatible with zero. Where the signal is not distinguishable from zero it has no upper end,
    and says so instead of pretending.

    Args:
        measurements: Oldest first.
        decay: Weight of a measurement against the next newer one.
        confidence: Of the band.

    Raises:
        ValueError: Without any measurement.
    """
    if not measurements:
        raise ValueError("no measurement yet: a noise scale needs at least one.")
    raw = [decay**age for age in range(len(measurements) - 1, -1, -1)]
    weights = [weight / math.fsum(raw) for weight in raw]
    targets = _mean(weights, [m.num_targets for m in measurements])
    sequences = _mean(weights, [m.num_sequences for m in measurements])
    pairs = _mean(weights, [m.num_pairs for m in measurements])
    noise = _mean(weights, [m.noise for m in measurements])
    signal = _mean(weights, [m.num_pairs / pairs * m.signal for m in measurements])
    scale = max(noise, 0.0) / signal if signal > 0 else math.inf
    deviations = [
        (m.noise - noise, m.num_pairs / pairs * (m.signal - signal)) for m in measurements
    ]
    low, high = _fieller_band(deviations, weights, noise, signal, confidence)
    return NoiseScale(scale, scale * sequences / targets, low, high, len(measurements))


def _fieller_band(
    deviations: Sequence[tuple[float, float]],
    weights: Sequence[float],
    noise: float,
    signal: float,
    confidence: float,
) -> tuple[float | None, float | None]:
    squares = math.fsum(w * w for w in weights)
    freedom = 1 / squares - 1  # measurements that count in full, less one for the mean
    if freedom < 3:
        return None, None
    # Variances and covariance of the two weighted means.
    factor = 1 / (1 - squares)
    each = [(w * w, a, b) for w, (a, b) in zip(weights, deviations, strict=True)]
    var_noise = factor * math.fsum(w2 * a * a for w2, a, _ in each)
    var_signal = factor * math.fsum(w2 * b * b for w2, _, b in each)
    cov = factor * math.fsum(w2 * a * b for w2, a, b in each)
    t2 = _student_quantile(0.5 + confidence / 2, freedom) ** 2
    # (noise - B signal)² <= t² Var(noise - B signal), solved for B.
    a = signal**2 - t2 * var_signal
    b = noise * signal - t2 * cov
    c = noise**2 - t2 * var_noise
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0 and signal > 0:
        return max((b - root) / a, 0.0), max((b + root) / a, 0.0)
    # The signal is not distinguishable from none: there is only a smallest compatible B.
    low = (b - root) / a if a < 0 < c else 0.0
    return low, math.inf


def _student_quantile(probability: float, freedom: float) -> float:
    """Cornish-Fisher expansion of Student's quantile; within 1 % from 3 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _mean(weights: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(w * value for w, value in zip(weights, values, strict=True))


@dataclass(frozen=True)
class Verdict:
    """What a noise scale says about an update's size, as a word and as sentences."""

    word: Literal["too small", "right", "larger than useful", "unclear"]
    text: str


FAR = 4.0
"""Within this factor of the noise scale neither updates nor targets cost over 5 times the least."""


def judge_batch(scale: NoiseScale, *, tokens_per_update: float) -> Verdict:
    """Return whether an update is too small, right, or larger than useful.

    Too small means: even the band's lower end is more than four times the update, so that an
    update four times as large would still use its targets well. Larger than useful is the mirror
    image. The noise scale grows while a model learns; the verdict is on the measured stretch.

    >>> scale = NoiseScale(40_000, 400, low=30_000, high=60_000, num_measurements=20)
    >>> judge_batch(scale, tokens_per_update=4_000).word
    'too small'
    """
    if scale.low is None or scale.high is None:
        return Verdict(
            "unclear",
            f"The noise scale was measured in {scale.num_measurements} of the updates; a band "
            f"needs at least 5. Measure more often (noise_scale_every) or train longer.",
        )
    size = tokens_per_update
    band = f"{_tokens(scale.low)} to {_tokens(scale.high)} with 90 % confidence"
    if scale.targets_per_sequence is not None:
        band += f"; it may be a row, {_tokens(scale.targets_per_sequence)}, too high"
    head = (
        f"Updates held {_tokens(size)} target tokens; the gradient noise scale was "
        f"{_tokens(scale.target_tokens)} ({band})."
    )
    if math.isinf(scale.target_tokens) or scale.target_tokens == 0:
        costs = ""
    else:
        more_updates = 1 + scale.target_tokens / size
        more_targets = 1 + size / scale.target_tokens
        costs = (
            f" At this size training takes {more_updates:.3g} times the fewest possible updates "
            f"and {more_targets:.3g} times the fewest possible target tokens."
        )
    if size * FAR < scale.low:
        advice = f" Larger updates, up to about {_tokens(scale.low)} target tokens, would pay."
        return Verdict("too small", head + costs + advice)
    if size > scale.high * FAR:
        advice = f" Updates of about {_tokens(scale.high)} target tokens would get as far on less."
        return Verdict("larger than useful", head + costs + advice)
    if size * FAR < scale.target_tokens or math.isinf(scale.high):
        advice = " The band is too wide to call the batch too small: measure longer."
        return Verdict("unclear", head + costs + advice)
    return Verdict("right", head + costs)


def _tokens(count: float) -> str:
    return "no finite number of" if math.isinf(count) else f"{count:,.0f}"

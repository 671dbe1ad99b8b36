"""What looking at a run costs: logging with timing of phases, and the gradient noise scale.

    python benchmarks/overhead.py               # four minutes on one core

Everything is measured inside of one training run that switches from update to update, so that a
machine shared with others slows both sides alike; each pair of neighbours, in random order, gives
one ratio, and the median over pairs counts. Every update is logged, which no default run does.

1. Logging and timing, on against off. Off, the phases are not timed, our keys are not put into the
   log row, and the row goes neither to the run's file nor through our callbacks; what stays is
   the stock Trainer's own logging.
2. A measured update against one that is not, with rows all alike and with rows of uneven length,
   where the random cut that a measurement needs adds padding. Measured every n updates, a run pays
   1 / n of it.
3. The time our logging takes by itself, in microseconds, since a ratio depends on the model.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_gradacc import GradAccArguments, GradAccTrainer
from hf_gradacc.tracking.install import TrackingCallback
from hf_gradacc.tracking.phases import PhaseClock

NUM_PAIRS = int(sys.argv[1]) if len(sys.argv) > 1 else 150
WARM_UP = 6
ROWS, LENGTH = 16, 96  # all rows are alike: updates differ in what is measured alone


class NoClock(PhaseClock):
    """A clock that never looks."""

    def _change(self, phase: Any) -> None:
        return

    def take(self) -> dict[str, float]:
        return {}


class Switch(TrainerCallback):
    """Time each update from its begin to the next one's, under a setting drawn pair by pair."""

    def __init__(self, apply: Callable[[bool], None]) -> None:
        self.apply = apply
        self.draw = random.Random(0)
        self.pairs: list[tuple[float, float]] = []
        self.began = 0.0
        self.settings: list[bool] = []
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.settings:
            self.seconds.append(now - self.began)
        if not len(self.settings) % 2:
            self.settings.append(self.draw.random() < 0.5)
        else:
            self.settings.append(not self.settings[-1])
        self.apply(self.settings[-1])
        self.began = time.perf_counter()

    def ratios(self) -> list[float]:
        """Give on / off of each pair after the warm-up."""
        found = []
        for i in range(WARM_UP, len(self.seconds) - 1, 2):
            one, other = self.seconds[i], self.seconds[i + 1]
            found.append(one / other if self.settings[i] else other / one)
        return found


class EveryOther(Switch):
    """The same for a setting that the trainer itself switches on in each even update."""

    def __init__(self) -> None:
        super().__init__(lambda on: None)
        self.draw.random = lambda: 0.0  # type: ignore[method-assign]


def make_trainer(
    folder: str, *, lengths: Sequence[int] = (LENGTH,), **options: Any
) -> GradAccTrainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    )
    draw = random.Random(1)
    rows = []
    for _ in range(ROWS * 8):
        length = draw.choice(lengths)
        ids = [draw.randrange(512) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    arguments = GradAccArguments(
        output_dir=folder,
        effective_batch_size=ROWS,
        per_device_train_batch_size=4,
        max_steps=WARM_UP + 2 * NUM_PAIRS + 1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    return GradAccTrainer(model, arguments, train_dataset=rows, data_collator=pad)


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
        for key, fill in fills.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch | {"attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def quietly(trainer: GradAccTrainer) -> None:
    with contextlib.redirect_stdout(Path("/dev/null").open("w")):
        trainer.train()


def measure_logging() -> tuple[list[float], list[float]]:
    """Ratios on / off, and the seconds of an update without."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder)
        file = next(
            c for c in trainer.callback_handler.callbacks if isinstance(c, TrackingCallback)
        )
        ours, clock, own_log = type(trainer).log, None, file.on_log

        def apply(on: bool) -> None:
            nonlocal clock
            clock = clock or trainer._log_book.clock
            trainer._log_book.clock = clock if on else NoClock(torch.device("cpu"))
            trainer.log = (ours if on else Trainer.log).__get__(trainer)
            file.on_log = own_log if on else lambda *args, **kwargs: None

        switch = Switch(apply)
        trainer.add_callback(switch)
        quietly(trainer)
        after = zip(switch.seconds[WARM_UP:], switch.settings[WARM_UP:], strict=False)
        return switch.ratios(), [seconds for seconds, on in after if not on]


def measure_noise() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, noise_scale_every=1)

        def apply(on: bool) -> None:
            trainer._noise_listener.every = 1 if on else None

        switch = Switch(apply)
        trainer.add_callback(switch)
        quietly(trainer)
        return switch.ratios()


def measure_noise_with_padding() -> list[float]:
    """Rows of 16 to 176 tokens: a random cut, which the measurement needs, pads more."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, lengths=range(16, 177), noise_scale_every=2)
        switch = EveryOther()
        trainer.add_callback(switch)
        quietly(trainer)
        return switch.ratios()


def measure_parts() -> dict[str, float]:
    """Microseconds of a timed update's five marks, and of one log row of ours."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder)
        spent: list[float] = []
        ours = type(trainer).log

        def log(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            ours(trainer, *args, **kwargs)
            spent.append(time.perf_counter() - began)

        trainer.log = log
        trainer.args.max_steps = 30
        quietly(trainer)
    clock, began = PhaseClock(torch.device("cpu")), time.perf_counter()
    for _ in range(10_000):
        clock.enter("data")
        clock.enter("forward_backward")
        clock.enter("optimizer")
        clock.stop()
    marks = (time.perf_counter() - began) / 10_000
    return {
        "timing the phases of one update": marks * 1e6,
        "one log row, the stock Trainer's part and all callbacks included": statistics.median(spent)
        * 1e6,
    }


def describe(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    # Of a median over n pairs, by the normal approximation.
    error = 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5
    return f"{100 * (middle - 1):+.2f} % | ± {100 * error:.2f} % | {len(ratios)}"


def main() -> None:
    torch.set_num_threads(1)
    logging, seconds = measure_logging()
    noise = measure_noise()
    ragged = measure_noise_with_padding()
    print(f"An update takes {1e3 * statistics.median(seconds):.0f} ms.\n")
    print("| | slower by, median over pairs | standard error | pairs |\n|---|---|---|---|")
    print(f"| logging and timing, every update logged | {describe(logging)} |")
    print(f"| a measured update (noise scale every 1) | {describe(noise)} |")
    print(f"| the same, rows of 16 to 176 tokens | {describe(ragged)} |")
    for every in (10, 50):
        alike, uneven = (100 * (statistics.median(r) - 1) / every for r in (noise, ragged))
        print(f"| noise scale every {every} | {alike:+.2f} %, uneven rows {uneven:+.2f} % | | |")
    print("\n| by itself | µs |\n|---|---|")
    for what, micro in measure_parts().items():
        print(f"| {what} | {micro:.0f} |")


if __name__ == "__main__":
    main()

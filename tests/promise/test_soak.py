"""Many updates with failures of every kind thrown in: same result, memory flat.

SOAK_UPDATES sets how many; the default is for the test suite.
"""

import importlib
import os
import random
import resource
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.failing import POISON, Failure, Poisoned
from support.reference import float64_everywhere
from support.tiny import log_rows, make_trainer, ragged_rows, tiny_llama
from transformers import TrainerCallback, TrainerState

UPDATES = int(os.environ.get("SOAK_UPDATES", "120"))
ROWS = ragged_rows(4 * 97, seed=9, longest=6)
for _index in random.Random(2).sample(range(len(ROWS)), 5):
    ROWS[_index]["input_ids"][0] = POISON  # a loss of NaN in every pass over the data


def train(out, *, failures=None, callbacks=(), resume=False):
    model = tiny_llama(num_hidden_layers=1)
    if failures is not None:
        failures.hook(model)
    trainer = make_trainer(
        out,
        ROWS,
        model=model,
        trainer_class=Poisoned,
        callbacks=callbacks,
        effective_batch_size=4,
        max_tokens_per_micro_batch=12,
        max_steps=UPDATES,
        learning_rate=0.1,
        optim="sgd",
        logging_steps=50,
        on_non_finite="skip",
        max_grad_norm=1.0,
    )
    with float64_everywhere():
        trainer.train(resume_from_checkpoint=resume)
    return model, trainer


class Failures:
    """Runs out of memory now and then, in forward or backward."""

    def __init__(self):
        self.draw, self.next, self.count = random.Random(4), 10, 0

    def hook(self, model):
        self.failure = Failure(model, self._when)

    def _when(self, rows, width, seen):
        if seen < self.next:
            return False
        self.failure.where = self.draw.choice(["forward", "backward"])
        self.failure.seen = 0
        self.next = self.draw.randint(15, 60)
        self.count += 1
        return True


class Watch(TrainerCallback):
    """Notes the memory in use, and tells the process to stop half way."""

    def __init__(self, *, stop_at=None):
        self.stop_at, self.pages = stop_at, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0:
            self.pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        if state.global_step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_nothing_that_happens_on_the_way_changes_where_a_run_ends(tmp_path):
    calm, undisturbed = train(tmp_path / "calm")
    failures, watch = Failures(), Watch(stop_at=UPDATES // 2)
    with pytest.raises(SystemExit):
        train(tmp_path / "rough", failures=failures, callbacks=[watch])
    rough, disturbed = train(tmp_path / "rough", failures=failures, callbacks=[watch], resume=True)
    assert failures.count >= UPDATES // 40
    assert disturbed.state.global_step == UPDATES
    for weight, other in zip(calm.parameters(), rough.parameters(), strict=True):
        torch.testing.assert_close(other, weight, rtol=1e-9, atol=1e-12)
    skipped = log_rows(disturbed)[-1]["skipped_updates"]
    assert skipped == log_rows(undisturbed)[-1]["skipped_updates"] > 0
    assert (
        log_rows(disturbed)[-1]["target_tokens_seen"]
        == log_rows(undisturbed)[-1]["target_tokens_seen"]
    )
    assert len(watch.pages) == UPDATES // 10
    settled = watch.pages[len(watch.pages) // 2 :]
    grown = (max(settled) - settled[0]) * resource.getpagesize()
    assert grown < 16 * 2**20
    print(f"{UPDATES} updates, {failures.count} times out of memory, {skipped} skipped, {grown} B")


class Unlucky(random.Random):
    """Draws what lets a disk run full whenever it may."""

    def random(self):
        return 0.0


def test_the_disk_of_the_long_soak_is_full_on_the_way_and_not_at_the_end(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    trouble = importlib.import_module("soak").Trouble(
        Unlucky(0), Counter(), end=None, gone=tmp_path / "gone"
    )
    limits = []
    try:
        for done in (49, 99):
            trouble.on_step_begin(None, TrainerState(global_step=done, max_steps=100), None)
            limits.append(resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    assert limits == [9_000, resource.RLIM_INFINITY]

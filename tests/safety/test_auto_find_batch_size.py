"""Memory that runs out where no cut helps: the run goes on with smaller micro-batches, if asked."""

import pytest
from support.reference import float64_everywhere, relative_error
from support.tiny import log_rows, make_trainer, ragged_rows
from transformers import TrainerCallback

from hf_gradacc import GradAccTrainer, MemoryBudgetError

ROWS = ragged_rows(24, seed=7)
OPTIONS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "num_train_epochs": 2,
    "auto_find_batch_size": True,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
}


class RunsOut(TrainerCallback):
    """Runs out of memory once, at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def trained(out, step, **options):
    trainer = make_trainer(out, ROWS, callbacks=[RunsOut(step)], **OPTIONS | options)
    with float64_everywhere():
        trainer.train()
    return trainer


@pytest.mark.parametrize("step", [3, 5])
def test_the_run_goes_on_from_its_newest_checkpoint_with_the_same_updates(tmp_path, step):
    whole = trained(tmp_path / "whole", None)
    broken = trained(tmp_path / "broken", step)
    assert broken.state.global_step == whole.state.global_step == 6
    assert relative_error(broken.model.state_dict(), whole.model.state_dict()) <= 1e-9
    assert [r["effective_batch_size"] for r in log_rows(broken)] == [8] * 6
    # Three rows at most, where four were asked for.
    assert [r["micro_batches_per_update"] for r in log_rows(whole)] == [2] * 6
    assert log_rows(broken)[-1]["micro_batches_per_update"] == 3
    assert broken.state.train_batch_size == 3


def test_without_a_checkpoint_it_begins_again_and_says_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_gradacc.trainer.stopping.logger.warning", said.append)
    trainer = trained(tmp_path, 2, save_strategy="no")
    assert trainer.state.global_step == 6
    assert len(said) == 1
    assert "goes on from the beginning, with the weights as they are, with at most 3" in said[0]


def test_a_checkpoint_of_an_earlier_run_is_not_gone_on_from(tmp_path, monkeypatch):
    said = []
    trainer = make_trainer(tmp_path, ROWS, **OPTIONS)
    trainer.train()
    monkeypatch.setattr("hf_gradacc.trainer.stopping.logger.warning", said.append)
    trainer.add_callback(RunsOut(1))
    trainer.train()
    assert "goes on from the beginning" in said[0]


def test_an_error_that_no_smaller_batch_mends_is_raised_at_once(tmp_path):
    class Fails(GradAccTrainer):
        calls = 0

        def training_update(self, model, update):
            self.calls += 1
            raise MemoryBudgetError("row 3 does not fit: CUDA out of memory. Tried to allocate")

    trainer = make_trainer(tmp_path, ROWS, trainer_class=Fails, **OPTIONS)
    with pytest.raises(MemoryBudgetError, match="row 3 does not fit"):
        trainer.train()
    assert trainer.calls == 1


def test_it_ends_the_run_unless_asked(tmp_path):
    with pytest.raises(MemoryBudgetError, match="out of memory"):
        trained(tmp_path, 3, auto_find_batch_size=False)

"""SIGTERM and SIGINT end training after a whole, saved update; loader deaths are told clearly."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from support.ranks import run_ranks
from support.reference import float64_everywhere
from support.signalled import train_and_be_told_to_stop
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama
from transformers import TrainerCallback

from hf_gradacc import DataError
from hf_gradacc.safety import signals
from hf_gradacc.safety.run_state import keep
from hf_gradacc.tracking.run_files import LOG_NAME, read_log

ROWS = ragged_rows(24, seed=5)


@pytest.fixture
def clock(monkeypatch):
    """The clock by which signals are one request or two; a busy machine does not move it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Tell(TrainerCallback):
    """Sends this process a signal in the middle of an update, or several at times of a clock."""

    def __init__(self, number, *, step, times=1, pause=0.0, clock=None):
        self.number, self.step, self.times, self.pause = number, step, times, pause
        self.clock = clock or SimpleNamespace(now=0.0)

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                self.clock.now += self.pause
            self.step = None


def make(tmp_path, *callbacks, **options):
    settings = {"effective_batch_size": 6, "per_device_train_batch_size": 2, "seed": 3}
    model = options.pop("model", None) or tiny_llama()
    return model, make_trainer(
        tmp_path, ROWS, model=model, callbacks=callbacks, **settings | options
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_the_update_is_finished_and_saved(tmp_path, number, code, strategy):
    with float64_everywhere():
        recorder = Recorder()
        _, trainer = make(tmp_path, Tell(number, step=1), recorder, save_strategy=strategy)
        with pytest.raises(SystemExit) as caught:
            trainer.train()
        assert caught.value.code == code
        assert trainer.state.global_step == 2
        assert recorder.events.count("save") == 1
        assert recorder.events[-1] == "train_end"  # trackers have closed their files
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
        assert (
            signal.getsignal(number)
            == {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}[number]
        )
        # Going on from there ends where a run ends that nobody stopped.
        resumed, trainer = make(tmp_path, save_strategy="no")
        trainer.train(resume_from_checkpoint=True)
        whole, trainer = make(tmp_path, save_strategy="no")
        trainer.train()
    for (name, weight), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_closed_terminal_and_slurms_warning_save_too_unless_ignored(tmp_path, number, code):
    signal.signal(number, signal.SIG_DFL)  # whatever these tests were started by
    _, trainer = make(tmp_path, Tell(number, step=1), save_strategy="no")
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == code
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        _, trainer = make(tmp_path / "ignored", Tell(number, step=1), max_steps=3)
        trainer.train()
        assert trainer.state.global_step == 3
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.slow
def test_a_second_signal_acts_at_once(tmp_path, clock):
    _, trainer = make(tmp_path, Tell(signal.SIGINT, step=1, times=2, pause=1.1, clock=clock))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.slow
def test_the_same_signal_twice_within_moments_is_one_request(tmp_path, clock):
    """Ctrl-C reaches a rank from the terminal, and again from torchrun, which passes it on."""
    _, trainer = make(tmp_path, Tell(signal.SIGINT, step=1, times=2, pause=0.9, clock=clock))
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 130
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


# ---- between updates ---------------------------------------------------------------------------


class TellWhile(TrainerCallback):
    """Sends this process a signal at an event of the trainer, once."""

    def __init__(self, event, *, number=signal.SIGTERM, after=0):
        self.number, self.after, self.seen = number, after, 0
        setattr(self, f"on_{event}", self._tell)

    def _tell(self, args, state, control, **kwargs):
        self.seen += 1
        if self.seen == self.after + 1:
            os.kill(os.getpid(), self.number)


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}


def test_an_evaluation_is_broken_off_and_no_other_update_begins(tmp_path):
    tell = TellWhile("prediction_step", after=3)
    _, trainer = make(tmp_path, tell, eval_dataset=ROWS, save_strategy="no", **EVALUATING)
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143
    assert tell.seen == 4  # of twelve batches
    assert trainer.state.global_step == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not [row for row in trainer.state.log_history if "eval_loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tell", "options"),
    [
        (TellWhile("prediction_step", after=3), {}),
        (TellWhile("prediction_step", after=15), {}),
        (Tell(signal.SIGTERM, step=1), {}),
        (Tell(signal.SIGTERM, step=5), {"eval_strategy": "epoch", "max_steps": 6}),
    ],
    ids=["amid an epoch", "at its end", "due after the update", "due at the end of the run"],
)
def test_a_resumed_run_makes_up_for_the_evaluation(tmp_path, tell, options):
    defaults = {"eval_dataset": ROWS, "save_strategy": "no", "num_train_epochs": 2, **EVALUATING}
    options = defaults | options
    model = {"attention_dropout": 0.2}

    def rows(trainer):
        keys = ("step", "loss", "eval_loss", "grad_norm")
        return [tuple(row.get(key) for key in keys) for row in trainer.state.log_history[:-1]]

    with float64_everywhere():
        _, whole = make(tmp_path / "whole", **options, model=tiny_llama(**model))
        torch.manual_seed(1)
        whole.train()
        _, trainer = make(tmp_path / "rest", tell, **options, model=tiny_llama(**model))
        torch.manual_seed(1)
        with pytest.raises(SystemExit):
            trainer.train()
        _, rest = make(tmp_path / "rest", **options, model=tiny_llama(**model))
        rest.train(resume_from_checkpoint=True)
    assert rows(rest) == rows(whole)
    weights = zip(rest.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in weights)


def evaluations(tmp_path):
    rows = read_log(tmp_path / LOG_NAME)
    return [(row["step"], row["eval_loss"]) for row in rows if row["kind"] == "eval"]


@pytest.mark.slow
def test_an_evaluation_broken_off_twice_is_made_up_for_before_the_next_update(tmp_path):
    options = {"eval_dataset": ROWS, "save_strategy": "no", **EVALUATING}
    make(tmp_path / "whole", **options)[1].train()
    for _ in range(2):
        tell = TellWhile("prediction_step", after=3)
        _, trainer = make(tmp_path / "rest", tell, **options)
        with pytest.raises(SystemExit):
            trainer.train(resume_from_checkpoint="auto")
        assert [path.name for path in (tmp_path / "rest").glob("checkpoint-*")] == ["checkpoint-2"]
    make(tmp_path / "rest", **options)[1].train(resume_from_checkpoint=True)
    assert evaluations(tmp_path / "rest") == evaluations(tmp_path / "whole")


class DieAt(TrainerCallback):
    """Ends a run before an update, without a save."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_evaluation_made_up_for_twice_is_logged_once(tmp_path):
    options = {"eval_dataset": ROWS, "save_strategy": "no", **EVALUATING}
    make(tmp_path / "whole", **options)[1].train()
    for callback, end in [
        (Tell(signal.SIGTERM, step=1), SystemExit),
        (DieAt(2), KeyboardInterrupt),
    ]:
        _, trainer = make(tmp_path / "rest", callback, **options)
        with pytest.raises(end):
            trainer.train(resume_from_checkpoint="auto")
    assert [step for step, _ in evaluations(tmp_path / "rest")] == [2]
    make(tmp_path / "rest", **options)[1].train(resume_from_checkpoint=True)
    assert evaluations(tmp_path / "rest") == evaluations(tmp_path / "whole")


@pytest.mark.slow
def test_an_evaluation_broken_off_is_nobodys_best(tmp_path):
    options = {
        "save_strategy": "best",
        "metric_for_best_model": "eval_loss",
        "load_best_model_at_end": True,
    }
    tell = TellWhile("prediction_step", after=14)  # the second evaluation
    _, trainer = make(tmp_path, tell, eval_dataset=ROWS, **EVALUATING | options)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_global_step == 2
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_a_save_is_finished_and_no_other_update_begins(tmp_path):
    tell = TellWhile("save")
    recorder = Recorder()
    _, trainer = make(tmp_path, tell, recorder, save_strategy="steps", save_steps=2)
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143
    assert trainer.state.global_step == 2
    assert recorder.events.count("save") == 1
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
def test_before_the_first_update_it_still_leaves_a_checkpoint(tmp_path):
    _, trainer = make(tmp_path, TellWhile("train_begin"), save_strategy="no")
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.slow
def test_after_the_last_update_the_model_is_saved_before_the_exit(tmp_path):
    _, trainer = make(tmp_path, TellWhile("train_end"), save_strategy="no")
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143
    assert trainer.state.global_step == 4
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.slow
def test_a_handler_of_the_users_own_stays_in_charge(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        _, trainer = make(tmp_path, Tell(signal.SIGTERM, step=1))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert trainer.state.global_step == 4


@pytest.mark.slow
def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    _, trainer = make(tmp_path)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 4


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_place_whoever_was_told(tmp_path):
    events = {"step_begin": 1, "prediction_step": 3}
    first, second = run_ranks(
        train_and_be_told_to_stop, 2, out=str(tmp_path), told_rank=1, events=events
    )
    in_update = {"code": 143, "steps": 2, "saved": ["checkpoint-2"], "evaluated": False}
    in_evaluation = {"code": 143, "steps": 3, "saved": ["checkpoint-3"], "evaluated": False}
    assert first == second == {"step_begin": in_update, "prediction_step": in_evaluation}


@pytest.mark.slow
def test_loader_workers_that_get_the_signal_too_do_not_end_the_update(tmp_path):
    class TellAll(Tell):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                self.step = None
                children = multiprocessing.active_children()
                # From outside, as a scheduler does: from its parent a worker takes it calmly.
                everybody = [os.getpid(), *(child.pid for child in children)]
                subprocess.run(["kill", "-TERM", *map(str, everybody)], check=True)
                time.sleep(0.5)  # not join(), which would take torch's notice of the death away

    _, trainer = make(tmp_path, TellAll(signal.SIGTERM, step=1), dataloader_num_workers=1)
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2").is_dir()


class Fragile(list):
    """Rows of which one kills the process that reads it."""

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.slow
def test_a_loader_worker_that_dies_is_a_clear_error(tmp_path):
    rows = Fragile(ROWS)
    trainer = make_trainer(
        tmp_path,
        rows,
        data_collator=pad,
        effective_batch_size=6,
        per_device_train_batch_size=2,
        dataloader_num_workers=1,
        train_sampling_strategy="sequential",
    )
    trainer._training_data.collate_sample = lambda trainer, rows: pad(ROWS[:3])
    with pytest.raises(
        DataError, match=r"(?s)loader worker died at update \d+.*dataloader_num_workers"
    ):
        _without_reading(trainer, rows)


@pytest.mark.slow
def test_a_loader_worker_that_hangs_up_while_handing_over_is_the_same_error(tmp_path):
    """Its socket closes a moment before the system calls it dead, so torch thinks it lives."""

    def hang_up(*args):
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    _, trainer = make(tmp_path, dataloader_num_workers=1)
    loader = trainer.get_batch_samples
    trainer.get_batch_samples = lambda iterator, *rest: loader(hang_up(iterator), *rest)
    with pytest.raises(DataError, match=r"loader worker died at update 1: .*reset by peer"):
        trainer.train()


def _without_reading(trainer, rows):
    """Train, where the main process must not read the row that kills."""
    import hf_gradacc.trainer.data as data

    choose = data.choose_probe_rows
    data.choose_probe_rows = lambda *args, **kwargs: ROWS[:3]
    try:
        trainer.train()
    finally:
        data.choose_probe_rows = choose


@pytest.mark.slow
def test_a_run_that_a_signal_ends_does_not_say_that_its_model_is_saved(tmp_path):
    """The process exits before a recipe saves one: what is left is the checkpoint."""
    from hf_gradacc.tracking.terminal import next_steps

    class Recipe(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            keep(state, saves_model=True)

    _, trainer = make(tmp_path, Recipe(), Tell(signal.SIGINT, step=1), save_strategy="no")
    with pytest.raises(SystemExit):
        trainer.train()
    told = dict(next_steps(trainer.args, trainer.state))
    assert "model" not in told
    assert told["checkpoint"].endswith("checkpoint-2")

"""Callbacks: which there are, in what order they are called, what they may change and keep."""

from unittest.mock import patch

import pytest
from support.line import fit_line, logged
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import DEFAULT_CALLBACKS, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

EVENTS = [
    name
    for name in dir(TrainerCallback)
    if name.startswith("on_") and name not in ("on_push_begin", "on_save_begin")
]


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []


for _name in EVENTS:

    def _note(self, args, state, control, _name=_name, **kwargs):
        self.seen.append(_name.removeprefix("on_"))

    setattr(Events, _name, _note)


class Keeps(TrainerCallback, ExportableState):
    def __init__(self, value="default"):
        self.value = value

    def state(self):
        return {"args": {"value": self.value}, "attributes": {}}


def names(trainer):
    return sorted(type(callback).__name__ for callback in trainer.callback_handler.callbacks)


def find(trainer, cls):
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, cls)]


def expected_names(*classes):
    return sorted(cls.__name__ for cls in [*DEFAULT_CALLBACKS, *classes])


def expected_events(args, *, steps_per_epoch=8, epochs=3, eval_batches=8):
    """The events of a run, from what the documentation of the arguments says."""
    evaluation = ["prediction_step"] * eval_batches + ["log", "evaluate"]
    last = epochs * steps_per_epoch
    events = ["init_end", "train_begin"]
    step = 0
    for _ in range(epochs):
        events.append("epoch_begin")
        for _ in range(steps_per_epoch):
            step += 1
            events += ["step_begin", "pre_optimizer_step", "optimizer_step", "step_end"]
            if step % args.logging_steps == 0:
                events.append("log")
            if args.eval_strategy == "steps" and (step % args.eval_steps == 0 or step == last):
                events += evaluation
            if step % args.save_steps == 0 or step == last:
                events.append("save")
        events.append("epoch_end")
        if args.eval_strategy == "epoch":
            events += evaluation
    return [*events, "log", "train_end"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logging_steps": 5},
        {"save_steps": 5},
        {"eval_strategy": "steps", "eval_steps": 5},
        {"eval_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 5, "logging_steps": 3, "save_steps": 10},
    ],
    ids=str,
)
def test_events_come_in_order(kind, tmp_path, options):
    trainer = fit_line(kind, tmp_path, callbacks=[Events], **options)
    trainer.train()
    (events,) = find(trainer, Events)
    assert events.seen == expected_events(trainer.args)


def test_there_is_one_substep_end_less_than_micro_batches(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, callbacks=[Events], per_device_train_batch_size=2,
        gradient_accumulation_steps=4, max_steps=2,
    )  # fmt: skip
    trainer.train()
    (events,) = find(trainer, Events)
    assert events.seen.count("substep_end") == 2 * 3


def test_the_default_callbacks_are_there(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, disable_tqdm=False)
    assert names(trainer) == expected_names(ProgressCallback)


def test_a_printer_replaces_the_bar(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, disable_tqdm=True)
    assert len(find(trainer, PrinterCallback)) == 1
    assert not find(trainer, ProgressCallback)


def test_callbacks_are_added_by_class_or_instance(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, callbacks=[Events])
    count = len(trainer.callback_handler.callbacks)
    own = Keeps()
    trainer.add_callback(own)
    assert len(trainer.callback_handler.callbacks) == count + 1
    assert own in trainer.callback_handler.callbacks
    assert len(find(trainer, Events)) == 1


def test_callbacks_are_removed_by_class_or_instance(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, callbacks=[Events])
    (own,) = find(trainer, Events)
    trainer.remove_callback(own)
    assert not find(trainer, Events)
    flow = find(trainer, DefaultFlowCallback)
    assert trainer.pop_callback(DefaultFlowCallback) is flow[0]
    assert not find(trainer, DefaultFlowCallback)
    assert trainer.pop_callback(DefaultFlowCallback) is None


def test_a_second_callback_of_a_class_is_warned_about(kind, tmp_path):
    with patch("transformers.trainer_callback.logger.warning") as warning:
        fit_line(kind, tmp_path, callbacks=[Events, Events])
    assert any("Events" in str(call) for call in warning.call_args_list)


def test_callbacks_are_given_model_optimizer_and_loaders(kind, tmp_path):
    class Looks(TrainerCallback):
        seen = {}

        def on_step_end(self, args, state, control, **kwargs):
            self.seen = kwargs

    trainer = fit_line(kind, tmp_path, callbacks=[Looks], max_steps=1)
    trainer.train()
    seen = find(trainer, Looks)[0].seen
    assert seen["model"] is trainer.model
    assert seen["optimizer"] is trainer.optimizer
    assert seen["lr_scheduler"] is trainer.lr_scheduler
    assert len(seen["train_dataloader"]) == 8
    assert "processing_class" in seen


def test_saving_by_epoch_saves_once(kind, tmp_path):
    class Counts(TrainerCallback):
        saves = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.saves += control.should_save

        on_epoch_end = on_step_end

    trainer = fit_line(kind, tmp_path, callbacks=[Counts], max_steps=2, save_strategy="epoch")
    trainer.train()
    assert find(trainer, Counts)[0].saves == 1


def test_a_callback_stops_the_run(kind, tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True
            return control

    trainer = fit_line(kind, tmp_path, callbacks=[Stops], max_steps=10)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_callback_ends_an_epoch(kind, tmp_path):
    class EndsEpochs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step % 3 == 0

    trainer = fit_line(kind, tmp_path, callbacks=[EndsEpochs], num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_callback_asks_for_a_log_row_an_evaluation_and_a_save(kind, tmp_path):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                control.should_log = control.should_evaluate = control.should_save = True

    trainer = fit_line(kind, tmp_path, callbacks=[Asks], max_steps=3, save_strategy="no")
    trainer.train()
    assert len(logged(trainer, "loss")) == len(logged(trainer, "eval_loss")) == 1
    assert (tmp_path / "checkpoint-2").is_dir()


def test_callbacks_see_the_flags_of_each_step(kind, tmp_path):
    class Sees(TrainerCallback):
        flags = ()

        def on_step_end(self, args, state, control, **kwargs):
            self.flags += ((control.should_log, control.should_save, control.should_evaluate),)

    trainer = fit_line(kind, tmp_path, max_steps=2, logging_steps=2, save_strategy="no")
    trainer.add_callback(Sees)
    trainer.train()
    assert find(trainer, Sees)[0].flags == ((False, False, False), (True, False, False))


BEST = {
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 2,
    "eval_steps": 2,
    "max_steps": 2,
}


def resumed(kind, out, callbacks, **options):
    trainer = fit_line(
        kind, out, callbacks=callbacks, restore_callback_states_from_checkpoint=True,
        **BEST | options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    return trainer


def test_early_stopping_keeps_its_settings_over_a_resume(kind, tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=5, early_stopping_threshold=0.2)
    fit_line(kind, tmp_path, callbacks=[Events(), stopping], **BEST).train()
    trainer = resumed(kind, tmp_path, [EarlyStoppingCallback(), Events()])
    (restored,) = find(trainer, EarlyStoppingCallback)
    assert restored.early_stopping_patience == 5
    assert restored.early_stopping_threshold == 0.2


def test_two_callbacks_of_a_class_each_keep_their_state(kind, tmp_path):
    fit_line(kind, tmp_path, callbacks=[Keeps("first"), Keeps("second")], **BEST).train()
    trainer = resumed(kind, tmp_path, [Keeps(), Keeps()])
    assert [c.value for c in find(trainer, Keeps)] == ["first", "second"]


def test_a_callback_missing_on_resume_is_warned_about(kind, tmp_path):
    fit_line(kind, tmp_path, callbacks=[EarlyStoppingCallback()], **BEST).train()
    with patch("transformers.trainer.logger.warning") as warning:
        resumed(kind, tmp_path, [], load_best_model_at_end=False)
    assert any("EarlyStoppingCallback" in str(call) for call in warning.call_args_list)


def test_the_control_is_restored(kind, tmp_path):
    fit_line(kind, tmp_path, **{**BEST, "load_best_model_at_end": False}).train()
    trainer = fit_line(kind, tmp_path, restore_callback_states_from_checkpoint=True)
    state = tmp_path / "checkpoint-2" / TRAINER_STATE_NAME
    trainer.state = TrainerState.load_from_json(str(state))
    trainer._load_callback_state()
    assert trainer.control.should_training_stop


@pytest.mark.parametrize(("patience", "steps"), [(1, 16), (2, 24)])
def test_early_stopping_ends_a_run_that_gets_worse(kind, tmp_path, patience, steps):
    worse = iter([0.9, 0.5, 0.4, 0.3, 0.2])

    def compute_metrics(prediction):
        return {"accuracy": next(worse)}

    trainer = fit_line(
        kind,
        tmp_path,
        num_train_epochs=5,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        compute_metrics=compute_metrics,
        callbacks=[EarlyStoppingCallback(patience, 0.0001)],
    )
    trainer.train()
    assert trainer.state.global_step == steps


def test_early_stopping_needs_a_metric(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, eval_strategy="epoch", callbacks=[EarlyStoppingCallback(1)])
    with pytest.raises(AssertionError):
        trainer.train()


def test_on_push_begin_can_be_called(kind, tmp_path):
    class Pushes(TrainerCallback):
        pushed = 0

        def on_push_begin(self, args, state, control, **kwargs):
            self.pushed += 1

    trainer = fit_line(kind, tmp_path, callbacks=[Pushes], max_steps=1)
    trainer.train()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert find(trainer, Pushes)[0].pushed == 1

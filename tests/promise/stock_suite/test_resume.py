"""Checkpoints: what is written, and that a resumed run is the run that was never broken off."""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch
from support.line import LineConfig, LineStream, NoisyLine, fit_line, fitted
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint

FILES = {
    "model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state.pth",
}
SAVES = {"save_steps": 5, "learning_rate": 0.1, "train": 56, "logging_steps": 5}
CLOCKS = ("train_runtime", "eval_runtime", "train_loss", "hours_left")


def state_of(trainer):
    """The state without what a clock measured or one call of ``train`` counts."""
    state = dataclasses.asdict(trainer.state)
    state["log_history"] = [
        {key: value for key, value in row.items() if key not in CLOCKS and "second" not in key}
        for row in state["log_history"]
    ]
    return state


def without_times(state):
    """The state as stock keeps it: callbacks of ours keep wall times, which differ."""
    return {key: value for key, value in state.items() if key != "stateful_callbacks"}


def resume_equals_whole(kind, out, checkpoint, **options):
    whole = fit_line(kind, out, **options)
    whole.train()
    resumed = fit_line(kind, out, **options)
    resumed.train(resume_from_checkpoint=str(out / checkpoint))
    assert fitted(resumed) == fitted(whole)
    assert without_times(state_of(resumed)) == without_times(state_of(whole))
    return whole, resumed


@pytest.mark.parametrize("model", ["transformers", "plain"])
def test_checkpoints_hold_everything(kind, tmp_path, model):
    fit_line(kind, tmp_path, model=model, save_steps=5).train()
    for step in (5, 10, 15, 20, 24):
        files = {path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert files >= FILES
        assert ("config.json" in files) == (model == "transformers")


def test_checkpoints_hold_nothing_else(kind, tmp_path):
    fit_line(kind, tmp_path, max_steps=1).train()
    assert {path.name for path in (tmp_path / "checkpoint-1").iterdir()} == FILES | {"config.json"}


def test_the_output_folder_holds_checkpoints_only(kind, tmp_path):
    fit_line(kind, tmp_path, save_steps=8).train()
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (8, 16, 24)}


@pytest.mark.parametrize("model", ["transformers", "plain"])
@pytest.mark.parametrize("step", [5, 15])
def test_a_resumed_run_ends_as_the_whole_one(kind, tmp_path, model, step):
    resume_equals_whole(kind, tmp_path, f"checkpoint-{step}", model=model, **SAVES)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5},
        {"save_strategy": "epoch", "logging_steps": 7},
        {"eval_strategy": "steps", "eval_steps": 3},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"dataloader_num_workers": 1},
        {"max_steps": 20},
    ],
    ids=str,
)
def test_a_resumed_run_ends_as_the_whole_one_whatever_the_settings(kind, tmp_path, options):
    step = 14 if "save_strategy" in options else 5
    resume_equals_whole(kind, tmp_path, f"checkpoint-{step}", **SAVES | options)


def test_a_resumed_stream_ends_as_the_whole_one(kind, tmp_path):
    options = {**SAVES, "train": LineStream(200), "max_steps": 12}
    resume_equals_whole(kind, tmp_path, "checkpoint-5", **options)


def test_random_numbers_go_on_where_they_were(kind, tmp_path):
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-5")):
        trainer = fit_line(kind, tmp_path, model=NoisyLine(LineConfig()), max_steps=8, **SAVES)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(fitted(trainer))
    assert ends[0] == ends[1]


def test_frozen_parameters_stay_frozen(kind, tmp_path):
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-5")):
        trainer = fit_line(kind, tmp_path, a=1.5, **SAVES)
        trainer.model.a.requires_grad_(False)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert not trainer.model.a.requires_grad
        ends.append(fitted(trainer))
    assert ends[0] == ends[1]


def test_false_starts_from_the_beginning(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, **SAVES)
    trainer.train(resume_from_checkpoint=False)
    assert trainer.state.global_step == 21


def test_true_resumes_from_the_newest(kind, tmp_path):
    fit_line(kind, tmp_path, max_steps=10, **SAVES).train()
    trainer = fit_line(kind, tmp_path, max_steps=12, **SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-12")


def test_two_runs_end_in_the_same_state(kind, tmp_path):
    states = []
    for name in ("one", "two"):
        trainer = fit_line(kind, tmp_path / name, train=64, max_steps=3, save_steps=2)
        trainer.train()
        states.append(state_of(trainer))
    assert states[0] == states[1]


def test_a_folder_that_is_not_there_is_refused(kind, tmp_path):
    trainer = fit_line(kind, tmp_path)
    with pytest.raises(Exception, match="bogus"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-bogus"))
    with pytest.raises(ValueError, match=r"(?i)no (valid|whole) checkpoint found in output"):
        trainer.train(resume_from_checkpoint=True)


def into_shards(checkpoint):
    """Write a checkpoint's weights into one file each, as a large model's are."""
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    files = {}
    for i, (name, value) in enumerate(sorted(weights.items()), start=1):
        files[name] = f"model-{i:05d}-of-{len(weights):05d}.safetensors"
        safetensors.torch.save_file({name: value}, checkpoint / files[name], {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("model", ["transformers", "plain"])
def test_weights_cut_into_shards_afterwards_resume(kind, tmp_path, model):
    whole = fit_line(kind, tmp_path, model=model, **SAVES)
    whole.train()
    into_shards(tmp_path / "checkpoint-5")
    resumed = fit_line(kind, tmp_path, model=model, **SAVES)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert fitted(resumed) == fitted(whole)


def test_weights_changed_afterwards_are_taken(kind, tmp_path):
    fit_line(kind, tmp_path, max_steps=5, **SAVES).train()
    file = tmp_path / "checkpoint-5" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["a"] += 1
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    trainer = fit_line(kind, tmp_path, max_steps=5, **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.model.a.item() == weights["a"].item()


@pytest.mark.parametrize(
    "missing", [("optimizer.pt",), ("optimizer.pt", "scheduler.pt"), ("rng_state.pth",)], ids=str
)
def test_states_taken_away_start_anew(kind, tmp_path, missing):
    fit_line(kind, tmp_path, max_steps=5, **SAVES).train()
    for name in missing:
        (tmp_path / "checkpoint-5" / name).unlink()
    trainer = fit_line(kind, tmp_path, max_steps=8, **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 8


def test_a_checkpoint_may_be_copied_and_renamed(kind, tmp_path):
    whole = fit_line(kind, tmp_path, **SAVES)
    whole.train()
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "elsewhere")
    resumed = fit_line(kind, tmp_path / "new", **SAVES)
    resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert fitted(resumed) == fitted(whole)


def test_a_checkpoint_of_weights_only_resumes_with_a_new_optimizer(kind, tmp_path):
    fit_line(kind, tmp_path, max_steps=5, save_only_model=True, **SAVES).train()
    files = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert not files & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    trainer = fit_line(kind, tmp_path, max_steps=8, **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 8


def test_a_checkpoint_of_the_stock_trainer_resumes(kind, tmp_path):
    fit_line(Trainer, tmp_path, max_steps=5, **SAVES).train()
    trainer = fit_line(kind, tmp_path, max_steps=8, **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 8


def test_a_checkpoint_resumes_in_the_stock_trainer(kind, tmp_path):
    fit_line(kind, tmp_path, max_steps=5, **SAVES).train()
    trainer = fit_line(Trainer, tmp_path, max_steps=8, **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 8


def test_another_batch_size_is_taken_on_resume(kind, tmp_path):
    options = {"max_steps": 2, "save_steps": 1}
    fit_line(kind, tmp_path, per_device_train_batch_size=2, **options).train()
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-1" / "trainer_state.json"))
    assert state.train_batch_size == 2
    trainer = fit_line(kind, tmp_path, per_device_train_batch_size=4, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer._train_batch_size == 4


def test_the_same_update_may_be_cut_otherwise_on_resume(kind, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.1}
    cuts = [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ]
    fit_line(kind, tmp_path, **options, **cuts[0]).train()
    trainer = fit_line(kind, tmp_path, **options, **cuts[1])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_other_rows_are_taken_on_resume(kind, tmp_path):
    options = {"save_steps": 5, "learning_rate": 0.1}
    fit_line(kind, tmp_path, train=128, max_steps=5, **options).train()
    trainer = fit_line(kind, tmp_path, train=64, max_steps=8, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("skip", [False, True])
def test_data_may_start_anew(kind, tmp_path, skip):
    fit_line(kind, tmp_path, max_steps=5, **SAVES).train()
    trainer = fit_line(kind, tmp_path, max_steps=8, ignore_data_skip=skip, **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 8


def test_changed_arguments_are_told(kind, tmp_path, caplog):
    fit_line(kind, tmp_path, max_steps=5, eval_steps=5, **SAVES).train()
    trainer = fit_line(kind, tmp_path, max_steps=8, eval_steps=10, **{**SAVES, "save_steps": 10})
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("transformers.trainer_utils.logger.warning_once", said.append, raising=False)
        patch.setattr("transformers.trainer_utils.logger.warning", said.append)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    text = "\n".join(map(str, said))
    assert "save_steps: 10 (from args) != 5 (from trainer_state.json)" in text
    assert "eval_steps: 10 (from args) != 5 (from trainer_state.json)" in text


class Order(nn.Module):
    """Keeps, in a buffer that grows, which rows it has seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(0))

    def load_state_dict(self, state_dict, strict=True):
        self.seen = state_dict["seen"].clone()
        return super().load_state_dict(state_dict, strict=strict)

    def forward(self, input_x, labels=None):
        self.seen = torch.cat([self.seen, input_x.detach()])
        y = self.fc(input_x[:, None])[:, 0]
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def test_rows_come_in_the_same_order_after_a_resume(kind, tmp_path):
    options = {
        "train": 10,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    fit_line(kind, tmp_path / "whole", model=Order(), **options).train()
    resumed = fit_line(kind, tmp_path / "resumed", model=Order(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    seen = [
        safetensors.torch.load_file(tmp_path / name / "checkpoint-15" / "model.safetensors")["seen"]
        for name in ("whole", "resumed")
    ]
    assert seen[0].tolist() == seen[1].tolist()
    assert len(seen[0]) == 30


def test_an_interrupted_run_is_finished_from_its_last_checkpoint(kind, tmp_path):
    options = {"train": 100, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
               "save_steps": 1, "num_train_epochs": 1}  # fmt: skip
    fit_line(kind, tmp_path / "first", max_steps=2, **options).train()
    trainer = fit_line(kind, tmp_path / "second", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert trainer.state.global_step == 17
    assert (tmp_path / "second" / "checkpoint-17" / "model.safetensors").is_file()


def test_a_smaller_batch_is_searched_for_when_memory_runs_out(kind, tmp_path):
    from transformers import TrainerCallback

    class OutOfMemory(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.train_batch_size >= 16:
                raise RuntimeError("CUDA out of memory.")

    options = {
        "per_device_train_batch_size": 16,
        "auto_find_batch_size": True,
        "max_steps": 2,
        "save_steps": 1,
    }
    trainer = fit_line(kind, tmp_path, train=128, callbacks=[OutOfMemory()], **options)
    trainer.train()
    found = trainer._train_batch_size
    assert found < 16
    trainer = fit_line(kind, tmp_path, train=128, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._train_batch_size == found


def test_two_adapters_resume(kind, tmp_path):
    from peft import LoraConfig, get_peft_model

    from .test_training import equal_rows, tiny_gpt2

    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = get_peft_model(tiny_gpt2(), config, "one")
        model.add_adapter("two", config)
        trainer = fit_line(
            kind, tmp_path, model=model, train=equal_rows(), max_steps=4, save_steps=2,
            learning_rate=0.1, label_names=["labels"],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append({n: p.detach().clone() for n, p in model.named_parameters() if "one" in n})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

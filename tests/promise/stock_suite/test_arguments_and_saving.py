"""Arguments are left as they were; models, tokenizers and processors are saved beside them."""

import signal

import pytest
import torch
from support.line import QUIET, LineConfig, LineModel, LineRows, fit_line, fitted
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    default_data_collator,
)

from .test_training import equal_rows, tiny_gpt2


def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefg"]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_arguments_are_left_as_they_were(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, gradient_accumulation_steps=2, num_train_epochs=1)
    trainer.train()
    before = TrainingArguments(
        str(tmp_path), **QUIET, gradient_accumulation_steps=2, num_train_epochs=1
    ).to_dict()
    after = trainer.args.to_dict()
    assert {key: after[key] for key in before} == before


def test_the_object_of_arguments_is_the_one_passed_in(kind, tmp_path):
    arguments = TrainingArguments(str(tmp_path), **QUIET)
    assert kind(LineModel(LineConfig()), arguments).args is arguments


def test_arguments_may_be_left_out(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = kind(LineModel(LineConfig()))
    assert isinstance(trainer.args, TrainingArguments)
    assert trainer.args.output_dir


def test_saved_arguments_are_read_again(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, learning_rate=0.25)
    trainer.save_model(str(tmp_path / "out"))
    loaded = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert isinstance(loaded, TrainingArguments)
    assert loaded.learning_rate == 0.25


@pytest.mark.parametrize("model", ["transformers", "plain"])
def test_a_model_is_saved_and_read_again(kind, tmp_path, model):
    trainer = fit_line(kind, tmp_path, model=model, a=1.5, b=2.5)
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    if model == "transformers":
        again = LineModel.from_pretrained(tmp_path / "out")
        assert (again.a.item(), again.b.item()) == (1.5, 2.5)


def test_a_tokenizer_is_saved_with_the_model(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, processing_class=tokenizer())
    trainer.save_model()
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a b c").input_ids == tokenizer()("a b c").input_ids


def test_a_feature_extractor_is_saved_with_the_model(kind, tmp_path):
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    trainer = fit_line(kind, tmp_path, processing_class=extractor)
    trainer.save_model()
    again = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert again.to_dict() == extractor.to_dict()


def test_the_collators_tokenizer_is_saved_with_each_checkpoint(kind, tmp_path):
    class Collator:
        def __init__(self):
            self.tokenizer = tokenizer()
            self.tokenizer.add_tokens(["<new>"])

        def __call__(self, rows):
            return default_data_collator(rows)

    collator = Collator()
    fit_line(kind, tmp_path, data_collator=collator, max_steps=1).train()
    again = AutoTokenizer.from_pretrained(tmp_path / "checkpoint-1")
    assert len(again) == len(collator.tokenizer)


def test_special_tokens_of_the_tokenizer_become_the_models(kind, tmp_path):
    model = tiny_gpt2()
    assert model.config.pad_token_id is None
    trainer = fit_line(
        kind, tmp_path, model=model, train=equal_rows(), processing_class=tokenizer(),
        data_collator=default_data_collator, max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert model.config.pad_token_id == 0
    assert model.config.bos_token_id == 1
    assert model.config.eos_token_id == 2


def test_a_model_of_several_inputs_names_its_labels(kind, tmp_path):
    assert fit_line(kind, tmp_path).label_names == ["labels"]
    assert fit_line(kind, tmp_path, label_names=["labels", "labels_2"]).label_names == [
        "labels",
        "labels_2",
    ]


def test_smoothing_is_switched_off_for_several_labels(kind, tmp_path):
    model = LineModel(LineConfig())
    model.config.problem_type = "multi_label_classification"
    with pytest.warns(UserWarning, match="not compatible with multi-label"):
        trainer = fit_line(kind, tmp_path, model=model, label_smoothing_factor=0.1)
    assert trainer.label_smoother is None


def test_processes_are_told_apart(kind, tmp_path):
    trainer = fit_line(kind, tmp_path)
    assert trainer.is_world_process_zero()
    assert trainer.is_local_process_zero()


def test_jit_checkpoints_are_listened_for(kind, tmp_path):
    from transformers.trainer_jit_checkpoint import JITCheckpointCallback

    before = signal.getsignal(signal.SIGTERM)
    try:
        trainer = fit_line(kind, tmp_path, enable_jit_checkpoint=True, max_steps=1)
        found = [
            callback
            for callback in trainer.callback_handler.callbacks
            if isinstance(callback, JITCheckpointCallback)
        ]
        assert len(found) == 1
        assert found[0].trainer is trainer
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_jit_checkpoint_is_written_and_the_run_stops(kind, tmp_path):
    from transformers import TrainerCallback

    class Asks(TrainerCallback):
        """What the timer does some seconds after a signal."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                manager()._enable_checkpoint()

    def manager():
        return next(
            callback.jit_manager
            for callback in trainer.callback_handler.callbacks
            if hasattr(callback, "jit_manager")
        )

    before = signal.getsignal(signal.SIGTERM)
    try:
        trainer = fit_line(
            kind, tmp_path, enable_jit_checkpoint=True, callbacks=[Asks()], save_strategy="no",
            max_steps=9,
        )  # fmt: skip
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    (step,) = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert int(step.rpartition("-")[2]) in (2, 3)
    assert trainer.state.global_step <= 3
    again = fit_line(kind, tmp_path, max_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / step))
    assert again.state.global_step == 5


def test_weights_survive_an_evaluation_only_trainer(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, train=None, a=1.5, b=2.5)
    trainer.evaluate()
    trainer.predict(LineRows(4))
    assert fitted(trainer) == (1.5, 2.5)


def test_an_evaluation_only_trainer_says_nothing_of_training(kind, tmp_path, capsys):
    config = {"split_batches": True}
    fit_line(kind, tmp_path, train=None, accelerator_config=config).evaluate()
    assert "no effect" not in capsys.readouterr().err

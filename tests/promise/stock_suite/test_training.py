"""Training: steps, seeds, accumulation, losses, and what a model may be."""

import copy
import math

import numpy as np
import pytest
import torch
from support.line import (
    QUIET,
    CheckpointedLine,
    DictLine,
    LineConfig,
    LineModel,
    LineRows,
    LineStream,
    NoisyLine,
    PlainLine,
    fit_line,
    fitted,
    logged,
)
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

LEARNS = {"learning_rate": 0.1}
TOKENS = [5, 9, 2, 7, 3, 3, 8, 1]


def tiny_gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes | dropout | changes))


def equal_rows(count=32):
    return [{"input_ids": TOKENS, "labels": TOKENS} for _ in range(count)]


def test_the_same_seed_gives_the_same_weights(kind, tmp_path):
    first, second = (fit_line(kind, tmp_path, **LEARNS) for _ in range(2))
    first.train()
    second.train()
    assert fitted(first) == fitted(second)


def test_another_seed_gives_other_weights(kind, tmp_path):
    ends = []
    for seed in (42, 314):
        trainer = fit_line(kind, tmp_path, seed=seed, **LEARNS)
        trainer.train()
        ends.append(fitted(trainer))
    assert ends[0] != ends[1]


def test_data_seed_orders_the_rows_whatever_the_seed(kind, tmp_path):
    ends = []
    for seed, data_seed in ((1, 5), (2, 5), (1, 6)):
        trainer = fit_line(kind, tmp_path, seed=seed, data_seed=data_seed, **LEARNS)
        trainer.train()
        ends.append(fitted(trainer))
    assert ends[0] == ends[1] != ends[2]


def test_model_init_begins_anew_with_each_call_of_train(kind, tmp_path):
    def model_init():
        return LineModel(LineConfig(a=float(torch.rand(())), b=0.0))

    trainer = fit_line(kind, tmp_path, model_init=model_init, **LEARNS)
    trainer.train()
    first = fitted(trainer)
    trainer.train()
    assert fitted(trainer) == first
    trainer.args.seed = 314
    trainer.train()
    assert fitted(trainer) != first


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 24),
        ({"num_train_epochs": 1.5}, 12),
        ({"num_train_epochs": 0.1}, 1),
        ({"max_steps": 10}, 10),
        ({"max_steps": 11, "num_train_epochs": 1}, 11),
        ({"gradient_accumulation_steps": 2}, 12),
        ({"gradient_accumulation_steps": 3, "num_train_epochs": 2}, 6),
        ({"train": 66, "num_train_epochs": 1}, 9),
        ({"train": 66, "num_train_epochs": 1, "dataloader_drop_last": True}, 8),
        ({"train": 5, "gradient_accumulation_steps": 4, "num_train_epochs": 2}, 2),
    ],
    ids=str,
)
def test_number_of_steps(kind, tmp_path, options, steps):
    trainer = fit_line(kind, tmp_path, **options)
    output = trainer.train()
    assert output.global_step == trainer.state.global_step == trainer.state.max_steps == steps
    epochs = options.get("num_train_epochs", 3)
    if "max_steps" not in options:
        assert trainer.state.num_train_epochs == math.ceil(epochs)


def test_epochs_are_fractions_of_the_data_seen(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, logging_steps=1, num_train_epochs=2)
    trainer.train()
    epochs = [row["epoch"] for row in trainer.state.log_history if "loss" in row]
    assert epochs == pytest.approx([step / 8 for step in range(1, 17)])


def test_two_batches_of_four_train_as_one_of_eight(kind, tmp_path):
    whole = fit_line(kind, tmp_path, **LEARNS)
    cut = fit_line(
        kind, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **LEARNS
    )
    for trainer in (whole, cut):
        # This model takes any argument, but no count of items: stock has to be told.
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
    assert fitted(cut) == pytest.approx(fitted(whole), rel=1e-5)


def test_a_language_model_logs_the_same_losses_whatever_the_cut(kind, tmp_path):
    rows = [{"input_ids": TOKENS[:n], "labels": TOKENS[:n]} for n in (3, 8, 5, 4, 8, 2, 6, 7)]

    def collate(part):
        width = max(len(row["input_ids"]) for row in part)
        fill = {"input_ids": 0, "labels": -100}
        return {
            k: torch.tensor([row[k] + [f] * (width - len(row[k])) for row in part])
            for k, f in fill.items()
        }

    def shifted_sum(outputs, labels, num_items_in_batch=None):
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction
        )
        # Counted with the first label of each row, as the stock Trainer counts for this model.
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    losses = []
    for batch, steps in ((8, 1), (2, 4)):
        trainer = fit_line(
            kind,
            tmp_path,
            model=tiny_gpt2(),
            train=rows,
            data_collator=collate,
            compute_loss_func=shifted_sum,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            logging_steps=1,
            num_train_epochs=4,
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_activation_checkpointing_is_switched_on(kind, tmp_path):
    model = CheckpointedLine(LineConfig())
    before = copy.deepcopy(model.state_dict())
    trainer = fit_line(
        kind,
        tmp_path,
        model=model,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
        max_steps=2,
        **LEARNS,
    )
    trainer.train()
    assert model.num_checkpointed > 0
    assert all(not torch.equal(before[n], w) for n, w in model.state_dict().items())


def test_train_loss_is_the_mean_of_the_losses_logged(kind, tmp_path):
    even = fit_line(kind, tmp_path, logging_steps=8)
    uneven = fit_line(kind, tmp_path, logging_steps=5)
    outputs = [even.train(), uneven.train()]
    assert np.mean(logged(even, "loss")) == pytest.approx(outputs[0].training_loss, abs=1e-4)
    assert outputs[1].training_loss == pytest.approx(outputs[0].training_loss, abs=1e-4)


@pytest.mark.parametrize("model", [PlainLine(), DictLine()], ids=["tuple", "dict"])
def test_any_module_trains_evaluates_and_predicts(kind, tmp_path, model):
    trainer = fit_line(kind, tmp_path, model=copy.deepcopy(model), num_train_epochs=1, **LEARNS)
    trainer.train()
    assert fitted(trainer) != (0.0, 0.0)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(LineRows(5)).predictions.shape == (5,)


def test_a_model_with_a_device_map_is_taken(kind, tmp_path):
    model = LineModel(LineConfig())
    model.hf_device_map = {"a": "cpu", "b": "cpu"}
    fit_line(kind, tmp_path, model=model)


def test_frozen_parameters_stay(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, a=1.5, **LEARNS)
    trainer.model.a.requires_grad_(False)
    trainer.train()
    a, b = fitted(trainer)
    assert (a, b != 0.0) == (1.5, True)


def test_training_twice_wraps_the_model_once(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, max_steps=2)
    trainer.train()
    wrapped = trainer.model_wrapped
    trainer.train()
    assert trainer.model_wrapped is wrapped


def test_embeddings_are_noisy_only_while_they_train(kind, tmp_path):
    model = tiny_gpt2()
    trainer = fit_line(
        kind, tmp_path, model=model, train=equal_rows(), neftune_noise_alpha=0.4, max_steps=2
    )
    trainer.train()
    embeddings = trainer.model.get_input_embeddings()
    assert len(embeddings._forward_hooks) == 0
    trainer.model.eval()
    ids = torch.tensor([[1, 0, 1]])
    assert torch.equal(embeddings(ids), embeddings(ids))


def diverged(kind, tmp_path, *, is_filtered):
    """A run whose loss is no number, for its learning rate."""
    trainer = fit_line(
        kind,
        tmp_path,
        model=tiny_gpt2(),
        train=equal_rows(),
        learning_rate=1e9,
        logging_steps=1,
        logging_nan_inf_filter=is_filtered,
    )
    trainer.train()
    return trainer


def test_a_loss_that_is_not_finite_is_logged_if_unfiltered(kind, tmp_path):
    trainer = diverged(kind, tmp_path, is_filtered=False)
    assert not all(map(math.isfinite, logged(trainer, "loss")))


def test_a_loss_that_is_not_finite_is_filtered_from_the_log(kind, tmp_path):
    trainer = diverged(kind, tmp_path, is_filtered=True)
    assert all(map(math.isfinite, logged(trainer, "loss")))


@pytest.mark.parametrize("one_shot", [False, True])
def test_a_stream_trains_for_max_steps(kind, tmp_path, one_shot):
    stream = LineStream(labels=("labels", "extra"), one_shot=one_shot)
    trainer = fit_line(kind, tmp_path, train=stream, max_steps=8 if one_shot else 20)
    trainer.train()
    assert trainer.state.global_step == (8 if one_shot else 20)
    assert isinstance(trainer.get_train_dataloader(), torch.utils.data.DataLoader)


def test_a_stream_needs_max_steps(kind, tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        fit_line(kind, tmp_path, train=LineStream(), num_train_epochs=1)


def test_a_compiled_model_trains(kind, tmp_path):
    trainer = fit_line(
        kind,
        tmp_path,
        model=tiny_gpt2(),
        train=equal_rows(),
        torch_compile=True,
        torch_compile_backend="eager",
        max_steps=1,
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_bfloat16_autocast_trains(kind, tmp_path):
    trainer = fit_line(kind, tmp_path, bf16=True, num_train_epochs=1, **LEARNS)
    before = fitted(trainer)
    trainer.train()
    assert fitted(trainer) != before
    assert trainer.model.a.dtype == torch.float32


def test_a_trainer_needs_a_model(kind, tmp_path):
    arguments = TrainingArguments(str(tmp_path), **QUIET)
    with pytest.raises(RuntimeError, match="requires either a `model` or `model_init`"):
        kind(args=arguments)
    with pytest.raises(ValueError, match="but not both"):
        kind(PlainLine(), arguments, model_init=PlainLine)


def test_training_needs_rows(kind, tmp_path):
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        fit_line(kind, tmp_path, train=None).train()


def test_a_noisy_model_trains_alike_with_the_same_seed(kind, tmp_path):
    ends = []
    for _ in range(2):
        trainer = fit_line(kind, tmp_path, model=NoisyLine(LineConfig()), max_steps=4, **LEARNS)
        set_seed(11)
        trainer.train()
        ends.append(fitted(trainer))
    assert ends[0] == ends[1]


def test_the_number_of_trainable_parameters_is_counted(kind, tmp_path):
    trainer = fit_line(kind, tmp_path)
    trainer.model.b.requires_grad_(False)
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == 1
    assert trainer.get_decay_parameter_names(trainer.model) == ["a", "b"]


def test_floating_point_operations_are_added_up(kind, tmp_path):
    class Named(LineModel):
        main_input_name = "input_x"

    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    trainer = fit_line(kind, tmp_path, model=Named(LineConfig()), max_steps=2, **options)
    trainer.train()
    # Six for every number that goes in and every parameter: 2 steps of 6 rows, a and b.
    assert trainer.state.total_flos == 6 * (2 * 6) * 2


def test_a_single_step_equals_plain_gradient_descent(kind, tmp_path):
    rows = LineRows(8)
    trainer = fit_line(kind, tmp_path, train=rows, max_steps=1, optim="sgd", max_grad_norm=0.0,
                       learning_rate=0.1, lr_scheduler_type="constant")  # fmt: skip
    trainer.train()
    x, error = rows.x, -rows.y  # the line begins at zero
    a, b = -0.1 * np.mean(2 * error * x), -0.1 * np.mean(2 * error)
    assert fitted(trainer) == pytest.approx((a, b), rel=1e-5)

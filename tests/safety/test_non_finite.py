"""NaN and infinities: they never reach the optimizer, and the report says where they came from."""

import math

import pytest
import torch
from support.failing import Failure, train_ranks
from support.ranks import run_ranks
from support.tiny import log_rows, make_trainer, ragged_rows, tiny_llama

from hf_gradacc import GradAccTrainer, NonFiniteError

POISON = 47  # a token whose embedding is NaN
ROWS = ragged_rows(24, seed=6)
for _row in ROWS:
    _row["input_ids"] = [min(token, 46) for token in _row["input_ids"]]


def poisoned(*indices, rows=ROWS):
    """Rows of which some hold the token that no model survives."""
    changed = [dict(row) for row in rows]
    for index in indices:
        changed[index]["input_ids"] = [POISON, *changed[index]["input_ids"][1:]]
    return changed


class Poison(GradAccTrainer):
    """A model that gives NaN, or a gradient that is, for one token only."""

    kind = "loss"

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if isinstance(loss, tuple) or not model.training:
            return loss
        bad = (inputs["input_ids"] == POISON).any()
        if bad and self.kind == "loss":
            return loss * math.nan
        if bad and self.kind == "gradient":
            weight = self.accelerator.unwrap_model(model).model.norm.weight
            return loss + (weight.sum() * 0.0).sqrt()  # 0, whose derivative is 0 / 0
        return loss


class BadGradient(Poison):
    kind = "gradient"


def run(tmp_path, *indices, trainer_class=Poison, **options):
    model = tiny_llama()
    settings = {
        "train_sampling_strategy": "sequential",
        "effective_batch_size": 6,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 1.0,
    }
    trainer = make_trainer(
        tmp_path,
        poisoned(*indices),
        model=model,
        trainer_class=trainer_class,
        **settings | options,
    )
    trainer.train()
    return model, trainer


@pytest.mark.slow
def test_an_error_names_step_micro_batch_rows_and_tensor(tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path, 14)
    text = str(caught.value)
    assert "step 3" in text
    assert "update 2 of epoch 0" in text
    assert "of 3 (rows" in text
    rows = text.partition("(rows ")[2].partition(" of the dataset")[0].split(", ")
    assert "14" in rows
    assert len(rows) == 2
    assert "the loss is NaN" in text
    assert "on_non_finite = 'skip'" in text


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_named_by_their_place_in_the_dataset_shuffled_and_cut_again(tmp_path, workers):
    model = tiny_llama()
    trainer = make_trainer(
        tmp_path,
        poisoned(17),
        model=model,
        trainer_class=Poison,
        effective_batch_size=12,
        per_device_train_batch_size=6,
        dataloader_num_workers=workers,
        seed=5,
    )
    Failure(model, lambda rows, width, seen: rows > 1)
    with pytest.raises(NonFiniteError, match=r"\(row 17 of the dataset\) the loss is NaN"):
        trainer.train()
    assert trainer.token_budget.cap is not None


def test_infinities_are_told_from_nan(tmp_path):
    class Infinite(Poison):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = GradAccTrainer.compute_loss(self, model, inputs, *args, **kwargs)
            bad = model.training and bool((inputs["input_ids"] == POISON).any())
            return loss * math.inf if bad else loss

    with pytest.raises(NonFiniteError, match=r"the loss is infinite"):
        run(tmp_path, 14, trainer_class=Infinite)


@pytest.mark.slow
def test_the_count_of_skipped_updates_goes_on_after_a_resume(tmp_path):
    options = {"on_non_finite": "skip", "save_strategy": "steps", "save_steps": 1}
    options |= {"optim": "adamw_torch", "lr_scheduler_type": "linear"}
    whole, straight = run(tmp_path / "straight", 1, 14, **options)
    resumed = tiny_llama()
    run(tmp_path / "stopped", 1, 14, **options)
    trainer = make_trainer(
        tmp_path / "stopped",
        poisoned(1, 14),
        model=resumed,
        trainer_class=Poison,
        train_sampling_strategy="sequential",
        effective_batch_size=6,
        per_device_train_batch_size=2,
        max_grad_norm=1.0,
        **options,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    counts = [row.get("skipped_updates") for row in log_rows(trainer)]
    assert counts == [row.get("skipped_updates") for row in log_rows(straight)]
    for weight, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_the_first_module_that_gives_nan_is_named(tmp_path):
    model = tiny_llama()
    for module in (model.model.layers[1].mlp, model.model.layers[0].mlp):
        module.register_forward_hook(
            lambda module, args, output: output * math.nan if module.training else output
        )
    trainer = make_trainer(tmp_path, ROWS, model=model, effective_batch_size=6)
    with pytest.raises(
        NonFiniteError, match=r"output of LlamaMLP model\.layers\.0\.mlp has \d+ NaN"
    ):
        trainer.train()


def test_a_gradient_alone_may_be_bad(tmp_path):
    with pytest.raises(NonFiniteError, match=r"the gradient of model\.norm\.weight has 16 NaN"):
        run(tmp_path, 14, trainer_class=BadGradient)


def test_weights_that_are_bad_already_are_named(tmp_path):
    class Spoil(GradAccTrainer):
        def training_update(self, model, update):
            with torch.no_grad():
                self.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
            return super().training_update(model, update)

    with pytest.raises(
        NonFiniteError, match=r"weight .*up_proj\.weight has 1 infinite of \d+ value"
    ):
        run(tmp_path, trainer_class=Spoil)


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [Poison, BadGradient])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_skipped_update_trains_nothing_and_is_counted(tmp_path, trainer_class, max_grad_norm):
    options = {"max_grad_norm": max_grad_norm, "optim": "adamw_torch", "logging_steps": 4}
    model, trainer = run(tmp_path, 7, trainer_class=trainer_class, on_non_finite="skip", **options)
    # Rows 6 to 11 make the second update: the same run without them ends the same.
    calm = tiny_llama()
    rest = make_trainer(
        tmp_path,
        ROWS[:6] + ROWS[12:],
        model=calm,
        trainer_class=trainer_class,
        train_sampling_strategy="sequential",
        effective_batch_size=6,
        per_device_train_batch_size=2,
        **options,
    )
    rest.train()
    for name, weight in calm.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], weight), name
    [row] = log_rows(trainer)
    assert row["skipped_updates"] == 1
    assert trainer.state.global_step == 4
    assert row["target_tokens_seen"] == rest.ledger.window.target_tokens_seen
    assert math.isfinite(row["loss"])


def test_a_row_of_the_log_over_nothing_but_skipped_updates_has_no_loss(tmp_path):
    _, trainer = run(tmp_path, 7, on_non_finite="skip")
    losses = [row["loss"] for row in log_rows(trainer)]
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False]


@pytest.mark.slow
def test_it_stops_after_a_number_of_them_in_a_row(tmp_path):
    with pytest.raises(NonFiniteError, match="max_skipped_updates_in_a_row = 2"):
        run(tmp_path, 1, 7, 13, 19, on_non_finite="skip", max_skipped_updates_in_a_row=2)
    run(tmp_path, 1, 13, on_non_finite="skip", max_skipped_updates_in_a_row=2)  # not in a row


@pytest.mark.slow
def test_the_stock_filter_hides_nothing(tmp_path):
    with pytest.raises(NonFiniteError):
        run(tmp_path, 14, logging_nan_inf_filter=True)


@pytest.mark.slow
def test_all_ranks_skip_what_is_bad_on_one(tmp_path):
    scenario = {"poison": (7,), "optim": "adamw_torch"}
    results = run_ranks(
        train_ranks, 2, scenarios={"skip": {**scenario, "on_non_finite": "skip"}, "raise": scenario}
    )
    for name, weight in results[0]["skip"]["weights"].items():
        assert torch.isfinite(weight).all()
        assert torch.equal(results[1]["skip"]["weights"][name], weight)
    assert results[0]["skip"]["logs"][-1]["skipped_updates"] == 1
    for result in results:
        assert result["raise"]["error"] == "NonFiniteError"
        assert "rank" in result["raise"]["text"]
        assert "7" in result["raise"]["text"].partition("(row")[2].partition(" of the")[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("on_non_finite", "ignore"),
        ("max_skipped_updates_in_a_row", 0),
        ("accumulate_grads_in_fp32", "yes"),
        ("recover_from_out_of_memory", 3),
    ],
)
def test_wrong_options_are_refused_by_name(tmp_path, field, value):
    from hf_gradacc import ConfigError, GradAccArguments

    with pytest.raises(ConfigError, match=field):
        GradAccArguments(output_dir=str(tmp_path), **{field: value})

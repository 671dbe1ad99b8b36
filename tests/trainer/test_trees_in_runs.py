"""Updates of trees in runs of every kind, on rows made to break them."""

import contextlib
import functools
import tempfile

import pytest
import torch
from support.common_prompts import rows_of_prompts, watching_calls
from support.failing import Failure
from support.gated import shifting_llama
from support.hooks import of_no_user
from support.rank_jobs import Stream
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.resume_jobs import train_and_report
from support.tiny import VOCABULARY, Recorder, log_rows, make_trainer, pad, tiny_llama
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
)

from hf_gradacc import GradAccMixin, GradAccTrainer, MemoryBudgetError
from hf_gradacc.loss.shortcuts.tree_trial import TreeTrial
from hf_gradacc.trainer import step

NUM_ROWS = 12
ROWS = rows_of_prompts(NUM_ROWS)
SHARED = {"layout": "shared_prefix", "effective_batch_size": NUM_ROWS}


@contextlib.contextmanager
def training(rows=ROWS, *, model=None, in_float64=True, **options):
    """Train in float64; give the trainer, what it recorded, and its calls of bodies."""
    recorder = Recorder()
    with float64_everywhere():  # weights are drawn in the default dtype
        network = tiny_llama() if model is None else model
    exactly = float64_everywhere() if in_float64 else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as out, exactly, watching_calls() as calls:
        callbacks = [recorder, *options.pop("callbacks", ())]
        trainer = make_trainer(out, rows, model=network, callbacks=callbacks, **SHARED | options)
        trainer.train()
        trainer.calls, trainer.gradients = calls, recorder.gradients
        yield trainer


@functools.cache
def expected():
    with float64_everywhere():
        return reference_gradient(tiny_llama(), ROWS, pad)


def assert_exact_as_trees(trainer):
    assert trainer.calls.num_trained_trees > 0
    assert log_rows(trainer)[0]["shared_fraction"] > 0.2
    assert relative_error(trainer.gradients[0], expected()) < 1e-12


def test_an_update_of_trees_has_the_gradient_of_its_rows_at_once():
    with training() as trainer:
        assert_exact_as_trees(trainer)


def test_rows_of_a_stream_are_shared():
    with training(Stream(ROWS), max_steps=1) as trainer:
        assert_exact_as_trees(trainer)


@pytest.mark.slow
def test_loader_workers_plan_trees():
    with training(dataloader_num_workers=1) as trainer:
        assert_exact_as_trees(trainer)


def small_gpt2():
    """Hands its layers the mask by place, so that it comes detached where they run again."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **none))


@pytest.mark.parametrize("reentrant", [False, True])
def test_masks_that_come_detached_are_those_of_the_tree(reentrant):
    kwargs = {"use_reentrant": reentrant}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    with training(model=small_gpt2(), in_float64=False, **options) as trainer:
        assert trainer.calls.num_trained_trees > 0
        rows = reference_gradient(small_gpt2(), ROWS, pad)
        assert relative_error(trainer.gradients[0], rows) < 1e-5


def test_a_window_is_no_hindrance_where_the_rows_asked_with_begin_alike_already():
    """The trial narrows windows: what layers returned before, under the wide one, is no answer."""
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=64,
    )
    with float64_everywhere():
        torch.manual_seed(0)
        model = MistralForCausalLM(config)
    with training(model=model, layout="auto") as trainer:
        assert trainer.shortcuts.reason("shared_prefix") == ""
        assert trainer.calls.num_trained_trees > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_see_the_tree(reentrant):
    """What is computed again in a backward is out of reach of `float64_everywhere`."""
    kwargs = {"use_reentrant": reentrant}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    with training(in_float64=False, **options) as trainer:
        assert trainer.calls.num_trained_trees > 0
        assert relative_error(trainer.gradients[0], expected()) < 1e-6


def families_of_three(*, count=4):
    """Rows whose families have much in common, and two tokens with all others."""
    rows = []
    for n in range(3 * count):
        ids = [3, 4, *range(5 + n // 3, 25 + n // 3), 30 + n, 31 + n]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)})
    return rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_log_counts_the_tokens_that_go_through_the_layers(attention):
    with float64_everywhere():
        model = tiny_llama(attn_implementation=attention)
    seen = []

    def count(layer, args, output):
        if layer.training:  # and not asked
            seen.append(args[0].shape[0] * args[0].shape[1])

    model.model.layers[0].register_forward_hook(of_no_user(count))
    rows = families_of_three()
    sizes = {"effective_batch_size": 12, "per_device_train_batch_size": 12}
    with training(rows, model=model, **sizes) as trainer:
        row = log_rows(trainer)[0]
        assert row["computed_tokens_per_update"] == sum(seen)
        assert row["shared_fraction"] > 0.2
        used = sum(len(row["input_ids"]) for row in rows)
        padding = row["padding_fraction"] * sum(seen)
        assert row["shared_fraction"] == pytest.approx((used + padding - sum(seen)) / used)


# ---- out of memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_in_trees_is_rolled_back_and_cut_finer_by_computed_tokens(where):
    with float64_everywhere():
        model = tiny_llama()
    ran = []

    def too_many(trees, width, seen):
        ran.append(trees * width)
        return ran[-1] > 60

    failure = Failure(model, too_many, where=where)
    with training(model=model, max_tokens_per_micro_batch=400) as trainer:
        assert failure.raised >= 1
        assert_exact_as_trees(trainer)
        last = ran[-int(log_rows(trainer)[0]["micro_batches_per_update"]) :]
        assert max(last) <= trainer.token_budget.cap <= 60
        assert sum(last) == log_rows(trainer)[0]["computed_tokens_per_update"]
        # Fewer than the rows have: the cap counts what is computed.
        assert sum(last) < 0.8 * sum(len(row["input_ids"]) for row in ROWS)


def test_a_row_that_does_not_fit_alone_is_named_with_trees_as_without():
    with float64_everywhere():
        model = tiny_llama()
    Failure(model, lambda trees, width, seen: width > 20)
    with pytest.raises(MemoryBudgetError, match="tokens"), training(model=model):
        pass


# ---- resumed -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shared_prefix", "auto"])
@pytest.mark.parametrize("form", ["rows", "stream"])
def test_a_run_of_trees_is_resumed_bit_for_bit(tmp_path, form, layout):
    rows = rows_of_prompts(30, seed=2)
    options = {
        "layout": layout,
        "rows": rows if form == "rows" else Stream(rows),
        "dropout": 0.2 if layout == "shared_prefix" else 0.0,  # else there are no trees
        "max_steps": 6,
        "num_train_epochs": 1,
        "effective_batch_size": 8 if form == "rows" else 4,
        "logging_steps": 1,
    }
    whole = train_and_report(str(tmp_path / "whole"), **options)
    assert any("shared_fraction" in row for row in whole["logs"])
    train_and_report(str(tmp_path / "parts"), stop=2, **options)
    again = train_and_report(str(tmp_path / "parts"), resume=True, **options)
    assert again["logs"] == whole["logs"]
    for name, weight in whole["weights"].items():
        assert torch.equal(again["weights"][name], weight)


# ---- updates that are not shared ---------------------------------------------------------------


def test_an_update_whose_noise_is_measured_is_cut_at_random_and_stays_rows():
    with training(noise_scale_every=2, effective_batch_size=6) as trainer:
        shared = ["shared_fraction" in row for row in log_rows(trainer)]
        assert sorted(shared) == [False, True]


class OwnLoader(GradAccTrainer):
    """Loads its rows by itself, a batch at a time."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=pad)


def test_rows_of_a_loader_of_ones_own_stay_rows():
    options = {"trainer_class": OwnLoader, "effective_batch_size": None}
    with training(gradient_accumulation_steps=3, layout="auto", **options) as trainer:
        assert trainer.calls.num_trees == 0
        assert relative_error(trainer.gradients[0], expected()) < 1e-12


class ReversesRows(GradAccTrainer):
    """Changes the rows of each micro-batch: their order, and with it which begin alike where."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = {key: value.flip(0) for key, value in inputs.items()}
        return super().training_step(model, inputs, num_items_in_batch)


class ReversesBatches(GradAccTrainer):
    """Changes the rows of an update's batches before any of them runs."""

    def get_batch_samples(self, *args, **kwargs):
        batches, count = super().get_batch_samples(*args, **kwargs)
        return [{key: value.flip(0) for key, value in one.items()} for one in batches], count


class AddsRow(GradAccTrainer):
    """Lets the first row count twice; the mean is over what it was before."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        twice = {key: torch.cat((value, value[:1])) for key, value in inputs.items()}
        return super().compute_loss(model, twice, *args, **kwargs)


@pytest.mark.parametrize("trainer_class", [ReversesRows, ReversesBatches])
def test_a_step_that_changes_rows_trains_on_what_it_has_made_of_them(trainer_class):
    with training(trainer_class=trainer_class) as trainer:
        assert trainer.calls.num_trained_trees > 0
        assert relative_error(trainer.gradients[0], expected()) < 1e-12


class WritesIntoRows(Trainer):
    """Writes into the rows it is given, behind the mixin, where nobody has tried it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs["input_ids"][:, 2] = 7
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_step_that_writes_into_rows_trains_on_what_it_has_written(monkeypatch):
    lines = []
    monkeypatch.setattr(step.logger, "warning_once", lines.append)
    trainer_class = type("Mixed", (GradAccMixin, WritesIntoRows), {})
    gradients = []
    for layout in ("shared_prefix", "padded"):
        with training(trainer_class=trainer_class, layout=layout) as trainer:
            gradients.append(trainer.gradients[0])
    assert relative_error(*gradients) < 1e-12
    assert any("so they were computed as they are" in line for line in lines)


def test_a_loss_that_changes_rows_computes_them_as_they_are():
    changed = []

    class Notes(AddsRow):
        def compute_loss(self, model, inputs, *args, **kwargs):
            changed.append(len(inputs["input_ids"]) + 1)
            return super().compute_loss(model, inputs, *args, **kwargs)

    gradients = []
    for layout in ("auto", "padded"):
        with training(trainer_class=Notes, layout=layout) as trainer:
            gradients.append(trainer.gradients[0])
            assert trainer.calls.num_trees == 0
    assert changed
    assert relative_error(*gradients) < 1e-12


# ---- rows that are made to break it ------------------------------------------------------------


def rows_with(change):
    return [change(index, {k: list(v) for k, v in row.items()}) for index, row in enumerate(ROWS)]


def pad_tokens_inside(index, row):
    row["input_ids"][3] = 0
    return row


def holes(index, row):
    if index % 3 == 0:
        row["attention_mask"][5:9] = [0] * 4
    return row


def left_out_at_the_end(index, row):
    if index % 2:
        row["attention_mask"][-1], row["labels"][-1] = 0, -100
    return row


def labels_of_another(index, row):
    """What stands in the common part is no token of it, and of every row another."""
    row["labels"] = [(7 * index + place) % 40 + 3 for place in range(len(row["labels"]))]
    return row


def all_the_same(index, row):
    return {key: list(value) for key, value in ROWS[0].items()}


def of_one_token(index, row):
    return {k: v[:1] for k, v in row.items()} if index % 2 else row


BREAKING = [
    pad_tokens_inside,
    holes,
    left_out_at_the_end,
    labels_of_another,
    all_the_same,
    of_one_token,
]


@pytest.mark.parametrize("change", BREAKING, ids=lambda change: change.__name__)
def test_rows_that_would_break_a_careless_tree_have_their_own_gradient(change):
    rows = rows_with(change)
    with float64_everywhere():
        wanted = reference_gradient(tiny_llama(), rows, pad)
    with training(rows, layout="auto") as trainer:
        assert relative_error(trainer.gradients[0], wanted) < 1e-12
        if change is holes:
            assert trainer.calls.num_trained_trees == 0


def test_one_row_alone_is_a_row():
    with training(ROWS[:1], effective_batch_size=1, layout="auto") as trainer:
        assert trainer.calls.num_trained_trees == 0


def test_rows_alike_in_tokens_but_not_in_token_types_are_not_shared():
    """A body that is given more than tokens and their mask is given what it would be without us."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def model():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=48,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return GPT2LMHeadModel(config).double()

    def collate_by_index(rows):
        batch = pad(rows)
        kinds = torch.tensor([row["kind"] for row in rows])[:, None]
        return {**batch, "token_type_ids": kinds.expand_as(batch["input_ids"]).contiguous()}

    rows = [{**row, "kind": index % 2 + 1} for index, row in enumerate(ROWS)]
    with float64_everywhere():
        network = model()
        wanted = reference_gradient(network, rows, collate_by_index)
        other = reference_gradient(network, ROWS, pad)
    options = {"data_collator": collate_by_index, "remove_unused_columns": False}
    with training(rows, model=network, layout="auto", **options) as trainer:
        assert trainer.calls.num_trained_trees == 0
        assert trainer.update_collator.foresees_sharing
        assert "rows of tokens alone" in trainer.shortcuts.reason("shared_prefix")
        assert relative_error(trainer.gradients[0], wanted) < 1e-12
    assert relative_error(wanted, other) > 1e-3


class WeighsTokens(GradAccTrainer):
    """A loss of its own over what its collator adds."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return weighed_loss(outputs.logits, inputs)


def weighed_loss(logits, inputs):
    targets = inputs["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=-100
    )
    return (losses * inputs["weights"][:, 1:]).sum() / targets.ne(-100).sum()


def with_weights(rows):
    batch = pad(rows)
    places = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])
    per_row = batch["labels"].clamp(min=0).sum(1, keepdim=True) % 5 + 1
    return {**batch, "weights": (1 + batch["input_ids"] % 3) * per_row.double() + 0 * places}


def test_what_a_collator_adds_stays_with_each_row():
    def loss_of(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return weighed_loss(logits, batch)

    with float64_everywhere():
        wanted = reference_gradient(tiny_llama(), ROWS, with_weights, loss_of=loss_of)
    options = {"data_collator": with_weights, "trainer_class": WeighsTokens}
    with training(remove_unused_columns=False, **options) as trainer:
        assert trainer.calls.num_trained_trees > 0
        assert relative_error(trainer.gradients[0], wanted) < 1e-12
        assert relative_error(wanted, expected()) > 1e-2


class AsksTwice(GradAccTrainer):
    """Asks again about the same tokens under another mask: three are hidden."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return two_losses(model, inputs)


def two_losses(model, inputs):
    hidden = inputs["attention_mask"].clone()
    hidden[:, 1:4] = 0
    masks = (inputs["attention_mask"], hidden)
    return sum(model(**{**inputs, "attention_mask": mask}).loss for mask in masks)


def test_the_same_tokens_under_another_mask_are_not_taken_for_the_same_rows():
    with float64_everywhere():
        wanted = reference_gradient(tiny_llama(), ROWS, pad, loss_of=two_losses)
    with training(trainer_class=AsksTwice) as trainer:
        assert sum(trainer.calls.trained) == 2 * trainer.calls.num_trained_trees > 0
        assert relative_error(trainer.gradients[0], wanted) < 1e-12
        assert relative_error(wanted, expected()) > 1e-2


# ---- what no loss tells --------------------------------------------------------------------------


def test_a_branch_behind_a_gate_of_zero_is_seen_by_its_gradient():
    with float64_everywhere():
        wanted = reference_gradient(shifting_llama(), ROWS, pad)
    with training(model=shifting_llama(), layout="auto") as trainer:
        assert "its gradient differs" in trainer.shortcuts.reason("shared_prefix")
        assert relative_error(trainer.gradients[0], wanted) < 1e-12


def test_the_gradient_of_such_a_branch_would_be_another_one_in_a_tree(monkeypatch):
    monkeypatch.setattr(TreeTrial, "_compare_gradients", lambda *args: "")
    with float64_everywhere():
        wanted = reference_gradient(shifting_llama(), ROWS, pad)
    with training(model=shifting_llama(), layout="auto") as trainer:
        assert trainer.calls.num_trained_trees > 0
        assert relative_error(trainer.gradients[0], wanted) > 1e-3

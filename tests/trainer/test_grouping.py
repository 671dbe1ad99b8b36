"""Runs whose rows are drawn together where they begin alike: exact, resumed, refused in words."""

import contextlib
import itertools
import tempfile

import datasets
import pytest
import torch
from support.common_prompts import rows_of_prompts, watching_calls
from support.rank_jobs import Stream
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.resume_jobs import train_and_report
from support.tiny import Recorder, log_rows, make_trainer, pad, ragged_rows, tiny_llama
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from hf_gradacc import ConfigError, GradAccArguments, GradAccTrainer
from hf_gradacc.tracking.run_facts import describe_run
from hf_gradacc.tracking.terminal import plan_rows
from hf_gradacc.trainer import grouping

PER_UPDATE = 12
ROWS = rows_of_prompts(60, seed=4, prompts=20)
GROUPED = {"group_by_prefix": True, "effective_batch_size": PER_UPDATE}


class Updates(Recorder):
    """Notes which rows each update has."""

    def __init__(self):
        super().__init__()
        self.members = []

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = train_dataloader.updates.batch_sampler
        self.members.append(sampler.membership(0)[state.global_step - 1])


@contextlib.contextmanager
def training(rows=ROWS, **options):
    """Train in float64; give the trainer, its gradients and its calls of bodies."""
    recorder = Updates()
    with (
        tempfile.TemporaryDirectory() as out,
        float64_everywhere(),
        watching_calls() as calls,
    ):
        trainer = make_trainer(
            out, rows, model=tiny_llama(), callbacks=[recorder], **GROUPED | options
        )
        trainer.train()
        trainer.calls, trainer.recorder = calls, recorder
        yield trainer


def assert_exact(trainer, rows, *, learning_rate=0.1):
    """Compare every update's gradient with that of its rows at once, step by step."""
    with float64_everywhere():
        model = tiny_llama()
        for members, gradient in zip(
            trainer.recorder.members, trainer.recorder.gradients, strict=True
        ):
            expected = reference_gradient(model, [rows[i] for i in members], pad)
            assert relative_error(gradient, expected) < 1e-12
            for name, parameter in model.named_parameters():
                parameter.data -= learning_rate * expected[name]


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 5},
        {"max_tokens_per_micro_batch": 100, "layout": "shared_prefix"},
        {"tokens_per_update": 60, "effective_batch_size": None},
    ],
    ids=["rows", "tokens", "updates by tokens"],
)
def test_every_update_has_the_gradient_of_its_rows_at_once(options):
    with training(**options) as trainer:
        assert trainer.calls.num_trained_trees > 0
        assert_exact(trainer, ROWS)
        members = list(itertools.chain(*trainer.recorder.members))
        assert sorted(members) == list(range(len(ROWS)))
        shared = [row["shared_fraction"] for row in log_rows(trainer)]
    with training(group_by_prefix=False, **options) as apart:
        less = [row.get("shared_fraction", 0.0) for row in log_rows(apart)]
    assert sum(shared) / len(shared) > 0.35 > 0.2 > sum(less) / len(less)


def test_families_are_shared_even_if_the_rows_looked_at_first_have_nothing_in_common():
    """Two answers each to 80 questions, far apart: the model is tried for the families' sake."""
    firsts = rows_of_prompts(80, seed=6, prompts=2000)
    seconds = [
        {key: [*values, 5] for key, values in row.items()} for row in firsts[3:] + firsts[:3]
    ]
    options = {"max_steps": 2, "layout": "auto"}
    with training(firsts + seconds, group_by_prefix=False, **options) as apart:
        assert not apart.update_collator.foresees_sharing
        assert apart.calls.num_trained_trees == 0
    with training(firsts + seconds, **options) as together:
        assert together.calls.num_trained_trees > 0


class Map(Dataset):
    """Gives rows one at a time, and draws a random number for each."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        torch.rand(())
        return dict(ROWS[index])


def on_reading(batch):
    return {key: [list(values) for values in batch[key]] for key in batch}


FORMS = {
    "a table": lambda: datasets.Dataset.from_list(ROWS),
    "a table of what a function makes on reading": lambda: datasets.Dataset.from_list(
        ROWS
    ).with_transform(on_reading),
    "a map dataset that draws": Map,
}


def membership(tmp_path, rows, *, rank=0, world_size=1, monkeypatch=None, **options):
    """Updates of the loader that a rank trains with."""
    trainer = make_trainer(tmp_path, rows, **GROUPED | options)
    with monkeypatch.context() if monkeypatch else contextlib.nullcontext() as patch:
        if patch is not None:
            patch.setattr(type(trainer.args), "world_size", world_size)
            patch.setattr(type(trainer.args), "process_index", rank)
        sampler = trainer.get_train_dataloader().updates.batch_sampler
    return sampler.membership(1)


@pytest.mark.parametrize("form", FORMS)
def test_families_are_found_in_rows_of_every_form(tmp_path, form):
    assert membership(tmp_path, FORMS[form]()) == membership(tmp_path, ROWS)


def test_pairs_of_one_prompt_are_a_family(tmp_path):
    prompts = rows_of_prompts(40, seed=1, prompts=12, length=30)
    pairs = [
        {"prompt_ids": row["input_ids"][:24], "chosen_ids": [5, i], "rejected_ids": [6, 7, i]}
        for i, row in enumerate(prompts)
    ]
    for rows in (pairs, datasets.Dataset.from_list(pairs)):
        trainer = make_trainer(tmp_path, rows, data_collator=collate_pairs, **GROUPED)
        trainer.args.remove_unused_columns = False
        families = trainer.get_train_dataloader().updates.batch_sampler.families
        runs = [families.rows[a:b] for a, b in zip(families.starts, families.stops, strict=True)]
        assert families.num_rows > 30
        for run in runs:
            assert len({tuple(pairs[i]["prompt_ids"][:20]) for i in run}) == 1


def collate_pairs(rows):
    return pad([{"input_ids": row["prompt_ids"], "labels": row["chosen_ids"]} for row in rows])


# ---- the same in every run ---------------------------------------------------------------------


@pytest.mark.slow
def test_loader_workers_train_the_same_updates():
    with training(per_device_train_batch_size=5) as alone:
        pass
    with training(per_device_train_batch_size=5, dataloader_num_workers=2) as others:
        for mine, theirs in zip(alone.recorder.gradients, others.recorder.gradients, strict=True):
            assert relative_error(mine, theirs) == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_draws_the_same_updates(tmp_path, monkeypatch, world_size):
    alone = membership(tmp_path, ROWS)
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "monkeypatch": monkeypatch}
        assert membership(tmp_path, ROWS, **options) == alone


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 6], ids=["amid an epoch", "in the next"])
def test_a_run_is_resumed_bit_for_bit(tmp_path, stop):
    rows = rows_of_prompts(30, seed=2, prompts=8)
    options = {"rows": rows, "group_by_prefix": True, "effective_batch_size": 8, "max_steps": 8}
    whole = train_and_report(str(tmp_path / "whole"), **options)
    assert any("shared_fraction" in row for row in whole["logs"])
    train_and_report(str(tmp_path / "parts"), stop=stop, **options)
    again = train_and_report(str(tmp_path / "parts"), resume=True, **options)
    assert again["logs"] == whole["logs"]
    for name, weight in whole["weights"].items():
        assert torch.equal(again["weights"][name], weight)


def test_to_resume_with_or_without_is_refused_as_other_updates(tmp_path):
    options = {"rows": ROWS, "max_steps": 4, "effective_batch_size": 8}
    train_and_report(str(tmp_path), stop=2, **options)
    told = "order: shuffled before, shuffled with group_by_prefix now"
    with pytest.raises(ConfigError, match=told):
        train_and_report(str(tmp_path), resume=True, group_by_prefix=True, **options)


# ---- told, refused -----------------------------------------------------------------------------


def test_the_plan_of_a_run_counts_families(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, **GROUPED)
    loader = trainer.get_train_dataloader()
    trainer.state.max_steps = 1
    facts = describe_run(trainer.args, train_dataloader=loader)
    families = loader.updates.batch_sampler.families
    assert 10 < len(families) <= 20
    assert facts["batch"]["families"] == len(families)
    shown = dict(plan_rows(trainer.args, trainer.state, facts, loader))
    assert shown["families"] == (
        f"{len(families)}, of {families.num_rows} rows drawn together that begin alike"
    )


def lines_of(monkeypatch):
    lines = []
    monkeypatch.setattr(grouping.logger, "warning_once", lines.append)
    return lines


def test_a_run_without_families_says_so_and_trains(monkeypatch):
    lines = lines_of(monkeypatch)
    rows = ragged_rows(24)
    with training(rows) as trainer:
        assert_exact(trainer, rows)
    (line,) = lines
    assert "finds no rows to draw together" in line


def test_a_model_that_computes_every_row_whole_is_told(monkeypatch, tmp_path):
    lines = lines_of(monkeypatch)
    trainer = make_trainer(tmp_path, ROWS, model=tiny_llama(attention_dropout=0.1), **GROUPED)
    trainer.train()
    (line,) = lines
    assert "computed whole" in line
    assert "dropout" in line
    assert "leave it out" in line


class OwnOrder(GradAccTrainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


class OwnLoader(GradAccTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=pad)


REFUSED = {
    "a stream": ({"rows": Stream(ROWS), "max_steps": 1}, "a stream gives its rows in its own"),
    "a sampler": ({"trainer_class": OwnOrder}, "SequentialSampler says in which order"),
    "a loader": ({"trainer_class": OwnLoader}, "OwnLoader.get_train_dataloader says which rows"),
    "one row": ({"effective_batch_size": 1}, "no rows meet in updates of effective_batch_size = 1"),
    "no tokens": (
        {"rows": [{"input_values": [0.5], "labels": 1}] * 4},
        "row 0 of the training dataset holds .*tokenize the rows first",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_rows_cannot_be_drawn_together_an_error_says_why(tmp_path, name):
    options, told = REFUSED[name]
    options = {"rows": ROWS, **GROUPED, **options}
    trainer = make_trainer(tmp_path, options.pop("rows"), **options)
    with pytest.raises(ConfigError, match=f"group_by_prefix = True.*{told}"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy = 'sequential'"),
        ({"layout": "padded"}, "layout = 'padded' computes each of them whole"),
        ({"layout": "packed"}, "layout = 'packed' computes each of them whole"),
        ({"noise_scale_every": 4}, "would measure too little noise"),
        ({"group_by_prefix": "yes"}, "group_by_prefix = 'yes': use True or False"),
    ],
)
def test_options_that_contradict_it_are_refused_by_name(options, told):
    with pytest.raises(ConfigError, match=told):
        GradAccArguments("out", use_cpu=True, **{"group_by_prefix": True} | options)

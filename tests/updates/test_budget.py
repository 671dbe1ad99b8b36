"""A budget that tunes itself ends near the fastest one, soon, and leaves the gradient alone."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama
from transformers import TrainerCallback

from hf_gradacc import GradAccArguments
from hf_gradacc.errors import ConfigError
from hf_gradacc.trainer.budget import timed_for_budget
from hf_gradacc.updates import remembered_budgets as budget_memory
from hf_gradacc.updates.budget import BudgetTuner, LayoutTurns, TokenBudget
from hf_gradacc.updates.collator import UpdateCollator


def tune(seconds_per_token, *, num_tokens=9000, longest=300, lag=0, fits=None):
    """Run a tuner against a made-up machine; `lag` updates are planned ahead by loader workers."""
    tuner, planned = BudgetTuner(), []
    while not tuner.settled:
        planned.append(tuner.tokens)
        budget = planned[max(0, len(planned) - 1 - lag)]
        if fits is not None and budget > fits:
            tuner.forbid(budget)
            continue
        seconds = seconds_per_token(budget) * num_tokens
        tuner.note(budget, seconds=seconds, num_tokens=num_tokens, longest=longest)
        assert tuner.num_updates <= 20
    return tuner


def like_a_cpu(budget):
    """Small micro-batches cost calls, large ones fall out of the cache."""
    return 1 + 150 / budget + budget / 8000


def like_a_gpu(budget):
    return 1 + 900 / budget


@pytest.mark.parametrize("machine", [like_a_cpu, like_a_gpu])
@pytest.mark.parametrize("lag", [0, 2])
def test_it_ends_within_five_per_cent_of_the_best(machine, lag):
    budgets = [2**k for k in range(9, 15)]
    tuner = tune(machine, lag=lag)
    assert machine(tuner.tokens) <= 1.05 * min(map(machine, budgets))


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_ten_per_cent_costs_little(seed):
    draw = random.Random(seed)
    tuner = tune(lambda budget: like_a_cpu(budget) * (1 + 0.1 * draw.random()))
    assert like_a_cpu(tuner.tokens) <= 1.1 * min(like_a_cpu(2**k) for k in range(9, 15))


def test_it_stays_below_what_does_not_fit():
    tuner = tune(like_a_gpu, fits=3000)
    assert tuner.tokens == 2048
    tuner.forbid(2048)  # later, when a longer sequence comes along
    assert tuner.tokens < 2048


def test_it_says_what_it_tried():
    line = tune(like_a_cpu).describe()
    assert "max_tokens_per_micro_batch = 1024 after" in line
    assert "2048: 1." in line


ROWS = ragged_rows(24, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_tuning_never_changes_a_gradient(tmp_path, workers):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        ROWS,
        callbacks=[recorder],
        learning_rate=0.0,
        effective_batch_size=12,
        max_tokens_per_micro_batch="auto",
        num_train_epochs=12,
        dataloader_num_workers=workers,
    )
    model = tiny_llama().train()
    with float64_everywhere():
        trainer.train()
        assert trainer.token_budget.tuner.settled
        sampler = trainer.get_train_dataloader().updates.batch_sampler
        assert len(recorder.gradients) == 24
        for epoch in (0, 11):
            gradients = recorder.gradients[2 * epoch :][:2]
            for gradient, members in zip(gradients, sampler.membership(epoch), strict=True):
                expected = reference_gradient(model, [ROWS[i] for i in members], pad)
                assert relative_error(gradient, expected) <= 1e-10


def test_updates_are_planned_with_what_was_chosen(tmp_path):
    seen = []
    trainer = make_trainer(
        tmp_path,
        ROWS,
        effective_batch_size=12,
        max_tokens_per_micro_batch="auto",
        num_train_epochs=12,
        learning_rate=0.0,
    )
    stock = trainer.training_step
    trainer.training_step = lambda model, update, n=None: (
        seen.append(update.max_tokens) or stock(model, update, n)
    )
    trainer.train()
    assert seen[0] == BudgetTuner.tokens
    assert seen[-1] == trainer.token_budget.tuner.tokens
    assert len(set(seen)) > 1


def test_a_budget_is_a_number_or_auto(tmp_path):
    arguments = GradAccArguments(output_dir=str(tmp_path), max_tokens_per_micro_batch="1024")
    assert arguments.max_tokens_per_micro_batch == 1024
    with pytest.raises(ConfigError, match=r"max_tokens_per_micro_batch = 'most': use a whole"):
        GradAccArguments(output_dir=str(tmp_path), max_tokens_per_micro_batch="most")


# ---- remembered --------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(budget_memory.constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hf_gradacc" / "token_budgets.json"


def tune_for_real(tmp_path, rows=ROWS, **options):
    trainer = make_trainer(
        tmp_path,
        rows,
        **{
            "effective_batch_size": 12,
            "max_tokens_per_micro_batch": "auto",
            "remember_tuned_budget": True,
            "num_train_epochs": 12,
            **options,
        },
    )
    trainer.train()
    return trainer.token_budget.tuner


@pytest.mark.slow
def test_a_budget_is_tuned_once_per_model_device_and_range_of_lengths(tmp_path, cache):
    first = tune_for_real(tmp_path)
    assert first.num_updates > 1
    again = tune_for_real(tmp_path)
    assert (again.tokens, again.num_updates, again.settled) == (first.tokens, 1, True)
    assert "as an earlier run tuned it" in again.describe()
    for other in (
        {"rows": ragged_rows(24, seed=7, longest=40)},
        {"model": tiny_llama(num_hidden_layers=1)},
        {"target_only_logits": False},
    ):
        assert tune_for_real(tmp_path, **other).num_updates > 1
    assert len(json.loads(cache.read_text())) == 4


def test_nothing_is_remembered_unless_asked(tmp_path, cache):
    tune_for_real(tmp_path, remember_tuned_budget=False)
    assert not cache.exists()


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "b"}', "\ud800"])
def test_a_file_that_says_nothing_is_tuned_over(tmp_path, cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert tune_for_real(tmp_path).num_updates > 1
    assert tune_for_real(tmp_path).num_updates == 1


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path, cache, caplog):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    assert tune_for_real(tmp_path).settled


def test_remembering_without_tuning_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="tunes nothing: set it to 'auto'"):
        GradAccArguments(
            output_dir=str(tmp_path), remember_tuned_budget=True, max_tokens_per_micro_batch=512
        )


# --- trees and rows take turns -----------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize(("of_trees", "expected"), [(0.5, True), (1.5, False)])
def test_the_layout_that_is_faster_here_stays(of_trees, expected, lag):
    turns, planned = LayoutTurns(), [True] * lag
    while not turns.settled:
        planned.append(turns.with_trees)
        way = planned.pop(0)
        turns.note(way, seconds=(of_trees if way else 1.0) * 70, num_tokens=70)
        assert sum(map(len, turns.tried.values())) <= 12
    assert turns.with_trees is expected


@pytest.mark.parametrize("compared", [0, 2])
def test_where_trees_never_save_enough_turns_settle_on_rows(compared):
    turns = LayoutTurns()
    for way in [True, False] * compared:
        turns.note(way, seconds=0.5 if way else 1.0, num_tokens=70)
    for num_updates in range(1, 21):
        assert not turns.settled
        turns.note_without_saving()
        assert turns.num_without_saving == num_updates
    assert (turns.settled, turns.with_trees) == (True, False)
    assert turns.describe() == "layout: rows, since trees would have saved too little in 20 updates"


def test_what_was_settled_stays_whatever_later_updates_save():
    turns = LayoutTurns()
    while not turns.settled:
        turns.note(turns.with_trees, seconds=0.5 if turns.with_trees else 1.0, num_tokens=70)
    for _ in range(30):
        turns.note_without_saving()
    assert turns.with_trees
    assert turns.describe().startswith("layout: trees")


HEAD = list(range(5, 25))
ALIKE = [
    {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
    for ids in (HEAD + row["input_ids"] for row in ROWS)
]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("faster", ["trees", "rows"])
def test_a_run_that_tunes_compares_both_and_goes_on_with_the_faster(
    tmp_path, monkeypatch, faster, workers
):
    note = LayoutTurns.note

    def timed(turns, with_trees, *, seconds, num_tokens):
        seconds = num_tokens * (1.0 if with_trees == (faster == "trees") else 2.0)
        note(turns, with_trees, seconds=seconds, num_tokens=num_tokens)

    monkeypatch.setattr(LayoutTurns, "note", timed)
    noting = Noting()
    trainer = noting.trainer = make_trainer(
        tmp_path,
        ALIKE,
        callbacks=[noting],
        effective_batch_size=12,
        max_tokens_per_micro_batch="auto",
        num_train_epochs=20,
        learning_rate=0.0,
        dataloader_num_workers=workers,
    )
    trainer.train()
    turns = trainer.token_budget.turns
    assert turns.settled
    assert turns.with_trees == trainer.update_collator.takes_trees == (faster == "trees")
    shared = [stats.num_shared_tokens > 0 for stats in noting.kept]
    assert {True, False} == set(shared)
    assert set(shared[-4:]) == {faster == "trees"}


def test_a_run_whose_updates_hold_no_rows_that_begin_alike_settles_on_rows(tmp_path):
    """Every other row does, and an update is two rows."""
    others = [
        {name: list(reversed(row[name])) for name in row} if i % 2 else row
        for i, row in enumerate(ALIKE)
    ]
    trainer = make_trainer(
        tmp_path,
        others,
        effective_batch_size=2,
        train_sampling_strategy="sequential",
        max_tokens_per_micro_batch="auto",
        max_steps=44,
        learning_rate=0.0,
    )
    trainer.train()
    assert trainer.update_collator.shares_prefixes
    turns = trainer.token_budget.turns
    assert (turns.settled, turns.with_trees) == (True, False)
    assert not trainer.update_collator.takes_trees


class Noting(TrainerCallback):
    """Keeps the statistics of each update."""

    def __init__(self):
        self.kept = []

    def on_step_end(self, args, state, control, **kwargs):
        self.kept.append(self.trainer.last_update.stats)


def test_who_asks_for_trees_by_name_gets_them(tmp_path):
    trainer = make_trainer(
        tmp_path,
        ALIKE,
        layout="shared_prefix",
        effective_batch_size=12,
        max_tokens_per_micro_batch="auto",
        num_train_epochs=12,
        learning_rate=0.0,
    )
    trainer.train()
    assert trainer.token_budget.tuner.settled
    assert trainer.token_budget.turns.tried == {True: [], False: []}
    assert trainer.last_update.stats.num_shared_tokens > 0


def with_settled_budget():
    """A trainer whose budget is tuned, and whose trees and rows take turns from here on."""
    collator = UpdateCollator(pad, max_tokens=400)
    collator.share_prefixes(["a body"], by_rows=True)
    budget = TokenBudget()
    budget.begin("auto")
    budget.tuner.adopt(400)
    shortcuts = SimpleNamespace(bodies=("a body",))
    args = SimpleNamespace(device=torch.device("cpu"), layout="auto")
    trainer = SimpleNamespace(args=args, shortcuts=shortcuts, update_collator=collator)
    return trainer, collator, budget


@pytest.mark.parametrize("fails", [False, True])
def test_an_update_that_ran_out_of_memory_and_ran_again_is_not_compared(fails):
    trainer, collator, budget = with_settled_budget()
    with timed_for_budget(trainer, torch.nn.Identity(), collator(ALIKE), budget):
        if fails:
            budget.shrink_to(200)
    assert len(budget.turns.tried[True]) == (0 if fails else 1)


def test_updates_that_measure_noise_do_not_say_that_trees_save_too_little():
    trainer, collator, budget = with_settled_budget()
    collator.noise_scale_every = 1
    for _ in range(25):
        with timed_for_budget(trainer, torch.nn.Identity(), collator(ALIKE), budget):
            pass
    turns = budget.turns
    assert (turns.settled, turns.num_without_saving, collator.takes_trees) == (False, 0, True)

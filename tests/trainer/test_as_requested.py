"""Everybody but the stock loop sees the arguments as the user wrote them."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import pickle
import textwrap
from dataclasses import dataclass, fields

import pytest
import torch
from support.tiny import make_trainer, pad, ragged_rows
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_gradacc import ConfigError, GradAccArguments, GradAccMixin, GradAccTrainer
from hf_gradacc.arguments import GradAccOptions
from hf_gradacc.trainer import as_requested

ROWS = ragged_rows(16, seed=3)
OPTIONS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
HOOKS = (
    "_clip_grad_norm",
    "_get_grad_norm",
    "_get_train_sampler",
    "_maybe_log_save_evaluate",
    "compute_loss",
    "create_optimizer",
    "create_scheduler",
    "floating_point_ops",
    "get_batch_samples",
    "get_train_dataloader",
    "log",
    "training_step",
)


def looking(seen):
    """A trainer whose every hook, before and behind the mixin, looks at the arguments."""

    def hook(name, where):
        def look(self, *args, **kwargs):
            seen.add((where, name, self.args.gradient_accumulation_steps))
            return getattr(super(classes[where], self), name)(*args, **kwargs)

        return look

    classes = {}
    classes["behind"] = type("Behind", (Trainer,), {n: hook(n, "behind") for n in HOOKS})
    between = type("Ours", (GradAccMixin, classes["behind"]), {})
    classes["before"] = type("Before", (between,), {n: hook(n, "before") for n in HOOKS})
    return classes["before"]


class LooksToo(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen


def _event(name):
    def look(self, args, state, control, **kwargs):
        self.seen.add(("callback", name, args.gradient_accumulation_steps))

    return look


EVENTS = ("on_train_begin", "on_step_begin", "on_substep_end", "on_step_end", "on_log")
for _name in EVENTS:
    setattr(LooksToo, _name, _event(_name))


def test_hooks_before_and_behind_the_mixin_and_callbacks_see_what_was_written(tmp_path):
    seen = set()
    trainer = make_trainer(
        tmp_path,
        ROWS,
        trainer_class=looking(seen),
        callbacks=[LooksToo(seen)],
        max_grad_norm=1.0,
        **OPTIONS,
    )
    trainer.train()
    assert {steps for *_, steps in seen} == {4}
    assert {name for where, name, _ in seen if where == "before"} == set(HOOKS)
    assert {name for where, name, _ in seen if where == "callback"} == set(EVENTS)
    assert {name for where, name, _ in seen if where == "behind"} == set(HOOKS)
    assert trainer.state.global_step == 2  # updates of eight rows


def test_the_stock_loop_sees_one_batch_per_step_while_it_runs_and_only_then(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, **OPTIONS)
    as_requested.hide_from_stock_loop(trainer.args)
    loop = compile("args.gradient_accumulation_steps", "loop", "eval")

    def read(code):
        return eval(code, {"args": trainer.args})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(as_requested, "_LOOP", frozenset([loop]))
        assert read(loop) == 4
        with as_requested.stock_loop_sees_one_batch(trainer.args):
            assert read(loop) == 1
            assert trainer.args.gradient_accumulation_steps == 4
        assert read(loop) == 4


@dataclass
class OptionsLast(TrainingArguments, GradAccOptions):
    """Our options behind the stock arguments."""


@pytest.mark.parametrize("arguments_class", [GradAccArguments, OptionsLast])
def test_it_does_not_matter_in_which_order_arguments_are_put_together(tmp_path, arguments_class):
    trainer = make_trainer(tmp_path, ROWS, arguments_class=arguments_class, **OPTIONS)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.args.gradient_accumulation_steps == 4


def test_arguments_can_be_copied_and_pickled_and_made_anew_as_before(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, **OPTIONS)
    trainer.train()
    for copied in (copy.deepcopy(trainer.args), pickle.loads(pickle.dumps(trainer.args))):
        assert copied.to_dict() == trainer.args.to_dict()
        assert copied.gradient_accumulation_steps == 4
    other = dataclasses.replace(trainer.args, gradient_accumulation_steps=2)
    assert (other.gradient_accumulation_steps, trainer.args.gradient_accumulation_steps) == (2, 4)
    (default,) = (f.default for f in fields(GradAccArguments) if f.name == "logging_nan_inf_filter")
    assert default is True
    assert GradAccArguments(output_dir=str(tmp_path)).gradient_accumulation_steps == 1
    assert GradAccArguments.gradient_accumulation_steps == 1


@pytest.mark.parametrize("method", ["_inner_training_loop", "_init_training_state", "_run_epoch"])
def test_stock_reads_what_is_hidden_in_the_body_of_its_loop(method):
    """Inside of a lambda or a comprehension another code object would read, and see the rest."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(Trainer, method))))
    inner = (ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp, ast.FunctionDef)
    for node in ast.walk(tree.body[0]):
        if node is tree.body[0] or not isinstance(node, inner):
            continue
        names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        assert not names & set(as_requested._LOOP_SEES)


@pytest.mark.parametrize("takes_dataset", [True, False])
def test_a_sampler_of_ones_own_is_asked_as_stock_asks(tmp_path, takes_dataset):
    asked = []

    class WithDataset(GradAccTrainer):
        def _get_train_sampler(self, train_dataset):
            asked.append(train_dataset)
            return SequentialSampler(train_dataset)

    class Without(GradAccTrainer):
        def _get_train_sampler(self):
            asked.append(self.train_dataset)
            return SequentialSampler(self.train_dataset)

    seen = []

    def collate(rows):
        seen.extend(row["input_ids"] for row in rows)
        return pad(rows)

    trainer = make_trainer(
        tmp_path,
        ROWS,
        trainer_class=WithDataset if takes_dataset else Without,
        data_collator=collate,
        **OPTIONS,
    )
    trainer.train()
    assert asked
    assert all(dataset is trainer.train_dataset for dataset in asked)
    # Each update of eight rows, in the dataset's order; sorted inside by length.
    trained = seen[-16:]
    for start in (0, 8):
        expected = sorted(row["input_ids"] for row in ROWS[start : start + 8])
        assert sorted(trained[start : start + 8]) == expected


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo"])
@pytest.mark.parametrize(
    "cut", [OPTIONS, {"effective_batch_size": 8, "max_tokens_per_micro_batch": 64}]
)
def test_an_optimizer_that_steps_in_each_backward_is_refused_for_several(tmp_path, optim, cut):
    trainer = make_trainer(tmp_path, ROWS, optim=optim, optim_target_modules="all-linear", **cut)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(ConfigError, match=f"optim = '{optim}' .* cannot accumulate"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_it_is_let_through_where_an_update_is_one_micro_batch(tmp_path):
    """As stock does; here it then fails for want of the package that holds it."""
    options = {"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}
    trainer = make_trainer(tmp_path, ROWS, gradient_accumulation_steps=1, **options)
    with pytest.raises(ImportError, match="galore"):
        trainer.train()

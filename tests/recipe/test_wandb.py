"""A recipe's W&B section: what turns W&B on, what wins, and what runs say of it when read back."""

from __future__ import annotations

import json
import os

import pytest
import wandb
from support.tracked import no_wandb_login
from support.wandb_reader import find_wandb_files, read_wandb_file

from hf_gradacc.recipe.load import load_recipe, recipe_arguments
from hf_gradacc.recipe.run import train_recipe
from hf_gradacc.recipe.wandb import configure_wandb, tracking_remarks

RECIPE = """\
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 1}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: question_answer}
train: {max_steps: 1, effective_batch_size: 2, use_cpu: true, disable_tqdm: true,
        save_strategy: no, logging_steps: 1}
"""
SECTION = """\
wandb: {project: p, name: n, entity: e, group: g, tags: [a, b], notes: of the recipe}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write a recipe and load it; the environment is as before afterwards."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(extra="", *overrides, name="mine"):
        (tmp_path / f"{name}.yaml").write_text(RECIPE + extra)
        return load_recipe(tmp_path / f"{name}.yaml", overrides=overrides)

    return write


tracked = pytest.fixture(no_wandb_login)


def end_run():
    wandb.finish()
    wandb.teardown()


@pytest.mark.parametrize(
    ("extra", "overrides", "reporters"),
    [
        ("", (), []),
        (SECTION, (), ["wandb"]),
        ("wandb: {}\n", (), ["wandb"]),
        ("", ("wandb.project=p",), ["wandb"]),
        (SECTION, ("wandb=null",), []),
        (SECTION, ("train.report_to=none",), []),
        (SECTION, ("train.report_to=null",), ["wandb"]),
        (SECTION, ("train.report_to=[tensorboard,wandb]",), ["tensorboard", "wandb"]),
    ],
    ids=["nothing", "section", "empty", "override", "null", "report_to", "null again", "both"],
)
def test_a_section_turns_wandb_on_unless_report_to_says_otherwise(
    load, extra, overrides, reporters
):
    recipe = load(extra, *overrides)
    assert recipe_arguments(recipe).report_to == reporters
    again = type(recipe).model_validate(recipe.model_dump())
    assert recipe_arguments(again).report_to == reporters, "as it is saved"


def test_keys_without_effect_are_named_once(load):
    def remarks(*overrides, **changes):
        recipe = load(SECTION, *overrides)
        return list(tracking_remarks(recipe, recipe_arguments(recipe, **changes)))

    (line,) = remarks("train.report_to=none")
    assert line.startswith("W&B: off, since report_to = 'none' leaves it out; wandb.project, ")
    assert "wandb.tags" in line
    assert "wandb.name" not in line, "it names the run on the terminal and in its files, too"
    assert remarks() == []
    assert not list(tracking_remarks(load(), recipe_arguments(load())))
    os.environ["WANDB_DISABLED"] = "true"
    assert remarks()[0].startswith("W&B: off, since WANDB_DISABLED is set; wandb.project")
    assert recipe_arguments(load(SECTION)).report_to == []


@pytest.mark.slow
def test_the_section_reaches_the_run_and_the_next_recipe_of_the_process_has_its_own(
    load, tracked, capsys
):
    train_recipe(load(SECTION))
    wandb.finish()
    train_recipe(load("wandb: {tags: [c]}\n", name="second"))
    end_run()
    first, second = map(read_wandb_file, find_wandb_files(tracked))
    assert (first.project, first.name, first.entity) == ("p", "n", "e")
    assert (first.group, first.tags, first.notes) == ("g", ["a", "b"], "of the recipe")
    assert (second.project, second.name, second.tags) == ("hf-gradacc", "second", ["c"])
    assert (second.group, second.entity, second.notes) == ("", "", "")


@pytest.mark.slow
def test_the_environment_wins_and_a_line_says_so(load, tracked, monkeypatch, capsys):
    given = {
        "PROJECT": "p2", "NAME": "n2", "ENTITY": "e2", "RUN_GROUP": "g2", "TAGS": "x,y",
        "NOTES": "of the environment", "MODE": "offline",
    }  # fmt: skip
    for name, value in given.items():
        os.environ[f"WANDB_{name}"] = value
    result = train_recipe(load(SECTION, "wandb.mode=online"))
    end_run()
    (path,) = find_wandb_files(tracked)
    run = read_wandb_file(path)
    assert (run.project, run.name, run.entity) == ("p2", "n2", "e2")
    assert (run.group, run.tags, run.notes) == ("g2", ["x", "y"], "of the environment")
    out = capsys.readouterr().out
    for name, value in given.items():
        assert f"W&B: WANDB_{name} = {value!r} wins over wandb." in out
    assert result.trainer.args.run_name == "n2"


@pytest.mark.slow
def test_a_disabled_wandb_writes_nothing_and_training_goes_on(load, tracked, capfd):
    os.environ["WANDB_MODE"] = "disabled"
    result = train_recipe(load(SECTION))
    end_run()
    assert result.trainer.state.global_step == 1
    assert find_wandb_files(tracked) == []
    printed = capfd.readouterr()
    assert "Training goes on without it" not in printed.out + printed.err


def test_what_a_recipe_sets_is_gone_when_the_next_one_is_configured(load):
    os.environ["WANDB_ENTITY"] = "mine"
    configure_wandb(load(SECTION))
    assert (os.environ["WANDB_TAGS"], os.environ["WANDB_ENTITY"]) == ("a,b", "mine")
    configure_wandb(load("wandb: {project: other}\n"))
    assert "WANDB_TAGS" not in os.environ
    assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_ENTITY"]) == ("other", "mine")

"""W&B sweeps: what an agent draws reaches the run, each run is its own, mistakes are found before.

The agent's part is W&B's own code that makes its commands; its server's part is played here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from support.patience import HUNG_AFTER_SECONDS
from support.tracked import no_wandb_login
from support.wandb_reader import find_wandb_files, read_wandb_file
from wandb.sdk.lib import config_util

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.file.problems import RecipeError
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.shipped import copy_recipe
from hf_gradacc.recipe.sweep import check_sweep, describe_sweep
from hf_gradacc.tracking.wandb_start import start_rank_run

ROOT = Path(__file__).parents[2]
RECIPE = """\
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 1}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: question_answer, holdout: 4}
train: {max_steps: 1, effective_batch_size: 4, use_cpu: true, logging_steps: 1}
wandb: {project: swept}
"""
SWEEP = """\
program: hf_gradacc
command: ["${env}", "${interpreter}", -m, "${program}", train, mine.yaml, "${args}"]
method: random
metric: {name: eval/loss, goal: minimize}
parameters:
  train.learning_rate: {distribution: log_uniform_values, min: 0.001, max: 0.01}
  train.effective_batch_size: {values: [2, 4]}
  peft.target_modules: {value: null}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"question": "{i}?", "answer": "{"7" * i}"}}\n' for i in range(1, 20))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


tracked = pytest.fixture(no_wandb_login)


def start_run(folder, run_id, drawn, *, macro):
    """What `Agent._command_run` of wandb does for one run, by the functions it does it with."""
    # Not above: it takes seconds, and each worker of the tests imports each file.
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    command = yaml.safe_load((folder / "sweep.yaml").read_text())["command"]
    chosen = create_sweep_command([macro if token == "${args}" else token for token in command])
    values = {key: {"value": value} for key, value in drawn.items()}
    told = create_sweep_command_args({"args": values}) | {
        "interpreter": [sys.executable], "program": ["hf_gradacc"], "env": ["/usr/bin/env"],
    }  # fmt: skip
    filled = []
    for token in chosen:
        filled += told[token[2:-1]] if token.startswith("${") else [token]
    config = folder / f"config-{run_id}.yaml"
    config_util.save_config_file_from_dict(str(config), values)
    sweep = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": run_id, "WANDB_SWEEP_PARAM_PATH": str(config)}
    return subprocess.Popen(
        filled,
        env={**os.environ, **sweep, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_runs_of_a_sweep_train_as_drawn_each_with_its_own_name_and_folder(folder, tracked):
    draws = {
        "r1": ({"train.learning_rate": 0.0025, "train.effective_batch_size": 2}, "${args}"),
        "r2": (
            {"train.learning_rate": 1e-05, "peft.target_modules": None},
            "${args_no_hyphens}",
        ),
    }
    del draws["r2"][0]["peft.target_modules"]  # without hyphens a None is the text "None"
    draws["r1"][0]["peft.target_modules"] = None
    for run_id, (drawn, macro) in draws.items():
        process = start_run(folder, run_id, drawn, macro=macro)
        printed, _ = process.communicate(timeout=HUNG_AFTER_SECONDS)
        assert process.returncode == 0, printed
        assert "Ignoring" not in printed
    runs = {run.run_id: run for run in map(read_wandb_file, find_wandb_files(tracked))}
    assert set(runs) == {"r1", "r2"}
    for run_id, (drawn, _) in draws.items():
        run = runs[run_id]
        assert (run.sweep_id, run.name, run.project) == ("s1", f"mine-{run_id}", "swept")
        assert len(run.rows_with("eval/loss")) == 1
        (row,) = run.rows_with("train/loss")
        assert row["train/effective_batch_size"] == drawn.get("train.effective_batch_size", 4)
        assert run.config["learning_rate"] == drawn["train.learning_rate"]
        assert run.config["train.learning_rate"] == drawn["train.learning_rate"], "as W&B drew it"
        assert (folder / f"runs/mine-sweep-s1/{run_id}/model.safetensors").is_file()


def test_outside_of_a_sweep_names_and_folders_are_the_recipes(folder):
    recipe = load_recipe(folder / "mine.yaml", overrides=["--train.learning_rate=1e-05"])
    assert (recipe.output.dir, recipe.wandb.name) == ("runs/mine", "mine")
    assert recipe.train["learning_rate"] == 1e-05
    os.environ |= {"WANDB_SWEEP_ID": "s/1", "WANDB_RUN_ID": "../r"}
    recipe = load_recipe(folder / "mine.yaml")
    assert recipe.output.dir == "runs/mine-sweep-s-1/-r", "never outside of its folder"


def test_another_ranks_run_of_a_sweep_is_not_rank_0s(folder, tracked):
    os.environ |= {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1", "WANDB_MODE": "offline"}
    arguments = SimpleNamespace(process_index=1, report_to=["wandb"])
    run = start_rank_run(arguments, run_id="r1", name="mine", group="g", config={})
    assert run.id == "r1-rank1"
    run.finish()
    wandb.teardown()


def test_a_sweep_that_fits_is_described_with_the_commands_that_start_it(folder):
    sweep = check_sweep("mine.yaml", Path("sweep.yaml"))
    lines = list(describe_sweep(sweep))
    assert lines[0] == "Sweep of 3 parameters, random, until it is stopped"
    assert "  train.effective_batch_size  2, 4" in lines
    assert any(line.endswith("runs/mine-sweep-SWEEP/RUN") for line in lines)
    assert lines[-2:] == [
        "  wandb sweep --project swept sweep.yaml",
        "  wandb agent ENTITY/PROJECT/SWEEP",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("train.learning_rate", "train.learning_rat", 6, "did you mean train.learning_rate?"),
        ("[2, 4]", "[2, 4.5]", 7, "train.effective_batch_size = 4.5"),
        ("min: 0.001", "min: -1.0", 6, "train.learning_rate"),
        ("max: 0.01", "max: 1e-2", 6, "is text to W&B"),
        ("eval/loss", "eval_loss", 4, "did you mean eval/loss?"),
        ("random", "bayesian", 3, "did you mean bayes?"),
        ("random", "grid", 6, "is a range, and a grid takes values"),
        ("${args}", "${args_no_equals}", 2, "puts a blank between key and value"),
        (', "${args}"', "", 2, "passes no parameters on"),
        ("mine.yaml", "other.yaml", 2, "does not train mine.yaml"),
        ("command:", "comand:", None, "add `program: hf_gradacc` and `command:"),
        ("max: 0.01", "max: 0.0001", 6, "above max"),
    ],
)
def test_a_mistake_in_a_sweep_is_found_by_its_line(folder, old, new, line, said):
    Path("sweep.yaml").write_text(SWEEP.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        check_sweep("mine.yaml", Path("sweep.yaml"))
    assert said in str(caught.value)
    assert f"sweep.yaml:{line}: " in str(caught.value) or line is None


def test_a_sweep_by_held_out_loss_needs_held_out_rows(folder):
    Path("mine.yaml").write_text(RECIPE.replace(", holdout: 4", "").replace("wandb:", "#"))
    with pytest.raises(RecipeError) as caught:
        check_sweep("mine.yaml", Path("sweep.yaml"))
    assert "needs held-out rows" in str(caught.value)
    assert "does not report to W&B" in str(caught.value)


def test_the_shipped_sweep_is_copied_with_its_recipe_and_fits_it(folder, capsys):
    copy_recipe("quickstart", Path("copied.yaml"))
    assert "copied: copied_sweep.yaml" in capsys.readouterr().out
    assert check_sweep("copied.yaml", Path("copied_sweep.yaml")).method == "bayes"
    Path("copied.yaml").unlink()
    with pytest.raises(ConfigError, match="copied_sweep"):
        copy_recipe("quickstart", Path("copied.yaml"))
    shipped = ROOT / "recipes" / "sweeps" / "quickstart.yaml"
    assert check_sweep("quickstart", shipped).parameters.keys() >= {"train.learning_rate"}

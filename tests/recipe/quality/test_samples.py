"""Answers while training: where they go, and that training is the same bit for bit without them."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from safetensors.torch import load_file
from support.tracked import no_wandb_login
from support.wandb_reader import find_wandb_files, read_wandb_file

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.recipe.file.problems import RecipeError
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.quality.samples import add_samples, split_row
from hf_gradacc.recipe.run import train_recipe
from hf_gradacc.tracking.report import build_report
from hf_gradacc.tracking.run_files import read_log

RECIPE = """\
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
           num_attention_heads: 2, num_key_value_heads: 1, attention_dropout: 0.2}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: question_answer, holdout: 4}
train: {max_steps: 4, effective_batch_size: 4, use_cpu: true, logging_steps: 1, learning_rate: 0.01,
        save_strategy: steps, save_steps: 2, gradient_checkpointing: true, disable_tqdm: true}
wandb: {project: p, upload_text: true}
"""
SAMPLES = "samples: {every: 2, count: 2, max_new_tokens: 6, temperature: 1.0}"


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory, module_patch):
    folder = tmp_path_factory.mktemp("samples")
    module_patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    ours = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    module_patch.setattr(os, "environ", ours)
    module_patch.chdir(folder)
    rows = [{"question": f"secret {i}?", "answer": "7" * i} for i in range(1, 20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "without.yaml").write_text(RECIPE)
    (folder / "with.yaml").write_text(RECIPE + SAMPLES + "\n")
    return folder


@pytest.fixture(scope="module")
def tracked(folder, module_patch):
    yield from no_wandb_login(folder, module_patch)


def weights(path):
    return load_file(path / "model.safetensors")


def is_same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def runs(folder, tracked):
    """A run without samples; one with; and that one again from its middle. Read back afterwards."""
    train_recipe(load_recipe("without.yaml", overrides=["train.report_to=none"]))
    train_recipe(load_recipe("with.yaml"))
    wandb.finish()
    wandb.teardown()
    (path,) = find_wandb_files(tracked)
    resumed = load_recipe("with.yaml", overrides=["train.report_to=none", "output.dir=runs/again"])
    (folder / "runs/again").mkdir()
    train_recipe(resumed, resume="runs/with/checkpoint-2")
    return SimpleNamespace(folder=folder / "runs", wandb=read_wandb_file(path), path=path)


@pytest.mark.slow
def test_weights_are_those_of_a_run_without_samples_bit_for_bit(runs):
    plain = weights(runs.folder / "without")
    assert is_same(plain, weights(runs.folder / "with"))
    assert is_same(plain, weights(runs.folder / "again")), "gone on from the middle"


@pytest.mark.slow
def test_answers_are_in_the_runs_file_and_its_report(runs):
    looks = [row for row in read_log(runs.folder / "with/gradacc_log.jsonl") if "samples" in row]
    assert [look["step"] for look in looks] == [2, 4]
    first = looks[0]["samples"]
    assert len(first) == 2
    assert first[0]["prompt"].startswith("<|") or "secret" in first[0]["prompt"]
    assert set(first[0]["expected"]) == {"7"}
    assert first != looks[1]["samples"], "the model has learned in between"
    again = [row for row in read_log(runs.folder / "again/gradacc_log.jsonl") if "samples" in row]
    assert again[-1]["samples"] == looks[1]["samples"]
    build_report([runs.folder / "with"], html=runs.folder / "report.html")
    page = (runs.folder / "report.html").read_text()
    assert "<h2>Samples</h2>" in page
    assert page.count("secret") >= 4


@pytest.mark.slow
def test_wandb_has_them_as_a_table_over_updates(runs):
    rows = runs.wandb.rows_with("samples/path")
    assert [row["train/global_step"] for row in rows] == [2, 4]
    table = json.loads((runs.path.parent / "files" / rows[0]["samples/path"]).read_text())
    assert table["columns"] == ["update", "prompt", "answer", "expected"]
    assert [row[0] for row in table["data"]] == [2, 2]
    assert "secret" in table["data"][0][1]


@pytest.mark.slow
def test_without_leave_no_text_reaches_wandb_not_even_from_the_terminal(folder, tmp_path, capsys):
    changes = ["wandb.upload_text=false", "output.dir=runs/kept", "train.max_steps=1"]
    changes += ["data.holdout=null", "train.save_strategy=no"]
    train_recipe(load_recipe("with.yaml", overrides=changes))
    assert wandb.run.settings.console == "off", "it would upload what is printed"
    wandb.finish()
    wandb.teardown()
    out = capsys.readouterr().out
    assert "samples after update 1\n  prompt    " in out
    assert "secret" in out
    assert "W&B: samples stay on this machine; wandb.upload_text: true uploads them" in out
    assert "samples: no rows are held out, so prompts are the first rows of data.train" in out
    (path,) = find_wandb_files(tmp_path)
    assert read_wandb_file(path).rows_with("train/loss")
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes(), file


def test_a_prompt_is_what_comes_before_the_first_answer():
    turns = {"input_ids": list(range(8)), "labels": [-100, -100, 2, 3, -100, -100, 6, 7]}
    assert split_row(turns) == ([0, 1], [2, 3])
    document = {"input_ids": list(range(100)), "labels": list(range(100))}
    assert split_row(document) == (list(range(32)), list(range(32, 100)))
    pair = {"input_ids": [5, 6], "labels": [7, 8, -100]}
    assert split_row(pair, is_seq2seq=True) == ([5, 6], [7, 8])
    for row in (turns, document):
        assert split_row({name: np.array(ids) for name, ids in row.items()}) == split_row(row)
    with pytest.raises(DataError, match="no prompt"):
        split_row({"input_ids": [5], "labels": [-100]})


def test_what_cannot_be_sampled_is_refused_before_training(folder):
    classify = ["model.task=classification", "data.format=classification"]
    with pytest.raises(RecipeError, match="a classifier writes none"):
        load_recipe("with.yaml", overrides=classify)
    with pytest.raises(ConfigError, match="samples under FSDP or ZeRO-3"):
        add_samples(SimpleNamespace(shards_weights=True), load_recipe("with.yaml"))

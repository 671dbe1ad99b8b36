"""A recipe's run: what is filed with W&B, kept out of it, and loaded safely."""

import json

import pytest
import torch
from support.bytes_tokenizer import bytes_tokenizer
from support.tracked import no_wandb_login, only_run

from hf_gradacc.data.section import ModelSection
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.model.load import load_model, model_config
from hf_gradacc.recipe.run import train_recipe

RECIPE = """\
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 1}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: question_answer}
train: {max_steps: 1, effective_batch_size: 2, use_cpu: true, disable_tqdm: true,
        report_to: wandb, save_strategy: no, logging_steps: 1}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "mine.yaml")


tracked = pytest.fixture(no_wandb_login)


@pytest.mark.slow
def test_the_resolved_recipe_is_filed_with_the_run_and_no_secret_is(
    recipe, tracked, tmp_path, monkeypatch
):
    import os

    import wandb

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("HF_TOKEN", "hf_of-the-environment")
    recipe.wandb.project, recipe.wandb.report = "recipes-tested", True
    recipe.peft.options = {"api_key": "do-not-tell"}
    train_recipe(recipe)
    wandb.finish()
    wandb.teardown()  # its service has written everything once it is gone
    run = only_run(tracked)
    assert run.project == "recipes-tested"
    assert run.artifacts[f"report-{run.run_id}"] == ["report.html", "report.png"]
    assert run.config["recipe"]["data"]["train"][0]["path"] == str(tmp_path / "rows.jsonl")
    assert run.config["recipe"]["train"]["effective_batch_size"] == 2
    assert "do-not-tell" not in json.dumps(run.config)
    for file in tmp_path.rglob("*"):  # the W&B run, the recipe, logs, weights and arguments
        content = file.read_bytes() if file.is_file() else b""
        assert b"do-not-tell" not in content, file
        assert b"hf_of-the-environment" not in content, file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4]),
        ({"eval_strategy": "no"}, [4]),
        ({"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 9}, [4]),
        # The first model stays the best: it is loaded at the end, and evaluated then.
        (
            {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
             "save_strategy": "steps", "save_steps": 2, "greater_is_better": True},
            [2, 4, 4],
        ),
    ],
    ids=["at its end", "never", "not yet", "another model"],
)  # fmt: skip
def test_the_model_that_is_saved_is_evaluated_once(recipe, tmp_path, changes, steps):
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.data.holdout = 0.5
    result = train_recipe(recipe, max_steps=4, report_to="none", **changes)
    rows = [row for row in result.trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in rows] == steps
    assert result.metrics["eval_loss"] == rows[-1]["eval_loss"]


class Tokenizer:
    """As much of a tokenizer as a config asks for."""

    bos_token_id = None
    eos_token_id = pad_token_id = 0

    def __len__(self):
        return 8


def test_weights_that_are_not_safetensors_are_refused(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    section = ModelSection(
        config={"model_type": "llama", **sizes, "num_attention_heads": 1, "num_key_value_heads": 1}
    )
    model = load_model(section, tokenizer=Tokenizer())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_model(ModelSection(name=str(tmp_path)), tokenizer=Tokenizer())


def test_code_of_a_model_is_not_run_unless_asked(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.MineConfig"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(ConfigError, match=r"model\.name"):
        model_config(ModelSection(name=str(tmp_path)), tokenizer=Tokenizer())


def test_a_config_value_is_changed_by_override_and_a_misspelt_one_refused(tmp_path):
    section = ModelSection(config={"model_type": "llama", "hidden_size": 32})
    model_config(section, tokenizer=Tokenizer()).save_pretrained(tmp_path)
    changed = ModelSection(name=str(tmp_path), overrides={"attention_dropout": 0.5})
    assert model_config(changed, tokenizer=Tokenizer()).attention_dropout == 0.5
    misspelt = ModelSection(name=str(tmp_path), overrides={"atention_dropout": 0.5})
    with pytest.raises(ConfigError, match="did you mean attention_dropout"):
        model_config(misspelt, tokenizer=Tokenizer())


@pytest.mark.parametrize(("given", "first"), [({}, 0), ({"decoder_start_token_id": 7}, 7)])
def test_a_new_model_of_two_parts_knows_the_token_that_its_answers_begin_with(given, first):
    tokenizer = bytes_tokenizer(None, [])
    tokenizer.pad_token_id = 0
    section = ModelSection(task="seq2seq", config={"model_type": "t5", "d_model": 16, **given})
    assert model_config(section, tokenizer=tokenizer).decoder_start_token_id == first

"""The card beside a model: what the hub reads of it, its figures, and what it never holds."""

import json
import math

import pytest
import transformers
from huggingface_hub import ModelCard
from support.tiny import make_trainer, ragged_rows

from hf_gradacc import GradAccMixin
from hf_gradacc.after.merge import merge_run
from hf_gradacc.recipe.card import data_lines
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.tracking.card import CardFacts, find_license, write_card

pytestmark = pytest.mark.slow


def table_of(card):
    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line[:2] == "| "]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_a_run_leaves_a_card_with_its_figures(runs):
    card = ModelCard.load(runs / "run" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None, "a folder of this machine is no model of the hub"
    log = (runs / "run" / "gradacc_log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    figures = table_of(card)
    assert figures["updates"] == "60"
    assert figures["learned tokens seen"] == "3,000"
    assert figures["held-out loss"] == f"{held_out:.4f}"
    assert figures["held-out perplexity"] == f"{math.exp(held_out):.4g}"
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert figures["training loss"] == f"{losses[0]:.4g} at first, {losses[-1]:.4g} at last"
    for words in (
        "An update held 3 sequences",
        "trained on: `run.jsonl`, a local file, read as `question_answer`",
        "learning rate 0.01 (constant)",
        "transformers " + transformers.__version__,
        "![Loss over updates](training.png)",
        'AutoModelForCausalLM.from_pretrained("run")',
        "[recipe.yaml](recipe.yaml)",
    ):
        assert words in card.text, words
    assert (runs / "run" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["run", "adapter", "classes"])
def test_a_card_holds_no_row_and_no_path(runs, name):
    text = (runs / name / "README.md").read_text()
    assert str(runs) not in text
    for words in ("Nobody knows", "Seven", "red."):
        assert words not in text


def test_an_adapters_card_says_what_it_is_and_how_it_is_loaded(runs):
    card = ModelCard.load(runs / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    assert "LoRA with r = 16" in card.text
    assert "from peft import AutoPeftModelForCausalLM" in card.text
    assert "training.png" not in card.text, "one log row is no plot"


def test_the_card_of_a_merged_model_loads_the_whole_model(runs, tmp_path):
    merge_run(runs / "adapter", tmp_path / "whole")
    card = ModelCard.load(tmp_path / "whole" / "README.md")
    assert card.data.library_name == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("whole")' in card.text
    assert "peft import" not in card.text


def test_somebodys_own_card_stays(tmp_path):
    facts = CardFacts("mine", training=["a | b"])
    (tmp_path / "README.md").write_text("# My own words")
    assert write_card(tmp_path, facts, []) is None
    assert (tmp_path / "README.md").read_text() == "# My own words"
    (tmp_path / "README.md").write_text("# Model Card for Model ID\n")  # peft's
    assert write_card(tmp_path, facts, []) is not None
    assert write_card(tmp_path, facts, []) is not None, "ours is written anew"


def test_names_of_the_hub_become_metadata(tmp_path):
    recipe = Recipe.model_validate(
        {
            "model": {"name": "gpt2"},
            "data": {
                "train": [{"path": "openai/gsm8k", "name": "main", "split": "train"}],
                "format": "text",
                "holdout": 0.1,
            },
        }
    )
    lines = data_lines(recipe)
    assert "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k) (main)" in lines[0]
    assert lines[1] == "held out: 0.1 of the rows"
    facts = CardFacts("mine", base="gpt2", base_is_public=True, license="mit",
                      datasets=["openai/gsm8k"], library="peft")  # fmt: skip
    card = ModelCard.load(write_card(tmp_path, facts, []))
    assert card.data.base_model == "gpt2"
    assert card.data.get("base_model_relation") == "adapter"
    assert card.data.license == "mit"
    assert card.data.datasets == ["openai/gsm8k"]


def test_a_license_is_that_of_the_base(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert find_license(str(tmp_path)) == "apache-2.0"
    assert find_license("nobody/offline") is None


def test_a_trainer_with_a_card_of_its_own_writes_that(tmp_path):
    class Own(transformers.Trainer):
        def create_model_card(self, model_name=None, dataset_name=None):
            self.written = (model_name, dataset_name)

    class Mixed(GradAccMixin, Own): ...

    trainer = make_trainer(tmp_path / "own", ragged_rows(2), trainer_class=Mixed)
    trainer.create_model_card(model_name="a", dataset_name="b")
    assert trainer.written == ("a", "b")


def test_your_own_trainer_writes_it_as_stock_does(tmp_path):
    trainer = make_trainer(tmp_path / "own", ragged_rows(6), max_steps=1)
    trainer.train()
    trainer.create_model_card(license="mit", tags="mine", model_name="own/model", dataset="rows")
    card = ModelCard.load(tmp_path / "own" / "README.md")
    assert card.data.license == "mit"
    assert card.data.tags == ["hf_gradacc", "mine"]
    assert "trained from random weights" in card.text
    assert 'from_pretrained("own/model")' in card.text
    assert "- rows" in card.text
    assert table_of(card)["updates"] == "1"

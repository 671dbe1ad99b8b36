"""Rows longer than a model's positions are refused early, by name and with the way out."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.bytes_tokenizer import bytes_tokenizer
from support.zoo_configs import tiny_config

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe import load_recipe
from hf_gradacc.recipe.model.positions import check_longest_row, check_max_length, find_positions
from hf_gradacc.recipe.run import RecipeCallback, build_trainer


def tiny(model_type, head="CausalLM", **changes):
    config = tiny_config(model_type, **changes)
    return getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        ("gpt2", "CausalLM"),
        ("opt", "CausalLM"),
        ("gptj", "CausalLM"),
        ("gpt_neo", "CausalLM"),
        ("biogpt", "CausalLM"),
        ("bart", "Seq2SeqLM"),
        ("marian", "Seq2SeqLM"),
        ("bert", "SequenceClassification"),
        ("roberta", "SequenceClassification"),
        ("distilbert", "SequenceClassification"),
        ("electra", "SequenceClassification"),
        ("mpnet", "SequenceClassification"),
    ],
)
def test_a_table_of_positions_is_as_long_as_the_longest_row_it_can_compute(model_type, head):
    model = tiny(model_type, head)
    found = find_positions(model)
    assert found.is_table

    def compute(length):
        ids = torch.full((1, length), 7)
        with torch.no_grad():
            model(input_ids=ids, **({"labels": ids} if head == "Seq2SeqLM" else {}))

    compute(found.count)
    with pytest.raises((IndexError, RuntimeError)):
        compute(found.count + 1)


@pytest.mark.parametrize("model_type", ["t5", "bloom", "mamba"])
def test_a_model_that_knows_distances_only_has_no_limit(model_type):
    head = "Seq2SeqLM" if model_type == "t5" else "CausalLM"
    assert find_positions(tiny(model_type, head)) is None


@pytest.mark.parametrize(
    ("parameters", "count"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 64),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            256,
        ),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, None),
    ],
)
def test_rotary_positions_are_those_the_config_stretches_to(parameters, count):
    found = find_positions(tiny("llama", rope_parameters=parameters))
    assert (None if found is None else found.count) == count
    assert found is None or not found.is_table


def test_rotary_positions_of_layers_that_differ_are_found():
    found = find_positions(tiny("gemma3_text"))
    assert found is not None
    assert not found.is_table


RECIPE = """\
model: {config: {model_type: gpt2, n_positions: 40, n_embd: 16, n_layer: 1, n_head: 2}}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: question_answer}
train: {max_steps: 1, effective_batch_size: 2, use_cpu: true, report_to: none, save_strategy: no}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the recipe with overrides; its longest row has 60 digits and a few tokens more."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "123" * n, "answer": "yes"} for n in (1, 5, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(RECIPE)
    return lambda *overrides: load_recipe(tmp_path / "r.yaml", overrides=overrides)


def named(tmp_path, model_type, **changes):
    """A folder with a model and a tokenizer."""
    tokenizer = bytes_tokenizer()
    config = tiny_config(model_type, vocab_size=300, **changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return ["model={config: null, name: ./base}", "tokenizer.train=null"]


def test_a_max_length_above_a_table_is_refused_before_data_are_read(load, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("the data were read")

    monkeypatch.setattr("hf_gradacc.recipe.run.prepare_data", read)
    with pytest.raises(ConfigError) as error:
        build_trainer(load("data.max_length=64"))
    assert str(error.value) == (
        "data.max_length = 64 is more than the 40 positions of this gpt2 model: lower it to 40, "
        "or set model.config.n_positions to 64."
    )


def test_a_trained_table_cannot_grow_so_that_is_no_way_out(load, tmp_path):
    overrides = named(tmp_path, "gpt2")
    with pytest.raises(ConfigError, match=r"lower it to 64\.$"):
        build_trainer(load(*overrides, "data.max_length=65"))


def test_rotary_positions_can_be_raised_by_override(load, tmp_path):
    overrides = [*named(tmp_path, "llama"), "data.max_length=65"]
    with pytest.raises(ConfigError, match=r"or set model\.overrides\.max_position_embeddings to"):
        build_trainer(load(*overrides))
    trainer, _ = build_trainer(load(*overrides, "model.overrides.max_position_embeddings=65"))
    assert trainer.model.config.max_position_embeddings == 65


def test_learned_prompts_take_positions_too(load):
    recipe = load("data.max_length=40", "peft={method: prompt_tuning, num_virtual_tokens: 8}")
    with pytest.raises(ConfigError, match=r"40 positions .*, 8 of them taken .*: lower it to 32"):
        build_trainer(recipe)


def test_the_longest_row_above_a_table_is_one_error_once_rows_are_measured(load):
    with pytest.raises(ConfigError) as error:
        build_trainer(load())
    text = str(error.value)
    assert text.startswith("data.max_length is not set, and the longest row of data.train has ")
    assert "more than the 40 positions of this gpt2 model: set data.max_length to 40" in text


def test_the_longest_row_above_rotary_positions_is_one_line(load, capsys):
    recipe = load()
    recipe.model.config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
    }
    build_trainer(recipe)
    lines = [line for line in capsys.readouterr().out.splitlines() if "positions" in line]
    assert len(lines) == 1
    assert lines[0].startswith("the longest row of data.train has ")
    assert "set data.max_length to 40, or set model.config.max_position_embeddings to " in lines[0]


def test_a_stream_of_unknown_lengths_is_named_before_a_table_ends_the_run(load):
    recipe = load("data.streaming=true")
    data = SimpleNamespace(reports=[])
    line = check_longest_row(recipe, tiny("gpt2"), data)
    assert "set data.max_length to 64 or less" in line
    recipe.data.max_length = 64
    assert check_longest_row(recipe, tiny("gpt2"), data) is None
    assert check_longest_row(load("data.streaming=true"), tiny("t5", "Seq2SeqLM"), data) is None


def test_a_script_that_copies_the_steps_is_told_as_well(load):
    callback = RecipeCallback(load("data.max_length=65"))
    with pytest.raises(ConfigError, match=r"data\.max_length = 65 is more than the 64 positions"):
        callback.on_init_end(None, None, None, model=tiny("gpt2"))


def test_targets_of_an_encoder_decoder_are_checked_too(load):
    recipe = load("data.max_target_length=65", "data.format=seq2seq", "model.task=seq2seq")
    with pytest.raises(ConfigError, match=r"data\.max_target_length = 65"):
        check_max_length(recipe, tiny("bart", "Seq2SeqLM"))

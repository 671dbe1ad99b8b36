"""A trained model stops where its rows end, also if the model it began as stops elsewhere."""

import json

import pytest
import torch
import transformers
from support import templates
from support.bytes_tokenizer import bytes_tokenizer

from hf_gradacc.recipe import load_recipe
from hf_gradacc.recipe.model.ends import find_turn_end, stop_tokens
from hf_gradacc.recipe.model.load import sample_answer
from hf_gradacc.recipe.run import train_recipe

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "tokens", "end"),
    [
        (templates.CHATML, templates.CHATML_TOKENS, "<|im_end|>"),
        (templates.TAGGED, templates.CHATML_TOKENS, "<|im_end|>"),
        (templates.THINKING, templates.CHATML_TOKENS, "<|im_end|>"),
        (templates.HEADERS, templates.HEADERS_TOKENS, "<|eot_id|>"),
        (templates.NO_SYSTEM, templates.NO_SYSTEM_TOKENS, "<end_of_turn>"),
        (templates.CLOSED, templates.CLOSED_TOKENS, "<|done|>"),
        (templates.RETURNED, templates.RETURNED_TOKENS, "<|return|>"),
        (PLAIN, [], None),
        ("{{ raise_exception('no') }}", [], None),
    ],
)
def test_the_end_of_a_turn_is_the_token_behind_the_answer(template, tokens, end):
    tokenizer = bytes_tokenizer(template, tokens)
    found = find_turn_end(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


def test_stop_tokens_are_read_wherever_a_model_has_them():
    def model(generation, config):
        holder = torch.nn.Module()
        holder.config = transformers.LlamaConfig(eos_token_id=config)
        holder.generation_config = transformers.GenerationConfig(eos_token_id=generation)
        return holder

    assert stop_tokens(model([3, 4], 5)) == [3, 4]
    assert stop_tokens(model(3, 5)) == [3]
    assert stop_tokens(model(None, 5)) == [5]
    assert stop_tokens(model(None, None)) == []
    assert stop_tokens(torch.nn.Linear(1, 1)) == []


RECIPE = """\
model: {name: base}
data: {train: rows.jsonl, format: FORMAT}
train: {max_steps: 60, effective_batch_size: 4, learning_rate: 1e-2, lr_scheduler_type: constant,
        use_cpu: true, disable_tqdm: true, report_to: none, save_strategy: no, logging_steps: 60}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Train a base model that stops at <|end|> only; what it wrote, and what the run said."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    transformers.set_seed(0)

    def train(*overrides, format="question_answer", template=templates.CHATML):
        tokenizer = bytes_tokenizer(template, templates.CHATML_TOKENS)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        transformers.LlamaForCausalLM(config).save_pretrained("base")
        tokenizer.save_pretrained("base")
        said = "Yes, so it is."
        rows = [{"question": "a" * n, "answer": said, "text": said} for n in (1, 2, 4, 7)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "r.yaml").write_text(RECIPE.replace("FORMAT", format))
        result = train_recipe(load_recipe("r.yaml", overrides=overrides))
        return result, capsys.readouterr().out

    return train


def answer(model, tokenizer, **options):
    turns = [{"role": "user", "content": "aaa"}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=40, do_sample=False, **options)
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_a_saved_model_stops_at_the_end_of_a_turn(run):
    result, said = run()
    model = transformers.AutoModelForCausalLM.from_pretrained(result.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folder)
    assert answer(model, tokenizer) == "Yes, so it is.<|im_end|>"
    # As the base model was set it would have gone on and answered itself.
    alone = transformers.GenerationConfig.from_pretrained("base")
    assert len(answer(model, tokenizer, generation_config=alone)) > 40
    lines = [line for line in said.splitlines() if "generation stops at" in line]
    assert lines == [
        "generation stops at '<|im_end|>', which ends the answers here; the model alone stops at "
        "'<|end|>'. generation_config.json is saved so."
    ]
    sample = sample_answer(result.trainer.model, result.data.train[0], tokenizer=tokenizer)
    assert sample[1] == "Yes, so it is."


@pytest.mark.slow
def test_an_adapter_is_saved_with_the_settings_that_stop_it(run):
    import peft

    result, said = run("peft={method: lora, r: 16}", "train.max_steps=90")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(result.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folder)
    settings = transformers.GenerationConfig.from_pretrained(result.folder)
    assert answer(model, tokenizer, generation_config=settings) == "Yes, so it is.<|im_end|>"
    assert len(answer(model, tokenizer)) > 40  # with the base's settings
    assert f'GenerationConfig.from_pretrained("{result.folder}")' in said


def test_a_model_that_stops_there_already_is_left_alone(run):
    result, said = run("train.max_steps=1", format="text")
    assert "generation stops at" not in said
    settings = json.loads((result.folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == result.trainer.processing_class.eos_token_id


def test_a_template_without_a_token_at_the_end_adds_none(run):
    result, said = run("train.max_steps=1", template=PLAIN)
    assert "generation stops at" not in said
    assert stop_tokens(result.trainer.model) == [result.trainer.processing_class.eos_token_id]

"""What of a recipe's model is trained, at which rates: taken as written, or refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.load import load_recipe, recipe_arguments
from hf_gradacc.recipe.plan.memory import estimate_memory
from hf_gradacc.recipe.plan.screen import show_plan
from hf_gradacc.recipe.run import build_trainer, train_recipe

RECIPE = """\
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
           num_attention_heads: 2, num_key_value_heads: 1}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: question_answer}
train: {max_steps: 2, effective_batch_size: 2, use_cpu: true, disable_tqdm: true,
        report_to: none, save_strategy: no, logging_steps: 1}
output: {dir: OUT}
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Load the recipe with overrides."""
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(RECIPE.replace("OUT", str(folder / "out")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield lambda *overrides: load_recipe(folder / "mine.yaml", overrides=overrides)


def plan_of(recipe: Any) -> str:
    text = io.StringIO()
    show_plan(recipe, console=Console(file=text, width=110))
    return text.getvalue()


@pytest.fixture(scope="module")
def frozen(read: Any) -> Any:
    recipe = read("model.unfrozen_parameters=['layers\\.1\\.', lm_head]")
    result = train_recipe(recipe, learning_rate=0.1)
    return recipe, result


def test_only_unfrozen_parameters_move_and_the_saved_model_is_whole(frozen, read):
    _, result = frozen
    untrained = train_recipe(read(f"output.dir={result.folder}-untrained"), learning_rate=0.0)
    before, after = (load_file(Path(r.folder, "model.safetensors")) for r in (untrained, result))
    assert before.keys() == after.keys() == result.trainer.model.state_dict().keys()
    for name, weight in after.items():
        moves = "layers.1." in name or "lm_head" in name
        assert torch.equal(weight, before[name]) != moves, name


def test_memory_counts_only_what_is_trained(frozen):
    recipe, result = frozen
    memory = estimate_memory(
        recipe,
        tokenizer=result.trainer.processing_class,
        arguments=result.trainer.args,
        largest=30,
    )
    trained = [p for p in result.trainer.model.parameters() if p.requires_grad]
    assert memory.num_trainable == sum(p.numel() for p in trained)
    assert memory.num_trainable < sum(p.numel() for p in result.trainer.model.parameters())
    assert memory.optimizer == 8 * memory.num_trainable


def test_the_rates_of_a_recipe_reach_the_optimizer_and_the_plan(read):
    recipe = read(
        "peft=lora", "peft.loraplus_ratio=16", "train.learning_rates={q_proj: 1e-5}",
        "train.learning_rate=1e-3",
    )  # fmt: skip
    arguments = recipe_arguments(recipe)
    assert (arguments.loraplus_ratio, arguments.learning_rates) == (16, {"q_proj": 1e-5})
    shown = [line.split() for line in plan_of(recipe).splitlines()]
    assert ["learning_rate", "0.001", "3,328", "weights"] in shown
    assert ["lora_B", "0.016", "3,072", "weights"] in shown
    assert ["q_proj", "1e-05", "1,024", "weights"] in shown
    assert "Learning rates" not in plan_of(read()), "one rate is no news"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.unfrozen_parameters=[lm_haed]"], "'lm_haed' matches no parameter of the model; "
         "did you mean lm_head?"),
        (["model.unfrozen_parameters=['embed_tokens.weight$[:300]']"], "asks for some rows"),
        (["model.unfrozen_parameters=['(']"], "'(' is no regular expression"),
        (["train.learning_rates={lm_haed: 1e-5}"], "'lm_haed' matches no parameter of the model"),
        (["train.learning_rates={lm_head: 1e-5}", "peft=lora"], "not trained, such as base_model"),
        (["train.learning_rates={lm_head: -1}"], "gives 'lm_head' the rate -1"),
        (["model.unfrozen_parameters=[lm_head]", "peft=lora"], "both say what is trained"),
        (["peft=ia3", "peft.loraplus_ratio=16"], "method ia3 has none"),
        (["train.loraplus_ratio=16"], "set peft.loraplus_ratio"),
        (["model.unfrozen_parameters=[lm_head]", "tokenizer.add_tokens=[<a>]"], "for them, such as "
         "embed_tokens"),
        (["model.unfrozen_parameters=[lm_head]", "train.activation_checkpointing=true",
          "train.activation_checkpointing_kwargs={use_reentrant: true}"], "loses the gradients"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_plan(read, overrides, told):
    """And by `train`, which asks the same function."""
    with pytest.raises(ConfigError) as error:
        plan_of(read(*overrides))
    assert told in str(error.value)


def test_a_tied_head_is_unfrozen_by_either_name(read):
    for name in ("lm_head", "embed_tokens"):
        recipe = read(
            "model.config.tie_word_embeddings=true", f"model.unfrozen_parameters=[{name}]"
        )
        trainer, _ = build_trainer(recipe)
        trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
        assert trained == ["model.embed_tokens.weight"]

"""Every recipe that ships is read, checked and trained for two updates on a tiny stand-in."""

import math
import re
from pathlib import Path

import pytest
import transformers
from support.stand_ins import put_stand_ins

from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.run import train_recipe

ROOT = Path(__file__).parents[2]
SWEEPS = ROOT / "recipes" / "sweeps"
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent != SWEEPS)
NAMES = [str(path.relative_to(ROOT)) for path in RECIPES]
EXPECTED_NUMBER = 26

# What a CPU on its own cannot do; everything else of the recipe is run as written.
ON_A_CPU = {
    "max_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "logging_steps": 1,
    "fsdp": None,
    "fsdp_config": None,
    "deepspeed": None,
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
}
_AUTO = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "dpo": transformers.AutoModelForCausalLM,
    "reward": transformers.AutoModelForSequenceClassification,
}


def test_no_recipe_is_overlooked():
    assert len(RECIPES) == EXPECTED_NUMBER


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_opens_with_what_it_does_needs_and_its_launch_command(path):
    header = re.match(r"(#.*\n)+", path.read_text()).group()
    for heading in ("# Does:", "# Needs:", "# Launch:"):
        assert heading in header
    assert str(path.relative_to(ROOT)) in header, "the launch command names this very file"
    if "GPU" in header:
        assert "estimated" in header or "measured" in header


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_trains_for_two_updates_and_saves_a_model(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    recipe = load_recipe(path, overrides=[f"output.dir={tmp_path / 'run'}"])
    put_stand_ins(recipe, tmp_path)
    if recipe.peft.method == "qlora":  # bitsandbytes needs a GPU; the adapter is the same
        recipe.peft.method = "lora"
    result = train_recipe(recipe, **ON_A_CPU)

    assert result.trainer.state.global_step == 2
    losses = [row["loss"] for row in result.trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert ("eval_loss" in result.metrics) == (result.data.eval is not None)
    assert all(math.isfinite(value) for value in result.metrics.values())

    if recipe.peft.method == "none":
        model = _AUTO[recipe.model.task].from_pretrained(result.folder)
        assert model.config.model_type == result.trainer.model.config.model_type
    else:
        assert (result.folder / "adapter_model.safetensors").is_file()
    transformers.AutoTokenizer.from_pretrained(result.folder)
    again = load_recipe(result.folder / "recipe.yaml")
    assert again == recipe

"""`hf-gradacc merge`: one model that answers as the adapter did, in a folder of its own."""

import json
import shutil

import peft
import pytest
import torch
import transformers

from hf_gradacc.after import merge as merging
from hf_gradacc.after.merge import merge_run
from hf_gradacc.after.saved import find_saved, load_adapter, load_saved, load_tokenizer_of
from hf_gradacc.errors import ConfigError

pytestmark = pytest.mark.slow


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 40)[None]).logits.float()


def adapter_of(saved):
    return load_adapter(saved, tokenizer=load_tokenizer_of(saved)).eval()


def test_the_merged_model_is_the_adapter_on_its_base(command, runs, tmp_path):
    code, out, err = command("merge", runs / "adapter", tmp_path / "whole")
    assert (code, err) == (0, "")
    assert f"saved: {tmp_path / 'whole'}" in out
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "recipe.yaml"} <= names
    assert not any("adapter" in name for name in names)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    adapter = adapter_of(find_saved(runs / "adapter"))
    torch.testing.assert_close(logits(merged), logits(adapter), rtol=1e-4, atol=1e-4)
    base = transformers.AutoModelForCausalLM.from_pretrained(runs / "run")
    assert (logits(base) - logits(adapter)).abs().max() > 1
    assert command("chat", tmp_path / "whole", "--prompt", "a")[1] == "Seven.\n"


@pytest.mark.parametrize(("dtype", "far"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_it_keeps_the_type_of_the_base(runs, tmp_path, dtype, far):
    for path in (runs / "adapter").glob("*.*"):
        shutil.copy(path, tmp_path)
    recipe = (tmp_path / "recipe.yaml").read_text().replace("dtype: auto", f"dtype: {dtype}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    merged = merge_run(tmp_path, tmp_path / "whole")
    assert merged.dtype == dtype
    assert 1e-5 < merged.difference < far
    whole = find_saved(tmp_path / "whole")
    model = load_saved(whole, tokenizer=load_tokenizer_of(whole))
    assert model.dtype == getattr(torch, dtype)
    expected = logits(adapter_of(find_saved(tmp_path)))
    assert (logits(model) - expected).norm() / expected.norm() < far


def test_classes_keep_their_names(runs, tmp_path):
    merge_run(runs / "classes", tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["x", "y\x1b[0m", "z"]


def test_an_output_layer_trained_apart_from_shared_embeddings_is_kept(runs, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs / "base")
    config = transformers.AutoConfig.from_pretrained(runs / "base", tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, settings)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(3.0)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_run(tmp_path / "adapter")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter-merged")
    torch.testing.assert_close(logits(whole), logits(model.eval()), rtol=1e-4, atol=1e-4)


def test_what_would_be_overwritten_or_cannot_be_merged_is_refused(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        merge_run(runs / "adapter", tmp_path / "full")
    with pytest.raises(ConfigError, match="holds a whole model"):
        merge_run(runs / "run", tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(runs / "base")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "prompt")
    load_tokenizer_of(find_saved(runs / "base")).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ConfigError, match="PROMPT_TUNING learns inputs"):
        merge_run(tmp_path / "prompt", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "prompt"]


def test_a_model_that_answers_otherwise_is_not_left_behind(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(ConfigError, match="does not answer as the adapter"):
        merge_run(runs / "adapter", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert merging._LIMITS["float32"] < 0.01


def test_an_adapter_of_qlora_goes_into_the_base_before_4_bits(runs, tmp_path, command):
    for path in (runs / "adapter").glob("*.*"):
        shutil.copy(path, tmp_path)
    recipe = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("method: lora", "method: qlora"))
    code, out, err = command("merge", tmp_path, tmp_path / "whole")
    assert code == 0, err
    assert "merged into the base before 4 bits" in out
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "quantization_config" not in config

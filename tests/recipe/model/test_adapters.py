"""Adapters of recipes: names of layers, and starts that take a part of the base's weights."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from support.tiny import make_trainer, ragged_rows, tiny_llama
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from hf_gradacc import ConfigError
from hf_gradacc.recipe.keys.sections import PeftSection
from hf_gradacc.recipe.model.load import apply_peft, check_model, save_model

IDS = torch.arange(3, 11)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(base, out, section):
    model = apply_peft(AutoModelForCausalLM.from_pretrained(base), section)
    trainer = make_trainer(out, ragged_rows(8), model=model, max_steps=2, learning_rate=0.5)
    trainer.train()
    return trainer


OTHERS = {
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {"q_proj": 5},
}


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA")  # peft's way cannot save it
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"init_lora_weights": "pissa"}),
        ("lora", {"init_lora_weights": "pissa_niter_4", "use_rslora": True, **OTHERS}),
        ("dora", {"init_lora_weights": "olora", **OTHERS}),
    ],
    ids=["pissa", "pissa at random", "olora, dora"],
)
def test_an_adapter_that_starts_in_the_base_loads_on_the_base_as_it_was(
    base, tmp_path, method, options
):
    section = PeftSection(method=method, r=4, options=options, modules_to_save=["lm_head"])
    trainer = trained(base, tmp_path, section)
    expected = logits(trainer.model)
    save_model(trainer, peft=section)
    torch.manual_seed(99)  # what was drawn at random is not drawn again
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.peft_config["default"].init_lora_weights is True
    assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    first = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (expected - first).abs().max() > 0.01, "it learned something"
    assert_close(logits(trainer.model), expected)
    assert trainer.model.peft_config["default"].r == 4, "the model can go on training"


def test_a_check_without_weights_takes_starts_that_need_them(base):
    from hf_gradacc.data.section import ModelSection

    class Tokenizer:
        pad_token_id = 0

    for kind in ("pissa", "olora", "mica", "orthogonal", "loftq"):
        section = PeftSection(method="lora", options={"init_lora_weights": kind})
        model = check_model(ModelSection(name=base), section, tokenizer=Tokenizer())
        assert model.peft_config["default"].r == 16
    section = PeftSection(method="lora", options={"init_lora_weights": "pisa"})
    with pytest.raises(ConfigError, match="pisa"):
        check_model(ModelSection(name=base), section, tokenizer=Tokenizer())


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "peft.target_modules.*v_porj.*mean v_proj"),
        ({"modules_to_save": ["lm_head", "embed_token"]}, "embed_token.*mean embed_tokens"),
        ({"options": {"exclude_modules": ["gate"]}}, "peft.options.exclude_modules.*gate_proj"),
        ({"options": {"rank_pattern": {"k_prj": 2}}}, "peft.options.rank_pattern.*k_proj"),
        ({"options": {"loftq_config": {"loftq_bits": 4}}}, "loftq_config.*ignored"),
        ({"target_modules": ["a_b"], "modules_to_save": ["c_d"]}, "(?s)'a_b'.*'c_d'"),
    ],
    ids=["target", "saved", "excluded", "pattern", "ignored", "both"],
)
def test_one_misspelt_layer_among_others_is_an_error(section, wrong):
    with pytest.raises(ConfigError, match=wrong):
        apply_peft(tiny_llama(), PeftSection(method="lora", **section))


def test_a_section_says_after_the_adapter_is_made_what_it_said_before():
    section = PeftSection(method="lora", modules_to_save=["score"])
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    for _ in range(2):
        apply_peft(LlamaForSequenceClassification(config), section, task="classification")
        assert section.modules_to_save == ["score"]

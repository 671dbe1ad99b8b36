"""`optim = "muon"`: torch's Muon on hidden matrices, torch's AdamW on the rest, one optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import make_trainer, ragged_rows, tiny_llama
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    T5Config,
    TrainingArguments,
)

from hf_gradacc import CheckpointError, ConfigError, GradAccArguments
from hf_gradacc.arguments import add_options, options_apart
from hf_gradacc.trainer.optimizer.muon import find_hidden_matrices, muon_options

ROWS = ragged_rows(16, seed=6)
JOB: dict[str, Any] = {
    "effective_batch_size": 4,
    "per_device_train_batch_size": 2,
    "optim": "muon",
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "max_steps": 4,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}
OTHERS = ("embed_tokens", "lm_head", "norm", "bias", "score", "shared")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("muon")
    trainer = make_trainer(folder, ROWS, **JOB | {"save_strategy": "steps", "save_steps": 2})
    trainer.train()
    return trainer


class TwoOptimizers(torch.optim.SGD):
    """torch's two, side by side; the SGD never steps."""

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        super().__init__(named.values(), lr=0.01)
        hidden = [p for n, p in named.items() if not any(word in n for word in OTHERS)]
        decayed = [named["model.embed_tokens.weight"], named["lm_head.weight"]]
        rest = [p for n, p in named.items() if "norm" in n]
        assert len(hidden) + len(decayed) + len(rest) == len(named)
        muon = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1}
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.both = torch.optim.Muon(hidden, lr=0.01, **muon), torch.optim.AdamW(groups, lr=0.01)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.both:
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


def test_it_steps_as_the_two_optimizers_of_torch_do(trained, tmp_path):
    model = tiny_llama()
    optimizer = TwoOptimizers(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (4 - step) / 4)
    options = JOB | {"optim": "sgd", "weight_decay": 0.0}
    given = {"optimizers": (optimizer, schedule)}
    make_trainer(tmp_path, ROWS, model=model, trainer_options=given, **options).train()
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_a_resume_goes_on_bit_by_bit(trained, tmp_path):
    trainer = make_trainer(tmp_path, ROWS, **JOB)
    trainer.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-2")
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, dict(trainer.model.named_parameters())[name]), name


def test_one_rate_is_one_column_of_the_log(trained):
    row = trained.state.log_history[0]
    assert row["learning_rate"] == 0.01
    assert not any("learning_rate/" in key for key in row)
    assert trained.args.optim == "muon"
    assert trained.args.to_dict()["optim"] == "muon"


def test_another_optimizer_cannot_go_on_with_its_state(trained, tmp_path):
    trainer = make_trainer(tmp_path, ROWS, **JOB | {"optim": "adamw_torch"})
    with pytest.raises(CheckpointError, match="the optimizer: MuonWithAdamW before, AdamW now"):
        trainer.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-2")


def test_its_rates_and_options_can_be_said(tmp_path):
    options = JOB | {
        "optim_args": "momentum=0.9, nesterov=false, ns_steps=3, adjust_lr_fn=original",
        "learning_rates": {"lm_head|embed": 0.5, "q_proj": 0.25},
        "max_steps": 1,
    }
    trainer = make_trainer(tmp_path, ROWS, **options)
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for name in (names[id(p)] for p in group["params"]):
            assert group["uses_muon"] == ("proj" in name), name
            rate = (
                0.5 if "lm_head" in name or "embed" in name else 0.25 if "q_proj" in name else 0.01
            )
            assert group["initial_lr"] == rate, name
            asked = (group["momentum"], group["nesterov"], group["ns_steps"], group["adjust_lr_fn"])
            assert asked == (0.9, False, 3, "original")
            assert group["eps"] == (1e-7 if group["uses_muon"] else 1e-8)


def _llama(head: Any = None, **sizes: Any) -> Any:
    return head.from_config(LlamaConfig(**{
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 32,
        "num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0, **sizes,
    }))  # fmt: skip


MODELS = {
    "causal": tiny_llama,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "classifier": lambda: _llama(AutoModelForSequenceClassification, num_labels=3),
    "seq2seq": lambda: AutoModelForSeq2SeqLM.from_config(
        T5Config(d_model=8, d_kv=8, d_ff=12, num_layers=1, num_heads=1, vocab_size=32)
    ),
    "lora": lambda: get_peft_model(
        tiny_llama(),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"]),
    ),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_embeddings_heads_and_vectors_are_left_to_adamw(make):
    model = make()
    matrices = find_hidden_matrices(model)
    others = (*OTHERS, "relative_attention_bias", "lora_embedding")
    for name, parameter in model.named_parameters():
        expected = parameter.ndim == 2 and not any(word in name for word in others)
        assert (id(parameter) in matrices) == expected, name
    assert matrices


def test_master_weights_take_its_steps(tmp_path):
    """In float32, from the same gradients: the masters are a float32 model's weights."""
    runs = []
    for dtype, low in ((torch.bfloat16, "master"), (torch.float32, "plain")):
        model = tiny_llama(dtype=torch.bfloat16).to(dtype)
        options = JOB | {"low_precision_updates": low, "max_steps": 1, "max_grad_norm": 0.0}
        trainer = make_trainer(tmp_path / low, ROWS, model=model, **options)
        trainer.train()
        runs.append(trainer)
    masters = runs[0].optimizer_steps.masters
    start = dict(tiny_llama(dtype=torch.bfloat16).named_parameters())
    for name, weight in runs[1].model.named_parameters():
        steps = masters[name] - start[name].float(), weight - start[name].float()
        assert torch.cosine_similarity(*(s.flatten() for s in steps), dim=0) > 0.9, name
    state = runs[0].optimizer.state
    assert all(v.dtype == torch.float32 for s in state.values() for v in s.values())


def test_a_trainer_that_copies_plain_arguments_gets_a_name_it_knows(tmp_path):
    """As TRL does: it makes a class of its own of them, and fails on names that are not stock's."""
    args = GradAccArguments(output_dir=str(tmp_path), optim="muon", effective_batch_size=3)
    with options_apart([args]) as options:
        copied = TrainingArguments(output_dir=str(tmp_path), optim=args.optim)
        assert type(args) is TrainingArguments
    add_options(copied, options)
    assert (args.optim, copied.optim, copied.effective_batch_size) == ("muon", "muon", 3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("momentm=0.9", "'momentm' is no option of optim = 'muon': did you mean momentum?"),
        ("momentum=high", "momentum = 'high' is not possible"),
        ("momentum=-1", "momentum = '-1' is not possible: momentum should be >= 0"),
        ("adjust_lr_fn=mine", "adjust_lr_fn = 'mine' is not possible"),
        ("nesterov=perhaps", "nesterov = 'perhaps' is not possible"),
    ],
)
def test_impossible_options_are_refused(text, told):
    with pytest.raises(ConfigError) as error:
        muon_options(text)
    assert told in str(error.value)


def test_a_model_without_hidden_matrices_is_refused(tmp_path):
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "lm_head" in name)
    with pytest.raises(ConfigError, match="matrices of hidden layers, and none is trained here"):
        make_trainer(tmp_path, ROWS, model=model, **JOB).train()


def test_an_optimizer_of_the_users_own_is_not_taken_for_it(tmp_path):
    model = tiny_llama()
    given = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}
    trainer = make_trainer(tmp_path, ROWS, model=model, trainer_options=given, **JOB)
    with pytest.raises(ConfigError, match="optim = 'muon': no effect"):
        trainer.train()


def test_stock_arguments_still_refuse_the_name(tmp_path):
    """If they take it one day, whose Muon it is has to be decided anew."""
    with pytest.raises(ValueError, match="muon"):
        TrainingArguments(str(tmp_path), optim="muon")

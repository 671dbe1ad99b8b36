"""Learning rates of groups: patterns and LoRA+, any optimizer, in the log, over a resume."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from support.tiny import make_trainer, ragged_rows, tiny_llama
from transformers import Adafactor

from hf_gradacc import CheckpointError, ConfigError, GradAccArguments, GradAccTrainer
from hf_gradacc.trainer.optimizer.groups import assign_rates

ROWS = ragged_rows(16, seed=4)
RATES = {"embed_tokens|lm_head": 0.5, r"layers\.0\.": 0}
JOB: dict[str, Any] = {
    "effective_batch_size": 4,
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "max_steps": 4,
    "weight_decay": 0.1,
}


def lora(**options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear", **options}
    )
    return get_peft_model(tiny_llama(), config)


def rates_by_name(trainer: Any) -> dict[str, tuple[float, float]]:
    """The peak rate and the decay that each parameter is stepped with."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {
        names[id(p)]: (group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rates")
    options = JOB | {"learning_rates": RATES, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(folder, ROWS, **options)
    trainer.start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer


def test_each_parameter_has_its_rate_and_keeps_its_decay(trained):
    found = rates_by_name(trained)
    assert found["model.embed_tokens.weight"] == (0.5, 0.1)
    assert found["lm_head.weight"] == (0.5, 0.1)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (0, 0.1)
    assert found["model.layers.0.input_layernorm.weight"] == (0, 0.0)
    assert found["model.layers.1.self_attn.q_proj.weight"] == (0.01, 0.1)
    assert found["model.norm.weight"] == (0.01, 0.0)
    assert len(found) == len(dict(trained.model.named_parameters())), "each once"


def test_a_rate_of_zero_leaves_weights_where_they_are_and_others_move(trained):
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, trained.start[name]) == ("layers.0." in name), name


def test_one_schedule_scales_all_rates_and_each_is_logged(trained):
    rows = [row for row in trained.state.log_history if "loss" in row]
    for step, row in enumerate(rows):
        share = (4 - step) / 4
        assert row["learning_rate"] == pytest.approx(0.01 * share, rel=1e-12)
        assert row["learning_rate/embed_tokens_lm_head"] == pytest.approx(0.5 * share, rel=1e-12)
        assert row["learning_rate/layers_0"] == 0


def test_a_run_without_them_logs_one_rate_and_has_the_stock_groups(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, **JOB | {"max_steps": 1})
    trainer.train()
    assert not any("learning_rate/" in key for key in trainer.state.log_history[0])
    assert [set(group) & {"label"} for group in trainer.optimizer.param_groups] == [set(), set()]


def test_weights_are_those_of_an_optimizer_with_the_same_groups(trained, tmp_path):
    """Set by hand, from the gradients of the same updates."""
    model = tiny_llama()

    def parameters(*, own: Any, decays: bool) -> list[Any]:
        return [p for n, p in model.named_parameters() if own(n) and (p.ndim == 2) == decays]

    tests = {
        0.01: lambda n: "layers.0." not in n and "embed" not in n and "lm_head" not in n,
        0.5: lambda n: "embed" in n or "lm_head" in n,
        0.0: lambda n: "layers.0." in n,
    }
    groups = [
        {"params": parameters(own=own, decays=decays), "lr": lr, "weight_decay": 0.1 * decays}
        for decays in (True, False)
        for lr, own in tests.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (4 - step) / 4)
    options = {k: v for k, v in JOB.items() if k not in ("weight_decay", "lr_scheduler_type")}
    trainer = GradAccTrainer(
        model,
        GradAccArguments(str(tmp_path), use_cpu=True, report_to="none", max_grad_norm=0, **options),
        train_dataset=ROWS,
        data_collator=trained.data_collator,
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(trained.model.named_parameters())[name]), name


def test_a_resume_goes_on_bit_by_bit(trained, tmp_path):
    start = f"{trained.args.output_dir}/checkpoint-2"
    trainer = make_trainer(tmp_path, ROWS, **JOB | {"learning_rates": RATES})
    trainer.train(resume_from_checkpoint=start)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, dict(trained.model.named_parameters())[name]), name
    ours, theirs = (
        [row for row in t.state.log_history if "loss" in row][-1] for t in (trainer, trained)
    )
    keys = [key for key in theirs if key.startswith("learning_rate")]
    assert len(keys) == 3
    assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}


def test_a_changed_rate_takes_effect_from_the_checkpoint(trained, tmp_path):
    """Also where the pattern of the same parameters is written in another way."""
    start = f"{trained.args.output_dir}/checkpoint-2"
    changed = {"embed|head": 0.25, r"layers\.0\.": 0.1}
    trainer = make_trainer(tmp_path, ROWS, **JOB | {"learning_rates": changed})
    trainer.train(resume_from_checkpoint=start)
    row = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert row["learning_rate/embed_head"] == pytest.approx(0.25 / 4, rel=1e-12)
    assert row["learning_rate/layers_0"] == pytest.approx(0.1 / 4, rel=1e-12)
    assert row["learning_rate"] == pytest.approx(0.01 / 4, rel=1e-12)


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        (None, "embed_tokens_lm_head (2 parameters), layers_0 (9 parameters) before, none now"),
        ({"embed": 0.5, r"layers\.0\.": 0}, "embed (1 parameter), layers_0 (9 parameters) now"),
        ({"q_proj": 0.5, r"layers\.[01]\.": 0}, "q_proj (2 parameters)"),
    ],
    ids=["none", "fewer", "others"],
)
def test_changed_groups_are_refused_by_name(trained, tmp_path, rates, told):
    start = f"{trained.args.output_dir}/checkpoint-2"
    trainer = make_trainer(tmp_path, ROWS, **JOB | {"learning_rates": rates})
    with pytest.raises(CheckpointError, match="the groups of learning rates: ") as error:
        trainer.train(resume_from_checkpoint=start)
    assert told in str(error.value)


def test_loraplus_divides_parameters_as_peft_does():
    """Matrices, magnitudes of DoRA and a head in full; adapters of the embeddings."""
    models = [lora(use_dora=True, modules_to_save=["lm_head"])]
    if Version(version("peft")) >= Version("0.21"):  # peft 0.18 takes adapters of embeddings for A
        models.append(lora(target_modules=["q_proj", "embed_tokens"]))
    for kind in models:
        peft = create_loraplus_optimizer(kind, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16)
        theirs = {id(p): group["lr"] for group in peft.param_groups for p in group["params"]}
        ours = assign_rates(kind, learning_rate=0.1, learning_rates=None, loraplus_ratio=16)
        assert {i: rate.rate for i, rate in ours.items()} == theirs
        assert len(set(theirs.values())) >= 2


def test_loraplus_trains_b_faster_and_a_pattern_comes_first(tmp_path):
    options = JOB | {"loraplus_ratio": 16, "learning_rates": {"v_proj": 0.3}, "max_steps": 1}
    trainer = make_trainer(tmp_path, ROWS, model=lora(), **options)
    trainer.train()
    for name, (rate, _) in rates_by_name(trainer).items():
        expected = 0.3 if "v_proj" in name else 0.16 if "lora_B" in name else 0.01
        assert rate == pytest.approx(expected), name
    row = trainer.state.log_history[0]
    assert (row["learning_rate"], row["learning_rate/v_proj"]) == (0.01, 0.3)
    assert row["learning_rate/lora_B"] == pytest.approx(0.16)


def test_a_pattern_finds_a_tied_weight_by_either_name():
    model = tiny_llama(tie_word_embeddings=True)
    for pattern in ("lm_head", "embed_tokens"):
        found = assign_rates(
            model, learning_rate=0.1, learning_rates={pattern: 0.5}, loraplus_ratio=None
        )
        assert found[id(model.lm_head.weight)].rate == 0.5


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adagrad", "rmsprop", "adamw_torch_fused"])
def test_any_optimizer_has_them(tmp_path, optim):
    options = JOB | {"optim": optim, "learning_rates": RATES, "max_steps": 1}
    model = tiny_llama(dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, ROWS, model=model, **options)
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("layers.0." in name), name
    kind = trainer.optimizer.optimizer
    assert isinstance(kind, Adafactor) == (optim == "adafactor")


def test_master_weights_step_at_the_rates_of_their_groups(tmp_path):
    """A rate of 1e-5 moves no bfloat16 weight of this size, but its float32 master."""
    model = tiny_llama(dtype=torch.bfloat16)
    options = JOB | {"learning_rates": {"embed_tokens": 1e-5}, "low_precision_updates": "master"}
    trainer = make_trainer(tmp_path, ROWS, model=model, **options | {"max_steps": 1})
    before = model.model.embed_tokens.weight.detach().float()
    trainer.train()
    moved = trainer.optimizer_steps.masters["model.embed_tokens.weight"] - before
    assert 0 < moved.abs().max() < 1.2e-5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"learning_rates": {"lm_haed": 1e-5}}, "'lm_haed' matches no parameter of the model; did "
         "you mean lm_head?"),
        ({"learning_rates": {"experts": 1e-5}}, "there are such as model.embed_tokens.weight, "),
        ({"learning_rates": {"layers": 1e-5, "q_proj": 0}}, "'q_proj' matches only parameters that "
         "patterns before it match"),
        ({"loraplus_ratio": 16}, "loraplus_ratio = 16, and no trained parameter is a lora_B"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_an_error(tmp_path, options, told):
    with pytest.raises(ConfigError, match=r"learning_rates|loraplus") as error:
        make_trainer(tmp_path, ROWS, **JOB | options).train()
    assert told in str(error.value)


def test_frozen_parameters_have_no_rate(tmp_path):
    options = JOB | {"learning_rates": {"embed_tokens": 0.5}}
    with pytest.raises(ConfigError, match="only parameters that are not trained, such as base_"):
        make_trainer(tmp_path, ROWS, model=lora(), **options).train()


def test_rates_that_nobody_applies_are_an_error(tmp_path):
    class Own(GradAccTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    options = JOB | {"learning_rates": RATES}
    with pytest.raises(ConfigError, match="learning_rates: no effect, for the optimizer was"):
        make_trainer(tmp_path, ROWS, trainer_class=Own, **options).train()


def test_impossible_rates_are_told_together(tmp_path):
    rates = {"q_proj": -1, "k_proj": math.nan, "v_proj": "1e-5", "(": 0.1}
    with pytest.raises(ConfigError) as error:
        GradAccArguments(str(tmp_path), learning_rates=rates, loraplus_ratio=0.5)
    for told in ("'q_proj' the rate -1", "'k_proj' the rate nan", "'v_proj' the rate '1e-5'",
                 "'(', no regular expression", "loraplus_ratio = 0.5"):  # fmt: skip
        assert told in str(error.value)


def test_rates_are_taken_from_the_command_line_as_json(tmp_path):
    from transformers import HfArgumentParser

    given = ["--output_dir", str(tmp_path), "--learning_rates", '{"lm_head": 1e-5}']
    (arguments,) = HfArgumentParser(GradAccArguments).parse_args_into_dataclasses(given)
    assert arguments.learning_rates == {"lm_head": 1e-5}

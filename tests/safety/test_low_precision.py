"""Steps on bfloat16 and float16 weights: kept in float32, rounded at random, or said to be lost."""

import importlib
import math

import pytest
import torch
from safetensors.torch import load_file
from support.low_precision_jobs import step_on_copies, step_on_parts
from support.ranks import run_ranks
from support.tiny import make_trainer, ragged_rows, tiny_llama
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_gradacc import ConfigError
from hf_gradacc.safety.lost_step import measure_lost_share
from hf_gradacc.safety.low_precision import LowPrecisionUpdates, round_at_random
from hf_gradacc.trainer.optimizer.low_precision import MASTERS_NAME

ROWS = ragged_rows(32, seed=2)
OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.1),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=1e-4, momentum=0.9),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=1e-5, initial_accumulator_value=0.5),
}


def gradients(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, generator=generator) for _ in range(count)]


def low_weight():
    return nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16() / 16)


def stepped(make, *, keeps_masters=True, round_gradients=False, count=20):
    """Step with given float32 gradients; the last gradient is missing, as an expert's may be."""
    weight = low_weight()
    optimizer = make([weight])
    updates = LowPrecisionUpdates(
        optimizer, {"w": weight}, keeps_masters=keeps_masters, seed=lambda: 3
    )
    for gradient in gradients(count):
        weight.grad = None
        weight.grad_dtype = torch.float32
        weight.grad = gradient.bfloat16().float() if round_gradients else gradient.clone()
        optimizer.step()
    weight.grad = None
    optimizer.step()
    return weight, updates


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_master_weights_are_those_of_a_float32_run_with_the_same_gradients(make):
    reference = nn.Parameter(low_weight().detach().float())
    optimizer = make([reference])
    for gradient in gradients(20):
        reference.grad = gradient.clone()
        optimizer.step()
    weight, updates = stepped(make)
    assert torch.equal(updates.masters()["w"], reference.detach())
    assert torch.equal(weight.detach(), reference.detach().bfloat16())
    assert weight.dtype == torch.bfloat16
    _, broken = stepped(make, round_gradients=True)
    assert not torch.equal(broken.masters()["w"], reference.detach())


def test_what_others_write_into_a_weight_counts():
    weight, updates = stepped(OPTIMIZERS["adamw"])
    before = updates.masters()["w"].clone()
    with torch.no_grad():
        weight[:2] = 1.0
    after = updates.masters()["w"]
    assert after[:2].tolist() == [1.0, 1.0]
    assert torch.equal(after[2:], before[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_at_random_gives_the_value_on_average(dtype):
    info = torch.finfo(dtype)
    values = torch.tensor([1 + 0.3 * info.eps, -(2 + 0.9 * info.eps), 0.02, info.tiny * 0.3, 0.0])
    draws = values.repeat(200_000, 1)
    rounded = round_at_random(draws, dtype, torch.Generator().manual_seed(0)).double()
    low = values.to(dtype)
    for column, value in enumerate(values.double().tolist()):
        found = rounded[:, column].unique()
        assert len(found) <= 2
        spread = (found.max() - found.min()).item()
        assert spread <= max(abs(value), info.tiny) * info.eps
        assert abs(rounded[:, column].mean().item() - value) <= 4 * spread / math.sqrt(200_000)
    exact = round_at_random(low.float(), dtype, torch.Generator().manual_seed(0))
    assert torch.equal(exact, low)  # what can be said exactly stays
    special = torch.tensor([math.inf, -math.inf, math.nan])
    kept = round_at_random(special, dtype, torch.Generator().manual_seed(0))
    assert kept[:2].tolist() == [math.inf, -math.inf]
    assert kept[2].isnan()


def run(out, *, dtype=torch.bfloat16, resume=None, **options):
    settings = {"optim": "adamw_torch", "learning_rate": 1e-5, "max_grad_norm": 1.0}
    settings |= {"effective_batch_size": 8, "per_device_train_batch_size": 2}
    settings |= {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    trainer = make_trainer(out, ROWS, model=tiny_llama(dtype=dtype), **settings | options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def share_moved(trainer):
    before = tiny_llama(dtype=torch.bfloat16).state_dict()
    after = trainer.model.state_dict()
    differ = sum(int((after[name] != value).sum()) for name, value in before.items())
    return differ / sum(value.numel() for value in before.values())


@pytest.mark.parametrize("mode", ["master", "stochastic"])
def test_a_step_that_fails_leaves_weights_of_their_type_as_they_were(tmp_path, mode, monkeypatch):
    functions = importlib.import_module("torch.optim.adam")
    step, steps, before = functions.adam, [], {}

    def failing(weights, *args, **kwargs):
        step(weights, *args, **kwargs)
        steps.append(weights)
        if len(steps) == 2:
            raise RuntimeError("the device is gone")

    monkeypatch.setattr(functions, "adam", failing)
    trainer = make_trainer(
        tmp_path,
        ROWS,
        model=tiny_llama(dtype=torch.bfloat16),
        effective_batch_size=4,
        optim="adamw_torch",
        learning_rate=1e-2,
        low_precision_updates=mode,
    )

    class Keep(TrainerCallback):
        def on_step_begin(self, *args, model, **kwargs):
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer.add_callback(Keep())
    with pytest.raises(RuntimeError, match="the device is gone"):
        trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before[name])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr("hf_gradacc.trainer.optimizer.low_precision.logger.warning", told.append)
        trainer = run(tmp_path_factory.mktemp("plain"), low_precision_updates="plain")
    return trainer, told


@pytest.mark.parametrize("mode", ["auto", "stochastic"])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path, plain, mode):
    whole = run(tmp_path / "whole", low_precision_updates=mode)
    assert whole.optimizer_steps.rounding == {"auto": "master"}.get(mode, mode)
    assert share_moved(whole) > 1.5 * share_moved(plain[0])
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / MASTERS_NAME).is_file() == (mode == "auto")
    resumed = run(tmp_path / "again", resume=str(checkpoint), low_precision_updates=mode)
    kept, found = (t.model.state_dict() | t.optimizer_steps.masters for t in (whole, resumed))
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    states = [t.optimizer.state_dict()["state"][0] for t in (whole, resumed)]
    assert states[0]["exp_avg"].dtype == torch.float32
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    if mode == "auto":
        saved = load_file(checkpoint / "model.safetensors")
        masters = load_file(checkpoint / MASTERS_NAME)
        assert all(torch.equal(masters[n].bfloat16(), saved[n]) for n in masters if n in saved)


def test_plain_says_how_much_it_loses_and_is_what_stock_does(tmp_path, plain):
    trainer, told = plain
    assert trainer.optimizer_steps.lost_share > 0.5
    assert [line for line in told if "loses" in line and "low_precision_updates = 'master'" in line]
    ours = run(
        tmp_path / "ours",
        low_precision_updates="plain",
        effective_batch_size=2,
        accumulate_grads_in_fp32=False,
        train_sampling_strategy="sequential",
        max_steps=3,
    )
    model = tiny_llama(dtype=torch.bfloat16)
    stock = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path / "stock"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            train_sampling_strategy="sequential",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=ROWS,
        data_collator=ours.data_collator,
    )
    stock.train()
    for (name, weight), expected in zip(
        ours.model.named_parameters(), model.parameters(), strict=True
    ):
        # The last bit: a loss of two rows may be summed in another order.
        close = torch.isclose(weight.float(), expected.float(), rtol=2**-7, atol=1e-30)
        assert close.float().mean() > 0.99, name
    states = ours.optimizer.state_dict()["state"]
    assert {state["exp_avg"].dtype for state in states.values()} == {torch.bfloat16}
    assert {int(state["step"]) for state in states.values()} == {3}  # a step tried is no step


def test_trying_a_step_changes_nothing():
    weight, frozen = low_weight(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight, frozen], lr=1e-5)
    for gradient in gradients(3):
        weight.grad = gradient.bfloat16()
        optimizer.step()
    weight.grad = gradients(4)[-1].bfloat16()
    frozen.grad = torch.ones(3)
    kept = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone(), weight.grad
    share = measure_lost_share(optimizer, [weight])
    assert share is not None
    assert 0.5 < share <= 1.1
    assert torch.equal(weight.detach(), kept[0])
    assert torch.equal(optimizer.state[weight]["exp_avg"], kept[1])
    assert optimizer.state[weight]["step"] == 3
    assert weight.grad is kept[2]
    assert frozen.tolist() == [1.0] * 3
    assert measure_lost_share(torch.optim.SGD([weight], lr=1e4), [weight]) < 0.01


def test_a_checkpoint_of_the_other_kind_is_taken_with_a_line(tmp_path, plain, monkeypatch):
    told = []
    monkeypatch.setattr("hf_gradacc.trainer.optimizer.low_precision.logger.warning", told.append)
    checkpoint = str(plain[0].args.output_dir) + "/checkpoint-2"
    trainer = run(tmp_path / "on", resume=checkpoint, low_precision_updates="master")
    assert trainer.state.global_step == 4
    assert [line for line in told if "holds no float32 master weights" in line]
    checkpoint = str(tmp_path / "on" / "checkpoint-4")
    trainer = run(
        tmp_path / "back",
        resume=checkpoint,
        low_precision_updates="plain",
        num_train_epochs=2,
        max_steps=5,
    )
    assert trainer.state.global_step == 5
    assert [line for line in told if "it goes on from the rounded ones" in line]


class EvaluatingSGD(torch.optim.SGD):
    """Exchanges weights for evaluation, as optimizers without a schedule do."""

    def eval(self):
        """Begin evaluation."""


def test_an_optimizer_that_exchanges_weights_itself_is_left_alone_or_refused(tmp_path):
    def trained(mode):
        model = tiny_llama(dtype=torch.bfloat16)
        given = {"optimizers": (EvaluatingSGD(model.parameters(), lr=0.1), None)}
        options = {"max_steps": 1, "effective_batch_size": 4, "low_precision_updates": mode}
        trainer = make_trainer(tmp_path, ROWS, model=model, trainer_options=given, **options)
        trainer.train()
        return trainer

    assert trained("auto").optimizer_steps.rounding == "plain"
    with pytest.raises(ConfigError, match="EvaluatingSGD exchanges the weights itself"):
        trained("master")


@pytest.mark.slow
def test_ranks_step_alike_on_the_weights_they_all_hold(tmp_path):
    one = run_ranks(step_on_copies, 1, out=str(tmp_path / "one"))[0]
    ranks = run_ranks(step_on_copies, 2, out=str(tmp_path / "two"))
    for mode, weights in one.items():
        for name in weights:
            assert torch.equal(*(rank[mode][name] for rank in ranks))
    began = tiny_llama(dtype=torch.bfloat16).state_dict()
    masters = one["master, float32"]
    off = sum(float((ranks[0]["master, float32"][n] - m).abs().sum()) for n, m in masters.items())
    moved = sum(float((m - began[n].float()).abs().sum()) for n, m in masters.items())
    assert moved > 0
    assert off < 0.02 * moved  # gradients in bfloat16, summed in another order


@pytest.mark.slow
def test_split_weights_of_low_precision_are_stepped_as_they_are_with_a_line(tmp_path):
    for told in run_ranks(step_on_parts, 2, out=str(tmp_path)):
        assert "steps on low-precision weights as they are: they are split" in told["auto"]
        assert told["master"].startswith("refused: low_precision_updates = 'master'")
        assert "Load the model in float32 and set bf16 = True" in told["master"]

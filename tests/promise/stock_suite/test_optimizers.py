"""Optimizers and learning rate schedules: chosen by name, passed in, and what they are told."""

import copy

import pytest
import torch
from support.line import LineRows, PlainLine, fit_line, fitted, logged
from torch import nn
from transformers import get_polynomial_decay_schedule_with_warmup
from transformers.optimization import Adafactor, AdafactorSchedule

from .test_training import equal_rows, tiny_gpt2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.bias = nn.Parameter(torch.zeros(4))


def test_an_optimizer_and_a_schedule_may_be_passed_in(kind, tmp_path):
    model = PlainLine()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = fit_line(kind, tmp_path, model=model, optimizers=(optimizer, schedule))
    trainer.train()
    assert fitted(trainer) != (0.0, 0.0)
    assert trainer.optimizer.state_dict()["param_groups"][0]["lr"] == 0.3
    assert schedule.last_epoch == 24


def test_a_class_of_optimizer_may_be_passed_in(kind, tmp_path):
    options = (torch.optim.SGD, {"lr": 0.3, "momentum": 0.5})
    trainer = fit_line(kind, tmp_path, optimizer_cls_and_kwargs=options, max_steps=1)
    trainer.train()
    group = trainer.optimizer.state_dict()["param_groups"][0]
    assert group["momentum"] == 0.5
    assert group["initial_lr"] == 0.3


def test_adafactor_may_set_its_own_rate(kind, tmp_path):
    model = PlainLine()
    optimizer = Adafactor(
        model.parameters(), scale_parameter=True, relative_step=True, warmup_init=True, lr=None
    )
    trainer = fit_line(
        kind, tmp_path, model=model, optimizers=(optimizer, AdafactorSchedule(optimizer))
    )
    trainer.train()
    assert fitted(trainer) != (0.0, 0.0)
    assert trainer.optimizer.state_dict()["param_groups"][0]["lr"] > 0


@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
)
def test_optimizers_are_chosen_by_name(kind, tmp_path, name):
    trainer = fit_line(kind, tmp_path, optim=name, max_steps=2, learning_rate=0.1)
    trainer.train()
    assert fitted(trainer) != (0.0, 0.0)


def test_options_of_an_optimizer_are_read(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, optim="adamw_torch", adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-4,
        weight_decay=0.3,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-4
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("where", ["create_optimizer", "create_optimizer_and_scheduler"])
def test_a_subclass_makes_the_optimizer(kind, tmp_path, where):
    class Own(kind):
        pass

    def create(self, *args, **kwargs):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        if where != "create_optimizer":
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        return self.optimizer

    setattr(Own, where, create)
    trainer = fit_line(Own, tmp_path, max_steps=2, logging_steps=1)
    if where != "create_optimizer":
        trainer.create_optimizer_and_scheduler(num_training_steps=2)
    trainer.train()
    assert logged(trainer, "learning_rate")[0] == 0.5


def test_norms_and_biases_do_not_decay(kind, tmp_path):
    model = nn.Sequential(Layer(), nn.ModuleList([Layer(), Layer()]))
    trainer = fit_line(kind, tmp_path, model=model)
    trainer.create_optimizer_and_scheduler(10)
    decays = ["0.linear.weight", "1.0.linear.weight", "1.1.linear.weight"]
    named = dict(model.named_parameters())
    assert [id(p) for p in trainer.optimizer.param_groups[0]["params"]] == [
        id(named[name]) for name in decays
    ]
    assert len(trainer.optimizer.param_groups[1]["params"]) == len(named) - 3


def test_groups_and_rates_can_be_asked_for(kind, tmp_path):
    trainer = fit_line(kind, tmp_path)
    with pytest.raises(ValueError, match="optimizer is None"):
        trainer.get_optimizer_group()
    with pytest.raises(ValueError, match="optimizer is None"):
        trainer.get_learning_rates()
    trainer.create_optimizer()
    assert len(trainer.get_optimizer_group()) == 2
    assert trainer.model.a in trainer.get_optimizer_group(trainer.model.a)["params"]
    assert trainer.get_learning_rates() == [5e-05, 5e-05]


def test_options_of_a_schedule_are_read(kind, tmp_path):
    extra = {"power": 5.0, "lr_end": 1e-5}
    trainer = fit_line(
        kind, tmp_path, lr_scheduler_type="polynomial", lr_scheduler_kwargs=extra,
        learning_rate=0.2, warmup_steps=2,
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    expected = get_polynomial_decay_schedule_with_warmup(
        trainer.optimizer, num_warmup_steps=2, num_training_steps=10, **extra
    )
    ours, theirs = trainer.lr_scheduler.lr_lambdas[0], expected.lr_lambdas[0]
    assert (ours.args, ours.keywords) == (theirs.args, theirs.keywords)


@pytest.mark.parametrize("name", ["cosine_with_min_lr", "cosine_warmup_with_min_lr"])
def test_a_schedule_may_end_above_zero(kind, tmp_path, name):
    trainer = fit_line(
        kind, tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs={"min_lr": 1e-5},
        learning_rate=0.2, warmup_steps=2, max_steps=10, logging_steps=1,
    )  # fmt: skip
    trainer.train()
    last = logged(trainer, "learning_rate")[-1]
    if name == "cosine_with_min_lr":  # it ends a step later
        last = trainer.lr_scheduler.get_last_lr()[0]
    assert last == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_schedule_counts_updates(kind, tmp_path, steps):
    trainer = fit_line(
        kind, tmp_path, train=72, per_device_train_batch_size=4, gradient_accumulation_steps=steps,
        num_train_epochs=1, logging_steps=1, learning_rate=1.0, warmup_steps=2,
    )  # fmt: skip
    trainer.train()
    total = 18 // steps
    expected = [step / 2 if step < 2 else (total - step) / (total - 2) for step in range(total)]
    assert logged(trainer, "learning_rate") == pytest.approx(expected)


def test_warmup_may_be_a_share_of_the_steps(kind, tmp_path):
    trainer = fit_line(
        kind, tmp_path, max_steps=10, warmup_steps=0.5, logging_steps=1, learning_rate=1.0
    )
    trainer.train()
    assert logged(trainer, "learning_rate")[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_plateau_lowers_the_rate(kind, tmp_path):
    class LogsRate(kind):
        def log(self, logs, *args, **kwargs):
            if hasattr(self.lr_scheduler, "_last_lr"):
                logs["learning_rate"] = self.lr_scheduler._last_lr[0]
            super().log(logs, *args, **kwargs)

    losses = iter([1.0, 2.0, 2.0, 2.0, 2.0])
    trainer = fit_line(
        LogsRate, tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch",
        lr_scheduler_kwargs={"patience": 1, "factor": 0.5}, metric_for_best_model="eval_worst",
        greater_is_better=False, compute_metrics=lambda _: {"worst": next(losses)},
        num_train_epochs=5, learning_rate=0.2,
    )  # fmt: skip
    trainer.train()
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.05)


def test_a_plateau_of_ones_own_is_kept(kind, tmp_path):
    model = PlainLine()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.2, patience=5, cooldown=2
    )
    trainer = fit_line(
        kind, tmp_path, model=model, optimizers=(optimizer, plateau), eval_strategy="epoch",
        metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.lr_scheduler is plateau
    assert (plateau.factor, plateau.patience, plateau.cooldown) == (0.2, 5, 2)


def test_gradients_are_clipped(kind, tmp_path):
    rows = LineRows(8)
    ends = []
    for limit in (0.01, 1e9):
        trainer = fit_line(
            kind, tmp_path, train=rows, max_steps=1, max_grad_norm=limit, optim="sgd",
            learning_rate=1.0, lr_scheduler_type="constant", logging_steps=1,
        )  # fmt: skip
        trainer.train()
        ends.append((torch.tensor(fitted(trainer)).norm().item(), logged(trainer, "grad_norm")[0]))
    assert ends[0][0] == pytest.approx(0.01, rel=1e-4)
    assert ends[0][1] == pytest.approx(ends[1][1])
    assert ends[1][0] == pytest.approx(ends[1][1], rel=1e-5)


def test_layers_of_a_language_model_can_be_targeted(kind, tmp_path):
    """An option of layer-wise optimizers that others leave alone."""
    model = tiny_gpt2()
    before = copy.deepcopy(model.state_dict())
    trainer = fit_line(kind, tmp_path, model=model, train=equal_rows(), optim="adamw_torch",
                       optim_target_modules=["attn"], max_steps=1, learning_rate=0.1)  # fmt: skip
    trainer.train()
    assert not torch.equal(before["lm_head.weight"], model.state_dict()["lm_head.weight"])

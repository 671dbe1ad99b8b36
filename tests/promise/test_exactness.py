"""The promise: an update's gradient is a function of its sequences, not of how it was cut.

Against torch's own mean over the whole update in one pass, float64, every row with another number
of targets. `tests/promise/test_architectures.py` asks the same of the other model families.
"""

import pytest
import torch
from support.reference import (
    float64_everywhere,
    mean_of_means,
    reference_gradient,
    relative_error,
    sum_of_means,
    unshifted_count,
)
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama

from hf_gradacc.updates.targets import TargetRule, count_targets

ROWS = ragged_rows(11, seed=4)


def run(tmp_path, rows=ROWS, **options):
    """Train without moving the weights, and give the gradient and the members of each update."""
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, rows, callbacks=[recorder], **{"learning_rate": 0.0, **options}
    )
    with float64_everywhere():
        trainer.train()
    sampler = trainer.get_train_dataloader().updates.batch_sampler
    return trainer, recorder.gradients, sampler.membership(0)


def expect(members, rows=ROWS):
    model = tiny_llama().train()
    with float64_everywhere():
        return reference_gradient(model, [rows[i] for i in members], pad)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cut",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 3, "effective_batch_size": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 8},
        {"effective_batch_size": 8, "max_tokens_per_micro_batch": 30},
        {"effective_batch_size": 8, "max_tokens_per_micro_batch": 1},
        {"effective_batch_size": 8, "dataloader_num_workers": 2},
    ],
    ids=lambda cut: ",".join(f"{k}={v}" for k, v in cut.items()),
)
def test_the_cut_does_not_change_the_gradient(tmp_path, cut):
    _, gradients, updates = run(tmp_path, **cut)
    assert [len(members) for members in updates] == [8, 3]
    for gradient, members in zip(gradients, updates, strict=True):
        assert relative_error(gradient, expect(members)) <= 1e-10


@pytest.mark.parametrize("wrong", [mean_of_means, sum_of_means, unshifted_count])
def test_the_usual_mistakes_are_far_outside_of_the_tolerance(wrong):
    batches = [pad(ROWS[a:b]) for a, b in ((0, 3), (3, 7), (7, 8))]
    counts = [count_targets(batch, TargetRule.NEXT_TOKEN) for batch in batches]
    model = tiny_llama()
    with float64_everywhere():
        actual = wrong(model, batches, counts)
    assert relative_error(actual, expect(range(8))) > 1e-3


def test_updates_drawn_by_tokens_are_exact_too(tmp_path):
    trainer, gradients, updates = run(tmp_path, tokens_per_update=25, per_device_train_batch_size=2)
    assert len({len(members) for members in updates}) > 1
    for gradient, members in zip(gradients, updates, strict=True):
        assert relative_error(gradient, expect(members)) <= 1e-10
    targets = [row["tokens_per_update"] for row in trainer.state.log_history if "loss" in row]
    assert all(count >= 25 for count in targets[:-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    ["sgd", "momentum", "adamw", "adafactor", "custom", "clipped"],
)
def test_the_weights_after_20_updates_are_those_of_whole_batches(tmp_path, optimizer):
    class Signed(torch.optim.Optimizer):
        """An optimizer nobody foresaw: steps by a smooth function of the gradient."""

        def __init__(self, params):
            super().__init__(params, {"lr": 0.05})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data.add_(torch.tanh(3 * p.grad), alpha=-group["lr"])

    def make(params):
        params = list(params)
        return {
            "sgd": lambda: torch.optim.SGD(params, lr=0.1),
            "momentum": lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
            "adamw": lambda: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1),
            "adafactor": lambda: torch.optim.Adafactor(params, lr=1e-2),
            "custom": lambda: Signed(params),
            "clipped": lambda: torch.optim.SGD(params, lr=0.5),
        }[optimizer]()

    max_norm = 0.3 if optimizer == "clipped" else 0.0
    rows = ragged_rows(40, seed=8)
    # Both before float64 becomes the default, which would draw other weights.
    model, whole = tiny_llama(), tiny_llama().train()
    with float64_everywhere():
        trainer = make_trainer(
            tmp_path,
            rows,
            model=model,
            effective_batch_size=8,
            per_device_train_batch_size=3,
            num_train_epochs=4,
            max_grad_norm=max_norm,
            trainer_options={"optimizers": (make(model.parameters()), None)},
            lr_scheduler_type="constant",
        )
        trainer.train()
        sampler = trainer.get_train_dataloader().updates.batch_sampler
        step = make(whole.parameters())
        for epoch in range(4):
            for members in sampler.membership(epoch):
                whole(**pad([rows[i] for i in members])).loss.backward()
                if max_norm:
                    torch.nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
                step.step()
                step.zero_grad()
    assert trainer.state.global_step == 20
    expected = whole.state_dict()
    assert relative_error(tiny_llama().state_dict(), expected) > 1e-3  # it did move
    assert relative_error(model.state_dict(), expected) <= 1e-10


def test_weights_do_not_move_inside_an_update(tmp_path):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        seen = 0

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = [p.detach().clone() for p in model.parameters()]

        def on_substep_end(self, args, state, control, model=None, **kwargs):
            self.seen += 1
            assert all(map(torch.equal, self.before, model.parameters()))

        on_pre_optimizer_step = on_substep_end

    watch = Watch()
    make_trainer(
        tmp_path, ROWS, effective_batch_size=8, per_device_train_batch_size=2, callbacks=[watch]
    ).train()
    assert watch.seen == 3 + 1 + 1 + 1


def test_rows_without_a_target_contribute_nothing(tmp_path):
    bare = [{**row, "labels": [-100] * len(row["labels"])} for row in ragged_rows(3, seed=9)]
    mixed = [bare[0], *ROWS[:4], bare[1], *ROWS[4:7], bare[2]]
    _, (gradient,), (members,) = run(
        tmp_path, mixed, effective_batch_size=10, per_device_train_batch_size=1
    )
    assert len(members) == 10
    assert relative_error(gradient, expect(range(7))) <= 1e-10

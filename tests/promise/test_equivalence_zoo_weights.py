"""After twenty updates the weights are those of a plain torch loop over whole batches.

The loop knows nothing of the package: it pads each update's rows together, takes the model's own
loss, clips, and steps torch's optimizer. What it is told is which rows an update holds.
"""

import pytest
import torch
from support.reference import float64_everywhere, model_loss
from support.zoo import case_named
from torch.optim import SGD, AdamW, Optimizer
from transformers import Adafactor, Trainer, TrainerCallback

from hf_gradacc import GradAccArguments, GradAccTrainer

pytestmark = pytest.mark.slow

UPDATES = 20
EFFECTIVE_BATCH_SIZE = 5  # of eleven rows: every third update holds but one
LEARNING_RATE = 0.02


class SignOfMomentum(Optimizer):
    """A custom optimizer (Lion's rule): a step of fixed size, so any error of scale is hidden from
    it, but not an error of direction."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                # tanh for sign: a sign turns rounding at zero into a whole step.
                p.sub_(group["lr"] * (0.9 * momentum + 0.1 * p.grad).mul(1e3).tanh())
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS = {
    "sgd": (lambda p: SGD(p, lr=LEARNING_RATE), {"optim": "sgd"}),
    "momentum": (
        lambda p: SGD(p, lr=LEARNING_RATE, momentum=0.9, nesterov=True),
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"},
    ),
    "adamw": (
        lambda p: AdamW(p, lr=LEARNING_RATE, weight_decay=0.0),
        {"optim": "adamw_torch"},
    ),
    "adafactor": (
        # Of its own, it divides by the root of a mean square of 1e-30 and more: where a gradient is
        # zero, as of attention's key biases, that is rounding over rounding.
        lambda p: Adafactor(
            p, lr=LEARNING_RATE, eps=(1e-12, 1e-3), scale_parameter=False, relative_step=False
        ),
        None,
    ),
    "custom": (lambda p: SignOfMomentum(p, lr=LEARNING_RATE), None),
}


class WatchInsideUpdates(TrainerCallback):
    """Asserts that no weight moves between the micro-batches of an update."""

    def __init__(self):
        self.moved = 0
        self.looked = 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = [p.detach().clone() for p in model.parameters()]

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.looked += 1
        now = model.parameters()
        self.moved += sum(not torch.equal(a, b) for a, b in zip(self.before, now, strict=True))


def train(case, folder, *, optimizer, max_grad_norm, rows_per_micro_batch):
    """Twenty updates of our trainer; the trained model, and the rows of each update."""
    make, options = OPTIMIZERS[optimizer]
    model = case.build()
    watch = WatchInsideUpdates()
    arguments = GradAccArguments(
        output_dir=str(folder),
        max_steps=UPDATES,
        effective_batch_size=EFFECTIVE_BATCH_SIZE,
        per_device_train_batch_size=rows_per_micro_batch,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=max_grad_norm,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options or {},
    )
    given = {} if options else {"optimizers": (make(model.parameters()), None)}
    trainer = GradAccTrainer(
        model,
        arguments,
        train_dataset=case.rows(),
        data_collator=case.collator(model),
        callbacks=[watch],
        **given,
    )
    trainer.train()
    assert watch.looked >= UPDATES // 2
    assert watch.moved == 0
    sampler = trainer.get_train_dataloader().updates.batch_sampler
    updates = [u for epoch in range(UPDATES) for u in sampler.membership(epoch)][:UPDATES]
    assert len({len(members) for members in updates}) == 2
    return model, updates


def plain_loop(case, updates, *, optimizer, max_grad_norm):
    model = case.build()
    stepper = OPTIMIZERS[optimizer][0](model.parameters())
    rows, collator = case.rows(), case.collator(model)
    for members in updates:
        stepper.zero_grad()
        model_loss(model, dict(collator([rows[i] for i in members]))).backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        stepper.step()
    return model


def distance(left, right, start):
    """How far apart two models ended, relative to how far they went."""
    pairs = zip(left.parameters(), right.parameters(), start.parameters(), strict=True)
    apart = gone = 0.0
    for a, b, c in pairs:
        apart += float((a - b).detach().square().sum())
        gone += float((b - c).detach().square().sum())
    assert gone > 0
    return (apart / gone) ** 0.5


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["gpt2-causal", "bert-qa"])
def test_weights_after_twenty_updates_are_those_of_whole_batches(
    tmp_path, name, optimizer, max_grad_norm
):
    case = case_named(name)
    options = {"optimizer": optimizer, "max_grad_norm": max_grad_norm}
    with float64_everywhere():
        ours, updates = train(case, tmp_path, **options, rows_per_micro_batch=2)
        theirs = plain_loop(case, updates, **options)
        assert distance(ours, theirs, case.build()) <= 1e-8


@pytest.mark.parametrize("name", ["t5-seq2seq", "bert-mlm", "roberta-single", "xlnet-mc"])
def test_every_head_ends_at_the_weights_of_whole_batches(tmp_path, name):
    case = case_named(name)
    options = {"optimizer": "adamw", "max_grad_norm": 1.0}
    with float64_everywhere():
        ours, updates = train(case, tmp_path, **options, rows_per_micro_batch=3)
        theirs = plain_loop(case, updates, **options)
        assert distance(ours, theirs, case.build()) <= 1e-8


def test_the_cut_does_not_change_where_training_ends(tmp_path):
    """The same run, one row at a time and all rows at once."""
    case = case_named("llama-causal")
    options = {"optimizer": "adamw", "max_grad_norm": 1.0}
    with float64_everywhere():
        one, updates = train(case, tmp_path, **options, rows_per_micro_batch=1)
        two, again = train(case, tmp_path, **options, rows_per_micro_batch=4)
        assert updates == again
        assert distance(one, two, case.build()) <= 1e-9


def test_the_comparison_rejects_the_stock_trainer(tmp_path):
    """BERT as masked LM, accumulated by the stock Trainer: SGD ends somewhere else."""
    case = case_named("bert-mlm")
    with float64_everywhere():
        stock, ours = case.build(), case.build()
        for model, trainer_class in ((stock, Trainer), (ours, GradAccTrainer)):
            arguments = GradAccArguments(
                output_dir=str(tmp_path),
                max_steps=3,
                per_device_train_batch_size=3,
                gradient_accumulation_steps=4,
                optim="sgd",
                learning_rate=LEARNING_RATE,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            trainer_class(
                model, arguments, train_dataset=case.rows(), data_collator=case.collator(model)
            ).train()
        assert distance(stock, ours, case.build()) > 0.1

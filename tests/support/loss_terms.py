"""A loss of three terms with three counts, as people write one, and trainers that take it."""

from __future__ import annotations

from pathlib import Path

from torch.nn import functional
from transformers import Trainer, TrainerCallback

from hf_gradacc import GradAccMixin, LossTerm, LossTerms

from .reference import float64_everywhere
from .tiny import make_trainer, pad, ragged_rows, tiny_llama

ROWS = ragged_rows(13, seed=3)


def parts_of(model, inputs):
    """A mean over next tokens, a squared length of each row, a distance of every second token."""
    outputs = model(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"].unsqueeze(-1).to(outputs.logits.dtype)
    hidden = outputs.hidden_states[-1] * mask
    per_row = (hidden.sum(1) / mask.sum(1)).square().sum(-1)
    chosen = inputs["attention_mask"][:, ::2].bool()
    per_token = (hidden[:, ::2] - 0.3).square().sum(-1)[chosen]
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    return functional.cross_entropy(logits, labels), per_row, per_token


def whole_loss(model, rows):
    """What the loss of these rows is, at once."""
    tokens, per_row, per_token = parts_of(model, pad(rows))
    return tokens + 0.5 * per_row.mean() + 0.1 * per_token.mean()


class Summed(Trainer):
    """As it would be written for stock."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens, per_row, per_token = parts_of(model, inputs)
        return tokens + 0.5 * per_row.mean() + 0.1 * per_token.mean()


class Named(Trainer):
    """The count of the third term is known after a forward only."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens, per_row, per_token = parts_of(model, inputs)
        third = LossTerm(0.1 * per_token.sum(), count=per_token.numel(), is_sum=True)
        terms = LossTerms(tokens=tokens, rows=0.5 * per_row.mean(), distance=third)
        return (terms, {"rows": per_row}) if return_outputs else terms


class Counted(Named):
    """And here before it."""

    def count_terms(self, inputs):
        return {"distance": int(inputs["attention_mask"][:, ::2].sum())}


class Miscounted(Named):
    def count_terms(self, inputs):
        return {"distance": int(inputs["attention_mask"].sum())}


class KeepsGradients(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append([p.grad.clone() for p in model.parameters()])


def make(tmp_path, kind, *, compute_loss_func=None, **options):
    own = type("Ours", (GradAccMixin, kind), {})
    keeper = KeepsGradients()
    trainer_options = {} if compute_loss_func is None else {"compute_loss_func": compute_loss_func}
    options = {"effective_batch_size": 13, "max_steps": 1, "max_grad_norm": 0.0} | options
    trainer = make_trainer(
        Path(tmp_path),
        ROWS,
        model=tiny_llama().double(),
        data_collator=pad,
        trainer_class=own,
        train_sampling_strategy="sequential",
        logging_steps=1,
        callbacks=[keeper],
        trainer_options=trainer_options,
        **options,
    )
    return trainer, keeper


def gradient_at_once():
    model = tiny_llama().double().train()
    loss = whole_loss(model, ROWS)
    loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters()]


def distance(gradients, expected):
    size = sum(float(e.square().sum()) for e in expected) ** 0.5
    error = sum(float((g - e).square().sum()) for g, e in zip(gradients, expected, strict=True))
    return error**0.5 / size


def gradients_of_rank(folder):
    """Train both kinds on this rank; return the gradient and the rows of the log of each."""
    return [_of_rank(f"{folder}/{kind.__name__}", kind) for kind in (Named, Counted)]


def _of_rank(folder, kind):
    with float64_everywhere():
        trainer, keeper = make(folder, kind, per_device_train_batch_size=2)
        trainer.train()
    return [g.tolist() for g in keeper.gradients[0]], trainer.state.log_history

"""Programs whose own part is the machinery: loaders, samplers, optimizers, steps, callbacks."""

from __future__ import annotations

import random

import datasets
import pytest
import torch
import transformers as T
from support.programs import NUM_ROWS, Program, cases, hold
from support.tiny import pad, ragged_rows, tiny_llama
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler


def rows():
    return ragged_rows(NUM_ROWS, seed=6)


class Tabular(nn.Module):
    """A table's columns through two layers; the loss is the model's own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, features, labels=None):
        score = self.layers(features).squeeze(-1)
        return {"loss": F.binary_cross_entropy_with_logits(score, labels), "logits": score}


def table():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_ROWS, 4, generator=draw, dtype=torch.float64)
    return [{"features": x, "labels": float(x[0] > 0)} for x in features]


# ---- where rows come from ----------------------------------------------------------------------


class Balanced(T.Trainer):
    """Rare rows are drawn more often."""

    def _get_train_sampler(self, train_dataset=None):
        weights = [1.0 + (i % 4) * 2 for i in range(NUM_ROWS)]
        draw = torch.Generator().manual_seed(7)
        return WeightedRandomSampler(weights, NUM_ROWS, replacement=True, generator=draw)


class LengthGrouped(Sampler):
    """LLaVA's: shuffled, cut into megabatches of a batch x accumulation, each sorted by length."""

    def __init__(self, batch_size, world_size, lengths):
        self.size, self.lengths = batch_size * world_size, lengths

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        order = list(range(len(self.lengths)))
        random.Random(1).shuffle(order)
        groups = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        return iter([i for g in groups for i in sorted(g, key=lambda i: -self.lengths[i])])


class GroupsByLength(T.Trainer):
    def _get_train_sampler(self, *args):
        return LengthGrouped(
            self.args.train_batch_size,
            self.args.world_size * self.args.gradient_accumulation_steps,
            [len(row["input_ids"]) for row in self.train_dataset],
        )


class OwnLoader(T.Trainer):
    """From the last row to the first, which no other loader gives."""

    def get_train_dataloader(self):
        rows = list(reversed(self.train_dataset))
        return DataLoader(rows, self.args.train_batch_size, collate_fn=self.data_collator)


class OwnPreparedLoader(OwnLoader):
    def get_train_dataloader(self):
        return self.accelerator.prepare(super().get_train_dataloader())


class OwnStreamLoader(T.Trainer):
    def get_train_dataloader(self):
        return DataLoader(Stream(), self.args.train_batch_size, collate_fn=self.data_collator)


class ChangesTheLoader(T.Trainer):
    """Calls the stock loader and wraps it."""

    def get_train_dataloader(self):
        return Doubles(super().get_train_dataloader())


class Doubles:
    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            yield {**batch, "input_ids": batch["input_ids"] // 2}


class CountsBatches(T.Trainer):
    """Looks at all batches of a step before it begins."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.rows = getattr(self, "rows", 0) + sum(len(b["input_ids"]) for b in batches)
        return batches, count


class CountsWork(T.Trainer):
    def floating_point_ops(self, inputs):
        return int(inputs["input_ids"].numel())


def counted_work(trainer):
    assert trainer.state.total_flos > NUM_ROWS


class MasksMore(T.Trainer):
    """Takes the batches by itself, and leaves every other target out."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        for batch in batches:
            batch["labels"][:, ::2] = -100
        return batches, self._get_num_items_in_batch(batches, device)


def saw_all_rows(trainer):
    assert trainer.rows == NUM_ROWS


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from rows()


def hub_stream():
    return datasets.Dataset.from_list(rows()).to_iterable_dataset(num_shards=2)


def ready_batches():
    items, made, start = rows(), [], 0
    for size in [2, 1, 3, 1, 1, 2, 1, 2, 1, 1, 1, 2]:
        made.append(pad(items[start : start + size]))
        start += size
    return made


def first_item(items):
    return items[0]


def joined(items):
    """Of ready-made batches, one; stock on the whole batch is given them joined."""
    if len(items) == 1:
        return items[0]
    parts = [
        {
            key: value[i][: int(item["attention_mask"][i].sum())].tolist()
            for key, value in item.items()
        }
        for item in items
        for i in range(len(item["input_ids"]))
    ]
    return pad(parts)


# ---- how weights move --------------------------------------------------------------------------


class LayerwiseDecay(T.Trainer):
    """Each layer learns at 0.8 of the rate of the one above it; no decay on norms."""

    def create_optimizer(self, model=None):
        groups = []
        for name, weight in self.model.named_parameters():
            depth = next((int(part) for part in name.split(".") if part.isdecimal()), 2)
            rate = self.args.learning_rate * 0.8 ** (2 - depth)
            decay = 0.0 if "norm" in name else 0.1
            groups.append({"params": [weight], "lr": rate, "weight_decay": decay})
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        return self.optimizer


class OwnSchedule(T.Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: 1 / (1 + step) * (step < num_training_steps)
        )
        return self.lr_scheduler


def hand_made(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"optimizers": (optimizer, T.get_cosine_schedule_with_warmup(optimizer, 1, 3))}


# ---- steps of one's own ------------------------------------------------------------------------


class DividesByArgument(T.Trainer):
    """A step copied from before 4.46 with the division where it stood."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        if self.args.gradient_accumulation_steps > 1:
            loss = loss / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class PlainBackward(DividesByArgument):
    """Older yet: no accelerator."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()


class DividesInPlace(T.Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss / self.args.gradient_accumulation_steps)
        return loss.detach() / self.args.gradient_accumulation_steps


class AttacksRows(T.Trainer):
    """FGM on each row's embeddings: a loss at a worse place is added, by its own backward."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        rest = {key: value for key, value in inputs.items() if key != "input_ids"}
        loss = self.compute_loss(model, {**rest, "inputs_embeds": embedded})
        loss = loss / self.args.gradient_accumulation_steps
        (slope,) = torch.autograd.grad(loss, embedded, retain_graph=True)
        self.accelerator.backward(loss)
        slope = slope / slope.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-9)
        worse = model.get_input_embeddings()(inputs["input_ids"]) + 0.5 * slope
        loss_there = self.compute_loss(model, {**rest, "inputs_embeds": worse})
        loss_there = loss_there / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss_there)
        return loss.detach()


class AttacksWeights(T.Trainer):
    """FGM as published: the embedding's weights move along their gradient and back again."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        weight = model.get_input_embeddings().weight
        kept = weight.data.clone()
        if weight.grad is not None and weight.grad.norm() > 0:
            weight.data.add_(0.3 * weight.grad / weight.grad.norm())
            worse = self.compute_loss(model, self._prepare_inputs(inputs))
            if self.args.gradient_accumulation_steps > 1:
                worse = worse / self.args.gradient_accumulation_steps
            self.accelerator.backward(worse)
            weight.data.copy_(kept)
        return loss


class AdversarialWeights(T.Trainer):
    """AWP in compute_loss: the weights move, the loss is taken there, and they move back."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        head = model.get_output_embeddings().weight
        kept = head.data.clone()
        head.data.mul_(1.05)
        loss = super().training_step(model, inputs, num_items_in_batch)
        head.data.copy_(kept)
        return loss


# ---- what looks on -----------------------------------------------------------------------------


class Average(T.TrainerCallback):
    """EMA of the weights, put into the model at the end."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.kept = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, weight in model.named_parameters():
            self.kept[name].mul_(0.9).add_(weight.detach(), alpha=0.1)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for name, weight in model.named_parameters():
            weight.data.copy_(self.kept[name])


class Unfreezes(T.TrainerCallback):
    """The first layers are frozen for one step, then trained."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for weight in model.model.layers[0].parameters():
            weight.requires_grad_(state.global_step > 0)


class ScalesGradients(T.TrainerCallback):
    """Normalizes the gradient of each weight before the optimizer sees it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.div_(1 + weight.grad.norm())


class LogsParts(T.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self.log({"part": float(loss.detach())})
        return (loss, outputs) if return_outputs else loss


def logs_as_often_as_stock(trainer):
    rows = [row for row in trainer.state.log_history if "part" in row]
    assert len(rows) == 12


class OwnPrediction(T.Trainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            outputs = model(**self._prepare_inputs(inputs))
        return outputs.loss, outputs.logits.argmax(-1), inputs["labels"]


def accuracy(prediction):
    wanted = prediction.label_ids
    return {"accuracy": float((prediction.predictions == wanted)[wanted != -100].mean())}


def with_metrics(model):
    return {
        "eval_dataset": rows()[:5],
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }


def evaluates(model):
    return {"eval_dataset": rows()[:5], "compute_metrics": accuracy}


def was_evaluated(trainer):
    seen = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    assert len(seen) == 3
    assert all(0 <= value <= 1 for value in seen)


EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}


def called(callback):
    return lambda model: {"callbacks": [callback()]}


BATCH_OF_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
BATCH_OF_ALL = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}

PROGRAMS = {
    "table": Program(Tabular, table),
    "weighted sampler": Program(tiny_llama, rows, pad, Balanced, stock="exact"),
    "grouped by length": Program(tiny_llama, rows, pad, GroupsByLength, stock="exact"),
    "own loader": Program(tiny_llama, rows, pad, OwnLoader, stock="exact"),
    "own loader of a stream": Program(tiny_llama, rows, pad, OwnStreamLoader, stock="exact"),
    "stock loader, changed": Program(
        tiny_llama,
        rows,
        pad,
        ChangesTheLoader,
        stock="exact",
    ),
    "own loader, prepared": Program(tiny_llama, rows, pad, OwnPreparedLoader, stock="exact"),
    "counts batches": Program(
        tiny_llama, rows, pad, CountsBatches, stock="exact", check=saw_all_rows
    ),
    "counts work": Program(tiny_llama, rows, pad, CountsWork, stock="exact", check=counted_work),
    "masks more": Program(tiny_llama, rows, pad, MasksMore, stock="exact"),
    "stream": Program(tiny_llama, Stream, pad, stock="exact"),
    "stream of datasets": Program(tiny_llama, hub_stream, pad, stock="exact"),
    "ready-made batches": Program(
        tiny_llama, ready_batches, joined, stock="exact", whole=BATCH_OF_ALL, pieces=BATCH_OF_ONE
    ),
    "layer-wise rates": Program(tiny_llama, rows, pad, LayerwiseDecay, stock="exact"),
    "own schedule": Program(tiny_llama, rows, pad, OwnSchedule, stock="exact"),
    "optimizer and schedule given": Program(tiny_llama, rows, pad, more=hand_made, stock="exact"),
    "step divides by the argument": Program(tiny_llama, rows, pad, DividesByArgument),
    "step without accelerator": Program(tiny_llama, rows, pad, PlainBackward),
    "step divides in place": Program(tiny_llama, rows, pad, DividesInPlace),
    "attack on rows": Program(tiny_llama, rows, pad, AttacksRows, says="several backwards"),
    "attack on weights": Program(
        tiny_llama, rows, pad, AttacksWeights, ours="named", says="where to depends on"
    ),
    "adversarial weights": Program(tiny_llama, rows, pad, AdversarialWeights, stock="exact"),
    "averaged weights": Program(tiny_llama, rows, pad, more=called(Average), stock="exact"),
    "unfreezing": Program(tiny_llama, rows, pad, more=called(Unfreezes), stock="exact"),
    "own gradient norm": Program(
        tiny_llama, rows, pad, more=called(ScalesGradients), stock="exact"
    ),
    "clipping": Program(tiny_llama, rows, pad, options={"max_grad_norm": 0.5}, stock="exact"),
    "logs in the loss": Program(
        tiny_llama, rows, pad, LogsParts, stock="exact", check=logs_as_often_as_stock
    ),
    "metrics": Program(
        tiny_llama,
        rows,
        pad,
        more=with_metrics,
        options=EVALUATES,
        stock="exact",
        check=was_evaluated,
    ),
    "own prediction step": Program(
        tiny_llama,
        rows,
        pad,
        OwnPrediction,
        more=evaluates,
        options=EVALUATES,
        stock="exact",
        check=was_evaluated,
    ),
}


@pytest.mark.parametrize("program", cases(PROGRAMS))
def test_a_program_with_machinery_of_its_own_trains(program, tmp_path):
    hold(program, tmp_path)

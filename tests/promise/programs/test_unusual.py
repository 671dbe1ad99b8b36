"""Programs with batches, models and hooks of unusual shape."""

from __future__ import annotations

import math
from collections import UserDict
from dataclasses import dataclass

import datasets
import pytest
import torch
import transformers as T
from support.programs import NUM_ROWS, Program, cases, hold
from support.tiny import pad, ragged_rows, tiny_llama
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def language_rows():
    return ragged_rows(NUM_ROWS, seed=6)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- batches -----------------------------------------------------------------------------------


def pairs_of_tensors():
    return TensorDataset(draw(NUM_ROWS, 4, seed=0), torch.arange(NUM_ROWS) % 3)


class TakesTuples(T.Trainer):
    """A batch is a tuple, as a torch ``DataLoader`` makes it."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        features, labels = inputs
        logits = model(features)
        loss = F.cross_entropy(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


def tuples(rows):
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def named(rows):
    features, labels = tuples(rows)
    return {"features": features, "labels": labels}


class GivesTuples(nn.Module):
    """Gives loss and logits as a tuple, as before models gave dictionaries."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, features, labels=None):
        logits = self.head(features)
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


class LossInTraining(GivesTuples):
    """FlagEmbedding's: there is a loss in training mode only."""

    def forward(self, features, labels=None):
        logits = self.head(features)
        return {
            "loss": F.cross_entropy(logits, labels) if self.training else None,
            "logits": logits,
        }


def graphs():
    """Graphs of 2 to 6 nodes."""
    rows = []
    for i in range(NUM_ROWS):
        n = 2 + i % 5
        edges = [[place, (place + 1) % n] for place in range(n)]
        rows.append({"x": draw(n, 4, seed=i), "edges": torch.tensor(edges).T, "y": i % 3})
    return rows


def one_graph(rows):
    """As torch_geometric does: nodes of all graphs in one tensor, and whose they are."""
    sizes = [len(row["x"]) for row in rows]
    starts = [sum(sizes[:i]) for i in range(len(rows))]
    return {
        "x": torch.cat([row["x"] for row in rows]),
        "edge_index": torch.cat(
            [row["edges"] + start for row, start in zip(rows, starts, strict=True)], dim=1
        ),
        "batch": torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(sizes)),
        "labels": torch.tensor([row["y"] for row in rows]),
    }


class GraphNet(nn.Module):
    """One round of messages, the mean over the nodes of each graph, a class for each."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, edge_index, batch, labels=None):
        hidden = self.into(x).tanh()
        hidden = hidden.index_add(0, edge_index[1], hidden[edge_index[0]])
        sums = hidden.new_zeros(len(labels), 8).index_add(0, batch, hidden)
        logits = self.head(sums / torch.bincount(batch, minlength=len(labels))[:, None])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class NodeNet(GraphNet):
    """A class for each node: the mean is over nodes."""

    def forward(self, x, edge_index, batch, labels=None):
        hidden = self.into(x).tanh()
        logits = self.head(hidden.index_add(0, edge_index[1], hidden[edge_index[0]]))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def one_graph_of_nodes(rows):
    classes = [torch.arange(len(row["x"])) % 3 for row in rows]
    return one_graph(rows) | {"labels": torch.cat(classes)}


def instance_rows():
    return [
        {"pixel_values": draw(3, 8, 8, seed=i), "masks": draw(1 + i % 3, 8, 8, seed=50 + i) > 0}
        for i in range(NUM_ROWS)
    ]


def lists_of_masks(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "mask_labels": [row["masks"] for row in rows],
        "class_labels": [torch.arange(len(row["masks"])) for row in rows],
    }


class Instances(nn.Module):
    """Mask2Former's inputs: for each image a tensor of its masks."""

    def __init__(self):
        super().__init__()
        self.masks = nn.Conv2d(3, 3, 1)

    def forward(self, pixel_values, mask_labels=None, class_labels=None):
        logits = self.masks(pixel_values)
        losses = [
            F.binary_cross_entropy_with_logits(logits[i][kinds], masks.double())
            for i, (masks, kinds) in enumerate(zip(mask_labels, class_labels, strict=True))
        ]
        return {"loss": torch.stack(losses).mean(), "logits": logits}


def with_flag(rows):
    """As the CLIP example: a flag among the tensors."""
    return pad(rows) | {"use_cache": False}


def as_user_dict(rows):
    return UserDict(pad(rows))


class Tasks(nn.Module):
    """A trunk and a head for each task; which one is a word in the batch."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 8)
        self.heads = nn.ModuleDict({"sort": nn.Linear(8, 3), "score": nn.Linear(8, 1)})

    def forward(self, task, features, labels=None):
        out = self.heads[task](self.trunk(features).tanh())
        if task == "sort":
            return {"loss": F.cross_entropy(out, labels.long()), "logits": out}
        return {"loss": F.mse_loss(out[:, 0], labels), "logits": out}


class TaskLoader:
    """Batches of one task after batches of another; no ``DataLoader``."""

    def __init__(self, rows, size):
        self.rows, self.size = rows, size

    def __len__(self):
        return math.ceil(len(self.rows) / self.size)

    def __iter__(self):
        for i in range(len(self)):
            part = self.rows[i * self.size : (i + 1) * self.size]
            yield named(part) | {"task": ("sort", "score")[i // (8 // self.size) % 2]}


class ManyTasks(T.Trainer):
    def get_train_dataloader(self):
        rows = [(x, y.double()) for x, y in self.train_dataset]
        return TaskLoader(rows, self.args.train_batch_size)


# ---- losses ------------------------------------------------------------------------------------


class Curriculum(T.Trainer):
    """The weight of a part of the loss follows the step."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        share = self.state.global_step / self.state.max_steps
        loss = outputs.loss + share * outputs.logits.square().mean((1, 2)).mean()
        return (loss, outputs) if return_outputs else loss


class Penalty(T.Trainer):
    """A gradient penalty: needs gradients whenever it is asked for a loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        features = inputs["features"].requires_grad_()
        loss, logits = model(features, inputs["labels"])
        (slope,) = torch.autograd.grad(logits.sum(), features, create_graph=True)
        loss = loss + 0.1 * slope.square().sum(-1).mean()
        return (loss, {"logits": logits}) if return_outputs else loss


class Preference(T.Trainer):
    """DPO of one's own: chosen and rejected in one forward, a frozen copy as reference."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(1)
        self.reference = tiny_llama(seed=1).eval()

    def of(self, model, inputs):
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        labels = inputs["labels"][:, 1:]
        each = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (each * (labels != -100)).sum(-1)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with torch.no_grad():
            before = self.of(self.reference, inputs)
        chosen, rejected = (self.of(model, inputs) - before).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        return (loss, {"chosen": chosen}) if return_outputs else loss


def pairs():
    better, worse = ragged_rows(NUM_ROWS, seed=1), ragged_rows(NUM_ROWS, seed=2)
    return [{"chosen": a, "rejected": b} for a, b in zip(better, worse, strict=True)]


def chosen_then_rejected(rows):
    return pad([row["chosen"] for row in rows] + [row["rejected"] for row in rows])


class Siamese(T.Trainer):
    """SimSiam: two views of each row, no negatives, a stopped gradient."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        one, two = model(inputs["features"]), model(inputs["features"].flip(-1))
        loss = -F.cosine_similarity(one, two.detach()).mean()
        return (loss, {"one": one}) if return_outputs else loss


class HardTriplets(T.Trainer):
    """Batch-hard mining: the farthest of a class, the nearest of another, in the micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        rows, labels = model(inputs["features"]), inputs["labels"]
        apart = torch.cdist(rows, rows)
        same = labels[:, None] == labels[None, :]
        far = (apart * same).max(1).values
        near = (apart + same * 1e3).min(1).values
        loss = F.relu(far - near + 5).mean()
        return (loss, {"rows": rows}) if return_outputs else loss


class NeedsItsCount(T.Trainer):
    """Divides a sum by the count it is told; without one there is none."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        losses = F.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        if num_items_in_batch is None:
            num_items_in_batch = labels[:, 1:].ne(-100).sum()
        loss = losses / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


# ---- hooks -------------------------------------------------------------------------------------


class Augments(T.Trainer):
    """Changes each batch on its way to the model."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        ids = inputs["input_ids"]
        return {**inputs, "input_ids": ids.where(ids % 5 > 0, 4)}


class BothAtOnce(T.Trainer):
    def create_optimizer_and_scheduler(self, num_training_steps):
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, nesterov=True, momentum=0.5
        )
        self.lr_scheduler = T.get_linear_schedule_with_warmup(self.optimizer, 1, num_training_steps)


class LogsItsOwn(T.Trainer):
    """Collects numbers in the loss, adds them to the row as it is logged."""

    def __init__(self, *args, extra=2, **kwargs):
        super().__init__(*args, **kwargs)
        self.numbers, self.extra = [], extra

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.numbers.append(float(outputs.logits.detach().abs().max()))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if self.numbers:
            logs["largest"] = max(self.numbers)
            self.numbers = []
        super().log(logs, start_time)


class LogsInItsHook(T.Trainer):
    """Writes the whole signature of a private hook, as people do who log something of each step."""

    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, **kwargs
    ):
        if self.control.should_log:
            self.log({"weights": float(sum(p.detach().norm() for p in model.parameters()))})
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, **kwargs
        )


class Teacher(T.Trainer):
    """Mean teacher: follows the student after each step of the optimizer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = tiny_llama(seed=5).eval()
        self.seen = -1

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step != self.seen:
            self.seen = self.state.global_step
            with torch.no_grad():
                for mine, theirs in zip(self.teacher.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs, 0.5)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        told = self.teacher(**inputs).logits.detach()
        targets = inputs["labels"][:, 1:] != -100
        apart = (outputs.logits - told)[:, :-1].square().sum(-1)
        loss = outputs.loss + apart[targets].mean()
        return (loss, outputs) if return_outputs else loss


class HalvesRates(T.TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + state.global_step)


class StopsEarly(T.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


def stopped_after_two(trainer):
    assert trainer.state.global_step == 2


def lazy():
    """A transform when a row is read, as with ``set_transform``."""
    rows = datasets.Dataset.from_list(
        [{"text": " ".join(map(str, row["input_ids"]))} for row in language_rows()]
    )

    def encode(batch):
        ids = [[int(word) for word in text.split()] for text in batch["text"]]
        return {"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids], "labels": ids}

    return rows.with_transform(encode)


def typed():
    return datasets.Dataset.from_list(language_rows()).with_format("torch")


def collate_typed(rows):
    return pad([{key: value.tolist() for key, value in row.items()} for row in rows])


def shifted_by_hand(rows):
    """Labels that are shifted already, under the name that models know."""
    batch = pad(rows)
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return batch | {"shift_labels": labels}


def wide(rows):
    """Padded to a multiple of eight."""
    width = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
    batch = pad(rows)
    more = width - batch["labels"].shape[1]
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {key: F.pad(value, (0, more), value=fills[key]) for key, value in batch.items()}


def left(rows):
    """Padded on the left, as for generation."""
    flipped = [{key: value[::-1] for key, value in row.items()} for row in rows]
    return {key: value.flip(1) for key, value in pad(flipped).items()}


def forecasts():
    return [
        {"past_values": draw(16, 2, seed=i), "future_values": draw(4, 2, seed=60 + i)}
        for i in range(NUM_ROWS)
    ]


def patch_mixer():
    return T.PatchTSMixerForPrediction(
        T.PatchTSMixerConfig(
            context_length=16,
            prediction_length=4,
            patch_length=4,
            patch_stride=4,
            num_input_channels=2,
            d_model=8,
            num_layers=1,
            dropout=0.0,
            head_dropout=0.0,
            loss="mse",
        )
    )


@dataclass
class OwnOutput(T.utils.ModelOutput):
    loss: torch.Tensor | None = None
    rating: torch.Tensor | None = None


class Recommender(nn.Module):
    """Users and items by number, a rating for each pair; the labels are called ``rating``."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(7, 4), nn.Embedding(5, 4)

    def forward(self, user, item, rating=None):
        given = (self.users(user) * self.items(item)).sum(-1)
        return OwnOutput(loss=F.mse_loss(given, rating), rating=given)


def ratings():
    return [{"user": i % 7, "item": i % 5, "rating": float(i % 4)} for i in range(NUM_ROWS)]


def called(callback):
    return lambda model: {"callbacks": [callback()]}


SAME = {"stock": "exact"}
LATER = "the model is asked before the first update, when a part of the loss weighs nothing"

PROGRAMS = {
    "tuples": Program(
        lambda: nn.Linear(4, 3), pairs_of_tensors, tuples, TakesTuples, says="no tensors by name"
    ),
    "tuple of loss and logits": Program(GivesTuples, pairs_of_tensors, named),
    "loss in training only": Program(LossInTraining, pairs_of_tensors, named),
    "graphs": Program(GraphNet, graphs, one_graph),
    "nodes": Program(NodeNet, graphs, one_graph_of_nodes),
    "instance masks": Program(Instances, instance_rows, lists_of_masks),
    "a flag in the batch": Program(tiny_llama, language_rows, with_flag, **SAME),
    "a batch that is no dict": Program(tiny_llama, language_rows, as_user_dict, **SAME),
    "tasks by turns": Program(Tasks, pairs_of_tensors, named, ManyTasks),
    "curriculum": Program(
        tiny_llama, language_rows, pad, Curriculum, ours="as stock", says="differs", fault=LATER
    ),
    "gradient penalty": Program(GivesTuples, pairs_of_tensors, named, Penalty),
    "own DPO": Program(tiny_llama, pairs, chosen_then_rejected, Preference),
    "two views": Program(lambda: nn.Linear(4, 3), pairs_of_tensors, named, Siamese),
    "hard triplets": Program(
        lambda: nn.Linear(4, 3),
        pairs_of_tensors,
        named,
        HardTriplets,
        says="taken once over all rows",
    ),
    "divides by its count": Program(tiny_llama, language_rows, pad, NeedsItsCount, **SAME),
    "augmentation": Program(tiny_llama, language_rows, pad, Augments, **SAME),
    "optimizer and schedule": Program(tiny_llama, language_rows, pad, BothAtOnce, **SAME),
    "numbers of its own": Program(tiny_llama, language_rows, pad, LogsItsOwn, **SAME),
    "a private hook": Program(tiny_llama, language_rows, pad, LogsInItsHook, **SAME),
    "mean teacher": Program(tiny_llama, language_rows, pad, Teacher),
    "rates by hand": Program(tiny_llama, language_rows, pad, more=called(HalvesRates), **SAME),
    "stops early": Program(
        tiny_llama, language_rows, pad, more=called(StopsEarly), check=stopped_after_two, **SAME
    ),
    "rows made when read": Program(tiny_llama, lazy, pad, **SAME),
    "rows of tensors": Program(tiny_llama, typed, collate_typed, **SAME),
    "shifted by hand": Program(tiny_llama, language_rows, shifted_by_hand, **SAME),
    "padded to eights": Program(tiny_llama, language_rows, wide, **SAME),
    "padded on the left": Program(tiny_llama, language_rows, left),
    "forecasts": Program(patch_mixer, forecasts),
    "ratings": Program(Recommender, ratings),
    "adam": Program(
        tiny_llama,
        language_rows,
        pad,
        options={"optim": "adamw_torch", "learning_rate": 1e-3},
        **SAME,
    ),
}


@pytest.mark.parametrize("program", cases(PROGRAMS))
def test_a_program_of_unusual_shape_trains(program, tmp_path):
    hold(program, tmp_path)

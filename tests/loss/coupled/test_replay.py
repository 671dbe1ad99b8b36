"""Losses that compare rows: two passes over micro-batches against one backward of all rows.

Float64, micro-batches of unequal sizes and widths, and references made by torch alone.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.contrastive import (
    SupCon,
    cut,
    find,
    gradients,
    info_nce,
    rows_of_text,
    sup_con,
    tiny_bert,
    tiny_clip,
    two_passes,
    whole_gradient,
)
from support.reference import relative_error
from torch import nn

from hf_gradacc.errors import LossError, MemoryBudgetError
from hf_gradacc.loss.coupled import replay as replay_module
from hf_gradacc.loss.coupled.replay import Replay
from hf_gradacc.loss.coupling import Exchange

SIZES = [3, 1, 6, 4]
ROWS = rows_of_text(sum(SIZES))


class TwoViews(nn.Module):
    """As open_clip has it: the model returns two vectors of each row, and the scale they share."""

    def __init__(self):
        super().__init__()
        self.bert, self.scale = tiny_bert(), nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, one, other):
        return self.bert(one).pooler_output, self.bert(other).pooler_output, self.scale.exp()


class BarlowTwins(nn.Module):
    """Compares columns over all rows, behind a projector with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.bert = tiny_bert()
        layers = [nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8)]
        self.projector = nn.Sequential(*layers).double()

    def forward(self, input_ids, other):
        a, b = (self.projector(self.bert(ids).pooler_output) for ids in (input_ids, other))
        a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-4).sqrt() for z in (a, b))
        correlation = a.T @ b / len(input_ids)
        return ((correlation - torch.eye(8, dtype=torch.float64)) ** 2).sum()


def text_of(rows, *names):
    return {name: rows[name] for name in ("input_ids", *names)}


def clip_case():
    rows = text_of(ROWS)
    rows["input_ids"] = torch.cat([rows["input_ids"], torch.full((14, 1), 2)], dim=1)
    images = torch.randn(14, 3, 16, 16, dtype=torch.float64, generator=torch.manual_seed(1))
    rows |= {"pixel_values": images, "return_loss": True}
    model = tiny_clip()
    return model, lambda x: model(**x).loss, rows


def sup_con_case():
    model = SupCon()
    return model, lambda x: model(**x)["loss"], text_of(ROWS, "attention_mask", "labels")


def lora_case():
    model = get_peft_model(SupCon(), LoraConfig(target_modules=["query", "value"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    rows = text_of(ROWS, "attention_mask", "labels")
    return model.double(), lambda x: model(**x)["loss"], rows


def tokens_case():
    """The loss itself makes one vector of a row's tokens."""
    model = tiny_bert()

    def compute(x):
        hidden = model(x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state
        mask = x["attention_mask"][..., None]
        return sup_con((hidden * mask).sum(1) / mask.sum(1), x["labels"])

    return model, compute, text_of(ROWS, "attention_mask", "labels")


def blocks_case():
    """One forward of all first views and then all second ones."""
    model = tiny_bert()

    def compute(x):
        vectors = model(torch.cat([x["input_ids"], x["other"]])).pooler_output
        return info_nce(*vectors.chunk(2))

    return model, compute, text_of(ROWS, "other")


def interleaved_case():
    """One forward in which the two views of a row follow each other."""
    model = tiny_bert()

    def compute(x):
        both = torch.stack([x["input_ids"], x["other"]], dim=1).flatten(0, 1)
        return info_nce(*model(both).pooler_output.unflatten(0, (-1, 2)).unbind(1))

    return model, compute, text_of(ROWS, "other")


def scale_case():
    model = TwoViews()

    def compute(x):
        a, b, scale = model(x["input_ids"], x["other"])
        return info_nce(a, b, scale)

    return model, compute, text_of(ROWS, "other")


def in_place_case():
    """The loss writes into what the network returned."""
    model = tiny_bert()

    def compute(x):
        vectors = model(x["input_ids"]).last_hidden_state[:, 0]
        vectors *= torch.arange(16) / 8
        return sup_con(vectors, x["labels"])

    return model, compute, text_of(ROWS, "labels")


def checkpointing_case():
    model, compute, rows = sup_con_case()
    model.bert.gradient_checkpointing_enable()
    return model, compute, rows


CASES = {
    "CLIP": (clip_case, 16),
    "SupCon inside of the model": (sup_con_case, 8),
    "SupCon with LoRA": (lora_case, 8),
    "SupCon under gradient checkpointing": (checkpointing_case, 8),
    "tokens": (tokens_case, 9 * 16),
    "two views in blocks": (blocks_case, 32),
    "two views interleaved": (interleaved_case, 32),
    "a scale among the outputs": (scale_case, 32),
    "a loss that writes": (in_place_case, 9 * 16),
}


@pytest.mark.parametrize("name", CASES)
def test_two_passes_give_the_gradient_and_loss_of_all_rows_at_once(name):
    make, numbers_per_row = CASES[name]
    model, compute, rows = make()
    replay = find(model, compute, rows)
    model.train()
    expected, loss = whole_gradient(model, compute, rows), compute(rows).item()
    for sizes in (SIZES, [1] * 14):
        actual, total = two_passes(replay, model, compute, cut(rows, sizes))
        assert relative_error(actual, expected) <= 1e-10
        assert total == pytest.approx(loss, rel=1e-12)
    assert f"keeps {numbers_per_row} numbers of each row" in replay.note


def test_columns_compared_over_all_rows_are_exact_behind_batch_norm():
    model = BarlowTwins()
    rows = text_of(ROWS, "other")
    replay = find(model, lambda x: model(**x), rows)
    model.train()
    expected = whole_gradient(model, lambda x: model(**x), rows)
    actual, _ = two_passes(replay, model, lambda x: model(**x), cut(rows, [3, 2, 5, 4]))
    assert relative_error(actual, expected) <= 1e-10


def test_both_passes_drop_out_the_same():
    """Against one graph of all rows whose forwards ran with the same seeds."""
    model = SupCon(dropout=0.3)
    rows = text_of(ROWS, "attention_mask", "labels")
    replay = find(model, lambda x: model(**x)["loss"], rows)
    model.train()
    parts, vectors = cut(rows, SIZES), []
    for i, part in enumerate(parts):
        torch.manual_seed(i)
        vectors.append(model.vectors(part.inputs["input_ids"], part.inputs["attention_mask"]))
    sup_con(torch.cat(vectors), rows["labels"], model.scale).backward()
    expected = gradients(model)
    actual, _ = two_passes(replay, model, lambda x: model(**x)["loss"], parts)
    assert relative_error(actual, expected) <= 1e-10


@functools.cache
def found():
    """A loss with a parameter of its own beside the network, what is recorded, and the truth."""
    model, compute, rows = sup_con_case()
    what = find(model, compute, rows).what
    model.train()
    return model, compute, rows, what, whole_gradient(model, compute, rows)


def on_two_ranks(kind, parts_of_ranks):
    """Run two ranks after another: both are told what each has gathered; gradients are added up."""
    model, compute, _, what, _ = found()
    told = []
    for parts in parts_of_ranks:
        exchange = Exchange(gather=lambda own: told.append(own) or [own])
        two_passes(Replay(what, numbers_per_row=8), model, compute, parts, exchange=exchange)
    total = {}
    for place, parts in enumerate(parts_of_ranks):
        everyone = Exchange(gather=lambda own: copy.deepcopy(told), place=place)
        replay = kind(what, numbers_per_row=8)
        gradient, _ = two_passes(replay, model, compute, parts, exchange=everyone)
        total = {n: total.get(n, 0) + g for n, g in gradient.items()} if gradient else total
    return total


class OnlyItsMicroBatch(Replay):
    """A gradient cache of a micro-batch alone."""

    def couple(self, exchange):
        parts, found = self._parts, []
        for part in parts:
            self._parts, self._shares, self._gradients = [part], [], []
            super().couple(Exchange())
            found += self._gradients
        self._gradients, self._shares = found, [p.num_rows / 14 for p in parts]


class ForgetsTheOtherRank(Replay):
    def couple(self, exchange):
        super().couple(Exchange())


class CountsParametersInEachMicroBatch(Replay):
    def loss_of(self, own):
        self._of_parameters = [(p, g / self._shares[self._index]) for p, g in self._of_parameters]
        return super().loss_of(own)


@pytest.mark.parametrize(
    "parts", [[[3, 1], [6, 4]], [[3, 1, 6, 4], []]], ids=["unequal", "one has no rows"]
)
def test_ranks_share_one_loss_and_each_computes_its_part(parts):
    whole = cut(found()[2], SIZES)
    first = len(parts[0])
    actual = on_two_ranks(Replay, [whole[:first], whole[first:]])
    assert relative_error(actual, found()[-1]) <= 1e-10


@pytest.mark.parametrize(
    "kind", [OnlyItsMicroBatch, ForgetsTheOtherRank, CountsParametersInEachMicroBatch]
)
def test_what_people_get_wrong_is_told_from_the_truth(kind):
    whole = cut(found()[2], SIZES)
    actual = on_two_ranks(kind, [whole[:2], whole[2:]])
    assert relative_error(actual, found()[-1]) > 1e-3


def test_a_pass_that_may_not_end_early_gives_the_same():
    model, compute, rows, what, expected = found()
    replay = Replay(what, numbers_per_row=8)
    actual, _ = two_passes(replay, model, compute, cut(rows, SIZES), may_end=False)
    assert relative_error(actual, expected) <= 1e-10


def test_the_order_of_micro_batches_changes_neither_gradient_nor_any_bit_of_the_loss():
    model, compute, rows, what, expected = found()
    parts = cut(rows, SIZES)
    losses = []
    for order in (parts, parts[::-1]):
        replay = Replay(what, numbers_per_row=8)
        for part in order:
            with torch.no_grad(), replay.gathering(part, may_end=False):
                compute(dict(part.inputs))
        replay.couple(Exchange())
        losses.append(replay._loss.item())
    assert losses[0] == losses[1]
    actual, _ = two_passes(Replay(what, numbers_per_row=8), model, compute, parts[::-1])
    assert relative_error(actual, expected) <= 1e-10


def peak_of(run):
    """The most numbers that autograd kept for a backward at once."""
    alive, most = 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal alive, most
            self.tensor = tensor.detach()  # with its graph it would hold itself
            alive += tensor.numel()
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return most


def test_activations_are_those_of_one_micro_batch():
    model, compute, _, what, _ = found()
    rows = {k: v for k, v in rows_of_text(32).items() if k != "other"}
    replay = Replay(what, numbers_per_row=8)
    parts = cut(rows, [4] * 8)
    whole = peak_of(lambda: whole_gradient(model, compute, rows))
    one = max(peak_of(lambda p=p: whole_gradient(model, compute, dict(p.inputs))) for p in parts)
    both = peak_of(lambda: two_passes(replay, model, compute, parts))
    assert whole > 6 * one
    assert both < 1.2 * one


def test_a_loss_of_all_rows_that_does_not_fit_says_what_helps(monkeypatch):
    model, compute, rows, what, _ = found()
    replay = Replay(what, numbers_per_row=8)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(replay_module, "joint_loss", full)
    with pytest.raises(torch.OutOfMemoryError):  # once more, with empty caches
        two_passes(replay, model, compute, cut(rows, SIZES))
    with pytest.raises(MemoryBudgetError, match=r"of 14 rows[^\0]*effective_batch_size"):
        two_passes(replay, model, compute, cut(rows, SIZES))


def test_a_micro_batch_that_calls_the_network_otherwise_is_refused_by_name():
    model = tiny_bert()

    def compute(x):
        vectors = model(x["input_ids"]).pooler_output
        if x["labels"][0] == 7:
            vectors = vectors + model(x["other"]).pooler_output
        return sup_con(vectors, x["labels"])

    rows = text_of(ROWS, "labels", "other")
    replay = find(model, compute, rows)
    odd = rows | {"labels": torch.full((14,), 7)}
    with pytest.raises(LossError, match=r"does not call BertModel as it did.*update_passes = 1"):
        two_passes(replay, model, compute, cut(odd, SIZES))

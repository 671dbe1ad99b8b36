"""Where a network ends is found by trying; nothing is left as it was not before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.contrastive import find, info_nce, rows_of_text, sup_con, tiny_bert
from torch import nn

from hf_gradacc.loss.coupled.absent import Absent

ROWS = rows_of_text(8)


def test_only_what_the_loss_uses_is_kept():
    model = tiny_bert()

    def compute(x):
        return sup_con(model(x["input_ids"], x["attention_mask"]).pooler_output, x["labels"])

    what = find(model, compute, ROWS).what
    kept = [key for key in what.tensors() if key not in what.unused]
    assert kept == [(0, 0, 1)]  # the pooled output, not that of each token
    assert set(ROWS) - what.unused_inputs == {"labels"}


def test_a_teacher_whose_outputs_only_choose_pairs_is_kept_too():
    model, teacher = tiny_bert(), tiny_bert(seed=1)

    def compute(x):
        vectors = model(x["input_ids"]).pooler_output
        with torch.no_grad():
            known = teacher(x["input_ids"]).pooler_output
            alike = known @ known.T > (known @ known.T).mean()
        scores = vectors @ vectors.T
        scores[alike] = -10.0
        return scores.logsumexp(1).mean()

    what = find(model, compute, ROWS).what
    kept = [key for key in what.tensors() if key not in what.unused]
    assert kept == [(0, 0, 1), (1, 0, 1)]
    assert [what.leaves[key].needs_gradient for key in kept] == [True, False]


def mixes_inside(model):
    """Rows are mixed before the network, so none is by itself anywhere in it."""

    def compute(x):
        embedded = model.embeddings(x["input_ids"]) * 1.0
        hidden = model.encoder(embedded - embedded.mean(0))[0]
        return info_nce(hidden.mean(1), hidden[:, 0])

    return compute


def calls_by_rows(model):
    """In chunks, as the cached losses of sentence-transformers."""

    def compute(x):
        parts = [model(ids).pooler_output for ids in x["input_ids"].split(1)]
        return sup_con(torch.cat(parts), x["labels"])

    return compute


def test_a_network_that_is_called_more_often_for_more_rows_is_not_found():
    model = tiny_bert()
    assert find(model, calls_by_rows(model), ROWS) is None


def test_a_network_that_mixes_rows_is_opened_to_where_it_does_not():
    model = tiny_bert()
    replay = find(model, mixes_inside(model), ROWS)
    assert [type(cut.owner).__name__ for cut in replay.what.cuts] == ["BertEmbeddings"]


def test_outputs_that_are_large_for_each_row_are_not_kept(caplog, monkeypatch):
    monkeypatch.setattr("hf_gradacc.loss.coupled.cuts._MOST_NUMBERS", 15)
    model = tiny_bert()
    messages = []
    monkeypatch.setattr(
        "hf_gradacc.loss.coupled.cuts.logger", SimpleNamespace(warning_once=messages.append)
    )

    def compute(x):
        return sup_con(model(x["input_ids"]).pooler_output, x["labels"])

    assert find(model, compute, ROWS) is None
    assert "by 16 numbers of each row" in messages[0]


class Gathering(nn.Module):
    """As sentence-transformers' losses: told to collect the rows of all ranks by itself."""

    def __init__(self, model, *, draws):
        super().__init__()
        self.model, self.gather_across_devices, self.draws = model, True, draws

    def forward(self, x):
        vectors = self.model(x["input_ids"]).pooler_output
        noise = torch.rand(()) if self.draws else 0.0
        return sup_con(vectors + noise, x["labels"])


@pytest.mark.parametrize("draws", [False, True])
def test_a_loss_gathers_rows_over_ranks_by_itself_only_if_we_do_not(draws):
    model = tiny_bert()
    loss = Gathering(model, draws=draws)
    trainer = SimpleNamespace(model_wrapped=model, loss=loss)
    replay = find(model, loss, ROWS, trainer=trainer)
    assert (replay is None) == draws
    assert loss.gather_across_devices == draws


def test_modules_are_as_they_were():
    model = tiny_bert()
    before = {name: sorted(vars(m)) for name, m in model.named_modules()}
    find(model, lambda x: sup_con(model(x["input_ids"]).pooler_output, x["labels"]), ROWS)
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == before


def absent(*shape):
    return Absent.like(torch.ones(shape), device=torch.device("cpu"))


def test_what_is_computed_of_no_values_has_none():
    pooled = absent(4, 5, 6).mean(1)
    assert isinstance(nn.Linear(6, 3)(pooled), Absent)
    assert isinstance(torch.cat([torch.ones(2), absent(2)]).sum(), Absent)
    assert pooled.shape == torch.Size([4, 6])
    assert pooled.device == torch.device("cpu")
    assert isinstance(absent(3).to("cuda"), Absent)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: torch.ones(4, 4).masked_fill_(x > 0, 1.0),
        lambda x: torch.ones(4, 4).__setitem__(x > 0, 1.0),
        lambda x: torch.zeros(4, 4).add_(x),
        lambda x: torch.ones(4, 4)[x > 0],
        lambda x: torch.add(x, 1, out=torch.ones(4, 4)),
    ],
)
def test_values_that_are_not_there_cannot_be_read_or_written(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(absent(4, 4))

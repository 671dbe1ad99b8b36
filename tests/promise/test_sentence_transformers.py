"""The mixin before the trainers of sentence-transformers: the real library, a tiny BERT."""

from __future__ import annotations

import copy
import inspect
import random
from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import pytest
import torch
from support.bytes_tokenizer import bytes_tokenizer
from support.programs import warnings_of
from support.ranks import run_ranks
from support.reference import assert_same_updates, float64_everywhere
from support.sentence_jobs import train_sentences
from support.tiny import PLAIN, Recorder
from torch import nn
from transformers import BertConfig, BertModel

pytest.importorskip("sentence_transformers")

import sentence_transformers as st
from sentence_transformers.cross_encoder import losses as pair_losses
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder import losses as sparse_losses

from hf_gradacc import GradAccMixin, GradAccOptions
from hf_gradacc.loss.refusals import (
    _ROW_BY_ROW,
    find_inexact_by_name,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PIECES = {"per_device_train_batch_size": 3, "effective_batch_size": 14}
WHOLE = {"per_device_train_batch_size": 14}


@dataclass
class Arguments(GradAccOptions, st.SentenceTransformerTrainingArguments):
    pass


class Mixed(GradAccMixin, st.SentenceTransformerTrainer):
    pass


@dataclass
class PairArguments(GradAccOptions, st.CrossEncoderTrainingArguments):
    pass


class MixedPairs(GradAccMixin, st.CrossEncoderTrainer):
    pass


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return str(folder)


def rows_of(num_texts, label):
    draw = random.Random(0)

    def text():
        return "".join(draw.choice("abcdef ") for _ in range(draw.randint(2, 20)))

    return datasets.Dataset.from_list(
        [{f"text{n}": text() for n in range(num_texts)} | label(draw) for _ in range(14)]
    )


def matryoshka(model):
    return losses.MatryoshkaLoss(model, losses.CosineSimilarityLoss(model), matryoshka_dims=[16, 8])


SCORE = rows_of(2, lambda draw: {"score": draw.random()})
CASES = {
    "CosineSimilarityLoss": (losses.CosineSimilarityLoss, SCORE),
    "ContrastiveLoss": (losses.ContrastiveLoss, rows_of(2, lambda d: {"label": d.randrange(2)})),
    "TripletLoss": (losses.TripletLoss, rows_of(3, lambda draw: {})),
    "MSELoss": (losses.MSELoss, rows_of(1, lambda d: {"label": [d.random() for _ in range(16)]})),
    "MarginMSELoss": (losses.MarginMSELoss, rows_of(3, lambda d: {"label": d.random()})),
    "SoftmaxLoss": (
        lambda model: losses.SoftmaxLoss(model, embedding_dimension=16, num_labels=3),
        rows_of(2, lambda draw: {"label": draw.randrange(3)}),
    ),
    "DistillKLDivLoss": (
        losses.DistillKLDivLoss,
        rows_of(3, lambda draw: {"label": [draw.random(), draw.random()]}),
    ),
    "MatryoshkaLoss": (matryoshka, SCORE),
}


def train(trainer_class, arguments, model, make_loss, rows, out, **options):
    recorder = Recorder()
    torch.manual_seed(1)  # some losses have weights of their own
    trainer = trainer_class(
        model=model.double(),
        args=arguments(output_dir=str(out), **PLAIN | options),
        train_dataset=rows,
        loss=make_loss(model).double(),
        callbacks=[recorder],
    )
    with float64_everywhere():
        trainer.train()
    return recorder.gradients


@pytest.mark.parametrize("name", CASES)
def test_losses_of_single_rows_give_the_gradient_of_the_whole_update(name, bert, tmp_path):
    make_loss, rows = CASES[name]

    def model():
        return st.SentenceTransformer(modules=[Transformer(bert), Pooling(16)], device="cpu")

    stock = st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments
    whole = train(*stock, model(), make_loss, rows, tmp_path, **WHOLE)
    pieces = train(Mixed, Arguments, model(), make_loss, rows, tmp_path, **PIECES)
    assert_same_updates(pieces, whole)


@pytest.mark.parametrize("name", ["BinaryCrossEntropyLoss", "CrossEntropyLoss"])
def test_cross_encoders_give_the_gradient_of_the_whole_update(name, bert, tmp_path):
    num_labels = 1 if name == "BinaryCrossEntropyLoss" else 3
    rows = rows_of(2, lambda draw: {"label": draw.randrange(max(2, num_labels))})

    def model():
        torch.manual_seed(2)
        return st.CrossEncoder(bert, num_labels=num_labels, device="cpu")

    stock = st.CrossEncoderTrainer, st.CrossEncoderTrainingArguments
    make_loss = getattr(pair_losses, name)
    whole = train(*stock, model(), make_loss, rows, tmp_path, **WHOLE)
    pieces = train(MixedPairs, PairArguments, model(), make_loss, rows, tmp_path, **PIECES)
    assert_same_updates(pieces, whole)


def every_loss():
    """The losses of the library, by module and name; schemes and wrappers are no losses."""
    for home in (losses, pair_losses, sparse_losses):
        for name, kind in inspect.getmembers(home, inspect.isclass):
            if issubclass(kind, nn.Module) and name.endswith("Loss"):
                yield pytest.param(kind, id=f"{home.__name__.split('.')[1]}-{name}")


def reasons(loss):
    trainer = SimpleNamespace(loss=loss)
    return "; ".join(find_inexact_by_name(trainer))


@pytest.mark.parametrize("kind", list(every_loss()))
def test_every_loss_of_the_library_is_known_to_be_of_single_rows_or_named(kind):
    loss = kind.__new__(kind)
    nn.Module.__init__(loss)
    name = kind.__name__
    if name in _ROW_BY_ROW:
        assert not reasons(loss)
    elif name == "MatryoshkaLoss":
        loss.loss, loss.n_dims_per_step = losses.CoSENTLoss.__new__(losses.CoSENTLoss), -1
        nn.Module.__init__(loss.loss)
        assert "CoSENTLoss is not known to be a mean over rows" in reasons({"a": loss})
    else:
        assert f"{name} is not known to be a mean over rows" in reasons(loss)


def test_a_loss_that_draws_its_dimensions_for_each_micro_batch_is_named(bert):
    model = st.SentenceTransformer(modules=[Transformer(bert), Pooling(16)], device="cpu")
    loss = matryoshka(model)
    loss.n_dims_per_step = 1
    assert "MatryoshkaLoss with n_dims_per_step = 1 draws other dimensions" in reasons(loss)


def guided(model):
    torch.manual_seed(5)
    guide = BertModel(BertConfig.from_pretrained(model[0].auto_model.name_or_path))
    teacher = copy.deepcopy(model)
    teacher[0].auto_model.load_state_dict(guide.state_dict())
    return losses.GISTEmbedLoss(model, teacher)


def nested(model):
    inner = losses.MultipleNegativesRankingLoss(model)
    return losses.MatryoshkaLoss(model, inner, matryoshka_dims=[16, 8])


PAIRS, TRIPLES = rows_of(2, lambda draw: {}), rows_of(3, lambda draw: {})
CLASSES = rows_of(1, lambda draw: {"label": draw.randrange(3)})
IN_BATCH = {
    "MultipleNegativesSymmetricRankingLoss": (losses.MultipleNegativesSymmetricRankingLoss, PAIRS),
    "CoSENTLoss": (losses.CoSENTLoss, SCORE),
    "AnglELoss": (losses.AnglELoss, SCORE),
    "BatchHardTripletLoss": (losses.BatchHardTripletLoss, CLASSES),
    "OnlineContrastiveLoss": (losses.OnlineContrastiveLoss, CASES["ContrastiveLoss"][1]),
    "BatchSemiHardTripletLoss": (losses.BatchSemiHardTripletLoss, CLASSES),
    "GISTEmbedLoss": (guided, TRIPLES),
    "MatryoshkaLoss": (nested, PAIRS),
}


def make_model(bert):
    return st.SentenceTransformer(modules=[Transformer(bert), Pooling(16)], device="cpu")


@pytest.mark.parametrize("name", IN_BATCH)
def test_losses_that_compare_rows_compare_those_of_the_whole_update(name, bert, tmp_path):
    make_loss, rows = IN_BATCH[name]
    stock = st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments
    whole = train(*stock, make_model(bert), make_loss, rows, tmp_path, **WHOLE)
    with warnings_of("hf_gradacc") as warnings:
        pieces = train(Mixed, Arguments, make_model(bert), make_loss, rows, tmp_path, **PIECES)
    assert_same_updates(pieces, whole)
    (said,) = [line for line in warnings if "rows" in line]
    assert "taken once over all rows of an update" in said


@pytest.mark.parametrize("name", ["CachedMultipleNegativesRankingLoss", "update_passes = 1"])
def test_losses_that_compare_rows_in_one_pass_go_on_and_a_line_says_why(name, bert, tmp_path):
    kind = losses.CachedMultipleNegativesRankingLoss if "=" not in name else losses.CoSENTLoss
    rows = PAIRS if "=" not in name else SCORE
    options = PIECES | ({} if "=" not in name else {"update_passes": 1})
    with warnings_of("hf_gradacc") as warnings:
        gradients = train(Mixed, Arguments, make_model(bert), kind, rows, tmp_path, **options)
    assert len(gradients) == 1
    assert f"{kind.__name__} is not known to be a mean over rows" in "\n".join(warnings)


def test_a_sum_over_rows_is_found_by_asking(bert, tmp_path):
    def summed(model):
        return losses.ContrastiveLoss(model, size_average=False)

    def model():
        return st.SentenceTransformer(modules=[Transformer(bert), Pooling(16)], device="cpu")

    rows = CASES["ContrastiveLoss"][1]
    stock = st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments
    whole = train(*stock, model(), summed, rows, tmp_path, **WHOLE)
    pieces = train(Mixed, Arguments, model(), summed, rows, tmp_path, **PIECES)
    assert_same_updates(pieces, whole)


def test_ranks_compare_rows_of_all_ranks_once(bert):
    """The loss would gather them by itself, and again for each micro-batch."""
    names = ("MultipleNegativesRankingLoss",)
    whole = train_sentences(bert, names=names, mixed=False, per_device_train_batch_size=32)
    options = {"per_device_train_batch_size": 4, "effective_batch_size": 32}
    for rank in run_ranks(train_sentences, 2, folder=bert, names=names, **options):
        assert_same_updates(rank[names[0]], whole[names[0]])

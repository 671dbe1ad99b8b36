"""Losses as people write them: sums, losses that draw numbers, losses nobody can be asked about.

What stock trains, trains here; where the whole batch's gradient is defined, it is that. Each
trains two updates of eight rows in micro-batches of two, against micro-batches of eight.
"""

import logging

import pytest
import torch
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama
from torch import nn
from torch.nn import functional
from transformers import Trainer, default_data_collator
from transformers.utils import logging as transformers_logging

from hf_gradacc import ConfigError, GradAccArguments, GradAccMixin, GradAccTrainer

ROWS = ragged_rows(16, seed=7)
EXACT = 1e-12


def features(count=16, *, width=6, classes=3):
    draw = torch.Generator().manual_seed(4)
    return [
        {"x": torch.randn(width, generator=draw, dtype=torch.float64), "labels": i % classes}
        for i in range(count)
    ]


def trained(tmp_path, make_model, rows, *, size=2, collate=default_data_collator, **options):
    """A trainer after two updates of eight rows, `size` to a micro-batch."""
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path,
        rows,
        model=make_model(),
        data_collator=collate,
        per_device_train_batch_size=size,
        effective_batch_size=8,
        max_steps=2,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer.train()
    return trainer


def distance(one, other):
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def with_loss(compute):
    """A stock trainer's subclass with a loss of its own, and the mixin before it."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = compute(model, inputs)
            return (loss, {"loss": loss}) if return_outputs else loss

    return type("Ours", (GradAccMixin, Own), {})


# ---- sums --------------------------------------------------------------------------------------


def summed_cross_entropy(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.usefixtures("in_float64")
def test_a_sum_is_the_sum_over_the_whole_update_however_it_is_cut(tmp_path):
    class Own(with_loss(summed_cross_entropy)):
        pass

    small = {"learning_rate": 1e-3, "collate": pad, "trainer_class": Own}
    whole = trained(tmp_path, tiny_llama, ROWS, size=8, **small)
    cut = trained(tmp_path, tiny_llama, ROWS, **small)
    assert cut.facts.weighing == "sum"
    assert cut.facts.warnings == ()
    assert distance(whole, cut) < EXACT
    logged = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, cut)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-6)

    stock = make_trainer(  # on whole batches, stock is right
        tmp_path,
        ROWS,
        data_collator=pad,
        trainer_class=Own.__mro__[3],
        arguments_class=_plain_arguments,
        per_device_train_batch_size=8,
        max_steps=2,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
    )
    assert not isinstance(stock, GradAccMixin)
    stock.train()
    assert distance(stock, cut) < EXACT


def _plain_arguments(**options):
    from transformers import TrainingArguments

    return TrainingArguments(**options)


def test_the_evaluation_loss_of_a_sum_is_per_target_whatever_the_batch_size(tmp_path):
    options = {"collate": pad, "trainer_class": with_loss(summed_cross_entropy)}
    losses = [
        trained(
            tmp_path, tiny_llama, ROWS, eval_dataset=ROWS, per_device_eval_batch_size=k, **options
        ).evaluate()["eval_loss"]
        for k in (1, 3, 16)
    ]
    assert losses == pytest.approx([losses[0]] * 3)


def test_speech_recognition_trains_as_the_sum_that_it_is(tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    def model():
        torch.manual_seed(0)
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Wav2Vec2Config(
            vocab_size=12, intermediate_size=16, conv_dim=(8, 8), conv_kernel=(4, 4),
            conv_stride=(4, 4), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer", do_stable_layer_norm=True, mask_time_prob=0.0,
            hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
            feat_proj_dropout=0.0, final_dropout=0.0, **small,
        )  # fmt: skip
        assert config.ctc_loss_reduction == "sum"
        return Wav2Vec2ForCTC(config).double()

    draw = torch.Generator().manual_seed(2)
    rows = [
        {
            "input_values": torch.randn(320, generator=draw, dtype=torch.float64),
            "labels": torch.randint(1, 12, (3,), generator=draw),
        }
        for _ in range(16)
    ]
    small = {"learning_rate": 1e-4}
    whole = trained(tmp_path, model, rows, size=8, **small)
    cut = trained(tmp_path, model, rows, **small)
    assert cut.facts.weighing == "sum"
    assert distance(whole, cut) < 1e-8  # the CTC kernel computes in float32


# ---- losses that draw random numbers -----------------------------------------------------------


def masked_diffusion(model, inputs):
    ids, is_target = inputs["input_ids"], inputs["labels"].ne(-100)
    times = torch.rand(len(ids)) * 0.999 + 1e-3
    hidden = (torch.rand(ids.shape) < times[:, None]) & is_target
    logits = model(
        input_ids=torch.where(hidden, 4, ids), attention_mask=inputs["attention_mask"]
    ).logits
    losses = functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return (losses * hidden / times[:, None]).sum() / is_target.sum()


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(7, 6, dtype=torch.float64)

    def forward(self, x, labels=None):
        noise, times = torch.randn_like(x), torch.rand(len(x), 1, dtype=x.dtype)
        seen = (1 - times) * x + times * noise
        return {"loss": (self.net(torch.cat([seen, times], 1)) - noise).square().mean()}


class Variational(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 8, dtype=torch.float64)
        self.decode = nn.Linear(4, 6, dtype=torch.float64)

    def forward(self, x, labels=None):
        mean, log_variance = self.encode(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(-1).mean()
        return {"loss": (self.decode(code) - x).square().sum(-1).mean() + 0.5 * divergence}


def vit_mae():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 16, "image_size": 16, "patch_size": 4, "num_channels": 1}
    decoder = {f"decoder_{key}": small[key] for key in small if "size" in key and "e_" in key[:12]}
    decoder = {
        key: value for key, value in decoder.items()
        if key in ("decoder_hidden_size", "decoder_intermediate_size")
    }  # fmt: skip
    config = ViTMAEConfig(
        decoder_num_attention_heads=2, decoder_num_hidden_layers=1, **small, **decoder
    )
    return ViTMAEForPreTraining(config).double()


DRAWING = {
    "denoiser": (Denoiser, features(), default_data_collator, GradAccTrainer, "sequence"),
    "variational": (Variational, features(), default_data_collator, GradAccTrainer, "sequence"),
    "masked diffusion": (tiny_llama, ROWS, pad, with_loss(masked_diffusion), "same_token"),
    "masked autoencoder": (
        vit_mae,
        [
            {
                "pixel_values": torch.randn(
                    1, 16, 16, generator=torch.Generator().manual_seed(i), dtype=torch.float64
                )
            }
            for i in range(16)
        ],
        default_data_collator,
        GradAccTrainer,
        "sequence",
    ),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_loss_that_draws_numbers_is_asked_with_the_same_draws(tmp_path, name):
    """For no seed is it refused, or said to let rows influence each other."""
    model, rows, collate, trainer_class, rule = DRAWING[name]
    for seed in range(6):
        options = {"trainer_class": trainer_class, "seed": seed, "learning_rate": 1e-3}
        facts = trained(tmp_path, model, rows, collate=collate, **options).facts
        assert (facts.rule, facts.weighing, facts.draws) == (rule, "mean", True)
        assert facts.warnings == ()
        assert facts.notes == ()


def test_a_sum_that_draws_numbers_is_told_from_a_mean(tmp_path):
    class Summed(Denoiser):
        def forward(self, x, labels=None):
            return {"loss": super().forward(x)["loss"] * len(x)}

    for seed in range(4):
        trainer = trained(tmp_path, Summed, features(), seed=seed, learning_rate=1e-3)
        assert trainer.facts.weighing == "sum"


def test_rows_mixed_at_random_are_named(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3, dtype=torch.float64)

        def forward(self, x, labels):
            share, order = torch.rand(()), torch.randperm(len(x))
            logits = self.fc(share * x + (1 - share) * x[order])
            return {"loss": functional.cross_entropy(logits, labels)}

    facts = trained(tmp_path, Mixed, features()).facts
    assert facts.draws
    assert "the losses of rows do not add up to that of all" in facts.warnings[0]


# ---- rows of a class that influence each other -------------------------------------------------


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4, dtype=torch.float64)


class SupervisedContrastive(Embedding):
    def forward(self, x, labels):
        codes = functional.normalize(self.fc(x), dim=-1)
        others = ~torch.eye(len(x), dtype=torch.bool)
        scores = (codes @ codes.T / 0.1).masked_fill(~others, -torch.inf).log_softmax(-1)
        alike = labels[:, None].eq(labels) & others
        pulls = scores.masked_fill(~alike, 0).sum(-1) / alike.sum(-1).clamp(min=1)
        return {"loss": -pulls.mean()}


class CenterLoss(Embedding):
    def forward(self, x, labels):
        codes = self.fc(x)
        centers = torch.stack([codes[labels == label].mean(0) for label in labels])
        return {"loss": (codes - centers).square().sum(-1).mean()}


@pytest.mark.parametrize("model", [SupervisedContrastive, CenterLoss])
@pytest.mark.parametrize("classes", [3, 8, 16])
def test_rows_of_a_class_that_influence_each_other_are_seen(tmp_path, model, classes):
    """Among rows of many classes, two of one are looked for; alone, each hides what it does."""
    rows = features(32, classes=classes)
    facts = trained(tmp_path / "two", model, rows).facts
    assert facts.coupling is not None
    assert not facts.warnings
    facts = trained(tmp_path / "one", model, rows, update_passes=1).facts
    assert "Rows of a batch influence each other" in facts.warnings[0]


# ---- no loss in evaluation mode, or none at all ------------------------------------------------


class OnlyInTraining(nn.Module):
    """As some embedding models do: a loss in training mode, scores in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3)).double()

    def forward(self, x, labels=None):
        logits = self.fc(x)
        if not self.training:
            return {"logits": logits}
        weights = 1 + x[:, 0].abs()
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return {"loss": (losses * weights).mean(), "logits": logits}


def test_a_model_without_a_loss_in_evaluation_mode_is_asked_in_training_mode(tmp_path):
    trainer = trained(tmp_path, OnlyInTraining, features())
    assert (trainer.facts.rule, trainer.facts.warnings) == ("sequence", ())
    assert trainer.facts.draws  # the dropout; so only draws of one shape were compared
    assert trainer.model.training


class OneOfAKind(nn.Module):
    """Takes exactly two rows, so that no two questions can be compared."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x, labels):
        if len(x) != 2:
            raise RuntimeError("two rows, please")
        return {"loss": functional.cross_entropy(self.fc(x), labels)}


class OneRow(nn.Module):
    """Takes one row at a time; the loss is a mean over its tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 6).double(), nn.Linear(6, 48).double()

    def forward(self, input_ids, labels, attention_mask=None):
        if len(input_ids) != 1:
            raise ValueError("one row, please")
        logits = self.head(self.embed(input_ids))
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_a_model_that_takes_one_row_is_asked_with_one(tmp_path):
    trainer = trained(tmp_path, OneRow, ROWS, size=1, collate=pad)
    assert (trainer.facts.rule, trainer.facts.weighing) == ("same_token", "mean")
    assert trainer.facts.warnings == ()

    expected = _seeded(OneRow)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for rows in (ROWS[:8], ROWS[8:]):
        optimizer.zero_grad()
        total = sum(label != -100 for row in rows for label in row["labels"])
        for row in rows:
            count = sum(label != -100 for label in row["labels"])
            (expected(**pad([row]))["loss"] * count / total).backward()
        optimizer.step()
    pairs = zip(expected.parameters(), trainer.model.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) < EXACT


@pytest.fixture
def told(caplog):
    """What Transformers' loggers say, each message once per test."""
    transformers_logging.enable_propagation()
    transformers_logging.get_logger("hf_gradacc")
    logging.getLogger("hf_gradacc").propagate = True
    from hf_gradacc.trainer.loss import asking

    type(asking.logger).warning_once.cache_clear()
    yield caplog
    transformers_logging.disable_propagation()


def test_a_model_that_cannot_be_asked_trains_by_the_rule_of_stock(tmp_path, told):
    trainer = trained(tmp_path, OneOfAKind, features())
    assert trainer.facts.weighing == "micro_batch"
    (line,) = trainer.facts.warnings
    assert "could not be asked (RuntimeError: two rows, please)" in line
    assert "loss_is_mean_over" in line
    stock = make_trainer(
        tmp_path,
        features(),
        model=_seeded(OneOfAKind),
        data_collator=default_data_collator,
        trainer_class=Trainer,
        arguments_class=_plain_arguments,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    stock.train()
    assert distance(stock, trainer) < EXACT


def _seeded(model):
    torch.manual_seed(0)
    return model()


def test_a_model_that_fails_on_every_row_fails_with_its_own_error(tmp_path):
    class Broken(OneOfAKind):
        def forward(self, x, labels):
            raise ZeroDivisionError("a mistake of one's own")

    with pytest.raises(ZeroDivisionError, match="a mistake of one's own"):
        trained(tmp_path, Broken, features())


# ---- a rule that is stated ---------------------------------------------------------------------

STATED = {
    "target_tokens": ("next_token", "mean"),
    "tokens": ("input_token", "mean"),
    "sequences": ("sequence", "mean"),
    "micro_batch": ("next_token", "micro_batch"),
    "nothing": ("next_token", "sum"),
}


@pytest.mark.parametrize("stated", STATED)
def test_a_rule_that_is_stated_is_followed(tmp_path, stated):
    trainer = trained(tmp_path, tiny_llama, ROWS, collate=pad, loss_is_mean_over=stated)
    rule, weighing = STATED[stated]
    assert (trainer.facts.rule, trainer.facts.weighing) == (rule, weighing)
    update = trainer.last_update
    batches = update.update.micro_batches
    counts = [mb.targets.under(trainer.facts.rule) for mb in batches]
    shares = {
        "mean": [n / sum(counts) for n in counts],
        "micro_batch": [1 / len(batches)] * len(batches),
        "sum": [1.0] * len(batches),
    }[weighing]
    divisors = [
        trainer.facts.divisor(mb, of=sum(counts), num_micro_batches=len(batches)) for mb in batches
    ]
    assert [1 / d for d in divisors] == pytest.approx(shares)


def test_a_rule_that_does_not_exist_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="loss_is_mean_over = 'rows': use one of 'auto'"):
        GradAccArguments(output_dir=str(tmp_path), loss_is_mean_over="rows")

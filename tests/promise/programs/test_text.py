"""Programs that train on text: heads, losses of one's own, adapters, teachers, generation."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as T
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.programs import NUM_ROWS, Program, cases, hold
from support.tiny import pad, ragged_rows, tiny_llama
from support.zoo_rows import tiny_tokenizer
from torch import nn
from torch.nn import functional as F

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
}


def bert(head, **changes):
    return lambda: head(T.BertConfig(**SMALL | NO_DROPOUT | {"num_labels": 3} | changes))


def texts(label=None, **columns):
    """Rows of unequal length; `label` and each column are functions of the row's number."""

    def make():
        draw = random.Random(3)
        rows = []
        for i in range(NUM_ROWS):
            length = draw.randint(3, 14)
            row = {"input_ids": [draw.randrange(5, 60) for _ in range(length)]}
            row["attention_mask"] = [1] * length
            if label is not None:
                row["labels"] = label(i, row)
            rows.append(row | {name: value(i, row) for name, value in columns.items()})
        return rows

    return make


def classes(i, row):
    return [0, 0, 1, 2, 0][i % 5]


def token_classes(i, row):
    places = range(len(row["input_ids"]))
    return [-100 if (i + place) % 4 == 0 else (i * place) % 3 for place in places]


padded = T.DataCollatorWithPadding(tiny_tokenizer())


class OwnLoss(T.Trainer):
    """The usual skeleton: the loss of logits and labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.loss_of(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class Focal(OwnLoss):
    def loss_of(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


class ClassWeights(OwnLoss):
    """Its denominator is the sum of the weights of the rows in the micro-batch."""

    def loss_of(self, logits, labels):
        return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]))(logits, labels)


class OwnSmoothing(OwnLoss):
    def loss_of(self, logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.1)


class Ordinal(OwnLoss):
    """Regression and classification in one: the expected class, squared error."""

    def loss_of(self, logits, labels):
        expected = (logits.softmax(-1) * torch.arange(3)).sum(-1)
        return F.mse_loss(expected, labels.double()) + F.cross_entropy(logits, labels)


class Distilled(T.Trainer):
    """Teacher and student: temperature, KL, and the student's own loss."""

    def __init__(self, *args, teacher=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        with torch.no_grad():
            told = self.teacher(**inputs).logits
        divergence = nn.KLDivLoss(reduction="batchmean")(
            (outputs.logits / 2).log_softmax(-1), (told / 2).softmax(-1)
        )
        loss = 0.5 * outputs.loss + 0.5 * 4 * divergence
        return (loss, outputs) if return_outputs else loss


class DistilledTokens(T.Trainer):
    """KL at each target of a causal LM; the mean is over targets."""

    def __init__(self, *args, teacher=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        with torch.no_grad():
            told = self.teacher(**inputs).logits
        targets = inputs["labels"][:, 1:] != -100
        divergence = F.kl_div(
            outputs.logits[:, :-1].log_softmax(-1), told[:, :-1].softmax(-1), reduction="none"
        ).sum(-1)
        loss = divergence[targets].mean() + outputs.loss
        return (loss, outputs) if return_outputs else loss


class RDrop(T.Trainer):
    """Two forwards and the symmetric KL between them. Without dropout, the second sees a mask."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first = model(**inputs)
        hidden = inputs["input_ids"].masked_fill(inputs["input_ids"] % 3 == 0, 4)
        second = model(**{**inputs, "input_ids": hidden})
        p, q = first.logits.log_softmax(-1), second.logits.log_softmax(-1)
        both = F.kl_div(p, q, log_target=True, reduction="none").sum(-1) + F.kl_div(
            q, p, log_target=True, reduction="none"
        ).sum(-1)
        loss = (first.loss + second.loss) / 2 + both.mean() / 2
        return (loss, first) if return_outputs else loss


class TwoHeads(nn.Module):
    """Multi-task: an intent for each row, a slot for each token, their losses added."""

    def __init__(self):
        super().__init__()
        self.bert = T.BertModel(T.BertConfig(**SMALL | NO_DROPOUT))
        self.intent, self.slot = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask, labels=None, intent=None):
        outputs = self.bert(input_ids, attention_mask=attention_mask)
        slots, intents = self.slot(outputs.last_hidden_state), self.intent(outputs.pooler_output)
        loss = F.cross_entropy(slots.flatten(0, 1), labels.flatten()) + F.cross_entropy(
            intents, intent
        )
        return {"loss": loss, "logits": slots}


class TwoRowTasks(nn.Module):
    """Multi-task over rows: a class and a number, weighed by learned uncertainties."""

    def __init__(self):
        super().__init__()
        self.bert = T.BertModel(T.BertConfig(**SMALL | NO_DROPOUT))
        self.heads = nn.Linear(16, 4)
        self.log_variances = nn.Parameter(torch.zeros(2))

    def forward(self, input_ids, attention_mask, labels=None, score=None):
        out = self.heads(self.bert(input_ids, attention_mask=attention_mask).pooler_output)
        losses = torch.stack([F.cross_entropy(out[:, :3], labels), F.mse_loss(out[:, 3], score)])
        loss = ((-self.log_variances).exp() * losses + self.log_variances).sum()
        return {"loss": loss, "logits": out}


class SimCSE(T.Trainer):
    """In-batch negatives: each row against all others of its micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        other = {**inputs, "input_ids": (inputs["input_ids"] + 1).clamp(max=60)}
        one, two = (F.normalize(model(**x).pooler_output, dim=-1) for x in (inputs, other))
        loss = F.cross_entropy(one @ two.T / 0.05, torch.arange(len(one)))
        return (loss, {"logits": one}) if return_outputs else loss


class Pairs(T.Trainer):
    """A reward model of before TRL: two texts a row, the better one first."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        better = model(inputs["input_ids_j"], attention_mask=inputs["attention_mask_j"])[0]
        worse = model(inputs["input_ids_k"], attention_mask=inputs["attention_mask_k"])[0]
        loss = -F.logsigmoid(better - worse).mean()
        return (loss, {"better": better, "worse": worse}) if return_outputs else loss


def collate_pairs(rows):
    batch = {}
    for side in "jk":
        part = padded(
            [{key: row[f"{key}_{side}"] for key in ("input_ids", "attention_mask")} for row in rows]
        )
        batch |= {f"{key}_{side}": value for key, value in part.items()}
    return batch


def pairs():
    better, worse = texts()(), list(reversed(texts()()))
    return [
        {f"{key}_{side}": row[key] for side, row in zip("jk", both, strict=True) for key in row}
        for both in zip(better, worse, strict=True)
    ]


class MaskedDiffusion(T.Trainer):
    """LLaDA's: a drawn share of each row is masked, each loss weighed by one over that share."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        share = torch.rand(len(ids), 1) * 0.9 + 0.1
        hidden = (torch.rand(ids.shape) < share) & mask.bool()
        logits = model(ids.masked_fill(hidden, 4), attention_mask=mask).logits
        losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        loss = ((losses * hidden / share).sum(-1) / mask.sum(-1)).mean()
        return (loss, {"logits": logits}) if return_outputs else loss


class Contextual(T.Trainer):
    """Metric learning with centers: rows of a class meet in the centers of the micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        rows = model(**inputs).pooler_output
        same = labels[:, None] == labels[None, :]
        centers = same.double() @ rows / same.sum(-1, keepdim=True)
        loss = (rows - centers).square().sum(-1).mean() + rows.square().mean()
        return (loss, {"logits": rows}) if return_outputs else loss


def choices(rows):
    flat = padded([{"input_ids": ids} for row in rows for ids in row["input_ids"]])
    batch = {key: value.view(len(rows), 2, -1) for key, value in flat.items()}
    return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


def two_choices():
    rows = texts(label=lambda i, row: i % 2)()
    return [
        {"input_ids": [row["input_ids"], row["input_ids"][::-1][:-1]], "labels": row["labels"]}
        for row in rows
    ]


def lora(model, **options):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def prompt_tuned():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(tiny_llama(), config)


def mask_by_number(rows):
    """A masking collator that draws for each row by its own seed."""
    batch = pad(rows)
    for i, row in enumerate(rows):
        draw = torch.Generator().manual_seed(sum(row["input_ids"]))
        chosen = torch.rand(batch["labels"].shape[1], generator=draw) < 0.4
        chosen[1] = True
        batch["labels"][i][~chosen] = -100
        batch["input_ids"][i][chosen & batch["attention_mask"][i].bool()] = 4
    batch["labels"][batch["attention_mask"] == 0] = -100
    return batch


def end_to_end(rows):
    """Padding-free: one row of all tokens, positions begin anew with each."""
    ids = [token for row in rows for token in row["input_ids"]]
    values = {
        "input_ids": ids,
        "labels": [label for row in rows for label in [-100, *row["labels"][1:]]],
        "position_ids": [place for row in rows for place in range(len(row["input_ids"]))],
    }
    return {key: torch.tensor([value]) for key, value in values.items()}


def one_row(rows):
    (row,) = rows
    return {key: torch.tensor([value]) for key, value in row.items()}


def language_rows():
    return ragged_rows(NUM_ROWS, seed=4)


def labelled_rows():
    rows = texts()()
    return [row | {"labels": row["input_ids"]} for row in rows]


def answers():
    rows = texts()()
    return [row | {"start_positions": i % 3, "end_positions": 2} for i, row in enumerate(rows)]


def t5():
    return T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def sequences():
    rows = texts()()
    return [row | {"labels": row["input_ids"][: 2 + i % 9][::-1]} for i, row in enumerate(rows)]


ONE_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
by_pairs = T.DataCollatorForSeq2Seq(tiny_tokenizer())
by_tokens = T.DataCollatorForTokenClassification(tiny_tokenizer())
classifier = bert(T.BertForSequenceClassification)
sorted_rows = texts(label=classes)

PROGRAMS = {
    "classification": Program(classifier, sorted_rows, padded, stock="off"),
    "label smoothing": Program(
        classifier,
        sorted_rows,
        padded,
        options={"label_smoothing_factor": 0.1},
        stock="exact",
    ),
    "causal LM": Program(tiny_llama, language_rows, pad, stock="exact"),
    "causal LM, label smoothing": Program(
        tiny_llama,
        language_rows,
        pad,
        options={"label_smoothing_factor": 0.1},
        stock="exact",
    ),
    "tokens": Program(bert(T.BertForTokenClassification), texts(label=token_classes), by_tokens),
    "regression": Program(
        bert(T.BertForSequenceClassification, num_labels=1),
        texts(label=lambda i, row: i / 7),
        padded,
    ),
    "several labels": Program(
        bert(T.BertForSequenceClassification, problem_type="multi_label_classification"),
        texts(label=lambda i, row: [float(i % 2), 1.0, float(i % 3 == 0)]),
        padded,
    ),
    "choices": Program(bert(T.BertForMultipleChoice), two_choices, choices),
    "answers": Program(bert(T.BertForQuestionAnswering, num_labels=2), answers, padded),
    "focal loss": Program(classifier, sorted_rows, padded, Focal),
    "class weights": Program(
        classifier, sorted_rows, padded, ClassWeights, says="weighs its classes"
    ),
    "smoothing of one's own": Program(classifier, sorted_rows, padded, OwnSmoothing),
    "ordinal": Program(classifier, sorted_rows, padded, Ordinal),
    "distillation of rows": Program(
        classifier, sorted_rows, padded, Distilled, more=lambda model: {"teacher": classifier()}
    ),
    "distillation of tokens": Program(
        tiny_llama,
        language_rows,
        pad,
        DistilledTokens,
        more=lambda model: {"teacher": tiny_llama(seed=1)},
    ),
    "R-Drop": Program(classifier, sorted_rows, padded, RDrop),
    "multi-task, rows and tokens": Program(
        TwoHeads,
        texts(label=token_classes, intent=classes),
        by_tokens,
        says="taken once over all rows",
    ),
    "multi-task over rows": Program(
        TwoRowTasks, texts(label=classes, score=lambda i, row: i / 9), padded
    ),
    "in-batch negatives": Program(
        bert(T.BertModel),
        texts(),
        padded,
        SimCSE,
        says="taken once over all rows",
    ),
    "centers of classes": Program(
        bert(T.BertModel),
        sorted_rows,
        padded,
        Contextual,
        says="taken once over all rows",
    ),
    "reward of pairs": Program(
        bert(T.BertForSequenceClassification, num_labels=1), pairs, collate_pairs, Pairs
    ),
    "masked diffusion": Program(
        bert(T.BertForMaskedLM), texts(), padded, MaskedDiffusion, ours="drawn"
    ),
    "masked LM": Program(bert(T.BertForMaskedLM), labelled_rows, mask_by_number),
    "LoRA": Program(lambda: lora(tiny_llama()), language_rows, pad, stock="exact"),
    "prompt tuning": Program(prompt_tuned, language_rows, pad, reference="ours"),
    "rows end to end": Program(tiny_llama, language_rows, end_to_end, stock="exact"),
    "one row a batch": Program(
        tiny_llama, language_rows, one_row, whole=ONE_ROW, pieces=ONE_ROW, stock="exact"
    ),
    "seq2seq": Program(
        t5,
        sequences,
        by_pairs,
        T.Seq2SeqTrainer,
        arguments=T.Seq2SeqTrainingArguments,
        options={"predict_with_generate": True, "generation_max_length": 6},
    ),
}


@pytest.mark.parametrize("program", cases(PROGRAMS))
def test_a_program_on_text_trains(program, tmp_path):
    hold(program, tmp_path)

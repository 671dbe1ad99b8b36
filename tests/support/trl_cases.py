"""TRL's trainers, stock and with the mixin before them, on a tiny model in float64."""

from __future__ import annotations

import importlib
import random
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from hf_gradacc import GradAccMixin, GradAccOptions

from .bytes_tokenizer import bytes_tokenizer
from .reference import float64_everywhere
from .templates import CHATML_TOKENS, TAGGED
from .tiny import PLAIN, Recorder, tiny_llama

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
torch.set_num_threads(1)

BYTE_VOCABULARY = 272
ROWS_PER_UPDATE = 7
NUM_ROWS = 2 * ROWS_PER_UPDATE


@cache
def tokenizer() -> Any:
    return bytes_tokenizer()


def tokenize(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


def texts(draw: random.Random, shortest: int, longest: int) -> str:
    return "".join(draw.choice("abcdef ") for _ in range(draw.randint(shortest, longest)))


def sft_rows(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    draw = random.Random(5)
    return [{"prompt": texts(draw, 2, 8), "completion": texts(draw, 1, 24)} for _ in range(count)]


def chat_rows(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Conversations of one to three turns each way; only what the assistant says is trained."""
    draw = random.Random(9)

    def say(role: str) -> dict[str, str]:
        return {"role": role, "content": texts(draw, 1, 8)}

    return [
        {"messages": [say(role) for role in ("user", "assistant") * (1 + i % 3)]}
        for i in range(count)
    ]


def pair_rows(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    draw = random.Random(6)
    return [
        {
            "prompt": texts(draw, 2, 8),
            "chosen": texts(draw, 1, 20),
            "rejected": texts(draw, 1, 20),
        }
        for _ in range(count)
    ]


def prompted_rows(name: str, count: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Rows of prompts that are long beside their answers; four prompts for all of them.

    Args:
        name: A case, which says what rows it takes.
        count: Rows.
    """
    draw = random.Random(11)
    prompts = [texts(draw, 50, 60) for _ in range(4)]
    rows = []
    for _ in range(count):
        prompt = draw.choice(prompts)
        chosen, rejected, reference = (texts(draw, 1, 8) for _ in range(3))
        if name.startswith(("sft", "kto")):
            label = {"label": draw.random() < 0.6} if name.startswith("kto") else {}
            rows.append({"prompt": prompt, "completion": chosen, **label})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            rows[-1] |= {"reference": reference} if name.startswith("tpo") else {}
    return rows


def triple_rows(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    draw = random.Random(8)
    return [{**row, "reference": texts(draw, 1, 20)} for row in pair_rows(count)]


def labelled_rows(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    draw = random.Random(7)
    return [
        {
            "prompt": texts(draw, 2, 8),
            "completion": texts(draw, 1, 20),
            "label": draw.random() < 0.6,
        }
        for _ in range(count)
    ]


def scorer(*, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = tiny_llama(vocab_size=BYTE_VOCABULARY).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config).to(torch.float64)


def language_model(*, seed: int = 0, **changes: Any) -> nn.Module:
    """A model that has seen a little of the text: its token accuracy is neither 0 nor 1."""
    model = tiny_llama(
        seed=seed, vocab_size=BYTE_VOCABULARY, max_position_embeddings=256, **changes
    )
    ids = [torch.tensor([tokenize(row["prompt"] + row["completion"])]) for row in sft_rows()[:4]]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(8):
        model(input_ids=ids[step % 4], labels=ids[step % 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def untrained_model() -> nn.Module:
    """A reference that knows less than the policy: the KL between them is above zero."""
    return tiny_llama(seed=1, vocab_size=BYTE_VOCABULARY, max_position_embeddings=256)


def adapted_model() -> nn.Module:
    """With LoRA the reference is the model without its adapter."""
    model = language_model()
    torch.manual_seed(3)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


@dataclass(frozen=True)
class Case:
    """One of TRL's trainers with what it needs; ``options`` are of its arguments."""

    trainer: str
    rows: Any
    model: Any = language_model
    needs_reference: bool = False
    reference: Any = lambda: language_model(seed=1)
    needs_teacher: bool = False
    options: Any = None
    home: str = "trl"
    config: str | None = None

    def make(self, out: Any, *, mixed: bool, **options: Any) -> tuple[Any, Recorder]:
        """Make the trainer, with the mixin before it or as TRL ships it."""
        home = importlib.import_module(self.home)
        stock_class = getattr(home, f"{self.trainer}Trainer")
        stock_arguments = getattr(home, f"{self.config or self.trainer}Config")

        @dataclass
        class Arguments(GradAccOptions, stock_arguments):
            pass

        class Mixed(GradAccMixin, stock_class):
            pass

        settings: dict[str, Any] = {
            **PLAIN,
            "output_dir": str(out),
            "bf16": False,
            "gradient_checkpointing": False,
            "train_sampling_strategy": "sequential",
            "max_length": None,
        }
        settings |= (self.options or {}) | options
        recorder = Recorder()
        rows = datasets.Dataset.from_list(self.rows())
        more: dict[str, Any] = {}
        if self.needs_reference:
            more["ref_model"] = self.reference()
        if self.needs_teacher:
            more["teacher_model"] = language_model(seed=2)
        trainer = (Mixed if mixed else stock_class)(
            model=self.model(),
            args=(Arguments if mixed else stock_arguments)(**settings),
            train_dataset=rows,
            eval_dataset=rows.select(range(5)),
            processing_class=bytes_tokenizer(TAGGED, CHATML_TOKENS),
            callbacks=[recorder],
            **more,
        )
        return trainer, recorder


CASES = {
    "sft": Case("SFT", sft_rows),
    "dft": Case("SFT", sft_rows, options={"loss_type": "dft"}),
    "dpo": Case("DPO", pair_rows, needs_reference=True, options={"beta": 0.5}),
    "dpo_lora": Case("DPO", pair_rows, adapted_model, options={"beta": 0.5}),
    "reward": Case("Reward", pair_rows, scorer, options={"center_rewards_coefficient": 0.1}),
    "kto": Case(
        "KTO",
        labelled_rows,
        needs_reference=True,
        options={"loss_type": "apo_zero_unpaired", "beta": 0.5, "desirable_weight": 1.5},
    ),
}

EVERY_PAIRWISE_LOSS = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]
"""DPO's losses that are a mean over pairs."""

CASES |= {
    "sft_all_tokens": Case("SFT", sft_rows, options={"completion_only_loss": False}),
    "sft_assistant": Case("SFT", chat_rows, options={"assistant_only_loss": True}),
    "dpo_all": Case(
        "DPO",
        pair_rows,
        needs_reference=True,
        options={
            "beta": 0.5,
            "loss_type": EVERY_PAIRWISE_LOSS,
            "loss_weights": [1.0 + 0.1 * place for place in range(len(EVERY_PAIRWISE_LOSS))],
            "label_smoothing": 0.1,
            "learning_rate": 1e-3,
        },
    ),
    "tpo": Case("TPO", triple_rows, options={"tpo_alpha": 0.0}, home="trl.experimental.tpo"),
    "simpo": Case(
        "CPO",
        pair_rows,
        options={"loss_type": "simpo", "cpo_alpha": 0.0},
        home="trl.experimental.cpo",
    ),
    "gkd": Case(
        "GKD",
        chat_rows,
        options={"lmbda": 0.0, "max_length": 256},
        home="trl.experimental.gkd",
        needs_teacher=True,
    ),
}

NO_SINGLE_MEAN = {
    "orpo": Case("ORPO", pair_rows, home="trl.experimental.orpo"),
    "cpo": Case("CPO", pair_rows, home="trl.experimental.cpo"),
    "kto_kl": Case(
        "KTO",
        labelled_rows,
        needs_reference=True,
        reference=untrained_model,
        options={"loss_type": "kto", "beta": 0.5},
    ),
    "dpo_aot": Case("DPO", pair_rows, needs_reference=True, options={"loss_type": ["aot"]}),
    "dpo_aot_unpaired": Case(
        "DPO", pair_rows, needs_reference=True, options={"loss_type": ["aot_unpaired"]}
    ),
    "dpo_sft": Case(
        "DPO",
        pair_rows,
        needs_reference=True,
        options={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
    ),
    "tpo_alpha": Case("TPO", triple_rows, options={"tpo_alpha": 0.5}, home="trl.experimental.tpo"),
}
"""Sums of two means, and losses that compare rows with each other."""

WHOLE = {"per_device_train_batch_size": ROWS_PER_UPDATE}
IN_STOCK_PIECES = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_PER_UPDATE}
IN_PIECES = {"per_device_train_batch_size": 3, "effective_batch_size": ROWS_PER_UPDATE}


@dataclass
class Run:
    """What a run left behind; ``rows`` are those of its log that tell a loss."""

    gradients: list[dict[str, torch.Tensor]]
    rows: list[dict[str, float]]
    evaluation: dict[str, float]
    num_micro_batches: list[int]


def run(
    name: str,
    *,
    mixed: bool,
    evaluates: bool = False,
    prepare: Any = None,
    rows: Any = None,
    **options: Any,
) -> Run:
    """Train a case, perhaps after an evaluation, and give back what it left behind.

    ``prepare`` may change the trainer before that; ``rows`` makes other rows than the case's.
    """
    case = (CASES | NO_SINGLE_MEAN)[name]
    if rows is not None:
        case = replace(case, rows=rows)
    with tempfile.TemporaryDirectory() as out, float64_everywhere():
        trainer, recorder = case.make(out, mixed=mixed, **options)
        if prepare is not None:
            prepare(trainer)
        evaluation = trainer.evaluate() if evaluates else {}
        trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    counts = [row.get("micro_batches_per_update", 0) for row in logged]
    return Run(recorder.gradients, logged, evaluation, [int(count) for count in counts])


def run_as_rank(names: list[str], **options: Any) -> dict[str, Any]:
    """A job for `support.ranks`: gradients, log rows and evaluation of one rank, case by case."""
    told = {}
    for name in names:
        result = run(name, mixed=True, evaluates=True, **options)
        gradients = [
            {key.removeprefix("module."): gradient for key, gradient in update.items()}
            for update in result.gradients
        ]
        told[name] = gradients, result.rows, result.evaluation
    return told


def assert_same(actual: Any, expected: Any, tolerance: float) -> None:
    """Compare gradients, each tensor relative to its largest entry."""
    assert len(actual) == len(expected) > 0
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            scale = float(gradient.abs().max()) or 1.0
            assert float((mine[name] - gradient).abs().max()) <= tolerance * scale, name

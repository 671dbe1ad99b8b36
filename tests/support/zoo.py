"""Tiny random models of every text architecture, and the cases the tests pick among them.

A case is an architecture under a head (``llama`` as causal LM, ``bert`` as question answering).
``all_cases()`` lists what Transformers maps; ``CASES`` is the choice the tests run, made so that
each way a stock Trainer goes wrong occurs in it.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from .zoo_configs import MAX_LENGTH, has_router_loss, tiny_config
from .zoo_rows import MORE_LENGTHS, NUM_LABELS, Collator, HeadRow, collator_for, rows_for

_MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "mlm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "tok": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "single": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "regression": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "multilabel": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "qa": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "mc": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}


# Mapped as text, but fed with sound or pictures, or needing a package of their own.
NOT_TEXT = frozenset(
    {
        *("audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "musicflamingo"),
        *("moss_transcribe_diarize", "nemo_speechlm", "qwen2_audio", "qwen3_asr", "vibevoice_asr"),
        *("voxtral", "voxtral_realtime", "fuyu", "got_ocr2", "gemma3n", "emu3", "git", "lxmert"),
        *(
            "bros",
            "gemma3",
            "t5gemma2",
            "gemma4_assistant",
            "gemma4_unified_assistant",
            "musicgen",
            "musicgen_melody",
            "blt",
        ),
        *("layoutlmv2", "layoutlmv3", "modernvbert", "ultravbert", "encoder-decoder"),
    }
)


# (architecture, head) whose forward looks for special tokens in each row.
_EOS_2 = ("bart", "mbart", "mvp", "plbart")
_EOS_1 = ("bigbird_pegasus", "t5", "mt5", "umt5")
SENTENCE_ENDS: dict[tuple[str, str], list[int]] = {
    **{(name, h): [2] for name in _EOS_2 for h in ("single", "regression", "multilabel")},
    **{(name, h): [1] for name in _EOS_1 for h in ("single", "regression", "multilabel")},
    ("longformer", "qa"): [2, 2, 2],
    ("longformer", "mc"): [2, 2, 2],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture under one head, with or without its router loss."""

    model_type: str
    head: str
    router_loss: bool = False

    def __str__(self) -> str:
        return f"{self.model_type}-{self.head}{'-router' if self.router_loss else ''}"

    @property
    def class_name(self) -> str:
        return _MAPPINGS[self.head][self.model_type]

    def build(self, *, seed: int = 0) -> nn.Module:
        """The model in float64 with seeded random weights, in train mode, without dropout."""
        torch.manual_seed(seed)
        model = _import_class(self.class_name)(self._config())
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # some heads drop out though no field of their configuration says so
        return model.double().train()

    def rows(self, *, seed: int = 0) -> list[HeadRow]:
        """Rows of the lengths that go with the seed, see ``MORE_LENGTHS``."""
        rows = rows_for(self.head, seed=seed, lengths=MORE_LENGTHS[seed % len(MORE_LENGTHS)])
        return self.with_sentence_ends(rows)

    def with_sentence_ends(self, rows: list[HeadRow]) -> list[HeadRow]:
        """The rows, with the special tokens that the forward looks for in each, if it does."""
        special = SENTENCE_ENDS.get((self.model_type, self.head))
        for row in rows if special else ():
            # Replaced at the end of each row, where a tokenizer would have put them.
            choices = row["input_ids"] if self.head == "mc" else [row["input_ids"]]
            for tokens in choices:
                tokens[-len(special) :] = special[-len(tokens) :]
        return rows

    def collator(self, model: nn.Module) -> Collator:
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        # Perceiver predicts every position it has room for, so its labels are padded to all.
        width = MAX_LENGTH if (self.model_type, self.head) == ("perceiver", "mlm") else None
        return collator_for(self.head, model=model, pad_token_id=pad or 0, width=width)

    def _config(self) -> Any:
        extra: dict[str, Any] = {}
        if self.head in ("tok", "single", "multilabel"):
            extra["num_labels"] = NUM_LABELS
        if self.head == "regression":
            extra["num_labels"] = 1
        if self.head == "qa":
            extra["num_labels"] = 2
        if self.head == "multilabel":
            extra["problem_type"] = "multi_label_classification"
        if self.head == "causal":
            extra["is_decoder"] = True
        config = tiny_config(self.model_type, router_loss=self.router_loss, **extra)
        config._experts_implementation = "eager"  # the fused experts refuse float64
        return config


@functools.cache
def _import_class(name: str) -> Any:
    """Import a model class, and keep what came with it out of garbage collection from now on.

    A trainer collects garbage when its run ends, which over all of Transformers' modules takes a
    second, longer than anything else these tests do.
    """
    model_class = getattr(transformers, name)
    gc.collect()
    gc.freeze()
    return model_class


def all_cases() -> list[Case]:
    """Every architecture of Transformers under every head, and with its router loss on."""
    cases = [
        Case(name, head)
        for head, mapping in _MAPPINGS.items()
        for name in mapping
        if name not in NOT_TEXT
    ]
    routed = [
        dataclasses.replace(case, router_loss=True)
        for case in cases
        if case.head in ("causal", "seq2seq") and has_router_loss(case.model_type)
    ]
    return cases + routed


def case_named(name: str) -> Case:
    """The case whose ``str`` is ``name``, such as ``"mixtral-causal-router"``."""
    router_loss = name.endswith("-router")
    model_type, _, head = name.removesuffix("-router").rpartition("-")
    return Case(model_type, head, router_loss)


def _named(head: str, names: str, *, router_loss: bool = False) -> list[Case]:
    return [Case(name, head, router_loss) for name in names.split()]


# What the tests run. Each line is here for the way in which counting goes wrong on it.
CASES: list[Case] = [
    # Stock is right: the whole must stay right.
    *_named("causal", "llama qwen2 qwen3 mistral gemma2 gemma3_text phi phi3 falcon gpt_neox"),
    *_named("causal", "opt bloom mamba mamba2 stablelm granite olmo2 smollm3 cohere starcoder2"),
    # Shift their labels, but stock does not know.
    *_named("causal", "gpt2 bert roberta ctrl electra openai-gpt"),
    # Do not shift, though they are causal LMs.
    *_named("causal", "bart mbart pegasus xlnet xlm"),
    # Add a router loss: balanced over the update, not over each micro-batch.
    *_named("causal", "mixtral qwen2_moe qwen3_moe olmoe gpt_oss granitemoe", router_loss=True),
    *_named("causal", "dbrx jamba phimoe minimax", router_loss=True),
    # The forward takes num_items_in_batch and the loss ignores it.
    *_named("seq2seq", "t5 mt5 bart mbart pegasus marian led switch_transformers"),
    *_named("mlm", "bert roberta deberta deberta-v2 electra modernbert albert distilbert"),
    *_named("tok", "bert roberta deberta-v2 modernbert llama"),
    *_named("single", "bert roberta modernbert llama qwen3 gpt2 bart t5"),
    *_named("regression", "bert deberta-v2 llama xlnet"),
    *_named("multilabel", "bert electra mistral"),
    *_named("mc", "bert roberta xlnet albert"),
    # Let padding into their result.
    *_named("qa", "bert roberta deberta-v2 electra distilbert xlnet llama bart"),
    *_named("mlm", "fnet funnel convbert nystromformer yoso"),
    *_named("single", "xlnet fnet funnel canine reformer"),
]

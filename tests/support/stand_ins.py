"""A tiny stand-in for every hub model and hub set that the shipped recipes name.

Same architecture, same columns, same splits; random weights and a dozen made-up rows. A recipe
that names something new fails here until its stand-in is described.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from support import templates

from hf_gradacc.data import train_tokenizer
from hf_gradacc.recipe.keys.sections import Recipe

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_T5 |= {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}

# By the start of the model's name: architecture, sizes, template, extra tokens, end token.
MODELS: dict[str, tuple[str, dict[str, Any], str | None, list[str], str]] = {
    "Qwen/Qwen3": (
        "qwen3",
        {**_SIZES, "head_dim": 8},
        templates.THINKING,
        templates.CHATML_TOKENS,
        "<|im_end|>",
    ),
    "meta-llama/Llama-3": (
        "llama",
        _SIZES,
        "{% set date_string = date_string %}" + templates.HEADERS,
        [*templates.HEADERS_TOKENS, "<|finetune_right_pad_id|>"],
        "<|eot_id|>",
    ),
    "google/gemma-3-1b": (
        "gemma3_text",
        {**_SIZES, "head_dim": 8},
        templates.NO_SYSTEM,
        templates.NO_SYSTEM_TOKENS,
        "<end_of_turn>",
    ),
    "HuggingFaceTB/SmolLM3": (
        "smollm3",
        _SIZES,
        "{% set thinks = enable_thinking %}" + templates.TAGGED,
        templates.CHATML_TOKENS,
        "<|im_end|>",
    ),
    "HuggingFaceTB/SmolLM2": ("llama", _SIZES, None, [], "<|end|>"),
    "ibm-granite/granite-3.1-1b-a400m": (
        "granitemoe",
        {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
        templates.CHATML,
        templates.CHATML_TOKENS,
        "<|im_end|>",
    ),
    "google/flan-t5": ("t5", _T5, None, [], "<|end|>"),
    "answerdotai/ModernBERT": ("modernbert", _SIZES, None, [], "<|end|>"),
}
_HEADS = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "dpo": "AutoModelForCausalLM",
    "reward": "AutoModelForCausalLM",
}

_STORY = "Ada has 3 plums and buys 4 more. "


def _row(path: str, i: int) -> dict[str, Any]:
    """Row `i` of a hub set, in the columns that its card on the hub shows."""
    said, answer = _STORY * (1 + i % 4) + f"How many? {i}", "Seven. " * (1 + i % 5) + str(i)
    turns = [("user", said), ("assistant", answer), ("user", "Sure?"), ("assistant", f"Yes {i}.")]
    messages = [{"role": role, "content": text} for role, text in turns[: 2 + 2 * (i % 2)]]
    names = {"user": "human", "assistant": "gpt"}
    rows: dict[str, dict[str, Any]] = {
        "HuggingFaceH4/ultrachat_200k": {"prompt": said, "prompt_id": str(i), "messages": messages},
        "HuggingFaceTB/smoltalk": {"messages": messages, "source": "made up"},
        "HuggingFaceTB/smol-smoltalk": {"messages": messages, "source": "made up"},
        "mlabonne/FineTome-100k": {
            "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages],
            "source": "made up",
            "score": 5.0,
        },
        "databricks/databricks-dolly-15k": {
            "instruction": "How many plums?",
            "context": said if i % 2 else "",
            "response": answer,
            "category": "closed_qa",
        },
        "openai/gsm8k": {"question": said, "answer": answer},
        "Salesforce/wikitext": {"text": said + answer},
        "HuggingFaceFW/fineweb-edu": {"text": said + answer, "id": str(i), "score": 3.1},
        "abisee/cnn_dailymail": {"article": said, "highlights": answer, "id": str(i)},
        "fancyzhx/ag_news": {"text": said, "label": i % 4},
        "HuggingFaceH4/ultrafeedback_binarized": {
            "prompt": said,
            "prompt_id": str(i),
            "chosen": messages[:2],
            "rejected": [messages[0], {"role": "assistant", "content": "No. " * (1 + i % 3)}],
            "messages": messages[:2],
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        },
    }
    return rows[path]


def write_stand_in_rows(path: str, folder: Path, *, count: int = 12) -> Path:
    """Write rows with the columns of a hub set."""
    file = folder / (path.replace("/", "--") + ".jsonl")
    rows = [_row(path, i) for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_stand_in_model(name: str, folder: Path, *, task: str) -> Path:
    """Save a tiny model of the same architecture with a tokenizer of the same habits."""
    prefix = next(prefix for prefix in MODELS if name.startswith(prefix))
    model_type, sizes, template, tokens, end = MODELS[prefix]
    tokenizer = train_tokenizer([_STORY, "How many? Seven. Yes."] * 3, vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.eos_token = end
    if "<|begin|>" in tokens:
        tokenizer.bos_token = "<|begin|>"
    tokenizer.chat_template = template
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sizes,
    )
    transformers.set_seed(0)
    model = getattr(transformers, _HEADS[task]).from_config(config)
    place = folder / name.replace("/", "--")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def put_stand_ins(recipe: Recipe, folder: Path) -> None:
    """Point a recipe at stand-ins for whatever it names on the hub, in place."""
    if recipe.model.name is not None:
        place = write_stand_in_model(recipe.model.name, folder, task=recipe.model.task)
        recipe.model.name = str(place)
    elif recipe.model.config is not None:
        recipe.model.config |= _SIZES
    for source in [*recipe.data.train, *recipe.data.eval]:
        if not Path(source.path).exists():
            source.path = str(write_stand_in_rows(source.path, folder))
            source.split = "train"  # a file has no other
            source.name = source.revision = None
        elif source.path.endswith(".jsonl"):
            source.split = "train[:40]"
    recipe.data.num_proc = None
    if recipe.evaluation.generated:
        recipe.evaluation.generate.max_new_tokens = 4
    if isinstance(recipe.data.holdout, int):
        recipe.data.holdout = 0.25

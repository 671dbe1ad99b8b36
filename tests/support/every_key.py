"""Every key of a recipe with a value that changes a run, and all that reaches a run."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import transformers
import yaml

from hf_gradacc.data import iter_texts, load_tokenizer, prepare_data
from hf_gradacc.recipe.load import load_recipe, recipe_arguments
from hf_gradacc.recipe.model.load import check_model
from hf_gradacc.recipe.wandb import configure_wandb

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
PLAIN = {
    "model": {"config": {"model_type": "llama", **SIZES}},
    "tokenizer": {"train": {"vocab_size": 300}},
    "data": {"train": "rows.jsonl", "format": "question_answer"},
    "train": {"use_cpu": True, "report_to": "none"},
}
NAMED: dict[str, Any] = {"model.config": None, "model.name": "base", "tokenizer.train": None}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1}
LORA: dict[str, Any] = {"peft.method": "lora"}
SEQ2SEQ: dict[str, Any] = {
    **{"model.task": "seq2seq", "model.config": T5},
    **{"data.format": "seq2seq", "data.columns": {"source": "question", "target": "answer"}},
}
MIX: dict[str, Any] = {"data.train": ["rows.jsonl", "more.jsonl"]}
HELD: dict[str, Any] = {"data.eval": "more.jsonl"}
PAIRS: dict[str, Any] = {"data.train": "pairs.jsonl", "data.format": "preference"}
DPO: dict[str, Any] = {**PAIRS, "model.task": "dpo"}
REWARD: dict[str, Any] = {**PAIRS, "model.task": "reward"}
SYNCS: dict[str, Any] = {**DPO, "dpo.sync_ref_model": True}
ANSWERS: dict[str, Any] = {**HELD, "evaluation.metrics": ["exact_match"]}
STOPS: dict[str, Any] = {**HELD, "train.eval_strategy": "epoch", "train.save_strategy": "epoch"}
SAMPLES: dict[str, Any] = {"samples.count": 3}

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.name": ("base", {"model.config": None, "tokenizer.train": None}),
    "model.config": ({"model_type": "llama", **SIZES, "num_hidden_layers": 2}, {}),
    "model.overrides": ({"rms_norm_eps": 1e-3}, NAMED),
    "model.task": (
        "seq2seq",
        {key: value for key, value in SEQ2SEQ.items() if key != "model.task"},
    ),
    "model.revision": ("v2", {}),
    "model.dtype": ("bfloat16", {}),
    "model.attn_implementation": ("eager", {}),
    "model.trust_remote_code": (True, {}),
    "model.unfrozen_parameters": (["embed_tokens"], {}),
    "tokenizer.name": ("base", {"tokenizer.train": None}),
    "tokenizer.train": ({"vocab_size": 310}, {}),
    "tokenizer.train.vocab_size": (310, {}),
    "tokenizer.chat_template": ("zephyr", {"tokenizer.eos_token": "<|end|>"}),
    "tokenizer.pad_token": ("<|user|>", {}),
    "tokenizer.eos_token": ("<|user|>", {}),
    "tokenizer.add_tokens": (["<new>"], {}),
    "data.train": ("more.jsonl", {}),
    "data.eval": ("more.jsonl", {}),
    "data.holdout": (2, {}),
    "data.format": ("text", {"data.columns": {"text": "question"}}),
    "data.columns": ({"question": "answer"}, {}),
    "data.document": ("line", {"data.train": "text.md", "data.format": "text"}),
    "data.system": ("Be brief.", {}),
    "data.template_options": (
        {"shout": True},
        {
            "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}"
            "{% if shout %}!{% endif %}{% endfor %}"
        },
    ),
    "data.assistant_turns": ("last", {"data.train": "chats.jsonl", "data.format": "chat"}),
    "data.roles_to_train": (["user", "assistant"], {}),
    "data.source_prefix": ("summarize: ", SEQ2SEQ),
    "data.max_length": (6, {}),
    "data.max_target_length": (2, SEQ2SEQ),
    "data.too_long": ("drop", {"data.max_length": 6}),
    "data.unusable": ("drop", {"data.train": "bad.jsonl"}),
    "data.mix": ("first_exhausted", MIX),
    "data.streaming": (True, {"train.max_steps": 2}),
    "data.num_proc": (2, {}),
    "data.seed": (3, MIX),
    "data.train[0].path": ("more.jsonl", MIX),
    "data.train[0].name": ("part", MIX),
    "data.train[0].split": ("train[:2]", MIX),
    "data.train[0].revision": ("v2", MIX),
    "data.train[0].weight": (9.0, MIX),
    "data.train[0].format": ("text", {**MIX, "data.columns": {"text": "question"}}),
    "data.train[0].columns": ({"question": "answer"}, MIX),
    "peft.method": ("lora", {}),
    "peft.r": (4, LORA),
    "peft.alpha": (4, LORA),
    "peft.dropout": (0.5, LORA),
    "peft.target_modules": (["q_proj"], LORA),
    "peft.modules_to_save": (["lm_head"], LORA),
    "peft.num_virtual_tokens": (4, {"peft.method": "prompt_tuning"}),
    "peft.merge_on_save": (True, LORA),
    "peft.loraplus_ratio": (16, LORA),
    "peft.options": ({"use_rslora": True}, LORA),
    "wandb.project": ("p", {}),
    "wandb.name": ("n", {}),
    "wandb.entity": ("e", {}),
    "wandb.group": ("g", {}),
    "wandb.tags": (["t"], {}),
    "wandb.notes": ("words", {}),
    "wandb.per_rank": (True, {}),
    "wandb.report": (True, {}),
    "wandb.upload_text": (True, {}),
    "wandb.mode": ("offline", {}),
    "dpo.beta": (0.3, DPO),
    "dpo.loss_type": (["ipo"], DPO),
    "dpo.loss_weights": ([0.5], DPO),
    "dpo.label_smoothing": (0.1, {**DPO, "dpo.loss_type": ["robust"]}),
    "dpo.ld_alpha": (0.5, DPO),
    "dpo.f_divergence_type": ("alpha_divergence", DPO),
    "dpo.f_alpha_divergence_coef": (0.7, {**DPO, "dpo.f_divergence_type": "alpha_divergence"}),
    "dpo.use_weighting": (True, DPO),
    "dpo.discopop_tau": (0.1, {**DPO, "dpo.loss_type": ["discopop"]}),
    "dpo.router_aux_loss_coef": (0.01, DPO),
    "dpo.disable_dropout": (False, DPO),
    "dpo.precompute_ref_log_probs": (True, DPO),
    "dpo.precompute_ref_batch_size": (3, {**DPO, "dpo.precompute_ref_log_probs": True}),
    "dpo.sync_ref_model": (True, DPO),
    "dpo.ref_model_mixup_alpha": (0.3, SYNCS),
    "dpo.ref_model_sync_steps": (3, SYNCS),
    "reward.center_rewards_coefficient": (0.01, REWARD),
    "reward.disable_dropout": (False, REWARD),
    "evaluation.metrics": (["exact_match"], HELD),
    "evaluation.generate": ({"max_new_tokens": 5}, ANSWERS),
    "evaluation.generate.max_new_tokens": (5, ANSWERS),
    "evaluation.generate.max_rows": (2, ANSWERS),
    "evaluation.generate.max_tokens_per_batch": (99, ANSWERS),
    "evaluation.early_stopping_patience": (2, STOPS),
    "evaluation.early_stopping_threshold": (
        0.1,
        {**STOPS, "evaluation.early_stopping_patience": 2},
    ),
    "samples.every": (5, SAMPLES),
    "samples.count": (2, {"samples.every": 5}),
    "samples.max_new_tokens": (5, SAMPLES),
    "samples.temperature": (0.5, SAMPLES),
    "output.dir": ("there", {}),
    "output.overwrite": (True, {}),
}
"""For each key a value that is not its default, and what else the recipe says."""

TURNS = [{"role": r, "content": f"{r} {i}"} for i in (1, 2) for r in ("user", "assistant")]


EVALUATES: dict[str, Any] = {"data.eval": "more.jsonl", "train.eval_strategy": "steps"}
WORKERS: dict[str, Any] = {"train.dataloader_num_workers": 1}
PUSHES: dict[str, Any] = {"train.push_to_hub": True}
ARGUMENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "activation_checkpointing_kwargs": (
        {"use_reentrant": False},
        {"train.activation_checkpointing": True},
    ),
    "gradient_checkpointing_kwargs": (
        {"use_reentrant": False},
        {"train.activation_checkpointing": True},
    ),
    "accelerator_config": ({"even_batches": False}, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.5, {}),
    "bf16": (True, {}),
    "chunked_loss": (True, {}),
    "dataloader_pin_memory": (False, {"train.use_cpu": False}),
    "dataloader_multiprocessing_context": ("spawn", WORKERS),
    "dataloader_persistent_workers": (True, WORKERS),
    "dataloader_prefetch_factor": (3, WORKERS),
    "debug": ("underflow_overflow", {}),
    "ddp_backend": ("gloo", {}),
    "disable_tqdm": (False, {}),
    "loss_is_mean_over": ("tokens", {}),
    "low_precision_updates": ("plain", {}),
    "deepspeed": ("none.json", {}),
    "eval_delay": (3, EVALUATES),
    "eval_on_start": (True, EVALUATES),
    "eval_steps": (3, EVALUATES),
    "eval_strategy": ("epoch", HELD),
    "fsdp": (True, {}),
    "fsdp_config": ({"version": 2}, {}),
    "greater_is_better": (True, {**EVALUATES, "train.metric_for_best_model": "loss"}),
    "hub_model_id": ("me/model", PUSHES),
    "hub_revision": ("main", PUSHES),
    "include_for_metrics": (["loss"], {}),
    "include_num_input_tokens_seen": ("all", {}),
    "label_names": (["labels"], {}),
    "label_smoothing_factor": (0.1, {}),
    "liger_kernel_config": ({"rope": True}, {}),
    "load_best_model_at_end": (True, {**EVALUATES, "train.eval_steps": 500}),
    "learning_rates": ({"embed_tokens": 1e-5}, {}),
    "log_level": ("info", {}),
    "log_level_replica": ("info", {}),
    "lr_decay_steps": (0.3, {"train.lr_scheduler_type": "warmup_stable_decay"}),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, {"train.lr_scheduler_type": "cosine"}),
    "max_skipped_updates_in_a_row": (3, {"train.on_non_finite": "skip"}),
    "max_tokens_per_micro_batch": (64, {}),
    "metric_for_best_model": ("loss", EVALUATES),
    "optim": ("sgd", {}),
    "optim_args": ("momentum=0.9", {"train.optim": "sgd"}),
    "optim_target_modules": ("all-linear", {}),
    "per_device_eval_batch_size": (3, EVALUATES),
    "remember_tuned_budget": (True, {"train.max_tokens_per_micro_batch": "auto"}),
    "report_to": ("tensorboard", {}),
    "resume_from_checkpoint": ("base", {}),
    "save_strategy": ("epoch", {}),
    "seed": (3, {}),
    "data_seed": (3, {}),
    "tokens_per_update": (64, {}),
    "torch_compile_backend": ("eager", {}),
    "torch_compile_mode": ("default", {}),
    "trackio_bucket_id": ("b", {}),
    "trackio_space_id": ("s", {}),
    "trackio_static_space_id": ("s", {}),
    "train_sampling_strategy": ("sequential", {}),
}
"""Values of arguments that cannot be told by their type alone."""


def make_folder(folder: Path) -> None:
    """Write rows, and a model with its tokenizer, for the values of the tables."""
    words = [
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "all",
        "of",
        "them",
    ]
    rows = [{"question": f"{i} + {i}?", "answer": " ".join(words[i:])} for i in range(6)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "more.jsonl", [{"question": f"{i}?", "answer": "no"} for i in range(4)])
    write_rows(folder / "bad.jsonl", [*rows, {"question": None, "answer": "x"}])
    write_rows(folder / "chats.jsonl", [{"messages": TURNS}])
    pairs = [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no"} for i in range(4)]
    write_rows(folder / "pairs.jsonl", pairs)
    (folder / "text.md").write_text("one line\nand another\n\na paragraph\n")
    recipe = make(folder, PLAIN, {})
    tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=iter_texts(recipe.data))
    tokenizer.save_pretrained(folder / "base")
    config = transformers.LlamaConfig(**SIZES, vocab_size=320)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")


def write_rows(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder: Path, values: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Load a recipe with changes, by their dotted keys."""
    values, changes = copy.deepcopy((values, changes))
    for key, value in changes.items():
        at = values
        *path, last = re.findall(r"\w+", key)
        for step in path:
            if isinstance(at, list):
                at[int(step)] = at = (
                    {"path": at[int(step)]} if isinstance(at[int(step)], str) else at[int(step)]
                )
            else:
                at = at.setdefault(step, {})
        at[last] = value
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(folder / "mine.yaml", trust_remote_code=True)


def resolve(recipe: Any) -> dict[str, Any]:
    """All that reaches a run."""
    before = dict(os.environ)
    try:
        configure_wandb(recipe)
        environment = {name: v for name, v in os.environ.items() if name.startswith("WANDB_")}
    finally:
        os.environ.clear()
        os.environ.update(before)
    tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=iter_texts(recipe.data))
    model = check_model(recipe.model, recipe.peft, tokenizer=tokenizer)
    data = prepare_data(recipe.data, tokenizer=tokenizer, task=recipe.model.task)
    adapter = getattr(model, "peft_config", {}).get("default")
    return {
        "model": (type(model).__name__, model.config.to_dict(), str(model.dtype)),
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "attention": model.config._attn_implementation,
        "tokenizer": (tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template),
        "rows": (type(data.train).__name__, [dict(row) for row in data.train]),
        "held out": None if data.eval is None else [dict(row) for row in data.eval],
        "adapter": None if adapter is None else dataclasses.asdict(adapter),
        "arguments": recipe_arguments(recipe).to_dict(),
        "W&B": environment,
        "answers": (recipe.evaluation, recipe.samples),  # taken whole by what reads them
        "saving": (recipe.peft.merge_on_save, recipe.output.overwrite, recipe.data.num_proc),
    }


def other_value(field: dataclasses.Field[Any]) -> Any:
    """A value of a field's type that is not its default."""
    default = field.default if field.default is not dataclasses.MISSING else None
    hint = str(field.type)
    if "Literal" in hint or "Strategy" in hint or "SchedulerType" in hint:
        known = {"lr_scheduler_type": "cosine", "logging_strategy": "epoch", "hub_strategy": "end"}
        known |= {"incomplete_update": "drop", "update_passes": 1}
        known |= {"layout": "packed", "on_non_finite": "skip"}
        return known[field.name]
    if "bool" in hint:
        return not default
    if "int" in hint:
        return (default or 1) + 1
    if isinstance(default, str):
        return "other"
    return (default or 0.0) + 0.5

"""LLaMA-Factory's keys, and what becomes of each.

Keys of data and their defaults were compared with its `data_args` and its command line of 2025; the
others are written as its documentation has them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hf_gradacc.elsewhere.draft import Draft, Key, is_recipe_key
from hf_gradacc.elsewhere.llamafactory_data import put_sources
from hf_gradacc.elsewhere.reading import read_file
from hf_gradacc.elsewhere.shared import (
    Places,
    put_optimizer,
    put_preferences,
    put_template,
    put_warmup,
    to_list,
)
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.checks.idle_arguments import NEVER_READ

__all__ = ["LLAMAFACTORY", "read_llamafactory"]


def read_llamafactory(draft: Draft, places: Places) -> None:
    """Fill a draft from a LLaMA-Factory file.

    Raises:
        ConfigError: If it trains in a way that no recipe does, or lacks what a recipe needs.
    """
    stage = draft.get("stage", "sft")
    if stage in ("ppo", "kto"):
        raise ConfigError(f"stage = {stage!r}: no recipe trains that way; use TRL.")
    if not draft.get("model_name_or_path"):
        raise ConfigError("model_name_or_path is missing: a recipe needs a model.")
    for name in draft.written:  # whatever else training arguments are called alike
        if name not in {*LLAMAFACTORY, *NEVER_READ} and is_recipe_key(f"train.{name}"):
            draft.put(f"train.{name}", draft.written[name])
    known = {name: Key(f"train.{name}") for name in draft.values.get("train", {})}
    known |= {name: Key(why=why) for name, (why, _) in NEVER_READ.items()}
    draft.apply({**known, **LLAMAFACTORY}, left="no counterpart is known")
    if stage in ("dpo", "rm"):
        put_preferences(draft, "reward" if stage == "rm" else "dpo")
    _put_adapter(draft)
    _put_precision(draft)
    _put_size(draft)
    put_sources(draft, places, stage)
    put_warmup(draft)
    deepspeed = draft.get("deepspeed")
    if isinstance(deepspeed, str):
        draft.put("train.deepspeed", read_file(places, deepspeed) or deepspeed)
    if not draft.get("disable_gradient_checkpointing", False):
        draft.put("train.activation_checkpointing", True)


def _put_adapter(draft: Draft) -> None:
    method = draft.get("finetuning_type", "lora")
    bits = draft.get("quantization_bit")
    if method == "lora":
        dora = draft.get("use_dora", False)
        draft.put("peft.method", "qlora" if bits == 4 else "dora" if dora else "lora")
        if bits == 4 and dora:
            draft.put("peft.options.use_dora", True)
        rank = draft.number("lora_rank", 8)
        draft.put("peft.r", rank)
        draft.put("peft.alpha", draft.get("lora_alpha", 2 * rank))
        targets = to_list(draft.get("lora_target", "all"))
        if targets != ["all"]:
            draft.put("peft.target_modules", targets)
        extra = draft.get("additional_target")
        if extra:
            draft.put("peft.modules_to_save", to_list(extra))
        if draft.get("pissa_init", False):
            steps = draft.get("pissa_iter", 16)
            draft.put("peft.options.init_lora_weights", f"pissa_niter_{steps}")
    else:
        draft.values.pop("peft", None)
        if method != "full":
            draft.note("finetuning_type", "the whole model would be trained")
    if bits is not None and (bits != 4 or method != "lora"):
        draft.note("quantization_bit", "the base is loaded whole; in 4 bits it can be: qlora")


def _put_precision(draft: Draft) -> None:
    """Adapters stand on a base in 16 bits; a whole model is trained in float32 under autocast."""
    is_whole = draft.get("finetuning_type", "lora") != "lora"
    if draft.get("pure_bf16", False):
        draft.put("model.dtype", "bfloat16")
        draft.values.get("train", {}).pop("bf16", None)
    elif is_whole:
        draft.put("model.dtype", "float32")
    elif draft.get("bf16", False):
        draft.put("model.dtype", "bfloat16")
    elif draft.get("fp16", False):
        draft.put("model.dtype", "float16")


def _put_size(draft: Draft) -> None:
    rows = draft.number("per_device_train_batch_size", 8)
    times = draft.number("gradient_accumulation_steps", 1)
    world = draft.world_size
    packs = draft.get("packing", draft.get("stage") == "pt") or draft.get("neat_packing", False)
    if packs and draft.get("stage") != "pt":
        length = draft.number("cutoff_len", 2048)
        draft.put("train.tokens_per_update", rows * times * (world or 1) * length)
        draft.put("train.max_tokens_per_micro_batch", rows * length)
        draft.values.get("train", {}).pop("gradient_accumulation_steps", None)
        draft.values.get("train", {}).pop("per_device_train_batch_size", None)
        ranks = f"{world} ranks" if world else "1 rank; --world-size N for more"
        text = f"rows are not packed: an update takes learned tokens instead (counted for {ranks})"
        key = "packing" if draft.get("packing", False) else "neat_packing"
        draft.note(key, text, carried=True)
    elif world is not None:
        draft.put("train.effective_batch_size", rows * times * world)
        draft.values.get("train", {}).pop("gradient_accumulation_steps", None)


def _attention(draft: Draft, value: Any) -> None:
    names = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager", "fa3":
             "flash_attention_3"}  # fmt: skip
    if value in names:
        draft.put("model.attn_implementation", names[value])
    elif value != "auto":
        draft.note("flash_attn", "transformers chooses the attention", changes=False)


def _template(draft: Draft, value: Any) -> None:
    put_template(draft, "template", str(value))


def _thinking(draft: Draft, value: Any) -> None:
    draft.put("data.template_options.enable_thinking", value)


def _pair_loss(draft: Draft, value: Any) -> None:
    if value not in ("sigmoid", "hinge", "ipo"):
        raise ConfigError(f"pref_loss = {value!r}: no recipe trains that way; use TRL.")
    if value != "sigmoid" and draft.get("stage") == "dpo":
        draft.put("dpo.loss_type", [value])


def _reporters(draft: Draft, value: Any) -> None:
    names = to_list(value)
    draft.put("train.report_to", names if len(names) > 1 else names[0] if names else "none")


def _hub(draft: Draft, value: Any) -> None:
    draft.put("train.push_to_hub", True)
    draft.put("train.hub_model_id", value)


def _elsewhere(target: str) -> Key:
    """A key that one of the functions above reads together with others."""
    return Key(target, read=lambda draft, value: None)


_SPEED = Key(why="a matter of speed; ours chooses by itself")
_STORE = Key(why="prepared rows are kept in the cache of datasets")
_OTHER_METHOD = Key(why="no such way to train; without it all is trained", changes=True)

LLAMAFACTORY: dict[str, Key] = {
    "model_name_or_path": Key("model.name"),
    "model_revision": Key("model.revision"),
    "trust_remote_code": Key("model.trust_remote_code", "also needs --trust-remote-code"),
    "flash_attn": Key("model.attn_implementation", read=_attention),
    "stage": _elsewhere("data.format; model.task for rm and dpo"),
    "finetuning_type": _elsewhere("peft.method"),
    "quantization_bit": _elsewhere("peft.method: qlora"),
    "lora_rank": _elsewhere("peft.r"),
    "lora_alpha": _elsewhere("peft.alpha"),
    "lora_dropout": Key("peft.dropout"),
    "lora_target": _elsewhere("peft.target_modules"),
    "additional_target": _elsewhere("peft.modules_to_save"),
    "use_dora": _elsewhere("peft.method: dora"),
    "use_rslora": Key("peft.options.use_rslora"),
    "loraplus_lr_ratio": Key("peft.loraplus_ratio"),
    "pissa_init": _elsewhere("peft.options.init_lora_weights"),
    "pissa_iter": _elsewhere("peft.options.init_lora_weights"),
    "dataset": _elsewhere("data.train, data.format, data.columns"),
    "dataset_dir": _elsewhere("data.train"),
    "eval_dataset": _elsewhere("data.eval"),
    "val_size": _elsewhere("data.holdout"),
    "template": Key("tokenizer.chat_template", read=_template),
    "default_system": Key("data.system"),
    "enable_thinking": Key("data.template_options.enable_thinking", read=_thinking),
    "cutoff_len": _elsewhere("data.max_length"),
    "max_samples": _elsewhere("data.train.split: train[:N]"),
    "train_on_prompt": _elsewhere("data.roles_to_train"),
    "mask_history": _elsewhere("data.assistant_turns: last"),
    "streaming": Key("data.streaming"),
    "mix_strategy": _elsewhere("data.mix"),
    "interleave_probs": _elsewhere("data.train.weight"),
    "preprocessing_num_workers": Key("data.num_proc"),
    "packing": _elsewhere("train.tokens_per_update, train.max_tokens_per_micro_batch"),
    "neat_packing": _elsewhere("train.tokens_per_update, train.max_tokens_per_micro_batch"),
    "optim": Key("train.optim", read=partial(put_optimizer, key="optim")),
    "per_device_train_batch_size": Key("train.per_device_train_batch_size"),
    "gradient_accumulation_steps": Key("train.gradient_accumulation_steps"),
    "warmup_steps": _elsewhere("train.warmup_steps"),
    "warmup_ratio": _elsewhere("train.warmup_steps, below 1"),
    "pure_bf16": _elsewhere("model.dtype"),
    "disable_gradient_checkpointing": _elsewhere("train.activation_checkpointing"),
    "enable_liger_kernel": Key("train.use_liger_kernel"),
    "deepspeed": _elsewhere("train.deepspeed"),
    "pref_beta": Key("dpo.beta"),
    "pref_loss": Key("dpo.loss_type", read=_pair_loss),
    "early_stopping_steps": Key("evaluation.early_stopping_patience"),
    "output_dir": Key("output.dir"),
    "run_name": Key("wandb.name"),
    "report_to": Key("train.report_to", read=_reporters),
    "export_hub_model_id": Key("train.push_to_hub, train.hub_model_id", read=_hub),
    # ---- without a counterpart -----------------------------------------------------------------
    "do_train": Key(why="`hf-gradacc train` trains"),
    "do_eval": Key(why="rows to evaluate on are evaluated"),
    "do_predict": Key(why="`hf-gradacc chat` gives answers"),
    "predict_with_generate": Key(why="`hf-gradacc chat` gives answers"),
    "overwrite_output_dir": Key(why="give --overwrite"),
    "overwrite_cache": _STORE,
    "tokenized_path": _STORE,
    "plot_loss": Key(why="`hf-gradacc report RUN` draws it"),
    "resume_from_checkpoint": Key(why="give --resume"),
    "upcast_layernorm": Key(why="norms compute in float32 anyway"),
    "use_unsloth": _SPEED,
    "use_unsloth_gc": _SPEED,
    "double_quantization": Key(why="qlora always does"),
    "quantization_method": Key(why="qlora uses bitsandbytes"),
    "use_fast_tokenizer": Key(why="the fast tokenizer is used wherever there is one"),
    "include_num_input_tokens_seen": Key(why="input tokens are logged with every row"),
    "adapter_name_or_path": Key(why="an adapter starts from zero; merge this one first",
                                changes=True),
    "rope_scaling": Key(why="write it as model.overrides", changes=True),
    "resize_vocab": Key(why="embeddings grow with tokenizer.add_tokens"),
    "freeze_trainable_layers": _OTHER_METHOD,
    "freeze_trainable_modules": _OTHER_METHOD,
    "use_galore": _OTHER_METHOD,
    "use_apollo": _OTHER_METHOD,
    "use_badam": _OTHER_METHOD,
    "pref_ftx": _OTHER_METHOD,
}  # fmt: skip
"""Every key that is known, in the order of the documentation's table; beside these, each of
`TrainingArguments` goes to `train` as it is."""

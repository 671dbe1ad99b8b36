"""Axolotl's keys, and what becomes of each.

Core and training keys and their defaults were compared with its `utils/schemas` of 2025; the others
are written as its documentation has them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hf_gradacc.elsewhere.axolotl_data import put_sources
from hf_gradacc.elsewhere.draft import Draft, Key
from hf_gradacc.elsewhere.reading import read_file
from hf_gradacc.elsewhere.shared import (
    Places,
    known_optimizers,
    put_optimizer,
    put_preferences,
    put_template,
    put_warmup,
    to_list,
)
from hf_gradacc.errors import ConfigError

__all__ = ["AXOLOTL", "read_axolotl"]

_REFUSED = ("ppo", "grpo", "gdpo", "kto", "orpo", "simpo", "ebft")


def read_axolotl(draft: Draft, places: Places) -> None:
    """Fill a draft from an Axolotl file.

    Raises:
        ConfigError: If it trains in a way that no recipe does, or lacks what a recipe needs.
    """
    if draft.get("rl") in _REFUSED:
        raise ConfigError(f"rl = {draft.get('rl')!r}: no recipe trains that way; use TRL.")
    draft.apply(AXOLOTL, left="no counterpart is known")
    if draft.get("rl") is not None:
        if draft.get("rl") not in ("dpo", "ipo"):
            raise ConfigError(f"rl = {draft.get('rl')!r} is not known: use dpo, or ipo.")
        put_preferences(draft, "dpo")
        if draft.get("rl") == "ipo":
            draft.put("dpo.loss_type", ["ipo"])
    elif draft.get("reward_model", False):
        put_preferences(draft, "reward")
    if not draft.get("base_model"):
        raise ConfigError("base_model is missing: a recipe needs a model.")
    _put_adapter(draft)
    _put_precision(draft)
    _put_size(draft)
    put_sources(draft, places)
    _put_course(draft)
    for name in ("deepspeed", "fsdp"):
        value = draft.get(name)
        if name == "deepspeed" and isinstance(value, str):
            draft.put("train.deepspeed", read_file(places, value) or value)
        elif name == "fsdp" and value:
            _put_fsdp(draft)


def _put_adapter(draft: Draft) -> None:
    method = draft.get("adapter")
    if method in ("lora", "qlora"):
        quantized = method == "qlora" or draft.get("load_in_4bit", False)
        dora = draft.get("peft_use_dora", False)
        draft.put("peft.method", "qlora" if quantized else "dora" if dora else "lora")
        if quantized and dora:
            draft.put("peft.options.use_dora", True)
        if draft.get("load_in_8bit", False):
            draft.note("load_in_8bit", "the base is loaded whole; in 4 bits: peft.method: qlora")
        if draft.get("lora_target_linear", False) and draft.get("lora_target_modules"):
            draft.values["peft"].pop("target_modules", None)
    else:
        draft.values.pop("peft", None)
        if method is not None:
            draft.note("adapter", "no such method; the whole model would be trained")
        for name in ("load_in_4bit", "load_in_8bit"):
            if draft.get(name, False):
                draft.note(name, "without an adapter there is nothing to train in few bits")


def _put_precision(draft: Draft) -> None:
    others = ("fp16", "bfloat16", "float16", "float32")
    default = False if any(draft.get(name, False) for name in others) else "auto"
    bf16, fp16 = draft.get("bf16", default), draft.get("fp16", False)
    if bf16 or draft.get("bfloat16", False):
        draft.put("model.dtype", "bfloat16")
        if bf16:
            draft.put("train.bf16", True)
        if draft.get("bf16") == "auto":
            draft.note("bf16", "taken as true: Axolotl would look at the GPU", changes=False,
                       carried=True)  # fmt: skip
    elif fp16:
        draft.put("train.fp16", True)
        draft.put("model.dtype", "float32")
        draft.note("fp16", "weights stay float32: float16 ones cannot be scaled back", carried=True)
    else:
        draft.put("model.dtype", "float16" if draft.get("float16", False) else "float32")


def _put_size(draft: Draft) -> None:
    """Axolotl packs rows, so a batch is a number of blocks; else it is a number of rows."""
    rows = draft.number("micro_batch_size", 1)
    whole = draft.number("batch_size", 0)
    times = draft.number("gradient_accumulation_steps", max(1, whole // rows))
    length = draft.number("sequence_len", 512)
    world = draft.world_size
    if draft.get("sample_packing", False) and not draft.get("pretraining_dataset"):
        draft.put("train.tokens_per_update", rows * times * (world or 1) * length)
        draft.put("train.max_tokens_per_micro_batch", rows * length)
        ranks = f"{world} ranks" if world else "1 rank; --world-size N for more"
        text = f"rows are not packed: an update takes learned tokens instead (counted for {ranks})"
        draft.note("sample_packing", text, carried=True)
    elif world is not None:
        draft.put("train.effective_batch_size", rows * times * world)
        draft.put("train.per_device_train_batch_size", rows)
    else:
        draft.put("train.per_device_train_batch_size", rows)
        draft.put("train.gradient_accumulation_steps", times)


def _put_course(draft: Draft) -> None:
    """Length, schedule, evaluation and saving, with Axolotl's defaults."""
    epochs = draft.number("num_epochs", 1)
    if draft.number("max_steps", -1) < 1:
        draft.put("train.num_train_epochs", epochs)
    schedule = draft.get("lr_scheduler", "cosine")
    least = draft.get("cosine_min_lr_ratio")
    if schedule in ("one_cycle", "rex"):
        draft.put("train.lr_scheduler_type", "cosine")
        draft.note("lr_scheduler", "no such schedule; cosine is the nearest", carried=True)
    elif schedule == "cosine" and least is not None:
        draft.put("train.lr_scheduler_type", "cosine_with_min_lr")
        draft.put("train.lr_scheduler_kwargs", {"min_lr_rate": least})
    else:
        draft.put("train.lr_scheduler_type", schedule)
    if not put_warmup(draft):
        draft.put("train.warmup_steps", 0.03)  # Axolotl's, which ends it after 100 updates
    has_eval = bool(draft.values["data"].get("eval") or draft.values["data"].get("holdout"))
    if has_eval:
        rows = draft.number("eval_batch_size", draft.number("micro_batch_size", 1))
        draft.put("train.per_device_eval_batch_size", rows)
    for event, per_epoch in (("eval", "evals_per_epoch"), ("save", "saves_per_epoch")):
        strategy = draft.get(f"{event}_strategy")
        if event == "eval":
            strategy = draft.get("eval_strategy", draft.get("evaluation_strategy"))
        steps, times = draft.get(f"{event}_steps"), draft.get(per_epoch)
        if event == "eval" and not has_eval:
            if steps or times:
                draft.note(per_epoch if times else "eval_steps", "there are no rows to evaluate on")
        elif times and times * epochs > 1 and times != 1 and "max_steps" not in draft.written:
            draft.put(f"train.{event}_strategy", "steps")
            draft.put(f"train.{event}_steps", round(1 / (times * epochs), 6))  # a share of the run
        elif times:
            draft.put(f"train.{event}_strategy", "epoch")
            if times != 1:
                draft.note(per_epoch, f"once an epoch; see train.{event}_steps", carried=True)
        elif steps:
            draft.put(f"train.{event}_strategy", "steps")
            draft.put(f"train.{event}_steps", steps)
        else:
            draft.put(f"train.{event}_strategy", strategy or "epoch")
    reporters = ["wandb"] if draft.get("wandb_project") else []
    reporters += ["tensorboard"] if draft.get("use_tensorboard", False) else []
    if draft.get("wandb_mode") == "disabled":
        reporters = [name for name in reporters if name != "wandb"]
    draft.put("train.report_to", reporters or "none")


def _put_fsdp(draft: Draft) -> None:
    written = draft.get("fsdp_config", {})
    config = {name.removeprefix("fsdp_"): value for name, value in written.items()}
    known = {
        "activation_checkpointing", "auto_wrap_policy", "cpu_ram_efficient_loading",
        "offload_params", "reshard_after_forward", "state_dict_type",
        "transformer_layer_cls_to_wrap",
    }  # fmt: skip
    kept = {name: value for name, value in config.items() if name in known}
    draft.put("train.fsdp", True)
    draft.put("train.fsdp_config", {**kept, "version": 2})
    if draft.get("fsdp_version") != 2:
        draft.note("fsdp", "FSDP2 in place of FSDP1; offload and wrapping are in train.fsdp_config",
                   changes=False, carried=True)  # fmt: skip
    for name in written:
        if name.removeprefix("fsdp_") not in {*known, "version"}:
            draft.note(f"fsdp_config.{name}", "an option of FSDP1 alone", changes=False)


def _modules(draft: Draft, value: Any) -> None:
    draft.put("peft.target_modules", value if isinstance(value, str) else to_list(value))


def _optimizer_options(draft: Draft, value: Any) -> None:
    if draft.get("optimizer", "adamw_torch_fused") not in known_optimizers():
        draft.note("optim_args", "options of an optimizer that is not there")
        return
    pairs = value.items() if isinstance(value, dict) else ()
    text = ", ".join(f"{name}={inner}" for name, inner in pairs) or str(value)
    draft.put("train.optim_args", text)


def _special(draft: Draft, value: Any) -> None:
    for name, word in (value or {}).items():
        if name in ("pad_token", "eos_token"):
            draft.put(f"tokenizer.{name}", word)
        elif word is not None:
            draft.note(f"special_tokens.{name}", "the tokenizer's own stays")


def _checkpointing(draft: Draft, value: Any) -> None:
    draft.put("train.activation_checkpointing", bool(value))
    if isinstance(value, str):
        draft.note("gradient_checkpointing", "recomputed, and not offloaded", changes=False,
                   carried=True)  # fmt: skip


def _template(draft: Draft, value: Any) -> None:
    if value == "jinja" and draft.get("chat_template_jinja"):
        draft.put("tokenizer.chat_template", draft.get("chat_template_jinja"))
    else:
        put_template(draft, "chat_template", str(value).removeprefix("tokenizer_default_fallback_"))


def _attention(name: str) -> Key:
    def read(draft: Draft, value: Any) -> None:
        if value:
            draft.put("model.attn_implementation", name)

    return Key(f"model.attn_implementation: {name}", read=read)


def _hub(draft: Draft, value: Any) -> None:
    draft.put("train.push_to_hub", True)
    draft.put("train.hub_model_id", value)


def _task(draft: Draft, value: Any) -> None:
    if "SequenceClassification" in str(value):
        draft.put("model.task", "classification")


def _liger(draft: Draft, value: Any) -> None:
    if value:
        draft.put("train.use_liger_kernel", True)


def _plugins(draft: Draft, value: Any) -> None:
    for index, plugin in enumerate(to_list(value)):
        if "liger" in str(plugin):
            draft.put("train.use_liger_kernel", True)
        elif "cut_cross_entropy" in str(plugin):
            draft.note(f"plugins[{index}]", "logits are computed in chunks anyway", changes=False)
        else:
            draft.note(f"plugins[{index}]", "plugins of Axolotl are not run")


def _elsewhere(target: str) -> Key:
    """A key that one of the functions above reads together with others."""
    return Key(target, read=lambda draft, value: None)


_LORA = Key(changes=True, why="an adapter starts from zero here; merge this one first")
_SPEED = Key(why="a matter of speed; ours chooses by itself")
_STORE = Key(why="prepared rows are kept in the cache of datasets")
_LAUNCH = Key(why="say it to the launcher")

AXOLOTL: dict[str, Key] = {
    "base_model": Key("model.name"),
    "revision_of_model": Key("model.revision"),
    "trust_remote_code": Key("model.trust_remote_code", "also needs --trust-remote-code"),
    "overrides_of_model_config": Key("model.overrides"),
    "model_type": Key("model.task", read=_task),
    "tokenizer_config": Key("tokenizer.name"),
    "special_tokens": Key("tokenizer.pad_token, tokenizer.eos_token", read=_special),
    "tokens": Key("tokenizer.add_tokens"),
    "chat_template": Key("tokenizer.chat_template", read=_template),
    "chat_template_jinja": _elsewhere("tokenizer.chat_template"),
    "attn_implementation": Key("model.attn_implementation"),
    "flash_attention": _attention("flash_attention_2"),
    "sdp_attention": _attention("sdpa"),
    "flex_attention": _attention("flex_attention"),
    "eager_attention": _attention("eager"),
    "adapter": _elsewhere("peft.method"),
    "load_in_4bit": _elsewhere("peft.method: qlora"),
    "load_in_8bit": Key(
        why="the base is loaded whole", changes=True, read=lambda draft, value: None
    ),
    "peft_use_dora": _elsewhere("peft.method: dora"),
    "lora_r": Key("peft.r"),
    "lora_alpha": Key("peft.alpha"),
    "lora_dropout": Key("peft.dropout"),
    "lora_target_modules": Key("peft.target_modules", read=_modules),
    "lora_target_linear": _elsewhere("peft.target_modules, whose default it is"),
    "lora_modules_to_save": Key("peft.modules_to_save"),
    "lora_fan_in_fan_out": Key("peft.options.fan_in_fan_out"),
    "peft_use_rslora": Key("peft.options.use_rslora"),
    "peft_layers_to_transform": Key("peft.options.layers_to_transform"),
    "peft_init_lora_weights": Key("peft.options.init_lora_weights"),
    "loraplus_lr_ratio": Key("peft.loraplus_ratio"),
    "unfrozen_parameters": Key("model.unfrozen_parameters"),
    "lora_model_dir": _LORA,
    "datasets": _elsewhere("data.train, data.format, data.columns"),
    "pretraining_dataset": _elsewhere("data.train, data.streaming"),
    "test_datasets": _elsewhere("data.eval"),
    "val_set_size": _elsewhere("data.holdout"),
    "sequence_len": _elsewhere("data.max_length, data.too_long: drop"),
    "excess_length_strategy": _elsewhere("data.too_long"),
    "dataset_processes": Key("data.num_proc"),
    "dataset_num_proc": Key("data.num_proc"),
    "default_system_message": Key("data.system"),
    "train_on_inputs": _elsewhere("data.roles_to_train"),
    "streaming": _elsewhere("data.streaming"),
    "sample_packing": _elsewhere("train.tokens_per_update, train.max_tokens_per_micro_batch"),
    "micro_batch_size": _elsewhere("train.per_device_train_batch_size"),
    "gradient_accumulation_steps": _elsewhere("train.gradient_accumulation_steps"),
    "batch_size": _elsewhere("train.gradient_accumulation_steps"),
    "eval_batch_size": _elsewhere("train.per_device_eval_batch_size"),
    "num_epochs": _elsewhere("train.num_train_epochs"),
    "max_steps": Key("train.max_steps"),
    "learning_rate": Key("train.learning_rate"),
    "lr_scheduler": _elsewhere("train.lr_scheduler_type"),
    "lr_scheduler_kwargs": Key("train.lr_scheduler_kwargs"),
    "cosine_min_lr_ratio": _elsewhere("train.lr_scheduler_kwargs"),
    "warmup_steps": _elsewhere("train.warmup_steps"),
    "warmup_ratio": _elsewhere("train.warmup_steps, below 1"),
    "weight_decay": Key("train.weight_decay"),
    "max_grad_norm": Key("train.max_grad_norm"),
    "optimizer": Key("train.optim", read=partial(put_optimizer, key="optimizer")),
    "optim_args": Key("train.optim_args", read=_optimizer_options),
    "adam_beta1": Key("train.adam_beta1"),
    "adam_beta2": Key("train.adam_beta2"),
    "adam_epsilon": Key("train.adam_epsilon"),
    "neftune_noise_alpha": Key("train.neftune_noise_alpha"),
    "noisy_embedding_alpha": Key("train.neftune_noise_alpha"),
    "bf16": _elsewhere("train.bf16, model.dtype"),
    "fp16": _elsewhere("train.fp16"),
    "bfloat16": _elsewhere("model.dtype"),
    "float16": _elsewhere("model.dtype"),
    "float32": _elsewhere("model.dtype"),
    "tf32": Key("train.tf32"),
    "gradient_checkpointing": Key("train.activation_checkpointing", read=_checkpointing),
    "gradient_checkpointing_kwargs": Key("train.activation_checkpointing_kwargs"),
    "torch_compile": Key("train.torch_compile"),
    "torch_compile_backend": Key("train.torch_compile_backend"),
    "torch_compile_mode": Key("train.torch_compile_mode"),
    "plugins": Key("train.use_liger_kernel", read=_plugins),
    "liger_fused_linear_cross_entropy": Key("train.use_liger_kernel", read=_liger),
    "liger_rope": Key("train.use_liger_kernel", read=_liger),
    "liger_rms_norm": Key("train.use_liger_kernel", read=_liger),
    "liger_glu_activation": Key("train.use_liger_kernel", read=_liger),
    "logging_steps": Key("train.logging_steps"),
    "eval_steps": _elsewhere("train.eval_steps"),
    "eval_strategy": _elsewhere("train.eval_strategy"),
    "evaluation_strategy": _elsewhere("train.eval_strategy"),
    "evals_per_epoch": _elsewhere("train.eval_steps, as a share of the run"),
    "save_steps": _elsewhere("train.save_steps"),
    "save_strategy": _elsewhere("train.save_strategy"),
    "saves_per_epoch": _elsewhere("train.save_steps, as a share of the run"),
    "save_total_limit": Key("train.save_total_limit"),
    "save_only_model": Key("train.save_only_model"),
    "load_best_model_at_end": Key("train.load_best_model_at_end"),
    "metric_for_best_model": Key("train.metric_for_best_model"),
    "greater_is_better": Key("train.greater_is_better"),
    "early_stopping_patience": Key("evaluation.early_stopping_patience"),
    "seed": Key("train.seed"),
    "dataloader_num_workers": Key("train.dataloader_num_workers"),
    "dataloader_pin_memory": Key("train.dataloader_pin_memory"),
    "dataloader_prefetch_factor": Key("train.dataloader_prefetch_factor"),
    "dataloader_drop_last": Key("train.dataloader_drop_last"),
    "ddp_timeout": Key("train.ddp_timeout"),
    "ddp_bucket_cap_mb": Key("train.ddp_bucket_cap_mb"),
    "deepspeed": _elsewhere("train.deepspeed"),
    "fsdp": _elsewhere("train.fsdp"),
    "fsdp_config": _elsewhere("train.fsdp_config"),
    "fsdp_version": _elsewhere("train.fsdp_config.version"),
    "output_dir": Key("output.dir"),
    "hub_model_id": Key("train.push_to_hub, train.hub_model_id", read=_hub),
    "hub_strategy": Key("train.hub_strategy"),
    "use_tensorboard": _elsewhere("train.report_to"),
    "wandb_project": Key("wandb.project"),
    "wandb_entity": Key("wandb.entity"),
    "wandb_name": Key("wandb.name"),
    "wandb_mode": Key("wandb.mode"),
    "rl": _elsewhere("model.task: dpo, dpo.loss_type"),
    "reward_model": _elsewhere("model.task: reward"),
    "rl_beta": Key("dpo.beta"),
    "dpo_beta": Key("dpo.beta"),
    # ---- without a counterpart -----------------------------------------------------------------
    "tokenizer_type": Key(why="the tokenizer says it itself"),
    "tokenizer_use_fast": Key(why="the fast tokenizer is used wherever there is one"),
    "tokenizer_legacy": Key(why="the tokenizer says it itself"),
    "is_llama_derived_model": Key(why="the model says it itself"),
    "is_mistral_derived_model": Key(why="the model says it itself"),
    "strict": Key(why="an adapter's keys are always checked"),
    "dataset_prepared_path": _STORE,
    "shuffle_merged_datasets": Key(why="rows are always shuffled, by seed and epoch"),
    "push_dataset_to_hub": _STORE,
    "eval_sample_packing": Key(why="an evaluation is exact per target however it is cut"),
    "pad_to_sequence_len": Key(why="padding never changes the gradient; there is less without"),
    "group_by_length": Key(why="rows share updates by chance, and are cut by length"),
    "flash_attn_cross_entropy": _SPEED,
    "flash_attn_rms_norm": _SPEED,
    "flash_attn_fuse_mlp": _SPEED,
    "lora_mlp_kernel": _SPEED,
    "lora_qkv_kernel": _SPEED,
    "lora_o_kernel": _SPEED,
    "xformers_attention": _SPEED,
    "low_cpu_mem_usage": _SPEED,
    "save_safetensors": Key(why="weights are always safetensors"),
    "local_rank": _LAUNCH,
    "ddp": _LAUNCH,
    "ddp_find_unused_parameters": Key(why="gradients are summed once an update, outside of DDP"),
    "resume_from_checkpoint": Key(why="give --resume"),
    "auto_resume_from_checkpoints": Key(why="give --resume"),
    "wandb_watch": Key(why="gradient norms are logged with every row"),
    "wandb_log_model": Key(why="upload the folder: train.push_to_hub"),
    "wandb_run_id": Key(why="a resumed run finds its own"),
    "eval_table_size": Key(why="`hf-gradacc chat` shows answers"),
    "debug": Key(why="`hf-gradacc plan --show-rows N` shows rows and their targets"),
    "dataset_exact_deduplication": Key(why="rows that are there twice stay", changes=True),
    "sequence_parallel_degree": Key(why="rows are not spread over ranks"),
    "context_parallel_size": Key(why="rows are not spread over ranks"),
}
"""Every key that is known, in the order of the documentation's table."""

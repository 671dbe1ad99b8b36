"""The model of a recipe: from the hub, a folder or a config; whole, or through peft.

The transformers config of a recipe's model, and the model's shape without its weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_gradacc.data.section import ModelSection
from hf_gradacc.errors import ConfigError, GradAccError
from hf_gradacc.recipe.folder import notes_files
from hf_gradacc.recipe.keys.sections import HEADS, PeftSection
from hf_gradacc.recipe.model.adapter_layers import check_layer_names
from hf_gradacc.recipe.model.adapter_start import keep_start, needs_weights, plain_when_saved
from hf_gradacc.recipe.model.ends import save_stop_tokens, stop_or_end
from hf_gradacc.recipe.model.sizes import check_sizes
from hf_gradacc.text import SECRET_KEY, nearest
from hf_gradacc.tracking.card import CARD_NAME

__all__ = [
    "apply_peft",
    "check_model",
    "empty_model",
    "given",
    "load_model",
    "model_config",
    "sample_answer",
    "save_model",
]


def load_model(
    section: ModelSection,
    *,
    tokenizer: Any,
    label_names: list[str] | None = None,
    quantize: bool = False,
) -> Any:
    """Load a model, or make one from its config, with embeddings for every token.

    Args:
        section: The recipe's `model`.
        tokenizer: Its tokenizer; the model learns its padding and EOS ids from it.
        label_names: Classification: the classes; an empty list is regression.
        quantize: Load the weights in 4 bits (QLoRA).

    Returns:
        A transformers model with the head that `section.task` names.

    Raises:
        ConfigError: If it cannot be loaded; only safetensors weights are read.
    """
    import torch
    import transformers

    head = getattr(transformers, f"AutoModel{HEADS[section.task]}")
    config = model_config(section, tokenizer=tokenizer, label_names=label_names)
    if section.name is None:
        dtype = "float32" if section.dtype == "auto" else section.dtype
        options = given(attn_implementation=section.attn_implementation)
        try:
            model = head.from_config(config, dtype=dtype, **options)
        except (ValueError, TypeError, ImportError) as error:
            why = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model.config = {section.config!r} does not make a model ({why}): check its "
                "sizes, model.task and model.attn_implementation."
            ) from error
        return _as_trained(model, section)
    options = given(
        revision=section.revision,
        attn_implementation=section.attn_implementation,
        quantization_config=_four_bits() if quantize else None,
    )
    try:
        model = head.from_pretrained(
            section.name,
            config=config,
            dtype=section.dtype,
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"model.name = {section.name!r} cannot be loaded ({why}): check the name and task, "
            "that it has safetensors weights, that you are online or have it cached, and "
            "`hf auth login` for gated models."
        ) from error
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        # New rows start at the mean of the old ones, which keeps the first losses sane.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    return _as_trained(model, section)


def _as_trained(model: Any, section: ModelSection) -> Any:
    if section.unfrozen_parameters:
        from hf_gradacc.recipe.model.trained import freeze_others

        freeze_others(model, section.unfrozen_parameters)
    return model


def check_model(
    section: ModelSection, peft: PeftSection, *, tokenizer: Any, here: bool = True
) -> Any:
    """Build the model and its adapter without weights, to find what does not fit early.

    Args:
        section: The recipe's `model`.
        peft: The recipe's `peft`.
        tokenizer: Its tokenizer.
        here: Whether it will run on this machine.

    Returns:
        The model, without weights.

    Raises:
        ConfigError: If model, head, attention or adapter do not fit.
    """
    model = empty_model(section, tokenizer=tokenizer, here=here)
    check_sizes(model, section, tokenizer=tokenizer)
    return apply_peft(model, peft, task=section.task)


def apply_peft(model: Any, section: PeftSection, *, task: str = "causal_lm") -> Any:
    """Wrap a model so that only a small part of it trains; unchanged for method none.

    Raises:
        ConfigError: If peft refuses the options.
    """
    if section.method == "none":
        return model
    import peft
    import torch

    check_layer_names(model, section)
    section = section.model_copy(deep=True)  # peft adds names of heads to the list it is given
    common: dict[str, Any] = {"task_type": _TASKS[task], **section.options}
    if section.method in ("lora", "dora", "qlora"):
        config_class = peft.LoraConfig
        common = {
            "r": section.r,
            "lora_alpha": section.alpha,
            "lora_dropout": section.dropout,
            "target_modules": section.target_modules or "all-linear",
            "modules_to_save": section.modules_to_save,
            "use_dora": section.method == "dora",
            **common,
        }
        start = common.get("init_lora_weights")
        if start == "loftq":
            common.setdefault("loftq_config", {"loftq_bits": 4, "loftq_iter": 1})
        if needs_weights(start) and model.device.type == "meta":
            common["init_lora_weights"] = True  # only shapes are asked for
            common.pop("loftq_config", None)
    elif section.method == "ia3":
        config_class = peft.IA3Config
        common |= given(
            target_modules=section.target_modules, modules_to_save=section.modules_to_save
        )
    else:
        prefix = section.method == "prefix_tuning"
        config_class = peft.PrefixTuningConfig if prefix else peft.PromptTuningConfig
        common = {"num_virtual_tokens": section.num_virtual_tokens, **common}
    try:
        if section.method == "qlora":
            # Recomputing activations is an option of the training arguments, as everywhere.
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        with warnings.catch_warnings():
            # peft says of an option that has no effect that it "will be ignored".
            warnings.filterwarnings("error", message=".*will be ignored", category=UserWarning)
            config = config_class(**common)
        wrapped = peft.get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, RuntimeError, UserWarning) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"peft.method = {section.method!r} does not fit this model ({why}): set "
            "peft.target_modules to layers it has, or check peft.options."
        ) from error
    if config_class is peft.LoraConfig and model.device.type != "meta":
        keep_start(wrapped)
    return wrapped


_TASKS = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "dpo": "CAUSAL_LM",
    "reward": "SEQ_CLS",
}


@notes_files
def save_model(trainer: Any, *, peft: PeftSection | None = None) -> Path:
    """Save weights (safetensors), tokenizer and stop tokens into the trainer's output folder.

    Call it on every rank: sharded weights have to be gathered from all of them. With
    `merge_on_save` the adapter becomes part of the weights, and the trainer cannot go on training.

    Returns:
        The folder.
    """
    from hf_gradacc.trainer.card import write_trainer_card
    from hf_gradacc.trainer.checkpoints.saving import save_aside

    folder = Path(trainer.args.output_dir)
    if peft is None or not peft.merge_on_save:
        model = trainer.accelerator.unwrap_model(trainer.model)
        with plain_when_saved(model):
            trainer.save_model(_internal_call=True)  # pushed below, once everything is there
        if trainer.is_world_process_zero() and hasattr(model, "peft_config"):
            save_stop_tokens(model, folder)
            if model.active_peft_config.task_type == _TASKS["classification"]:
                model.config.save_pretrained(folder)  # the only place that names the classes
    elif trainer.is_world_process_zero():
        from hf_gradacc.trainer.checkpoints.saved_values import refuse_bad_values
        from hf_gradacc.trainer.optimizer.packages import use_averages

        use_averages(trainer.optimizer)
        refuse_bad_values(trainer, folder, is_checkpoint=False)
        model = trainer.accelerator.unwrap_model(trainer.model)
        with save_aside(trainer, folder) as staged:
            whole = model.merge_and_unload()
            whole.save_pretrained(staged)
            trainer.processing_class.save_pretrained(staged)
    try:
        if trainer.is_world_process_zero():
            write_trainer_card(trainer, folder)
    except OSError as error:  # the model is saved, which is what counts
        print(f"no {CARD_NAME} was written: {error}")
    return folder


def sample_answer(
    model: Any, row: dict[str, Any], *, tokenizer: Any, max_new_tokens: int = 256
) -> tuple[str, str, str]:
    """Let the model answer the prompt of one row, greedily.

    Args:
        model: A causal language model.
        row: `{input_ids, labels}`; the prompt is what comes before the first target.
        tokenizer: Turns tokens back into text.
        max_new_tokens: Longest answer.

    Returns:
        The prompt, the model's answer, and the row's own, as texts.
    """
    import torch

    ids, labels = row["input_ids"], row["labels"]
    start = max(1, next(i for i, label in enumerate(labels) if label != -100))
    prompt = torch.tensor([ids[:start]], device=model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stop_or_end(model, tokenizer),
        )
    model.train(was_training)
    answer = tokenizer.decode(output[0, start:], skip_special_tokens=True)
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return tokenizer.decode(ids[:start], skip_special_tokens=True), answer, expected


def _four_bits() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def model_config(
    section: ModelSection, *, tokenizer: Any, label_names: list[str] | None = None
) -> Any:
    """The transformers config of a recipe's model; loads no weights.

    Raises:
        ConfigError: If the config cannot be found or made.
    """
    from transformers import AutoConfig

    changes: dict[str, Any] = dict(section.overrides)
    name = "model.name" if section.name is not None else "model.config"
    if section.task == "classification" and label_names is not None:
        changes |= _label_config(label_names)
    elif section.task == "reward":
        changes["num_labels"] = 1
    try:
        if section.name is not None:
            plain = AutoConfig.from_pretrained(
                section.name,
                trust_remote_code=section.trust_remote_code,
                **given(revision=section.revision),
            )
            _check_known(plain, section.overrides, key="model.overrides")
            config = AutoConfig.from_pretrained(
                section.name,
                trust_remote_code=section.trust_remote_code,
                **given(revision=section.revision),
                **changes,
            )
        else:
            assert section.config is not None
            sizes = {"vocab_size": len(tokenizer), **section.config, **changes}
            model_type = sizes.pop("model_type")
            _check_known(AutoConfig.for_model(model_type), sizes, key="model.config")
            config = AutoConfig.for_model(model_type, **sizes)
    except ConfigError:
        raise
    except Exception as error:  # each config checks its sizes, or divides by them, in its own way
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        value = section.name if section.name is not None else section.config
        raise ConfigError(
            f"{name} = {value!r} is not a model that transformers knows ({why}): check the name or "
            "the sizes, that you are online or have it cached, and `hf auth login` if it is gated."
        ) from error
    if section.name is None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    config.pad_token_id = tokenizer.pad_token_id
    if section.task == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        # A new T5 knows none, and its labels cannot be shifted; the published ones begin so.
        config.decoder_start_token_id = config.pad_token_id
    return config


def empty_model(
    section: ModelSection,
    *,
    tokenizer: Any,
    label_names: list[str] | None = None,
    here: bool = True,
    device: str = "meta",
) -> Any:
    """The model's shape without its weights: parameters on torch's meta device.

    Args:
        section: The recipe's `model`.
        tokenizer: Its tokenizer; decides the vocabulary of a model from a config.
        label_names: Classification: the classes.
        here: Whether it will run on this machine, which then has to have what its attention needs.
        device: Another device to make it on, with random weights.

    Raises:
        ConfigError: If there is no such model, or this machine cannot run it.
    """
    import torch
    import transformers

    config = model_config(section, tokenizer=tokenizer, label_names=label_names)
    head = getattr(transformers, f"AutoModel{HEADS[section.task]}")
    options = given(
        dtype=config.dtype or torch.float32 if section.dtype == "auto" else section.dtype,
        attn_implementation=section.attn_implementation if here else None,
        trust_remote_code=section.trust_remote_code or None,
    )
    try:
        with torch.device(device), _unsharded():
            model = head.from_config(config, **options)
    except GradAccError:
        raise
    except Exception as error:  # sizes that go nowhere fail in as many ways as there are models
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        name = "name" if section.config is None else "config"
        raise ConfigError(
            f"model.{name} = {getattr(section, name)!r} does not make a model ({why}): check its "
            "sizes, model.task and model.attn_implementation."
        ) from error
    return _as_trained(model, section)


def _check_known(config: Any, changes: dict[str, Any], *, key: str) -> None:
    """Transformers takes any name for a config value, and a misspelt one changes nothing."""
    from transformers import GenerationConfig

    # Values that only generation reads, such as decoder_start_token_id, may stand there as well.
    known = {*config.to_dict(), *config.attribute_map, *GenerationConfig().to_dict()}
    for name, value in changes.items():
        if name not in known and not hasattr(config, name):
            guess = nearest(name, known)
            hint = f"did you mean {guess}?" if guess else "see the model's config class."
            shown = "" if SECRET_KEY.search(name) else f" = {value!r}"
            raise ConfigError(
                f"{key}.{name}{shown} is not a key of a {config.model_type} config: {hint}"
            )


def _label_config(names: list[str]) -> dict[str, Any]:
    if not names:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def given(**options: Any) -> dict[str, Any]:
    """Only the options that were set, so that a library's own defaults stand."""
    return {name: value for name, value in options.items() if value is not None}


@contextlib.contextmanager
def _unsharded() -> Iterator[None]:
    """Keep ZeRO-3 from sharding a model that only one rank makes: it would wait for the others.

    Transformers shards every model it makes while such a configuration exists, so the configuration
    is removed for a moment.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and (config := reference()) is not None:
            deepspeed.set_hf_deepspeed_config(config)

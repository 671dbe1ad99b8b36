"""The transformers config of a recipe's model, and the model's shape without its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe_report import nearest
from hf_gradacc.recipe_sections import HEADS, ModelSection
from hf_gradacc.recipe_source import SECRET_KEY

__all__ = ["empty_model", "given", "model_config"]


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
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        value = section.name if section.name is not None else section.config
        raise ConfigError(
            f"{name} = {value!r} is no model that transformers knows ({why}): check the name or "
            "the sizes, that you are online or have it cached, and `hf auth login` if it is gated."
        ) from error
    if section.name is None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    config.pad_token_id = tokenizer.pad_token_id
    return config


def empty_model(
    section: ModelSection,
    *,
    tokenizer: Any,
    label_names: list[str] | None = None,
    here: bool = True,
) -> Any:
    """The model's shape without its weights: parameters on torch's meta device.

    Args:
        section: The recipe's `model`.
        tokenizer: Its tokenizer; decides the vocabulary of a model from a config.
        label_names: Classification: the classes.
        here: Whether it will run on this machine, which then has to have what its attention needs.

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
        with torch.device("meta"), _unsharded():
            return head.from_config(config, **options)
    except (ValueError, TypeError, ImportError, KeyError) as error:
        why = str(error).strip().splitlines()[0]
        name = "name" if section.config is None else "config"
        raise ConfigError(
            f"model.{name} = {getattr(section, name)!r} makes no model ({why}): check its sizes, "
            "model.task and model.attn_implementation."
        ) from error


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
                f"{key}.{name}{shown} is no value of a {config.model_type} config: {hint}"
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
    """Keep ZeRO-3 from sharding a model that one rank alone looks at: it would wait for the others.

    Transformers makes a model sharded while such a configuration is alive, and gives no other way
    to leave one out than to take it back for a moment.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and (config := reference()) is not None:
            deepspeed.set_hf_deepspeed_config(config)

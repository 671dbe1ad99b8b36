"""Sizes of a recipe's model that cannot be, found without a weight.

A config takes any numbers. Some fail when the layers are made, some in the first forward, some when
a checkpoint of another shape is loaded, and a vocabulary that is too small when its last token is
looked up.
"""

from __future__ import annotations

from typing import Any

from hf_gradacc.data.section import ModelSection
from hf_gradacc.errors import ConfigError

__all__ = ["check_sizes"]


def check_sizes(model: Any, section: ModelSection, *, tokenizer: Any) -> None:
    """Compare the sizes of a model with each other, its tokenizer and its checkpoint.

    Args:
        model: The model on the meta device, with what the recipe changes in its config.
        section: The recipe's `model`.
        tokenizer: Its tokenizer.

    Raises:
        ConfigError: If they do not go together.
    """
    if section.config is not None:
        _check_vocabulary(model, section, tokenizer)
    elif section.overrides:
        _check_shapes(model, section)
    else:
        return
    _run_once(model, section)


def _check_vocabulary(model: Any, section: ModelSection, tokenizer: Any) -> None:
    size = model.get_input_embeddings().num_embeddings
    if size < len(tokenizer):
        part = "overrides" if "vocab_size" in section.overrides else "config"
        raise ConfigError(
            f"model.{part}.vocab_size = {size} is less than the {len(tokenizer)} entries of the "
            "tokenizer: leave it out, and the model gets as many."
        )


def _check_shapes(model: Any, section: ModelSection) -> None:
    """Compare the model with that of the config as it was: its checkpoint has these shapes."""
    import torch
    from transformers import AutoConfig

    options = {"revision": section.revision} if section.revision else {}
    config = AutoConfig.from_pretrained(
        section.name, trust_remote_code=section.trust_remote_code, **options
    )
    if section.task == "classification":
        config.num_labels = model.config.num_labels
    with torch.device("meta"):
        plain = type(model)(config)
    before = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if before.get(name, shape) != shape:
            raise ConfigError(
                f"model.overrides = {section.overrides!r} gives {name} the shape {shape}, and in "
                f"the weights of {section.name} it has {before[name]}: leave the size out, or make "
                "a new model with model.config."
            )


def _run_once(model: Any, section: ModelSection) -> None:
    """Run a row of four tokens without values: layers that do not fit each other say so."""
    import torch

    ids = torch.ones(1, 4, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if section.task == "seq2seq":
        inputs["decoder_input_ids"] = ids
    try:
        with torch.no_grad():
            model(**inputs)
    except NotImplementedError:  # it asks for a value, which there is none of here
        return
    except Exception as error:
        text = " ".join(str(error).split())
        if not _is_about_sizes(text):
            return
        part = "config" if section.config is not None else "overrides"
        raise ConfigError(
            f"model.{part} = {getattr(section, part)!r}: the sizes do not fit each other "
            f"({text[:200]}): check hidden_size, the numbers of heads and head_dim."
        ) from error


def _is_about_sizes(text: str) -> bool:
    return any(word in text for word in ("size", "shape", "dimension", "multipl", "divi"))

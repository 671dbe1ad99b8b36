"""What a trainer knows for the card of its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_gradacc.tracking.card import CardFacts, find_license, write_card
from hf_gradacc.tracking.report.words import describe_settings
from hf_gradacc.tracking.run_facts import describe_run

__all__ = ["describe_for_card", "write_trainer_card"]

_HEADS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
}
_METHODS = {"LORA": "LoRA", "IA3": "IA3", "PROMPT_TUNING": "prompt tuning",
            "PREFIX_TUNING": "prefix tuning"}  # fmt: skip


def write_trainer_card(trainer: Any, folder: str | Path, **given: Any) -> Path | None:
    """Write the card of a trainer's model, with what its callbacks add.

    A callback that has a method ``describe_for_card(facts)`` changes the facts in place, as that of
    a recipe does.

    Args:
        trainer: The trainer, after training.
        folder: Where the model lies.
        given: As for the stock ``create_model_card``; what is given wins.

    Returns:
        The card; None if somebody's own is there.
    """
    facts = describe_for_card(trainer)
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "describe_for_card"):
            callback.describe_for_card(facts)
    for name, value in given.items():
        if value is not None:
            _take(facts, name, value)
    if facts.license is None:
        facts.license = find_license(facts.base if facts.base_is_public else None)
    return write_card(Path(folder), facts, trainer.state.log_history)


def describe_for_card(trainer: Any) -> CardFacts:
    """Gather what a trainer knows of its model: base, method, settings, how to load it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    args = trainer.args
    settings = describe_run(args, state=trainer.state, model=model)
    settings["training_arguments"] = {
        name: _plain(getattr(args, name, None))
        for name in ("optim", "learning_rate", "lr_scheduler_type", "weight_decay",
                     "max_grad_norm", "seed")
    }  # fmt: skip
    config = getattr(model, "config", None)
    base = getattr(config, "_name_or_path", None) or None
    is_folder = base is not None and Path(base).exists()
    facts = CardFacts(
        name=Path(args.output_dir).absolute().name,
        base=Path(base).absolute().name if base and is_folder else base,
        base_is_public=base is not None and not is_folder,
        license=find_license(base) if is_folder else None,
    )
    settings["model"]["name_or_path"] = facts.base or facts.name
    facts.training = list(describe_settings(settings))
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    kind = next((head for head in _HEADS if type(inner).__name__.endswith(head)), None)
    facts.task = None if kind is None else _HEADS[kind]
    if hasattr(model, "peft_config"):
        adapter = model.active_peft_config
        name = getattr(adapter.peft_type, "value", str(adapter.peft_type))
        method = "DoRA" if getattr(adapter, "use_dora", False) else _METHODS.get(name, name)
        rank = getattr(adapter, "r", None)
        facts.method = f"{method} with r = {rank}" if isinstance(rank, int) else method
        facts.library, facts.tags = "peft", [method.lower().replace(" ", "-")]
    facts.load = _how_to_load(facts, type(inner).__name__)
    return facts


def _how_to_load(facts: CardFacts, kind: str) -> str:
    heads = ("ForCausalLM", "ForSeq2SeqLM", "ForSequenceClassification")
    ends = next((head for head in heads if kind.endswith(head)), "")
    if kind.endswith("ForConditionalGeneration"):
        ends = "ForSeq2SeqLM"
    start = "AutoPeftModel" if facts.library == "peft" else "AutoModel"
    return (
        f"from {facts.library} import {start}{ends}\n\n"
        f'model = {start}{ends}.from_pretrained("{facts.name}")  # or the name of its repository'
    )


def _take(facts: CardFacts, name: str, value: Any) -> None:
    """Take an argument of the stock ``create_model_card``."""
    listed = [value] if isinstance(value, str) else list(value)
    if name == "model_name":
        facts.load = facts.load.replace(f'"{facts.name}"', f'"{value}"')
        facts.name = value
    elif name == "finetuned_from":
        facts.base, facts.base_is_public = value, True
    elif name == "license":
        facts.license = value
    elif name == "language":
        facts.language = listed
    elif name == "tags":
        facts.tags = _joined(facts.tags, listed)
    elif name == "tasks":
        facts.task = listed[0]
    elif name == "dataset_tags":
        facts.datasets = _joined(facts.datasets, listed)
    elif name == "dataset":
        facts.data = _joined(facts.data, listed)
    elif name == "dataset_args":
        facts.data = _joined(facts.data, [f"configuration {text}" for text in listed])


def _joined(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))


def _plain(value: Any) -> Any:
    return getattr(value, "value", value) if not isinstance(value, Mapping) else dict(value)

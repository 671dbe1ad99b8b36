"""What a recipe adds to the card of its model: data, formats, base, the recipe itself."""

from __future__ import annotations

from pathlib import Path

from hf_gradacc.data.encode import source_format
from hf_gradacc.data.section import SourceSection
from hf_gradacc.recipe.folder import RECIPE_NAME
from hf_gradacc.recipe.keys.sections import HEADS, Recipe
from hf_gradacc.tracking.card import CardFacts, find_license

__all__ = ["add_recipe_facts", "data_lines"]


def add_recipe_facts(facts: CardFacts, recipe: Recipe) -> None:
    """Change the facts of a card by what a recipe says.

    Args:
        facts: Those of the trainer.
        recipe: Its recipe.
    """
    name = recipe.model.name
    is_folder = name is not None and Path(name).is_dir()
    facts.base = Path(name).name if name is not None and is_folder else name
    facts.base_is_public = name is not None and not is_folder
    if name is not None and is_folder:
        facts.license = find_license(name)
    facts.datasets = [source.path for source in recipe.data.train if not _is_local(source.path)]
    facts.data = data_lines(recipe)
    facts.recipe = RECIPE_NAME
    if recipe.peft.saves_whole_model:
        facts.library = "transformers"
        ends = HEADS[recipe.model.task]
        facts.load = (
            f"from transformers import AutoModel{ends}\n\n"
            f'model = AutoModel{ends}.from_pretrained("{facts.name}")'
            "  # or the name of its repository"
        )
    elif recipe.adapter_to_nothing:
        facts.load = f"# {recipe.adapter_to_nothing}"
    if recipe.peft.method == "qlora":
        facts.method = f"{facts.method}, on the base in 4 bits"
    if recipe.model.task == "dpo":
        losses = " and ".join(recipe.dpo.loss_type)
        facts.method = f"{facts.method}, by DPO ({losses}) with beta = {recipe.dpo.beta:g}"
    elif recipe.model.task == "reward":
        facts.method = f"{facts.method}, to score answers"
    if recipe.peft.merge_on_save:
        facts.method = f"{facts.method}, merged into the base"


def data_lines(recipe: Recipe) -> list[str]:
    """Name each source without where it lies on this machine, and how its rows were read."""
    lines = []
    for what, sources in (("trained on", recipe.data.train), ("held out", recipe.data.eval)):
        for source in sources:
            format = source_format(recipe.data, source)
            lines.append(f"{what}: {_name_of(source)}, read as `{format}`")
    if recipe.data.holdout is not None:
        share = recipe.data.holdout
        amount = f"{share:.4g} of the rows" if isinstance(share, float) else f"{share:,} rows"
        lines.append(f"held out: {amount}")
    if recipe.data.max_length is not None:
        lines.append(f"at most {recipe.data.max_length:,} tokens a row ({recipe.data.too_long})")
    return lines


def _name_of(source: SourceSection) -> str:
    if _is_local(source.path):
        return f"`{Path(source.path).name}`, a local file"
    revision = f" at {source.revision}" if source.revision else ""
    link = f"[{source.path}](https://huggingface.co/datasets/{source.path})"
    return f"{link}{f' ({source.name})' if source.name else ''}{revision}, `{source.split}`"


def _is_local(path: str) -> bool:
    return Path(path).is_absolute() or Path(path).exists() or any(c in path for c in "*~\\")

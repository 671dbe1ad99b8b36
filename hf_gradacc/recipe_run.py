"""Run a recipe from its first line to the saved model.

The scripts in `recipes/` spell these steps out for people who want to own them; this is the same
for `hf-gradacc train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_gradacc.data import PreparedData, iter_texts, load_tokenizer, make_collator, prepare_data
from hf_gradacc.errors import ConfigError
from hf_gradacc.modeling import apply_peft, check_model, load_model, save_model
from hf_gradacc.recipe import configure_wandb, recipe_arguments
from hf_gradacc.recipe_save import RecipeCallback
from hf_gradacc.recipe_sections import Recipe

__all__ = ["RunResult", "build_trainer", "train_recipe"]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        trainer: The trainer, after training.
        data: The rows it trained on.
        metrics: Held-out metrics; empty without held-out rows.
        folder: Where model, tokenizer and recipe lie.
    """

    trainer: Any
    data: PreparedData
    metrics: dict[str, float]
    folder: Path


def build_trainer(recipe: Recipe, **changes: Any) -> tuple[Any, PreparedData]:
    """Everything up to, but not including, the first update.

    Args:
        recipe: A checked recipe.
        changes: Training arguments to set on top of it.

    Returns:
        The `GradAccTrainer`, and the rows it will train on.

    Raises:
        ConfigError, DataError: If model, tokenizer, options or data do not work.
    """
    from transformers import set_seed

    from hf_gradacc import GradAccTrainer

    configure_wandb(recipe)
    arguments = recipe_arguments(recipe, **changes)
    set_seed(arguments.seed)  # before the model: a new head or adapter starts at random
    with arguments.main_process_first(desc="preparing the data"):
        texts = iter_texts(recipe.data)
        tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=texts)
        check_model(recipe.model, recipe.peft, tokenizer=tokenizer)  # before what takes long
        data = prepare_data(recipe.data, tokenizer=tokenizer)
    if arguments.process_index == 0:
        for report in data.reports:
            print(report)
    model = load_model(
        recipe.model,
        tokenizer=tokenizer,
        label_names=data.label_names,
        quantize=recipe.peft.method == "qlora",
    )
    model = apply_peft(model, recipe.peft, task=recipe.model.task)
    trainer = GradAccTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=make_collator(recipe.model.task, tokenizer=tokenizer, model=model),
        processing_class=tokenizer,
        callbacks=[RecipeCallback(recipe)],
    )
    if recipe.peft.merge_on_save and trainer.shards_weights:
        raise ConfigError(
            "peft.merge_on_save = true under FSDP or ZeRO-3: merging happens on one rank, which "
            "holds a part of the weights.\n  Leave it out, and merge the saved adapter with peft: "
            "PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    return trainer, data


def train_recipe(recipe: Recipe, *, resume: bool | str = False, **changes: Any) -> RunResult:
    """Train as a recipe says, evaluate on held-out rows, save model, tokenizer and recipe.

    Args:
        recipe: A checked recipe.
        resume: Go on from the last checkpoint in the output folder, or from the one named.
        changes: Training arguments to set on top of the recipe.

    Raises:
        ConfigError, DataError: As `build_trainer`.
    """
    trainer, data = build_trainer(recipe, **changes)
    trainer.train(resume_from_checkpoint=resume or trainer.args.resume_from_checkpoint)
    metrics = trainer.evaluate() if data.eval is not None else {}
    folder = save_model(trainer, peft=recipe.peft)
    return RunResult(trainer, data, metrics, folder)

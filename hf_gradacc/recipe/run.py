"""Run a recipe from its first line to the saved model.

The scripts in `recipes/` spell these steps out for people who want to own them; this is the same
for `hf-gradacc train`.

A recipe as it was run, beside the model it made; and the JSON schema editors check by.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from hf_gradacc.data import PreparedData, iter_texts, load_tokenizer, make_collator, prepare_data
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.ends import add_stop_tokens
from hf_gradacc.recipe.folder import RECIPE_HEADER, RECIPE_NAME, claim_folder, clear_folder
from hf_gradacc.recipe.hub import telling_of_hub
from hf_gradacc.recipe.interpolation import escape
from hf_gradacc.recipe.load import configure_wandb, recipe_arguments
from hf_gradacc.recipe.model import apply_peft, check_model, load_model, save_model
from hf_gradacc.recipe.positions import check_longest_row, check_max_length
from hf_gradacc.recipe.problems import Key
from hf_gradacc.recipe.sections import Recipe
from hf_gradacc.recipe.trained import check_trained
from hf_gradacc.safety.run_state import keep
from hf_gradacc.text import SECRET_KEY, printable

__all__ = [
    "RecipeCallback",
    "RunResult",
    "build_trainer",
    "resolved_recipe",
    "save_recipe",
    "train_recipe",
]


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


@telling_of_hub
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

    from hf_gradacc.trainer.mixin import GradAccTrainer

    configure_wandb(recipe)
    arguments = recipe_arguments(recipe, **changes)
    set_seed(arguments.seed)  # before the model: a new head or adapter starts at random
    with arguments.main_process_first(desc="preparing the data"):
        texts = iter_texts(recipe.data)
        tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=texts)
        empty = check_model(recipe.model, recipe.peft, tokenizer=tokenizer)  # before what is slow
        check_trained(recipe, empty, arguments)
        check_max_length(recipe, empty)
        vocab_size = empty.get_input_embeddings().num_embeddings
        data = prepare_data(recipe.data, tokenizer=tokenizer, vocab_size=vocab_size)
    too_long = check_longest_row(recipe, empty, data)
    if arguments.process_index == 0:
        for line in [*data.reports, *data.remarks, *filter(None, [too_long])]:
            print(printable(str(line)))
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
        ConfigError, DataError: As `build_trainer`, and if the output folder holds another run.
    """
    claim_folder(recipe, resume=resume)
    trainer, data = build_trainer(recipe, **changes)
    trainer.train(resume_from_checkpoint=resume or trainer.args.resume_from_checkpoint)
    metrics: dict[str, float] = {}
    if data.eval is not None:
        metrics = _metrics_of_last_update(trainer) or trainer.evaluate()
    folder = save_model(trainer, peft=recipe.peft)
    return RunResult(trainer, data, metrics, folder)


def _metrics_of_last_update(trainer: Any) -> dict[str, float]:
    """Return the evaluation of the model as it is now, if training has just run it; else {}."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_global_step != state.global_step:
        return {}  # another model has been loaded since
    for row in reversed(state.log_history):
        if "eval_loss" in row and row["step"] == state.global_step:
            return {key: value for key, value in row.items() if key != "step"}
    return {}


def resolved_recipe(recipe: Recipe, *, escaped: bool = False) -> dict[str, Any]:
    """Every key with its value, paths absolute and interpolations filled in; without secrets.

    What came from the environment is written as the variable's name, not as its value.

    Args:
        recipe: A checked recipe.
        escaped: Write texts so that a recipe that holds them reads the same again.
    """
    values: dict[str, Any] = _written(recipe.model_dump(), (), recipe, escaped=escaped)
    values["output"].pop("overwrite", None)  # who runs it again is asked again
    return values


def save_recipe(recipe: Recipe, folder: str | Path) -> Path:
    """Write the resolved recipe. Running it again repeats the run.

    Args:
        recipe: The recipe that was run.
        folder: Where the model is saved; made if need be.

    Returns:
        The file written.
    """
    path = Path(folder) / RECIPE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "peft")
    )
    header = f"{RECIPE_HEADER} Made with {versions}.\n"
    values = resolved_recipe(recipe, escaped=True)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path.write_text(header + text, encoding="utf-8")
    return path


class RecipeCallback(TrainerCallback):
    """Saves the recipe when training begins, and files it with the W&B run.

    It also lets the model stop at the tokens that end the recipe's answers.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._stops: str | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check lengths, and add stop tokens before the stock Trainer adds the tokenizer's EOS.

        Raises:
            ConfigError: If rows may be longer than the model; scripts have not asked before.
        """
        model, tokenizer = kwargs.get("model"), kwargs.get("processing_class")
        if model is not None:
            check_max_length(self.recipe, model)
        if model is not None and tokenizer is not None:
            self._stops = add_stop_tokens(
                model, self.recipe, tokenizer=tokenizer, folder=args.output_dir
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it on the first rank only, into a folder that is this run's."""
        if not state.is_world_process_zero:
            return
        if self.recipe.output.overwrite and state.global_step == 0:
            clear_folder(args.output_dir)
        if self._stops is not None:
            print(printable(self._stops))
        keep(state, saves_model=True)  # whoever runs a recipe saves the model at its end
        save_recipe(self.recipe, args.output_dir)
        if "wandb" in (args.report_to or []):
            import wandb

            if wandb.run is not None:
                config = {"recipe": resolved_recipe(self.recipe)}
                wandb.run.config.update(config, allow_val_change=True)


def _written(value: Any, key: Key, recipe: Recipe, *, escaped: bool) -> Any:
    held = recipe.from_environment.get(key)
    if held is not None and not isinstance(value, dict | list):
        return held.by_name(value, escaped=escaped)
    if isinstance(value, dict):
        return {
            name: _written(inner, (*key, name), recipe, escaped=escaped)
            for name, inner in value.items()
            if not SECRET_KEY.search(str(name))
        }
    if isinstance(value, list):
        return [_written(part, (*key, i), recipe, escaped=escaped) for i, part in enumerate(value)]
    return escape(value) if escaped and isinstance(value, str) else value

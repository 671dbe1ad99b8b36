"""Run a recipe from its first line to the saved model.

The scripts in `recipes/` spell these steps out for people who want to own them; this is the same
for `hf-gradacc train`.

A recipe as it was run, beside the model it made; and the JSON schema editors check by.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from hf_gradacc.data import PreparedData, iter_texts, load_tokenizer, make_collator, prepare_data
from hf_gradacc.data.section import PAIR_TASKS
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.card import add_recipe_facts
from hf_gradacc.recipe.file.interpolation import escape
from hf_gradacc.recipe.file.problems import Key
from hf_gradacc.recipe.folder import RECIPE_HEADER, RECIPE_NAME, claim_folder, clear_folder
from hf_gradacc.recipe.hub import telling_of_hub
from hf_gradacc.recipe.keys.sections import Recipe
from hf_gradacc.recipe.load import recipe_arguments
from hf_gradacc.recipe.model.ends import add_stop_tokens
from hf_gradacc.recipe.model.load import apply_peft, check_model, load_model, save_model
from hf_gradacc.recipe.model.positions import check_longest_row, check_max_length
from hf_gradacc.recipe.model.trained import check_trained
from hf_gradacc.recipe.pushing import make_repository, push_trained
from hf_gradacc.recipe.quality.quality import add_metrics
from hf_gradacc.recipe.quality.samples import add_samples
from hf_gradacc.recipe.wandb import configure_wandb, tracking_remarks
from hf_gradacc.safety.run_state import keep
from hf_gradacc.safety.waiting import telling
from hf_gradacc.text import SECRET_KEY, printable
from hf_gradacc.tracking.card import CardFacts
from hf_gradacc.tracking.install import listen_to_rows

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
        The `GradAccTrainer`, or one of TRL's with `GradAccMixin`, and the rows it will train on.

    Raises:
        ConfigError, DataError: If model, tokenizer, options or data do not work.
    """
    from transformers import set_seed

    from hf_gradacc.trainer.mixin import GradAccTrainer

    configure_wandb(recipe)
    arguments = recipe_arguments(recipe, **changes)
    if arguments.push_to_hub and arguments.process_index == 0:
        name = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
        make_repository(name, private=arguments.hub_private_repo, token=arguments.hub_token)
    set_seed(arguments.seed)  # before the model: a new head or adapter starts at random
    is_first = arguments.process_index == 0
    with (
        arguments.main_process_first(desc="preparing the data"),
        telling("preparing the data", beside_bars=True) if is_first else contextlib.nullcontext(),
    ):
        texts = iter_texts(recipe.data)
        tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=texts)
        empty = check_model(recipe.model, recipe.peft, tokenizer=tokenizer)  # before what is slow
        check_trained(recipe, empty, arguments)
        check_max_length(recipe, empty)
        vocab_size = empty.get_input_embeddings().num_embeddings
        data = prepare_data(
            recipe.data, tokenizer=tokenizer, vocab_size=vocab_size, task=recipe.model.task
        )
    too_long = check_longest_row(recipe, empty, data)
    if is_first:
        remarks = filter(None, [too_long, recipe.adapter_to_nothing])
        for line in [*data.reports, *data.remarks, *remarks]:
            print(printable(str(line)))
    with telling("loading the model", beside_bars=True) if is_first else contextlib.nullcontext():
        model = load_model(
            recipe.model,
            tokenizer=tokenizer,
            label_names=data.label_names,
            quantize=recipe.peft.method == "qlora",
        )
    model = apply_peft(model, recipe.peft, task=recipe.model.task)
    parts: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": data.train,
        "eval_dataset": data.eval,
        "processing_class": tokenizer,
        "callbacks": [RecipeCallback(recipe)],
    }
    trainer: Any
    if recipe.model.task in PAIR_TASKS:
        from hf_gradacc.recipe.pair_trainers import make_pair_trainer

        trainer = make_pair_trainer(recipe, **parts)
    else:
        collator = make_collator(recipe.model.task, tokenizer=tokenizer, model=model)
        trainer = GradAccTrainer(data_collator=collator, **parts)
    add_metrics(trainer, recipe, data)
    add_samples(trainer, recipe)
    if recipe.peft.merge_on_save and trainer.shards_weights:
        raise ConfigError(
            "peft.merge_on_save = true under FSDP or ZeRO-3: merging happens on one rank, which "
            "holds a part of the weights.\n  Leave it out, and merge the saved adapter with peft: "
            "PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    return trainer, data


def train_recipe(
    recipe: Recipe,
    *,
    resume: bool | str = False,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> RunResult:
    """Train as a recipe says, evaluate on held-out rows, save model, tokenizer and recipe.

    Args:
        recipe: A checked recipe.
        resume: Go on from the last checkpoint in the output folder, or from the one named.
        on_row: Called on rank 0 with each row of the run's log, as JSON takes it.
        changes: Training arguments to set on top of the recipe.

    Raises:
        ConfigError, DataError: As `build_trainer`, and if the output folder holds another run.
    """
    claim_folder(recipe, resume=resume)
    trainer, data = build_trainer(recipe, **changes)
    if on_row is not None:
        listen_to_rows(trainer, on_row)
    trainer.train(resume_from_checkpoint=resume or trainer.args.resume_from_checkpoint)
    metrics: dict[str, float] = {}
    if data.eval is not None:
        metrics = _metrics_of_last_update(trainer) or trainer.evaluate()
    folder = save_model(trainer, peft=recipe.peft)
    if trainer.args.push_to_hub:
        push_trained(trainer, folder)
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
    for section in PAIR_TASKS:
        if section != recipe.model.task:  # it would say nothing, and a recipe is refused for that
            values.pop(section)
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

    def describe_for_card(self, facts: CardFacts) -> None:
        """Add what the recipe says to the card of the model."""
        add_recipe_facts(facts, self.recipe)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it on the first rank only, into a folder that is this run's."""
        if not state.is_world_process_zero:
            return
        if self.recipe.output.overwrite and state.global_step == 0:
            clear_folder(args.output_dir)
        for line in [*filter(None, [self._stops]), *tracking_remarks(self.recipe, args)]:
            print(printable(line))
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

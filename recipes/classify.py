"""Fine-tune a classifier, such as ModernBERT, as a recipe says. Copy it, make it yours.

python recipes/classify.py recipes/classify/modernbert_base_ag_news.yaml
"""

from __future__ import annotations

import sys

import numpy as np
from transformers import DataCollatorWithPadding, EvalPrediction, set_seed

from hf_gradacc import GradAccError, GradAccTrainer
from hf_gradacc.data import iter_texts, load_tokenizer, prepare_data
from hf_gradacc.recipe import (
    RecipeCallback,
    add_metrics,
    apply_peft,
    claim_folder,
    configure_wandb,
    load_model,
    load_recipe,
    recipe_arguments,
    save_model,
)


def main(path: str, overrides: list[str]) -> None:
    """Run the recipe at `path`."""
    recipe = load_recipe(path, overrides=overrides)
    claim_folder(recipe)  # refuses one that holds another run
    configure_wandb(recipe)
    arguments = recipe_arguments(recipe)
    set_seed(arguments.seed)  # before the model: its new head starts at random

    with arguments.main_process_first():  # one rank prepares the data, the others find it cached
        texts = iter_texts(recipe.data)
        tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=texts)
        data = prepare_data(recipe.data, tokenizer=tokenizer)
    if arguments.process_index == 0:
        print(*data.reports, *data.remarks, sep="\n")

    model = load_model(recipe.model, tokenizer=tokenizer, label_names=data.label_names)
    model = apply_peft(model, recipe.peft, task="classification")

    trainer = GradAccTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy if data.label_names else None,
        callbacks=[RecipeCallback(recipe)],
    )
    add_metrics(trainer, recipe, data)  # what `evaluation` asks for
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if data.eval is not None:
        metrics = trainer.evaluate()
        print(", ".join(f"{name} {metrics[name]:.4f}" for name in metrics if "_per_" not in name))
    save_model(trainer, peft=recipe.peft)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows whose likeliest class is theirs."""
    likeliest = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": float(np.mean(likeliest == prediction.label_ids))}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2:])
    except GradAccError as error:
        sys.exit(f"error: {error}")

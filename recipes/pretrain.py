"""Pretrain, or go on pretraining, a causal language model on plain text. Copy it, make it yours.

python recipes/pretrain.py recipes/pretrain/smollm2_135m_wikitext.yaml
torchrun --nproc-per-node 8 recipes/pretrain.py recipes/pretrain/smollm2_135m_wikitext.yaml
"""

from __future__ import annotations

import math
import sys

from transformers import DataCollatorForSeq2Seq, set_seed

from hf_gradacc import GradAccError, GradAccTrainer
from hf_gradacc.data import iter_texts, load_tokenizer, prepare_data
from hf_gradacc.recipe import (
    RecipeCallback,
    add_samples,
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
    set_seed(arguments.seed)

    with arguments.main_process_first():  # one rank prepares the data, the others find it cached
        texts = iter_texts(recipe.data)
        tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=texts)
        data = prepare_data(recipe.data, tokenizer=tokenizer)  # blocks of data.max_length tokens
    if arguments.process_index == 0:
        print(*data.reports, *data.remarks, sep="\n")

    trainer = GradAccTrainer(
        model=load_model(recipe.model, tokenizer=tokenizer),
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[RecipeCallback(recipe)],
    )
    add_samples(trainer, recipe)  # answers while it trains, if the recipe asks for them
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if data.eval is not None:
        loss = trainer.evaluate()["eval_loss"]
        print(f"held-out loss {loss:.3f}, perplexity {math.exp(loss):.1f}")
    save_model(trainer)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2:])
    except GradAccError as error:
        sys.exit(f"error: {error}")

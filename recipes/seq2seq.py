"""Fine-tune an encoder-decoder, such as FLAN-T5, as a recipe says. Copy it, make it yours.

python recipes/seq2seq.py recipes/seq2seq/flan_t5_base_cnn.yaml
"""

from __future__ import annotations

import sys

import torch
from transformers import DataCollatorForSeq2Seq, set_seed

from hf_gradacc import GradAccError, GradAccTrainer
from hf_gradacc.data import iter_texts, load_tokenizer, prepare_data
from hf_gradacc.recipe import (
    RecipeCallback,
    add_metrics,
    add_samples,
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
    set_seed(arguments.seed)  # before the model: a new adapter starts at random

    with arguments.main_process_first():  # one rank prepares the data, the others find it cached
        texts = iter_texts(recipe.data)
        tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=texts)
        data = prepare_data(recipe.data, tokenizer=tokenizer)
    if arguments.process_index == 0:
        print(*data.reports, *data.remarks, sep="\n")

    model = load_model(recipe.model, tokenizer=tokenizer)
    model = apply_peft(model, recipe.peft, task="seq2seq")

    trainer = GradAccTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        # With the model at hand it also makes the decoder's input, the labels moved by one.
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        callbacks=[RecipeCallback(recipe)],
    )
    add_samples(trainer, recipe)  # answers while it trains, if the recipe asks for them
    add_metrics(trainer, recipe, data)  # what `evaluation` asks for
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if data.eval is not None:
        print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f}")
    if arguments.process_index == 0:
        show_sample(trainer.model, (data.eval or data.train)[0], tokenizer=tokenizer)
    save_model(trainer, peft=recipe.peft)


def show_sample(model: torch.nn.Module, row: dict[str, list[int]], *, tokenizer: object) -> None:
    """Print what the model writes for one source, beside the row's own target."""
    source = torch.tensor([row["input_ids"]], device=model.device)
    written = model.eval().generate(input_ids=source, max_new_tokens=len(row["labels"]) + 16)[0]
    print(f"--- the model ---\n{tokenizer.decode(written, skip_special_tokens=True)}")
    print(f"--- the row ---\n{tokenizer.decode(row['labels'], skip_special_tokens=True)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2:])
    except GradAccError as error:
        sys.exit(f"error: {error}")

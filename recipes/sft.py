"""Fine-tune a causal language model as a recipe says. Copy this file and make it yours.

python recipes/sft.py recipes/quickstart.yaml
python recipes/sft.py recipes/quickstart.yaml peft=lora train.max_steps=50
torchrun --nproc-per-node 8 recipes/sft.py recipes/qwen3/4b_full_chat_ddp.yaml
"""

from __future__ import annotations

import sys

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
    sample_answer,
    save_model,
)


def main(path: str, overrides: list[str]) -> None:
    """Run the recipe at `path`."""
    recipe = load_recipe(path, overrides=overrides)
    claim_folder(recipe)  # refuses one that holds another run
    configure_wandb(recipe)
    arguments = recipe_arguments(recipe)
    set_seed(arguments.seed)  # before the model: a new head or adapter starts at random

    with arguments.main_process_first():  # one rank prepares the data, the others find it cached
        texts = iter_texts(recipe.data)
        tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=texts)
        data = prepare_data(recipe.data, tokenizer=tokenizer)
    if arguments.process_index == 0:
        print(*data.reports, *data.remarks, sep="\n")

    model = load_model(recipe.model, tokenizer=tokenizer, quantize=recipe.peft.method == "qlora")
    model = apply_peft(model, recipe.peft)

    trainer = GradAccTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[RecipeCallback(recipe)],
    )
    add_samples(trainer, recipe)  # answers while it trains, if the recipe asks for them
    add_metrics(trainer, recipe, data)  # what `evaluation` asks for
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    if data.eval is not None:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            print(f"held-out loss {metrics['eval_loss']:.3f}")
    if arguments.world_size == 1:  # sharded weights would have to be gathered to generate
        row = (data.eval or data.train)[0]
        asked, answer, expected = sample_answer(model, row, tokenizer=tokenizer)
        print(
            f"\n--- prompt ---\n{asked}\n--- the model ---\n{answer}\n--- the row ---\n{expected}"
        )
    save_model(trainer, peft=recipe.peft)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2:])
    except GradAccError as error:
        sys.exit(f"error: {error}")

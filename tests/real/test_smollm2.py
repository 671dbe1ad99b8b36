"""A real model learns word problems by a recipe: SmolLM2-135M-Instruct, with LoRA, on two cores."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from support.word_problems import WORD_PROBLEMS

from hf_gradacc.recipe import build_trainer, load_recipe, save_model

pytestmark = pytest.mark.slow

# Two micro-batches or three in each update of four rows, of unequal numbers of targets.
RECIPE = """\
model: {name: FOLDER}
data: {train: rows.jsonl, format: question_answer}
peft: {method: lora, r: 8, alpha: 16}
train:
  max_steps: 5
  effective_batch_size: 4
  max_tokens_per_micro_batch: 320
  learning_rate: 1e-3
  lr_scheduler_type: constant
  train_sampling_strategy: sequential
  logging_steps: 1
  use_cpu: true
  disable_tqdm: true
  report_to: none
  save_strategy: no
"""
# SmolLM2's own template, with the answers marked for TRL, which does not look for them.
TAGGED = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory):
    """Train eight updates by a recipe; the trainer, the adapter it began with, and its folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    rows = [{"question": question, "answer": answer} for question, answer in WORD_PROBLEMS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(RECIPE.replace("FOLDER", str(smollm2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        recipe = load_recipe(folder / "r.yaml", overrides=[f"output.dir={folder / 'out'}"])
        trainer, _ = build_trainer(recipe)
        first = {
            name: weight.clone()
            for name, weight in trainer.model.state_dict().items()
            if "lora" in name
        }
        trainer.train()
        return trainer, first, save_model(trainer, peft=recipe.peft)


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_the_loss_starts_where_an_instructed_model_is_and_falls(trained):
    losses = losses_of(trained[0])
    assert len(losses) == 5
    assert 1.4 < losses[0] < 2.3  # these answers are terser than a model's own
    # The fifth update sees the rows of the first again.
    assert losses[4] < 0.7 * losses[0]


def test_the_loss_on_gsm8k_is_that_of_its_answers_behind_their_prompts(smollm2, tmp_path):
    gsm8k = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
    if not gsm8k.is_file():
        pytest.skip(f"GSM8K is not at {gsm8k}")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("FOLDER", str(smollm2)))
    overrides = [f"output.dir={tmp_path}", f"data.train={{path: {gsm8k}, split: 'train[:4]'}}"]
    trainer, data = build_trainer(load_recipe(tmp_path / "r.yaml", overrides=overrides))
    found = trainer.evaluate(data.train)["eval_loss"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    losses = []
    for row in map(json.loads, gsm8k.read_text().splitlines()[:4]):
        chat = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt)["input_ids"]
        answer = tokenizer(row["answer"] + "<|im_end|>")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
        targets = torch.tensor(answer)
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert found == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert 1.0 < found < 2.0


def test_the_first_losses_are_those_of_trl(trained, smollm2, tmp_path):
    import peft
    import trl
    from datasets import Dataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in WORD_PROBLEMS
    ]
    own = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in turns]
    tokenizer.chat_template = TAGGED
    assert [tokenizer.apply_chat_template(chat, tokenize=False) for chat in turns] == own
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    adapter = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, adapter)
    assert not model.load_state_dict(trained[1], strict=False).unexpected_keys
    stock = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,  # the second follows from the first one's gradient
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            assistant_only_loss=True,
            max_length=None,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in turns]),
        processing_class=tokenizer,
    )
    stock.train()
    assert losses_of(trained[0])[:2] == pytest.approx(losses_of(stock), abs=1e-4)


def test_the_saved_adapter_answers_in_its_template_and_stops(trained):
    import peft

    folder = trained[2]
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "A box holds 6 pens. How many do 4 boxes hold?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=100, do_sample=False)
    answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])
    assert answer.endswith("<|im_end|>")
    assert answer.count("<|im_end|>") == 1
    assert "\n#### " in answer  # as the rows end, and SmolLM2 by itself does not

"""Recipes that learn from pairs: the reference, the cut, the resume, the plan, and bad recipes."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

from hf_gradacc.after.chat import chat_with
from hf_gradacc.data import iter_texts, load_tokenizer, prepare_data
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.load import load_recipe, recipe_arguments
from hf_gradacc.recipe.plan.measure import measure_updates
from hf_gradacc.recipe.plan.memory import estimate_memory
from hf_gradacc.recipe.plan.updates import plan_recipe
from hf_gradacc.recipe.run import build_trainer, train_recipe
from hf_gradacc.recipe.verifying import verify_recipe
from hf_gradacc.tracking.run_files import read_run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:trl.*")

RECIPE = """\
model:
  task: dpo
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 1}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: preference, holdout: 8}
train: {max_steps: 4, effective_batch_size: 6, max_tokens_per_micro_batch: 128, use_cpu: true,
        disable_tqdm: true, report_to: none, logging_steps: 1, learning_rate: 1e-2,
        save_strategy: steps, save_steps: 2, eval_strategy: steps, eval_steps: 2}
"""
OF_EACH = [("dpo", "none"), ("dpo", "lora"), ("reward", "none"), ("reward", "lora")]


def write_rows(folder, count=24):
    def turns(i, answer):
        return [
            {"role": "user", "content": f"How many plums? {i}"},
            {"role": "assistant", "content": answer},
        ]

    rows = [
        {
            "prompt": f"How many plums? {i}",
            "chosen": turns(i, "Seven. " * (1 + i % 4)),
            "rejected": turns(i, "No. " * (1 + i % 3)),
        }
        for i in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(RECIPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_rows(folder)
    return folder


def read(folder, *overrides):
    return load_recipe(folder / "mine.yaml", overrides=overrides)


def weights(folder):
    return load_file(next(folder.glob("*model.safetensors")))


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Each task, whole and with LoRA, trained once."""
    done = {}
    cache = pytest.MonkeyPatch()
    cache.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    for task, method in OF_EACH:
        out = f"output.dir={folder / f'{task}-{method}'}"
        samples = ["samples={every: 2, count: 2, max_new_tokens: 3}"] if task == "dpo" else []
        recipe = read(folder, f"model.task={task}", f"peft={method}", out, *samples)
        done[task, method] = train_recipe(recipe)
    yield done
    cache.undo()


def rows_with(result, key):
    return [row for row in result.trainer.state.log_history if key in row]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_a_recipe_of_pairs_may_share_their_prompts(folder, tmp_path, task):
    """Their chat template and question come before both answers."""
    rows = []
    for layout in ("shared_prefix", "padded"):
        changes = (f"model.task={task}", f"output.dir={tmp_path / layout}", "train.max_steps=2")
        result = train_recipe(read(folder, *changes, f"train.layout={layout}"))
        rows.append(rows_with(result, "loss"))
    for shared, padded in zip(*rows, strict=True):
        assert shared["shared_fraction"] > 0.1
        computed = "computed_tokens_per_update"
        assert shared[computed] < 0.9 * padded[computed]
        assert shared["input_tokens_per_update"] == padded["input_tokens_per_update"]
        assert shared["loss"] == pytest.approx(padded["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "lora"])
def test_dpo_begins_at_its_reference_and_leaves_it(runs, method):
    result = runs["dpo", method]
    first, *_, last = rows_with(result, "loss")
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert last["rewards/margins"] > 0.05
    assert result.metrics["eval_rewards/accuracies"] == 1
    trainer = result.trainer
    if method == "none":
        # The copy was made of the model as it was, and is neither trained nor saved.
        moved = [
            float((a - b).detach().abs().max())
            for a, b in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True)
        ]
        assert max(moved) > 1e-3
        assert not any(
            p.requires_grad and p.grad is not None for p in trainer.ref_model.parameters()
        )
    else:
        assert trainer.ref_model is None
        assert list(trainer.model.peft_config) == ["default"]
        assert not (result.folder / "ref").exists()


@pytest.mark.slow
def test_samples_of_dpo_answer_the_prompts_of_pairs(runs):
    rows = [row for row in read_run(runs["dpo", "none"].folder)[1] if row.get("kind") == "samples"]
    assert [row["step"] for row in rows] == [2, 4]
    for sample in rows[0]["samples"]:
        assert "How many plums?" in sample["prompt"]
        assert "Seven." in sample["expected"]
        assert "No." not in sample["prompt"] + sample["expected"]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), OF_EACH)
def test_the_card_of_pairs_says_how_and_how_well(runs, task, method):
    card = (runs[task, method].folder / "README.md").read_text()
    assert {"dpo": "by DPO (sigmoid) with beta = 0.1", "reward": "to score answers"}[task] in card
    best = {"dpo": "rewards/accuracies", "reward": "accuracy"}[task]
    assert f"| held-out {best} | 1 |" in card
    assert "perplexity" not in card  # of a loss that is no loss of tokens


@pytest.mark.slow
def test_a_reward_model_is_saved_with_its_head_and_chat_says_what_it_takes(runs):
    config = json.loads((runs["reward", "lora"].folder / "config.json").read_text())
    assert len(config["id2label"]) == 1
    with pytest.raises(ConfigError, match="scores a prompt with its answer"):
        chat_with(str(runs["reward", "none"].folder), prompt="How many plums?")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_a_plan_of_pairs_can_be_measured(folder, tmp_path, monkeypatch, task):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    recipe = read(folder, f"model.task={task}", f"output.dir={tmp_path}")
    tokenizer = load_tokenizer(recipe.tokenizer, model=recipe.model, texts=iter_texts(recipe.data))
    data = prepare_data(recipe.data, tokenizer=tokenizer, task=task)
    measured = measure_updates(recipe, data, tokenizer=tokenizer)
    assert measured.seconds_per_token > 0
    assert "2 updates on cpu" in measured.source
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_reward_model_learns_to_score_the_chosen_answer_higher(runs):
    for method in ("none", "lora"):
        result = runs["reward", method]
        assert result.metrics["eval_accuracy"] == 1
        assert {"eval_loss", "eval_margin"} <= set(result.metrics)
        assert result.trainer.model.config.num_labels == 1


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), OF_EACH[::3])
def test_a_resumed_run_has_the_weights_of_one_that_was_not_stopped(runs, folder, task, method):
    whole = runs[task, method].folder
    out = shutil.copytree(whole, folder / f"again-{task}")
    recipe = read(folder, f"model.task={task}", f"peft={method}", f"output.dir={out}")
    resumed = train_recipe(recipe, resume=str(out / "checkpoint-2"))
    assert resumed.trainer.state.global_step == 4
    expected = weights(whole)
    assert {name: bool(torch.equal(w, expected[name])) for name, w in weights(out).items()} == (
        dict.fromkeys(expected, True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), OF_EACH)
def test_verify_passes_on_pairs(folder, tmp_path, task, method):
    out = f"output.dir={tmp_path}"
    report = verify_recipe(read(folder, f"model.task={task}", f"peft={method}", out))
    assert report.passed, report
    assert report.error < 1e-5
    assert report.num_targets == 16
    assert report.num_micro_batches > 2


def test_a_plan_of_pairs_counts_pairs_and_the_padding_within_them(folder, tmp_path):
    recipe = read(folder, f"output.dir={tmp_path}", "train.layout=padded")
    trainer, data = build_trainer(recipe)
    plan = plan_recipe(data.train, arguments=trainer.args, task="dpo")
    assert plan.targets_per_update.most == 6
    assert not any("packed" in way.name for way in plan.ways)
    update = next(iter(trainer.get_train_dataloader().updates))
    computed = sum(mb.inputs["input_ids"].numel() for mb in update)
    real = sum(int(mb.inputs["attention_mask"].sum()) for mb in update)
    assert plan.chosen.largest == max(
        mb.inputs["input_ids"].numel()
        for update in trainer.get_train_dataloader().updates
        for mb in update
    )
    of_all = sum(2 * max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in data.train)
    assert of_all > sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in data.train)
    first = plan_recipe(data.train, arguments=trainer.args, task="dpo").inputs_per_update
    assert first.least <= real <= first.most
    assert computed > real
    options = {"tokenizer": trainer.processing_class, "arguments": trainer.args, "largest": 99}
    whole = estimate_memory(recipe, **options)
    assert whole.reference == whole.weights > 0
    adapted = estimate_memory(read(folder, "peft=lora"), **options)
    assert adapted.reference == 0


def test_a_key_that_is_left_out_means_what_it_means_for_other_tasks(folder, tmp_path):
    out = f"output.dir={tmp_path / 'out'}"
    plain = ["train={use_cpu: true, report_to: none}", out]
    (tmp_path / "bare.yaml").write_text(RECIPE.partition("train: {max")[0])
    (tmp_path / "rows.jsonl").write_text("")
    for task, rate in (("dpo", 1e-6), ("reward", 1e-4)):
        bare = load_recipe(tmp_path / "bare.yaml", overrides=[f"model.task={task}", *plain])
        ours = recipe_arguments(bare)
        bare.model.task = "causal_lm"
        common = recipe_arguments(bare)
        fields = {field.name for field in dataclasses.fields(common)} - {"logging_dir"}
        other = {name for name in fields if getattr(ours, name) != getattr(common, name)}
        assert other == {"learning_rate"}
        assert ours.learning_rate == rate


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["dpo.bta=0.5"], ["dpo.bta = 0.5: no such key", "did you mean dpo.beta?"]),
        (["train.beta=0.5"], ["did you mean dpo.beta?"]),
        (["dpo.beta=high"], ["dpo.beta = 'high': has a wrong value"]),
        (["dpo.loss_type=sigmod"], ["did you mean sigmoid?"]),
        (["dpo.loss_type=[ipo, sft]", "dpo.loss_weights=[1.0]"], ["has 1 numbers for the 2 of"]),
        (["dpo.loss_type=exo_pair"], ["needs a `label_smoothing` above 0"]),
        (["reward.center_rewards_coefficient=0.1"], ["`reward:` has no effect on model.task"]),
        (["model.task=causal_lm"], ["set model.task to dpo or reward"]),
        (["data.format=chat"], ["set model.task to causal_lm"]),
        (["train.label_smoothing_factor=0.1"], ["set dpo.label_smoothing"]),
        (["train.layout=packed"], ["lays rows end to end, and dpo compares two"]),
        (
            ["peft=lora", "peft.options={init_lora_weights: pissa}"],
            ["init_lora_weights = pissa changes the base weights"],
        ),
        (["peft=lora", "dpo.sync_ref_model=true"], ["needs a whole model as reference"]),
    ],
    ids=lambda value: value[0][:40] if isinstance(value[0], str) else None,
)
def test_a_recipe_of_pairs_that_cannot_be_is_refused_with_the_way_out(folder, changes, words):
    with pytest.raises(ConfigError) as error:
        read(folder, *changes)
    for word in words:
        assert word in str(error.value)


def test_without_trl_that_is_one_problem_of_the_recipe(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gradacc.recipe.load.is_trl_installed", lambda: False)
    monkeypatch.setattr("hf_gradacc.recipe.checks.values.is_trl_installed", lambda: False)
    recipe = read(folder, f"output.dir={tmp_path}")
    recipe_arguments(recipe, elsewhere=True)  # a plan does without
    with pytest.raises(ConfigError, match=r"1 problem[^#]*pip install 'hf_gradacc\[trl\]'"):
        recipe_arguments(recipe)

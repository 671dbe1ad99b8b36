"""Quality beside the loss: scores, generated answers, early stopping, and what is refused."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.quality_jobs import evaluate_recipes
from support.ranks import run_ranks

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.recipe.checks.metrics import eval_metric_names
from hf_gradacc.recipe.file.problems import RecipeError
from hf_gradacc.recipe.load import load_recipe, recipe_arguments
from hf_gradacc.recipe.model.load import sample_answer
from hf_gradacc.recipe.quality.generating import batch_prompts, split_row
from hf_gradacc.recipe.quality.scoring import (
    class_accuracy,
    exact_match,
    has_same_number,
    macro_f1,
    make_scorer,
)
from hf_gradacc.recipe.run import build_trainer, train_recipe

COMMON = """\
train: {max_steps: 40, effective_batch_size: 8, use_cpu: true, disable_tqdm: true, report_to: none,
        logging_steps: 20, learning_rate: 2e-2, eval_strategy: steps, eval_steps: 20,
        save_strategy: steps, save_steps: 20}
"""
ANSWERS = (
    """\
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
           num_attention_heads: 2, num_key_value_heads: 1, attention_dropout: 0.1}
tokenizer: {train: {vocab_size: 300}}
data: {train: rows.jsonl, format: question_answer, holdout: 13}
evaluation: {metrics: [exact_match, final_number, rouge],
             generate: {max_new_tokens: 12, max_tokens_per_batch: 90}}
"""
    + COMMON
)
CLASSES = (
    """\
model:
  task: classification
  config: {model_type: bert, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
           num_attention_heads: 2}
tokenizer: {train: {vocab_size: 300}}
data: {train: classes.jsonl, format: classification, holdout: 13}
evaluation: {metrics: [accuracy, f1]}
"""
    + COMMON
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    rows = [
        {"question": "7" * (i % 5) + "ab"[i % 2], "answer": ["so\n#### 1", "or\n#### 2"][i % 2]}
        for i in range(64)
    ]
    classes = [{"text": "abc"[i % 3] * (1 + i % 4), "label": "uvw"[i % 3]} for i in range(64)]
    for name, some in (("rows", rows), ("classes", classes)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "answers.yaml").write_text(ANSWERS)
    (folder / "classes.yaml").write_text(CLASSES)
    cache = pytest.MonkeyPatch()
    cache.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    yield folder
    cache.undo()


def read(folder, name, *overrides):
    return load_recipe(folder / f"{name}.yaml", overrides=overrides)


@pytest.fixture(scope="module")
def answered(folder):
    return train_recipe(read(folder, "answers", f"output.dir={folder / 'answered'}"))


def evaluations(result):
    return [row for row in result.trainer.state.log_history if "eval_loss" in row]


# ---- scores --------------------------------------------------------------------------------------


def test_accuracy_and_f1_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for size in (1, 5, 40):
        labels, predicted = draw.integers(0, 4, size), draw.integers(0, 5, size)
        expected = metrics.f1_score(labels, predicted, average="macro", zero_division=0)
        assert macro_f1(predicted, labels) == pytest.approx(expected, rel=1e-12)
        expected = metrics.accuracy_score(labels, predicted)
        assert class_accuracy(predicted, labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("6 * 7 = 42\n#### 42", "#### 42", 1),
        ("The answer is $1,042.50.", "#### 1042.5", 1),
        ("#### 42 apples, not 43", "#### 42", 1),
        ("it is 42, or 43", "#### 42", 0),
        ("-5", "#### 5", 0),
        ("no idea", "#### 5", 0),
        ("7 ####", "#### 7", 1),
    ],
)
def test_a_final_number_is_read_as_gsm8k_writes_it(answer, expected, same):
    assert has_same_number(answer, expected) == same


def test_a_match_forgives_case_and_blanks_only():
    assert exact_match("The  CAT ", "the cat") == 1
    assert exact_match("1.5", "15") == exact_match("a cat", "cat") == 0


def test_rouge_is_that_of_the_package():
    pytest.importorskip("rouge_score")
    score = make_scorer(["rouge"])("the cats sat down", "the cat sat")
    assert score == pytest.approx({"rouge1": 6 / 7, "rouge2": 4 / 5, "rougeL": 6 / 7})


# ---- generated answers ---------------------------------------------------------------------------


@pytest.mark.slow
def test_answers_in_batches_are_those_of_one_row_at_a_time(answered):
    trainer, rows = answered.trainer, answered.data.eval
    tokenizer = trainer.processing_class
    lengths = {len(row["input_ids"]) for row in rows}
    assert len(lengths) > 2
    score = make_scorer(["exact_match", "final_number", "rouge"])
    scores = []
    for row in rows:
        _, answer, expected = sample_answer(
            trainer.model, row, tokenizer=tokenizer, max_new_tokens=12
        )
        scores.append(score(answer.strip(), expected.strip()))
    means = {f"eval_{name}": np.mean([one[name] for one in scores]) for name in scores[0]}
    last = evaluations(answered)[-1]
    assert {name: last[name] for name in means} == pytest.approx(means, rel=1e-12)
    assert 0 < means["eval_exact_match"] < 1  # it has learned some of them
    assert set(last) - {"step", "epoch"} <= eval_metric_names(
        "causal_lm", read_of(answered).evaluation.metrics
    )


def read_of(result):
    return load_recipe(result.folder / "recipe.yaml")


@pytest.mark.slow
def test_generating_changes_no_bit_of_training_or_of_a_resume(folder, answered):
    plain = "evaluation={metrics: [], generate: null}"
    without = train_recipe(read(folder, "answers", plain, f"output.dir={folder / 'without'}"))
    assert "eval_exact_match" not in without.metrics
    copied = shutil.copytree(answered.folder, folder / "resumed")
    recipe = read(folder, "answers", f"output.dir={copied}")
    resumed = train_recipe(recipe, resume=str(copied / "checkpoint-20"))
    assert resumed.trainer.state.global_step == 40
    expected = load_file(without.folder / "model.safetensors")
    for other in (answered, resumed):
        found = load_file(other.folder / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_two_ranks_measure_what_one_process_measures(folder, answered):
    small = ["train.per_device_eval_batch_size=2", f"output.dir={folder / 'ranks'}"]
    trained = ["model.config=null", "tokenizer={train: null}", f"model.name={answered.folder}"]
    runs = [
        (str(folder / "answers.yaml"), [*small, *trained]),
        (str(folder / "classes.yaml"), small),
    ]
    cache = str(folder / "cache")
    alone = evaluate_recipes(runs, cache)
    assert 0 < alone[0]["eval_exact_match"] < 1 > alone[1]["eval_accuracy"]
    for rank in run_ranks(evaluate_recipes, 2, runs=runs, cache=cache):
        for mine, theirs in zip(rank, alone, strict=True):
            rounded = {name for name in theirs if "loss" in name or "perplexity" in name}
            assert mine == {
                name: pytest.approx(value, rel=1e-5) if name in rounded else value
                for name, value in theirs.items()
            }


def test_batches_hold_all_prompts_within_the_tokens():
    draw = random.Random(0)
    from hf_gradacc.recipe.quality.generating import Prompt

    prompts = [Prompt(i, [1] * draw.randint(1, 30), "") for i in range(50)]
    batches = batch_prompts(prompts, max_tokens=100, max_new_tokens=5)
    assert sorted(one.row for batch in batches for one in batch) == list(range(50))
    for batch in batches:
        longest = max(len(one.input_ids) for one in batch)
        assert len(batch) * (longest + 5) <= 100


def test_a_row_is_asked_for_its_last_answer(answered):
    tokenizer = answered.trainer.processing_class
    ids = tokenizer("abcd")["input_ids"]
    assert len(ids) == 4
    labels = [-100, ids[1], -100, ids[3]]
    prompt = split_row(
        {"input_ids": ids, "labels": labels}, 0, task="causal_lm", tokenizer=tokenizer
    )
    assert (prompt.input_ids, prompt.expected) == (ids[:3], "d")
    with pytest.raises(DataError, match="row 7 begins with its answer"):
        split_row({"input_ids": ids, "labels": ids}, 7, task="causal_lm", tokenizer=tokenizer)


def test_an_adapter_answers_too_and_a_row_without_a_number_is_named(folder, tmp_path):
    few = ["train.max_steps=2", "train.eval_steps=2", "train.save_steps=2", "peft=lora"]
    changes = [*few, f"output.dir={tmp_path}", "evaluation.generate.max_rows=3"]
    result = train_recipe(read(folder, "answers", *changes))
    assert {"eval_exact_match", "eval_rougeL"} <= set(result.metrics)
    assert len(result.trainer.eval_metrics[0].prompts) == 3
    assert result.trainer.model.peft_config
    wordy = "data.columns={answer: question}"
    with pytest.raises(DataError, match="final_number finds no number in the answer of held-out"):
        build_trainer(read(folder, "answers", wordy, f"output.dir={tmp_path / 'b'}"))


# ---- classes, and stopping early -----------------------------------------------------------------


@pytest.mark.slow
def test_accuracy_and_f1_of_classes_decide_about_the_best_model(folder):
    best = ["train.metric_for_best_model=f1", "train.load_best_model_at_end=true"]
    result = train_recipe(read(folder, "classes", *best, f"output.dir={folder / 'classified'}"))
    rows = evaluations(result)
    assert rows[1]["eval_accuracy"] == rows[1]["eval_f1"] == 1
    assert result.trainer.args.greater_is_better is True
    assert result.trainer.state.best_metric == max(row["eval_f1"] for row in rows)


@pytest.mark.slow
def test_early_stopping_counts_on_in_a_resumed_run(folder):
    # Nothing is learned, so no evaluation after the first is better.
    still = ["train.learning_rate=0.0", "train.eval_steps=2", "train.save_steps=2"]
    still += ["train.max_steps=20", "evaluation.early_stopping_patience=2"]

    def run(name, resume=False, **changes):
        recipe = read(folder, "classes", *still, f"output.dir={folder / name}")
        return train_recipe(recipe, resume=resume, **changes).trainer.state

    assert run("stopped").global_step == 6
    assert run("again", max_steps=4).global_step == 4
    assert run("again", resume=True).global_step == 6


def test_patience_asks_for_the_best_model_unless_told_otherwise(folder, tmp_path):
    patience = ["evaluation.early_stopping_patience=2", f"output.dir={tmp_path}"]
    arguments = recipe_arguments(read(folder, "classes", *patience))
    assert arguments.load_best_model_at_end is True
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == ("loss", False)
    told = [*patience, "train.load_best_model_at_end=false"]
    assert recipe_arguments(read(folder, "classes", *told)).load_best_model_at_end is False
    by = [f"output.dir={tmp_path}", "train.metric_for_best_model=eval_perplexity"]
    assert recipe_arguments(read(folder, "answers", *by)).greater_is_better is False


@pytest.mark.parametrize(
    ("name", "metric", "higher"),
    [("classes", "f1", True), ("classes", "eval_accuracy", True), ("answers", "rougeL", True)],
)
def test_each_metric_that_is_asked_for_may_decide_about_the_best_model(
    folder, tmp_path, name, metric, higher
):
    by = [f"output.dir={tmp_path}", f"train.metric_for_best_model={metric}"]
    by += ["evaluation.metrics=[rouge]"] if name == "answers" else []
    assert recipe_arguments(read(folder, name, *by)).greater_is_better is higher


def test_a_metric_that_none_measures_is_reported_with_all_other_problems(folder):
    with pytest.raises(RecipeError) as error:
        read(folder, "classes", "train.metric_for_best_model=acuracy", "train.max_stepz=3")
    assert "did you mean eval_accuracy?" in str(error.value)
    assert "train.max_stepz" in str(error.value)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("classes", ["evaluation.metrics=[rouge]"], "rouge compares texts, and classification"),
        ("answers", ["evaluation.metrics=[f1]", "evaluation.generate=null"], "causal_lm has no"),
        ("classes", ["evaluation.metrics=[acuracy]"], "did you mean accuracy?"),
        ("classes", ["data.holdout=null"], "evaluation.metrics needs held-out rows"),
        ("classes", ["evaluation.early_stopping_threshold=0.1"], "has no effect alone"),
        (
            "classes",
            ["evaluation.early_stopping_patience=2", "train.eval_strategy=null"],
            "counts evaluations, and train.eval_strategy is no",
        ),
        ("classes", ["evaluation.generate.max_rows=5"], "evaluation.generate has no effect"),
        ("answers", ["data.format=text"], "rows of data.format = text have no prompt"),
        ("answers", ["train.fsdp=full_shard"], "weights that are spread over ranks"),
        (
            "classes",
            ["train.metric_for_best_model=acuracy"],
            "no evaluation measures it\n    did you mean eval_accuracy?",
        ),
        ("answers", ["train.metric_for_best_model=accuracy"], "known: eval_exact_match, eval_"),
    ],
)
def test_what_cannot_be_measured_is_refused_when_the_recipe_is_read(folder, name, changes, words):
    with pytest.raises(ConfigError) as error:
        read(folder, name, *changes)
    assert words in str(error.value)


def test_a_missing_package_is_a_problem_of_the_recipe(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gradacc.recipe.checks.values.is_rouge_installed", lambda: False)
    recipe = read(folder, "answers", f"output.dir={tmp_path}")
    with pytest.raises(ConfigError, match=r"pip install 'hf_gradacc\[metrics\]'"):
        recipe_arguments(recipe)


def test_a_regression_has_no_accuracy(folder, tmp_path):
    rows = [{"text": "a" * (1 + i), "label": i / 2} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"data.train={tmp_path / 'rows.jsonl'}", f"output.dir={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match="there are no classes to count"):
        build_trainer(read(folder, "classes", *changes))

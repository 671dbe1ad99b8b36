"""The scripts that people copy run, and leave what they promise."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from support.patience import HUNG_AFTER_SECONDS

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "recipes"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 256}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
STORY = "Ada has 3 plums and buys 4 more. "


def row(format, i):
    text = STORY * (1 + i % 4) + str(i)
    return {
        "question_answer": {"question": text, "answer": f"Seven {i}."},
        "text": {"text": text},
        "seq2seq": {"source": text, "target": f"Seven {i}."},
        "classification": {"text": text, "label": ["few", "many"][i % 2]},
    }[format]


@pytest.mark.parametrize(
    ("script", "format", "model", "says"),
    [
        ("sft", "question_answer", {"config": {"model_type": "llama", **SIZES}}, "--- the model"),
        ("pretrain", "text", {"config": {"model_type": "llama", **SIZES}}, "perplexity"),
        (
            "seq2seq",
            "seq2seq",
            {"task": "seq2seq", "config": {"model_type": "t5", **T5}},
            "--- the model",
        ),
        (
            "classify",
            "classification",
            {"task": "classification", "config": {"model_type": "modernbert", **SIZES}},
            "eval_accuracy",
        ),
    ],
)
def test_a_script_trains_evaluates_and_saves(
    script, format, model, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    rows = [row(format, i) for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": model,
        "tokenizer": {"train": {"vocab_size": 320}},
        "data": {"train": "rows.jsonl", "format": format, "holdout": 4, "max_length": 64},
        "train": {
            "max_steps": 2,
            "effective_batch_size": 5,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        },
        "output": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(str(tmp_path / "mine.yaml"), ["train.learning_rate=0.01"])

    assert says in capsys.readouterr().out
    auto = {"seq2seq": transformers.AutoModelForSeq2SeqLM}
    auto["classify"] = transformers.AutoModelForSequenceClassification
    saved = auto.get(script, transformers.AutoModelForCausalLM).from_pretrained(tmp_path / "run")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    if script == "classify":
        assert saved.config.id2label == {0: "few", 1: "many"}
    assert (tmp_path / "run" / "recipe.yaml").is_file()


@pytest.mark.parametrize("script", ["sft", "pretrain", "seq2seq", "classify"])
def test_a_script_is_short(script):
    assert len((SCRIPTS / f"{script}.py").read_text().splitlines()) <= 90


def printed_launches():
    """The commands of the documentation that start two processes."""
    lines = (SCRIPTS.parent / "docs" / "ranks.md").read_text().splitlines()
    return [line for line in lines if line.endswith("recipes/sft.py recipes/quickstart.yaml")]


TELLS_OF_A_GROUP = """
import atexit, sys

def tell():
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        print("a process group was left")

atexit.register(tell)
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", printed_launches(), ids=lambda line: line.split()[0])
def test_the_launches_that_are_documented_start_two_processes(command, tmp_path):
    """As printed, but for one update of fewer rows instead of 500 updates.

    They have to end their process group: gloo aborts some of the processes that exit with one.
    """
    (tmp_path / "sitecustomize.py").write_text(TELLS_OF_A_GROUP)
    data = SCRIPTS / "data" / "word_problems.jsonl"
    rows = f"data.train={{path: {data}, split: 'train[:60]'}}"
    shorter = ["train.max_steps=1", "train.eval_strategy=no", f"output.dir={tmp_path / 'run'}"]
    shorter += [rows, "data.holdout=8", "tokenizer.train.vocab_size=300"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*shlex.split(command), *shorter, "train.report_to=none"],
        cwd=SCRIPTS.parent,
        env={
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(tmp_path),
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=HUNG_AFTER_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a process group was left" not in done.stdout
    assert "16 sequences, over 2 ranks" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_both_launchers_are_documented():
    assert [line.split()[0] for line in printed_launches()] == ["torchrun", "accelerate"]

"""An output folder that holds a run is gone on with, replaced or left alone; nothing else goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.file.problems import RecipeError
from hf_gradacc.recipe.folder import clear_folder
from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.run import train_recipe
from hf_gradacc.tracking.run_files import LOG_NAME, read_log

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains in a second, its rows, and a folder that it was run in."""
    folder = tmp_path_factory.mktemp("place")
    rows = [{"question": f"{i}?", "answer": "7" * (i + 1)} for i in range(12)]
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = {
        "model": {"config": {"model_type": "llama", **SIZES}},
        "tokenizer": {"train": {"vocab_size": 300}},
        "data": {"train": "data/rows.jsonl", "format": "question_answer"},
        "train": {
            "max_steps": 2,
            "effective_batch_size": 4,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "steps",
            "save_steps": 1,
            "disable_tqdm": True,
            "logging_steps": 1,
        },
        "output": {"dir": str(folder / "run")},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    train(folder)
    return folder


def train(place: Path, *overrides: str, resume: Any = False) -> Any:
    recipe = load_recipe(place / "mine.yaml", overrides=list(overrides))
    return train_recipe(recipe, resume=resume)


@pytest.fixture
def used(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place, tmp_path / "place", copy_function=shutil.copy2)
    return tmp_path / "place"


def at(used: Path, *more: str) -> list[str]:
    return [f"output.dir={used / 'run'}", *more]


def test_a_used_folder_is_refused_by_what_it_holds_with_three_ways_out(used):
    before = {p: p.stat().st_mtime_ns for p in (used / "run").rglob("*") if p.is_file()}
    with pytest.raises(
        ConfigError, match=r"holds a run: checkpoint-2, model\.safetensors"
    ) as caught:
        train(used, *at(used))
    for way in ("--resume", "--overwrite", "output.dir=ANOTHER_FOLDER"):
        assert way in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "nothing was touched"


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(used):
    run = used / "run"
    (run / "notes.md").write_text("mine")
    (run / "checkpoint-2" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"checkpoint-2/mine\.txt in .* not written by a run"):
        clear_folder(run)
    assert (run / "checkpoint-1" / "model.safetensors").exists(), "it is all or nothing"
    (run / "checkpoint-2" / "mine.txt").unlink()
    clear_folder(run)
    assert [path.name for path in run.rglob("*")] == ["notes.md"]


def test_overwrite_trains_an_adapter_without_the_old_weights_beside_it(used):
    train(used, *at(used, "peft=lora", "output.overwrite=true"))
    names = {path.name for path in (used / "run").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    saved = yaml.safe_load((used / "run" / "recipe.yaml").read_text())
    assert "overwrite" not in saved["output"], "running it again asks again"


def test_weights_of_somebody_else_are_never_removed(used):
    weights = used / "run" / "model.safetensors"
    weights.write_bytes(b"changed by hand since")
    with pytest.raises(ConfigError, match=r"model\.safetensors in .* changed since"):
        train(used, *at(used, "output.overwrite=true"))
    assert weights.read_bytes() == b"changed by hand since"


def test_a_resume_goes_on_with_new_settings(used):
    result = train(used, *at(used, "train.max_steps=4", "train.learning_rate=0.5"), resume=True)
    rows = read_log(used / "run" / LOG_NAME)
    rates = {row["step"]: row["learning_rate"] for row in rows if row["kind"] == "train"}
    assert rates[3] == pytest.approx(0.5 * 2 / 4)
    assert result.trainer.state.global_step == 4


def test_resume_and_overwrite_contradict_each_other(used):
    with pytest.raises(ConfigError, match="leave out one of --overwrite and --resume"):
        train(used, *at(used, "output.overwrite=true"), resume=True)


@pytest.mark.parametrize("where", ["base", "data"])
def test_sources_are_not_written_into(used, where):
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **SIZES)).save_pretrained(used / "base")
    model = [f"model={{name: {used / 'base'}, config: null}}"]
    with pytest.raises(RecipeError, match=r"output\.dir"):
        load_recipe(used / "mine.yaml", overrides=[*model, f"output.dir={used / where}"])
    load_recipe(used / "mine.yaml", overrides=[*model, f"output.dir={used / 'base' / 'adapter'}"])


def test_the_checkpoint_that_a_run_begins_from_is_not_cleared(used):
    begins = [f"model={{name: {used / 'run' / 'checkpoint-2'}, config: null}}"]
    begins += ["tokenizer.train=null", "output.overwrite=true"]
    with pytest.raises(ConfigError, match=r"model\.name = .* lies in output\.dir"):
        train(used, *at(used, *begins))


def test_weights_alone_are_not_resumed_unless_named(used):
    (used / "run" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ConfigError, match=r"--resume: .* no optimizer"):
        train(used, *at(used), resume=True)

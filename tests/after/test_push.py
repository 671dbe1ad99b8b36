"""What reaches the Hugging Face Hub of a run, spoken to on this machine by a stand-in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.hub import stand_in_hub
from support.patience import HUNG_AFTER_SECONDS

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.load import load_recipe, recipe_arguments
from hf_gradacc.recipe.pushing import pushed_files

pytestmark = pytest.mark.slow

PROGRAM = """\
import sys
from hf_gradacc import cli
for line in sys.argv[1].split(";"):
    sys.argv = ["hf-gradacc", *line.split()]
    try:
        cli.main()
    except SystemExit as stop:
        print("exit code", stop.code)
"""
TOKEN = "hf_not-a-real-one"


@pytest.fixture(scope="module")
def pushed(runs, tmp_path_factory):
    """Train a recipe that is pushed, push a run by hand, and fail to push: hub, folder, output."""
    folder = tmp_path_factory.mktemp("pushed")
    values = yaml.safe_load((runs / "adapter.yaml").read_text())
    values["model"]["name"] = str(runs / "run")
    values["data"]["train"] = str(runs / "adapter.jsonl")
    values["train"] |= {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    values["train"] |= {"push_to_hub": True, "hub_model_id": "us/taught", "report_to": "wandb"}
    values["train"] |= {"hub_private_repo": True}
    values["output"] = {"dir": str(folder / "taught")}
    (folder / "taught.yaml").write_text(yaml.safe_dump(values))
    with stand_in_hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(folder / "taught"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        commands = f"train taught.yaml;push {runs / 'run'} us/whole --private;push {folder} us/no"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, commands],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HUNG_AFTER_SECONDS,
            check=False,
        )
    return hub, folder, done.stdout + done.stderr


def test_a_recipe_that_says_so_pushes_its_finished_model_once(pushed):
    hub, folder, said = pushed
    assert "pushed: " in said, said
    files = hub.files["us/taught"]
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name, content in files.items():
        assert content == (folder / "taught" / name).read_bytes(), name
    assert len(hub.commits) == 2, "one for each push: no half-trained checkpoint"


def test_neither_optimizer_nor_logs_nor_pickles_are_pushed(pushed):
    hub, folder, _ = pushed
    there = {str(p.relative_to(folder / "taught")) for p in (folder / "taught").rglob("*")}
    assert {"training_args.bin", "checkpoint-1/optimizer.pt", "wandb", "gradacc_log.jsonl"} <= there
    names = [name for files in hub.files.values() for name in files]
    kinds = (".bin", ".pt", ".pth", ".jsonl", ".wandb")
    assert not [name for name in names if name.endswith(kinds) or "/" in name]


def test_no_token_is_in_what_is_pushed_and_it_is_used(pushed):
    hub, _, said = pushed
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in said
    for files in hub.files.values():
        assert not [name for name, content in files.items() if TOKEN.encode() in content]


def test_a_run_is_pushed_by_hand_with_its_card_and_plot(pushed, runs):
    hub, _, said = pushed
    files = hub.files["us/whole"]
    assert {"model.safetensors", "config.json", "README.md", "training.png"} <= set(files)
    assert files["README.md"] == (runs / "run" / "README.md").read_bytes()
    asked = next(asked for asked in hub.created if asked["name"] == "whole")
    assert asked.get("private") or asked.get("visibility") == "private"  # by release of the client
    assert f"{hub.url}/us/whole/commit/" in said


def test_a_folder_without_a_model_is_not_pushed(pushed, tmp_path):
    hub, _, said = pushed
    assert "holds no model in safetensors" in said
    assert "us/no" not in hub.files
    with pytest.raises(ConfigError, match="holds no model"):
        pushed_files(tmp_path)


def test_a_recipe_pushes_at_its_end_unless_it_says_otherwise(runs):
    def strategy(*overrides):
        recipe = load_recipe(runs / "run.yaml", overrides=["train.push_to_hub=true", *overrides])
        return recipe_arguments(recipe).hub_strategy

    assert strategy() == "end"
    assert strategy("train.hub_strategy=every_save") == "every_save"

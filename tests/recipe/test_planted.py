"""Secrets planted in the environment and in options are in no file of a run, W&B's included."""

import pytest

from hf_gradacc.recipe.load import load_recipe
from hf_gradacc.recipe.run import train_recipe

SECRET = "PLANTED-c3d9"
VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "DATABASE_URL",
    "AWS_SECRET_ACCESS_KEY",
    "MY_VAR",
)
RECIPE = """\
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
           num_attention_heads: 1}
tokenizer:
  train: {vocab_size: 300}
data:
  train: rows.jsonl
  format: question_answer
  roles_to_train: [assistant, "${oc.env:SCRATCH}"]
train: {max_steps: 1, report_to: wandb, use_cpu: true, save_strategy: steps, save_steps: 1,
        disable_tqdm: true, effective_batch_size: 4}
wandb: {mode: offline, tags: ["\\\\${oc.env:HF_TOKEN}"]}
output: {dir: out}
"""


@pytest.mark.slow
def test_no_file_of_a_run_holds_a_planted_secret(tmp_path, monkeypatch, capfd):
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("SCRATCH", f"{SECRET}-scratch")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb-files"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb-files").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = '{"question": "q", "answer": "a"}\n' * 7 + '{"question": "\\u001b[31m", "answer": "b"}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    train_recipe(load_recipe("mine.yaml"), hub_token=SECRET)
    import wandb

    wandb.finish()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in files)
    assert (tmp_path / "out/training_args.bin") in files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    told = "".join(capfd.readouterr())
    assert SECRET not in told
    assert "${oc.env:SCRATCH}" in (tmp_path / "out/recipe.yaml").read_text()

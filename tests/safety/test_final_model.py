"""A model is saved whole or not at all, tells no token, and leaves alone what else is there."""

import os
import signal
from pathlib import Path

import pytest
import torch
from support.tiny import make_trainer, ragged_rows, tiny_llama
from transformers import LlamaForCausalLM

from hf_gradacc.safety.final_model import complete_model, written_aside

OLD = {"model-00001-of-00002.safetensors": "old 1", "model-00002-of-00002.safetensors": "old 2"}
OLD |= {"model.safetensors.index.json": "old", "config.json": "old", "notes.txt": "mine"}
NEW = {"model.safetensors": "new", "config.json": "new", "sub/file.json": "new"}
AFTER = {**NEW, "notes.txt": "mine"}


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def save(folder, *, killed_at):
    """Save the new model in a process of its own, which is killed while it writes or moves."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    moves = 0
    replace = Path.replace

    def replace_or_die(path, target):
        nonlocal moves
        moves += 1
        if moves == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = replace_or_die
    options = {"is_mover": True, "is_first_here": False, "wait": lambda: None}
    with written_aside(folder, **options) as staged:
        for name, text in NEW.items():
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_text(text)
            if killed_at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)


@pytest.mark.parametrize("killed_at", [0, 1, 2, 3, None])
def test_a_killed_save_leaves_the_old_model_or_becomes_the_new_one(tmp_path, killed_at):
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    code = save(tmp_path, killed_at=killed_at)
    assert code == (0 if killed_at is None else -signal.SIGKILL)
    complete_model(tmp_path)  # as the next start does
    left = {n: t for n, t in contents(tmp_path).items() if not n.startswith(".model-being")}
    assert left == (OLD if killed_at == 0 else AFTER)


def test_the_trainer_saves_aside_without_its_token(tmp_path):
    trainer = make_trainer(tmp_path, ragged_rows(8), model=tiny_llama(), hub_token="hf_PLANTED")
    (tmp_path / "notes.txt").write_text("mine")
    trainer.save_model()
    trainer.save_model()
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (saved.hub_token, saved.learning_rate) == (None, trainer.args.learning_rate)
    assert trainer.args.hub_token == "hf_PLANTED"
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"PLANTED" in p.read_bytes()]
    assert not list(tmp_path.glob(".model*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    for weight, other in zip(again.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(weight, other)

"""A trainer on plain lists needs torch, transformers and accelerate, and nothing else."""

import json
import subprocess
import sys

import pytest

from hf_gradacc.safety import checkpoints
from hf_gradacc.safety.checkpoints import MANIFEST_NAME, find_damage, write_manifest

NOT_NEEDED = ("datasets", "pyarrow", "xxhash", "pandas", "peft", "wandb", "trl")
NOT_NEEDED += ("matplotlib", "tensorboardX", "deepspeed", "sentence_transformers")

BARE = """
import sys
sys.modules |= dict.fromkeys(sys.argv[2].split(","))  # as if they were not installed
from support.tiny import make_trainer, ragged_rows

def make():
    options = {"save_strategy": "steps", "save_steps": 1, "effective_batch_size": 8}
    return make_trainer(sys.argv[1], ragged_rows(24), max_steps=3, **options)

make().train()
trainer = make()
trainer.train(resume_from_checkpoint=sys.argv[1] + "/checkpoint-2")
assert trainer.state.global_step == 3
"""


@pytest.mark.slow
def test_it_trains_and_resumes_without_any_other_package(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path), ",".join(NOT_NEEDED)],
        env={"PYTHONPATH": ":".join(sys.path), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "checkpoint-3" / MANIFEST_NAME).read_text())
    assert {frozenset(facts) for facts in manifest["files"].values()} == {
        frozenset({"bytes", "sha256"})
    }


def write(folder, text):
    (folder / "trainer_state.json").write_text(json.dumps(text))


@pytest.mark.parametrize("kind", ["xxh3_128", "sha256"])
def test_damage_is_found_by_either_hash(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(checkpoints, "_HASHES", {kind: checkpoints._HASHES[kind]})
    write(tmp_path, "as it was")
    write_manifest(tmp_path)
    assert kind in (tmp_path / MANIFEST_NAME).read_text()
    assert find_damage(tmp_path) is None
    write(tmp_path, "as it is!")
    assert "holds other bytes" in find_damage(tmp_path)


def test_where_the_hash_of_a_manifest_is_not_known_sizes_are_compared(tmp_path, monkeypatch):
    write(tmp_path, "as it was")
    write_manifest(tmp_path)
    monkeypatch.setattr(checkpoints, "_HASHES", {"sha256": checkpoints._HASHES["sha256"]})
    assert find_damage(tmp_path) is None
    write(tmp_path, "longer than it was")
    assert "bytes where" in find_damage(tmp_path)

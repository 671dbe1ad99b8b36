"""Nothing is saved that is NaN: no checkpoint, no model, and nothing older is deleted for it."""

import pytest
import torch
from support.tiny import make_trainer, ragged_rows, tiny_llama
from torch import nn
from transformers import TrainerCallback

from hf_gradacc import NonFiniteError
from hf_gradacc.safety.checkpoints import find_damage
from hf_gradacc.safety.saved_values import find_bad_value, state_to_save, weights_to_save

ROWS = ragged_rows(32, seed=2)
PLACE = "model.layers.1.mlp.up_proj.weight"


class Spoil(TrainerCallback):
    """Writes NaN into one value after an update, where nobody looks before the next."""

    def __init__(self, step, *, state=False):
        self.step, self.state = step, state

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == self.step:
            weight = model.get_parameter(PLACE)
            value = optimizer.state[weight]["exp_avg"] if self.state else weight.data
            value[0, 0] = torch.nan


def spoiled(out, *, step=4, state=False, **options):
    return make_trainer(
        out,
        ROWS,
        model=tiny_llama(),
        callbacks=[Spoil(step, state=state)],
        **{"effective_batch_size": 8, "save_strategy": "steps", "save_steps": 2}
        | {"optim": "adamw_torch", "learning_rate": 1e-3, "save_total_limit": 1}
        | options,
    )


@pytest.mark.parametrize("state", [False, True], ids=["weight", "optimizer"])
def test_a_checkpoint_with_nan_is_not_written_and_the_one_before_stays(tmp_path, state):
    with pytest.raises(NonFiniteError) as caught:
        spoiled(tmp_path, state=state).train()
    text = str(caught.value)
    named = f"exp_avg of {PLACE} in the optimizer" if state else f"the weight {PLACE}"
    for part in (named, "has 1 NaN of 384 values", "after step 4", "checkpoint-2 is whole"):
        assert part in text
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert find_damage(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / ".saving").exists()


def test_the_last_save_refuses_as_well_and_overwrites_nothing(tmp_path):
    trainer = spoiled(tmp_path, save_strategy="no")
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    trainer.train()
    with pytest.raises(NonFiniteError, match="No checkpoint was saved before"):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    trainer.args.save_non_finite = True
    trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() != before


def test_only_what_training_changed_is_looked_at():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2,), -torch.inf))
    model.bias.requires_grad_(False)[:] = torch.nan
    assert find_bad_value(weights_to_save(model)) is None
    with torch.no_grad():
        model.weight[1] = torch.inf
    assert find_bad_value(weights_to_save(model)) == "the weight weight has 2 infinite of 4 values"
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.weight] = {"exp_avg_sq": torch.full((2,), torch.inf), "step": 1}
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert find_bad_value(state_to_save(optimizer, names=names, masters={})) is None
    optimizer.state[model.weight]["exp_avg_sq"][0] = torch.nan
    found = find_bad_value(state_to_save(optimizer, names=names, masters={}))
    assert found.startswith("exp_avg_sq of weight in the optimizer has 1 NaN")
    master = torch.tensor([1e300, 1.0], dtype=torch.float64)
    assert find_bad_value(state_to_save(None, names={}, masters={"weight": master})) is None

"""NEFTune's noise is a function of the row: its size by its own length, its numbers by its name."""

import copy

import pytest
import torch
from support.reference import float64_everywhere
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_gradacc.trainer.row_noise import RowNoise, places_of_rows

ROWS = ragged_rows(24, seed=51)
ALPHA = 5.0


class Look(TrainerCallback):
    """Notes what the embeddings return beyond their weights, for each row of tokens."""

    def __init__(self, model):
        self.model = model
        self.seen = {}
        self.size = 0.0
        self.update = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.update = state.global_step
        if state.global_step == 0:
            self.model.get_input_embeddings().register_forward_hook(self.look)

    def look(self, module, args, output):
        if module.training:
            ids = args[0]
            noise = (output - F.embedding(ids, module.weight)).detach()
            for i in range(len(ids)):
                self.note(ids[i], noise[i])

    def note(self, ids, noise):
        rows = {tuple(row["input_ids"]) for row in ROWS}
        text = ids.tolist()
        for row in rows:
            for start in range(len(text) - len(row) + 1):
                if tuple(text[start : start + len(row)]) == row:
                    self.seen[row, self.update] = noise[start : start + len(row)]


def train(tmp_path, *, collate=pad, **options):
    with float64_everywhere():
        model = tiny_llama()
        look = Look(model)
        trainer = make_trainer(
            tmp_path,
            ROWS,
            model=model,
            data_collator=collate,
            callbacks=[look],
            **{"neftune_noise_alpha": ALPHA, "effective_batch_size": 8, "max_steps": 4} | options,
        )
        trainer.train()
    return look.seen, copy.deepcopy(model.state_dict()), model


def same_noise(one, other):
    assert one.keys() == other.keys()
    return all(torch.allclose(one[row], other[row], rtol=0, atol=1e-12) for row in one)


CUTS = {
    "4 rows": {"per_device_train_batch_size": 4},
    "2 rows": {"per_device_train_batch_size": 2},
    "one row each": {"per_device_train_batch_size": 1},
    "packed": {"max_tokens_per_micro_batch": 60, "layout": "packed"},
    "a budget": {"max_tokens_per_micro_batch": 40},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), per_device_train_batch_size=8)


@pytest.mark.parametrize("name", CUTS)
def test_noise_and_weights_are_the_same_for_every_cut_and_layout(tmp_path, whole, name):
    seen, weights, _ = train(tmp_path, **CUTS[name])
    assert same_noise(seen, whole[0])
    for key, value in whole[1].items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-12)


def test_its_size_is_by_the_rows_own_length(whole):
    width = 16
    for (row, _), noise in whole[0].items():
        limit = ALPHA / (len(row) * width) ** 0.5
        assert noise.abs().max() <= limit * (1 + 1e-12)
        assert noise.abs().max() > 0.7 * limit


def test_another_update_draws_anew_and_nothing_is_left_on_the_model(whole):
    seen, _, model = whole
    again = [row for row, update in seen if update == 3 and (row, 0) in seen]
    assert again
    assert not any(torch.equal(seen[row, 3], seen[row, 0]) for row in again)
    hooks = model.get_input_embeddings()._forward_hooks.values()
    assert not any(isinstance(getattr(hook, "__self__", None), RowNoise) for hook in hooks)
    assert not hasattr(model.get_input_embeddings(), "neftune_noise_alpha")


@pytest.mark.parametrize("broken", ["the stock hook", "the width of the batch", "one generator"])
def test_noise_of_another_kind_is_noticed(tmp_path, whole, monkeypatch, broken):
    if broken == "the stock hook":
        monkeypatch.setattr(RowNoise, "take_over", lambda *args: None)
    elif broken == "one generator":
        monkeypatch.setattr(RowNoise, "_seeded", lambda *args: None)
    else:
        monkeypatch.setattr(RowNoise, "_places", property(lambda _: None, lambda *_: None), False)
    seen, _, _ = train(tmp_path, **CUTS["2 rows"])
    assert not same_noise(seen, whole[0])


def test_rows_that_a_collator_lays_end_to_end_are_told_apart_by_their_positions():
    inputs = {"input_ids": torch.ones(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]])}
    places = places_of_rows(inputs, [5, 3, 8])
    assert [row.tolist() for row in places.tokens] == [[0, 1, 2], [3], [4, 5]]
    assert places.names == [(5, 0), (3, 0), (8, 0)]


def test_pairs_and_choices_of_a_row_are_told_apart():
    two = places_of_rows({"input_ids": torch.ones(4, 3)}, [5, 3])
    assert two.names == [(5, 0), (3, 0), (5, 1), (3, 1)]
    choices = places_of_rows({"input_ids": torch.ones(2, 2, 3)}, [5, 3])
    assert choices.names == [(5, 0), (5, 1), (3, 0), (3, 1)]
    assert choices.shape == (4, 3)


def test_rows_of_somebody_elses_loader_have_no_names_and_still_their_own_size():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    places = places_of_rows({"input_ids": mask, "attention_mask": mask})
    assert places.names is None
    assert [len(row) for row in places.tokens] == [4, 3]
    assert places_of_rows({"pixel_values": torch.ones(2, 3)}) is None

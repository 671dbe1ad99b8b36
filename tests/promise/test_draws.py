"""Masks drawn at random: one gradient for every cut, number of ranks, worker and resume."""

import pytest
import torch
from support.drawing import mask_words
from support.drawing_jobs import train_masked_words
from support.ranks import run_ranks

from hf_gradacc.updates.draws.rows import DrawsByRow

CUTS = {
    "4 rows": {"per_device_train_batch_size": 4},
    "2 rows": {"per_device_train_batch_size": 2},
    "a budget": {"max_tokens_per_micro_batch": 48},
    "a worker": {"per_device_train_batch_size": 4, "dataloader_num_workers": 2},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_masked_words(tmp_path_factory.mktemp("w"), per_device_train_batch_size=8)


def assert_same(run, whole):
    assert run["tokens"] == whole["tokens"]
    for actual, expected in zip(run["gradients"], whole["gradients"], strict=True):
        size = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-12 * max(size, 1))


@pytest.mark.parametrize("name", CUTS)
def test_gradients_of_masked_words_are_the_same_for_every_cut(tmp_path, whole, name):
    assert_same(train_masked_words(tmp_path, **CUTS[name]), whole)


def test_masks_change_from_epoch_to_epoch(tmp_path):
    run = train_masked_words(
        tmp_path,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        learning_rate=0.0,
        max_steps=6,
    )
    first, again = run["gradients"][0], run["gradients"][3]
    assert any(not torch.allclose(first[name], again[name], atol=1e-6) for name in first)


def test_a_run_that_is_resumed_draws_the_masks_it_would_have_drawn(tmp_path, whole):
    saving = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    train_masked_words(tmp_path, max_steps=2, **saving)
    resumed = train_masked_words(
        tmp_path, resume=True, collator=mask_words(), dataloader_num_workers=1, **saving
    )
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(tmp_path, whole):
    for run in run_ranks(
        train_masked_words, 2, out=str(tmp_path), per_device_train_batch_size=4, max_steps=5
    ):
        assert_same(run, whole)


@pytest.mark.parametrize("name", ["4 rows", "2 rows"])
def test_masks_seeded_by_update_as_they_were_are_noticed(tmp_path, whole, monkeypatch, name):
    def seed_once_a_piece(self, rows, indices, entropy, per):
        self._seed(*entropy)
        return self.collate(rows)

    monkeypatch.setattr(DrawsByRow, "_draw", seed_once_a_piece)
    with pytest.raises(AssertionError):
        assert_same(train_masked_words(tmp_path, **CUTS[name]), whole)

"""A compiled model is not compiled anew for every shape of micro-batch."""

import pytest
import torch
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama
from torch._dynamo.utils import counters

pytestmark = pytest.mark.slow

ROWS = ragged_rows(48, seed=1, longest=40)


@pytest.mark.slow
def test_a_few_graphs_serve_micro_batches_of_every_shape(tmp_path):
    shapes = set()

    def collate(rows):
        batch = pad(rows)
        shapes.add(tuple(batch["input_ids"].shape))
        return batch

    def train(**options):
        recorder = Recorder()
        make_trainer(
            tmp_path,
            ROWS,
            model=tiny_llama(dtype=torch.float32, num_hidden_layers=1, attn_implementation="sdpa"),
            callbacks=[recorder],
            data_collator=collate,
            max_steps=3,
            effective_batch_size=16,
            max_tokens_per_micro_batch=100,
            remove_unused_columns=False,
            **options,
        ).train()
        return recorder.gradients

    torch._dynamo.reset()
    counters.clear()
    compiled = train(torch_compile=True, torch_compile_backend="eager")
    assert len(shapes) >= 10
    # One for a single row, one for the first shape of several, one for all others.
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    for actual, expected in zip(compiled, train(), strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)

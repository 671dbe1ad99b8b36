"""A wait that takes long is told with what is waited for; rows that cannot be are named."""

import logging
import socket
import time

import pytest
import torch
from support.tiny import make_trainer, pad, ragged_rows, tiny_llama

from hf_gradacc import DataError
from hf_gradacc.recipe import hub
from hf_gradacc.trainer import data

ROWS = ragged_rows(24, seed=5)


class Slow(torch.utils.data.Dataset):
    """Takes its time for one row."""

    def __init__(self, rows, slow, seconds):
        self.rows, self.slow, self.seconds = rows, slow, seconds

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        is_probing = torch.utils.data.get_worker_info() is None
        if index == self.slow and not is_probing:
            time.sleep(self.seconds)
        return self.rows[index]


@pytest.fixture
def lines(monkeypatch):
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("hf_gradacc.safety.waiting")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_a_loader_worker_that_hangs_is_told_with_its_row(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(data, "TELL_AFTER_SECONDS", 0.5)
    trainer = make_trainer(
        tmp_path,
        Slow(ROWS, slow=17, seconds=4.0),
        model=tiny_llama(),
        effective_batch_size=6,
        max_steps=4,
        dataloader_num_workers=2,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert trainer.state.global_step == 4
    told = [line for line in lines if "update 3 of this epoch" in line]
    assert told
    assert "reads row 17" in told[-1]


def test_a_hub_that_does_not_answer_is_told(monkeypatch, lines):
    from huggingface_hub import HfApi

    monkeypatch.setattr(hub, "TELL_AFTER_SECONDS", 0.4)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never says a word
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)

        @hub.telling_of_hub
        def ask():
            HfApi(endpoint=endpoint).model_info("me/model", timeout=1.5)

        with pytest.raises(Exception, match=r"[Tt]imed? ?out"):
            ask()
    assert [line for line in lines if f"waiting for {endpoint}" in line]

    @hub.telling_of_hub
    def work():
        time.sleep(0.8)

    lines.clear()
    work()
    assert not lines


@pytest.mark.parametrize("wrong", [99, -1])
@pytest.mark.parametrize("place", [5, 1])
def test_a_token_outside_of_the_vocabulary_names_its_row(tmp_path, wrong, place):
    rows = [dict(row) for row in ROWS]
    ids = list(rows[place]["input_ids"])
    rows[place]["input_ids"] = [*ids[:-1], wrong]
    model = tiny_llama()
    trainer = make_trainer(tmp_path, rows, model=model, effective_batch_size=6)
    with pytest.raises(DataError) as caught:
        trainer.train()
    size = model.config.vocab_size
    assert f"row {place} of the training dataset: token id {wrong}" in str(caught.value)
    assert f"vocabulary of {size}" in str(caught.value)


def test_a_rotten_row_among_those_the_model_is_asked_with_is_named(tmp_path):
    class Rotten(Slow):
        def __getitem__(self, index):
            if index == 3:
                raise KeyError("gone")
            return self.rows[index]

    trainer = make_trainer(tmp_path, Rotten(ROWS, 0, 0), model=tiny_llama())
    with pytest.raises(DataError, match="row 3 of the training dataset cannot be read: KeyError"):
        trainer.train()

    def collate(rows):
        if any(len(row["input_ids"]) == len(ROWS[0]["input_ids"]) for row in rows):
            raise ValueError("cannot")
        return pad(rows)

    trainer = make_trainer(tmp_path, ROWS, model=tiny_llama(), data_collator=collate)
    with pytest.raises(DataError, match=r"failed on rows? (\d+, )*\d+ of the training"):
        trainer.train()

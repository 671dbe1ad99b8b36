"""Losses of all rows behind virtual tokens: what the network returns is wider than its inputs."""

import pytest
import torch
from peft import CPTConfig, PromptTuningConfig, get_peft_model
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama

from hf_gradacc import GradAccTrainer
from hf_gradacc.loss.coupled import cuts

ROWS = ragged_rows(11, seed=4)
IN_FRONT = 3


def prompt_tuned():
    torch.manual_seed(5)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=IN_FRONT)
    return get_peft_model(tiny_llama(), config).double()


def context_tuned():
    """PEFT's CPT takes a mean over targets and one token of its prompt for each row."""
    torch.manual_seed(5)
    marks = {"cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}
    config = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5], **marks)
    return get_peft_model(tiny_llama(), config).double()


def contrast(model, batch):
    """Rows that begin in one of three ways are pulled together, by the mean of their logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    mask = torch.nn.functional.pad(batch["attention_mask"], (IN_FRONT, 0), value=1)[..., None]
    vectors = torch.nn.functional.normalize((logits * mask).sum(1) / mask.sum(1), dim=-1)
    itself = torch.eye(len(vectors), dtype=torch.bool)
    logs = (10 * vectors @ vectors.T).masked_fill(itself, -1e9).log_softmax(1)
    kinds = batch["input_ids"][:, 0] % 3
    positive = (kinds[:, None] == kinds) & ~itself
    return -((logs * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


class Contrasts(GradAccTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return contrast(model, inputs)


def train(out, network, trainer_class):
    recorder = Recorder()
    trainer = make_trainer(
        out,
        ROWS,
        model=network,
        trainer_class=trainer_class,
        callbacks=[recorder],
        effective_batch_size=len(ROWS),
        per_device_train_batch_size=3,
        max_steps=1,
    )
    trainer.train()
    return recorder.gradients[0]


CASES = [(prompt_tuned, Contrasts, contrast), (context_tuned, GradAccTrainer, None)]


@pytest.mark.parametrize(("make", "trainer_class", "loss_of"), CASES, ids=["contrast", "CPT"])
def test_rows_of_other_widths_are_compared_over_the_whole_update(
    tmp_path, make, trainer_class, loss_of
):
    with float64_everywhere():
        options = {} if loss_of is None else {"loss_of": loss_of}
        expected = reference_gradient(make(), ROWS, pad, **options)
        gradient = train(tmp_path, make(), trainer_class)
    assert relative_error(gradient, expected) < 1e-12


def test_virtual_tokens_that_nobody_counts_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cuts, "_virtual_tokens", lambda model: 0)
    with float64_everywhere(), pytest.raises(Exception, match="as it did for the rows"):
        train(tmp_path, prompt_tuned(), Contrasts)

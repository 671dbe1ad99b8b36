"""Images and sound: exact where each row has its own tensors, and where images share one."""

import pytest
import torch
from support import multimodal
from support.reference import (
    float64_everywhere,
    model_loss,
    reference_gradient,
    relative_error,
)
from support.tiny import Recorder, log_rows, make_trainer

from hf_gradacc.updates.batch import can_slice_rows, first_rows
from hf_gradacc.updates.targets import TargetRule

SEVEN = {"effective_batch_size": 7, "per_device_train_batch_size": 3, "learning_rate": 0.0}


def run(tmp_path, kit, loss_of=model_loss, **options):
    """The gradient of one update of seven rows, and that of the rows at once."""
    build, rows, collate = kit
    recorder = Recorder()
    with float64_everywhere():
        torch.manual_seed(0)
        model = build().double()
        trainer = make_trainer(
            tmp_path,
            rows,
            model=model,
            data_collator=collate,
            callbacks=[recorder],
            remove_unused_columns=False,
            **SEVEN | options,
        )
        trainer.train()
        torch.manual_seed(0)
        whole = build().double().train()
        expected = reference_gradient(whole, rows, collate, loss_of=loss_of)
    return trainer, relative_error(recorder.gradients[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kit", "rule"),
    [
        (multimodal.llava((1,)), TargetRule.NEXT_TOKEN),
        (multimodal.llava((2,)), TargetRule.NEXT_TOKEN),
        (multimodal.llava((2, 0, 1)), TargetRule.NEXT_TOKEN),
        (multimodal.qwen2_vl(with_positions=False), TargetRule.NEXT_TOKEN),
        (multimodal.qwen2_vl(with_positions=True), TargetRule.NEXT_TOKEN),
        (multimodal.gemma3(), TargetRule.NEXT_TOKEN),
        (multimodal.whisper(), TargetRule.SAME_TOKEN),
        (multimodal.wav2vec2_ctc(), TargetRule.SEQUENCE),
        (multimodal.image_classifier("vit"), TargetRule.SEQUENCE),
    ],
    ids=[
        *("llava", "llava, two images a row", "llava, none to two", "qwen2-vl"),
        *("qwen2-vl, positions [3, rows, seq]", "gemma3", "whisper", "wav2vec2 ctc", "vit"),
    ],
)
def test_images_and_sound_are_exact(tmp_path, kit, rule):
    trainer, error = run(tmp_path, kit)
    assert error <= 1e-10
    assert trainer.facts.rule is rule
    assert not trainer.facts.warnings
    apart = all(len(value) == 7 for value in kit[2](kit[1]).values())
    # If they cannot be told apart, rows are never sliced out.
    assert trainer.update_collator.rows_per_sequence == (1 if apart else None)
    (row,) = log_rows(trainer)
    assert row["micro_batches_per_update"] == 3
    assert 0 <= row["padding_fraction"] < 0.2


def test_label_smoothing_shifts_where_a_vision_model_does(tmp_path):
    """Stock goes by class names, takes this one for no causal LM, and teaches it to copy."""
    kit = multimodal.llava((2, 0, 1))

    def smoothed(model, batch):
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)

    _, error = run(tmp_path, kit, loss_of=smoothed, label_smoothing_factor=0.2)
    assert error <= 1e-10


def test_batch_norm_is_said_to_be_inexact(tmp_path):
    kit = multimodal.image_classifier("resnet")
    trainer, error = run(tmp_path, kit, per_device_train_batch_size=4)
    assert error > 0.1
    assert "BatchNorm layers normalize by the rows of a micro-batch" in trainer.facts.warnings[0]


@pytest.mark.parametrize("images", [(2, 0, 1), (1, 3)], ids=str)
def test_rows_whose_images_share_a_tensor_are_evaluated_before_any_training(tmp_path, images):
    """There the batch comes without its rows, and labels alone are masked to ask the model."""
    build, rows, collate = multimodal.llava(images)
    losses = []
    for size in (1, 3, 7):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path,
            rows,
            model=build().double(),
            data_collator=collate,
            eval_dataset=rows,
            per_device_eval_batch_size=size,
            remove_unused_columns=False,
        )
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.facts.rule is TargetRule.NEXT_TOKEN
        assert not trainer.facts.warnings
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_rows_that_fill_up_a_batch_are_no_part_of_its_loss():
    """Accelerate fills a last batch with rows of the first; their images cannot be cut out."""
    build, rows, collate = multimodal.llava((2, 0, 1))
    torch.manual_seed(0)
    model = build().double().eval()
    filled = collate([*rows[:4], *rows[:2]])
    assert not can_slice_rows(filled, 6)
    with torch.no_grad(), float64_everywhere():
        alone = model(**collate(rows[:4])).loss
        kept = model(**first_rows(filled, 4)).loss
    torch.testing.assert_close(kept, alone, rtol=1e-12, atol=0)

"""Label smoothing: what it adds to the model's own loss."""

import pytest
import torch
from torch import nn

from hf_gradacc.loss.smoothing import smoothing_correction

torch.manual_seed(0)
LOGITS = torch.randn(3, 6, 9, dtype=torch.float64)
LABELS = torch.randint(0, 9, (3, 6))
LABELS[0, 2:] = LABELS[1, :3] = -100


def smooth(logits, labels, epsilon):
    """Torch's own label smoothing, an independent formula."""
    return nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), label_smoothing=epsilon
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_correction_turns_a_plain_loss_into_a_smoothed_one(epsilon, shifted):
    logits, labels = (LOGITS[:, :-1], LABELS[:, 1:]) if shifted else (LOGITS, LABELS)
    correction = smoothing_correction(LOGITS, LABELS, epsilon=epsilon, shifted=shifted)
    expected = smooth(logits, labels, epsilon) - smooth(logits, labels, 0.0)
    torch.testing.assert_close(correction, expected, rtol=1e-12, atol=1e-14)


def test_virtual_tokens_in_front_shift_the_first_label_too():
    labels = LABELS[:, :4]
    correction = smoothing_correction(LOGITS, labels, epsilon=0.2, shifted=False)
    logits = LOGITS[:, 1:5]  # position 1 is the last of two virtual tokens
    expected = smooth(logits, labels, 0.2) - smooth(logits, labels, 0.0)
    torch.testing.assert_close(correction, expected, rtol=1e-12, atol=1e-14)


def test_a_classifiers_logits_have_no_positions():
    logits, labels = LOGITS[:, 0], torch.tensor([3, -100, 1])
    correction = smoothing_correction(logits, labels, epsilon=0.2, shifted=False)
    expected = smooth(logits, labels, 0.2) - smooth(logits, labels, 0.0)
    torch.testing.assert_close(correction, expected, rtol=1e-12, atol=1e-14)

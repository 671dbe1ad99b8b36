"""A loss taken in chunks has the value and gradient of the loss over all logits, without these."""

import copy
import math

import peft
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from support.hooks import of_no_user
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama
from support.zoo import Case
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from hf_gradacc.errors import ConfigError
from hf_gradacc.loss.layouts import find_head, kept_rows
from hf_gradacc.loss.shortcuts import chunked as chunked_loss
from hf_gradacc.loss.shortcuts import head_gradient
from hf_gradacc.loss.shortcuts.chunked import (
    ChunkedLoss,
    find_owner,
    why_not_chunked,
    without_logits,
)
from hf_gradacc.loss.shortcuts.head_gradient import add_product, adds_into_float32

ROWS = ragged_rows(8, seed=4)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "_ROWS_ON_CPU", 5)


def make_inputs(rows, *, dtype=torch.float64, vocab=31):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 12).to(dtype).requires_grad_()
    bias = torch.randn(vocab).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(vocab, (rows,))


def gradients(loss, tensors):
    for x in tensors:
        x.grad = None
    loss.backward()
    return {str(i): x.grad for i, x in enumerate(tensors) if x.grad is not None}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 13])
def test_a_chunked_loss_is_the_cross_entropy_of_all_logits(rows, with_bias):
    hidden, weight, bias, labels = make_inputs(rows)
    used = (hidden, weight, bias) if with_bias else (hidden, weight)
    expected = cross_entropy(linear(*used), labels, reduction="sum")
    expected_gradient = gradients(3 * expected, used)
    actual = ChunkedLoss.apply(hidden, weight, bias if with_bias else None, labels, True)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    assert relative_error(gradients(3 * actual, used), expected_gradient) <= 1e-13


@pytest.mark.parametrize("given", [3.0, 3.0 * (1 + 1e-9), 0.7, 0.0])
def test_what_the_backward_is_expected_to_be_handed_changes_no_gradient(given):
    hidden, weight, bias, labels = make_inputs(13)
    used = (hidden, weight, bias)
    truth = gradients(given * cross_entropy(linear(*used), labels, reduction="sum"), used)
    loss = ChunkedLoss.apply(hidden, weight, bias, labels, True, False, 3.0)
    actual = gradients(given * loss, used)
    if given:
        assert relative_error(actual, truth) <= 1e-13
    else:
        assert not any(gradient.any() for gradient in actual.values())


class Scaled(TorchDispatchMode):
    """Counts how many products with a number were taken of tensors of some size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_product = "mul" in str(function) and "mm" not in str(function)
        self.count += is_product and args[0].numel() == self.size
        return function(*args, **(kwargs or {}))


def test_the_gradient_of_a_head_is_not_scaled_once_more_while_training(tmp_path, monkeypatch):
    watch = Scaled(48 * 16)
    backward = ChunkedLoss.backward

    def watched(ctx, grad):
        with watch:
            return backward(ctx, grad)

    monkeypatch.setattr(ChunkedLoss, "backward", watched)
    trainer, _ = train(tmp_path, per_device_train_batch_size=3, max_steps=1)
    assert trainer.shortcuts.chunked_loss
    assert watch.count == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_no_worse_than_over_all_logits(dtype):
    hidden, weight, _, labels = make_inputs(200, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = gradients(cross_entropy(linear(*wide), labels), wide)
    stock_loss = cross_entropy(linear(hidden, weight).float(), labels)
    stock = relative_error(gradients(stock_loss, (hidden, weight)), truth)
    weight.grad = None
    weight.grad_dtype = torch.float32  # as `accumulate_grads_in_fp32` has it
    loss = ChunkedLoss.apply(hidden, weight, None, labels, True) / len(labels)
    assert loss.dtype is torch.float32
    actual = gradients(loss, (hidden, weight))
    assert not torch.equal(actual["1"], actual["1"].to(dtype).float())  # never rounded to it
    assert relative_error(actual, truth) <= 1.5 * stock


def test_a_frozen_head_gets_no_gradient_and_a_second_backward_is_refused():
    hidden, weight, _, labels = make_inputs(7)
    loss = ChunkedLoss.apply(hidden, weight.requires_grad_(False), None, labels, True)
    loss.backward(retain_graph=True)
    assert weight.grad is None
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


# ---- in a model --------------------------------------------------------------------------------


def train(tmp_path, **options):
    recorder = Recorder()
    defaults = {"learning_rate": 0.0, "effective_batch_size": 8, "remove_unused_columns": False}
    trainer = make_trainer(tmp_path, ROWS, callbacks=[recorder], **(defaults | options))
    with float64_everywhere():
        trainer.train()
    return trainer, recorder.gradients[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2", "phi", "mixtral"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_chunks_do_not_change_the_gradient(tmp_path, name, layout):
    case = Case(name, "causal")
    model = case.build()
    rows = case.rows()
    with float64_everywhere():
        expected = reference_gradient(model, rows, case.collator(model))
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        rows,
        model=model,
        callbacks=[recorder],
        data_collator=case.collator(model),
        learning_rate=0.0,
        effective_batch_size=len(rows),
        remove_unused_columns=False,
        chunked_loss=True,
        layout=layout,
        max_tokens_per_micro_batch=30,
    )
    with float64_everywhere():
        trainer.train()
    assert trainer.shortcuts.chunked_loss
    assert relative_error(recorder.gradients[0], expected) <= 1e-10


class SeenLogits(TorchDispatchMode):
    """Notes the most rows, and the types, of tensors that are as wide as the vocabulary."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.most_rows, self.dtypes = vocab, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim > 1 and out.shape[-1] == self.vocab:
            self.most_rows = max(self.most_rows, out.numel() // self.vocab)
            self.dtypes.add(out.dtype)
        return out


@pytest.mark.parametrize("chunked", [True, False])
def test_all_logits_of_a_micro_batch_are_never_there_at_once(monkeypatch, chunked):
    monkeypatch.setattr(chunked_loss, "_ROWS_ON_CPU", 20)  # more than the transposed weight has
    model = tiny_llama().train()
    labels = pad(ROWS)["labels"]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=0).clamp_min(0)
    inputs = {**pad(ROWS), "labels": shifted, "shift_labels": shifted}
    head = find_head(model)
    owner = find_owner(model, head) if chunked else None
    with without_logits(owner, head), SeenLogits(model.config.vocab_size) as seen:
        model(**inputs).loss.backward()
    equal_chunks = math.ceil(labels.numel() / math.ceil(labels.numel() / 20))
    assert seen.most_rows == (equal_chunks if chunked else labels.numel())


def test_autocast_computes_what_it_computes_over_logits():
    model = tiny_llama(dtype=torch.float32).train()
    labels = torch.randint(3, 48, (2, 9))
    inputs = {"input_ids": labels, "labels": labels, "shift_labels": labels}
    results = []
    for owner in (None, model):
        with without_logits(owner, model.lm_head):
            with torch.autocast("cpu", torch.bfloat16), SeenLogits(48) as seen:
                loss = model(**inputs).loss
            assert seen.dtypes == {torch.bfloat16, torch.float32}
            results.append((loss.detach(), gradients(loss, list(model.parameters()))))
    (expected, expected_gradient), (actual, actual_gradient) = results
    assert actual.dtype is torch.float32
    assert abs(float(actual - expected)) < 1e-3 * float(expected)
    assert relative_error(actual_gradient, expected_gradient) < 1e-2


class SquashesLogits(LlamaForCausalLM):
    """Caps its logits, in place and so little that a loss would hardly tell."""

    def __init__(self, config):
        super().__init__(config)
        squash = of_no_user(lambda module, args, out: out.mul_(1 + 1e-7))
        self.lm_head.register_forward_hook(squash)


class DoublesLoss(LlamaForCausalLM):
    """Has a loss of its own."""

    @property
    def loss_function(self):
        return lambda **kwargs: 2 * super(DoublesLoss, self).loss_function(**kwargs)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Case("gemma2", "causal").build(), "does something to its logits"),
        (lambda: Case("granite", "causal").build(), "does something to its logits"),
        (lambda: SquashesLogits(tiny_llama().config).double(), "does something to its logits"),
        (lambda: DoublesLoss(tiny_llama().config).double(), "not Transformers' loss"),
        (
            lambda: peft.get_peft_model(
                tiny_llama(use_cache=False),
                peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]),
            ),
            "more than multiply",
        ),
    ],
    ids=["soft cap", "scaling", "in place", "own loss", "LoRA on the head"],
)
def test_a_model_whose_loss_needs_more_than_the_head_keeps_its_logits(tmp_path, make, reason):
    model = make()
    trainer, gradient = train(tmp_path, model=model)
    assert reason in trainer.shortcuts.reason("chunked_loss")
    assert not trainer.shortcuts.chunked_loss
    _, expected = train(tmp_path, model=model, target_only_logits=False)
    assert relative_error(gradient, expected) <= 1e-10


def test_an_adapter_below_the_head_takes_chunks(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(use_cache=False), config)
    trainer, gradient = train(tmp_path, model=model)
    assert trainer.shortcuts.chunked_loss
    _, expected = train(tmp_path, model=model, chunked_loss=False)
    assert relative_error(gradient, expected) <= 1e-10


def test_nothing_of_a_chunked_loss_stays_on_the_model(tmp_path):
    model = tiny_llama()
    before = set(vars(model)), set(vars(model.lm_head))
    train(tmp_path, model=model, max_steps=1)
    assert before[1] == set(vars(model.lm_head))
    assert "_loss_function" not in vars(model)
    copy.deepcopy(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, "compile"),
        ({"target_only_logits": False}, "needs target_only_logits"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_chunks_that_were_asked_for_and_cannot_be_are_an_error(tmp_path, options, reason):
    with pytest.raises(ConfigError, match=reason):
        train(tmp_path, chunked_loss=True, **options)


# ---- the gradient of a head in half precision --------------------------------------------------


class Moved(TorchDispatchMode):
    """Adds up the bytes of matrices as large as the head that an operation reads or writes."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.bytes, self.least_wide = shape, 0, 8

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "view" in str(func) or str(func) in ("aten.t.default", "aten.detach.default"):
            return out
        for x in (*args, out):
            if isinstance(x, torch.Tensor) and x.shape == self.shape:
                self.bytes += x.numel() * x.element_size()
                self.least_wide = min(self.least_wide, x.element_size())
        return out


def sum_chunks(scores, rows, *, chunk, dtype=torch.float32):
    total = None
    with Moved(torch.Size((scores.shape[1], rows.shape[1]))) as moved:
        for start in range(0, len(rows), chunk):
            part = scores[start : start + chunk]
            total = add_product(total, part, part.to(rows.dtype), rows[start : start + chunk])
    assert total.dtype is dtype
    return total, moved


@pytest.mark.parametrize("slowly", [True, False])
def test_a_half_precision_head_sums_its_gradient_in_float32(monkeypatch, slowly):
    monkeypatch.setattr(head_gradient, "multiplies_half_slowly", lambda: slowly)
    torch.manual_seed(0)
    scores, rows = torch.randn(90, 31) / 9, torch.randn(90, 12).bfloat16()
    truth = scores.double().t() @ rows.double()
    total, moved = sum_chunks(scores, rows, chunk=10)
    error = float((total - truth).norm() / truth.norm())
    # 9 chunks. In place, 8 bytes for each weight: the sum is read, and written.
    if slowly:
        assert error < 1e-6
        assert moved.least_wide == 4
        assert moved.bytes <= 31 * 12 * (4 + 8 * (8 + 4))
    else:
        assert 1e-4 < error < 1e-2  # each product was rounded to 8 bits
        assert moved.least_wide == 2


def test_a_device_that_adds_into_float32_is_asked_to(monkeypatch):
    """CUDA's own call, with the arguments it takes; no such device is here."""
    calls = []

    def mm(left, right, *, out_dtype):
        calls.append("mm")
        return left.to(out_dtype) @ right.to(out_dtype)

    def addmm(total, left, right, *, out_dtype, out):
        calls.append("addmm")
        assert out is total
        return out.add_(left.to(out_dtype) @ right.to(out_dtype))

    monkeypatch.setattr(head_gradient, "multiplies_half_slowly", lambda: False)
    adds_into_float32.cache_clear()
    assert not adds_into_float32("cpu", torch.bfloat16)
    adds_into_float32.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        patch.setattr(torch, "addmm", addmm)
        assert adds_into_float32("cpu", torch.bfloat16)
        torch.manual_seed(0)
        scores, rows = torch.randn(40, 31), torch.randn(40, 12).bfloat16()
        total, _ = sum_chunks(scores, rows, chunk=10)
        patch.setattr(torch, "addmm", lambda total, *args, **kwargs: total)  # one that adds nothing
        adds_into_float32.cache_clear()
        assert not adds_into_float32("cpu", torch.bfloat16)
    adds_into_float32.cache_clear()
    assert calls[:6] == ["mm", "addmm", "mm", "addmm", "addmm", "addmm"]
    truth = scores.bfloat16().double().t() @ rows.double()
    assert float((total - truth).norm() / truth.norm()) < 1e-6


# ---- a model that accelerate has spread over devices -------------------------------------------


def test_a_head_that_is_only_placed_takes_chunks_and_keeps_its_hook(tmp_path):
    model, plain = tiny_llama(), tiny_llama()
    dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    for module in (model.lm_head, model.model):  # as with a map of several devices
        add_hook_to_module(module, AlignDevicesHook(torch.device("cpu")))
    forward = model.lm_head.forward
    trainer, gradient = train(tmp_path, model=model, max_steps=1)
    assert trainer.shortcuts.chunked_loss
    assert model.lm_head.forward is forward
    _, expected = train(tmp_path, model=plain, chunked_loss=False, max_steps=1)
    assert relative_error(gradient, expected) <= 1e-10


def test_a_head_whose_weight_is_offloaded_keeps_its_logits():
    head = torch.nn.Linear(4, 6)
    add_hook_to_module(head, AlignDevicesHook(torch.device("cpu"), offload=False))
    model = tiny_llama()
    assert why_not_chunked(model, head) == ""
    head._hf_hook.offload = True
    assert "does more than multiply" in why_not_chunked(model, head)


class Chosen(TorchDispatchMode):
    """Notes on which devices rows are chosen."""

    def __init__(self):
        super().__init__()
        self.devices = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_select.default:
            self.devices.append((args[0].device.type, args[2].device.type))
        return func(*args, **(kwargs or {}))


def test_positions_follow_the_hidden_states_to_their_device():
    """A meta tensor stands in for one on a second device."""
    head = torch.nn.Linear(4, 6, device="meta")
    with kept_rows(head, torch.tensor([0, 3])), Chosen() as chosen:
        logits = head(torch.empty(2, 3, 4, device="meta"))
    assert logits.shape == (1, 2, 6)
    assert chosen.devices == [("meta", "meta")]

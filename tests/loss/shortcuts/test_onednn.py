"""Linear layers that multiply by oneDNN give the same gradient, and are left as they were."""

import peft
import pytest
import torch
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, make_trainer, pad, ragged_rows, tiny_llama
from torch import nn

from hf_gradacc.errors import ConfigError
from hf_gradacc.loss.shortcuts import onednn
from hf_gradacc.loss.shortcuts.chunked import ChunkedLoss
from hf_gradacc.loss.shortcuts.onednn import (
    cpu_family,
    find_linears,
    is_onednn_faster,
    matmul,
    onednn_linears,
    why_no_onednn,
)

pytestmark = pytest.mark.skipif(bool(why_no_onednn()), reason=why_no_onednn() or "it is there")

OP = "mkldnn::_linear_pointwise"
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def smaller_layers(monkeypatch):
    monkeypatch.setattr(onednn, "_SMALLEST_WEIGHT", 2**14)


def wide_llama(**changes):
    return tiny_llama(dtype=torch.float32, **WIDE | changes)


def run(layer, x, *, by_onednn):
    """Value, gradients of input, weight and bias, and how many products oneDNN made."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    with (
        onednn_linears([layer] if by_onednn else []),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
    ):
        y = layer(x)
        (y * torch.arange(y.numel(), device=y.device).view_as(y).sin()).sum().backward()
    gradients = [x.grad] + [p.grad for p in layer.parameters()]
    return y.detach(), gradients, sum(e.count for e in seen.key_averages() if e.key == OP)


def rounding(actual, expected):
    """The error of a float32 tensor as a part of its size; each processor rounds in its own way."""
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 160), (3, 20, 160), (2, 2, 16, 160)])
def test_a_product_and_its_gradients_are_those_of_float64_to_rounding(shape, with_bias):
    torch.manual_seed(0)
    layer = nn.Linear(160, 136, bias=with_bias)
    x = torch.randn(*shape)
    y, gradients, products = run(layer, x, by_onednn=True)
    expected_y, expected, _ = run(layer.double(), x.double(), by_onednn=False)
    assert products == 3
    assert len(gradients) == 2 + with_bias
    for a, b in zip([y, *gradients], [expected_y, *expected], strict=True):
        assert rounding(a, b) <= 1e-6
        assert a.shape == b.shape


def test_rows_that_do_not_lie_in_order_are_taken_in_theirs():
    torch.manual_seed(0)
    layer, x = nn.Linear(160, 136), torch.randn(160, 50).t()
    y, gradients, products = run(layer, x, by_onednn=True)
    other, expected, _ = run(layer.double(), x.double(), by_onednn=False)
    assert products == 3
    for a, b in zip([y, *gradients], [other, *expected], strict=True):
        assert rounding(a, b) <= 1e-6


def test_frozen_weights_cost_no_product_and_get_no_gradient():
    layer = nn.Linear(160, 136).requires_grad_(False)
    _, gradients, products = run(layer, torch.randn(40, 160), by_onednn=True)
    assert products == 2
    assert gradients[1:] == [None, None]


def test_a_gradient_can_be_differentiated_again():
    torch.manual_seed(0)
    layer, x = nn.Linear(160, 136), torch.randn(40, 160)
    penalties = []
    for modules, dtype in (([layer], torch.float32), ([], torch.float64)):
        rows = x.detach().to(dtype).requires_grad_()
        with onednn_linears(modules):
            y = layer.to(dtype)(rows)
            (gradient,) = torch.autograd.grad(y.square().sum(), rows, create_graph=True)
            penalties.append(torch.autograd.grad(gradient.square().sum(), layer.weight)[0])
    assert rounding(*penalties) <= 1e-6


@pytest.mark.parametrize(
    "x",
    [torch.randn(0, 160), torch.randn(31, 160), torch.randn(40, 160, device="meta")],
    ids=["empty", "few", "meta"],
)
def test_what_oneDNN_is_not_for_goes_the_usual_way(x):
    layer = nn.Linear(160, 136, device=x.device)
    assert run(layer, x, by_onednn=True)[2] == 0


def test_autocast_and_float64_go_the_usual_way():
    layer, x = nn.Linear(160, 136), torch.randn(40, 160)
    with onednn_linears([layer]), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    layer.double()  # after it was found
    assert run(layer, x.double(), by_onednn=True)[2] == 0


def test_layers_are_left_as_they_were_whatever_happens_inside():
    layers = [nn.Linear(160, 136) for _ in range(2)]

    def fail():
        with onednn_linears(layers):
            assert all("forward" in vars(layer) for layer in layers)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any("forward" in vars(layer) for layer in layers)


def test_only_large_plain_layers_of_float32_are_found(monkeypatch):
    monkeypatch.undo()

    class More(nn.Linear):
        pass

    hooked = nn.Linear(256, 300)
    hooked.forward = hooked.forward
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(256, 300))
    left_out, found = nn.Linear(256, 300), nn.Linear(256, 300)
    others = [More(256, 300), hooked, parametrized, left_out, nn.Linear(16, 8192)]
    others += [nn.Linear(255, 256), nn.Linear(256, 300).double(), nn.Linear(256, 300).bfloat16()]
    others += [nn.Linear(256, 300, device="meta"), nn.Conv1d(256, 300, 1)]
    model = nn.ModuleList([*others, found])
    assert find_linears(model, leave_out=left_out) == [found]


@pytest.mark.parametrize(
    ("vendor", "family", "instructions", "has_mkl", "expected"),
    [
        ("AuthenticAMD", 26, "AVX512", True, True),
        ("AuthenticAMD", 25, "AVX512", True, False),  # in halves
        ("AuthenticAMD", 0, "AVX512", True, False),
        ("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", 26, "AVX512", True, True),
        ("AuthenticAMD", 26, "AVX2", True, False),  # MKL's kernels are of that kind, too
        ("GenuineIntel", 6, "AVX512", True, False),
        ("AuthenticAMD", 26, "AVX512", False, False),
        ("", 0, "DEFAULT", False, False),
    ],
)
def test_the_choice_goes_by_what_the_machine_is(vendor, family, instructions, has_mkl, expected):
    found = is_onednn_faster(
        vendor=vendor, family=family, instructions=instructions, has_mkl=has_mkl
    )
    assert found is expected


def test_the_family_is_read_where_windows_writes_it(monkeypatch):
    monkeypatch.setattr(onednn, "_cpu_fact", lambda name: "")
    written = "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD"
    monkeypatch.setattr(onednn.platform, "processor", lambda: written)
    assert cpu_family() == 26
    monkeypatch.setattr(onednn.platform, "processor", lambda: "")
    assert cpu_family() == 0


def test_a_chunked_loss_may_multiply_by_oneDNN(monkeypatch):
    monkeypatch.setattr("hf_gradacc.loss.shortcuts.chunked._ROWS_ON_CPU", 60)
    torch.manual_seed(0)
    tensors = [torch.randn(150, 64), torch.randn(300, 64), torch.randn(300)]
    labels = torch.randint(300, (150,))
    results = []
    for by_onednn, dtype in ((True, torch.float32), (False, torch.float64)):
        used = [x.detach().clone().to(dtype).requires_grad_() for x in tensors]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            loss = ChunkedLoss.apply(*used, labels, True, by_onednn)
        loss.backward()
        results.append((loss, {str(i): x.grad.double() for i, x in enumerate(used)}))
        products = sum(event.count for event in seen.key_averages() if event.key == OP)
        assert products == (9 if by_onednn else 0)  # three chunks
    (loss, gradient), (expected_loss, expected) = results
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    assert relative_error(gradient, expected) <= 1e-6


# ---- in a run ----------------------------------------------------------------------------------


def first_gradient(tmp_path, model, rows, **options):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        rows,
        model=model,
        effective_batch_size=len(rows),
        callbacks=[recorder],
        **{"per_device_train_batch_size": 3} | options,
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        trainer.train()
    products = sum(event.count for event in seen.key_averages() if event.key == OP)
    gradient = {name: value.double() for name, value in recorder.gradients[0].items()}
    return gradient, products, trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunked_loss": False},
        {"target_only_logits": False},
        {"gradient_checkpointing": True},
        {"layout": "packed"},
    ],
    ids=lambda options: next(iter(options), "as it comes"),
)
def test_an_update_has_the_gradient_of_the_whole_batch(tmp_path, options):
    rows = ragged_rows(8, seed=4, longest=40)
    gradient, products, _ = first_gradient(
        tmp_path, wide_llama(vocab_size=600), rows, onednn_linear=True, **options
    )
    model = wide_llama(vocab_size=600)
    with float64_everywhere():
        expected = reference_gradient(model.double(), rows, pad)
    assert products > 60
    assert relative_error(gradient, expected) <= 1e-5


@pytest.mark.slow
def test_the_layers_under_an_adapter_multiply_by_it(tmp_path):
    rows = ragged_rows(6, seed=1, longest=40)
    results = []
    for choice in (True, False):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            wide_llama(), peft.LoraConfig(target_modules=["q_proj", "up_proj"], lora_dropout=0.0)
        )
        results.append(first_gradient(tmp_path, model, rows, onednn_linear=choice))
    (gradient, products, _), (expected, none, _) = results
    assert (products > 30, none) == (True, 0)
    assert relative_error(gradient, expected) <= 1e-5


@pytest.mark.slow
def test_it_is_chosen_where_it_suits_the_machine(tmp_path, monkeypatch):
    rows = ragged_rows(4, seed=1, longest=40)
    chosen = []
    for here in (True, False):
        monkeypatch.setattr(
            "hf_gradacc.loss.shortcuts.choose.is_onednn_faster_here", lambda here=here: here
        )
        chosen.append(first_gradient(tmp_path, wide_llama(), rows)[1] > 0)
    assert chosen == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (tiny_llama, {}, "no large linear layer of float32"),
        (wide_llama, {"bf16": True}, "autocast"),
        (wide_llama, {"torch_compile": True, "torch_compile_backend": "eager"}, "compiled"),
    ],
    ids=["float64", "bf16", "compiled"],
)
def test_asked_for_where_it_cannot_be_is_an_error_and_left_to_us_is_none(
    tmp_path, monkeypatch, model, options, why
):
    monkeypatch.setattr("hf_gradacc.loss.shortcuts.choose.is_onednn_faster_here", lambda: True)
    rows = ragged_rows(4, seed=1)
    with pytest.raises(ConfigError, match=f"onednn_linear = True: .*{why}"):
        first_gradient(tmp_path, model(), rows, onednn_linear=True, **options)
    assert first_gradient(tmp_path, model(), rows, **options)[1] == 0


def test_a_machine_without_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "without oneDNN" in onednn.why_no_onednn()


@pytest.mark.slow
def test_two_runs_have_the_same_bits(tmp_path):
    rows = ragged_rows(8, seed=4, longest=40)
    runs = [first_gradient(tmp_path, wide_llama(), rows, onednn_linear=True)[0] for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_product_is_that_of_torch():
    torch.manual_seed(0)
    a, b = torch.randn(33, 70), torch.randn(41, 70)
    assert rounding(matmul(a, b), a.double() @ b.double().t()) <= 1e-6

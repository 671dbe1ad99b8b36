"""Every release people have: refused in words, told of in one line, or trained like any other."""

import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from support.reference import float64_everywhere, reference_gradient, relative_error
from support.tiny import Recorder, log_rows, make_trainer, pad, ragged_rows, tiny_llama
from torch import nn
from transformers import Trainer

import hf_gradacc.trainer
from hf_gradacc import GradAccMixin, VersionError, compat
from hf_gradacc.arguments import GradAccArguments
from hf_gradacc.compat import stock_divides_every_loss
from hf_gradacc.recipe.keys.sections import train_section
from hf_gradacc.trainer import mixin

ROOT = Path(__file__).parent.parent
ROWS = ragged_rows(11, seed=3)


# ---- what is refused, and what is told -------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Pretend that other releases are installed."""
    real = importlib.metadata.version
    versions = {name: f"{newest}.0" for name, newest in compat.NEWEST_TESTED.items()}

    def version(name):
        return versions[name] if name in versions else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delenv("RANK", raising=False)
    return versions


@pytest.fixture
def lines(monkeypatch):
    from transformers.utils import logging

    told = []
    monkeypatch.setattr(
        logging, "get_logger", lambda name: SimpleNamespace(warning_once=told.append)
    )
    return told


def test_releases_that_were_tested_say_nothing(installed, lines):
    installed["torch"] = "2.13.1+cu130"
    compat.check_versions()
    assert not lines


def test_a_torch_that_cannot_sum_in_float32_is_refused_when_the_trainer_is_imported(monkeypatch):
    monkeypatch.setattr(torch, "Tensor", object)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(VersionError, match=r"torch 2\.9\.1\+cu128 is too old.*\n.*2\.10 or later"):
        importlib.reload(hf_gradacc.trainer)


def test_a_nightly_build_of_torch_counts_by_what_it_can_do(installed, lines):
    installed["torch"] = "2.10.0a0+git1234"
    compat.check_versions()
    assert not lines


@pytest.mark.parametrize("version", ["4.57.6", "5.5.4"])
def test_a_transformers_that_counts_in_another_way_is_refused(installed, version):
    installed["transformers"] = version
    with pytest.raises(ImportError, match=f"transformers {version} is too old.*\n.*5.6 or later"):
        compat.check_versions()


def test_newer_releases_get_one_line_on_the_first_rank(installed, lines, monkeypatch):
    installed |= {"torch": "2.15.0", "peft": "1.0.0", "transformers": "5.25.0.dev0"}
    compat.check_versions()
    (line,) = lines
    for part in ("torch 2.15.0", "peft 1.0.0", "transformers 5.25.0.dev0 (tested up to 5.24)"):
        assert part in line
    assert "datasets" not in line
    monkeypatch.setenv("RANK", "3")
    compat.check_versions()
    assert len(lines) == 1


def test_what_is_not_installed_is_not_missed(installed, lines, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    compat.check_versions()
    assert not lines


# ---- what is declared is what is tested ------------------------------------------------------


def pins(name):
    text = (ROOT / "constraints" / name).read_text()
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text.lower().replace("-", "_"), re.MULTILINE))


def test_the_floors_of_the_package_are_the_oldest_releases_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        wanted = Requirement(text)
        (floor,) = (Version(s.version) for s in wanted.specifier if s.operator == ">=")
        ceilings = [s.version for s in wanted.specifier if s.operator not in (">=", "!=")]
        assert all(Version(ceiling).release[1:] in ((), (0,)) for ceiling in ceilings), text
        if wanted.name == "torch":  # other builds than the one at hand are gigabytes
            assert floor.release == (2, 10)
            continue
        oldest = Version(pins("oldest.txt")[wanted.name])
        assert oldest.release[: len(floor.release)] == floor.release, text


def test_the_newest_releases_that_are_tested_are_the_newest_that_say_nothing():
    first = (ROOT / "constraints.txt").read_text()
    newest = dict(re.findall(r"^(\w+)==(\S+)$", first, re.MULTILINE)) | pins("newest.txt")
    for name, version in compat.NEWEST_TESTED.items():
        assert Version(newest[name]).release[:2] == Version(version).release, name


# ---- transformers before 5.19: what the stock step divides -------------------------------------


class Before(Trainer):
    """Decides as the stock step did: a count or a loss function keeps it from dividing."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        has_count = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        self.loss_is_scaled_for_ga = has_count or self.compute_loss_func is not None
        return super().training_step(model, inputs, num_items_in_batch)


class AsBefore(GradAccMixin, Before):
    pass


class Twice(Before):
    """Two backwards a step, as adversarial training has them."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        first = super().training_step(model, inputs, num_items_in_batch)
        return first + super().training_step(model, inputs, num_items_in_batch)


class AsTwice(GradAccMixin, Twice):
    pass


class Divides(Before):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class AsDivides(GradAccMixin, Divides):
    pass


def mean_loss(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels)


def sum_over_count(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("loss", [None, mean_loss, sum_over_count])
@pytest.mark.parametrize(("kind", "factor"), [(AsBefore, 1), (AsTwice, 2), (AsDivides, 1)])
def test_a_stock_step_that_does_not_divide_is_divided_for_and_one_that_does_is_not_divided_twice(
    tmp_path, monkeypatch, kind, factor, loss
):
    if kind is AsDivides and loss is sum_over_count:
        pytest.skip("it passes no count on")
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga", raising=False)
    monkeypatch.setattr(mixin, "_STOCK_DIVIDES", stock_divides_every_loss(Trainer))
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        ROWS,
        trainer_class=kind,
        callbacks=[recorder],
        trainer_options={"compute_loss_func": loss},
        effective_batch_size=len(ROWS),
        per_device_train_batch_size=3,
    )
    model = tiny_llama().train()
    with float64_everywhere():
        trainer.train()
        whole, whole_loss = reference_gradient(model, ROWS, pad), model(**pad(ROWS)).loss.item()
    expected = {name: factor * gradient for name, gradient in whole.items()}
    assert relative_error(recorder.gradients[0], expected) <= 1e-10
    assert "backward" not in vars(trainer.accelerator)
    assert log_rows(trainer)[0]["loss"] == pytest.approx(factor * whole_loss, abs=2e-6)


# ---- names that changed ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for pair in compat.RENAMED_OPTIONS.items() for name in pair])
def test_a_recipe_may_use_an_options_name_of_any_release(name):
    value = {"use_reentrant": False} if name.endswith("kwargs") else True
    options = train_section().model_validate({name: value}).model_dump(exclude_unset=True)
    options = compat.options_as_installed(options, GradAccArguments)
    arguments = GradAccArguments(output_dir="out", use_cpu=True, **options)
    old = compat.RENAMED_OPTIONS.get(name, name)
    assert getattr(arguments, old) == value


def test_what_older_releases_do_not_know_is_as_if_it_were_off():
    assert compat.start_method_of_loader(SimpleNamespace()) is None
    assert compat.is_sharded_by_loading(SimpleNamespace()) is False

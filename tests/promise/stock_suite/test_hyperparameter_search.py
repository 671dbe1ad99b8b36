"""A search over hyperparameters: what a trial draws is what it trains with.

No backend is needed: `Study` stands for one, and calls the trainer as the Optuna one does.
"""

import math
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
from support.line import LineConfig, LineModel, fit_line, logged, near
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_gradacc import GradAccArguments, GradAccTrainer


class Trial:
    """Draws the values that were scripted, one after the other."""

    def __init__(self, number, values):
        self.number, self.values, self.params, self.reports = number, values, {}, []
        self.study = types.SimpleNamespace(_is_multi_objective=lambda: False)

    def draw(self, name, *args, **kwargs):
        self.params[name] = self.values[name]
        return self.values[name]

    suggest_int = suggest_float = suggest_categorical = draw

    def report(self, value, step):
        self.reports.append((step, value))

    def should_prune(self):
        return False


class Study:
    script = ()
    trials = ()
    trained = ()

    @staticmethod
    def ensure_available():
        pass

    @staticmethod
    def default_hp_space(trial):
        return {}

    def run(self, trainer, n_trials, direction, **kwargs):
        Study.trials, Study.trained = [], []
        results = []
        for number in range(n_trials):
            trial = Trial(number, Study.script[number])
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial=trial)
            if getattr(trainer, "objective", None) is None:
                trainer.objective = trainer.compute_objective(trainer.evaluate())
            Study.trials.append(trial)
            Study.trained.append((trainer.state.global_step, list(trainer.state.log_history)))
            results.append((trainer.objective, number))
        objective, number = min(results)
        return BestRun(str(number), objective, Study.trials[number].params)


@pytest.fixture(autouse=True)
def study(monkeypatch):
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Study)
    optuna = types.ModuleType("optuna")
    optuna.__spec__ = ModuleSpec("optuna", None)
    optuna.trial = types.SimpleNamespace(BaseTrial=Trial)
    monkeypatch.setitem(sys.modules, "optuna", optuna)
    return Study


def model_init(trial=None):
    a = 0 if trial is None or "a" not in trial.values else trial.draw("a")
    return LineModel(LineConfig(a=a))


def test_each_trial_begins_with_its_own_model(kind, tmp_path, study):
    study.script = [{"a": -3}, {"a": 2}, {"a": 7}]
    trainer = fit_line(
        kind, tmp_path, model_init=model_init, eval_strategy="epoch", save_strategy="epoch",
        num_train_epochs=2, load_best_model_at_end=True, compute_metrics=near,
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        backend="optuna", n_trials=3, hp_name=lambda trial: f"trial-{trial.number}"
    )
    assert best.hyperparameters == {"a": 2} or best.objective <= 1.0
    assert [len(trial.reports) for trial in study.trials] == [2, 2, 2]
    for number in range(3):
        assert (tmp_path / f"trial-{number}" / "checkpoint-16").is_dir()


def test_a_trial_trains_with_what_it_draws(kind, tmp_path, study):
    study.script = [
        {"learning_rate": 0.1, "per_device_train_batch_size": 4, "num_train_epochs": 1},
        {"learning_rate": 0.3, "per_device_train_batch_size": 16, "num_train_epochs": 2},
    ]

    def hp_space(trial):
        return {name: trial.draw(name) for name in study.script[trial.number]}

    trainer = fit_line(kind, tmp_path, model_init=model_init, logging_steps=1, save_strategy="no")
    trainer.hyperparameter_search(hp_space, backend="optuna", n_trials=2)
    assert [steps for steps, _ in study.trained] == [16, 8]
    for (_, rows), drawn in zip(study.trained, study.script, strict=True):
        assert rows[0]["learning_rate"] == pytest.approx(drawn["learning_rate"])


def test_an_unknown_name_is_told_and_left_out(kind, tmp_path, study):
    study.script = [{"unheard_of": 3}]
    trainer = fit_line(kind, tmp_path, model_init=model_init, max_steps=1, save_strategy="no")
    trainer.hyperparameter_search(
        lambda trial: {"unheard_of": trial.draw("unheard_of")}, backend="optuna", n_trials=1
    )
    assert study.trained[0][0] == 1


def test_a_search_needs_model_init(kind, tmp_path):
    with pytest.raises(RuntimeError, match="model_init"):
        fit_line(kind, tmp_path).hyperparameter_search(backend="optuna", n_trials=1)


TWO_BY_FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("plain", "options"),
    [
        (True, {}),
        (True, TWO_BY_FOUR),
        (False, {}),
        (False, TWO_BY_FOUR),
        (False, {"effective_batch_size": 8}),
        (False, {"tokens_per_update": 9}),
    ],
    ids=str,
)
def test_the_effective_batch_size_can_be_drawn(tmp_path, study, plain, options):
    """A claim of ours: stock has no such option, and leaves the name out."""
    classes = {} if plain else {"arguments_class": GradAccArguments}
    study.script = [{"effective_batch_size": size} for size in (16, 32.0, 5)]
    trainer = fit_line(
        GradAccTrainer, tmp_path, model_init=model_init, logging_steps=1, num_train_epochs=1,
        save_strategy="no", **classes, **options,
    )  # fmt: skip
    trainer.hyperparameter_search(
        lambda trial: {"effective_batch_size": trial.draw("effective_batch_size")},
        backend="optuna",
        n_trials=3,
    )
    for (steps, rows), drawn in zip(study.trained, study.script, strict=True):
        size = drawn["effective_batch_size"]
        assert steps == math.ceil(64 / size)
        assert rows[0]["effective_batch_size"] == size
    assert logged(trainer, "train_loss")

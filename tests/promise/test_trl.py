"""The mixin before TRL's trainers: gradients and metrics of the whole batch at once."""

from __future__ import annotations

import importlib
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments

pytest.importorskip("trl")

import trl
from support.programs import warnings_of
from support.ranks import run_ranks
from support.reference import float64_everywhere, relative_error
from support.trl_cases import (
    CASES,
    IN_PIECES,
    IN_STOCK_PIECES,
    NO_SINGLE_MEAN,
    ROWS_PER_UPDATE,
    WHOLE,
    assert_same,
    chat_rows,
    language_model,
    run,
    run_as_rank,
    sft_rows,
    tokenize,
    tokenizer,
)

from hf_gradacc import GradAccArguments, GradAccMixin, GradAccOptions
from hf_gradacc.arguments import add_options
from hf_gradacc.errors import LossError
from hf_gradacc.loss.refusals import _OF_ROWS, refuse_generating

# TRL's fused head gives float32 gradients of its own weights, whatever the model is in.
TOLERANCE = dict.fromkeys(CASES, 1e-6) | {"reward": 1e-12, "dpo_lora": 1e-12}
OUR_OWN = {"grad_norm", "epoch", "step", "learning_rate"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:trl.*"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
    pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


def metrics_of(row):
    return {key: value for key, value in row.items() if key not in OUR_OWN}


def is_a_time(key):
    return key.endswith(("_runtime", "_time", "_per_second"))


@pytest.fixture(scope="module")
def whole():
    """TRL's own trainers on the whole update at once, where they are right."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = run(name, mixed=False, evaluates=True, **WHOLE)
        return done[name]

    return get


@pytest.fixture(scope="module")
def pieces():
    done = {}

    def get(name):
        if name not in done:
            done[name] = run(
                name, mixed=True, evaluates=True, per_device_eval_batch_size=2, **IN_PIECES
            )
        return done[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_unequal_micro_batches_give_the_gradient_of_trl_on_the_whole_update(name, whole, pieces):
    assert pieces(name).num_micro_batches == [3, 3]  # of 3, 3 and 1 rows
    assert_same(pieces(name).gradients, whole(name).gradients, TOLERANCE[name])


@pytest.mark.parametrize("name", sorted(set(CASES) - {"gkd", "simpo"}))
def test_metrics_are_those_of_trl_on_the_whole_update(name, whole, pieces):
    for mine, theirs in zip(pieces(name).rows, whole(name).rows, strict=True):
        expected = metrics_of(theirs)
        assert len(expected) >= 4
        assert {key: mine[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_trl_itself_averages_metrics_per_micro_batch(name, whole):
    """If this fails, TRL has mended its means, and the tests above prove less than they say."""
    stock = run(name, mixed=False, **IN_STOCK_PIECES)
    assert_same(stock.gradients, whole(name).gradients, TOLERANCE[name])
    row, truth = metrics_of(stock.rows[0]), metrics_of(whole(name).rows[0])
    off = [key for key in truth if row[key] != pytest.approx(truth[key], rel=1e-4)]
    wanted = {"sft": "mean_token_accuracy", "dpo": "logits/rejected", "reward": "max_reward"}
    assert wanted[name] in off


def test_token_accuracy_and_entropy_are_what_the_logits_say(pieces):
    """Nothing of TRL here: plain softmax over the rows of the first update."""
    correct = tokens = 0
    entropy = 0.0
    end = tokenizer().eos_token
    with float64_everywhere():  # weights are drawn in the default dtype
        model = language_model()
    for row in sft_rows()[:ROWS_PER_UPDATE]:
        prompt, answer = tokenize(row["prompt"]), tokenize(row["completion"] + end)
        with float64_everywhere():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits
        logits = logits[0, len(prompt) - 1 : -1]
        log_probs = logits.detach().log_softmax(-1)
        correct += int(log_probs.argmax(-1).eq(torch.tensor(answer)).sum())
        entropy -= float((log_probs.exp() * log_probs).sum())
        tokens += len(answer)
    row = pieces("sft").rows[0]
    assert 0 < correct < tokens == row["tokens_per_update"]
    assert row["mean_token_accuracy"] == pytest.approx(correct / tokens, rel=1e-6)
    assert row["entropy"] == pytest.approx(entropy / tokens, rel=1e-5)


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "kto"])
def test_evaluation_does_not_depend_on_its_batch_size(name, whole, pieces):
    """Five rows: TRL in one batch of 8, the mixin in batches of 2, 2 and 1."""
    theirs, mine = whole(name).evaluation, pieces(name).evaluation
    expected = {key: value for key, value in theirs.items() if not is_a_time(key)}
    expected.pop("eval_num_tokens")  # what was trained so far: nothing
    assert len(expected) >= 4
    assert {key: mine[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("options", [{"padding_free": True}, {"packing": True, "max_length": 40}])
def test_padding_free_rows_give_the_gradient_of_the_same_padded_rows(options):
    """Laid end to end, the first token of each sequence is no target, in TRL's count and ours."""
    rows = {"per_device_train_batch_size": 2, "effective_batch_size": 5, "max_steps": 1}
    end_to_end = run("sft", mixed=True, **rows | options)
    assert end_to_end.num_micro_batches[0] > 1
    stock = dict(options, per_device_train_batch_size=5, max_steps=1)
    if "padding_free" in options:
        stock.pop("padding_free")
    expected = run("sft", mixed=False, **stock)
    assert_same(end_to_end.gradients, expected.gradients, 1e-6)
    for key in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert end_to_end.rows[0][key] == pytest.approx(expected.rows[0][key], rel=1e-6)


def test_label_smoothing_stays_trls_own():
    smoothed = {"label_smoothing_factor": 0.2, "max_steps": 1}
    expected = run("sft", mixed=False, **WHOLE, **smoothed)
    plain = run("sft", mixed=False, **WHOLE, max_steps=1)
    actual = run("sft", mixed=True, **IN_PIECES, **smoothed)
    assert_same(actual.gradients, expected.gradients, 1e-6)
    with pytest.raises(AssertionError):
        assert_same(plain.gradients, expected.gradients, 1e-3)


def test_pairs_are_planned_by_what_both_answers_cost():
    """Each row of a DPO batch is two, as wide as the longest of both."""
    seen = []

    def note(trainer):
        def hook(module, args, kwargs):
            if module.training:
                seen.append(tuple(kwargs["input_ids"].shape))

        trainer.model.register_forward_pre_hook(hook, with_kwargs=True)

    options = {"effective_batch_size": 7, "max_tokens_per_micro_batch": 120, "layout": "padded"}
    run("dpo", mixed=True, prepare=note, **options)
    assert max(rows * width for rows, width in seen) <= 120
    assert max(rows for rows, _ in seen) > 2
    first = [width for _, width in seen[: len(seen) // 2]]
    assert len(set(first)) > 1
    assert first == sorted(first, reverse=True), "the longest first"


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_pairs_stay_together_when_an_update_is_cut_again_for_memory(name, whole):
    failed = []

    def break_once(trainer):
        def hook(module, args, kwargs):
            rows = kwargs["input_ids"].shape[0]
            if module.training and rows > 4:
                failed.append(rows)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

        trainer.model.register_forward_pre_hook(hook, with_kwargs=True)

    pieces = dict(IN_PIECES, max_tokens_per_micro_batch=10_000)
    actual = run(name, mixed=True, prepare=break_once, **pieces)
    assert failed
    assert_same(actual.gradients, whole(name).gradients, TOLERANCE[name])
    for mine, theirs in zip(actual.rows, whole(name).rows, strict=True):
        expected = metrics_of(theirs)  # num_tokens among them: nothing counted twice
        assert {key: mine[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_asking_the_model_before_training_leaves_no_metrics():
    kept = []
    run("sft", mixed=True, prepare=kept.append, max_steps=1, **IN_PIECES)
    assert not kept[0]._metrics["eval"]


def test_a_skipped_update_leaves_no_metrics(whole):
    spoilt = []

    def spoil_first(trainer):
        def hook(module, args, output):
            if module.training and not spoilt:
                spoilt.append(True)
                output.last_hidden_state = output.last_hidden_state * torch.nan
            return output

        trainer.model.model.register_forward_hook(hook)

    options = dict(IN_PIECES, on_non_finite="skip")
    skipped, trained = run("sft", mixed=True, prepare=spoil_first, **options).rows
    assert spoilt
    assert "entropy" not in skipped
    first, second = (row["num_tokens"] for row in whole("sft").rows)
    assert trained["num_tokens"] == second - first
    assert 0 < trained["entropy"] < 6


@pytest.fixture(scope="module")
def ranks():
    """Seven rows on two ranks: four against three, so the ranks run different numbers of passes."""
    return run_ranks(
        run_as_rank,
        2,
        names=["sft", "dpo", "orpo", "dpo_aot"],
        per_device_train_batch_size=1,
        per_device_eval_batch_size=2,
        effective_batch_size=ROWS_PER_UPDATE,
    )


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_two_ranks_agree_with_one(name, ranks, pieces):
    for rank in ranks:
        gradients, rows, evaluation = rank[name]
        assert_same(gradients, pieces(name).gradients, 1e-6)
        for mine, theirs in zip(rows, pieces(name).rows, strict=True):
            keys = {"loss", "entropy", "mean_token_accuracy", "num_tokens"} & set(theirs)
            keys |= {key for key in theirs if "/" in key}
            assert len(keys) >= 4
            assert {k: mine[k] for k in keys} == pytest.approx(
                {k: theirs[k] for k in keys}, rel=1e-6, abs=1e-9
            )
        for key, value in pieces(name).evaluation.items():
            if not is_a_time(key):  # the last batches are filled up with rows that count already
                assert evaluation[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


def test_ranks_of_an_older_trainer_do_not_wait_for_each_other_in_a_forward(ranks):
    """It gathers its metrics in every one, and the ranks run four and three micro-batches."""
    expected = run("orpo", mixed=False, **WHOLE).rows[0]
    for rank in ranks:
        _, rows, _ = rank["orpo"]
        for key in ("rewards/chosen", "rewards/accuracies", "logps/rejected"):
            assert rows[0][key] == pytest.approx(expected[key], rel=1e-6), key


REASONS = {
    "orpo": "ORPOTrainer adds a mean over the tokens of the chosen answers",
    "kto_kl": "mean KL of its micro-batch",
    "dpo_aot": "sorts the pairs",
    "tpo_alpha": "tpo_alpha = 0.5 adds a mean over the tokens",
}
TERMS = ("cpo", "orpo", "tpo_alpha")


def in_pieces(name):
    """TRL's KTO makes pairs of the rows of each batch when it prepares them: its size stays."""
    return WHOLE | {"max_tokens_per_micro_batch": 90} if name == "kto_kl" else IN_PIECES


@pytest.mark.parametrize("name", NO_SINGLE_MEAN)
def test_terms_and_coupled_rows_give_the_gradient_of_trl_on_the_whole_update(name):
    with warnings_of("hf_gradacc") as warnings:
        mine = run(name, mixed=True, **in_pieces(name))
    said = "\n".join(warnings)
    assert "no cut of an update" not in said
    assert ("each term of the loss" if name in TERMS else "compares rows with each other") in said
    whole = run(name, mixed=False, **WHOLE)
    assert min(mine.num_micro_batches) > 1
    assert_same(mine.gradients, whole.gradients, 1e-12)
    losses = [[row["loss"] for row in one.rows] for one in (mine, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_the_mean_kl_of_kto_is_above_zero_here():
    """Below it is cut off, and rows would not be compared at all."""
    kl = [row["kl"] for row in run("kto_kl", mixed=False, **WHOLE).rows]
    assert min(kl) > 0.1


def one_mean(trainer):
    """Weigh its micro-batches by one count, as was done before terms."""
    trainer._loss_settler.added = None


@pytest.mark.parametrize("name", ["orpo", "tpo_alpha", "kto_kl", "dpo_aot"])
def test_one_mean_of_them_in_one_pass_is_another_gradient_and_a_line_says_why(name):
    with warnings_of("hf_gradacc") as warnings:
        mine = run(name, mixed=True, prepare=one_mean, update_passes=1, **in_pieces(name))
    assert REASONS[name] in "\n".join(warnings)
    whole = run(name, mixed=False, **WHOLE).gradients
    errors = [relative_error(a, b) for a, b in zip(mine.gradients, whole, strict=True)]
    assert max(errors) > 1e-4


def test_two_ranks_compare_the_rows_of_both(ranks):
    whole = run("dpo_aot", mixed=False, **WHOLE)
    for rank in ranks:
        gradients, rows, _ = rank["dpo_aot"]
        assert_same(gradients, whole.gradients, 1e-12)
        assert rows[0]["loss"] == pytest.approx(whole.rows[0]["loss"], rel=1e-12)


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_older_trainers_of_pairs_log_the_metrics_of_the_whole_update(name):
    """And nothing of what was collected when the model was asked."""
    rows = run(name, mixed=True, **IN_PIECES).rows
    expected = run(name, mixed=False, **WHOLE).rows
    for key in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
        assert rows[0][key] == pytest.approx(expected[0][key], rel=1e-6), key


def trainers_of_trl():
    """Every trainer in TRL's source, `trl.experimental` included: its name, and its module."""
    root, found = Path(trl.__file__).parent, {}
    for path in sorted(root.rglob("*.py")):
        if {"trainer", "experimental"} & set(path.parts[-4:]):
            module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
            for name in re.findall(r"^class ([A-Z]\w*Trainer)\(", path.read_text("utf-8"), re.M):
                found.setdefault(name, module)
    return found


@pytest.mark.parametrize("name", trainers_of_trl())
def test_every_trainer_of_trl_is_tested_to_train_or_refused_by_name(name):
    page = Path(__file__).resolve().parents[2] / "docs" / "subclassing.md"
    assert f"`{name}`" in page.read_text("utf-8"), "and the page says which"
    if name in _OF_ROWS:
        assert name in {f"{case.trainer}Trainer" for case in (CASES | NO_SINGLE_MEAN).values()}
        return
    stock = getattr(importlib.import_module(trainers_of_trl()[name]), name)
    with pytest.raises(LossError, match="Trainer generates what it trains on"):
        type("Mixed", (GradAccMixin, stock), {})()  # before it loads anything


@pytest.mark.parametrize("options", [{"lmbda": 0.5}, {"seq_kd": True}])
def test_a_distillation_that_generates_is_refused_with_the_setting_that_does_not(tmp_path, options):
    with pytest.raises(LossError, match=r"Set lmbda = 0.0 and seq_kd = False"):
        CASES["gkd"].make(tmp_path, mixed=True, **options)


def test_a_trainer_that_a_later_trl_brings_trains_unless_it_builds_batches_of_its_own():
    def later(**members):
        return type("NewTrainer", (Trainer,), {"__module__": "trl.trainer.new_trainer", **members})

    refuse_generating(later(compute_loss=None, training_step=None))
    builds = later(_prepare_inputs=None, generate_answers=None)
    own = type("OwnTrainer", (builds,), {"__module__": "elsewhere"})
    for kind in (builds, own):
        with pytest.raises(LossError, match="not known here, and it has _prepare_inputs, generate"):
            refuse_generating(kind)
    assert len(trainers_of_trl()) >= 20


def test_only_what_the_assistant_says_is_counted_and_trained(pieces):
    """All tokens: prompt and answer. The assistant's: its words and the end of its turn."""
    told = [
        [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        for row in chat_rows()[:ROWS_PER_UPDATE]
    ]
    words = sum(len(tokenize(text)) + 1 for turns in told for text in turns)
    assert pieces("sft_assistant").rows[0]["tokens_per_update"] == words
    rows = sft_rows()[:ROWS_PER_UPDATE]
    # The first token of a row has nothing before it; the end of the answer is a target.
    every = sum(len(tokenize(row["prompt"] + row["completion"])) for row in rows)
    assert pieces("sft_all_tokens").rows[0]["tokens_per_update"] == every


def configs_of_trl():
    """Every class of arguments in TRL's source."""
    root, found = Path(trl.__file__).parent, {}
    for path in sorted(root.rglob("*_config.py")):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for name in re.findall(r"^class ([A-Z]\w*Config)\(", path.read_text("utf-8"), re.M):
            found[name] = module
    return found


@pytest.mark.parametrize("name", configs_of_trl())
def test_every_config_of_trl_takes_our_options_before_it_behind_it_and_when_it_is_made(
    tmp_path, name
):
    stock = getattr(importlib.import_module(configs_of_trl()[name]), name)
    if not issubclass(stock, TrainingArguments):
        pytest.skip("no arguments of a trainer")
    more = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    if name == "ServerDistillationConfig":
        more["teacher_model_server_url"] = "http://localhost"
    for bases in ((GradAccOptions, stock), (stock, GradAccOptions)):
        made = dataclass(type("Both", bases, {}))(effective_batch_size=8, **more)
        assert (made.effective_batch_size, made.layout) == (8, "auto")
    plain = stock(**more)
    add_options(plain)
    copied = pickle.loads(pickle.dumps(plain))
    assert copied.to_dict() == plain.to_dict()
    assert copied.layout == "auto"


@pytest.mark.parametrize("kind", [TrainingArguments, GradAccArguments, trl.SFTConfig])
def test_a_trainer_that_converts_its_arguments_keeps_our_options(tmp_path, kind):
    more = {"effective_batch_size": 6} if kind is GradAccArguments else {}
    given = kind(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        **{"use_cpu": True, "report_to": "none", "bf16": False, **more},
    )
    trainer = type("Mixed", (GradAccMixin, trl.SFTTrainer), {})(
        language_model(),
        given,
        train_dataset=datasets.Dataset.from_list(sft_rows()),
        processing_class=tokenizer(),
    )
    trainer.train()
    size = 6 if kind is GradAccArguments else 2
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert trainer.get_total_train_batch_size(trainer.args) == size
    assert isinstance(trainer.args, trl.SFTConfig)
    assert type(given).__name__.endswith(kind.__name__)

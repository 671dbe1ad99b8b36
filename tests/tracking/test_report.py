"""Reports made from files of a run, checked as what a reader gets: the page, the picture."""

from __future__ import annotations

import json
import math
import re
import sys
from xml.etree import ElementTree

import pytest

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.text import quantity
from hf_gradacc.tracking.report import build_report
from hf_gradacc.tracking.report.data import load_runs
from hf_gradacc.tracking.report.plots import Series, draw_chart, log_ticks, thin_out, ticks_of
from hf_gradacc.tracking.run_files import RunFile


def write_run(directory, *, updates=40, scale=1.0, events=True, **facts):
    run_file = RunFile(directory)
    run_file.start(step=0)
    run_file.update_run(
        {
            "run_name": directory.name,
            "batch": {
                "requested": {"effective_batch_size": None, "per_device_train_batch_size": 4}
                | {"gradient_accumulation_steps": 8},
                "effective_batch_size": 32,
                "world_size": 1,
                "max_tokens_per_micro_batch": 2048,
            },
            "model": {
                "class": "LlamaForCausalLM",
                "name_or_path": None,
                "num_parameters": 1_618_240,
                "num_trainable_parameters": 20_000,
                "dtypes": ["float32"],
            },
            "training_arguments": {"optim": "adamw_torch", "learning_rate": 3e-3, "seed": 7},
            "hardware": {"device": "cpu", "world_size": 1, "platform": "Linux"},
            "versions": {"torch": "2.13.0"},
            "resumed_at": [20] if events else [],
            "finished": True,
            **facts,
        }
    )
    for step in range(1, updates + 1):
        row = {
            "loss": scale * 5 / step + 1,
            "learning_rate": 3e-3,
            "tokens_per_update": 1800.0,
            "input_tokens_per_update": 4000.0,
            "effective_batch_size": 32.0,
            "micro_batches_per_update": 3.0,
            "padding_fraction": 0.06,
            "target_tokens_seen": 1800 * step,
            "target_tokens_per_second": 3000.0,
            "grad_norm": 1.0,
            "data_seconds": 0.06,
            "forward_backward_seconds": 0.42,
            "reduction_seconds": 0.0,
            "optimizer_seconds": 0.12,
        }
        if step > 10:
            row |= {"gradient_noise_scale": 900.0 * step, "gradient_noise_scale_low": 500.0 * step}
        run_file.append({"kind": "train", "step": step, **row})
    run_file.append({"kind": "eval", "step": updates, "eval_loss": 1.5, "eval_perplexity": 4.48})
    if events:
        text = "no room on rank 0 <script>; cut again at 1,024"
        run_file.append({"kind": "event", "step": 5, "event": "out_of_memory", "text": text})
        verdict = {"event": "noise_scale_verdict", "word": "too small", "text": "Larger would pay."}
        run_file.append({"kind": "event", "step": updates + 1, **verdict})
    run_file.append({"kind": "end", "step": updates, "train_runtime": 103.0})
    return directory


def read(path):
    return path.read_text("utf-8")


def test_a_page_about_one_run_needs_nothing_but_itself(tmp_path):
    build_report([write_run(tmp_path / "mine")], html=tmp_path / "docs" / "page.html")
    page = read(tmp_path / "docs" / "page.html")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|<script|https?://""", page)
    for panel in ("Loss", "Learning rate", "Tokens per update", "Padding", "Throughput"):
        assert f"<h3>{panel}" in page
    assert "Gradient noise scale" in page
    assert "Model FLOPs" not in page, "a panel without data is left out"


def test_every_plot_is_well_formed_and_stays_in_its_frame(tmp_path):
    build_report([write_run(tmp_path / "mine")], html=tmp_path / "page.html")
    plots = re.findall(r"<svg.*?</svg>", read(tmp_path / "page.html"), flags=re.DOTALL)
    assert len(plots) == 8
    for plot in plots:
        root = ElementTree.fromstring(plot)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for circle in root.iter("circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height
        for path in root.iter("path"):
            numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]
            assert all(0 <= n <= width for n in numbers)


def test_the_settings_stand_in_words(tmp_path):
    (run,) = load_runs([write_run(tmp_path / "mine")])
    words = " ".join(run.in_words())
    assert "LlamaForCausalLM has 1.62M parameters" in words
    assert "20k of them were trained" in words
    assert "32 sequences (4 per device × 8 accumulation steps × 1 ranks)" in words
    assert "3 micro-batches on average, at most 2,048 tokens each" in words
    assert "resumed after update 20" in words


def test_events_are_listed_and_marked_and_their_text_is_only_text(tmp_path):
    build_report([write_run(tmp_path / "mine")], html=tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    assert "no room on rank 0 &lt;script&gt;" in page
    assert page.count('class="event"') == 2 * 8  # this one and the resume, in every plot
    assert "<td>20</td><td>resumed</td>" in page
    assert "The batch was too small" in page
    assert "noise_scale_verdict" not in page


def test_a_name_is_only_text_wherever_it_stands(tmp_path):
    name = '<img src=x onerror="alert(1)"> & co'
    runs = [write_run(tmp_path / str(n), run_name=f"{name} {n}") for n in range(2)]
    for directories in (runs[:1], runs):
        build_report(directories, html=tmp_path / "page.html")
        page = read(tmp_path / "page.html")
        assert "<img" not in page
        assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt; &amp; co" in page


def test_a_long_and_troubled_run_has_a_page_that_still_opens(tmp_path):
    directory = write_run(tmp_path / "long", updates=5_000)
    with RunFile(directory).log_path.open("a") as log:
        for step in range(1, 3_001):
            row = {"kind": "event", "step": step, "event": "skipped_update", "text": "not finite"}
            log.write(json.dumps(row) + "\n")
        log.write('{"kind": "train", "step": 5001, "lo')  # the run goes on while it is read
    build_report([directory], html=tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    assert len(page) < 1_000_000
    assert page.count("<td>skipped update</td>") < 200
    assert "2,802 more stand in gradacc_log.jsonl" in page
    assert "5,000 updates" in page


def test_a_run_that_has_logged_once_shows_each_number(tmp_path):
    directory = write_run(tmp_path / "one", updates=1, events=False, finished=False)
    build_report([directory], html=tmp_path / "page.html", png=tmp_path / "page.png")
    page = read(tmp_path / "page.html")
    assert "1 update<" in page
    assert "not finished" in page
    (pile,) = re.findall(r"Where time goes <small>.*?</svg>", page)
    areas = re.findall(r'class="area" fill="[^"]*" d="M(.*?)Z"', pile)
    assert len(areas) == 3
    for area in areas:
        xs = {float(place.split()[0]) for place in area.split("L")}
        assert len(xs) == 2, "from the begin of training to the row: an area, not a line"


def test_of_several_runs_the_unfinished_are_named(tmp_path):
    done = write_run(tmp_path / "done")
    going = write_run(tmp_path / "going", finished=False)
    build_report([done, going], html=tmp_path / "page.html")
    assert "· not finished: going</div>" in read(tmp_path / "page.html")


def test_a_run_without_events_has_no_empty_table(tmp_path):
    build_report([write_run(tmp_path / "mine", events=False)], html=tmp_path / "page.html")
    assert "<h2>Events" not in read(tmp_path / "page.html")


def test_several_runs_share_their_plots_over_target_tokens(tmp_path):
    directories = [write_run(tmp_path / "one"), write_run(tmp_path / "two", scale=2, updates=60)]
    build_report(directories, html=tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    assert "2 runs compared" in page
    assert "Over target tokens seen" in page
    legends = re.findall(r'<div class="legend">(.*?)</div>', page)
    assert len(legends) == 2, "who is who once above all panels, and what is dashed"
    assert re.findall(r"</i>(.*?)</span>", legends[0]) == ["one", "two"]
    assert re.findall(r"</i>(.*?)</span>", legends[1]) == ["training", "held out"]
    for name in ("one", "two"):
        assert f"{name}, held out: " in page
    assert page.count("<svg") == 7
    assert "<th>the batch was</th><td>too small</td><td>too small</td>" in page


def test_an_evaluation_stands_at_the_tokens_seen_until_then(tmp_path):
    (run,) = load_runs([write_run(tmp_path / "mine")])
    assert run.points("eval_loss", kind="eval") == [(40 * 1800.0, 1.5)]
    del run._tokens_at[40], run._tokens_at[20]
    assert run.x_of(20) == 20 * 1800.0  # between its neighbours
    assert run.x_of(40) == 39 * 1800.0  # never beyond what is known


def test_a_run_of_the_stock_trainer_is_compared_over_updates(tmp_path):
    stock = tmp_path / "stock" / "checkpoint-4"
    stock.mkdir(parents=True)
    history = [
        {"loss": 4.0 - step / 2, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 1.0, "step": step}
        for step in range(1, 5)
    ]
    state = {"global_step": 4, "log_history": history}
    (stock / "trainer_state.json").write_text(json.dumps(state))
    runs = build_report([write_run(tmp_path / "ours"), stock.parent], html=tmp_path / "page.html")
    assert {run.axis for run in runs} == {"updates"}
    assert runs[1].points("loss")[-1] == (4.0, 2.0)
    assert "Over updates" in read(tmp_path / "page.html")


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    first, second = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    names = [run.name for run in load_runs([first, second])]
    assert names == [str(first), str(second)]
    for directory, name in ((first, "short"), (second, "long")):
        directory.rename(directory.with_name(name))
    names = [run.name for run in load_runs([first.with_name("short"), second.with_name("long")])]
    assert names == ["short", "long"], "both are called run; the directory's name tells"


def test_a_diverged_run_still_has_a_report(tmp_path):
    directory = write_run(tmp_path / "mine")
    RunFile(directory).append({"kind": "train", "step": 41, "loss": float("nan")})
    (run,) = build_report([directory], html=tmp_path / "page.html", png=tmp_path / "page.png")
    assert len(run.points("loss")) == 40


@pytest.mark.parametrize("count", [1, 2])
def test_the_picture_shows_the_same_panels(tmp_path, count):
    directories = [write_run(tmp_path / f"run{number}") for number in range(count)]
    build_report(directories, html=tmp_path / "page.html", png=tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_picture_is_refused_and_the_page_written(tmp_path, monkeypatch):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"hf_gradacc\[plot\]"):
        build_report(
            [write_run(tmp_path / "mine")], html=tmp_path / "page.html", png=tmp_path / "page.png"
        )
    assert (tmp_path / "page.html").exists()


def test_no_run_and_no_rows_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one output directory"):
        build_report([], html=tmp_path / "page.html")
    RunFile(tmp_path / "empty").start(step=0)
    with pytest.raises(DataError, match="no row of training"):
        build_report([tmp_path / "empty"], html=tmp_path / "page.html")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.003, [0, 0.001, 0.002, 0.003]),
        (0, 6_000, [0, 2000, 4000, 6000]),
        (1.28, 5.99, [1, 2, 3, 4, 5, 6]),
        (-0.5, 0.5, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
    ],
)
def test_ticks_are_round_and_begin_at_zero_when_the_data_does(low, high, expected):
    assert ticks_of(low, high) == pytest.approx(expected)


def test_a_flat_line_and_a_single_point_can_be_drawn():
    for points in ([(0, 2.0), (10, 2.0)], [(5, 2.0)], [(0, 0.0)]):
        ElementTree.fromstring(draw_chart([Series("x", "#000", points)], x_label="updates"))
        ticks = ticks_of(points[0][1], points[-1][1])
        assert ticks[0] < points[0][1] < ticks[-1]


def test_log_ticks_span_the_data():
    for low, high in ((900, 1100), (1, 1e6), (0.02, 0.3), (100, 100)):
        ticks = log_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 9


def test_thinning_keeps_means_and_does_not_end_on_the_noise_of_one_point():
    points = [(float(i), float(i % 7)) for i in range(9_999)] + [(9_999.0, 1e6)]
    thin = thin_out([*points[:-1], (9999.0, 3.0)], most=500)
    assert len(thin) <= 500
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(3.0, abs=0.01)
    assert thin_out(points, most=500)[-1][1] < 1e5 + 7, "one of many, as everywhere"
    assert thin_out([(1.0, 2.0, math.inf)] * 3, most=2)[0] == (1.0, 2.0, math.inf)


def test_quantities_are_read_at_a_glance():
    assert [quantity(v) for v in (1803.2, 361_000, 3e-3, 0.0, float("inf"), None)] == [
        "1,803",
        "361k",
        "0.003",
        "0",
        "∞",
        "–",
    ]


def test_the_phases_of_an_update_are_stacked_and_said_in_words(tmp_path):
    (run,) = build_report([write_run(tmp_path / "mine")], html=tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    said = "an update took 0.6 s, 70.0% of it forward and backward, 20.0% optimizer, 10.0% waiting"
    assert said in page
    edges = run.stack(["data_seconds", "forward_backward_seconds", "optimizer_seconds"])
    assert [edge[-1][1] for edge in edges] == pytest.approx([0.0, 0.06, 0.48, 0.6])
    chart = re.search(r"<h3>Where time goes.*?</svg>", page, re.DOTALL)[0]
    assert chart.count('path class="area"') == 3, "what took no time at all is left out"
    assert "forward and backward: 0.42 at" in chart, "its own height, not that of the pile"


def test_runs_that_are_compared_show_no_pile_but_a_share(tmp_path):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two")]
    build_report(runs, html=tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    assert "<h3>Where time goes" not in page
    assert "<th>waiting for data</th><td>10.0%</td><td>10.0%</td>" in page


def test_the_axis_holds_a_band_but_not_one_that_goes_out_of_sight():
    points = [(1.0, 120.0), (2.0, 400.0)]

    def labels(*band):
        chart = draw_chart([Series("B", "red", points, band=band)], x_label="x", log_scale=True)
        ticks = re.findall(r'text-anchor="end">([\d,.k]+)<', chart)
        return float(ticks[0].replace(",", "")), ticks[-1]

    assert labels() == (100, "500")
    assert labels((1.0, 70.0, 900.0), (2.0, 300.0, 500.0)) == (50, "1,000")
    assert labels((1.0, 0.0, math.inf), (2.0, 0.001, 1e9)) == (100, "500")

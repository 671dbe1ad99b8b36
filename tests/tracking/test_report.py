"""Reports made from files of a run, checked as what a reader gets: the page, the picture."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from statistics import fmean
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_gradacc.errors import ConfigError, DataError
from hf_gradacc.text import quantity
from hf_gradacc.tracking.report import build_report, plots
from hf_gradacc.tracking.report.data import load_runs, make_table
from hf_gradacc.tracking.report.panels import PANELS, Line, Panel, Series, choose_series
from hf_gradacc.tracking.report.plots import choose_ticks, draw_panel, draw_svg
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


class Page(HTMLParser):
    """A page as a browser reads it: its elements with their attributes, and its scripts."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(read(path))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and data.strip():
            self.scripts.append(data)

    def tags(self):
        return {tag for tag, _ in self.elements}


def plots_of(page):
    """Each plot's title and its parsed SVG."""
    found = re.findall(
        r'panel">\n<h3>(.*?)(?: <small>.*?)?</h3>.*?(<svg.*?</svg>)', page, re.DOTALL
    )
    return {title: ElementTree.fromstring(svg) for title, svg in found}


def hover_of(page):
    """What the page's script reads: for each panel its lines with their columns."""
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    return {
        title: [(line, data["runs"][line["run"]][line["kind"]]) for line in panel["lines"]]
        for title, panel in zip(plots_of(page), data["panels"], strict=True)
    }


def log_rows(directory, kind):
    lines = (directory / "gradacc_log.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if row["kind"] == kind}


def test_a_page_about_one_run_needs_nothing_but_itself(tmp_path):
    build_report([write_run(tmp_path / "mine")], html=tmp_path / "docs" / "page.html")
    text = read(tmp_path / "docs" / "page.html")
    assert not re.search(r"@import|https?:|fetch|XMLHttpRequest|WebSocket|import\(", text)
    assert set(re.findall(r"""url\(["']?(.)""", text)) <= {"#"}
    page = Page(tmp_path / "docs" / "page.html")
    for _, attributes in page.elements:
        assert not {"src", "srcset", "action", "data"} & set(attributes)
        assert all(value.startswith("#") for key, value in attributes.items() if "href" in key)
    for panel in ("Loss", "Learning rate", "Tokens per update", "Padding", "Throughput"):
        assert f"<h3>{panel}" in text
    assert "Gradient noise scale" in text
    assert "Model FLOPs" not in text, "a panel without data is left out"


def test_the_browser_is_told_to_keep_the_page_from_the_network(tmp_path):
    build_report([write_run(tmp_path / "mine")], html=tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    (policy,) = [a["content"] for tag, a in page.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none';")
    _, script = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy, "or else it would not run at all"


def test_every_plot_is_well_formed_and_stays_in_its_frame(tmp_path):
    build_report([write_run(tmp_path / "mine")], html=tmp_path / "page.html")
    plots = plots_of(read(tmp_path / "page.html"))
    assert len(plots) == 8
    for root in plots.values():
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        shapes = {e.attrib["id"]: e for d in root.iter("defs") for e in d.iter("path")}
        drawn = [(path, 0.0, 0.0) for path in root.iter("path") if path not in shapes.values()]
        for use in root.iter("use"):  # a dot, or an area
            shape = shapes[use.attrib["href"].removeprefix("#")]
            drawn.append((shape, float(use.attrib["x"]), float(use.attrib["y"])))
        for path, right, down in drawn:
            numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]
            for x, y in zip(numbers[::2], numbers[1::2], strict=True):
                assert 0 <= x + right <= width
                assert 0 <= y + down <= height


def test_what_a_plot_refers_to_stands_in_it_and_nowhere_else(tmp_path):
    build_report([write_run(tmp_path / "mine")], html=tmp_path / "page.html")
    seen = set()
    for root in plots_of(read(tmp_path / "page.html")).values():
        names = {e.attrib["id"] for e in root.iter() if "id" in e.attrib}
        values = " ".join(value for e in root.iter() for value in e.attrib.values())
        assert names == set(re.findall(r"#([mp]\w+)", values)), "no hex digits, so no colours"
        assert not names & seen
        seen |= names


def test_what_is_shown_on_hover_is_what_was_logged(tmp_path):
    directory = write_run(tmp_path / "mine")
    build_report([directory], html=tmp_path / "page.html")
    hover = hover_of(read(tmp_path / "page.html"))
    assert list(hover) == [
        *("Loss", "Learning rate", "Tokens per update", "Padding", "Throughput"),
        *("Where time goes", "Gradient norm", "Gradient noise scale"),
    ]
    assert sum(len(lines) for lines in hover.values()) == 13
    for lines in hover.values():
        for line, table in lines:
            rows = log_rows(directory, line["kind"])
            assert table["first"] == table["last"] == list(rows)
            for key in line["keys"]:
                assert table[key] == [row.get(key) for row in rows.values()]
    (scale, _), _ = hover["Gradient noise scale"]
    assert [key.removeprefix("gradient_noise_scale") for key in scale["keys"]] == [
        "",
        "_low",
        "_high",
    ]


def test_on_hover_a_long_run_tells_means_and_of_which_updates(tmp_path):
    directory = write_run(tmp_path / "long", updates=1_501)
    build_report([directory], html=tmp_path / "page.html")
    rows = log_rows(directory, "train")
    for line, table in hover_of(read(tmp_path / "page.html"))["Loss"][:1]:
        assert len(table["x"]) <= 600
        spans = list(zip(table["first"], table["last"], strict=True))
        assert [step for first, last in spans for step in range(first, last + 1)] == list(rows)
        for (first, last), shown in zip(spans, table["loss"], strict=True):
            mean = fmean(rows[step]["loss"] for step in range(first, last + 1))
            assert shown == pytest.approx(mean, rel=1e-5), line


def test_the_settings_stand_in_words(tmp_path):
    (run,) = load_runs([write_run(tmp_path / "mine")])
    words = " ".join(run.describe_run())
    assert "LlamaForCausalLM has 1.62M parameters" in words
    assert "20k of them were trained" in words
    assert "32 sequences (4 per device × 8 accumulation steps × 1 ranks)" in words
    assert "3 micro-batches on average, at most 2,048 tokens each" in words
    assert "resumed after update 20" in words


def test_events_are_listed_and_marked_and_their_text_is_only_text(tmp_path):
    build_report([write_run(tmp_path / "mine")], html=tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    assert "no room on rank 0 &lt;script&gt;" in page
    for root in plots_of(page).values():  # this one and the resume, in every plot
        marks = [group for group in root.iter("g") if group.get("class") == "event"]
        places = [float(re.match(r"M([\d.]+) ", mark.find("path").get("d"))[1]) for mark in marks]
        left, right = 54, 544
        assert places == pytest.approx([left + (right - left) * n / 40 for n in (5, 20)], abs=0.1)
        assert [mark.find("title").text for mark in marks] == [
            "update 5: no room on rank 0 <script>; cut again at 1,024",
            "update 20: the run was resumed from the checkpoint of update 20",
        ]
    assert "<td>20</td><td>resumed</td>" in page
    assert "The batch was too small" in page
    assert "noise_scale_verdict" not in page


def test_nothing_is_read_or_written_if_a_file_cannot_be_drawn(tmp_path):
    with pytest.raises(ConfigError, match=r"--png = .*\.xyz cannot be drawn"):
        build_report([tmp_path / "none"], html=tmp_path / "page.html", png=tmp_path / "plot.xyz")
    assert list(tmp_path.iterdir()) == []


def test_the_ending_of_a_picture_decides_its_type(tmp_path):
    run = write_run(tmp_path / "mine")
    build_report([run], html=tmp_path / "page.html", png=tmp_path / "new" / "plot.svg")
    assert b"<svg" in (tmp_path / "new" / "plot.svg").read_bytes()


def test_a_name_is_only_text_wherever_it_stands(tmp_path):
    name = '</script></svg><img src=x onerror="alert(1)"> & co $x_$ {{ 7 * 7 }}'
    runs = [write_run(tmp_path / str(n), run_name=f"{name} {n}") for n in range(2)]
    for directories in (runs[:1], runs):
        build_report(directories, html=tmp_path / "page.html", png=tmp_path / "page.png")
        text, page = read(tmp_path / "page.html"), Page(tmp_path / "page.html")
        assert "<img" not in text
        assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt; &amp; co $x_$ {{ 7 * 7 }}" in text
        assert "img" not in page.tags()
        assert not any(
            key.startswith("on") for _, attributes in page.elements for key in attributes
        )
        assert len(page.scripts) == 2
        if len(directories) > 1:
            labels = [line["label"] for line, _ in hover_of(text)["Learning rate"]]
            assert labels == [f"{name} 0", f"{name} 1"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_that_has_logged_once_shows_each_number(tmp_path):
    directory = write_run(tmp_path / "one", updates=1, events=False, finished=False)
    build_report([directory], html=tmp_path / "page.html", png=tmp_path / "page.png")
    page = read(tmp_path / "page.html")
    assert "1 update<" in page
    assert "not finished" in page
    pile = plots_of(page)["Where time goes"]
    areas = [path.get("d") for defs in pile.iter("defs") for path in defs.iter("path")]
    assert len(areas) == 3
    for area in areas:
        xs = {float(place.split()[0]) for place in area[1:-1].split("L")}
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
    assert "Over targets seen" in page
    legends = re.findall(r'<div class="legend">(.*?)</div>', page, re.DOTALL)
    assert len(legends) == 2, "who is who once above all panels, and what is dashed"
    assert re.findall(r"</i>(.*?)</span>", legends[0]) == ["one", "two"]
    assert re.findall(r"</i>(.*?)</span>", legends[1]) == ["training", "held out"]
    labels = [line["label"] for line, _ in hover_of(page)["Loss"]]
    assert labels == ["one", "one, held out", "two", "two, held out"]
    assert page.count("<svg") == 7
    assert "<th>the batch was</th><td>too small</td><td>too small</td>" in page


def test_an_evaluation_stands_at_the_tokens_seen_until_then(tmp_path):
    directory = write_run(tmp_path / "mine")
    (run,) = load_runs([directory])
    assert run.points("eval_loss", kind="eval") == [(40 * 1800.0, 1.5)]
    log = directory / "gradacc_log.jsonl"
    lines = [row for row in log.read_text().splitlines() if json.loads(row)["step"] not in (20, 40)]
    log.write_text("\n".join(lines))
    (run,) = load_runs([directory])
    assert run.x_of(20) == 20 * 1800.0  # between its neighbours
    assert run.x_of(40) == 39 * 1800.0  # never beyond what is known


def test_the_evaluation_of_the_model_kept_does_not_bend_the_curve(tmp_path):
    write_run(tmp_path / "one")
    kept = {"kind": "eval", "step": 40, "eval_loss": 9.0, "eval_accuracy": 0.5}
    RunFile(tmp_path / "one").append(kept)
    (run,) = load_runs([tmp_path / "one"])
    assert run.table("eval").points("eval_loss")[1].tolist() == [1.5]
    assert run.last("eval_loss", kind="eval") == 9.0, "this is the model that was saved"


def test_a_single_line_is_named_where_others_might_have_stood(tmp_path):
    write_run(tmp_path / "one")
    RunFile(tmp_path / "one").append({"kind": "eval", "step": 41, "eval_rewards/accuracies": 0.5})
    build_report([tmp_path / "one"], html=tmp_path / "page.html")
    assert "pairs ranked rightly</" in re.sub(r"\s*<", "<", read(tmp_path / "page.html"))


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


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_picture_shows_the_same_panels(tmp_path, monkeypatch, count):
    drawn, draw = [], plots.draw_panel

    def record(axes, panel, series, **options):
        draw(axes, panel, series, **options)
        lines = [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
        drawn.append((panel.title, lines, len(axes.collections), axes.get_ylim(), axes.figure))

    monkeypatch.setattr(plots, "draw_panel", record)
    directories = [write_run(tmp_path / f"run{number}") for number in range(count)]
    build_report(directories, html=tmp_path / "page.html", png=tmp_path / "page.png")
    picture = drawn[-1][-1]
    on_page = [content for *content, figure in drawn if figure is not picture]
    assert on_page == [content for *content, figure in drawn if figure is picture]
    assert [title for title, *_ in on_page] == list(plots_of(read(tmp_path / "page.html")))
    assert [axes.get_title(loc="left") for axes in picture.axes] == [title for title, *_ in on_page]
    curves, marks = (2, 2) if count == 1 else (4, 4)
    assert len(on_page[0][1]) == curves + marks
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_leaves_the_figures_and_the_style_of_its_caller_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 9.0}):
        build_report([write_run(tmp_path / "a")], html=tmp_path / "a.html", png=tmp_path / "a.png")
    build_report([tmp_path / "a"], html=tmp_path / "b.html", png=tmp_path / "b.png")
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plain = [re.sub(r"written [^<]*", "", read(tmp_path / f"{name}.html")) for name in "ab"]
    assert plain[0] == plain[1]


@pytest.mark.slow
def test_only_a_report_loads_matplotlib_and_nothing_loads_pyplot(tmp_path):
    directory = write_run(tmp_path / "mine")
    script = f"""
import sys
from pathlib import Path
import hf_gradacc.cli
from hf_gradacc import *
from hf_gradacc.tracking.report import build_report
assert "matplotlib" not in sys.modules
build_report([Path({str(directory)!r})], html=Path({str(tmp_path / "page.html")!r}))
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_a_run_with_nothing_to_draw_still_has_a_report(tmp_path):
    run_file = RunFile(tmp_path / "mine")
    run_file.start(step=0)
    run_file.append({"kind": "eval", "step": 1, "eval_of_my_own": 0.5})
    build_report([tmp_path / "mine"], html=tmp_path / "page.html", png=tmp_path / "page.png")
    assert plots_of(read(tmp_path / "page.html")) == {}
    assert (tmp_path / "page.png").exists()


def test_the_quality_of_held_out_rows_has_a_panel(tmp_path):
    run_file = RunFile(tmp_path / "mine")
    run_file.start(step=0)
    for step in (1, 2):
        run_file.append({"kind": "eval", "step": step, "eval_f1": step / 4, "eval_rougeL": 0.5})
    build_report([tmp_path / "mine"], html=tmp_path / "page.html")
    assert list(plots_of(read(tmp_path / "page.html"))) == ["Quality"]
    assert "F1, macro" in read(tmp_path / "page.html")


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
    assert choose_ticks(low, high) == pytest.approx(expected)


def draw(points, *, band=None, log_scale=False):
    """The axes of a panel with one line."""
    x, y = np.array(points, dtype=float).T
    axes = Figure().add_subplot()
    line = Series(Line("B", "B"), 0, "B", "red", x, y, band=np.array(band).T if band else None)
    panel = Panel("B", "", (line.line,), log_scale=log_scale)
    draw_panel(axes, panel, [line], x_end=x[-1], x_label="updates")
    ElementTree.fromstring(draw_svg(panel, [line], x_end=x[-1], x_label="updates").svg)
    return axes


def test_a_flat_line_and_a_single_point_can_be_drawn():
    for points in ([(0, 2.0), (10, 2.0)], [(5, 2.0)], [(0, 0.0)]):
        low, high = draw(points).get_ylim()
        assert low < points[0][1] < high


def test_log_ticks_span_the_data():
    for low, high in ((900, 1100), (1, 1e6), (0.02, 0.3), (100, 100)):
        ticks = choose_ticks(low, high, log_scale=True)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 9


def test_thinning_keeps_means_and_does_not_end_on_the_noise_of_one_point():
    def thin(values, most):
        rows = [{"step": step, "value": value} for step, value in enumerate(values)]
        return make_table(rows, list(range(len(rows))), most=most).column("value")

    values = [float(step % 7) for step in range(9_999)]
    means = thin([*values, 3.0], most=500)
    assert len(means) <= 500
    assert fmean(means) == pytest.approx(3.0, abs=0.01)
    assert thin([*values, 1e6], most=500)[-1] < 1e5 + 7, "one of many, as everywhere"
    assert thin([1.0, math.inf, 3.0, math.nan], most=2).tolist() == [1.0, 3.0], "finite ones"
    assert np.isnan(thin([math.nan] * 4, most=2)).all()


def test_an_end_of_a_band_that_was_not_logged_is_infinite():
    rows = [{"step": 1, "low": 2.0}, {"step": 2}, {"step": 3, "low": 3.0, "high": 5.0}]
    band = make_table(rows, [10, 20, 30], most=3).band("low", "high")
    assert band.tolist() == [[10, 30], [2, 3], [math.inf, 5]]


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
    phases = ["data_seconds", "forward_backward_seconds", "optimizer_seconds"]
    _, edges = run.table("train").stack(phases)
    assert edges[:, -1] == pytest.approx([0.0, 0.06, 0.48, 0.6])
    (panel,) = [panel for panel in PANELS if panel.stacked]
    areas = choose_series(panel, [run])
    assert [area.line.key for area in areas] == phases, "what took no time at all is left out"
    for area, floor, top in zip(areas, edges[:-1], edges[1:], strict=True):
        assert (area.floor.tolist(), area.y.tolist()) == (floor.tolist(), top.tolist())
    lines = hover_of(page)["Where time goes"]
    assert [line["label"] for line, _ in lines] == [
        "waiting for data",
        "forward and backward",
        "optimizer",
    ]
    assert {value for _, table in lines for value in table["forward_backward_seconds"]} == {0.42}
    said = plots_of(page)["Where time goes"].get("aria-label")
    assert "forward and backward: from 0.42 to 0.42" in said, "its own height, not the pile's"


def test_runs_that_are_compared_show_no_pile_but_a_share(tmp_path):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two")]
    build_report(runs, html=tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    assert "<h3>Where time goes" not in page
    assert "<th>waiting for data</th><td>10.0%</td><td>10.0%</td>" in page


def test_the_axis_holds_a_band_but_not_one_that_goes_out_of_sight():
    points = [(1.0, 120.0), (2.0, 400.0)]

    def ends(*band):
        return draw(points, band=band, log_scale=True).get_ylim()

    assert ends() == (100, 500)
    assert ends((1.0, 70.0, 900.0), (2.0, 300.0, 500.0)) == (50, 1000)
    assert ends((1.0, 0.0, math.inf), (2.0, 0.001, 1e9)) == (100, 500)


@pytest.mark.slow
def test_a_page_about_a_hundred_thousand_rows_stays_below_a_megabyte(tmp_path):
    directory = write_run(tmp_path / "long", updates=0)
    generator = np.random.default_rng(0)
    keys = {
        key for panel in PANELS for line in panel.lines for key in (line.key, *(line.band or ()))
    }
    with (directory / "gradacc_log.jsonl").open("w") as log:
        for step in range(1, 100_001):
            values = dict(zip(sorted(keys), generator.lognormal(size=len(keys)), strict=True))
            row = {"kind": "train", "step": step, "target_tokens_seen": 1800 * step, **values}
            log.write(json.dumps(row) + "\n")
            if step % 100 == 0:
                log.write(json.dumps({"kind": "eval", "step": step, "eval_loss": 1 / step}) + "\n")
            if step % 50 == 1:
                event = {"event": "out_of_memory", "text": f"no room at {step}; " + "x" * 300}
                log.write(json.dumps({"kind": "event", "step": step, **event}) + "\n")
    build_report([directory], html=tmp_path / "page.html")
    assert len(plots_of(read(tmp_path / "page.html"))) == 10
    assert (tmp_path / "page.html").stat().st_size < 1_000_000

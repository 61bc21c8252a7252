"""The report: what it reads, what it says, and that a run's text stays text."""

import json
import math
import re
import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec

import pytest

from tt_train.records.problems import Problems
from tt_train.records.run_files import read_rows
from tt_train.report import write_report
from tt_train.report.figure import _figure
from tt_train.report.read import differences, flatten, read_run, read_runs, smooth, thin
from tt_train.report.sections import yaml_lines
from tt_train.report.summary import as_count, as_figure, as_percent, as_time, headline, is_expected

CONFIG = "recipe: sft\nadapter:\n  rank: 8\n  target_modules: [q_proj, v_proj]\noptimizer:\n  lr: 0.0002\n"


def rows(steps, **extra):
    return [
        {"step": step, "epoch": step / steps, "loss": 3.0 / step, "lr": 1e-4, "grad_norm": 1.0, "tokens": 100 * step}
        | {"tokens_per_s": 50.0, "memory_gib": 1.5, "elapsed_s": 2.0 * step, "eta_s": 0.0}
        | extra
        for step in range(1, steps + 1)
    ]


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", records=None, *, config=CONFIG, manifest=None, samples=(), tail=""):
        path = tmp_path / name
        path.mkdir()
        lines = [json.dumps(record) + "\n" for record in (rows(5) if records is None else records)]
        (path / "metrics.jsonl").write_text("".join(lines) + tail)
        if config is not None:
            (path / "config.yaml").write_text(config)
        if manifest is not None:
            (path / "manifest.json").write_text(json.dumps(manifest))
        (path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        return path

    return make


def page_of(*paths, **options):
    return write_report(paths, **options)[0].read_text()


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page).group(1))


HAS_MATPLOTLIB = find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason="the PNG needs matplotlib")


@needs_matplotlib
def test_a_run_gets_a_page_and_a_picture_in_its_directory(make_run):
    run = make_run()
    html, png = write_report([run])
    assert (html, png) == (run / "report.html", run / "report.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(list(run.iterdir())) == 5  # nothing half written is left behind


def test_output_is_a_page_or_a_folder(make_run, tmp_path):
    run = make_run()
    png = tmp_path / "a/mine.png" if HAS_MATPLOTLIB else None
    assert write_report([run], tmp_path / "a" / "mine.html") == (tmp_path / "a/mine.html", png)
    assert write_report([run], tmp_path / "b")[0] == tmp_path / "b" / "report.html"
    assert write_report([run, make_run("other")])[0] == tmp_path / "comparison.html"
    with pytest.raises(ValueError, match=r"an \.html page or a folder, found '\.pdf'"):
        write_report([run], tmp_path / "report.pdf")


@pytest.mark.parametrize("name", ["mine.html", "mine.png"])
def test_a_file_that_is_not_a_report_is_not_replaced(make_run, tmp_path, name):
    run = make_run()
    (tmp_path / name).write_text("a day of my work")
    with pytest.raises(FileExistsError, match=f"{name} exists and is not a report of tt; name another page with -o"):
        write_report([run], tmp_path / "mine.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "run"]
    assert (tmp_path / name).read_text() == "a day of my work"
    (tmp_path / name).unlink()
    assert write_report([run], tmp_path / "mine.html") == write_report([run], tmp_path / "mine.html")


def test_what_is_no_run_is_named_with_the_cure(make_run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl in .*nowhere.*tt ls runs") as caught:
        write_report([make_run(), tmp_path / "nowhere"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="at least one run"):
        write_report([])


def test_the_curves_of_the_page_are_those_of_the_file(make_run):
    records = rows(20)
    records[9]["eval_loss"] = records[19]["eval_loss"] = 0.7
    (run,) = data_of(page_of(make_run(records=records)))["runs"]
    assert run["columns"]["step"] == list(range(1, 21))
    assert run["columns"]["loss"] == pytest.approx([3.0 / step for step in range(1, 21)], rel=1e-6)
    assert run["columns"]["eval_loss"] == [None] * 9 + [0.7] + [None] * 9 + [0.7]
    assert len(run["columns"]["smooth"]) == 20


def test_text_of_a_run_is_never_markup(make_run):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    run = make_run(
        "a<b>&",
        config=f"note: {json.dumps(evil)}\n{json.dumps(evil)}: 1\n",
        manifest={
            "command": evil,
            "base_model": evil,
            evil: evil,
            "data": {"rows": 3, "report": {"dropped": {evil: 2}}},
        },
        samples=[{"step": 0, "prompt": evil, "generation": evil, "expected": evil}, {"step": evil, "prompt": evil}],
        tail="{" + evil,
    )
    for page in (page_of(run), page_of(run, make_run("</script>".replace("/", "\u2215"), config=f"note: {evil!r}"))):
        assert page.count("<script") == 2  # the figures and our own
        assert "alert(1)" in page
        assert "<img" not in page
        assert "a<b>" not in page


def test_a_value_that_looks_like_a_slot_of_the_template_stays_as_it_is(make_run):
    page = page_of(make_run(samples=[{"step": 0, "prompt": "{{script}} {{data}}", "generation": "{{nothing}}"}]))
    assert "{{script}} {{data}}" in page
    assert "{{nothing}}" in page


def test_secrets_are_blanked(make_run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-canary-canary")
    run = make_run(manifest={"command": "tt run canary-canary-canary"}, config="note: canary-canary-canary")
    assert "canary" not in page_of(run)


def test_the_page_asks_for_nothing(make_run):
    page = page_of(make_run(samples=[{"step": 0, "prompt": "see http://example.com/x.png", "generation": ""}]))
    markup = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:|//)""", markup)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|<iframe|<link(?! rel=\"icon\" href=\"data:,\")", markup)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "records",
    [
        [],
        rows(1),
        rows(2),
        rows(3, loss=math.nan, grad_norm=math.inf),
        rows(3, loss=0.0, lr=0.0, memory_gib=0.0),
        rows(3, loss=None),
        rows(3, loss="nan"),
        rows(3, loss=10**400),
        [{"step": 1}],
        [{"loss": 1.0}],
        rows(12, loss=-1.0),
    ],
    ids=["none", "one", "two", "nan", "zero", "null", "text", "huge", "bare", "no step", "negative"],
)
def test_odd_rows_still_give_a_report(make_run, records):
    html, png = write_report([make_run(records=records), make_run("other")])
    assert png is None or png.stat().st_size > 1000
    assert "NaN" not in html.read_text().split('id="data">')[1].split("</script>")[0]


def test_what_is_broken_is_left_out_and_named(make_run):
    run = make_run(records=[*rows(2), ["no object"], *rows(3)[2:]], tail='{"step": 4, "lo', config="a: [1\nb: 2")
    read = read_run(run, name="run")
    assert [row["step"] for row in read.rows] == [1, 2, 3]
    page = page_of(run)
    for words in (
        "metrics.jsonl:3: left out",
        "metrics.jsonl:5: left out (the last line, cut",
        "config.yaml: left out",
    ):
        assert words in page
    assert "manifest.json: not there" in page


def test_a_figure_that_is_not_finite_is_named_with_its_step(make_run):
    page = page_of(make_run(records=rows(8, loss=math.nan)))
    assert "step 1: loss was nan" in page
    hidden = 3 if HAS_MATPLOTLIB else 4
    assert f"and {hidden} more like these" in page  # 8 steps and the missing manifest, six shown


def test_problems_of_every_step_are_counted_and_few_are_kept(make_run):
    path = make_run(records=rows(5000, loss=math.nan, grad_norm=math.inf))
    run = read_run(path, name="run")
    assert (len(run.rows), len(run.problems), run.problems.total) == (5000, 100, 10_001)
    assert run.problems[:2] == ["step 1: loss was nan", "step 1: grad_norm was inf"]
    more = 9_995 if HAS_MATPLOTLIB else 9_996  # all but the six shown; that there is no picture is one more
    assert f"and {more:,} more like these" in page_of(path)
    kept = Problems()
    assert sum(1 for _ in read_rows(path / "metrics.jsonl", kept)) == 5000
    assert (len(kept), kept.total) == (100, 10_000)


def test_a_step_written_again_after_a_resume_counts_once(make_run):
    again = [row | {"loss": 9.0} for row in rows(4)[2:]]
    read = read_run(make_run(records=[*rows(4), *again]), name="run")
    assert [row["loss"] for row in read.rows] == [3.0, 1.5, 9.0, 9.0]


def test_a_separator_inside_a_text_does_not_end_the_line(make_run):
    run = make_run()
    (run / "samples.jsonl").write_text('{"prompt": "a\u2028b\u0085c", "generation": "d"}\n', encoding="utf-8")
    assert [sample["prompt"] for sample in read_run(run, name="run").samples] == ["a\u2028b\u0085c"]


def test_yaml_aliases_do_not_unfold(make_run):
    run = make_run(config="a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    assert read_run(run, name="run").config == {}
    assert "config.yaml: left out (aliases" in page_of(run)


def test_runs_of_the_same_name_are_told_apart(make_run, tmp_path):
    (tmp_path / "sub").mkdir()
    names = [run.name for run in read_runs([make_run("one"), make_run("sub/one"), make_run("two")])]
    assert names == [str(tmp_path / "one"), str(tmp_path / "sub/one"), "two"]


MANIFEST = {
    "base_model": "tiny",
    "parameters": 2_000_000,
    "trainable": 5_000,
    "data": {
        "rows": 120,
        "held_out_rows": 7,
        "report": {"truncated": 4, "dropped": {"empty answer": 3, "too long": 2}},
    },
}


def test_headline_figures_come_from_rows_and_manifest(make_run):
    records = rows(10)
    records[3]["eval_loss"], records[9]["eval_loss"] = 0.5, 0.6
    samples = [
        {"step": step, "prompt": prompt, "generation": answer, "expected": "4"}
        for step, prompt, answer in ((0, "2+2", "5"), (10, "2+2", " 4\n"), (0, "1+3", "?"), (10, "1+3", "3"))
    ]
    one = headline(read_run(make_run(records=records, manifest=MANIFEST, samples=samples), name="run"))
    assert (one.steps, one.loss_first, one.loss_over) == (10, 3.0, "last 10 steps")
    assert one.loss_last == pytest.approx(sum(3.0 / step for step in range(1, 11)) / 10)
    assert (one.eval_last, one.eval_best, one.eval_best_step) == (0.6, 0.5, 4)
    assert (one.tokens, one.seconds, one.tokens_per_s, one.memory_gib, one.epochs) == (1000, 20, 50, 1.5, 1)
    assert (one.parameters, one.trainable, one.rows, one.eval_rows, one.truncated) == (2_000_000, 5_000, 120, 7, 4)
    assert (one.dropped, one.lost) == ({"empty answer": 3, "too long": 2}, 5)
    assert (one.matches, one.right) == ((0, 1, 2), 0.5)


def test_the_page_shows_the_headline(make_run):
    page = page_of(make_run(manifest=MANIFEST))
    for words in ("2M", "5,000 trained, 0.25 %", "5 dropped (3 empty answer, 2 too long), 4 cut, 7 held out", "10 s"):
        assert words in page, words


def test_samples_are_shown_before_and_after(make_run):
    samples = [
        {"step": step, "prompt": "p", "generation": f"answer {step}", "expected": "answer 9"} for step in (9, 0, 5)
    ]
    page = page_of(make_run(samples=samples))
    order = [page.index(words) for words in ("Before, step 0", "answer 0", "After, step 9", "answer 9", "answer 5")]
    assert order == sorted(order)
    assert page.count('badge right">right') == 1
    assert page.count('badge wrong">wrong') == 2
    assert '<div class="tag">Expected' not in page  # the last answer says it
    assert "Samples</h2>" not in page_of(make_run("bare"))


def test_an_open_answer_is_never_wrong(make_run):
    """Where many answers would do, only one that is the expected one is said to be."""
    text = "a long answer that could be put in many other words"
    samples = [
        {"step": step, "prompt": f"p{i}", "generation": text if step and i else "another", "expected": text}
        for step in (0, 9)
        for i in (0, 1)
    ]
    page = page_of(make_run(samples=samples))
    assert page.count(">as expected</span>") == 1
    assert ">wrong<" not in page
    assert "Samples as expected" in page
    assert ".badge.same { color: var(--soft); }" in page


def test_turns_of_a_prompt_are_shown_apart_and_rows_are_named_by_where_they_are_from(make_run):
    turns = [{"role": "user", "content": "first <b>"}, {"role": "assistant", "content": "second"}]
    samples = [
        {"step": 0, "prompt": "a", "turns": [*turns, turns[0]], "generation": "x", "held_out": True},
        {"step": 0, "prompt": "b", "turns": turns[:1], "generation": "x", "held_out": False},
        {"step": 0, "prompt": "plain", "turns": "mangled", "generation": "x"},
    ]
    page = page_of(make_run(samples=samples))
    assert 'Prompt of 3 turns</b><span class="source">held-out row</span>' in page
    assert 'Prompt</b><span class="source">row of the training data</span>' in page
    assert page.count("<pre>first &lt;b&gt;</pre>") == 3
    assert "<pre>plain</pre>" in page


def test_rows_and_environment_are_beside_each_other(make_run):
    data = {"report": {"schema": "openai", "form": "chat", "rows": 90, "dropped": {"no answer": 3}, "truncated": 2}}
    data |= {"lengths": {"p50": 40, "p90": 80, "max": 128}, "share_trained": 0.256}
    environment = {"python": "3.11.7", "packages": {"torch": "2.13.0"}, "devices": []}
    page = page_of(make_run("one", manifest={"data": data, "environment": environment}), make_run("two", manifest={}))
    section = page[page.index("<h2>Data and environment") :]
    for fact in ("openai, chat", "3 no answer", "p50 40, p90 80, max 128", "25.6%", "3.11.7", "2.13.0"):
        assert f"<td>{fact}</td><td>" in section  # and a cell for the run that says nothing
    hostile = {"data": {"report": [1], "lengths": {"p50": "<b>"}, "share_trained": "x"}}
    assert "<b>, p90" not in page_of(make_run("three", manifest=hostile))


def test_text_of_a_report_has_enough_contrast():
    """4.5 to 1 on every background, as WCAG 2 (1.4.3) asks, in each of the palettes."""
    css = (files("tt_train.report") / "report.css").read_text()
    blocks = re.findall(r":root.*?\{(.*?)\}", css, re.DOTALL)
    palettes = [dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", block)) for block in blocks]
    palettes = [palette for palette in palettes if "page" in palette]
    assert len(palettes) == 3
    for palette in palettes:
        for ink in ("ink", "soft", "faint", "accent", "good", "bad"):
            for ground in ("page", "card", "wash"):
                dark, light = sorted((luminance(palette[ink]), luminance(palette[ground])))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_the_dark_palettes_are_not_printed():
    css = (files("tt_train.report") / "report.css").read_text()
    dark = [css.index("--page: #111317"), css.rindex("--page: #111317")]
    assert len(set(dark)) == 2
    for place in dark:
        medium = css[:place].rindex("@media")
        assert css[medium:].startswith("@media screen"), css[medium : medium + 60]


def test_a_long_key_or_path_breaks_after_a_sign(make_run):
    page = page_of(make_run(config="recipe: sft\nmodel:\n  path: /models/a_b/1.5\nsamples:\n  max_new_tokens: 3\n"))
    assert '<th scope="row">samples.<wbr>max_<wbr>new_<wbr>tokens</th><td>3</td>' in page
    assert "<td>/models/<wbr>a_<wbr>b/1.5</td>" in page


def test_figures_that_share_a_chart_have_lines_of_their_own_and_a_legend(make_run):
    kinds = ("chosen", "rejected", "margin")
    figures = {f"rewards_{kind}": float(number) for number, kind in enumerate(kinds)}
    held_out = {f"eval_{name}": value for name, value in figures.items()}
    page = page_of(make_run("one", [{**row, **figures, **held_out} for row in rows(5)]))
    [chart] = [one for one in data_of(page)["charts"] if one["name"] == "rewards"]
    dashes = {line["label"]: line["dash"] for line in chart["series"]}
    assert len({dashes[kind] for kind in kinds}) == 3
    assert all(dashes[f"held-out {kind}"] == dashes[kind] for kind in kinds)
    legend = re.search(r'data-chart="rewards".*?<div class="legend">(.*?)</div>', page).group(1)
    assert re.findall(r'<i class="(\w*)"></i>([\w-]+)', legend) == [
        ("", "chosen"), ("dashed", "rejected"), ("dotted", "margin"), ("held", "held-out")
    ]  # fmt: skip


def luminance(colour):
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_long_and_many_samples_are_cut(make_run):
    samples = [{"step": 0, "prompt": f"prompt {i:02}", "generation": "x" * 10_000} for i in range(20)]
    page = page_of(make_run(samples=samples))
    assert "prompt 11" in page
    assert "prompt 12" not in page
    assert "12 of 20 prompts" in page
    assert "6,000 more characters" in page


@pytest.mark.parametrize(
    ("sample", "expected"),
    [({"expected": "a", "generation": " a "}, True), ({"expected": "a"}, False), ({"generation": "a"}, None)],
)
def test_an_answer_is_right_when_it_is_the_expected_one(sample, expected):
    assert is_expected(sample) is expected


def test_differences_between_configs_are_tabled_and_marked(make_run):
    other = CONFIG.replace("8", "16").replace("v_proj", "o_proj") + "seed: 3\noutput_dir: elsewhere\n"
    page = page_of(make_run("first"), make_run("second", config=other))
    table = page[page.index("What differs") : page.index("The whole configs")].replace("<wbr>", "")
    assert re.findall(r'<th scope="row">([^<]*)</th>', table) == ["adapter.rank", "adapter.target_modules", "seed"]
    assert "<td>8</td><td>16</td>" in table
    assert page.count('<span class="changed">') == 5  # rank and target_modules twice, seed once


def test_a_comparison_sets_off_the_best_and_says_what_is_shared(make_run):
    page = page_of(make_run("first", manifest=MANIFEST), make_run("second", rows(5, loss=0.1), manifest=MANIFEST))
    assert '<td class="best">0.1</td>' in page
    assert '<td class="best">0.6</td>' not in page
    assert "The same in all: steps 5" in page
    assert "parameters 2M" in page


def test_losses_are_not_ranked_across_tokenizers(make_run):
    runs = [
        make_run(name, rows(5, loss=loss), manifest={**MANIFEST, "tokenizer": name})
        for name, loss in (("first", 0.2), ("second", 0.1))
    ]
    page = page_of(*runs)
    assert '<td class="best">' not in page
    assert "The runs have different tokenizers or templates" in page


def test_an_adapter_that_one_run_lacks_is_one_row(make_run):
    with_adapter = "adapter:\n  rank: 4\n  alpha: 16.0\n  target_modules: all-linear\nseed: 1\n"
    page = page_of(make_run("first", config=with_adapter), make_run("second", config="adapter: null\nseed: 2\n"))
    table = page[page.index("What differs") : page.index("The whole configs")].replace("<wbr>", "")
    assert re.findall(r'<th scope="row">([^<]*)</th>', table) == ["adapter", "seed"]
    assert "<td>rank: 4\ntarget_modules: all-linear</td><td>none</td>" in table


def test_the_keys_that_were_set_come_first_and_the_whole_config_is_folded(make_run):
    config = "recipe: sft\nadapter:\n  rank: 8\n  alpha: 16.0\nepochs: 3\nbatch_size: 16\nown:\n  key: 5\n"
    page = page_of(make_run(config=config))
    table = page[page.index("What was set") : page.index("<summary>The whole config</summary>")].replace("<wbr>", "")
    assert re.findall(r'<th scope="row">([^<]*)</th>', table) == ["adapter.rank", "epochs", "own.key"]
    assert '<td>3</td><td class="soft">1</td>' in table
    assert "No key was set." in page_of(make_run("bare", config="recipe: sft\n"))


def test_date_and_device_are_under_the_title(make_run):
    environment = {"cpu": "A CPU", "devices": ["GPU zero", "GPU one"]}
    started = "2026-11-30T01:02:03+00:00"
    for device, name in (("cuda:1", "GPU one"), ("cuda", "GPU zero"), ("cpu", "A CPU")):
        manifest = {"environment": environment, "device": device, "started": started}
        page = page_of(make_run(device.replace(":", ""), manifest=manifest))
        assert f"<span>{name}</span><span>2026-11-30 01:02</span>" in page


def test_packed_rows_are_counted_as_rows(make_run):
    manifest = {"data": {"rows": 120, "held_out_rows": 0, "report": {"packs": 14, "dropped": {}}}}
    assert "in 14 packs, 0 dropped" in page_of(make_run(manifest=manifest))
    stream = {"data": {"rows": None, "report": {"rows": 77, "dropped": {}}}}
    assert headline(read_run(make_run("stream", manifest=stream), name="stream")).rows == 77


def test_the_commands_that_made_the_run_are_shown(make_run, tmp_path, monkeypatch):
    run = make_run(manifest={"command": ["tt", "run", "sft", "note=two words"]})
    monkeypatch.chdir(tmp_path.parent)
    page = page_of(run)
    assert "<pre>tt run sft &#x27;note=two words&#x27;</pre>" in page
    assert f"<pre>tt run {tmp_path.name}/run/config.yaml</pre>" in page  # as one would type it here
    monkeypatch.chdir("/")
    assert f"<pre>tt chat {str(run)[1:]}</pre>" in page_of(run)


def test_smoothing_follows_without_lag_and_keeps_gaps():
    line = [float(i) for i in range(200)]
    assert smooth(line)[100] == pytest.approx(100.0)
    assert smooth([5.0] * 50) == pytest.approx([5.0] * 50)
    with_gap = smooth([1.0, None, 3.0] * 40)
    assert with_gap[1] is None
    assert 1.0 < with_gap[60] < 3.0
    assert smooth([None] * 50) == [None] * 50


def test_smoothing_does_not_bend_the_ends_of_a_curve():
    line = [5.0 - 0.01 * i for i in range(300)]
    assert smooth(line) == pytest.approx(line)
    noisy = [value + (0.05 if i % 2 else -0.05) for i, value in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smooth(noisy), line, strict=True)) < 0.03


def test_thinning_keeps_every_spike():
    values = [0.0] * 10_000
    values[1234], values[8765] = 99.0, -99.0
    kept = thin([values, [None] * 10_000], buckets=100)
    assert {0, 1234, 8765, 9999} <= set(kept)
    assert len(kept) <= 402
    assert kept == sorted(kept)
    assert thin([[1.0] * 50], buckets=100) == list(range(50))


def test_a_long_run_is_a_page_of_bounded_size(make_run):
    page = page_of(make_run(records=rows(20_000)))
    assert len(data_of(page)["runs"][0]["columns"]["step"]) < 2_500
    assert "Long runs are drawn" in page


def test_configs_are_flattened_and_written_line_by_line():
    config = {"a": {"b": [1, "x: y"], "c": {}}, "d": None}
    assert flatten(config) == {"a.b": [1, "x: y"], "a.c": {}, "d": None}
    assert list(yaml_lines(config)) == [("a", "a:"), ("a.b", "  b: [1, 'x: y']"), ("a.c", "  c: {}"), ("d", "d: null")]
    assert differences([config, {"a": {"b": [1, "x: y"]}, "e": 1}]) == ["a.c", "d", "e"]
    assert differences([{"a": None, "b": 1}, {"a": {"x": 1, "y": {"z": 2}}, "b": 1}]) == ["a"]
    assert differences([{"ab": 1, "a": None}, {"ab": 2, "a": None}]) == ["ab"]


def test_numbers_are_written_for_people():
    assert [as_count(n) for n in (None, 950, 12_345, 134_515_008, 8.03e9)] == [
        "\u2013",
        "950",
        "12.3k",
        "135M",
        "8.03B",
    ]
    assert [as_figure(n) for n in (None, 0, 2e-5, 0.42134, 12345)] == ["\u2013", "0", "2.0e-05", "0.4213", "12,345"]
    assert [as_time(s) for s in (None, 3.21, 59.4, 245, 8040)] == [
        "\u2013",
        "3.2 s",
        "59 s",
        "4 min 05 s",
        "2 h 14 min",
    ]
    assert [as_percent(x) for x in (None, 0.0042, 0.125, 1)] == ["\u2013", "0.42 %", "12 %", "100 %"]


def test_without_matplotlib_the_page_is_written_and_says_why_there_is_no_picture(make_run, monkeypatch):
    run = make_run()
    (run / "report.png").write_text("of an older report")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what import finds is that there is none
    assert write_report([run]) == (run / "report.html", None)
    assert not (run / "report.png").exists()
    page = (run / "report.html").read_text()
    assert "needs matplotlib; pip install matplotlib" in page
    assert "The PNG beside this page" not in page


def test_a_metric_that_nobody_knows_gets_a_chart_a_column_and_a_panel(make_run):
    known = make_run("known")
    records = [row | {"rewards/margin": 0.5 - row["step"], "kept": True} for row in rows(12)]
    records[3] |= {'<b>&"': 2.0, "smooth": 7, "constructor": 1.0}
    named = make_run("named", records=records)
    page = page_of(known, named)
    data = data_of(page)
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert list(charts)[:5] == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"]
    assert set(charts) - set(list(charts)[:5]) == {"rewards/margin", '<b>&"', "smooth", "constructor"}
    chart = charts["rewards/margin"]
    assert chart["zero"] is False
    columns = {run["name"]: run["columns"] for run in data["runs"]}
    assert columns["named"][chart["series"][0]["key"]][:2] == [-0.5, -1.5]
    assert chart["series"][0]["key"] not in columns["known"]
    assert columns["named"]["smooth"][3] != 7  # that of the loss, a key of ours
    assert charts["smooth"]["series"][0] == {"key": "metric smooth", "label": "smooth", "width": 1.6, "opacity": 1,
                                             "sparse": True}  # fmt: skip
    assert "<td>-11.5</td>" in page
    assert '<th scope="col">rewards/margin</th>' in page
    assert "<b>&" not in page
    panels = [axes.get_title(loc="left") for axes in _figure(read_runs([known, named])).axes] if HAS_MATPLOTLIB else []
    assert not panels or "rewards/margin" in panels


def test_named_sets_of_held_out_rows_are_lines_of_the_chart_of_all_held_out_rows(make_run):
    records = rows(12)
    for row in records[::5]:
        row |= {
            "eval_loss": 2.0,
            "eval_loss_news": 1.5,
            "eval_loss_<b>": 2.5,
            "eval_perplexity": 7.4,
            "eval_perplexity_news": 4.5,
            "eval_exact_match": 0.25,
            "eval_rewards_accuracy": 0.5,
            "eval_rewards_accuracy_news": 0.75,
        }
    config = "data:\n  eval: {news: a.jsonl, <b>: b.jsonl}\n"
    run = make_run(records=records, config=config)
    page = page_of(run)
    lines = {chart["title"]: {one["label"]: one for one in chart["series"]} for chart in data_of(page)["charts"]}
    assert list(lines["Loss"]) == ["train", "train, smoothed", "held-out", "held-out, news", "held-out, <b>"]
    tagged = [lines["Loss"][f"held-out, {name}"] for name in ("news", "<b>")]
    assert [one["tag"] for one in tagged] == ["news", "<b>"]
    assert len({one["dash"] for one in tagged}) == 2
    assert list(lines["Held-out perplexity"]) == ["perplexity", "perplexity, news"]
    assert list(lines["Exact match"]) == ["exact match"]
    assert list(lines["Reward accuracy"]) == ["held-out accuracy", "held-out accuracy, news"]
    assert "news 1.5; &lt;b&gt; 2.5; best 2 at step 1; perplexity 7.4" in page
    assert '<div class="label">Exact match</div><div class="value">25 %</div>' in page
    assert page.count('<i class="held"></i>held-out') == 1  # the legend is that of the loss
    assert "<b>:" not in page
    if HAS_MATPLOTLIB:
        loss, *panels = _figure(read_runs([run])).axes
        assert {text.get_text() for text in loss.texts} == {"news", "<b>"}
        (panel,) = [axes for axes in panels if axes.get_title(loc="left") == "Held-out perplexity"]
        assert [list(line.get_ydata()) for line in panel.lines] == [[7.4] * 3, [4.5] * 3]


def test_more_metrics_than_a_page_can_show_are_counted_among_what_is_left_out(make_run):
    run = make_run(records=[row | {f"metric_{index}": 1.0 for index in range(60)} for row in rows(3)])
    page = page_of(run)
    assert len(data_of(page)["charts"]) == 55
    assert "left out: metric &#x27;metric_50&#x27; and later ones" in page


def test_matplotlib_and_torch_are_not_loaded_with_the_module():
    code = "import sys, tt_train.report; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_a_text_of_several_lines_is_one_line_of_the_config():
    config = {"model": {"path": "a\nb\u2028c", "dtype": "bf16"}}
    assert list(yaml_lines(config)) == [
        ("model", "model:"),
        ("model.path", r'  path: "a\nb\Lc"'),
        ("model.dtype", "  dtype: bf16"),
    ]


def test_a_long_run_is_summed_up_from_eight_bytes_a_figure(make_run):
    many = 4_000
    records = [row | ({"eval_loss": 2.0} if row["step"] % 100 == 0 else {}) for row in rows(many)]
    run = read_run(make_run(records=records), name="run")
    kept = sum(column.itemsize * len(column) for column in run.rows.columns.values())
    assert kept == 8 * many * len({*records[-1]})
    assert run.rows[-1] == records[-1]
    assert run.column("eval_loss")[:100] == [None] * 99 + [2.0]
    one = headline(run)
    assert one.loss_last == pytest.approx(sum(3.0 / step for step in range(many - 199, many + 1)) / 200)
    assert (one.steps, one.eval_best, one.eval_best_step) == (many, 2.0, 100)


def test_figures_of_steps_that_were_made_again_are_the_later_ones_in_order(make_run):
    records = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 5.0, "lr": 0.1}, {"step": 2, "loss": 3.0}]
    run = read_run(make_run(records=records), name="run")
    assert [*run.rows] == [{"step": 1, "loss": 5.0, "lr": 0.1}, {"step": 2, "loss": 3.0, "lr": None}]
    assert [*run.rows[1:].only("lr", "loss")] == [{"lr": None, "loss": 3.0}]


@needs_matplotlib
def test_the_picture_draws_no_more_points_than_it_can_show_and_every_spike(make_run):
    records = rows(9_000)
    records[4321]["grad_norm"] = 77.0
    figure = _figure([read_run(make_run(records=records), name="run")])
    lines = [line for axes in figure.axes for line in axes.lines]
    assert max(len(line.get_xdata()) for line in lines) <= 2 * 1500 + 2
    assert (4322, 77.0) in [point for line in lines for point in zip(*line.get_data(), strict=True)]

"""The page in a real browser: it draws, it says nothing on the console, and it asks for nothing."""

import json
import math
import re
import shutil
import subprocess

import pytest

from tt_train.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
FLAGS += ["--virtual-time-budget=2000", "--dump-dom"]


def write_run(path, num_steps):
    path.mkdir()
    rows = [
        {"step": s, "loss": math.exp(-s / 30), "lr": 1e-4, "grad_norm": 1.0, "tokens": 50 * s, "tokens_per_s": 9.0}
        | {"memory_gib": 1.0, "elapsed_s": float(s)}
        | ({"eval_loss": 0.5} if s % 20 == 0 else {})
        for s in range(1, num_steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": 0, "prompt": "<script>console.error('escaped?')</script>", "generation": "<img src=x>"}
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (path / "config.yaml").write_text(f"steps: {num_steps}\n")
    (path / "manifest.json").write_text("{}")
    return path


def open_in_browser(page, tmp_path, *flags):
    """The document after its scripts have run, and what the console said."""
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("steps", [(200,), (1,), (0,), (200, 1, 30)], ids=["one", "one step", "no step", "several"])
def test_the_page_draws_its_charts_without_a_word_on_the_console(tmp_path, steps):
    runs = [write_run(tmp_path / f"run{i}", num_steps) for i, num_steps in enumerate(steps)]
    document, console = open_in_browser(write_report(runs)[0], tmp_path)
    assert console == []
    charts = re.findall(r"<figure class=.*?</figure>", document, flags=re.DOTALL)
    assert len(charts) == 5
    drawn = [re.findall(r'<path d="(M[^"]+)"', chart) for chart in charts]
    curves = sum(num_steps > 0 for num_steps in steps)
    smoothed, held_out = sum(num_steps > 8 for num_steps in steps), sum(num_steps >= 20 for num_steps in steps)
    assert [len(paths) for paths in drawn] == [curves + smoothed + held_out, curves, curves, curves, curves]
    if steps == (0,):
        assert document.count(">nothing recorded<") == 5


def test_a_narrow_page_has_three_ticks_at_least(tmp_path):
    page = write_report([write_run(tmp_path / "run", 115)])[0]
    document, _ = open_in_browser(page, tmp_path, "--window-size=500,900")  # no narrower one without a screen
    for chart in re.findall(r"<figure class=.*?</figure>", document, flags=re.DOTALL):
        heights = re.findall(r'<text x="[^"]+" y="([^"]+)"', chart)
        assert max(map(heights.count, heights)) >= 3  # those of the steps are all at one height


def test_the_console_is_heard(tmp_path):
    """The counterpart of the test above: a page whose policy is broken does speak."""
    html, _ = write_report([write_run(tmp_path / "run", 3)])
    html.write_text(
        html.read_text().replace("</body>", "<script>1</script><img src='https://example.com/a.png'></body>")
    )
    _, console = open_in_browser(html, tmp_path)
    assert len(console) == 2  # neither the script nor the picture passes the policy


def read_off(page, tmp_path, event):
    """The page after ``event`` on its loss chart. Its policy forbids foreign scripts, so this copy goes without."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    script = f"<script>const plot = document.querySelector('.plot'); plot.focus(); plot.dispatchEvent({event})</script>"
    copy = page.with_name("copy.html")
    copy.write_text(text.replace("</body>", script + "</body>"))
    document, console = open_in_browser(copy, tmp_path)
    assert console == []
    return document


def test_the_curves_are_read_off_under_the_pointer(tmp_path):
    html, _ = write_report([write_run(tmp_path / "run", 41)])
    at = (
        "clientX: plot.getBoundingClientRect().left + 46 + (plot.clientWidth - 54) / 2, clientY: 0"  # the plot's middle
    )
    document = read_off(html, tmp_path, f"new PointerEvent('pointermove', {{{at}}})")
    tip = re.search(r'<div class="tip card".*?</div></div>', document).group()
    assert re.findall(r"<b>(.*?)</b>", tip) == ["step 21"]
    assert "held-out (20)</span><span>0.5<" in tip
    assert f"train</span><span>{math.exp(-0.7):.4g}<" in tip
    assert document.count('class="cross"') == 5  # at the same place in every chart


def test_the_curves_are_read_off_with_the_keyboard(tmp_path):
    html, _ = write_report([write_run(tmp_path / "run", 3)])
    document = read_off(html, tmp_path, "new KeyboardEvent('keydown', {key: 'End'})")
    readout = re.search(r'<p id="readout"[^>]*>(.*?)</p>', document).group(1)
    assert readout.startswith("step 1: train 0.9672")  # the first key enters at the first step

"""Draw docs/img/quickstart.png from a real run: needs tmux, Chromium, rich and Pillow.

script -qfc "nox -s quickstart" quickstart.typescript      # in a terminal of 116 columns
python docs/img/quickstart.py quickstart.typescript
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.color import ColorType
from rich.terminal_theme import TerminalTheme
from rich.text import Text

WIDTH, LINES = 112, 120  # columns of the picture; rows of the terminal that replays the run
PAPER, INK = (24, 25, 31), (232, 233, 237)
ANSI = [
    (24, 25, 31),
    (240, 137, 127),
    (99, 200, 147),
    (224, 187, 74),
    (134, 168, 255),
    (220, 143, 210),
    (95, 200, 208),
    INK,
]
THEME = TerminalTheme(PAPER, INK, ANSI)


def replayed(typescript: Path) -> list[str]:
    """The lines of a terminal after the run, with their colours; those that it wrapped are joined."""
    tmux = ["tmux", "-L", "quickstart-picture"]
    show = f"cat '{typescript}'; printf '\\033[0m'; sleep 20"
    subprocess.run([*tmux, "new-session", "-d", "-x", "116", "-y", str(LINES), show], check=True)
    try:
        time.sleep(3)
        words = [*tmux, "capture-pane", "-p", "-e", "-J", "-S", "-"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def chosen(lines: list[str]) -> list[Text]:
    """The story from its first part on, with the last hint of nox, and without the middle of the third training."""
    texts = list(Text.from_ansi("\n".join(lines)).split("\n", allow_blank=True))  # a colour may go on in the next line
    plain = [text.plain for text in texts]
    first = next(number for number, line in enumerate(plain) if line.startswith("1 Rows"))
    kept, skips = [Text.assemble(("$ nox -s quickstart", "bold"))], False
    for text, line in zip(texts[first:], plain[first:], strict=True):
        if skips and "unseen questions:" in line:
            kept.append(Text(" " * 11 + "..."))
            skips = False
        if not skips and not line.startswith(("step ", "Script done")):
            kept.append(text)
        skips = skips or "$ tt run dpo" in line
        if "run first:" in line:
            break
    return kept


def as_html(text: Text) -> str:
    """One line, cut to the width."""
    text.rstrip()
    if len(text) > WIDTH:
        text = text[: WIDTH - 3] + Text(" ..", style="dim")
    parts = []
    for letter, style in [(segment.text, segment.style) for segment in text.render(_console())]:
        css = []
        if style and style.color and style.color.type is not ColorType.DEFAULT:
            css.append(f"color:{style.color.get_truecolor(THEME).hex}")
        css += ["font-weight:bold"] if style and style.bold else []
        safe = letter.replace("&", "&amp;").replace("<", "&lt;")
        parts.append(f'<span style="{";".join(css)}">{safe}</span>' if css else safe)
    return "".join(parts)


def _console():
    from rich.console import Console

    return Console(force_terminal=True, color_system="truecolor", width=1000)


def main(typescript: Path) -> None:
    texts = chosen(replayed(typescript))
    body = "\n".join(as_html(text).rstrip("\n") for text in texts)
    page = (
        f"<meta charset=utf-8><style>body{{margin:0;background:rgb{PAPER};color:rgb{INK}}}"
        f"pre{{margin:0;padding:22px 26px;font:14px/20.3px 'DejaVu Sans Mono',monospace}}</style><pre>{body}</pre>"
    )
    picture = Path(__file__).with_name("quickstart.png")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium-browser"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        size = f"--window-size={52 + round(8.43 * WIDTH)},{44 + round(20.3 * len(texts))}"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        subprocess.run([chromium, *flags, size, f"--screenshot={picture}", file.as_uri()], check=True)
    Image.open(picture).convert("RGB").quantize(96, method=Image.Quantize.MAXCOVERAGE).save(picture, optimize=True)
    print(f"{picture}: {len(texts)} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

"""CPU seconds until a command has answered: median of alternated runs. `nox -s bench -- start_up`."""

import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

RUNS = 7
COMMANDS = {
    "python -c pass": ["python", "-c", "pass"],
    "tt --help": ["tt", "--help"],
    "tt --version": ["tt", "--version"],
    "tt ls": ["tt", "ls"],
    "import tt_models": ["python", "-c", "import tt_models"],
    "import torch": ["python", "-c", "import torch"],
    "trl --help": ["trl", "--help"],
    "transformers --help": ["transformers", "--help"],
    "tune ls": ["tune", "ls"],
    "litgpt --help": ["litgpt", "--help"],
    "axolotl --help": ["axolotl", "--help"],
    "llamafactory-cli help": ["llamafactory-cli", "help"],
}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one process and its children."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    beside = str(Path(sys.executable).parent)
    path = f"{beside}{os.pathsep}{os.environ['PATH']}"
    found = {name: (shutil.which(words[0], path=path), *words[1:]) for name, words in COMMANDS.items()}
    present = {name: [str(word) for word in words] for name, words in found.items() if words[0]}
    for command in present.values():
        cpu_seconds(command)  # writes byte code, fills the file cache
    seconds: dict[str, list[float]] = {name: [] for name in present}
    for _ in range(RUNS):
        for name, command in present.items():
            seconds[name].append(cpu_seconds(command))
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}; median of {RUNS}, CPU s\n"
    )
    print("| command | median | least |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| `{name}` | {statistics.median(values):.2f} | {min(values):.2f} |")
    if absent := sorted(COMMANDS.keys() - present.keys()):
        print(f"\nnot installed here: {', '.join(absent)}")


if __name__ == "__main__":
    main()

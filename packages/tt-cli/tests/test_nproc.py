"""``tt run --nproc 2``: ranks start, print once, fail with the exit code of the fault, and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tt_cli.main import main
from tt_cli.torchrun_words import TORCHRUN


@pytest.fixture
def words(model_dir, rows_file):
    return ["sft", f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "adapter.rank=2",
            "batch_size=4", "micro_batch_size=1", "samples.num=0", "device=cpu"]  # fmt: skip


class Started:
    """``tt run`` as a process with ranks of its own."""

    def __init__(self, *words, **environ):
        command = [sys.executable, "-m", "tt_cli", "run", *map(str, words)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, start_new_session=True
        )

    def until(self, file):
        deadline = time.monotonic() + 120
        while not file.exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def rank(self, rank):
        """The process id of a rank."""
        return ranks_below(self.process.pid)[rank]

    def end(self):
        out, err = self.process.communicate(timeout=180)
        return self.process.returncode, out, err


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks_below(pid):
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if f"PPid:\t{pid}\n" in (entry / "status").read_text():
                environ = dict(word.partition("=")[::2] for word in (entry / "environ").read_text().split("\0"))
                found[int(environ["RANK"])] = int(entry.name)
        except (OSError, KeyError):
            continue
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="ranks are found in /proc")


def test_the_options_of_torchrun_are_those_of_this_torch():
    """One that it has got since is taken after ``--`` alone; one that it has lost would be refused by it."""
    from torch.distributed.run import get_args_parser

    known = {name.removeprefix("--"): action.nargs != 0 for action in get_args_parser()._actions
             for name in action.option_strings if name.startswith("--") and "_" not in name}  # fmt: skip
    assert {name: value for name, value in known.items() if name in TORCHRUN} == TORCHRUN


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["batch_size=6", "micro_batch_size=2"], "batch_size: 6 is not a multiple of micro_batch_size 2 x 2 processes; "
         "nearest that are: 4 or 8; or set micro_batch_size=1"),
        (["data.train=nope.jsonl"], "data.train: nope.jsonl: no such file"),
        (["device=cuda"], "device: cuda asked for, 0 CUDA devices visible"),
        (["--nnodes", "2", "--rdzv-endpoint", "here:1", "--max-restarts", "1"],
         "--max-restarts: on several machines a run needs a name"),
        (["--nnodes", "2"], "--nnodes 2: the machines must know where to meet; add --rdzv-endpoint HOST:29500"),
        (["batch_size=6", "micro_batch_size=4"], "batch_size: 6 is not a multiple of micro_batch_size 4 x 2 processes; "
         "nearest that are: 8; or set micro_batch_size=3"),
        (["--module"], "--module does not go with tt run"),
        (["--max-restarts", "many"], "invalid int value: 'many'"),
        (["--nproc", "none"], "--nproc: expected a number of processes"),
        (["--", "--nnodes", "x"], "invalid literal"),
    ],
)  # fmt: skip
def test_a_mistake_is_found_once_before_ranks_start(words, more, expected, capfd, monkeypatch):
    monkeypatch.setattr("tt_cli.agent.start", lambda *args: pytest.fail("ranks were started"))
    assert main(["run", *words, "--nproc", "2", *more]) == 2
    err = capfd.readouterr().err
    assert expected in err
    assert err.count("error:") == 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    import torch

    from tt_train import ConfigError
    from tt_train.config import SFTConfig
    from tt_train.inputs import components

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(components, "pick_device", lambda name: torch.device("cuda"))
    assert components.too_many_processes(SFTConfig(), 2) == []
    [line] = components.too_many_processes(SFTConfig(), 4)
    assert line == "--nproc: 4 processes, 2 CUDA devices visible; use --nproc 2, or device=cpu"
    assert ConfigError([line]).problems == [line]


def test_a_rank_of_torchrun_does_not_start_ranks(words, capfd, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["run", *words, "--nproc", "2"]) == 2
    assert "this process is a rank of torchrun already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "environ"),
    [
        (["--nproc", "2"], {}),
        (["--nproc_per_node", "2"], {}),
        (["--nproc_per_node=2", "--max_restarts", "0"], {}),
        (["--", "--nproc-per-node", "2"], {}),
        ([], {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_MASTER_PORT": "29511"}),
    ],
)
def test_every_way_to_ask_for_two_processes_starts_two(words, given, environ, monkeypatch, tmp_path):
    asked = []
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "tt_cli.agent.start", lambda launch, words, run_dir: asked.append((launch, words, run_dir)) or 0
    )
    place = given.index("--") if "--" in given else len(given)
    assert main(["run", *given[:place], *words, "-o", str(tmp_path / "r"), *given[place:]]) == 0
    [(launch, command, run_dir)] = asked
    assert (launch.nproc, launch.nodes) == (2, 1)
    assert command == ["run", *words, "-o", str(tmp_path / "r")]
    assert run_dir == tmp_path / "r"
    port = environ.get("PET_MASTER_PORT")
    assert launch.options.rdzv_backend == ("static" if port else "c10d")


def test_a_rendezvous_endpoint_alone_means_c10d():
    """torchrun's static default would make every machine node 0."""
    from tt_cli.agent import asked_for

    assert asked_for(["--nnodes", "2", "--rdzv-endpoint", "host:29500"], "1").options.rdzv_backend == "c10d"


@needs_proc
def test_two_ranks_train_one_prints_and_the_others_keep_a_log(words, tmp_path):
    run = tmp_path / "run"
    code, out, err = Started(*words, "max_steps=3", "--nproc", "2", "-o", run, "--json").end()
    assert code == 0, err
    answer = json.loads(out)  # one object
    assert (answer["ok"], answer["run"], answer["summary"]["steps"]) == (True, str(run), 3)
    assert err.count("step 3 loss") == 1
    assert "on 2 x cpu" in err
    assert "step 3 loss" in (run / "logs" / "rank-1.log").read_text()
    assert (run / "adapter" / "adapter_config.json").is_file()
    assert not (run / "run.lock").exists()


@needs_proc
@pytest.mark.parametrize(
    ("number", "who", "code"),
    [(signal.SIGTERM, "launcher", 143), (signal.SIGINT, "launcher", 130), (signal.SIGTERM, 1, 143)],
)
def test_a_signal_to_the_launcher_or_to_one_rank_saves_on_all(words, tmp_path, number, who, code):
    run = tmp_path / "run"
    started = Started(*words, "max_steps=5000", "--nproc", "2", "-o", run)
    started.until(run / "metrics.jsonl")
    os.kill(started.process.pid if who == "launcher" else started.rank(who), number)
    found, out, err = started.end()
    assert found == code, err
    assert out == f"{run}\n"
    assert err.count(f"stopped by {number.name} after step ") == 1
    assert "Traceback" not in err
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


@needs_proc
def test_a_second_signal_ends_a_launcher_whose_rank_hangs(words, tmp_path):
    run = tmp_path / "run"
    started = Started(*words, "max_steps=5000", "--nproc", "2", "-o", run)
    started.until(run / "metrics.jsonl")
    hung = started.rank(1)
    os.kill(hung, signal.SIGSTOP)
    os.kill(started.process.pid, signal.SIGTERM)
    time.sleep(1)
    assert started.process.poll() is None, "it waits for the ranks to save"
    began = time.monotonic()
    os.kill(started.process.pid, signal.SIGTERM)
    assert started.end()[0] == 143
    assert time.monotonic() - began < 30
    assert not Path(f"/proc/{hung}").exists()


@needs_proc
def test_a_rank_that_is_killed_is_named_and_nothing_is_saved_without_it(words, tmp_path):
    run = tmp_path / "run"
    started = Started(*words, "max_steps=5000", "save_every=5", "--nproc", "2", "-o", run)
    started.until(run / "checkpoints" / "step-000005")
    os.kill(started.rank(1), signal.SIGKILL)
    code, _, err = started.end()
    assert code == 1, err
    assert "error: rank 1: ended by SIGKILL" in err
    assert "rank 1 does not answer" in err
    assert "Traceback" not in err
    assert not list((run / "checkpoints").glob(".tmp*"))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_that_lost_a_rank_starts_again_and_ends_in_the_same_parameters(words, tmp_path, number):
    options = ["max_steps=30", "save_every=5", "process_group_timeout_s=5", "--nproc", "2"]
    assert Started(*words, *options, "-o", tmp_path / "whole").end()[0] == 0
    run = tmp_path / "run"
    started = Started(*words, *options, "--max-restarts", "2", "-o", run)
    started.until(run / "checkpoints" / "step-000010")
    os.kill(started.rank(1), number)
    code, _, err = started.end()
    assert code == 0, err
    assert "a rank was lost: the run starts again from its newest checkpoint" in err
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("dies", ["a rank", "a machine"])
def test_two_machines_of_two_ranks_lose_one_and_end_in_the_same_parameters(words, tmp_path, dies):
    """Two agents on loopback. The machine that died comes back, as its scheduler would start it again."""
    options = [*words, "max_steps=20", "save_every=5", "process_group_timeout_s=10", "--nproc", "2"]
    restarts = [*options, "--max-restarts", "3", "-o", tmp_path / "run"]

    def agent(port):
        return Started(*restarts, "--", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two")

    assert Started(*options[:-1], "4", "-o", tmp_path / "whole").end()[0] == 0
    port = free_port()
    first = agent(port)
    time.sleep(2)  # the first one hosts the rendezvous and is rank 0
    second = agent(port)
    first.until(tmp_path / "run" / "checkpoints" / "step-000010")
    ranks = ranks_below(second.process.pid)
    if dies == "a rank":
        os.kill(ranks[max(ranks)], signal.SIGKILL)
    else:
        for pid in (second.process.pid, *ranks.values()):
            os.kill(pid, signal.SIGKILL)
        second.end()
        second = agent(port)
    ends = [first.end(), second.end()]
    assert [end[0] for end in ends] == [0, 0], ends
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@needs_proc
def test_a_check_reports_the_ranks_that_met_and_one_that_is_missing_is_named():
    code, out, err = Started("--check", "--nproc", "2").end()
    assert code == 0, err
    assert out.startswith("2 ranks on ")
    assert "; joining and an all_reduce took " in out
    assert "rendezvous: c10d at localhost:0" in err
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29873"}
    code, _, err = Started("--check", "--check-timeout", "1", **alone).end()
    assert code == 1
    assert err.splitlines()[-1] == "error: rank 1 of 2 did not come to 127.0.0.1:29873 within 1 s"


def tasks(*words, size=2):
    """The ranks as srun would start them on this machine."""
    environ = {"SLURM_NTASKS": str(size), "SLURM_NODELIST": "localhost", "MASTER_PORT": str(free_port())}
    return [Started(*words, SLURM_PROCID=str(r), SLURM_LOCALID=str(r), **environ) for r in range(size)]


def test_tasks_of_srun_train_together_and_one_of_them_prints(words, tmp_path):
    run = tmp_path / "run"
    ends = [task.end() for task in tasks(*words, "max_steps=2", "-o", run)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [out for _, out, _ in ends] == [f"{run}\n", ""]
    assert "on 2 x cpu" in ends[0][2]
    assert ends[1][2] == ""


def test_a_mistake_that_every_task_finds_is_shown_by_one_of_them(words, tmp_path):
    ends = [task.end() for task in tasks(*words, "adapter.target_modules=[q_prj]", "-o", tmp_path / "run")]
    assert [code for code, _, _ in ends] == [2, 2], ends
    assert ends[0][2].count("error: adapter: target_modules: 'q_prj' matches no module") == 1
    assert ends[1][2] == ""

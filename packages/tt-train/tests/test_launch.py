"""How processes find each other: variables of launchers, the roll call, and mistakes that end all ranks together."""

import json
import os
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist

from tt_train import ConfigError, TrainingError, compose
from tt_train.devices import launch
from tt_train.devices.distributed import world
from tt_train.errors import ShownElsewhere
from tt_train.run.stop import Stopped, StopRequest
from tt_train.settings.keys.mistakes import world_mistakes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def heres(size, port=None):
    port = port or free_port()
    return [launch.Place(rank=r, size=size, local_rank=r, address="127.0.0.1", port=port) for r in range(size)]


def _rank(rank, function, places, out, *more):
    torch.set_num_threads(1)
    try:
        said = function(places[rank], *more)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (out / str(rank)).write_text(json.dumps(said))


def on_ranks(tmp_path, function, *more, size=2, only=None, check=True):
    """What ``function(place, *more)`` returns on each rank, or the error that it raises."""
    places = heres(size)
    ranks = only or range(size)
    context = torch.multiprocessing.get_context("fork")
    running = [context.Process(target=_rank, args=(rank, function, places, tmp_path, *more)) for rank in ranks]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode is not None
    return [json.loads((tmp_path / str(r)).read_text()) if (tmp_path / str(r)).exists() else None for r in ranks]


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29511"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODELIST": "gpu[03-05,9],login",
         "SLURM_JOB_ID": "123456"}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        (TORCHRUN, (3, 8, 1, "node1:29511")),
        (SLURM, (3, 8, 1, "gpu03:23456")),
        (SLURM | {"MASTER_ADDR": "head.example", "MASTER_PORT": "4711"}, (3, 8, 1, "head.example:4711")),
        (SLURM | TORCHRUN | {"RANK": "5"}, (5, 8, 1, "node1:29511")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, (3, 4, 1, "gpu03:23456")),
    ],
)
def test_the_variables_of_every_launcher_end_in_the_same_place(environ, expected):
    here = launch.place(environ)
    assert expected == (here and (here.rank, here.size, here.local_rank, here.endpoint))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR: missing"),
        (TORCHRUN | {"RANK": "8"}, "RANK: must be below WORLD_SIZE 8, got 8"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number"),
        (SLURM | {"SLURM_NODELIST": "$(reboot)"}, "SLURM_NODELIST: expected names"),
    ],
)
def test_variables_that_make_no_sense_are_named(environ, expected):
    with pytest.raises(ConfigError, match=expected.replace("$", ".").replace("(", ".").replace(")", ".")):
        launch.place(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu03", "gpu03"), ("gpu[03-05,9],login", "gpu03"), ("a1,b2", "a1"), ("tux-[1-2]-[07-9].x", "tux-1-07.x")],
)
def test_the_first_host_of_a_slurm_list_is_rank_0(nodes, first):
    assert launch.first_host(nodes) == first


def test_a_batch_that_the_processes_cannot_share_names_the_nearest_that_they_can(words):
    config = compose("sft", overrides=[*words, "batch_size=12", "micro_batch_size=4"])
    assert world_mistakes(config, 1) == world_mistakes(config, 3) == []
    [line] = world_mistakes(config, 2)
    assert line == ("batch_size: 12 is not a multiple of micro_batch_size 4 x 2 processes; nearest that are: 8 or 16; "
                    "or set micro_batch_size=3")  # fmt: skip
    assert "nearest that are: 64" in world_mistakes(config, 16)[0]


def test_a_rank_that_does_not_come_is_named_on_the_ranks_that_did(tmp_path):
    def meet(here):
        launch.meet(here, timeout_s=2)

    said = on_ranks(tmp_path, meet, size=3, only=[0, 2])
    assert len(said) == 2
    assert all(line.startswith("TrainingError: rank 1 of 3 did not come to 127.0.0.1:") for line in said)


def test_rank_0_that_does_not_come_is_named(tmp_path):
    [said] = on_ranks(tmp_path, lambda here: launch.meet(here, timeout_s=1), size=2, only=[1])
    assert "rank 0 of 2 does not answer at 127.0.0.1:" in said


def _mistaken(here, mistakes):
    def action():
        if mistakes[here.rank]:
            raise ConfigError([mistakes[here.rank]])
        return "fine"

    store = launch.meet(here, timeout_s=20)
    with launch.joined(here, store, device_type="cpu", timeout_s=20):
        return launch.everywhere(action)


@pytest.mark.parametrize(
    ("mistakes", "shown"),
    [
        ([None, None], ["fine", "fine"]),
        (["no such file"] * 2, ["ConfigError: no such file", "ShownElsewhere: another rank shows why"]),
        ([None, "only here"], ["ShownElsewhere: another rank shows why", "ConfigError: only here"]),
        (["one", "other"], ["ConfigError: one", "ConfigError: other"]),
    ],
)
def test_a_mistake_of_one_rank_ends_all_and_each_is_shown_once(tmp_path, mistakes, shown):
    assert on_ranks(tmp_path, _mistaken, mistakes) == shown


def test_a_mistake_before_the_process_group_ends_all_too(tmp_path):
    def early(here):
        store = launch.meet(here, timeout_s=20)

        def action():
            raise ConfigError([f"model.path: missing on {'both'}"])

        try:
            launch.everywhere(action, met=(here, store))
        except ShownElsewhere as error:
            return [here.rank, error.exit_code]
        except ConfigError:
            return [here.rank, "shown"]

    assert on_ranks(tmp_path, early) == [[0, "shown"], [1, 2]]


def test_a_signal_to_one_rank_stops_all_at_the_same_place(tmp_path):
    def stopped(here):
        store = launch.meet(here, timeout_s=20)
        with launch.joined(here, store, device_type="cpu", timeout_s=20), StopRequest() as stop:
            for step in range(1000):
                if (here.rank, step) == (1, 7):
                    os.kill(os.getpid(), signal.SIGTERM)
                try:
                    stop.check()
                except Stopped as error:
                    return [step, error.signal_number]

    assert on_ranks(tmp_path, stopped) == [[7, signal.SIGTERM]] * 2


def _after(here, what):
    store = launch.meet(here, timeout_s=20)
    with launch.joined(here, store, device_type="cpu", timeout_s=3):
        world().barrier()
        if here.rank == 1 and what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if here.rank == 1 and what == "hangs":
            time.sleep(11)
            return "woke"
        if here.rank == 1 and what == "fails":
            reason = launch.ending(4, ValueError("a bad row"))
            raise ValueError(reason)
        try:
            world().sum(torch.ones(1))
        except (RuntimeError, dist.DistError) as error:
            return launch.ending(4, error) if launch.is_lost(error) else "not lost"


def test_a_rank_that_is_killed_is_named_by_the_others_at_once(tmp_path):
    began = time.monotonic()
    assert on_ranks(tmp_path, _after, "killed")[0] == "rank 1 does not answer"
    assert time.monotonic() - began < 15


def test_a_rank_that_hangs_is_named_after_the_timeout_of_the_process_group(tmp_path):
    assert on_ranks(tmp_path, _after, "hangs") == ["rank 1 does not answer", "woke"]


def test_a_rank_that_fails_alone_is_the_reason_on_the_others(tmp_path):
    said = on_ranks(tmp_path, _after, "fails")
    assert said[0] == "rank 1 failed: a bad row"
    assert said[1].startswith("ValueError: ")
    assert said[1] != "ValueError: ", "it must not save alone"


def test_ranks_that_fail_alike_may_save_together(tmp_path):
    def alike(here):
        store = launch.meet(here, timeout_s=20)
        with launch.joined(here, store, device_type="cpu", timeout_s=20):
            return launch.ending(4, TrainingError("step 5: not finite"))

    assert on_ranks(tmp_path, alike) == ["", ""]

"""What the processes of a run agree on."""

import torch

from tt_train.devices.distributed import World, world


def test_one_process_is_a_world_of_its_own():
    alone = world()
    assert alone == World(rank=0, size=1, local_rank=0)
    assert alone.is_main
    given = torch.tensor([1.5])
    assert alone.sum(given) is given
    assert (alone.any(True), alone.any(False)) == (True, False)
    assert (alone.from_main("a"), alone.gather("a")) == ("a", ["a"])
    alone.barrier()


def agree():
    here = world()
    assert here.size == 3
    own = torch.tensor([1.0, here.rank])
    assert here.sum(own).tolist() == [3.0, 3.0]
    assert own.tolist() == [1.0, here.rank]  # unchanged
    assert here.any(here.rank == 1)
    assert not here.any(False)
    assert here.from_main({"from": here.rank}) == {"from": 0}
    assert here.gather(here.rank) == [0, 1, 2]
    assert here.is_main == (here.rank == 0)
    here.barrier()


def test_ranks_agree_on_sums_flags_and_objects(ranks):
    ranks(3, agree)

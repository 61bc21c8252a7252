"""Pickles that are made to hurt, in the place of what torch wrote: read as records or refused, never run."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from tt_ckpt.formats.dcp import DistributedFolder
from tt_ckpt.formats.pickle_records import read_inert
from tt_ckpt.formats.pickles import read_pickled


def everything(_name):
    return True


def read(data):
    return read_inert(data, everything, everything)


def bomb(pair: bytes, depth: int) -> bytes:
    """Each of ``depth`` objects holds the one before twice."""
    return b"\x80\x02" + b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + pair for i in range(depth))


HOSTILE = {
    "a key that takes for ever to hash": b"\x80\x02}" + bomb(b"\x86", 60)[2:] + b"K\x01s.",
    "strings of 2**60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "text beyond the end": b"\x80\x02X" + struct.pack("<I", 2**31) + b"x.",
    "bytes beyond the end": b"\x80\x02B" + struct.pack("<I", 2**31) + b"x.",
    "a frame of 2**62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N",
    "marks": b"\x80\x02" + b"(" * 2_000_000 + b".",
    "lists": b"\x80\x02" + b"]" * 2_000_000 + b".",
    "lists in a list": b"\x80\x02](" + (b"]" * 100_000 + b"e(") * 60 + b"e.",
    "no end": b"\x80\x02N",
    "nothing": b"",
    "an empty stack": b"\x80\x02.",
    "a memo that is not there": b"\x80\x02j" + struct.pack("<I", 2**31) + b".",
    "a number in digits": b"\x80\x02I" + b"9" * 5000 + b"\n.",
    "LONG4": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
    "a call of what is not a name": b"\x80\x02X\x01\0\0\0x)R.",
    "a state for a name": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "attributes of a list": b"\x80\x02]}b.",
    "a dict that is appended to": b"\x80\x02}K\x01a.",
    "a list with items": b"\x80\x02]K\x01K\x02s.",
    "an odd number of items": b"\x80\x02}(K\x01u.",
    "a tuple of nothing": b"\x80\x02\x87.",
    "extensions": b"\x80\x02\x82\x01.",
    "an instance by its old way": b"\x80\x02(cos\nsystem\no.",
    "a persistent id in text": b"\x80\x02Px\n.",
    "a name without an end": b"\x80\x02c" + b"x" * 10_000_000,
    "keywords": b"\x80\x04ccollections\nOrderedDict\n)}X\x01\0\0\0xK\x01s\x92.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r".") as caught:
        read(HOSTILE[name])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_in_an_archive_or_as_metadata_is_refused_with_its_file(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "f.pth", "w") as archive:
        archive.writestr("f/data.pkl", HOSTILE[name])
        archive.writestr("f/version", "3\n")
    with pytest.raises(ValueError, match=r"f\.pth: refused: not a plain file of tensors"):
        read_pickled(tmp_path / "f.pth", allow_pickle=True)
    (tmp_path / ".metadata").write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"\.metadata: refused"):
        DistributedFolder(tmp_path)


def test_values_are_what_pickle_wrote():
    value = {"a": [1, 2**33, -5, 2.5, None, True, False, "\u00e9" * 300], "b": (1, (2,), (), b"x" * 300), 3: {}}
    for protocol in (3, 4, 5):
        assert read(pickle.dumps(value, protocol)) == value


def test_what_would_be_called_is_a_record():
    record = read(b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R}X\x01\0\0\0xK\x01sb.")
    assert (record.name, record.args, record.state) == ("os.system", ("true",), {"x": 1})


@pytest.mark.parametrize("asked", [
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R",
    b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R",
    b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R",
    b"cbuiltins\nset\n]\x85R",
    b"cos\nsystem\nX\x05\0\0\0touch\x85R",
    b"c__builtin__\neval\nX\x01\0\0\0x\x85R",
    b"ctorch.jit\n_loader\n)R",
    b"cnumpy\ndtype\n)R",
    b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
])  # fmt: skip
def test_what_torch_would_make_for_a_file_but_no_file_of_tensors_asks_for_is_refused(tmp_path, asked):
    with zipfile.ZipFile(tmp_path / "f.pth", "w") as archive:
        archive.writestr("f/data.pkl", b"\x80\x02}X\x01\0\0\0a" + asked + b"s.")
        archive.writestr("f/version", "3\n")
        archive.writestr("f/byteorder", "little")
    with pytest.raises(ValueError, match="f.pth: refused: not a plain file of tensors .it (asks for|calls) "):
        read_pickled(tmp_path / "f.pth", allow_pickle=True)


def test_only_an_archive_is_one(tmp_path):
    path = tmp_path / "f.pth"
    torch.save({"a": torch.ones(2)}, path)
    whole = path.read_bytes()
    old = io.BytesIO()
    torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    for data in (old.getvalue(), old.getvalue() + whole, b"x" + whole, b"#!/bin/sh\n" + whole):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="f.pth: not a torch archive"):
            read_pickled(path, allow_pickle=True)


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = tmp_path / "f.pth"
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("f/data.pkl", b"\x80\x02}.")
    with pytest.raises(ValueError, match="two of its entries have one name"):
        read_pickled(path, allow_pickle=True)


def test_tensors_that_share_their_data_are_read_and_larger_ones_are_not(tmp_path):
    base = torch.arange(6.0)
    torch.save({"a": base, "b": base[2:4], "c": base.view(2, 3).T}, tmp_path / "f.pth")
    found = read_pickled(tmp_path / "f.pth", allow_pickle=True)
    assert torch.equal(found["c"], base.view(2, 3).T)
    torch.save({"a": base.as_strided((2**40, 3), (0, 1))}, tmp_path / "g.pth")
    with pytest.raises(ValueError, match=r"g\.pth: a is larger than its data|refused"):
        read_pickled(tmp_path / "g.pth", allow_pickle=True)


def test_a_name_that_is_not_printable_is_shown_as_it_is_spelt(tmp_path):
    torch.save({"a\x1b[31m": torch.ones(1)}, tmp_path / "f.pth")
    with pytest.raises(ValueError, match=r"found the key 'a\\x1b\[31m'") as caught:
        read_pickled(tmp_path / "f.pth", allow_pickle=True)
    assert str(caught.value).isprintable()


def test_a_large_hostile_pickle_is_answered_within_memory():
    code = (
        "import resource; from tt_ckpt.formats.pickle_records import read_inert\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30,) * 2)\n"
        "for data in (b'(' * 10**8, b']' * 10**8, (b'](' + b']' * 100000 + b'e0') * 10**3, b'X\\xff\\xff\\xff\\x7f'):\n"
        "    try: read_inert(b'\\x80\\x02' + data + b'.', bool, bool)\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 4


def test_an_archive_of_very_many_entries_is_refused_before_they_are_listed(tmp_path):
    path = tmp_path / "f.pth"
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(20_000):
            archive.writestr(f"{'x' * 400}{i}", b"")
    with pytest.raises(ValueError, match="f.pth: refused: .*more than 8000000 bytes of entries"):
        read_pickled(path, allow_pickle=True)

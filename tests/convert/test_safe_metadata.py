"""A stranger's table of contents makes tables, or is refused: it never runs."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_gmai.convert.safe_metadata import CheckedReader, read_metadata


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two tensors, as torch writes it."""
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    dcp.save(state, checkpoint_id=tmp_path / "it", no_dist=True)
    return tmp_path / "it"


def rewrite(folder: Path, change: Any) -> Path:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder / ".metadata"


def test_a_table_of_torchs_is_read_as_torch_reads_it(folder: Path) -> None:
    theirs = dcp.FileSystemReader(folder).read_metadata()
    ours = read_metadata(folder / ".metadata")
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, entry in theirs.state_dict_metadata.items():
        found = ours.state_dict_metadata[name]
        assert (found.size, found.chunks) == (entry.size, entry.chunks)  # type: ignore[union-attr]
        assert found.properties.dtype == entry.properties.dtype  # type: ignore[union-attr]
    assert ours.storage_data == theirs.storage_data
    loaded = {"a": torch.zeros(2, 3)}
    dcp.load(loaded, storage_reader=CheckedReader(folder), no_dist=True)
    assert torch.equal(loaded["a"], torch.arange(6.0).view(2, 3))


def build_on_a_function() -> bytes:
    """Sets an attribute of an allowed function: BUILD on what is no instance."""
    return b"\x80\x02ctorch.serialization\n_get_layout\n}X\x05\x00\x00\x00cache}sb."


def slots_of_a_class() -> bytes:
    """Sets a method of pathlib's class through a state of two parts."""
    return b"\x80\x02cpathlib\nPosixPath\nN}X\x0b\x00\x00\x00__truediv__K\x01s\x86b."


def a_function_from_a_string() -> bytes:
    return b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."


def a_huge_memo() -> bytes:
    return b"\x80\x02Nr" + struct.pack("<I", 400_000_000) + b"."


def a_persistent_name() -> bytes:
    return b"\x80\x02Pposix.system\n."


@pytest.mark.parametrize(
    "program",
    [
        build_on_a_function,
        slots_of_a_class,
        a_function_from_a_string,
        a_huge_memo,
        a_persistent_name,
    ],
)
def test_a_program_is_refused_and_changes_nothing(program: Any, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(program())
    with pytest.raises(ValueError, match="is not the metadata of a checkpoint and was not loaded"):
        read_metadata(tmp_path / ".metadata")
    assert Path("/safe") / "file" == Path("/safe/file")
    assert not hasattr(torch.serialization._get_layout, "__setstate__")


def test_a_hole_in_a_tensor_is_refused(folder: Path) -> None:
    def no_chunks(metadata: Any) -> None:
        metadata.state_dict_metadata["a"].chunks.clear()

    with pytest.raises(ValueError, match="a is not covered by its 0 boxes"):
        read_metadata(rewrite(folder, no_chunks))


def test_boxes_without_end_are_refused(folder: Path) -> None:
    def shreds(metadata: Any) -> None:
        box = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((1, 3)))
        metadata.state_dict_metadata["a"].chunks[:] = [box] * 20_000

    with pytest.raises(ValueError, match="a lies in 20000 boxes"):
        read_metadata(rewrite(folder, shreds))


def test_boxes_that_overlap_or_reach_out_are_refused(folder: Path) -> None:
    def halves(*offsets: tuple[int, int]) -> Any:
        def change(metadata: Any) -> None:
            boxes = [ChunkStorageMetadata(torch.Size(o), torch.Size((1, 3))) for o in offsets]
            metadata.state_dict_metadata["a"].chunks[:] = boxes

        return change

    with pytest.raises(ValueError, match="a has boxes that overlap"):
        read_metadata(rewrite(folder, halves((0, 0), (0, 0))))
    with pytest.raises(ValueError, match="a has a box that reaches out of it"):
        read_metadata(rewrite(folder, halves((0, 0), (2, 0))))
    read_metadata(rewrite(folder, halves((0, 0), (1, 0))))


@pytest.mark.parametrize("file", ["../weights", "/etc/passwd", "a/b", ".."])
def test_a_file_outside_the_folder_is_refused(file: str, folder: Path) -> None:
    def move(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = file

    with pytest.raises(ValueError, match="is no file of its folder"):
        read_metadata(rewrite(folder, move))


def test_every_box_lies_in_a_file_that_is_one(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"should have {len(content)} bytes, found"):
        CheckedReader(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=rf"should have {len(content)} bytes, found 0"):
        CheckedReader(folder)
    rewrite(folder, lambda metadata: metadata.storage_data.popitem())
    with pytest.raises(ValueError, match="has a box that lies in no file"):
        CheckedReader(folder)
    (folder / ".metadata").unlink()
    os.mkfifo(folder / ".metadata")
    with pytest.raises(ValueError, match="it is no file"):
        read_metadata(folder / ".metadata")

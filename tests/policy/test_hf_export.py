"""The writer of Hugging Face directories: sizes, order, and what an interrupted export leaves."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_rlvr.policy.hf_export import write_hf_model

Stream = Iterator[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def tensors(sizes: list[int]) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}


def write(stream: Stream, directory: Path, elements: int) -> None:
    write_hf_model(stream, {"model_type": "llama"}, directory / "nowhere", directory, shard_bytes=4 * elements)


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), elements=st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_every_tensor_is_in_one_file_and_no_file_is_too_large(sizes: list[int], elements: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write(iter(tensors(sizes).items()), directory, elements)
        files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
        assert sorted(name for file in files for name in file) == sorted(tensors(sizes))
        assert all(torch.equal(read(directory)[name], tensor) for name, tensor in tensors(sizes).items())
        for file, following in zip(files, [*files[1:], None], strict=True):
            held = sum(tensor.numel() for tensor in file.values())
            assert held <= elements or len(file) == 1
            if following is not None:  # a file ends only where the next tensor does not fit
                assert (
                    held + next(iter(sorted(following.items(), key=lambda item: int(item[0][1:]))))[1].numel()
                    > elements
                )
        index = directory / "model.safetensors.index.json"
        assert index.exists() == (len(files) > 1)
        assert (directory / "model.safetensors").exists() == (len(files) == 1)
        if index.exists():
            assert json.loads(index.read_text())["metadata"]["total_size"] == 4 * sum(sizes)


def test_no_more_than_a_file_is_held(tmp_path: Path) -> None:
    """Tensors that were written are let go while the stream goes on."""
    alive: list[int] = []

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            alive.pop()

    def stream() -> Stream:
        for i in range(20):
            alive.append(1)
            assert len(alive) <= 4  # the three of a file and the one that comes
            yield f"t{i}", torch.zeros(10).as_subclass(Counted)

    write(stream(), tmp_path, 30)
    assert len(read(tmp_path)) == 20


@pytest.mark.parametrize("elements", [4, 100])
def test_an_interrupted_export_is_not_taken_for_a_model(tmp_path: Path, elements: int) -> None:
    def stops() -> Stream:
        yield from tensors([3, 3, 3]).items()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(stops(), tmp_path, elements)
    assert not list(tmp_path.glob("model*"))
    write(iter(tensors([2, 2]).items()), tmp_path, elements)
    assert read(tmp_path).keys() == {"t0", "t1"}
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize(("first", "second"), [(4, 100), (100, 4), (4, 8)])
def test_an_export_over_another_leaves_nothing_of_it(tmp_path: Path, first: int, second: int) -> None:
    write(iter(tensors([3, 3, 3]).items()), tmp_path, first)
    write(iter(tensors([4, 4]).items()), tmp_path, second)
    assert {name: tensor.numel() for name, tensor in read(tmp_path).items()} == {"t0": 4, "t1": 4}
    index = tmp_path / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named

"""Files of tensors: read as the libraries that wrote them do, refused by name where they are broken."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.engine import tensor_files
from octavo.engine.checkpoint import CPU
from octavo.engine.tensor_files import DTYPES, PickleFile, Reader, SafetensorsFile


def random_bytes(count):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, count, np.uint8))


def tensors():
    made = {f"t.{name}": random_bytes(24 * dtype.itemsize).view(dtype).view(2, 3, 4) for name, dtype in DTYPES.items()}
    made["t.BOOL"] = made["t.U8"] > 100
    return made | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "one": torch.ones(1, 1)}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("piece", [1, 7, 64 << 20])
def test_safetensors_are_what_the_library_reads(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensor_files, "PIECE", piece)
    path, seen = tmp_path / "m.safetensors", []
    save_file(tensors(), path, metadata={"format": "pt"})
    file, reader = SafetensorsFile(path), Reader(CPU, seen.append)
    expected = load_file(path)
    assert file.tensors.keys() == expected.keys()
    assert list(file.tensors) == sorted(file.tensors, key=lambda name: file.tensors[name].start), "as they lie"
    for name, tensor in expected.items():
        assert (file.tensors[name].shape, file.tensors[name].dtype) == (tensor.shape, tensor.dtype)
        assert bits(file.read(name, reader)) == bits(tensor), name
    assert sum(seen) == sum(t.num_bytes for t in file.tensors.values()) and max(seen) <= piece


@pytest.mark.parametrize("size", [1, 19, 20, 21, 100])
def test_through_the_buffers_of_a_device(tmp_path, monkeypatch, size):
    monkeypatch.setattr(tensor_files, "PIECE", 10)
    data = random_bytes(200)
    (tmp_path / "f").write_bytes(bytes(data.tolist()))
    reader = Reader(torch.device("meta"))
    reader.device = CPU  # whose results can be looked at
    assert torch.equal(reader.read(tmp_path / "f", 13, size), data[13 : 13 + size])


def test_a_file_cut_off_anywhere_is_refused_by_its_first_tensor_that_is_not_whole(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": torch.ones(10, 10), "b.weight": torch.ones(20), "c.weight": torch.ones(300)}, path)
    content, file = path.read_bytes(), SafetensorsFile(path)
    for size in [*range(0, len(content), 13), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut off or broken") as error:
            SafetensorsFile(path)
        broken = next(name for name, t in file.tensors.items() if t.start + t.num_bytes > size)
        header = int.from_bytes(content[:8], "little") + 8
        assert str(error.value).startswith(f"{path}: {broken}: " if size >= header else f"{path}: cut off")


def test_a_file_cut_off_after_it_was_opened(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(100)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"m\.safetensors: cut off while it was read: 1 bytes are missing"):
        file.read("a", Reader(CPU))


def write_header(path, header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, "a: dtype F4; supported: F64, F32"),
        ({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 4]}}, "a: cut off or broken: bytes 0 to 4 are not"),
        ({"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}}, "a: cut off or broken: bytes 1 to 4 are not"),
        ({"a": {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]}}, "a: cut off or broken"),
        ({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, "the tensors end at byte .*, the file at"),
        ({"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}, "a: cut off or broken: its data ends at byte"),
        ({"a": {"dtype": "U8", "shape": [4]}}, "its header is not that of a safetensors file"),
        ({"a": {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}}, "its header is not"),
        ({"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}}, "a: dtype"),
        ({"a": 3}, "its header is not"),
        (["a"], "its header is not"),
        (b"[" * 100_000, "its header is not"),
        (b"\xff{}", "its header is not"),
    ],
)
def test_headers_that_are_wrong(tmp_path, header, message):
    write_header(tmp_path / "m.safetensors", header, bytes(4))
    with pytest.raises(ValueError, match=rf"m\.safetensors: .*{message}"):
        SafetensorsFile(tmp_path / "m.safetensors")


def test_a_header_with_wrong_bytes_opens_or_says_why(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(tensors(), path)
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, header, 400):
        broken = bytearray(content)
        broken[at] ^= 1 << rng.integers(0, 8)
        path.write_bytes(broken)
        try:
            SafetensorsFile(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path, zipped):
    path, seen = tmp_path / "m.bin", []
    expected = {f"w{i}": torch.randn(3, 4)[:, :3] for i in range(3)} | {"h": torch.randn(3).bfloat16()}
    torch.save(expected, path, _use_new_zipfile_serialization=zipped)
    file = PickleFile(path)
    assert {n: (t.shape, t.dtype) for n, t in file.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    for name, tensor in expected.items():
        read = file.read(name, Reader(CPU, seen.append))
        assert torch.equal(read, tensor) and read.is_contiguous()
    file.close()
    assert sum(seen) == sum(t.numel() * t.element_size() for t in expected.values())


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_run_no_code(tmp_path, zipped):
    torch.save(
        {"a": torch.ones(2), "b": Code(tmp_path / "ran")}, tmp_path / "m.bin", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match=r"m\.bin: .*holding more than tensors") as error:
        PickleFile(tmp_path / "m.bin")
    assert not (tmp_path / "ran").exists() and "\n" not in str(error.value)
    torch.load(tmp_path / "m.bin", weights_only=False)["b"].close()
    assert (tmp_path / "ran").exists(), "the code would have run"


@pytest.mark.parametrize("content", [{"a": 3}, [torch.ones(1)], {"a": {"b": torch.ones(1)}}])
def test_pickles_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "m.bin")
    with pytest.raises(ValueError, match=r"m\.bin: expected a dictionary of tensors"):
        PickleFile(tmp_path / "m.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_off_pickles(tmp_path, zipped):
    torch.save({"a": torch.ones(500)}, tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "m.bin").read_bytes()
    for size in range(0, len(content) - 1, 150):
        (tmp_path / "m.bin").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"m\.bin: cut off, broken"):
            PickleFile(tmp_path / "m.bin")

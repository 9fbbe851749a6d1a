"""mistral_ext.weights.gguf_file: reads what the `gguf` package writes; refuses what is damaged."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf_files import entry, file_bytes, random_blocks, tensor, text

from mistral_ext.weights.gguf_blocks import BLOCK_TYPES
from mistral_ext.weights.gguf_file import read_gguf

U8, I32, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 5, 4, 6, 7, 8, 9, 10


@pytest.fixture
def written(tmp_path):
    """A file with every kind of metadata, and a tensor of each type."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 7)
    writer.add_int32("i32", -7)
    writer.add_uint64("u64", 2**63)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "a ▁ ü")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["a", "", "ü"])
    for number, block_type in BLOCK_TYPES.items():
        data = random_blocks(block_type, 3, 256, seed=number).numpy()
        kind = gguf.GGMLQuantizationType(number)
        writer.add_tensor(f"matrix.{block_type.name}", data, raw_dtype=kind)
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_package_writes(written):
    file = read_gguf(written)
    expected = {
        "general.architecture": "llama",
        "u8": 7,
        "i32": -7,
        "u64": 2**63,
        "f64": 0.1,
        "bool": True,
        "string": "a ▁ ü",
        "texts": ["a", "", "ü"],
    }
    numbers = file.metadata["numbers"]
    assert {key: file.metadata[key] for key in expected} == expected
    assert numbers.tolist() == [1, 2, 3]
    reader = gguf.GGUFReader(written)
    assert len(file.tensors) == len(reader.tensors)
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(theirs.shape.tolist()[::-1])
        assert ours.offset == theirs.data_offset
        assert ours.nbytes == theirs.n_bytes
        data = theirs.data.reshape(-1).view(np.uint8)
        assert torch.equal(ours.rows().flatten(), torch.from_numpy(data.copy()))
    assert file.tensors["vector"].rows().view(torch.float32).tolist() == [[0, 1, 2, 3, 4]]


def test_data_are_the_files_own_and_cannot_be_written_to(written):
    file = read_gguf(written)
    before = written.read_bytes()
    file.tensors["vector"].rows().fill_(1)
    assert written.read_bytes() == before


def test_version_2_is_read_alike(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(file_bytes([entry("a", U8, b"\5")], version=2))
    assert read_gguf(path).metadata == {"a": 5}


WEIGHT = tensor("w", [32], 0, 0)  # F32: 128 bytes
DATA = bytes(128)
HUGE = struct.pack("<Q", 2**64 - 1)


DAMAGED = [
    (b"", "has 0 bytes, expected a GGUF file"),
    (b"GGML" + bytes(60), r"magic bytes are b'GGML', expected b'GGUF'"),
    (file_bytes(version=1), "version is 1, expected 2 or 3"),
    (b"GGUF\0\0\0\3" + bytes(16), "version is 50331648 in big-endian order, expected 2 or 3"),
    (file_bytes()[:17], "number of metadata entries should end at byte 24"),
    (file_bytes(n_entries=1), "number of metadata entries is 1, but 8 bytes are left"),
    (file_bytes(n_entries=2**63), r"number of metadata entries is 9223372036854775808, but 8"),
    (file_bytes(n_tensors=2**63), r"number of tensors is 9223372036854775808, but 16 bytes"),
    (file_bytes([HUGE + bytes(99)]), "key of metadata entry 0 should end at byte 184467440737"),
    (file_bytes([entry("a", STRING, HUGE)]), "a should end at byte 18446744073709551"),
    (file_bytes([entry("a", 13, bytes(8))]), "type of 'a' is 13, expected a number or text"),
    (file_bytes([entry("a", BOOL, b"\2")]), "a is no bool"),
    (file_bytes([entry("a", U8, b"\1"), entry("a", U8, b"\2")]), "metadata has 'a' twice"),
    (
        file_bytes([entry("a", ARRAY, struct.pack("<I", STRING) + HUGE)]),
        "length of 'a' is 18446744073709551615, but",
    ),
    (
        file_bytes([entry("a", ARRAY, struct.pack("<IQ", U64, 2**61))]),
        "length of 'a' is 2305843009213693952, but",
    ),
    (
        file_bytes([entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(30))]),
        "type of 'a' is 9, expected a number or text",
    ),
    (
        file_bytes([entry("general.alignment", U32, struct.pack("<I", 24))]),
        "general.alignment is 24, expected a power of two",
    ),
    (
        file_bytes([entry("general.alignment", STRING, text("32"))]),
        "general.alignment is '32', expected a power of two",
    ),
    (file_bytes([], [tensor("w", [], 0, 0)], DATA), "tensor 'w' has 0 dimensions"),
    (file_bytes([], [tensor("w", [1] * 5, 0, 0)], DATA), "tensor 'w' has 5 dimensions"),
    (file_bytes([], [tensor("w", [32], 16, 0)], DATA), "'w' has type IQ2_XXS, expected one of"),
    (file_bytes([], [tensor("w", [32], 999, 0)], DATA), "'w' has type 999, expected one of"),
    (file_bytes([], [tensor("w", [32, 0], 0, 0)], DATA), r"impossible shape \(0, 32\)"),
    # 2^64 values: a product in 64 bits would be 0.
    (file_bytes([], [tensor("w", [2**32, 2**32], 0, 0)], DATA), "impossible shape"),
    (file_bytes([], [tensor("w", [2**62], 0, 0)], DATA), "impossible shape"),
    (file_bytes([], [tensor("w", [48], 2, 0)], DATA), "rows of 48 values, expected"),
    (file_bytes([], [tensor("w", [32], 0, 4)], DATA + DATA), "at offset 4, expected a"),
    (file_bytes([], [tensor("w", [32], 0, 32)], DATA), "'w' should end at byte .* truncated"),
    (file_bytes([], [tensor("w", [32], 0, 2**63)], DATA), "'w' should end at byte 9223372036"),
    (file_bytes([], [WEIGHT, tensor("v", [32], 0, 96)], DATA * 2), "'v' at offset 96 lies in"),
    (file_bytes([], [WEIGHT, tensor("w", [32], 0, 128)], DATA * 2), "'w' is there twice"),
    (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
]


@pytest.mark.parametrize(("data", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_damage_names_the_file_and_the_field(data, message, tmp_path):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_gguf(path)
    assert str(path) in str(error.value)


def test_every_truncation_is_refused(written):
    data = written.read_bytes()
    header = min(t.offset for t in read_gguf(written).tensors.values())
    for length in [*range(0, header, 7), len(data) - 33]:
        written.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"model\.gguf"):
            read_gguf(written)


# Models in several files


def write_part(folder, number, count, tensors, total, name="m"):
    entries = [
        entry("split.no", 2, struct.pack("<H", number - 1)),
        entry("split.count", 2, struct.pack("<H", count)),
        entry("split.tensors.count", I32, struct.pack("<i", total)),
    ]
    path = folder / f"{name}-{number:05}-of-{count:05}.gguf"
    path.write_bytes(file_bytes(entries, tensors, DATA))
    return path


def test_parts_are_read_together_whichever_is_named(tmp_path):
    paths = [write_part(tmp_path, i, 2, [tensor(f"w{i}", [32], 0, 0)], 2) for i in (1, 2)]
    for path in paths:
        file = read_gguf(path)
        assert file.path == paths[0]
        assert {name: t.file for name, t in file.tensors.items()} == dict(
            zip(["w1", "w2"], paths, strict=True)
        )


def test_a_missing_part_is_named(tmp_path):
    path = write_part(tmp_path, 1, 2, [WEIGHT], 1)
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00002\.gguf is missing"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("number", "count", "total", "name", "message"),
    [
        (2, 3, 2, "v", r"00002-of-00002.gguf: split.count is 3, expected 2"),
        (1, 2, 2, "v", r"00002-of-00002.gguf: split.no is 0, expected 1"),
        (2, 2, 2, "w", r"tensor 'w' is in both .*00001.* and .*00002"),
        (2, 2, 3, "v", r"split.tensors.count is 3, expected 2"),
    ],
)
def test_parts_that_do_not_belong_together(number, count, total, name, message, tmp_path):
    path = write_part(tmp_path, 1, 2, [WEIGHT], total)
    other = write_part(tmp_path, number, count, [tensor(name, [32], 0, 0)], total, name="other")
    other.rename(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(ValueError, match=message):
        read_gguf(path)


def test_one_part_under_another_name_is_incomplete(tmp_path):
    path = write_part(tmp_path, 1, 2, [WEIGHT], 2).rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"split.count is 2, expected 1"):
        read_gguf(path)


def test_impossible_part(tmp_path):
    with pytest.raises(ValueError, match="part 3 of 2, expected 1 to 2"):
        read_gguf(tmp_path / "m-00003-of-00002.gguf")

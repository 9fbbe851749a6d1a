"""Damaged GGUF headers: each must be read, or refused with a ValueError, within bounded memory.

The headers are small valid ones with a few bytes changed, most often to extreme numbers, cut or
joined. A million of them, which takes some minutes:

    python tests/fuzz/gguf_headers.py 1000000
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from gguf_files import entry, file_bytes, tensor, text

from mistral_ext.weights.gguf_file import read_part

_EXTREMES = [0, 1, 31, 2**7, 2**8, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
_EXTREMES += [2**59, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]

_SEED = file_bytes(
    [
        entry("general.architecture", 8, text("llama")),
        entry("general.alignment", 4, struct.pack("<I", 32)),
        entry("a.bool", 7, b"\1"),
        entry("a.list", 9, struct.pack("<IQ", 8, 2) + text("one") + text("two")),
        entry("some.numbers", 9, struct.pack("<IQ4f", 6, 4, 1, 2, 3, 4)),
    ],
    [tensor("w", [32, 2], 0, 0), tensor("v", [256, 1], 12, 256), tensor("u", [32], 8, 416)],
    bytes(512),
)
_HEADER = len(_SEED) - 512
_MOST_READ = 100 * len(_SEED)  # bytes of what a header may become


def mutated(generator: random.Random) -> bytes:
    """A header with one to four changes."""
    data = bytearray(_SEED)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(min(len(data), _HEADER) or 1)
        kind = generator.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([generator.randrange(256)])
        elif kind == 1:
            size = generator.choice([4, 8])
            value = generator.choice(_EXTREMES) % 2 ** (8 * size)
            data[at : at + size] = value.to_bytes(size, "little")
        elif kind == 2:
            del data[at : at + generator.randint(1, 40)]
        elif kind == 3:
            data[at:at] = data[at : at + generator.randint(1, 40)]
        else:
            del data[generator.randrange(len(data) + 1) :]
    return bytes(data)


def fuzz(count: int, seed: int = 0) -> dict[str, int]:
    """How many of `count` headers were read and how many refused; anything else is raised."""
    generator = random.Random(seed)
    results = {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        for i in range(count):
            data = mutated(generator)
            path.write_bytes(data)
            try:
                file = read_part(path)
            except ValueError as error:
                if str(path) not in str(error):
                    raise AssertionError(f"header {i} of seed {seed}") from error
                results["refused"] += 1
                continue
            results["read"] += 1
            for part in file.tensors.values():
                assert part.rows().nbytes == part.nbytes <= len(data), f"header {i} of seed {seed}"
            values = file.metadata.values()
            assert sum(map(sys.getsizeof, values)) < _MOST_READ, f"header {i} of seed {seed}"
    return results


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0))

"""The ring cache: keys and values of the last W tokens of each sequence, and no more.

A query sees itself and the W - 1 tokens before it, so a sequence never needs more than W of its
keys and values. It owns a *ring* of C = min(W, its longest length) slots, and the token at
position p lives in slot p mod C. With W = 4, after 6 tokens (positions 0 to 5):

    slot       0  1  2  3
    position   4  5  2  3        4 and 5 took the slots of 0 and 1, which no later query sees

The next token, position 6, sees 3, 4, 5 and itself; it goes to slot 2, over position 2. A prompt
is read in chunks: a chunk of two tokens, 6 and 7, takes slots 2 and 3; but query 6 still sees
position 3, so token 7 is stored only when attention is done (csrc/ring.h has the rule). A chunk
longer than the ring stores only its last C tokens.

Without a window C is the longest length that the sequence may reach, and nothing else changes.
Mistral 7B takes 131,072 bytes a token in bfloat16: 512 MiB for a ring of 4096, for ever.

The rings of all sequences lie in one pool per layer, for keys and for values, each [R, D]; the
*sequence table* (see `mistral_ext.ops`) tells the kernels where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mistral_ext.model.config import MistralConfig


def ring_capacity(config: MistralConfig, max_length: int) -> int:
    """Slots that a sequence of at most `max_length` tokens needs."""
    return min(config.sliding_window or max_length, max_length)


class RingCache:
    """One ring per sequence in every layer.

    Args:
        config: gives the layers, key/value heads, head dimension and window.
        capacities: slots of each ring, at least 1; see `ring_capacity`.
        dtype, device: of the keys and values.

    Attributes:
        k, v: the pools, a tensor [R, D] per layer, R = Hkv * sum(capacities).
        lengths: tokens that each ring's sequence has seen so far.
    """

    def __init__(
        self,
        config: MistralConfig,
        capacities: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        if not capacities or min(capacities) < 1:
            raise ValueError(f"capacities is {list(capacities)}, expected one or more, each >= 1")
        self.window = config.sliding_window
        self.capacities = list(capacities)
        self.lengths = [0] * len(capacities)
        self._furthest = [0] * len(capacities)  # the longest that each has been since it was empty
        self._rows = [0]
        for capacity in capacities:
            self._rows.append(self._rows[-1] + config.n_kv_heads * capacity)
        shape = (self._rows[-1], config.head_dim)
        # Not zeroed: untouched pages cost no memory until a token is stored in them.
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pool in (*self.k, *self.v))

    def append(self, counts: Mapping[int, int]) -> Tensor:
        """Makes room for new tokens and returns the sequence table of the call that stores them.

        Args:
            counts: {ring: number of new tokens}, in the order in which the tokens are packed.

        Returns:
            [S, 5] int64 on the CPU.

        Raises:
            ValueError: a ring without a window would overflow.
        """
        for ring, count in counts.items():
            length, capacity = self.lengths[ring], self.capacities[ring]
            if (self.window is None or capacity < self.window) and length + count > capacity:
                raise ValueError(
                    f"ring {ring} has {capacity} slots and no room for {count} more tokens "
                    f"after {length}"
                )
        table, first_token = [], 0
        for ring, count in counts.items():
            length, capacity = self.lengths[ring], self.capacities[ring]
            table.append((first_token, count, length, self._rows[ring], capacity))
            first_token += count
            self.lengths[ring] += count
            self._furthest[ring] = max(self._furthest[ring], self.lengths[ring])
        return torch.tensor(table, dtype=torch.int64)

    def rewind(self, ring: int, length: int) -> bool:
        """Forgets all but the first `length` tokens of a ring, if the ring still allows it.

        The next token would see positions length - W + 1 and up; once one of those has been
        overwritten there is no way back, and the caller must start over from `length` 0, which
        always works.

        Returns:
            Whether it was done; if not, nothing has changed.
        """
        seen = self.lengths[ring]
        if not 0 <= length <= seen:
            raise ValueError(f"length is {length}, expected 0 to {seen}")
        oldest_seen = max(0, length - self.window + 1) if self.window else 0
        oldest_kept = max(0, self._furthest[ring] - self.capacities[ring])
        if oldest_seen < min(length, oldest_kept):
            return False
        self.lengths[ring] = length
        if length == 0:
            self._furthest[ring] = 0
        return True

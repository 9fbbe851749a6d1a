"""How much cache there is, if nobody says."""

from __future__ import annotations

from pathlib import Path

import torch

from mistral_ext.engine.slots import slots_needed
from mistral_ext.model.config import LEAST_CACHE_TOKENS, MistralConfig

# Of the memory that is left when the weights have theirs. A GPU runs little else, but a pass over
# a long prompt needs memory too; a computer has other programs.
_SHARE_OF_GPU = 0.8
_SHARE_OF_CPU = 0.5


def default_slots(
    config: MistralConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_batch: int,
    weight_bytes: int,
) -> int:
    """Tokens that the cache has room for by default.

    As many as `max_batch` sequences can need, if there is memory for them.

    Args:
        weight_bytes: of the weights, which on the CPU may be mapped files: memory that the system
            counts as available, but that is in use.
    """
    wanted = max_batch * slots_needed(config.sliding_window, config.max_positions)
    if device.type == "cuda":
        available = _SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]
    else:
        available = _SHARE_OF_CPU * (available_memory() - weight_bytes)
    # The least, whatever the memory: pages that no token is stored in take none.
    return min(wanted, max(LEAST_CACHE_TOKENS, int(available / config.cache_bytes(dtype))))


def available_memory() -> int:
    """Bytes that this process may still use, as the system or its container says."""
    available = _meminfo("MemAvailable")
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**33  # no Linux: a guess


def _cgroup(name: str) -> int | None:
    """A number of this process' control group (version 2); None: it has none."""
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        text = Path("/sys/fs/cgroup", group.lstrip("/"), name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

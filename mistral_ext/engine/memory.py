"""Chooses the default size of the cache by the free memory."""

from __future__ import annotations

from pathlib import Path

import torch

from mistral_ext.control_groups import OWN, ROOT, control_groups
from mistral_ext.engine.slots import slots_needed
from mistral_ext.model.config import LEAST_CACHE_TOKENS, MistralConfig

# The cache may take this share of the memory that the weights leave free. On a GPU the rest is for
# passes over long prompts. On the CPU it is also for other programs.
_SHARE_OF_GPU = 0.8
_SHARE_OF_CPU = 0.5


def default_slots(
    config: MistralConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_batch: int,
    weight_bytes: int,
    loaded: bool = True,
    token_bytes: int | None = None,
) -> int:
    """The number of tokens that the cache has room for by default.

    If there is enough memory, the cache has room for the most that `max_batch` sequences can need.

    Args:
        config: the configuration of the model.
        dtype, device: the dtype and device of the cache.
        max_batch: the most sequences at a time.
        weight_bytes: the size of the weights in bytes. On the CPU the weights may be mapped files,
            whose memory the system counts as available although it is in use.
        loaded: whether the weights are already on the device. If so, the free memory that a GPU
            reports does not include theirs.
        token_bytes: the bytes that a token takes in the cache, and in that of a draft model if
            there is one. None: there is no draft model.
    """
    wanted = max_batch * slots_needed(config.sliding_window, config.max_positions)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        available = _SHARE_OF_GPU * (free if loaded else free - weight_bytes)
    else:
        available = _SHARE_OF_CPU * (available_memory() - weight_bytes)
    # LEAST_CACHE_TOKENS are allowed even if memory is short, because a request that is larger than
    # the cache is refused. On the CPU the cache takes memory only once tokens are stored in it.
    room = int(available / (token_bytes or config.cache_bytes(dtype)))
    return min(wanted, max(LEAST_CACHE_TOKENS, room))


def available_memory(root: Path = ROOT, own: Path = OWN) -> int:
    """The bytes that this process may still use, as its system or container reports. Where there is
    no report, the result is a guess.

    Args:
        root, own: as in `control_groups`.
    """
    left = [_left_of_group(*group) for group in control_groups("memory", root, own)]
    return min([_meminfo("MemAvailable"), *(bytes_ for bytes_ in left if bytes_ is not None)])


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**33  # bytes: a guess where there is no such file, as on systems other than Linux


def _left_of_group(folder: Path, version_1: bool) -> int | None:
    """The bytes that a control group may still use. None: it sets no limit, or does not report it.

    Pages of files, such as mapped weights, count as left, as in MemAvailable: the system takes them
    back if memory is short.
    """
    names = ("limit_in_bytes", "usage_in_bytes") if version_1 else ("max", "current")
    try:
        # The limit is "max" if there is none. In version 1 it is then a number above all memory.
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        prefix = "total_" if version_1 else ""  # in version 1 the total includes groups below
        files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    except (OSError, ValueError):
        return None
    return max(0, limit - used + files)

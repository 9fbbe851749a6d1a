"""Uses 4 bits for most matrices and 8 for some, so that a model has a given size: `quantize --size
4.2GB`.

A matrix loses accuracy in 4 bits (sensitivity.py), and takes more bytes in 8. While there is room,
8 bits go to the matrices where each additional byte avoids the most loss.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch

from mistral_ext.model.config import MistralConfig
from mistral_ext.weights.new_model import layout_of, weights_size
from mistral_ext.weights.quantize import Quantization

_SMALL, _LARGE = Quantization.from_bits(4), Quantization.from_bits(8)

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}


def bytes_of(size: str | int) -> int:
    """Reads a size in bytes, such as "4.2GB", "3.9 GiB" or 4200000000. A GB has 10^9 bytes, a GiB
    2^30.

    Raises:
        ValueError: `size` is not written like one of these.
    """
    match = re.fullmatch(r"([0-9]+)(\.[0-9]+)? *([a-z]*)", str(size).strip().lower())
    unit = None if match is None else _UNITS.get(match[3])
    if match is None or unit is None or (match[2] and unit == 1):
        raise ValueError(f"size is {size!r}, expected a number of bytes, or one such as 4.2GB")
    return round(float(f"{match[1]}{match[2] or ''}") * unit)


class Mixture:
    """Chooses the formats of a model of a given size.

    Args:
        size: the most bytes that the file of weights may have, as in `bytes_of`.
        config: the configuration of the model.
        dtype: the dtype of the weights that are not quantised.

    Raises:
        ValueError: `size` is not a size, or is smaller than the file with all matrices in 4 bits,
            or larger than the file with all matrices in 8 bits.
    """

    def __init__(self, size: str | int, config: MistralConfig, dtype: torch.dtype) -> None:
        self._size, self._config, self._dtype = bytes_of(size), config, dtype
        least, most = (weights_size(layout_of(config, dtype, q)) for q in (_SMALL, _LARGE))
        if not least <= self._size <= most:
            raise ValueError(
                f"size is {size!r}, expected {least} bytes (all matrices in 4 bits) to {most} "
                "(all in 8)"
            )

    def best(self, sensitivities: Mapping[str, float]) -> Quantization:
        """Chooses the formats. The matrices are tried one after another, first those where 8 bits
        avoid the most loss for each additional byte. A matrix gets 8 bits if the file then has at
        most the given size.

        Args:
            sensitivities: the loss of accuracy by 4 bits in each matrix of the layers, by Mistral's
                names.
        """
        small = layout_of(self._config, self._dtype, _SMALL)
        large = layout_of(self._config, self._dtype, _LARGE)

        def saved(name: str) -> float:
            """The loss that 8 bits avoid in a matrix, for each additional byte."""
            return sensitivities[name] / (large[name].nbytes - small[name].nbytes)

        chosen: set[str] = set()
        for name in sorted(sensitivities, key=saved, reverse=True):
            layout = small | {other: large[other] for other in (*chosen, name)}
            if weights_size(layout) <= self._size:
                chosen.add(name)
        formats = {name: _LARGE.format for name in sensitivities if name in chosen}
        return dataclasses.replace(_SMALL, formats=formats)

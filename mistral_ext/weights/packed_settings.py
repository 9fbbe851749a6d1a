"""Reads from the configuration of a packed checkpoint how its matrices are stored.

GPTQ, AWQ, compressed-tensors and bitsandbytes write `quantization_config` into config.json. Older
folders of GPTQ and AWQ have a separate file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_ext.files import read_json_object

# The keys of config.json with such settings. The second is that of old versions of
# compressed-tensors.
_KEYS = ("quantization_config", "compression_config")
# The names of settings files, with the methods that write them. A folder without such a key may
# have one of these files.
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

WHOLE_ROW = -1  # the group size if a row has one scale


@dataclass(frozen=True)
class Packing:
    """How the matrices of a folder are packed.

    Attributes:
        method: "gptq", "awq", "compressed-tensors" or "bitsandbytes". For "bitsandbytes" the other
            fields mean nothing, because each matrix has its own settings beside it.
        bits: the bits of a value, 4 or 8.
        group: the number of neighbouring values that share a scale, or WHOLE_ROW.
        symmetric: whether there are no zero points, or all are 2^(bits - 1).
        zero_minus_one: whether zero points are stored minus 1, as in the first version of GPTQ.
        act_order: whether the inputs of a group may be anywhere in a row. If they may, a tensor of
            the layer says to which group each input belongs.
    """

    method: str
    bits: int = 4
    group: int = WHOLE_ROW
    symmetric: bool = False
    zero_minus_one: bool = False
    act_order: bool = False

    def __str__(self) -> str:
        return "nf4" if self.method == "bitsandbytes" else f"{self.method} in {self.bits} bits"


def method_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], object, str]:
    """Returns the quantisation settings in a config.json, their quant_method, and the key under
    which they are. Returns ({}, None, "") if there are no such settings.

    Raises:
        ValueError: the settings are not an object.
    """
    for key in _KEYS:
        settings = config.get(key)
        if settings:
            if not isinstance(settings, dict):
                raise ValueError(f"{key} is {settings!r:.60}, expected an object")
            return settings, settings.get("quant_method"), key
    return {}, None, ""


def packing_of(config: Mapping[str, Any], folder: Path) -> Packing | None:
    """Reads how the matrices of a folder are packed. Returns None if they are not packed.

    Args:
        config: the contents of a config.json, but not of a folder that this package has quantised
            (`Quantization.from_settings` reads those).

    Raises:
        ValueError: the matrices are packed in a way that is not supported. The message names the
            setting.
    """
    settings, method, place = method_of(config)
    if not settings:
        place = next((name for name in OWN_FILES if (folder / name).is_file()), "")
        if not place:
            return None
        settings = read_json_object(folder / place)
        method = settings.get("quant_method", OWN_FILES[place])
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        raise ValueError(
            f"{place}: quant_method is {method!r}, expected one of mistral_ext, "
            f"{', '.join(_METHODS)}; 'mistral-ext quantize' makes weights in 8 or 4 bits from the "
            "original ones"
        )
    try:
        return read(settings)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _gptq(settings: Mapping[str, Any]) -> Packing:
    bits = _choice(settings, "bits", (4, 8), None)
    form = _choice(settings, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    symmetric = _choice(settings, "sym", (True, False), True)
    if bits == 8 and not symmetric:
        raise ValueError("sym is False with 8 bits, expected True: zero points need 4 bits")
    # With static groups the quantiser rounds the inputs in another order, but in the file the
    # inputs of a group are neighbours. So for a reader there is no act-order.
    meta = settings.get("meta")
    static = settings.get("static_groups") or (isinstance(meta, dict) and meta.get("static_groups"))
    act_order = bool(settings.get("desc_act")) and not static
    size = _group(settings, "group_size")
    return Packing("gptq", bits, size, symmetric, form == "gptq", act_order)


def _awq(settings: Mapping[str, Any]) -> Packing:
    # In old files the number of bits and the group size have other names.
    _choice(settings, "w_bit" if "w_bit" in settings else "bits", (4,), None)
    group = _group(settings, "q_group_size" if "q_group_size" in settings else "group_size")
    version = settings.get("version", settings.get("checkpoint_format", "gemm"))
    _expect("version", str(version).lower(), ("gemm",))
    _choice(settings, "zero_point", (True,), True)
    return Packing("awq", 4, group)


def _compressed_tensors(settings: Mapping[str, Any]) -> Packing:
    _choice(settings, "format", ("pack-quantized",), None)
    _expect_weights_alone_turned(settings.get("transform_config"))
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError(f"config_groups is {groups!r:.60}, expected an object with one group")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"weights of config_groups is {weights!r:.60}, expected an object")
    for name in ("input_activations", "output_activations"):
        if group.get(name):
            raise ValueError(f"{name} is {group[name]!r:.60}, expected null: only weights in bits")
    bits = _choice(weights, "num_bits", (4, 8), None)
    _choice(weights, "type", ("int",), "int")
    symmetric = _choice(weights, "symmetric", (True, False), True)
    if bits == 8 and not symmetric:
        raise ValueError("symmetric is False with 8 bits, expected True: zero points need 4 bits")
    strategy = _choice(weights, "strategy", ("group", "channel"), None)
    size = _group(weights, "group_size") if strategy == "group" else WHOLE_ROW
    act_order = str(weights.get("actorder")).lower() in ("group", "dynamic", "true")
    return Packing("compressed-tensors", bits, size, symmetric, act_order=act_order)


def _expect_weights_alone_turned(config: object) -> None:
    """Raises ValueError if a model has rotations that are computed as it runs (SpinQuant, QuIP).
    Rotations of weights alone are in the weights already."""
    if not config:
        return
    try:
        schemes = config["config_groups"].values()  # type: ignore[index]
        places = {apply["location"] for scheme in schemes for apply in scheme["apply"]}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"transform_config is {config!r:.60}, expected null") from None
    for place in sorted(places - {"weight_input", "weight_output"}, key=str):
        raise ValueError(
            f"transform_config has location {place!r}, expected weight_input or weight_output: "
            "activations are not rotated"
        )


def _bitsandbytes(settings: Mapping[str, Any]) -> Packing:
    if settings.get("load_in_8bit"):
        raise ValueError("load_in_8bit is True, expected load_in_4bit")
    _choice(settings, "bnb_4bit_quant_type", ("nf4",), None)
    return Packing("bitsandbytes")


_METHODS = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
}


def _group(settings: Mapping[str, Any], key: str) -> int:
    size = settings.get(key)
    if isinstance(size, bool) or not isinstance(size, int) or not (size > 0 or size == WHOLE_ROW):
        raise ValueError(f"{key} is {size!r}, expected a positive number or {WHOLE_ROW}")
    return size


def _choice(settings: Mapping[str, Any], key: str, choices: tuple[Any, ...], default: Any) -> Any:
    value = settings.get(key, default)
    _expect(key, value, choices)
    return value


def _expect(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ValueError(f"{key} is {value!r}, expected {' or '.join(map(repr, choices))}")

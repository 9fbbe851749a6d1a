"""Models with 4 bits for most matrices and 8 for some: their sizes, the choice, and their files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from checkpoints import write_checkpoint

from mistral_ext import Mistral
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops import Quantized
from mistral_ext.weights import quantize_checkpoint as module
from mistral_ext.weights import sensitivity
from mistral_ext.weights.calibrate import CalibratedLayers
from mistral_ext.weights.checkpoint import load_weights, tensor_shapes
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.mixed import Mixture, bytes_of
from mistral_ext.weights.names import hugging_face_name, mistral_name
from mistral_ext.weights.new_model import layout_of, weights_size
from mistral_ext.weights.quantize import Quantization, quantize
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

V, W2 = "layers.0.attention.wv.weight", "layers.1.feed_forward.w2.weight"


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "model", intermediate_size=256)
    return tmp_path / "model"


@pytest.fixture
def config(folder):
    return read_folder(folder).config


@pytest.fixture
def between(config):
    """Bytes of a model with 4 bits, and with a share of what 8 bits take more."""

    def size(share: float, dtype: torch.dtype = torch.float32) -> int:
        low, high = (
            weights_size(layout_of(config, dtype, Quantization.from_bits(bits))) for bits in (4, 8)
        )
        return int(low + share * (high - low))

    return size


def file_size(folder) -> int:
    return (folder / "model.safetensors").stat().st_size


def settings_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def with_settings(folder, **changes) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"] |= changes
    file.write_text(json.dumps(values))


# Sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("4.2GB", 4_200_000_000),
        (" 4.2 gb ", 4_200_000_000),
        ("4GiB", 2**32),
        ("1.5MiB", 3 * 2**19),
        ("500mb", 500_000_000),
        ("12KB", 12000),
        ("1TiB", 2**40),
        ("7B", 7),
        ("4200000000", 4_200_000_000),
        (4_200_000_000, 4_200_000_000),
    ],
)
def test_units(size, expected):
    assert bytes_of(size) == expected


NO_SIZES = ["", "GB", "4.2G", "four GB", "-4GB", "4,2GB", "1e9", "4.2", "4.2B", "4. GB", "nan"]


@pytest.mark.parametrize("size", [*NO_SIZES, "\u0664GB"])
def test_no_sizes_are_named(size):
    with pytest.raises(ValueError, match=f"size is {size!r}, expected a number of bytes, or one"):
        bytes_of(size)


def test_bounds(folder, config, between, tmp_path):
    low, high = between(0), between(1)
    for size in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"size is {size}, expected {low} bytes .* to {high} "):
            quantize_checkpoint(folder, tmp_path / "new", size=size)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    for size, bits in ((low, 4), (high, 8)):
        whole = quantize_checkpoint(folder, tmp_path / f"all {bits}", bits)
        mixed = quantize_checkpoint(folder, tmp_path / f"{size}", size=size)
        assert file_size(whole) == file_size(mixed) == size
        assert len(settings_of(mixed).get("formats", ())) == (14 if bits == 8 else 0)


def test_the_most_for_each_byte_comes_first(config, between):
    """w2 loses more than wv, but not for each byte of it."""
    names = [n for n, shape in tensor_shapes(config).items() if n[0] == "l" and len(shape) == 2]
    lost = dict.fromkeys(names, 0.0) | {V: 2.0, W2: 3.0}
    small, large = (layout_of(config, torch.float32, Quantization.from_bits(b)) for b in (4, 8))
    of_v, of_w2 = (large[name].nbytes - small[name].nbytes for name in (V, W2))
    assert 2.0 / of_v > 3.0 / of_w2
    for room, expected in ((0, set()), (of_w2, {V}), (of_v + of_w2 + 64, {V, W2})):
        best = Mixture(between(0) + room, config, torch.float32).best(lost)
        assert {name for name in (V, W2) if name in best.formats} == expected
        assert set(best.formats.values()) <= {"q8_0"}
    assert len(Mixture(between(1), config, torch.float32).best(lost).formats) == 14


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_as_much_as_there_is_room_for(folder, tmp_path, between, share):
    size = between(share)
    new = quantize_checkpoint(folder, tmp_path / "new", size=str(size))
    stored, original = (load_weights(read_folder(f)) for f in (new, folder))
    least = min(
        quantize(original[name], "q8_0").nbytes - weight.nbytes
        for name, weight in stored.items()
        if isinstance(weight, Quantized) and weight.format != "q8_0"
    )
    assert size - least - 64 < file_size(new) <= size  # 64: the header's alignment


def test_dtype_counts(folder, tmp_path, between):
    size = between(0.1, torch.bfloat16)
    assert size < between(0)  # too little for float32
    new = quantize_checkpoint(folder, tmp_path / "new", dtype=torch.bfloat16, size=size)
    assert file_size(new) <= size


# Files


@pytest.fixture
def mixed(folder, tmp_path, monkeypatch):
    """wv of layer 0 and w2 of layer 1 in 8 bits."""
    formats = {V: "q8_0", W2: "q8_0"}
    chosen = dataclasses.replace(Quantization.from_bits(4), formats=formats)
    monkeypatch.setattr(Mixture, "best", lambda self, found: chosen)
    return quantize_checkpoint(folder, tmp_path / "mixed", size=file_size_of_half(folder))


def file_size_of_half(folder) -> int:
    layouts = (
        layout_of(read_folder(folder).config, torch.float32, Quantization.from_bits(bits))
        for bits in (4, 8)
    )
    return sum(map(weights_size, layouts)) // 2


def test_read_back(folder, mixed):
    assert settings_of(mixed) == {
        "quant_method": "mistral_ext",
        "format": "iq4_xs",
        "group_size": 256,
        "output_format": "q8_0",
        "formats": {hugging_face_name(V): "q8_0", hugging_face_name(W2): "q8_0"},
    }
    assert str(read_folder(mixed).quantization) == "iq4_xs in groups of 256, 2 matrices q8_0"
    original = load_weights(read_folder(folder))
    for name, weight in load_weights(read_folder(mixed)).items():
        if isinstance(weight, torch.Tensor):
            assert torch.equal(weight, original[name])
            continue
        eight = name in (V, W2, "output.weight")
        four = "iq4_xs" if original[name].shape[1] == 256 else "iq4_nl"
        expected = quantize(original[name], "q8_0" if eight else four)
        assert weight.format == expected.format
        assert torch.equal(weight.values, expected.values), name
        assert torch.equal(weight.scales, expected.scales), name


def test_products_of_both(mixed, monkeypatch):
    """Query, key and value are multiplied in one call, whose parts then have two formats."""
    monkeypatch.setenv("MISTRAL_EXT_EXACT", "1")
    read = read_folder(mixed)
    weights = load_weights(read)
    plain = {n: w.dequantize() if isinstance(w, Quantized) else w for n, w in weights.items()}
    ids = torch.arange(3, 43).tolist()
    for chunk in (1, 40):
        given, expected = (
            Mistral(read.config, Transformer(read.config, w), None, mixed).logits(ids, chunk=chunk)
            for w in (weights, plain)
        )
        assert (given - expected).abs().max() < 0.02 * expected.abs().max()


def test_read_as_it_is_stored(mixed):
    loaded = load_weights(read_folder(mixed), quantize="int4")
    assert loaded[V].format == "q8_0"
    with pytest.raises(ValueError, match="as iq4_xs in groups of 256, 2 matrices q8_0, and cannot"):
        load_weights(read_folder(mixed), quantize="int8")


def test_names_there_and_back(config):
    for name in tensor_shapes(config):
        assert mistral_name(hugging_face_name(name)) == name


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (["q8_0"], "formats is .'q8_0'., expected an object from names of tensors to formats"),
        ({hugging_face_name(V): 8}, "formats is {.*: 8}, expected an object"),
        ({hugging_face_name(V): "q9"}, "format is 'q9', expected one of int8"),
        ({V: "q8_0"}, f"tensor name is '{V}', expected that of a weight, such as 'model.layers"),
        ({"model.layers.0.mlp.x.weight": "q8_0"}, "tensor name is 'model.layers.0.mlp.x.weight'"),
        ({hugging_face_name(V) + "_scale": "q8_0"}, "tensor name is .*_scale"),
    ],
)
def test_damaged_settings_are_named(mixed, formats, message):
    with_settings(mixed, formats=formats)
    with pytest.raises(ValueError, match=f"config.json: quantization_config: {message}"):
        read_folder(mixed)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({}, "tensor 'model.layers.0.self_attn.v_proj.weight' in .* has shape"),
        ({"model.layers.7.mlp.up_proj.weight": "q8_0"}, "formats of .* has 'model.layers.7.mlp"),
        ({"model.norm.weight": "q8_0"}, r"tensor 'norm.weight' has shape \(128,\), expected a mat"),
    ],
)
def test_settings_that_the_file_contradicts(mixed, formats, message):
    with_settings(mixed, formats=formats)
    with pytest.raises(ValueError, match=message):
        load_weights(read_folder(mixed))


# With a text


def test_calibrated(folder, tmp_path, between, generator):
    """Chosen by the text, and rounded by it: 8 bits as they are, 4 with feedback."""
    ids = torch.randint(3, 131, (400,), generator=generator).tolist()
    size = between(0.4)
    new = quantize_checkpoint(folder, tmp_path / "new", size=size, calibration=ids)
    assert file_size(new) <= size
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "new"]
    original, weights = (load_weights(read_folder(f)) for f in (folder, new))
    formats = {hugging_face_name(name) for name in read_folder(new).quantization.formats}
    assert 0 < len(formats) < 14
    for name, weight in weights.items():
        if name.startswith("layers.") and isinstance(weight, Quantized):
            eight = hugging_face_name(name) in formats
            assert (weight.format == "q8_0") == eight
            plain = quantize(original[name], weight.format)
            assert torch.equal(weight.values, plain.values) == eight, name


def test_a_calibrated_run_goes_on_where_it_was(folder, tmp_path, between, generator, monkeypatch):
    ids = torch.randint(3, 131, (400,), generator=generator).tolist()
    size = between(0.4)
    whole = quantize_checkpoint(folder, tmp_path / "whole", size=size, calibration=ids)

    def interrupted(*_):
        raise KeyboardInterrupt

    rounded = CalibratedLayers.rounded
    with monkeypatch.context() as patch:
        patch.setattr(
            CalibratedLayers,
            "rounded",
            lambda self, i, layer: interrupted() if i == 1 else rounded(self, i, layer),
        )
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(folder, tmp_path / "new", size=size, calibration=ids)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(sensitivity.Sensitivities, "measure", interrupted)  # not again
    for others, given in ((ids[1:], size), (ids, between(0.9))):
        with pytest.raises(ValueError, match=r"new.calibration' is of another calibration, expect"):
            quantize_checkpoint(folder, tmp_path / "new", size=given, calibration=others)
    new = quantize_checkpoint(folder, tmp_path / "new", size=size, calibration=ids)
    assert (new / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / "new.calibration").exists()


def test_arguments_that_exclude_each_other(folder, tmp_path):
    for bits, group, size, message in (
        (None, None, None, "bits is None and size is None, expected one of them"),
        (4, None, "1MB", "bits is 4 and size is '1MB', expected one of them"),
        (None, 32, "1MB", "group is 32 and size is '1MB', expected one of them"),
        (None, None, "big", "size is 'big', expected a number of bytes, or one such as 4.2GB"),
    ):
        with pytest.raises(ValueError, match=message):
            module.quantize_checkpoint(folder, tmp_path / "new", bits, group, size=size)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]

"""mistral_ext.weights.device: what cannot run is refused before anything large is read."""

from __future__ import annotations

import dataclasses
import shutil
import weakref

import pytest
import torch
from checkpoints import TOKENIZERS, write_checkpoint
from test_checkpoint import CONFIG

from mistral_ext import _C, Mistral, ops
from mistral_ext.model.rope import frequencies
from mistral_ext.ops import JoinedWeight, Quantized
from mistral_ext.weights import device as module
from mistral_ext.weights.checkpoint import Checkpoint, load_weights
from mistral_ext.weights.device import Gpu, expect_runnable, find_device, move_weights
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.quantize import Quantization

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
MISTRAL_7B = dataclasses.replace(
    CONFIG, n_layers=32, n_kv_heads=8, n_heads=32, head_dim=128, sliding_window=4096
)
CACHE_BYTES = 131_072 * 4096  # of a full window in bf16


@pytest.fixture
def gpus(monkeypatch):
    """Two devices that are not there, and a build with kernels for them."""

    def set_gpu(capability=(9, 0), free_bytes=2**40):
        monkeypatch.setattr(module, "find_gpu", lambda device: Gpu(capability, free_bytes))

    head_dims = ops.head_dims
    taken = {"cuda": [64, 128]}
    monkeypatch.setattr(ops, "head_dims", lambda kind: taken.get(kind) or head_dims(kind))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    set_gpu()
    return set_gpu


# find_device


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        ("cpu:0", "cpu:0"),
        (torch.device("cpu"), "cpu"),
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        (0, "cuda:0"),
        (1, "cuda:1"),
        (torch.device("cuda", 1), "cuda:1"),
    ],
)
def test_devices_that_are_there(gpus, given, meant):
    assert find_device(given) == torch.device(meant)


@pytest.mark.parametrize("given", ["meta", torch.device("meta"), "gpu", "", True, False, 1.5, -1])
def test_no_device(gpus, given):
    with pytest.raises(ValueError, match=r"device is .*, expected 'cpu' or 'cuda'") as error:
        find_device(given)
    assert repr(str(given) if isinstance(given, torch.device) else given) in str(error.value)


@pytest.mark.parametrize("given", ["cuda:2", "cuda:7", 2, torch.device("cuda:2")])
def test_a_device_too_many(gpus, monkeypatch, given):
    with pytest.raises(ValueError, match=r"is 'cuda:\d', but torch finds cuda:0 to cuda:1"):
        find_device(given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"is 'cuda:\d', but torch finds cuda:0 alone"):
        find_device(given)


def test_no_kernels_and_no_devices(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda:0', but torch finds no CUDA device"):
        find_device(0)
    monkeypatch.setattr(ops, "head_dims", lambda kind: [])
    with pytest.raises(ValueError, match=r"device is 'cuda:0', but this build .* no CUDA kernels"):
        find_device(0)


# expect_runnable


def test_head_dims_are_those_that_the_ops_take():
    """Asked of the ops themselves, with no token."""
    taken = []
    for dim in range(1, 600):
        q, pool = torch.empty(0, 1, dim), torch.empty(4, dim)
        table = torch.tensor([[0, 0, 0, 0, 4]])
        try:
            ops.rope(q, q.clone(), q.clone(), pool, pool.clone(), table, frequencies(1e4, dim))
            ops.attention(q, q.clone(), q.clone(), pool, pool.clone(), table)
            taken.append(dim)
        except ValueError:
            pass
    assert ops.head_dims("cpu") == taken
    assert ops.head_dims("cuda") == ([] if _C.cuda_architectures is None else [64, 128])
    assert ops.head_dims("meta") == []


@pytest.mark.parametrize("head_dim", [8, 16, 48, 288])
def test_head_dim_that_no_kernel_takes(head_dim):
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    with pytest.raises(ValueError, match=rf"head_dim is {head_dim}, expected one of 32, .*, 256:"):
        expect_runnable(config, torch.float32, 0, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_runs_the_rest(dtype):
    for head_dim in ops.head_dims("cpu"):
        expect_runnable(dataclasses.replace(CONFIG, head_dim=head_dim), dtype, 2**60, CPU)


@pytest.mark.parametrize(
    ("changes", "dtype", "gpu", "message"),
    [
        ({"head_dim": 96}, torch.float16, {}, "head_dim is 96, expected one of 64, 128: .*cuda"),
        ({}, torch.float32, {}, "dtype is torch.float32, expected torch.bfloat16 or torch.float16"),
        ({}, torch.float16, {"capability": (7, 5)}, r"cuda:1 has compute capability 7\.5.* 8\.0"),
        ({}, torch.float16, {"free_bytes": 14 * 10**9}, "cuda:1 has 14.00 GB of memory free"),
    ],
)
def test_what_a_gpu_cannot_run(gpus, changes, dtype, gpu, message):
    gpus(**gpu)
    with pytest.raises(ValueError, match=message):
        expect_runnable(dataclasses.replace(MISTRAL_7B, **changes), dtype, 14 * 10**9, CUDA)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_gpu_runs(gpus, capability, dtype):
    gpus(capability, free_bytes=14 * 10**9 + CACHE_BYTES)
    expect_runnable(MISTRAL_7B, dtype, 14 * 10**9, CUDA)


@pytest.mark.parametrize(
    ("window", "positions", "tokens"),
    [(4096, 99, 4096), (1024, 99, 1024), (None, 32768, 4096), (None, 500, 500), (9999, 99, 4096)],
)
def test_memory_that_is_needed(gpus, window, positions, tokens):
    config = dataclasses.replace(MISTRAL_7B, sliding_window=window, max_positions=positions)
    needed = 10**9 + 131_072 * tokens
    gpus(free_bytes=needed)
    expect_runnable(config, torch.bfloat16, 10**9, CUDA)
    gpus(free_bytes=needed - 1)
    with pytest.raises(ValueError, match=f"keys and values of {tokens} tokens"):
        expect_runnable(config, torch.bfloat16, 10**9, CUDA)


# Before the weights are read


@pytest.fixture
def unread(monkeypatch):
    """The weights of all folders may be looked at, but not read."""

    def weights(self, progress=True):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "weights", weights)


@pytest.mark.parametrize(
    ("gpu", "options", "message"),
    [
        ({"capability": (7, 0)}, {"dtype": torch.bfloat16}, "compute capability 7.0"),
        ({"free_bytes": 1000}, {"dtype": torch.bfloat16}, "0.00 GB of memory free"),
        ({}, {}, "dtype is torch.float32"),
        ({}, {"device": "cuda:7"}, "'cuda:7', but torch finds"),
        ({}, {"device": None, "max_batch": 0}, "max_batch is 0"),
        ({}, {"device": None, "prefill_chunk": "x"}, "prefill_chunk is 'x'"),
    ],
)
def test_refused_before_the_weights_are_read(tmp_path, gpus, unread, gpu, options, message):
    gpus(**gpu)
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=message):
        Mistral.from_pretrained(tmp_path, **{"device": 0} | options)


@pytest.mark.parametrize("device", [None, 0])
def test_head_dim_is_refused_before_the_weights_are_read(tmp_path, gpus, unread, device):
    write_checkpoint(tmp_path, head_dim=8)
    with pytest.raises(ValueError, match="head_dim is 8, expected one of"):
        Mistral.from_pretrained(tmp_path, device=device)


def test_tokenizer_of_another_model_is_refused_before_the_weights_are_read(tmp_path, unread):
    write_checkpoint(tmp_path)
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="they do not belong together"):
        Mistral.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_bytes_are_known_before_the_weights_are_read(tmp_path, dtype, quantize, tied):
    write_checkpoint(tmp_path, intermediate_size=192, tie_word_embeddings=tied)
    folder = read_folder(tmp_path)
    quantization = quantize and Quantization.from_name(quantize)
    weights = load_weights(folder, dtype, quantize=quantize)
    different = {id(weight): weight for weight in weights.values()}.values()
    assert Checkpoint(folder, dtype, quantization).nbytes == sum(w.nbytes for w in different)


# move_weights


def test_tied_embeddings_are_copied_once(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    weights = load_weights(read_folder(tmp_path))
    shapes = {name: weight.shape for name, weight in weights.items()}
    move_weights(weights, torch.device("meta"))
    assert weights["output.weight"] is weights["tok_embeddings.weight"]
    tensors = {name: w for name, w in weights.items() if not isinstance(w, JoinedWeight)}
    assert {name: weight.shape for name, weight in tensors.items()}.items() <= shapes.items()
    assert {weight.device.type for weight in tensors.values()} == {"meta"}
    assert len({id(weight) for weight in tensors.values()}) == len(tensors) - 1


def test_a_weight_is_let_go_when_it_is_copied():
    alive, at_copies = weakref.WeakSet(), []

    class Weight:
        def to(self, device):
            at_copies.append(len(alive))
            return torch.empty(0, device=device)

    weights = {name: Weight() for name in "abcd"}
    alive.update(weights.values())
    move_weights(weights, torch.device("meta"))
    assert at_copies == [4, 3, 2, 1]


def test_weights_are_let_go_when_they_are_joined():
    class Part(torch.Tensor):
        pass

    alive = weakref.WeakSet()
    weights = {"layers.0.attention_norm.weight": torch.ones(4)}
    for name in ("feed_forward.w1", "feed_forward.w3"):
        weights[f"layers.0.{name}.weight"] = torch.ones(8, 4).as_subclass(Part)
    alive.update(w for w in weights.values() if isinstance(w, Part))
    left = []

    class Last:
        def to(self, device):
            left.append(len(alive))
            return torch.empty(0)

    weights["output.weight"] = Last()
    move_weights(weights, torch.device("cpu"))
    assert left == [0]


def test_what_is_multiplied_in_one_pass_is_joined(tmp_path):
    write_checkpoint(tmp_path)
    weights = load_weights(read_folder(tmp_path))
    before = dict(weights)
    move_weights(weights, torch.device("cpu"))
    assert len(weights) == len(before) - 2 * (2 + 1)  # three and two weights of two layers
    for i in range(2):
        for joined, names in (
            (f"layers.{i}.attention.wqkv.weight", ("wq", "wk", "wv")),
            (f"layers.{i}.feed_forward.w13.weight", ("w1", "w3")),
        ):
            folder = joined.rsplit(".", 2)[0]
            parts = [before[f"{folder}.{name}.weight"] for name in names]
            assert not any(f"{folder}.{name}.weight" in weights for name in names)
            assert torch.equal(weights[joined].whole, torch.cat(parts))
            assert all(map(torch.equal, weights[joined].parts, parts))
            storages = {part.untyped_storage().data_ptr() for part in weights[joined].parts}
            assert storages == {weights[joined].whole.untyped_storage().data_ptr()}


def test_weights_of_different_names_stay_different(tmp_path):
    write_checkpoint(tmp_path, intermediate_size=192)
    weights = load_weights(read_folder(tmp_path), quantize="int4")
    move_weights(weights, torch.device("meta"))
    assert isinstance(weights["output.weight"], Quantized)
    assert isinstance(weights["tok_embeddings.weight"], torch.Tensor)
    assert len({id(weight) for weight in weights.values()}) == len(weights)

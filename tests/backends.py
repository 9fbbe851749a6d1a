"""More implementations of the ops, to be put in the place of `mistral_ext._C`: the emulator of CUDA
kernels (tests/emulator) and that of AMX (tests/amx), which are built here when first asked for, and
a GPU."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import skipped
import torch

from mistral_ext import _C

SOURCES = Path(__file__).parent
BUILDS = SOURCES.parent / "build"
# The ops that have a CUDA kernel: those whose bindings return a `Call`, and the others.
RETURN_CALLS = (
    "attention",
    "attention_backward",
    "embedding",
    "linear",
    "linear_argmax",
    "linear_rope",
)
OPS = (
    *RETURN_CALLS,
    *("cross_entropy", "lora", "lora_gradient", "rms_norm", "rms_norm_backward", "rope"),
    *("rotate", "sample", "swiglu", "swiglu_backward"),
)
# The arguments that are constant (values, scales, the weights of a norm, frequencies): no kernel
# writes them, so one may read them before the kernels ahead of it are done.
CONSTANTS = {
    "embedding": (1, 2),
    "linear": (2, 3, 5),
    "linear_argmax": (1, 2, 4),
    "linear_rope": (1, 2, 4, 10),
    "rope": (6,),
    "rotate": (2,),
}

# What the builds of tests/emulator and tests/amx need.
TOOLS = "cmake, ninja and pybind11 (pip install '.[test]')"
BUILD_NEEDS = {
    "emulator": f"libboost-context-dev, the headers of the CUDA toolkit, {TOOLS}",
    "amx": TOOLS,
}

# What a test needs that runs on a GPU, and the parameter of a fixture that does.
NEEDS_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        _C.cuda_architectures is None,
        reason="CUDA kernels on a GPU: this build has none, install it where nvcc is on PATH",
    ),
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="CUDA kernels on a GPU: torch finds no CUDA device"
    ),
]
GPU = pytest.param("cuda", marks=NEEDS_GPU)
# The same with the attention kernel of sm_90a, which the device and the build must have.
HOPPER_GPU = pytest.param(
    "cuda, sm90",
    marks=[
        *NEEDS_GPU,
        pytest.mark.skipif(
            _C.cuda_architectures is None
            or not torch.cuda.is_available()
            or torch.cuda.get_device_capability() != (9, 0)
            or "sm90" not in _C.attention_kernels(),
            reason="no device of compute capability 9.0, or a build without kernels for it",
        ),
    ],
)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Without what is preloaded into this process: the compiler needs no sanitizer."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@contextmanager
def alone_in(build: Path) -> Iterator[None]:
    """Makes a folder; in the block, no other pytest builds in it."""
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_emulator(folder: str) -> ModuleType:
    """Builds what has changed of tests/<folder> and loads its module, _<folder>.

    Skips the test if something that the build needs is missing (see its CMakeLists.txt);
    with MISTRAL_EXT_REQUIRE_EMULATOR=1 in the environment that is a failure, as it is in CI. So is
    a kernel that does not compile, always. With MISTRAL_EXT_SANITIZE=1 it is built
    with AddressSanitizer: see tests/sanitize.sh.
    """
    sanitize = os.environ.get("MISTRAL_EXT_SANITIZE") == "1"
    suffix = "-sanitized" if sanitize else ""
    build = BUILDS / f"{folder}-{sys.implementation.cache_tag}{suffix}"
    with alone_in(build):
        _configure_and_build(SOURCES / folder, build, sanitize)
    (path,) = build.glob(f"_{folder}.*.so")
    spec = spec_from_file_location(f"_{folder}", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _configure_and_build(source: Path, build: Path, sanitize: bool) -> None:
    try:
        import pybind11

        configure = [
            "cmake",
            "-GNinja",
            # Look for ninja anew: that of an earlier environment may be gone.
            "-UCMAKE_MAKE_PROGRAM",
            f"-S{source}",
            f"-B{build}",
            f"-DEMULATOR_SANITIZE={'ON' if sanitize else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        run(configure).check_returncode()
    except (ImportError, FileNotFoundError, subprocess.CalledProcessError) as error:
        problem = f"tests/{source.name} cannot be built: install {BUILD_NEEDS[source.name]}\n"
        problem += f"{error}\n{getattr(error, 'stderr', None) or ''}"
        skipped.skip_or_fail(problem, "MISTRAL_EXT_REQUIRE_EMULATOR")
    built = run(["cmake", "--build", str(build)])
    if built.returncode != 0:
        pytest.fail(f"{source} does not compile:\n{built.stdout}")


@contextmanager
def registered(
    emulator: ModuleType, constant: Collection[str] = (), **tensors: torch.Tensor
) -> Iterator[None]:
    """Within it, kernels may access these tensors' elements and what lies between them, no more.

    Those named in `constant` they may only read.
    """
    try:
        for name, tensor in tensors.items():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            elements = 1 + sum((size - 1) * stride for size, stride in steps)
            if tensor.numel() > 0:
                size = elements * tensor.element_size()
                emulator.allocate(tensor.data_ptr(), size, name, name in constant)
        yield
    finally:
        emulator.free_all()


@dataclass
class StandIn:
    """What `_C.Call` is. `run` makes the memory, so the caller need not."""

    run: Callable[[int, int, int], None]
    workspace_bytes: int = 0
    counters: int = 0


def emulated(
    emulator: ModuleType, keep: Callable[[object], None] = lambda _: None
) -> SimpleNamespace:
    """What `_C` is, with those ops that have a CUDA kernel run by the emulator.

    `keep` is called with all that has the memory of a launch.
    """

    def bind(name):
        def call(*arguments):
            keep(arguments)
            tensors, constant = {}, set()
            for i, argument in enumerate(arguments):
                for j, one in enumerate(argument if isinstance(argument, list) else [argument]):
                    if isinstance(one, torch.Tensor):
                        tensor = f"argument {i} of {name}, tensor {j}"
                        tensors[tensor] = one
                        if i in CONSTANTS.get(name, ()):
                            constant.add(tensor)

            def run(_, *others):
                # Bytes of 255: every float, half and bfloat16 is NaN.
                memory = torch.full((checked.workspace_bytes,), 255, dtype=torch.uint8)
                keep(memory)
                with registered(emulator, constant, **tensors):
                    checked.run(memory.data_ptr(), *others)

            with registered(emulator, constant, **tensors):
                checked = getattr(emulator, name)(*arguments)
            return checked and StandIn(run)

        return call

    return SimpleNamespace(**{**vars(_C), **{name: bind(name) for name in OPS}})


class Copies:
    """Copies on a GPU of whole storages, so that views of one stay that, with their strides."""

    def __init__(self, device: str):
        self._device = device
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of a storage's bytes

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same view of the copy of the tensor's storage."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._copies:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._copies[storage.data_ptr()] = host, host.to(self._device, copy=True)
        copy = self._copies[storage.data_ptr()][1].untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return view.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())

    def bring_back(self) -> None:
        for host, copy in self._copies.values():
            host.copy_(copy)


def on_gpu(device: str = "cuda") -> SimpleNamespace:
    """What `_C` is, with those ops that have a CUDA kernel run on a GPU, for tensors of the CPU."""

    def bind(name):
        def call(*arguments):
            copies = Copies(device)

            def move(x):
                if isinstance(x, list):
                    return [move(one) for one in x]
                return copies.view(x) if isinstance(x, torch.Tensor) else x

            def finish():
                torch.cuda.synchronize(device)
                copies.bring_back()

            def run(*_):
                memory = torch.full((checked.workspace_bytes,), 255, dtype=torch.uint8).to(device)
                counters = torch.zeros(checked.counters, dtype=torch.int32, device=device)
                checked.run(memory.data_ptr(), counters.data_ptr(), stream)
                finish()
                assert not counters.any(), "a counter is not left at zero"

            moved, stream = [move(x) for x in arguments], torch.cuda.current_stream(device)
            stream = stream.cuda_stream
            if name in RETURN_CALLS:
                checked = getattr(_C, name)(*moved)
                return StandIn(run)
            getattr(_C, name)(*moved[:-1], stream)
            finish()

        return call

    return SimpleNamespace(**{**vars(_C), **{name: bind(name) for name in OPS}})


def configure(emulator: ModuleType, backend: str, **settings: int) -> None:
    """Sets the emulator up for a `backend` such as "emulator, late" or "emulator, early, sm90"."""
    _, copies, *attention = backend.split(", ")
    emulator.configure(copies=copies, capability=90 if attention else 89, **settings)


@contextmanager
def attention_of(backend: str, module: ModuleType) -> Iterator[None]:
    """Within it, `module`, the emulator or _C, prefills with the kernel that the backend names."""
    if not backend.endswith(", sm90"):
        yield
        return
    module.select_attention("sm90")
    try:
        yield
    finally:
        module.select_attention("sm80")


_in_use = _C


def in_use() -> ModuleType | SimpleNamespace:
    """What the modules of `mistral_ext.ops` take for `_C` at the moment."""
    return _in_use


def _set_in_use(implementation: ModuleType | SimpleNamespace) -> None:
    global _in_use
    _in_use = implementation
    for name, module in list(sys.modules.items()):
        if name.startswith("mistral_ext.ops.") and hasattr(module, "_C"):
            module._C = implementation


@contextmanager
def _in_place_of_c(implementation: SimpleNamespace) -> Iterator[None]:
    _set_in_use(implementation)
    try:
        yield
    finally:
        _set_in_use(_C)


def use(emulator: ModuleType) -> AbstractContextManager[None]:
    """Within it, `mistral_ext.ops` runs CUDA kernels in the emulator."""
    return _in_place_of_c(emulated(emulator))


@contextmanager
def stream(emulator: ModuleType) -> Iterator[None]:
    """Within it, launches overlap as they may on a stream (tests/emulator/stream.h).

    They are over at its end. Until then their tensors live on, and no other code reads them.
    """
    emulator.begin_stream()
    try:
        yield
    finally:
        emulator.end_stream()


@contextmanager
def use_stream(emulator: ModuleType) -> Iterator[None]:
    """`use` and `stream`, and tensors live to its end."""
    kept: list[object] = []
    with _in_place_of_c(emulated(emulator, kept.append)), stream(emulator):
        yield


def use_amx(amx: ModuleType) -> AbstractContextManager[None]:
    """Within it, `mistral_ext.ops` runs the kernels that use AMX, emulated."""
    names = "attention", "linear", "linear_argmax", "linear_backward", "linear_rope"
    multiplies = {op: getattr(amx, op) for op in names}
    amx.set_exact_products(_C.exact_products())
    isas = {"supported_isas": lambda: [*_C.supported_isas(), "amx"]}
    return _in_place_of_c(SimpleNamespace(**{**vars(_C), **multiplies, **isas}))


def use_gpu() -> AbstractContextManager[None]:
    """Within it, `mistral_ext.ops` runs CUDA kernels on a GPU, for tensors of the CPU."""
    return _in_place_of_c(on_gpu())

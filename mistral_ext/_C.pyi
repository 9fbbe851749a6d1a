"""The types of the compiled module, for type checkers. The files python/*.cpp define its functions.

Other code calls them through `mistral_ext.ops`.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import Tensor, dtype

class Call:
    """A call of a kernel, whose arguments have been checked.

    `run` takes the address of `workspace_bytes` bytes for intermediate results. On a CUDA device it
    also takes the address of zeroed 32-bit integers, as many as the property `counters` says.
    `target` is the CUDA stream, or on the CPU the number of threads (see `ops.workspace`).
    """

    @property
    def workspace_bytes(self) -> int: ...
    @property
    def counters(self) -> int: ...
    def run(self, workspace: int, counters: int, target: int) -> None: ...

class Recording:
    """A list of kernel calls on the CPU, which can be run any number of times."""

    def add(self, call: Call) -> None: ...
    def recheck(self) -> int: ...
    def run(self, workspace: int, threads: int) -> None: ...

class _Device(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int

cuda_architectures: str | None  # None: a build without CUDA

def active_isa() -> str: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    out: Tensor,
    window: int | None,
    scale: float | None,
    max_count: int | None,
    lse: Tensor | None = None,
) -> Call: ...
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    sequences: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    window: int | None,
    scale: float | None,
) -> Call: ...
def block_formats() -> dict[str, str]: ...
def check_linear(
    op: str,
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None,
    eps: float,
    out: Tensor | None,
    added: Tensor | None,
) -> None: ...
def check_linear_argmax(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None,
    eps: float,
    limit: int | None,
) -> None: ...
def check_linear_rope(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None,
    eps: float,
    k_pool: Tensor,
) -> None: ...
def cross_entropy(
    logits: Tensor, targets: Tensor, factors: Tensor | None, loss: Tensor, target: int
) -> None: ...
def cuda_devices() -> tuple[list[_Device], str] | None: ...  # None: a build without CUDA
def embedding(
    token_ids: Tensor, values: Tensor, scales: Tensor | None, format: str, out: Tensor
) -> Call: ...
def head_dims(device_type: str) -> list[int]: ...
def linear(
    op: str,
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None,
    eps: float,
    out: Tensor,
    added: Tensor | None = None,
    exact: bool = False,
) -> Call: ...
def linear_argmax(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None,
    eps: float,
    limit: int | None,
    out: Tensor,
    token_ids: Tensor,
) -> Call: ...
def linear_backward(
    d_out: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    d_x: Tensor,
) -> Call: ...
def linear_rope(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None,
    eps: float,
    out: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    window: int | None,
) -> Call: ...
def linear_rounds(dtype: dtype, format: str, tokens: int) -> bool: ...
def lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    ranks: Tensor,
    adapters: Tensor,
    parts: list[int],
    hidden: Tensor,
    out: Tensor,
    target: int,
) -> None: ...
def lora_gradient(
    hidden: Tensor, x: Tensor, adapters: Tensor, out: Tensor, target: int
) -> None: ...
def philox(key: Sequence[int], counter: Sequence[int]) -> list[int]: ...
def quantize(
    weight: Tensor,
    importance: Tensor | None,
    values: Tensor,
    scales: Tensor,
    largest: Tensor,
    target: int,
) -> None: ...
def quantize_feedback(
    weight: Tensor,
    factor: Tensor,
    importance: Tensor | None,
    values: Tensor,
    scales: Tensor,
    target: int,
) -> None: ...
def repack(
    blocks: Tensor, type: str, values: Tensor | None, scales: Tensor | None, target: int
) -> None: ...
def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, eps: float, target: int
) -> None: ...
def rms_norm_backward(
    x: Tensor, weight: Tensor, d_out: Tensor, d_x: Tensor, eps: float, target: int
) -> None: ...
def rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    window: int | None,
    target: int,
) -> None: ...
def rotate(
    x: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    backward: bool,
    out: Tensor,
    target: int,
) -> None: ...
def sample(
    logits: Tensor,
    rows: Tensor,
    options: Tensor,
    noise: Tensor,
    history: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> Call: ...
def select_isa(name: str) -> None: ...
def supported_isas() -> list[str]: ...
def swiglu(gate: Tensor, up: Tensor, out: Tensor, target: int) -> None: ...
def swiglu_backward(
    gate: Tensor, up: Tensor, d_out: Tensor, d_gate: Tensor, d_up: Tensor, target: int
) -> None: ...
def exact_products() -> bool: ...
def set_exact_products(exact: bool) -> None: ...
def weight_formats() -> dict[str, dict[str, Any]]: ...

# In a build with CUDA only.

def active_attention() -> str: ...
def attention_kernels() -> list[str]: ...
def capture_id(target: int) -> int: ...
def dequantize(values: Tensor, scales: Tensor, format: str, out: Tensor, target: int) -> None: ...
def overlap(wanted: bool) -> None: ...
def overlapping() -> bool: ...
def select_attention(name: str) -> None: ...

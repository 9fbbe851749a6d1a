"""Checks in half a minute that the CUDA kernels work: the first program to run on a new GPU.

    python bench/canary_cuda.py [--models bf16 int8 int4 demo] [--json FILE]

It compares every op once with plain torch in fp32 on the device. Then it runs the checks of
tests/model_checks.py on the demo model, and in bf16, 8 and 4 bits on a model of two layers that is
half as wide as Mistral 7B. The result of each check is printed as it ends; a failed check does not
stop the others. The exit status is 1 if a check has failed. If the device is lost, the program ends
at once, because nothing can work then.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write_json
from shapes import (
    DIM,
    EPS,
    GPU,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    THETA,
    WINDOW,
    frequencies,
    scaled,
)
from torch import Tensor

from mistral_ext import _C, ops
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.model.config import MistralConfig
from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.weights.quantize import quantize
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tools")]

import make_random_checkpoint  # noqa: E402
import model_checks  # noqa: E402
import reference  # noqa: E402
from ragged import RaggedBatch  # noqa: E402
from tolerance import assert_close  # noqa: E402

BF16 = torch.bfloat16
Check = tuple[str, Callable[[], Any]]


# ---- Ops


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device=GPU)).to(BF16)


def expect(actual: Tensor, plainly: Callable[..., Tensor], *arguments: Any) -> None:
    """Raises unless `actual` is as close to the result of `plainly` in fp32 as tests/tolerance.py
    asks for."""
    wide = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    assert_close(actual, plainly(*wide).double(), plainly(*arguments))


def normalised_product(x: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
    return reference.rms_norm(x, norm, EPS) @ weight.T


def op_checks() -> Iterator[Check]:
    def rms_norm():
        x, y, weight = random(33, DIM), random(33, DIM), random(DIM)
        expect(ops.rms_norm(x, weight, EPS), reference.rms_norm, x, weight, EPS)
        total = y.clone()
        ops.rms_norm(x, weight, EPS, residual=total)
        expect(total, torch.add, x, y)

    def embedding():
        exact, ids = torch.randn(999, DIM, device=GPU), torch.tensor([998, 0, 7, 7], device=GPU)
        for weight in (exact.to(BF16), quantize(exact, "q8_0"), quantize(exact, "iq4_xs")):
            wide = weight if isinstance(weight, Tensor) else weight.dequantize(BF16)
            assert torch.equal(ops.embedding(ids, weight, BF16), wide[ids])

    def swiglu():
        gate, up = random(33, HIDDEN), random(33, HIDDEN)
        expect(ops.swiglu(gate, up), reference.swiglu, gate, up)

    def rope_and_attention():
        heads, window = (HEADS // 4, KV_HEADS // 4 or 1), scaled(WINDOW)
        positions = [3 * window + 5, window - 1, 0]
        shape = ([window, window, window // 2 + 9], window, *heads, HEAD_DIM, BF16)
        batch = RaggedBatch(*shape, positions=positions, device=GPU)
        for counts in ((1, 1, 1), (window // 8, 1, window // 2), (5, 2, 1)):
            batch.step(counts)

    def linear(form: str | None):
        exact = torch.randn(DIM + 24, DIM, device=GPU) / 64
        weight = exact.to(BF16) if form is None else quantize(exact, form)
        wide = weight.float() if form is None else weight.dequantize()
        for tokens in (1, 16, 60, 200):
            x, norm = random(tokens, DIM), random(DIM)
            plain = wide.to(BF16)
            assert_close(
                ops.linear(x, weight, norm, EPS),
                normalised_product(x.float(), wide, norm.float()).double(),
                normalised_product(x, plain, norm),
            )
            residual = random(tokens, DIM + 24)
            total = residual.clone()
            ops.linear_residual(x, weight, total)
            exact_total = residual.float() + x.float() @ wide.T
            assert_close(total, exact_total.double(), residual + x @ plain.T)
            out, token_ids = ops.linear_argmax(x, weight, limit=DIM)
            assert torch.equal(token_ids, out[:, :DIM].argmax(1))
            gate = x.float() @ wide.T
            assert_close(
                ops.linear_swiglu(x, [weight, weight]),
                reference.swiglu(gate, gate).double(),
                reference.swiglu(x @ plain.T, x @ plain.T),
            )

    def linear_rope():
        rows = [n * HEAD_DIM for n in (HEADS, KV_HEADS, KV_HEADS)]
        weights = [random(n, DIM, scale=1 / 64) for n in rows]
        turns = frequencies(GPU)
        for tokens in (3, 70):
            x = random(tokens, DIM)
            table = torch.tensor([[0, tokens, 5, 0, 80]], device=GPU)
            pools, others = ([random(80 * KV_HEADS, HEAD_DIM) * 0 for _ in "kv"] for _ in "ab")
            out = ops.linear_rope(x, weights, None, EPS, *pools, table, turns)
            expected = ops.linear(x, weights).unflatten(1, (-1, HEAD_DIM))
            split = expected.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            ops.rope(*split, *others, table, turns)
            assert torch.equal(out, expected.flatten(1))
            assert all(map(torch.equal, pools, others))

    def sample():
        size, options = 3000, [0.8, 50, 0.9, 0.01, 1.1, 0.2, 0.3]
        logits = 3 * torch.randn(4, size, device=GPU)
        noise = torch.tensor([[7, i, 3] for i in range(4)], device=GPU)
        history = torch.zeros(4, size, dtype=torch.int32, device=GPU)
        expected = [
            reference.sample(row, options, (7, i, 3), np.zeros(size, np.int64))
            for i, row in enumerate(logits.cpu().numpy())
        ]
        tables = torch.tensor([options] * 4, dtype=torch.float64, device=GPU), noise, history
        assert ops.sample(logits, torch.arange(4, device=GPU), *tables).tolist() == expected

    yield "embedding", embedding
    yield "rms_norm", rms_norm
    yield "swiglu", swiglu
    yield "rope, attention", rope_and_attention
    for form in (None, "q8_0", "int4", "iq4_xs"):
        yield f"linear, {form or 'plain'}", lambda form=form: linear(form)
    yield "linear_rope", linear_rope
    yield "sample", sample


# ---- Models


MODELS = ("bf16", "int8", "int4", "demo")


def two_layers() -> MistralConfig:
    return MistralConfig(
        vocab_size=2048,  # the demo model's, whose tokenizer it gets
        dim=DIM // 2,
        n_layers=2,
        n_heads=HEADS // 2,
        n_kv_heads=KV_HEADS // 2,
        head_dim=HEAD_DIM,
        hidden_dim=HIDDEN // 2,
        norm_eps=EPS,
        rope_theta=THETA,
        sliding_window=max(scaled(1024), 48),
        max_positions=32768,
        bos_id=1,
        eos_ids=(2,),
        dtype=BF16,
    )


def model_folders(scratch: Path, wanted: list[str]) -> Iterator[tuple[str, Path, list[int]]]:
    """Yields the name, the folder and a long prompt of each of MODELS that is wanted."""
    config = two_layers()
    folder = scratch / "bf16"
    folder.mkdir()
    make_random_checkpoint.write_checkpoint(folder, config, "hf", seed=0)
    (folder / "tokenizer.model").write_bytes((DEMO_MODEL / "tokenizer.model").read_bytes())
    generator = torch.Generator().manual_seed(1)
    length = 2 * config.sliding_window + config.sliding_window // 3
    ids = torch.randint(3, config.vocab_size, (length,), generator=generator).tolist()
    if "bf16" in wanted:
        yield "bf16", folder, ids
    for name, bits in (("int8", 8), ("int4", 4)):
        if name in wanted:
            quantize_checkpoint(folder, scratch / name, bits)
            yield name, scratch / name, ids
    if "demo" not in wanted:
        return
    text = (ROOT / "tests/data/held_out.txt").read_text(encoding="utf-8")
    yield "demo", DEMO_MODEL, Tokenizer.from_folder(DEMO_MODEL).encode(text)[:300]


def model_checks_of(scratch: Path, wanted: list[str]) -> Iterator[Check]:
    for name, folder, ids in model_folders(scratch, wanted):
        made: list[model_checks.Case] = []

        def load(folder=folder, ids=ids, made=made):
            made.append(model_checks.Case(folder, GPU, BF16, None, ids, chunk=len(ids) // 3 + 1))

        yield f"{name}: loads", load
        if not made:
            continue
        for check, function in model_checks.CHECKS.items():
            if check == "chat" and find_spec("mistral_common") is None:
                continue
            yield f"{name}: {check}", lambda function=function, case=made[0]: function(case)


def device_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", metavar="FILE", help="write what was found there too")
    options = parser.parse_args()
    if _C.cuda_architectures is None or not torch.cuda.is_available():
        raise SystemExit("canary_cuda: needs a CUDA device and a build with CUDA")

    torch.manual_seed(0)
    found: dict[str, Any] = {}
    report = {"gpu": torch.cuda.get_device_name(), "checks": found}
    with tempfile.TemporaryDirectory(prefix="canary-") as scratch:
        for checks in (op_checks(), model_checks_of(Path(scratch), options.models)):
            for name, check in checks:
                begin, error = time.perf_counter(), None
                try:
                    check()
                    torch.cuda.synchronize()
                except Exception as caught:  # whatever it is: the next check may tell more
                    error = f"{type(caught).__name__}: {caught}"[:500]
                seconds = time.perf_counter() - begin
                found[name] = {"error": error, "seconds": round(seconds, 2)}
                print(f"{name:24} {seconds:5.1f} s  {error or 'ok'}", flush=True)
                if error and device_is_lost():
                    report["lost"] = name
                if options.json:
                    write_json(options.json, report)
                if "lost" in report:
                    print(f"{name}: the device is lost", flush=True)
                    return 1
    failed = [name for name, result in found.items() if result["error"]]
    print(f"{len(found) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

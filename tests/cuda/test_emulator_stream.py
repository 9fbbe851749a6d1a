"""The emulator's stream, on which kernels overlap: the order of what they do, mistakes that only
this order brings out, and decode steps of the whole model. Rules for what a kernel does before it
waits for those ahead are tested in test_emulator.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import reference
import torch
from backends import registered, stream, use, use_stream
from checkpoints import write_checkpoint

from mistral_ext import Mistral, ops
from mistral_ext.engine.slots import SlotPool
from mistral_ext.ops import LowRank
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import read_folder

DELIVERIES = ("late", "early")


def run(emulator, name, inputs, out, n, on_stream=True):
    """Runs the launches of a test kernel."""
    with (
        registered(emulator, inputs=inputs, out=out),
        stream(emulator) if on_stream else nullcontext(),
    ):
        assert emulator.run_test_kernel(name, inputs.data_ptr(), out.data_ptr(), n) == 0
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("let_first", [False, True])
def test_a_kernel_begins_before_the_one_ahead_ends(emulator, let_first, seed):
    """Each of three, by all its blocks: after those of the one ahead have let it, and before one of
    them goes on. Kernels that wait first and then let the next one begin overlap in pairs, others
    all together."""
    emulator.configure(seed=seed)
    events = torch.zeros(3, 3, 3, dtype=torch.int32)
    run(emulator, "order_of_overlap", torch.zeros(1), events, let_first)
    assert events.flatten().sort()[0].tolist() == list(range(27))
    (start, waited, end), (last_start, last_waited, last_end) = (
        [one.tolist() for one in extremes.T] for extremes in (events.amin(1), events.amax(1))
    )
    for kernel in range(1, 3):
        before = last_start if let_first else last_waited
        assert before[kernel - 1] < start[kernel]
        assert last_start[kernel] < end[kernel - 1]
        assert last_end[kernel - 1] < waited[kernel]
    assert (last_start[2] < end[0]) == let_first


def test_without_a_stream_kernels_run_one_after_another(emulator):
    emulator.configure(workers=1)
    out = torch.zeros(3, 9).int()
    events = run(emulator, "order_of_overlap", torch.zeros(1), out, 0, on_stream=False)
    assert events.sort()[0].tolist() == torch.arange(27).view(3, 9).tolist()


def test_a_kernel_that_reads_too_early_outside_of_tensors(emulator, generator):
    """It is not watched there, so that this order alone brings it out, by a wrong result."""
    for seed in range(3):
        emulator.configure(seed=seed)
        for on_stream in (False, True):
            for correct in (False, True):
                x = torch.randn(256, generator=generator)
                out = run(emulator, "outside_of_tensors", x, torch.zeros(256), correct, on_stream)
                assert torch.equal(out, 2 * x) == (correct or not on_stream)


def test_every_planted_bug_is_tested():
    files = (Path(__file__).parents[1] / "emulator" / "planted" / "overlap").glob("*.cu")
    assert [file.stem for file in files] == ["outside_of_tensors"]


@pytest.mark.parametrize("ahead", ["linear", "rms_norm"])
def test_weights_that_a_kernel_ahead_stores(emulator, ahead, generator):
    """Each op by itself may take them to be constant. One that overlaps with those ahead, or begins
    when they have ended without a wait for their stores, may not."""
    x, weight = (torch.randn(8, 64, generator=generator).bfloat16() for _ in range(2))
    norm = torch.ones(64).bfloat16()

    def make_weight():
        if ahead == "rms_norm":
            return ops.rms_norm(weight, norm, 1e-5)
        return ops.linear(weight, weight.new_ones(64, 64))

    with use(emulator):
        expected = ops.linear(x, make_weight())
    with use_stream(emulator):
        made = make_weight()
    with use_stream(emulator):
        out = ops.linear(x, made)
    assert torch.equal(out, expected)
    problem = r"linear_kernel.* is done, which stores argument 2 of linear, tensor 0 at"
    with pytest.raises(RuntimeError, match=problem), use_stream(emulator):
        ops.linear(x, make_weight())


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("began_too_early", "load of inputs before wait_for_earlier_kernels"),
        ("never_waits", "the end of the kernel before wait_for_earlier_kernels"),
        ("missing_fence", "load of what another block has stored"),
    ],
)
def test_an_error_ends_all_launches_of_the_stream(emulator, name, problem, generator):
    x, out = torch.randn(256, generator=generator), torch.zeros(257)
    for _ in range(2):
        out[256] = 0
        with pytest.raises(RuntimeError, match=problem):
            run(emulator, name, x, out, 0)
        out[256] = 0
        assert torch.equal(run(emulator, name, x, out, 1)[:256], 2 * x)


def test_a_stream_begins_and_ends_once(emulator):
    with stream(emulator), pytest.raises(RuntimeError, match="a stream has begun already"):
        emulator.begin_stream()
    with pytest.raises(RuntimeError, match="no stream has begun"):
        emulator.end_stream()


def test_a_stream_is_of_one_thread(emulator):
    with stream(emulator), ThreadPoolExecutor(1) as other:
        x, out = torch.zeros(256), torch.zeros(257)
        launched = other.submit(
            emulator.run_test_kernel, "missing_fence", x.data_ptr(), out.data_ptr(), 1
        )
        for call in (launched, other.submit(emulator.end_stream)):
            with pytest.raises(RuntimeError, match="uses the stream of another thread"):
                call.result()


def adapter(config, generator):
    """Of the first layer, for the weights of each group."""
    rank, scale = 4, 0.5
    heads, dim, hidden = config.n_heads * config.head_dim, config.dim, config.hidden_dim
    sizes = {
        "attention.wq": (heads, dim),
        "attention.wo": (dim, heads),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
    }
    return {
        f"layers.0.{name}": LowRank(
            torch.randn(rank, inputs, generator=generator).bfloat16() / 16,
            torch.randn(outputs, rank, generator=generator).bfloat16() / 4,
            scale,
        )
        for name, (outputs, inputs) in sizes.items()
    }


@pytest.mark.parametrize("copies", DELIVERIES)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapters"])
def test_decode_steps_of_a_model(tmp_path, emulator, adapted, copies, generator):
    """Two steps of two sequences: to the bit what they are without overlap, and as close to fp64 as
    plain torch is. Adapters are those of the first sequence."""
    write_checkpoint(tmp_path)
    llm = Mistral.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model, config = llm.model, llm.config
    given = adapter(config, generator)
    if adapted:
        model.adapters.put(0, given)
    prompt, steps = 21, 2
    ids = torch.randint(3, 131, (2, prompt + steps), generator=generator)
    slots = torch.tensor([0, -1], dtype=torch.int32) if adapted else None

    def decode(using):
        emulator.configure(copies=copies)
        cache, results = SlotPool(config, 64, model.dtype), []
        rings = [cache.allocate(prompt + steps, prompt + steps) for _ in ids]
        of_tokens = None if slots is None else slots.repeat_interleave(prompt)
        table = cache.append(dict.fromkeys(rings, prompt))
        model.step(ids[:, :prompt].flatten(), table, cache, prompt, adapters=of_tokens)
        tables = [cache.append(dict.fromkeys(rings, 1)) for _ in range(steps)]
        with using(emulator), torch.inference_mode():
            for i, table in enumerate(tables):
                h = model.step(ids[:, prompt + i], table, cache, 1, adapters=slots)
                results.append(ops.linear(h, model.output, model.norm, config.norm_eps))
        return torch.stack(results, 1)

    expected = decode(use)
    emulator.take_launches()
    logits = decode(use_stream)
    assert len(emulator.take_launches()) > 2 * steps * 5
    assert torch.equal(logits, expected)

    weights = load_weights(read_folder(tmp_path), torch.bfloat16, progress=False)
    for sequence in range(2):
        wide = {name: weight.double() for name, weight in weights.items()}
        if adapted and sequence == 0:
            for name, low in given.items():
                wide[f"{name}.weight"] += low.scale * low.b.double() @ low.a.double()
        rounded = {name: weight.bfloat16() for name, weight in wide.items()}
        exact = reference.model(wide, config, ids[sequence])[prompt:]
        plain = reference.model(rounded, config, ids[sequence])[prompt:]
        error = (logits[sequence].double() - exact).abs().mean()
        assert error <= 2 * (plain.double() - exact).abs().mean()

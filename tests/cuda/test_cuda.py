"""What only a GPU can show: the whole model on it, streams, CUDA graphs, devices, errors.

The ops themselves are tested on it by the tests of each op, with the backend "cuda".
"""

from __future__ import annotations

import pytest
import reference
import torch
from backends import NEEDS_GPU
from checkpoints import write_checkpoint
from ragged import RaggedBatch

from mistral_ext import _C, Mistral, ops
from mistral_ext.engine.graph_runner import GraphRunner
from mistral_ext.engine.params import SamplingParams
from mistral_ext.engine.runner import Runner
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.slots import SlotPool
from mistral_ext.ops import Quantized
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.quantize import quantize

pytestmark = NEEDS_GPU

LENGTH = 83  # several times every window
VARIANTS = {
    "window16": {},
    "window5-head128": {"head_dim": 128, "sliding_window": 5, "num_key_value_heads": 1},
    "nowindow-head128": {"head_dim": 128, "sliding_window": None},
}


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, **VARIANTS[request.param])
    return folder


@pytest.fixture
def ids():
    return torch.randint(3, 131, (LENGTH,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunk", [None, 1, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_as_close_as_plain_torch(folder, ids, dtype, chunk):
    """Error against fp64 at most twice that of the same model in plain torch and the same dtype."""
    llm = Mistral.from_pretrained(folder, device="cuda", dtype=dtype)
    weights = load_weights(read_folder(folder), dtype, progress=False)
    wide = {name: weight.double() for name, weight in weights.items()}
    exact = reference.model(wide, llm.config, ids)
    plain = reference.model(weights, llm.config, ids)
    logits = llm.logits(ids, chunk=chunk)
    assert logits.is_cuda
    assert (logits.cpu() - exact).abs().mean() <= 2 * (plain.double() - exact).abs().mean()


def test_greedy_tokens_are_the_likeliest(folder, ids):
    """Or as good as: what is rounded differently may decide between equals."""
    prompts = [ids[:21].tolist(), ids[30:31].tolist(), ids.tolist()]
    llm = Mistral.from_pretrained(folder, device="cuda", dtype=torch.bfloat16, prefill_chunk=9)
    completions = llm.generate(prompts, max_tokens=50, ignore_eos=True)
    exact, rounded = (Mistral.from_pretrained(folder, dtype=d) for d in (None, torch.bfloat16))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(completion.token_ids) == 50
        text = prompt + completion.token_ids[:-1]
        logits = exact.logits(text)
        # Two logits are compared, each with at most twice the error that it has on the CPU.
        allowed = 4 * (rounded.logits(text) - logits).abs().max()
        logits = logits[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() <= allowed


def test_the_same_seed_gives_the_same_tokens(folder, ids):
    llm = Mistral.from_pretrained(folder, device="cuda", dtype=torch.bfloat16)
    options = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 40}
    first, second, other = (
        llm.generate(ids[:9].tolist(), seed=seed, ignore_eos=True, **options)[0].token_ids
        for seed in (5, 5, 6)
    )
    assert first == second != other


@pytest.fixture(params=[False, True], ids=["apart", "overlapping"])
def overlap(request):
    """Whether kernels may begin before those ahead of them are done."""
    before = _C.overlapping()
    _C.overlap(request.param)
    yield
    _C.overlap(before)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4, "logprobs": 1}])
def test_graphs_give_what_the_launches_one_by_one_give(folder, ids, monkeypatch, options, overlap):
    """To the bit, though steps are launched ahead."""
    load = {"device": "cuda", "dtype": torch.bfloat16, "max_batch": 2}
    prompts = [ids[:21].tolist(), ids[30:31].tolist(), ids.tolist()]
    options = {"max_tokens": 40, "ignore_eos": True} | options
    with_graphs = Mistral.from_pretrained(folder, **load)
    monkeypatch.setenv("MISTRAL_EXT_GRAPHS", "0")
    one_by_one = Mistral.from_pretrained(folder, **load)
    expected = one_by_one.generate(prompts, **options)
    monkeypatch.delenv("MISTRAL_EXT_GRAPHS")
    graphs = with_graphs.generate(prompts, **options)
    assert type(one_by_one.engine.runner) is Runner
    assert type(with_graphs.engine.runner) is GraphRunner
    for with_graph, without in zip(graphs, expected, strict=True):
        assert with_graph.token_ids == without.token_ids
        assert with_graph.logprobs == without.logprobs


def test_a_replayed_step_neither_waits_nor_allocates(folder):
    llm = Mistral.from_pretrained(folder, device="cuda", dtype=torch.bfloat16)
    pool = SlotPool(llm.config, 128, torch.bfloat16, "cuda")
    extents = [pool.allocate(64, 64) for _ in range(2)]
    sampler = Sampler(2, llm.config.vocab_size, "cuda")
    for row in range(2):
        sampler.start(row, SamplingParams(), [1])
    runner = GraphRunner(llm.model, pool, sampler)
    runner.launch(extents, [0, 1], [5, 6]).token_ids()
    before = runner.launch(extents, [0, 1], None)  # captures
    counts = []
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(20):
            step = runner.launch(extents, [0, 1], None)
            before.token_ids()
            before = step
            counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(set(counts)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_at_the_sizes_of_mistral_7b(dtype):
    """Full windows of 4096, which every multiprocessor takes a part of, and a long chunk. The lists
    of tokens lie on the device too: on a CPU they would take long."""
    positions = [100_003, 4095, 0]
    batch = RaggedBatch(
        [4096, 4096, 600], 4096, 8, 2, 128, dtype, positions=positions, device="cuda"
    )
    for counts in ((1, 1, 1), (4, 1, 530), (1, 700, 1), (3, 1, 2)):
        batch.step(counts)


@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 200])
@pytest.mark.parametrize("form", [None, "int8", "q8_0", "int4", "iq4_xs"])
@pytest.mark.parametrize(("size", "rows"), [(4096, 6144), (4096, 28672), (14336, 4096)])
def test_products_at_the_sizes_of_mistral_7b(size, rows, form, tokens):
    """The error of each element against that of a product in fp32 of the same weights."""
    generator = torch.Generator("cuda").manual_seed(size + rows + tokens)
    x = torch.randn(tokens, size, device="cuda", generator=generator).bfloat16()
    exact = torch.randn(rows, size, device="cuda", generator=generator)
    weight = exact.bfloat16() if form is None else quantize(exact, form)
    wide = weight.float() if form is None else weight.dequantize()
    expected = x.double() @ wide.double().T
    plain = (x @ wide.bfloat16().T).double()
    allowed = 2 * (plain - expected).abs().max() + 2**-9 * expected.abs().max()
    out = ops.linear(x, weight)
    assert (out.double() - expected).abs().max() <= allowed
    for limit in (rows, rows - 1, 1000):
        logits, token_ids = ops.linear_argmax(x, weight, limit=limit)
        assert torch.equal(logits, out)
        assert torch.equal(token_ids, out[:, :limit].argmax(1))  # of equals the first
    if tokens <= 64:
        assert torch.equal(out[:1], ops.linear(x[:1], weight))
        assert torch.equal(out, ops.linear(x, weight))


class DecodeStep:
    """A step of 3 sequences at different places of their rings, in the memory of the GPU."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator).bfloat16().cuda()

        self.window = 700  # enough to be divided among multiprocessors
        self.q, self.k, self.v = random(3, 8, 128), random(3, 2, 128), random(3, 2, 128)
        self.pools = random(3 * 2 * 700, 128), random(3 * 2 * 700, 128)
        rows = [(i, 1, position, i * 1400, 700) for i, position in enumerate((5, 698, 10**6))]
        self.table = torch.tensor(rows).cuda()
        self.frequencies = reference.frequencies(1e4, 128, "cuda")
        self.out = torch.empty_like(self.q)

    def run(self):
        ops.rope(self.q, self.k, self.v, *self.pools, self.table, self.frequencies, self.window)
        given = self.q, self.k, self.v, *self.pools, self.table
        self.out.copy_(ops.attention(*given, self.window, max_count=1))
        self.table[:, 2] += 1

    def capture(self, runs=1):
        """A graph of as many `run`; the state is as it was before."""
        state = [x.clone() for x in (self.q, self.k, *self.pools, self.table)]
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            self.run()
        torch.cuda.current_stream().wait_stream(warm_up)
        for x, before in zip((self.q, self.k, *self.pools, self.table), state, strict=True):
            x.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(runs):
                self.run()
        return graph


def check_replays(graph, captured, eager, steps=4, runs=1):
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        for name in ("q", "k", "v"):
            new = torch.randn(getattr(eager, name).shape, generator=generator).bfloat16()
            getattr(eager, name).copy_(new)
            getattr(captured, name).copy_(new)
        for _ in range(runs):
            eager.run()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured.out, eager.out)
        assert torch.equal(captured.table, eager.table)
        for a, b in zip(captured.pools, eager.pools, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("runs", [1, 3])
def test_one_graph_serves_every_decode_step(runs):
    """Positions lie in the memory of the device, and the graph moves them itself."""
    captured, eager = DecodeStep(), DecodeStep()
    check_replays(captured.capture(runs), captured, eager, runs=runs)


def test_graphs_do_not_depend_on_each_other():
    """The second of two works though the first has never run and is gone."""
    # What is allocated from here on is not zero by chance.
    torch.ones(2**28, dtype=torch.int32, device="cuda")
    torch.cuda.empty_cache()
    first, second, eager = DecodeStep(1), DecodeStep(), DecodeStep()
    unused, graph = first.capture(), second.capture()
    del unused
    check_replays(graph, second, eager)


def test_runs_on_the_current_stream():
    """After what is on it already: here, a long wait and then the input."""
    x, gate = torch.zeros(64, 4096).bfloat16().cuda(), torch.ones(64, 4096).bfloat16().cuda()
    weight, new = torch.ones(4096).bfloat16().cuda(), torch.randn(64, 4096).bfloat16().cuda()
    step, expected_step = DecodeStep(), DecodeStep()
    q = torch.randn_like(step.q)
    expected = ops.rms_norm(new, weight), ops.swiglu(gate, new)
    expected_step.q.copy_(q)
    expected_step.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: about 50 ms
        x.copy_(new)
        step.q.copy_(q)
        actual = ops.rms_norm(x, weight), ops.swiglu(gate, x)
        step.run()
    stream.synchronize()
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(step.out, expected_step.out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_runs_on_the_device_of_the_tensors():
    x, weight = torch.randn(5, 4096).cuda(0), torch.ones(4096).cuda(0)
    expected = ops.rms_norm(x, weight)
    actual = ops.rms_norm(x.to("cuda:1"), weight.to("cuda:1"))
    assert actual.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(actual.cpu(), expected.cpu())
    with pytest.raises(TypeError, match="rms_norm: weight is on cuda:1, expected cuda:0 like x"):
        ops.rms_norm(x, weight.to("cuda:1"))


def arguments(dim=64, dtype=torch.bfloat16, **changes):
    """Two sequences, of 3 and 1 new tokens and rings of 8 slots."""
    given = {
        "q": torch.zeros(4, 4, dim, dtype=dtype, device="cuda"),
        "k": torch.zeros(4, 2, dim, dtype=dtype, device="cuda"),
        "v": torch.zeros(4, 2, dim, dtype=dtype, device="cuda"),
        "k_pool": torch.zeros(32, dim, dtype=dtype, device="cuda"),
        "v_pool": torch.zeros(32, dim, dtype=dtype, device="cuda"),
        "sequences": torch.tensor([[0, 3, 0, 0, 8], [3, 1, 6, 16, 8]], device="cuda"),
        "window": 8,
    }
    return given | {name: change(given[name]) for name, change in changes.items()}


def unaligned(x):
    """The same shape, 2 bytes past a multiple of 16."""
    return torch.zeros(x.numel() + 8, dtype=x.dtype, device=x.device)[1:-7].view(x.shape)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"k": torch.Tensor.cpu}, TypeError, "k is on cpu, expected cuda:0 like q"),
        ({"v_pool": torch.Tensor.cpu}, TypeError, "v_pool is on cpu, expected cuda:0 like q"),
        ({"sequences": torch.Tensor.cpu}, TypeError, "sequences is on cpu, expected cuda:0 like q"),
        ({"dtype": torch.float32}, TypeError, "q has dtype torch.float32, expected torch.bfloat16"),
        ({"dim": 96}, ValueError, "q has head dimension 96, expected 64 or 128 on a CUDA device"),
        ({"dim": 32}, ValueError, "q has head dimension 32, expected 64 or 128 on a CUDA device"),
        ({"q": unaligned}, ValueError, "expected rows that begin at multiples of 16 bytes"),
        ({"k_pool": unaligned}, ValueError, "expected rows that begin at multiples of 16 bytes"),
        (
            {"sequences": lambda x: x[:0]},
            ValueError,
            "sequences has 0 rows, expected 1 or more for",
        ),
    ],
)
def test_what_attention_cannot_do_on_a_gpu(given, error, message):
    with pytest.raises(error) as caught:
        ops.attention(**arguments(**given))
    assert str(caught.value).startswith("attention: ")
    assert message in str(caught.value)


def test_rows_that_attention_cannot_write_on_a_gpu():
    given = list(arguments().values())
    out = unaligned(given[0])
    with pytest.raises(ValueError, match=r"^attention: out .*multiples of 16 bytes$"):
        _C.attention(*given[:-1], out, 8, None, None)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((3, 12), (4, 12), "x has 12 inputs, expected a multiple of 8 on a CUDA device"),
        (
            (3, 24),
            quantize(torch.ones(4, 24), "int8"),
            "x has 24 inputs, expected a multiple of 16",
        ),
        (unaligned, (4, 64), "expected rows that begin at multiples of 16 bytes"),
        ((3, 64), unaligned, "weight begins at address"),
    ],
)
def test_what_linear_cannot_do_on_a_gpu(x, weight, message):
    def made(given):
        if isinstance(given, Quantized):
            return given.to("cuda")
        if given is unaligned:
            return unaligned(torch.zeros(3, 64).bfloat16().cuda())
        return torch.zeros(given).bfloat16().cuda()

    with pytest.raises(ValueError, match=f"^linear: .*{message}"):
        ops.linear(made(x), made(weight))


def test_devices_may_not_be_mixed():
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(TypeError, match="rms_norm: weight is on cpu, expected cuda:0 like x"):
        ops.rms_norm(x.cuda(), weight)
    with pytest.raises(TypeError, match="rms_norm: weight is on cuda:0, expected cpu like x"):
        ops.rms_norm(x, weight.cuda())
    with pytest.raises(TypeError, match="swiglu: up is on cpu, expected cuda:0 like gate"):
        ops.swiglu(x.cuda(), x)


def test_opcheck():
    """The declared mutations and the fake kernels, of tensors on a GPU."""
    given = arguments()
    tensors = [given[name] for name in ("q", "k", "v", "k_pool", "v_pool", "sequences")]
    calls = {
        "rms_norm": (given["k_pool"], given["k_pool"][0]),
        "embedding": (
            torch.arange(2).cuda(),
            given["k_pool"],
            None,
            "plain",
            given["k_pool"].dtype,
        ),
        "rope": (*tensors, reference.frequencies(1e4, given["q"].shape[-1], "cuda"), 8),
        "attention": (*tensors, 8),
        "swiglu": (given["k_pool"], given["v_pool"]),
        "linear": (given["k_pool"], [given["v_pool"]], []),
        "linear_argmax": (given["k_pool"], [given["v_pool"]], []),
    }
    for name, call in calls.items():
        torch.library.opcheck(getattr(torch.ops.mistral_ext, name).default, call)


@pytest.mark.parametrize("tokens", [3, 70])
def test_linear_rope_is_linear_and_then_rope(tokens):
    """To the bit, also of more tokens than ours multiply by themselves."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().cuda()

    x, norm, rows = random(tokens, 256), random(256), (256, 128, 128)
    weights = [random(n, 256) for n in rows]
    table = torch.tensor([[0, tokens, 5, 0, 80]]).cuda()
    frequencies = reference.frequencies(1e4, 64, "cuda")
    pools, others = ([random(160, 64) * 0 for _ in range(2)] for _ in range(2))
    out = ops.linear_rope(x, weights, norm, 1e-5, *pools, table, frequencies)
    expected = ops.linear(x, weights, norm, 1e-5)
    q, k, v = expected.unflatten(1, (-1, 64)).split([4, 2, 2], dim=1)
    ops.rope(q, k, v, *others, table, frequencies)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, pools, others))

"""Checks of a whole model on one device, against the same model in plain torch on that device.

tests/engine/test_whole_model.py runs them on every device, bench/canary_cuda.py first of all on a
CUDA machine. The yardstick is the model of reference.py in fp32, with the same weights as the model
that is checked, and its error the one that plain torch has in the dtype of that model. Where a
token is chosen, what rounds differently may decide between equals: a choice is right if nothing is
better by more than the rounding of two logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import reference
import torch
from torch import Tensor

from mistral_ext import Completion, Mistral
from mistral_ext.engine.drafts import Drafter
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.quantize import Quantized

MANY = 20  # sequences at once: more than the fused products of a decode step take


class Case:
    """A model on a device.

    Args:
        folder: the checkpoint, with a tokenizer.
        device, dtype, quantize: as of `Mistral.from_pretrained`.
        ids: a prompt of several windows; shorter ones are parts of it.
        chunk: of a prompt that is read in pieces; divides neither the prompt nor the window.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        dtype: torch.dtype,
        quantize: str | None,
        ids: Sequence[int],
        chunk: int,
    ) -> None:
        self.folder, self.device, self.dtype, self.quantize = folder, device, dtype, quantize
        self.ids, self.chunk = list(ids), chunk
        self.llm = self.load()
        self._weights: dict[torch.dtype, dict[str, Tensor]] = {}

    def load(self, **changes) -> Mistral:
        options = {"device": self.device, "dtype": self.dtype, "quantize": self.quantize}
        return Mistral.from_pretrained(self.folder, progress=False, **(options | changes))

    def reference(self, ids: Sequence[int], dtype: torch.dtype) -> Tensor:
        """[T, V] logits of the plain model."""
        if dtype not in self._weights:
            weights = load_weights(
                read_folder(self.folder), self.dtype, progress=False, quantize=self.quantize
            )
            self._weights[dtype] = {
                name: (w.dequantize() if isinstance(w, Quantized) else w).to(self.device, dtype)
                for name, w in weights.items()
            }
        ids = torch.tensor(ids, device=self.device)
        return reference.model(self._weights[dtype], self.llm.config, ids)

    def exact_and_rounding(self, ids: Sequence[int], prompt: int) -> tuple[Tensor, float]:
        """The exact logits [T - prompt + 1, V] after the prompt and each later token, and by how
        much two logits of a healthy model may come out on the wrong side of each other."""
        exact = self.reference(ids, torch.float32)[prompt - 1 :]
        plain = self.reference(ids, self.dtype)[prompt - 1 :]
        # Each of the two may have twice the error of plain torch.
        return exact, 4 * (plain.float() - exact).abs().max().item()


def expect_best(
    case: Case,
    prompt: Sequence[int],
    completion: Completion,
    score: Callable[[Sequence[int], np.ndarray], np.ndarray] = lambda given, logits: logits,
    slack: float = 1.0,
) -> None:
    """Each token of the completion has the best score, but for rounding.

    Args:
        score: of all tokens after `given` ones of the completion, from the exact logits [V].
        slack: by how much a score differs at most, if its logit differs by 1.
    """
    token_ids = completion.token_ids
    exact, rounding = case.exact_and_rounding([*prompt, *token_ids[:-1]], len(prompt))
    for i, logits in enumerate(exact.cpu().double().numpy()):
        scores = score(token_ids[:i], logits)
        lost = scores.max() - scores[token_ids[i]]
        assert lost <= slack * rounding, (
            f"token {i} of the completion is {token_ids[i]}, expected {scores.argmax()}: "
            f"its score is lower by {lost:.3g}, rounding explains {slack * rounding:.3g}"
        )


def check_logits(case: Case) -> None:
    """Of a prompt far past the window, in one piece and in several."""
    exact = case.reference(case.ids, torch.float32)
    plain = case.reference(case.ids, case.dtype)
    allowed = 2 * (plain.float() - exact).abs().mean()
    for chunk in (None, case.chunk):
        logits = case.llm.logits(case.ids, chunk=chunk)
        assert logits.device.type == torch.device(case.device).type
        error = (logits - exact).abs().mean()
        assert error <= allowed, f"chunk {chunk}: mean error {error:.3g}, allowed {allowed:.3g}"


def check_greedy(case: Case) -> None:
    """From a prompt far past the window, and past the window from a short one."""
    window = case.llm.config.sliding_window
    for prompt, count in ((case.ids, 8), (case.ids[:3], min(window + 5, 60))):
        (completion,) = case.llm.generate([prompt], max_tokens=count, ignore_eos=True)
        assert len(completion.token_ids) == count
        expect_best(case, prompt, completion)


def check_many(case: Case) -> None:
    """Twenty prompts of different lengths at once; seven of them three at a time."""
    prompts = [case.ids[i : 2 * i + 1 + i % 3] for i in range(MANY)]
    for max_batch, some in ((MANY, prompts), (3, prompts[-7:])):
        llm = case.load(max_batch=max_batch)
        completions = llm.generate(some, max_tokens=6, ignore_eos=True)
        for prompt, completion in zip(some, completions, strict=True):
            assert len(completion.token_ids) == 6
            expect_best(case, prompt, completion)


def check_penalties(case: Case) -> None:
    """All three together: against repetition, and for it, so that tokens are counted far."""
    prompt = case.ids[:40]
    for repetition, presence, frequency in ((1.5, 1.6, 0.4), (1.1, 0.5, -0.8)):
        (completion,) = case.llm.generate(
            [prompt],
            max_tokens=24,
            ignore_eos=True,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        penalties = repetition, presence, frequency

        def score(given, logits, penalties=penalties):
            history = np.bincount(given, minlength=len(logits)) * 2
            history[prompt] += 1
            return reference.penalised(logits, penalties, history)

        expect_best(case, prompt, completion, score, slack=repetition)


def check_logit_bias(case: Case) -> None:
    """A token that is forced, tokens that are banned; and without a bias all is as before."""
    prompt, options = case.ids[:7], {"max_tokens": 10, "ignore_eos": True}
    (free,) = case.llm.generate([prompt], **options)
    (forced,) = case.llm.generate([prompt], logit_bias={77: 100.0}, **options)
    assert forced.token_ids == [77] * 10
    banned = sorted(set(free.token_ids[:3]))
    bias = dict.fromkeys(banned, -float("inf"))
    (without,) = case.llm.generate([prompt], logit_bias=bias, **options)
    assert not set(banned) & set(without.token_ids)

    def score(given, logits):
        logits[banned] = -np.inf
        return logits

    expect_best(case, prompt, without, score)
    (again,) = case.llm.generate([prompt], **options)
    assert again.token_ids == free.token_ids


def check_draws(case: Case) -> None:
    """Five completions of one seed, each by its own noise; the same again, but for another seed."""
    prompt, seed, temperature = case.ids[:5], 2**63 + 11, 0.7
    options = {"n": 5, "temperature": temperature, "max_tokens": 12, "ignore_eos": True}
    completions = case.llm.generate([prompt], seed=seed, **options)
    for index, completion in enumerate(completions):

        def score(given, logits, index=index):
            return logits / temperature + reference.gumbel((seed, index, len(given)), len(logits))

        expect_best(case, prompt, completion, score, slack=1 / temperature)

    def token_ids(seed):
        return [c.token_ids for c in case.llm.generate([prompt], seed=seed, **options)]

    drawn = [completion.token_ids for completion in completions]
    assert token_ids(seed) == drawn
    assert not any(one in drawn for one in token_ids(seed + 1))


def check_ends(case: Case) -> None:
    """At a stop string, at an end token, and in a stream; what comes after is not disturbed."""
    prompt = case.ids[:6]
    options = {"max_tokens": 16, "ignore_eos": True}
    (free,) = case.llm.generate([prompt], **options)
    stop = free.text[4:9]
    (stopped,) = case.llm.generate([prompt], stop=["no such text", stop], **options)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < len(free.token_ids)

    stream = case.llm.stream(prompt, **options)
    assert "".join(stream) == free.text
    assert stream.completion.token_ids == free.token_ids

    end = free.token_ids[5]
    (ended,) = case.load(eos_ids=(end,)).generate([prompt], max_tokens=16)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert ended.finish_reason == "stop"


def check_perplexity(case: Case) -> None:
    """Of a text far past the window and a short one together."""
    texts = [case.ids[1:], case.ids[:5]]
    total, rounding, tokens = 0.0, 0.0, 0
    for text in texts:
        ids = [case.llm.tokenizer.bos_id, *text]
        exact = case.reference(ids[:-1], torch.float32)
        plain = case.reference(ids[:-1], case.dtype)
        targets = torch.tensor(text, device=case.device)
        total += torch.nn.functional.cross_entropy(exact, targets, reduction="sum").item()
        # A log-probability moves by at most twice as much as the logit that moves most.
        rounding += 2 * (plain.float() - exact).abs().amax(1).sum().item()
        tokens += len(text)
    result = perplexity(case.llm, texts, progress=False)
    assert result.tokens == tokens
    error, allowed = abs(result.nll - total / tokens), 2 * rounding / tokens
    assert error <= allowed, f"nll {result.nll} is off by {error:.3g}, allowed {allowed:.3g}"


def check_chat(case: Case) -> None:
    """A conversation that keeps its cache. Needs mistral-common."""
    # Words only: what a random model writes else is no text, and is then read again.
    pieces = map(case.llm.tokenizer.token_bytes, range(case.llm.tokenizer.vocab_size))
    banned = [i for i, p in enumerate(pieces) if not (p.startswith(b" ") and p[1:].isalpha())]
    bias = dict.fromkeys(banned, -float("inf"))
    options = {"max_tokens": 8, "ignore_eos": True, "logit_bias": bias}

    def score(given, logits):
        logits[banned] = -np.inf
        return logits

    # More than the least that the engine keeps, a piece of 32 tokens.
    first = "Hello there. Tell me of the king and of his three sons, and of what became of them."
    chat = case.llm.start_chat(template="v1")
    for turn, text in enumerate((first, "And then?", "Why?")):
        pieces = list(chat.send(text, **options))
        assert "".join(pieces) == chat.completion.text
        expect_best(case, chat.prompt_ids, chat.completion, score)
        read = chat.completion.timing.prompt_tokens
        assert (read < len(chat.prompt_ids)) == (turn > 0), f"turn {turn} reads {read} tokens"
    messages = [{"role": "user", "content": first}]
    reply = case.llm.chat(messages, template="v1", **options)
    assert reply.text == chat.messages[1]["content"]


@contextmanager
def without_graphs() -> Iterator[None]:
    """Within it, a model that is loaded launches every kernel of a step."""
    before = os.environ.get("MISTRAL_EXT_GRAPHS")
    os.environ["MISTRAL_EXT_GRAPHS"] = "0"
    try:
        yield
    finally:
        del os.environ["MISTRAL_EXT_GRAPHS"]
        if before is not None:
            os.environ["MISTRAL_EXT_GRAPHS"] = before


def runner_of(llm: Mistral) -> str | None:
    """The class that runs a model's steps; None if the model does not tell."""
    runner = getattr(getattr(llm, "engine", None), "runner", None)
    return runner and type(runner).__name__


def check_graphs(case: Case) -> None:
    """Captured steps give what the same steps give one by one, to the bit."""
    graphs = case.load()
    # A dry run, without a GPU, has no graphs and compares steps with themselves.
    expected = "GraphRunner" if torch.device(case.device).type == "cuda" else "Runner"
    assert runner_of(graphs) == expected, f"steps are run by {runner_of(graphs)}"
    prompts = [case.ids[:21], case.ids[30:31], case.ids[: len(case.ids) // 2]]
    options = {"max_tokens": 20, "ignore_eos": True, "logprobs": 1}
    drawn = {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.2, "logit_bias": {5: 2.0}}
    with without_graphs():
        steps = case.load()
        assert "Graph" not in (runner_of(steps) or ""), f"{runner_of(steps)} captures"
        plainly, with_draws = (steps.generate(prompts, **options | o) for o in ({}, drawn))
    for choice, one_by_one in (({}, plainly), (drawn, with_draws)):
        for _ in range(2):  # the second finds its graphs
            captured = graphs.generate(prompts, **options | choice)
            for a, b in zip(captured, one_by_one, strict=True):
                assert a.token_ids == b.token_ids
                assert a.logprobs == b.logprobs


class Known(Drafter):
    """Three drafts in a pass, of completions that are known; in every other pass one is wrong.

    Args:
        completions: the tokens of each, by its prompt.
    """

    def __init__(self, completions: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        super().__init__()
        self.completions = completions

    def choose(self, sequences, room, unknown=0):
        drafts = {}
        for sequence, most in zip(sequences, room, strict=True):
            begin = len(sequence.ids) - sequence.prompt_length + unknown
            tokens = self.completions[tuple(sequence.request.prompt_ids)][begin : begin + 3]
            if begin % 2 and tokens:
                tokens[-1] = 7
            if tokens[:most]:
                drafts[sequence] = tokens[:most]
        return drafts

    def note(self, *args):
        pass


def check_drafts(case: Case) -> None:
    """Tokens that were guessed are chosen as others are: on the CPU to the bit. Captured passes
    give what the same passes give one by one, to the bit."""
    window = case.llm.config.sliding_window
    prompts = [case.ids[: window + 21], case.ids[30:33]]
    options = {"max_tokens": 20, "ignore_eos": True, "logprobs": 1, "drafts": 3}
    bias = {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.2, "logit_bias": {5: 2.0}}
    for choice in ({}, bias):
        plain = case.llm.generate(prompts, **options | choice | {"drafts": 0})
        known = {tuple(p): c.token_ids for p, c in zip(prompts, plain, strict=True)}
        with without_graphs():
            steps = case.load()
            steps.engine.passes.drafter = Known(known)
            one_by_one = steps.generate(prompts, **options | choice)
        if case.llm.model.device.type == "cpu":  # on a GPU attention rounds by the number of rows
            one_by_one = plain
        llm = case.load()
        for _ in range(2):  # the second finds its graphs
            llm.engine.passes.drafter = Known(known)
            drafted = llm.generate(prompts, **options | choice)
            for prompt, a, b in zip(prompts, drafted, one_by_one, strict=True):
                assert a.timing.drafted_tokens > a.timing.accepted_tokens > 0
                assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
                if not choice:
                    expect_best(case, prompt, a)


CHECKS: dict[str, Callable[[Case], None]] = {
    "logits": check_logits,
    "greedy": check_greedy,
    "many": check_many,
    "penalties": check_penalties,
    "logit_bias": check_logit_bias,
    "draws": check_draws,
    "ends": check_ends,
    "perplexity": check_perplexity,
    "chat": check_chat,
    "graphs": check_graphs,
    "drafts": check_drafts,
}

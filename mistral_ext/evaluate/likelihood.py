"""Measures how likely texts are as continuations of other texts.

Benchmarks with given answers measure this for each answer to a question. Continuations of the same
context follow each other in the engine, so that most of a long context is read only once: later
continuations find it in the prefix cache. They read their own tokens, and the last few tokens of
the context again (`engine.prefix_cache.LEAST_PIECE`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_ext.engine.adapters import LoadedAdapter
from mistral_ext.engine.outputs import outputs_of
from mistral_ext.engine.request import Request
from mistral_ext.llm import Mistral
from mistral_ext.text.tokenizer import expect_token_ids


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a continuation."""

    logprob: float  # the natural logarithm of the continuation's probability
    is_greedy: bool  # whether each of its tokens is the most likely token


@torch.inference_mode()
def likelihoods(
    llm: Mistral,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: bool = True,
    adapter: str | None = None,
) -> Iterator[tuple[int, Likelihood]]:
    """Measures continuations.

    Args:
        llm: the model.
        pairs: the token ids of contexts and of their continuations, at least one id of each. For a
            model without a window, a pair may have at most one token more than the model has
            positions, because the last token is not read.
        progress: show a progress bar if stderr is a terminal.
        adapter: the name of a loaded adapter. None: the model is used without an adapter.

    Yields:
        The index of a pair and its result, in the order in which pairs are finished.

    Raises:
        ValueError, TypeError: the token ids of a pair are wrong or too many (the message names the
            pair), there is no such adapter, or the model does not write text.
    """
    llm.expect_writer()
    for i, (context, continuation) in enumerate(pairs):
        expect_token_ids(context, llm.config.vocab_size, f"pairs[{i}], the context,")
        expect_token_ids(continuation, llm.config.vocab_size, f"pairs[{i}], the continuation,")
        count = len(context) + len(continuation) - 1
        if llm.max_length is not None and count > llm.max_length:
            raise ValueError(
                f"pairs[{i}] has {count} tokens to read, expected {llm.max_length} or fewer, the "
                "positions that the model was trained for (max_positions)"
            )
    # The pairs are sorted, so that neighbours share the longest beginnings.
    order = sorted(range(len(pairs)), key=lambda i: [*pairs[i][0], *pairs[i][1]])
    targets = {i: torch.tensor(pairs[i][1], device=llm.model.device) for i in order}
    totals = dict.fromkeys(order, (0.0, True))
    used = llm.adapters.find(adapter)
    requests = (_request(*pairs[i], used) for i in order)
    with tqdm(total=len(pairs), unit="texts", disable=None if progress else True) as bar:
        for number, output in outputs_of(llm.engine, requests):
            i = order[number]
            if output.prompt_logits is not None:
                ids, targets[i] = targets[i].tensor_split([len(output.prompt_logits)])
                logprob, is_greedy = _measure(output.prompt_logits, ids)
                totals[i] = totals[i][0] + logprob, totals[i][1] and is_greedy
            if output.is_last:
                yield i, Likelihood(*totals.pop(i))
                bar.update()


def _request(
    context: Sequence[int], continuation: Sequence[int], adapter: LoadedAdapter | None
) -> Request:
    ids = [*context, *continuation][:-1]
    first = len(context) - 1
    return Request(ids, None, len(ids), prompt_logits=True, logits_from=first, adapter=adapter)


def _measure(logits: Tensor, ids: Tensor) -> tuple[float, bool]:
    """The log-probability of tokens [n] that were predicted by the logits [n, V], and whether each
    token is the most likely one."""
    if not len(ids):
        return 0.0, True
    logprobs = logits.log_softmax(dim=1).gather(1, ids[:, None])
    return logprobs.double().sum().item(), bool((logits.argmax(dim=1) == ids).all())

"""Perplexity: how well a model predicts a text.

It is exp of the mean negative log-likelihood of the text's tokens, each predicted from all those
before it that the model can see. It is exact: a text goes through the ring cache once, in chunks,
so every token sees its whole window, wherever a chunk begins. There are no strides, and no
restarts that would have to predict with a short context. Perplexities compare between models with
the same tokenizer only.

A model without a window knows `max_positions` positions. A longer text is cut into segments of
as many tokens, and each begins anew after a beginning-of-text token of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from mistral_ext.engine.cache import RingCache, ring_capacity
from mistral_ext.llm import Mistral


@dataclass(frozen=True)
class Perplexity:
    """The result for one or several texts together."""

    tokens: int  # that were predicted: all but the beginning of a text
    segments: int  # sequences read; as many as texts if none had to be cut
    nll: float  # mean negative log-likelihood of a token, in nats
    seconds: float  # wall clock

    @property
    def value(self) -> float:
        """The perplexity, exp(nll)."""
        return torch.tensor(self.nll, dtype=torch.float64).exp().item()  # inf, not OverflowError

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@torch.inference_mode()
def perplexity(
    llm: Mistral,
    texts: str | Sequence[str | Sequence[int]],
    max_tokens: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Measures a model on texts. Where there are several, they fill up each other's chunks.

    Logits take llm.prefill_chunk * vocabulary * 4 bytes.

    Args:
        llm: the model; it reads llm.prefill_chunk tokens in one pass.
        texts: a text, or several texts or lists of token ids. A beginning-of-text token comes
            before each and is not predicted.
        max_tokens: predict no more than the first tokens of each text; None: all.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        ValueError, TypeError: a text is empty, or holds a token that the model does not know.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more")
    sequences = []  # token ids; all but the first of each are predicted
    bos_id = llm.tokenizer.bos_id if llm.tokenizer else llm.config.bos_id
    for i, text in enumerate([texts] if isinstance(texts, str) else texts):
        ids = _token_ids(llm, text, f"texts[{i}]")[:max_tokens]
        longest = llm.max_length or len(ids)
        for first in range(0, len(ids), longest):
            sequences.append([bos_id, *ids[first : first + longest]])
    if not sequences:
        raise ValueError("texts is empty, expected one or more")

    sequences.sort(key=len, reverse=True)  # whichever ring comes free is then large enough
    capacities = [ring_capacity(llm.config, len(ids) - 1) for ids in sequences]
    # Two long texts at once, the end of one and the beginning of the next; many if they are short.
    slots = 2 * max(llm.prefill_chunk, capacities[0])
    n_rings = sum(needed <= slots for needed in accumulate(capacities))
    cache = llm._cache(capacities[:n_rings])
    total = torch.zeros((), dtype=torch.float64)
    n_tokens = sum(len(ids) - 1 for ids in sequences)
    started = time.perf_counter()
    with tqdm(total=n_tokens, unit="tokens", disable=None if progress else True) as bar:
        for inputs, targets, table in _passes(sequences, cache, llm.prefill_chunk):
            logits = llm.model.forward(inputs, table, cache)  # [T, V]
            nll = cross_entropy(logits, targets.to(logits.device), reduction="none")
            total += nll.double().sum().cpu()
            bar.update(len(targets))
    seconds = time.perf_counter() - started
    return Perplexity(n_tokens, len(sequences), total.item() / n_tokens, seconds)


def _token_ids(llm: Mistral, text: str | Sequence[int], name: str) -> list[int]:
    """Without a beginning-of-text token."""
    is_text = isinstance(text, str)
    ids = llm.require_tokenizer().encode(text, bos=False) if is_text else list(text)
    if not ids:
        raise ValueError(f"{name} is empty, expected some text")
    for i in ids:
        if not 0 <= i < llm.config.vocab_size:
            raise ValueError(f"{name} has token id {i}, expected 0 to {llm.config.vocab_size - 1}")
    return ids


def _passes(
    sequences: Sequence[list[int]], cache: RingCache, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the model is to read in each pass: `chunk` tokens, but for the last pass.

    Yields:
        The tokens [T], those that follow them [T], and the sequence table.
    """
    waiting = list(sequences)
    reading: dict[int, list[int]] = {}  # ring -> its sequence
    while waiting or reading:
        inputs, targets, counts = [], [], {}
        for ring in range(len(cache.capacities)):
            if ring not in reading:
                if not waiting:
                    continue
                cache.rewind(ring, 0)
                reading[ring] = waiting.pop(0)
            ids, begin = reading[ring], cache.lengths[ring]
            end = min(begin + chunk - len(inputs), len(ids) - 1)
            inputs += ids[begin:end]
            targets += ids[begin + 1 : end + 1]
            counts[ring] = end - begin
            if end == len(ids) - 1:
                del reading[ring]
            if len(inputs) == chunk:
                break
        yield torch.tensor(inputs), torch.tensor(targets), cache.append(counts)

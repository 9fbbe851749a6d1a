"""Measures perplexity: how well a model predicts a text.

Perplexity is exp of the mean negative log-likelihood of the text's tokens. If the model has a
window, a text goes through the ring cache (engine/slots.py) once, in chunks. So every token is
predicted with its whole window, wherever a chunk begins. If the text were cut into separate pieces,
the first tokens of a piece would be predicted with a short context. Perplexities can be compared
only between models with the same tokenizer.

A model without a window has `max_positions` positions, so a longer text has to be cut into segments
of that length. Each segment starts with its own beginning-of-text token, and its tokens do not see
other segments.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from mistral_ext.engine.outputs import outputs_of
from mistral_ext.engine.request import Request
from mistral_ext.llm import Mistral
from mistral_ext.text.tokenizer import expect_token_ids


@dataclass(frozen=True)
class Perplexity:
    """The result for one or several texts together."""

    tokens: int  # the number of predicted tokens: all except the first of each segment
    segments: int  # the number of sequences: one for each text, or more if texts were cut
    nll: float  # the mean negative log-likelihood of a predicted token, in nats
    seconds: float  # the time of the measurement by the wall clock

    @property
    def value(self) -> float:
        """The perplexity, exp(nll)."""
        # A value that is too large becomes infinity. math.exp would raise OverflowError.
        return torch.tensor(self.nll, dtype=torch.float64, device="cpu").exp().item()

    @property
    def rate(self) -> float:
        """The number of predicted tokens per second."""
        return self.tokens / self.seconds


@torch.inference_mode()
def perplexity(
    llm: Mistral,
    texts: str | Sequence[str | Sequence[int]],
    max_tokens: int | None = None,
    progress: bool = True,
    adapter: str | None = None,
) -> Perplexity:
    """Measures a model on texts. Several texts share a pass over the model's weights.

    Logits take up to llm.prefill_chunk * vocabulary * 4 bytes.

    Args:
        llm: the model. It reads up to llm.prefill_chunk tokens in one pass.
        texts: a text, or a list of texts and of lists of token ids. A beginning-of-text token comes
            before each text and is not predicted. (Some tokenizers put no such token before a text.
            Then the first token of the text is not predicted.)
        max_tokens: only this many tokens at the beginning of each text are measured. None: all
            tokens are measured.
        progress: show a progress bar if stderr is a terminal.
        adapter: the name of a loaded adapter. None: the model is used without an adapter.

    Raises:
        ValueError, TypeError: `max_tokens` is below 1, there are no texts, a text is too short or
            holds a token that the model does not have, or the model does not write text.
    """
    llm.expect_writer()
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more")
    sequences = []  # lists of token ids, in which all ids except the first are predicted
    start = llm.tokenizer.start if llm.tokenizer else [llm.config.bos_id]
    for i, text in enumerate([texts] if isinstance(texts, str) else texts):
        ids = _token_ids(llm, text, f"texts[{i}]")[:max_tokens]
        if len(start) + len(ids) < 2:
            raise ValueError(f"texts[{i}] has one token, expected more: nothing comes before it")
        longest = llm.max_length or len(ids)
        segments = [[*start, *ids[i : i + longest]] for i in range(0, len(ids), longest)]
        # Without a beginning-of-text token, a last segment of one token has nothing to predict.
        sequences += [segment for segment in segments if len(segment) > 1]
    if not sequences:
        raise ValueError("texts is empty, expected one or more")

    n_tokens = sum(len(ids) - 1 for ids in sequences)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    started = time.perf_counter()
    used = llm.adapters.find(adapter)
    requests = [
        Request(ids[:-1], None, len(ids) - 1, prompt_logits=True, adapter=used) for ids in sequences
    ]
    targets = [torch.tensor(ids[1:], device=llm.model.device) for ids in sequences]
    with tqdm(total=n_tokens, unit="tokens", disable=None if progress else True) as bar:
        for number, output in outputs_of(llm.engine, requests):
            if output.prompt_logits is not None:  # [T, V]
                read = len(output.prompt_logits)
                next_ids, targets[number] = targets[number].tensor_split([read])
                nll = cross_entropy(output.prompt_logits, next_ids, reduction="none")
                total += nll.double().sum().cpu()
                bar.update(read)
    seconds = time.perf_counter() - started
    return Perplexity(n_tokens, len(sequences), total.item() / n_tokens, seconds)


def _token_ids(llm: Mistral, text: str | Sequence[int], name: str) -> list[int]:
    """Token ids of a text, without a beginning-of-text token."""
    if text == "":
        raise ValueError(f"{name} is empty, expected some text")
    ids = llm.require_tokenizer().encode(text, bos=False) if isinstance(text, str) else text
    expect_token_ids(ids, llm.config.vocab_size, name)
    return list(ids)

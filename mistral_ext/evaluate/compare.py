"""Measures how far the predictions of one model are from those of another, on the same text.

The comparison shows what a quantisation costs. It gives the Kullback-Leibler divergence of the
second model's next-token probabilities from the first model's, in nats per token; how often both
models have the same most likely token; and both perplexities. Both models read the same tokens, in
pieces of the same size.

CPUs may round activations to 8 bits before they multiply them by weights of 4 to 6 bits, here as in
generation. Two kinds of CPUs round them only if they read up to 8 tokens at once: x86 CPUs without
VNNI (for weights in `iq4_nl` and `iq4_xs`), and CPUs with AMX (for activations in bf16). On these
CPUs, pass chunk=8 to measure what generated tokens get. To measure the loss by the weights alone on
any CPU, call `ops.set_exact_products(True)`, or set MISTRAL_EXT_EXACT=1 in the environment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_ext.engine.outputs import outputs_of
from mistral_ext.engine.request import Request
from mistral_ext.files import write_png
from mistral_ext.llm import Mistral


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        divergences: [T] float64, KL(first || second) of the prediction after each token, in nats.
        agrees: [T] bool, whether both models predict the same most likely token after each token.
        nlls: the mean negative log-likelihood of the text's tokens by each model, in nats.
    """

    divergences: Tensor
    agrees: Tensor
    nlls: tuple[float, float]

    @property
    def perplexities(self) -> tuple[float, float]:
        """The perplexity of each model: exp of `nlls`."""
        first, second = (math.exp(min(nll, 700.0)) for nll in self.nlls)
        return first, second

    @property
    def agreement(self) -> float:
        """The share of tokens after which both models have the same most likely token."""
        return self.agrees.double().mean().item()

    def quantile(self, share: float) -> float:
        """The value that the divergence does not exceed for `share` (0 to 1) of the tokens."""
        return self.divergences.quantile(share).item()


@torch.inference_mode()
def compare(
    first: Mistral,
    second: Mistral,
    texts: Sequence[str],
    progress: bool = True,
    chunk: int = 256,
    adapters: tuple[str | None, str | None] = (None, None),
) -> Comparison:
    """Compares two models on texts.

    Args:
        first, second: models with the same tokens. The first is the reference.
        texts: the texts. Each is read after a beginning-of-text token. A model without a window has
            a limited number of positions. If a text has more tokens than one of the models can
            read, only its beginning is read.
        progress: show a progress bar if stderr is a terminal.
        chunk: the number of tokens in a piece. In pieces of up to 8 tokens, activations are rounded
            as in the generation of tokens. The logits of a piece take chunk * vocabulary * 4 bytes
            for each model.
        adapters: for each model the name of a loaded adapter. None: the model is used without an
            adapter.

    Raises:
        ValueError: `chunk` is below 1, there are no texts, a text is too short, the models have
            different tokens, or a model does not write text or have the adapter.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected 1 or more")
    for llm in (first, second):
        llm.expect_writer()
    ids_of_texts = [_same_ids(first, second, text, f"texts[{i}]") for i, text in enumerate(texts)]
    if not ids_of_texts:
        raise ValueError("texts is empty, expected one or more")
    # Rows of the output matrix beyond the tokenizer's tokens are padding. Models may have different
    # numbers of such rows, so only the logits that both have are compared.
    size = min(llm.config.vocab_size for llm in (first, second))
    divergences, agrees, nlls = [], [], torch.zeros(2, dtype=torch.float64, device="cpu")
    total = sum(len(ids) - 1 for ids in ids_of_texts)
    with tqdm(total=total, unit="tokens", disable=None if progress else True) as bar:
        for ids in ids_of_texts:
            targets = torch.tensor(ids[1:], device="cpu")
            pieces = [
                _logprobs(llm, ids[:-1], size, chunk, adapter)
                for llm, adapter in zip((first, second), adapters, strict=True)
            ]
            for target, p, q in zip(targets.split(chunk), *pieces, strict=True):
                divergences.append((p.exp() * (p - q)).sum(dim=1).double().clamp(min=0))
                agrees.append(p.argmax(dim=1) == q.argmax(dim=1))
                of_target = torch.stack([x.gather(1, target[:, None]).double() for x in (p, q)])
                nlls -= of_target.sum(dim=(1, 2))
                bar.update(len(target))
    mean_first, mean_second = (nlls / total).tolist()
    return Comparison(torch.cat(divergences), torch.cat(agrees), (mean_first, mean_second))


def _same_ids(first: Mistral, second: Mistral, text: str, name: str) -> list[int]:
    """The tokens of a text that both models can read. Raises ValueError if the text is empty or has
    one token, or if the models encode it to different tokens."""
    if not text:
        raise ValueError(f"{name} is empty, expected some text")
    ids, others = (llm.require_tokenizer().encode(text) for llm in (first, second))
    if ids != others:
        raise ValueError(
            f"{name} has other tokens in {second.folder} than in {first.folder}, expected models "
            "with the same tokenizer"
        )
    limits = [llm.max_length for llm in (first, second) if llm.max_length is not None]
    ids = ids[: min(limits) + 1] if limits else ids
    if len(ids) < 2:
        raise ValueError(f"{name} has one token, expected more: nothing comes before it")
    return ids


def _logprobs(
    llm: Mistral, ids: Sequence[int], size: int, chunk: int, adapter: str | None
) -> Iterator[Tensor]:
    """Yields the log-probabilities of the next token after each token, [n, size] fp32 on the CPU,
    in pieces of `chunk` tokens."""
    used = llm.adapters.find(adapter)
    request = Request(ids, None, len(ids), prompt_logits=True, chunk=chunk, adapter=used)
    for _, output in outputs_of(llm.engine, [request]):
        if output.prompt_logits is not None:
            yield output.prompt_logits[:, :size].log_softmax(dim=1).cpu()


def write_histogram(comparison: Comparison, path: Path, title: str) -> None:
    """Draws a histogram of the divergences of tokens, as a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    # A divergence of 0 has no logarithm. Below 1e-10 divergences are only rounding errors.
    logarithms = comparison.divergences.clamp(min=1e-10).log10()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(logarithms.numpy(), bins=60)
    axes.axvline(math.log10(max(comparison.divergences.mean().item(), 1e-10)), color="black")
    axes.set_xlabel("KL divergence after a token, log10 of nats; line: log10 of the mean")
    axes.set_ylabel("tokens")
    axes.set_title(title)
    write_png(path, figure)

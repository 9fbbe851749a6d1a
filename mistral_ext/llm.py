"""Text from a model: load it, complete prompts, stream, chat."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.engine.cache import RingCache, ring_capacity
from mistral_ext.engine.sampling import SamplingParams
from mistral_ext.engine.scheduler import Completion, Request, Scheduler
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer, move_weights
from mistral_ext.text.chat_template import (
    ChatTemplate,
    chat_template_of,
    encode_chat,
    extend_chat,
)
from mistral_ext.text.text_stream import TextStream
from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.weights import checkpoint

DEMO_MODEL = Path(__file__).parent / "demo"

Prompt = str | Sequence[int]

# Slots that the size of a ring is rounded up to, so that the rings of a call, and on a GPU the
# steps captured for them, fit the next call. 1024 are 128 MiB of Mistral 7B's keys and values.
_RING_STEP = 1024


def generate(
    prompt: Prompt | Sequence[Prompt], model: str | Path | Mistral | None = None, **sampling
) -> str | list[str]:
    """Completes a prompt, or each of a list of prompts.

    Args:
        prompt: text or token ids, or a list of those.
        model: a Mistral, a model folder or a hub id; None: the small demo model of this package.
            The last folder or id stays loaded.
        sampling: fields of `SamplingParams`.

    Returns:
        The completion's text; a list of texts for a list of prompts or with n > 1.
    """
    llm = model if isinstance(model, Mistral) else _load(str(model or DEMO_MODEL))
    llm.require_tokenizer()
    texts = [completion.text for completion in llm.generate(prompt, **sampling)]
    return texts[0] if _is_one(prompt) and len(texts) == 1 else texts


@functools.lru_cache(maxsize=1)
def _load(model: str) -> Mistral:
    return Mistral.from_pretrained(model)


class Mistral:
    """A model with its tokenizer, ready to generate.

    Attributes:
        config: the model's shape and constants.
        model: the transformer.
        tokenizer: None if the folder had none; prompts are then lists of token ids.
        prefill_chunk: prompt tokens read in one pass; more is faster and takes more memory.
        max_batch: completions generated at once; each holds a ring of the cache. On the CPU, up to
            8 do not change each other's text; with more, products round differently. On a GPU the
            rings of the last call stay, with the steps captured for them, until others are needed.
    """

    def __init__(
        self,
        config: MistralConfig,
        model: Transformer,
        tokenizer: Tokenizer | None,
        folder: Path,
        prefill_chunk: int = 512,
        max_batch: int = 8,
    ) -> None:
        for name, value in (("prefill_chunk", prefill_chunk), ("max_batch", max_batch)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer, 1 or more")
        if tokenizer:
            _check_tokens(config, tokenizer, folder)
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.folder = folder
        self.prefill_chunk = prefill_chunk
        self.max_batch = max_batch
        self._kept: Scheduler | None = None  # that of the last completions, while no one uses it

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        prefill_chunk: int = 512,
        max_batch: int = 8,
        progress: bool = True,
        quantize: str | None = None,
        **config_overrides,
    ) -> Mistral:
        """Loads a model folder, in Hugging Face's or Mistral's format, or a model of the hub.

        Weights are memory-mapped: they take memory as they are read, and once.

        Args:
            model: a folder, or a hub id such as "mistralai/Mistral-7B-v0.1".
            device: "cpu", the default, or "cuda".
            dtype: float32, bfloat16 or float16; None: as stored. Another than the stored one
                copies all weights but those in 8 or 4 bits.
            progress: show a progress bar if stderr is a terminal.
            quantize: "int8" or "int4": round the weights to as many bits while they are read, see
                `mistral_ext.weights.quantize`; None: as stored. `quantize_checkpoint` does it once
                for all.
            config_overrides: fields of `MistralConfig`, e.g. sliding_window=None, rope_theta=1e6.

        Raises:
            FileNotFoundError, ValueError, TypeError: naming the file, tensor or argument.
        """
        device = _check_device(device)
        folder = checkpoint.resolve(model)
        config = MistralConfig.from_folder(folder, **config_overrides)
        tokenizer = Tokenizer.from_folder(folder)
        weights = checkpoint.load_weights(folder, config, dtype, progress, quantize)
        if device.type != "cpu":
            move_weights(weights, device)
        return cls(
            config, Transformer(config, weights), tokenizer, folder, prefill_chunk, max_batch
        )

    def generate(self, prompts: Prompt | Sequence[Prompt], **sampling) -> list[Completion]:
        """Completes prompts, together where there are several.

        Args:
            prompts: text or token ids, or a list of those. Text is tokenized with a
                beginning-of-text token; token ids are taken as they are.
            sampling: fields of `SamplingParams`.

        Returns:
            The completions, n of them for each prompt, in the order of the prompts.

        Raises:
            ValueError, TypeError: naming the prompt or option that is wrong.
        """
        params = SamplingParams.from_options(sampling)
        requests = [
            self._request(ids, params, index)
            for ids in self._encode_all(prompts)
            for index in range(params.n)
        ]
        if requests:
            # Longest first: whichever ring comes free is then large enough for the next.
            by_length = sorted(requests, key=lambda r: r.max_length, reverse=True)
            for _ in self._run(by_length):
                pass
        return [request.completion() for request in requests]

    def stream(self, prompt: Prompt, **sampling) -> Stream:
        """Completes one prompt, giving its text piece by piece as it is decoded.

        Returns:
            An iterator over pieces of text; its `completion` is set when it ends.
        """
        params = self._params_of_one(sampling)
        self.require_tokenizer()
        if not _is_one(prompt):
            raise TypeError("prompt is a list of prompts, expected one: generate takes several")
        request = self._request(self._encode_all(prompt)[0], params)
        return Stream(request, self._run([request]))

    def chat(
        self, messages: Sequence[Mapping[str, str]], template: str | None = None, **sampling
    ) -> Completion:
        """Replies to a conversation with an Instruct model.

        Args:
            messages: dicts with "role" ("system", "user" or "assistant") and "content".
            template: "v1", "v2" or "v3" of Mistral's chat templates; None: the model's own.
            sampling: fields of `SamplingParams`.

        Returns:
            The reply, a `Completion`.

        Raises:
            ValueError: the model is a base model, or the messages are not a conversation.
        """
        params = self._params_of_one(sampling)
        ids = self._check_ids(self.encode_chat(messages, template=template), "conversation")
        request = self._request(ids, params, starts_text=True)
        stream = Stream(request, self._run([request]))
        for _ in stream:
            pass
        return stream.completion

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        tools: Sequence[Mapping[str, object]] | None = None,
        template: str | None = None,
    ) -> list[int]:
        """The token ids that `chat` would have the model reply to.

        Args:
            messages: as in `chat`.
            tools: functions that the model may call, in OpenAI's format.
            template: as in `chat`.
        """
        return encode_chat(self.require_tokenizer(), messages, self.chat_template(template), tools)

    def start_chat(self, system: str | None = None, template: str | None = None) -> Chat:
        """A conversation that keeps its cache between turns; see `Chat`."""
        return Chat(self, system, self.chat_template(template))

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int] | Tensor, chunk: int | None = None) -> Tensor:
        """The model's logits after each token of one sequence.

        Args:
            token_ids: [T] ints.
            chunk: tokens read in one pass; None: all.

        Returns:
            [T, V] fp32.
        """
        if isinstance(token_ids, Tensor):
            token_ids = token_ids.tolist()
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected 1 or more")
        ids = self._check_ids(token_ids, "token_ids")
        cache = self._cache([len(ids)])
        logits = []
        for first in range(0, len(ids), chunk or len(ids)):
            new = ids[first : first + (chunk or len(ids))]
            logits.append(self.model.forward(torch.tensor(new), cache.append({0: len(new)}), cache))
        return torch.cat(logits)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError if the folder had none."""
        if self.tokenizer is None:
            raise ValueError(
                f"{self.folder} has no tokenizer (tokenizer.model or tokenizer.json): "
                "text is not possible, use token ids with Mistral.generate"
            )
        return self.tokenizer

    def chat_template(self, template: str | None = None) -> ChatTemplate:
        """The chat template to use; ValueError if the model is a base model."""
        return template or chat_template_of(self.folder, self.require_tokenizer())

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and completion together, at most; None: no limit.

        A model with a window sees W tokens wherever it is and goes on for ever; without one it
        knows the positions it was trained for.
        """
        return None if self.config.sliding_window else self.config.max_positions

    def _encode_all(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        if not isinstance(prompts, Sequence):
            raise TypeError(
                f"prompts is {prompts!r:.60}, expected text, token ids, or a list of those"
            )
        encoded = []
        several = not _is_one(prompts)
        for i, prompt in enumerate(prompts if several else [prompts]):
            name = f"prompts[{i}]" if several else "prompt"
            if isinstance(prompt, str):
                if not prompt:
                    raise ValueError(f"{name} is empty, expected some text")
                prompt = self.require_tokenizer().encode(prompt)
            encoded.append(self._check_ids(prompt, name))
        return encoded

    def _check_ids(self, ids: Sequence[int], name: str) -> list[int]:
        if not isinstance(ids, Sequence) or not all(isinstance(i, Integral) for i in ids):
            raise TypeError(f"{name} is {ids!r:.60}, expected text or a list of token ids")
        if not ids:
            raise ValueError(f"{name} is empty, expected at least one token id")
        for i in ids:
            if not 0 <= i < self.config.vocab_size:
                raise ValueError(
                    f"{name} has token id {i}, expected 0 to {self.config.vocab_size - 1}"
                )
        if self.max_length is not None and len(ids) >= self.max_length:
            raise ValueError(
                f"{name} has {len(ids)} tokens, expected fewer than {self.max_length}, the "
                "positions that the model was trained for (max_positions)"
            )
        return list(ids)

    def _params_of_one(self, sampling: Mapping[str, object]) -> SamplingParams:
        params = SamplingParams.from_options(sampling)
        if params.n != 1:
            raise ValueError(f"n is {params.n}, expected 1: generate makes several completions")
        return params

    def _request(
        self, ids: list[int], params: SamplingParams, index: int = 0, starts_text: bool = False
    ) -> Request:
        max_length = len(ids) + params.max_tokens
        text = None
        if self.tokenizer:
            text = TextStream(self.tokenizer, params.stop, strip_first_space=starts_text)
        elif params.stop:
            self.require_tokenizer()
        return Request(
            ids,
            params,
            max_length=min(max_length, self.max_length or max_length),
            eos_ids=self._eos_ids,
            vocab_size=self._vocab_size,
            index=index,
            text=text,
        )

    @property
    def _vocab_size(self) -> int:
        # A model may have more rows than the tokenizer has tokens (padding), or fewer (a padding
        # token that was added without a row): only what is both is ever sampled.
        rows = self.config.vocab_size
        return min(self.tokenizer.vocab_size, rows) if self.tokenizer else rows

    @property
    def _eos_ids(self) -> tuple[int, ...]:
        # Fine-tunes that end turns with a token of their own may say so in the tokenizer's files
        # alone.
        eos_ids = self.config.eos_ids
        return (*eos_ids, self.tokenizer.eos_id) if self.tokenizer else eos_ids

    def _cache(self, max_lengths: Sequence[int]) -> RingCache:
        self._kept = None  # its rings make room for these
        capacities = [ring_capacity(self.config, length) for length in max_lengths]
        return RingCache(self.config, capacities, self.model.dtype, self.model.device)

    def _scheduler(self, max_lengths: Sequence[int]) -> Scheduler:
        return Scheduler(self.model, self._cache(max_lengths), self._vocab_size)

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        """Completes requests, the longest first, with rings that no one else uses: those of the
        last completions, if they fit."""
        capacities = [
            ring_capacity(self.config, ceil(request.max_length / _RING_STEP) * _RING_STEP)
            for request in requests[: self.max_batch]
        ]
        scheduler, self._kept = self._kept, None
        if scheduler and scheduler.cache.capacities == capacities:
            for ring in range(len(capacities)):
                scheduler.cache.rewind(ring, 0)
        else:
            del scheduler  # first, for the same reason
            scheduler = self._scheduler(capacities)
        yield from scheduler.run(requests, self.prefill_chunk)
        if scheduler.worth_keeping:  # and not broken off
            self._kept = scheduler


class Stream:
    """Iterator over the text of one completion.

    Attributes:
        completion: the whole of it, once the iteration has ended; None before.
    """

    def __init__(self, request: Request, steps: Iterator[tuple[Request, str]]) -> None:
        self.completion: Completion | None = None
        self._request = request
        self._steps = steps

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for _, piece in self._steps:
            if piece:
                return piece
        if self.completion is None and self._request.finish_reason:
            self.completion = self._request.completion()
        raise StopIteration


class Chat:
    """A conversation with an Instruct model. What has been read and written stays in the cache, so
    a turn costs its own tokens only, however long the conversation.

    Attributes:
        messages: the conversation so far, as `Mistral.chat` takes it.
        ids: its tokens, as the model read and wrote them.
        prompt_ids: those of them that the last reply answers.
        completion: the last reply, if it was not broken off.
    """

    def __init__(self, llm: Mistral, system: str | None, template: ChatTemplate) -> None:
        self.messages: list[dict[str, str]] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self.completion: Completion | None = None
        self._llm = llm
        self._template = template
        self.ids: list[int] = []  # the cache holds a prefix of them
        self.prompt_ids: list[int] = []
        self._scheduler = llm._scheduler([llm.config.sliding_window or llm.config.max_positions])
        self._cache = self._scheduler.cache

    def send(self, text: str, **sampling) -> Iterator[str]:
        """Says `text` and streams the reply. A reply that is broken off (the iterator closed, or
        Ctrl-C) stays in the conversation as far as it came.

        Args:
            text: the user's message.
            sampling: fields of `SamplingParams`.
        """
        llm = self._llm
        params = llm._params_of_one(sampling)
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = extend_chat(llm.require_tokenizer(), messages, self.ids, self._template)
        request = llm._request(llm._check_ids(ids, "conversation"), params, starts_text=True)
        self._reuse_cache(ids)
        self.messages, self.prompt_ids = messages, ids
        self.completion = None
        stream = Stream(request, self._scheduler.run([request], llm.prefill_chunk))
        intact = False
        try:
            yield from stream
            self.completion = stream.completion
            intact = True
        except GeneratorExit:
            intact = True  # between two steps
            raise
        finally:
            self.ids = request.ids
            if not intact:
                self._cache.rewind(0, 0)  # a step was cut short: some layers may lack its tokens
            self.messages.append({"role": "assistant", "content": request.text.text})

    def _reuse_cache(self, ids: list[int]) -> None:
        """Keeps what the cache and the next prompt have in common, if it is still there."""
        common = 0
        for cached, new in zip(self.ids[: self._cache.lengths[0]], ids[:-1], strict=False):
            if cached != new:
                break
            common += 1
        if not self._cache.rewind(0, common):
            self._cache.rewind(0, 0)


def _check_tokens(config: MistralConfig, tokenizer: Tokenizer, folder: Path) -> None:
    if tokenizer.base_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.base_size} tokens, but the model in {folder} "
            f"only {config.vocab_size}: they do not belong together"
        )
    for token_id in config.eos_ids:
        if not tokenizer.known(token_id):
            raise ValueError(
                f"{folder}: the end of text is token id {token_id}, but the tokenizer has no such "
                "token, and a text would never end: are added_tokens.json, tokenizer_config.json "
                "or tokenizer.json missing?"
            )


def _check_device(device: str | torch.device | None) -> torch.device:
    name = str(device or "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # not a name at all
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, expected 'cpu' or 'cuda'")
    if device.type == "cuda" and _C.cuda_architectures is None:
        raise ValueError(
            f"device is {str(device)!r}, but this build of mistral_ext has no CUDA kernels: "
            "install it again with nvcc on PATH and MISTRAL_EXT_CUDA=on"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch finds no CUDA device")
    return device


def _is_one(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is one prompt, text or token ids, rather than a list of prompts."""
    return isinstance(prompt, str) or (
        isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Integral)
    )

"""Loads a model, and uses it to complete prompts, chat, moderate and compute embeddings.

To run the model, functions here send requests to the engine (`mistral_ext.engine.engine`) and read
its outputs. `mistral_ext.request_maker` makes the requests.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mistral_ext.chat import Chat
from mistral_ext.engine.adapters import AdapterTable, LoadedAdapter
from mistral_ext.engine.embedding import pool
from mistral_ext.engine.engine import Engine
from mistral_ext.engine.outputs import outputs_of
from mistral_ext.engine.params import SamplingParams, expect_drafts
from mistral_ext.engine.request import Completion, Request
from mistral_ext.engine.stream import Stream
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.request_maker import Prompt, RequestMaker, is_one
from mistral_ext.text.chat_template import ChatTemplate
from mistral_ext.text.guardrails import Moderation, label_ids, with_safe_prompt
from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.text.tool_calls import ToolUse
from mistral_ext.text.tool_parser import ToolParser
from mistral_ext.vocabulary import Vocabulary
from mistral_ext.weights.adapters import Adapter, adapter_for
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.device import find_device, is_same_device
from mistral_ext.weights.folder import ModelFolder, read_folder
from mistral_ext.weights.generation_config import generation_config_file, sampling_defaults
from mistral_ext.weights.hub import DEMO_MODEL, resolve

DEFAULT_MAX_BATCH = 8


def generate(
    prompt: Prompt | Sequence[Prompt],
    model: str | Path | Mistral | None = None,
    special_tokens: bool = False,
    **sampling: Any,
) -> str | list[str]:
    """Completes a prompt, or each of a list of prompts.

    Args:
        prompt: text, token ids, or a list of prompts.
        model: a Mistral, a model folder or a hub id. None: the small demo model of this package.
            A model that was loaded from a folder or id stays in memory until another is loaded.
        special_tokens: as in `Mistral.generate`.
        sampling: fields of `SamplingParams`.

    Returns:
        The text of the completion. For a list of prompts, or with n > 1, a list of texts.
    """
    model = DEMO_MODEL if model is None else model
    llm = model if isinstance(model, Mistral) else _load(str(model))
    llm.require_tokenizer()
    texts = [
        completion.text or "" for completion in llm.generate(prompt, special_tokens, **sampling)
    ]
    return texts[0] if is_one(prompt) and len(texts) == 1 else texts


@functools.lru_cache(maxsize=1)
def _load(model: str) -> Mistral:
    return Mistral.from_pretrained(model)


def read_tokenizer(folder: ModelFolder) -> Tokenizer | None:
    """Reads the tokenizer of a model folder or a GGUF file. Returns None if there is no
    tokenizer."""
    if folder.gguf is None:
        return Tokenizer.from_folder(folder.path)
    return Tokenizer.from_gguf(folder.path, folder.gguf.metadata)


class Mistral(RequestMaker):
    """A model with its tokenizer, ready to generate.

    Attributes:
        config: the model's shape and constants.
        model: the transformer.
        tokenizer: the tokenizer. None: the folder has no tokenizer, so prompts must be lists of
            token ids.
        prefill_chunk: the most prompt tokens read in one pass over the weights. A larger chunk is
            faster and takes more memory. A number below 32 counts as 32, because other kernels
            compute smaller passes and round differently.
        max_batch: the most completions that are generated at once. On the CPU, up to 8 completions
            do not change each other's text. With more than 8, products may round differently.
        cache_tokens: the number of tokens that the cache has room for. These are the tokens of
            running completions, and tokens kept for later prompts. None:
            `engine.memory.default_slots` chooses the number by the free memory.
        sampling_defaults: fields of `SamplingParams`, for calls that do not give them.
        drafts: the most tokens to guess at a time, 0 to 7, for completions whose options do not set
            this number. One pass checks all guesses. It yields those before the first wrong guess,
            and one more token. On the CPU guesses do not change the text. None: 7 on the CPU or
            with a draft model, else 0.
        draft_model: a smaller model, which guesses tokens where the text does not repeat itself. It
            has the same vocabulary, and is on the same device. None: there is no such model.
        adapters: the loaded LoRA adapters. `load_adapter` adds an adapter.
        vocabulary: the model's configuration and folder, and its tokenizer if it has one.
    """

    def __init__(
        self,
        config: MistralConfig,
        model: Transformer,
        tokenizer: Tokenizer | None,
        folder: Path,
        prefill_chunk: int = 512,
        max_batch: int = DEFAULT_MAX_BATCH,
        cache_tokens: int | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        drafts: int | None = None,
        draft_model: Mistral | None = None,
    ) -> None:
        vocabulary = Vocabulary(config, tokenizer, folder)
        _expect_usable(vocabulary, prefill_chunk, max_batch, cache_tokens)
        _expect_drafts(vocabulary, model.device, drafts, draft_model)
        super().__init__(vocabulary, AdapterTable(model.adapters), sampling_defaults or {})
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.max_batch = max_batch
        self.cache_tokens = cache_tokens
        self.drafts = drafts
        self.draft_model = draft_model
        self._making_engine = threading.Lock()
        self._engine: Engine | None = None
        _models.add(self)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        prefill_chunk: int = 512,
        max_batch: int = DEFAULT_MAX_BATCH,
        progress: bool = True,
        quantize: str | None = None,
        cache_tokens: int | None = None,
        generation_config: str | Path | None = None,
        adapters: Mapping[str, str | Path | Adapter] | None = None,
        drafts: int | None = None,
        draft_model: str | Path | Mistral | None = None,
        **config_overrides: Any,
    ) -> Mistral:
        """Loads a model folder, in Hugging Face's or Mistral's format, a GGUF file, or a model of
        the hub.

        Weights are memory-mapped. On the CPU, weights that need no conversion are not copied, so
        processes share their memory.

        Args:
            model: a folder, a GGUF file, or a hub id such as "mistralai/Mistral-7B-v0.1" or
                "OWNER/NAME:FILE.gguf".
            device: "cpu", "cuda", "cuda:1" or a `torch.device`. A number: the CUDA device with this
                number. None: the CPU.
            dtype: float32, bfloat16 or float16. None: the dtype in which the weights are stored.
                For another dtype all weights are copied, except quantised weights.
            prefill_chunk, max_batch, cache_tokens, drafts: as in `Mistral`.
            progress: whether to show a progress bar if stderr is a terminal.
            quantize: "int8" or "int4" rounds the weights to 8 or 4 bits while they are read (see
                `mistral_ext.weights.quantize`). None: the weights stay as they are stored. To round
                them only once, write them to a folder with `quantize_checkpoint`.
            generation_config: the file with the defaults of sampling. "auto": the model's own
                ``generation_config.json``. A path: another folder or file. None: the defaults of
                `SamplingParams`.
            adapters: LoRA adapters to load, by name. Each is given as in `load_adapter`. None: no
                adapter is loaded.
            draft_model: a draft model (see `Mistral`), or the path or hub id of one. A path or id
                is loaded in its stored format. None: no draft model.
            config_overrides: fields of `MistralConfig`, e.g. sliding_window=None, rope_theta=1e6.
                They replace the values in the model's files.

        Raises:
            FileNotFoundError, ValueError, TypeError: a file, tensor or option is missing or wrong.
                The message names it.
        """
        device = find_device(device)
        folder = read_folder(resolve(model), **config_overrides)
        config, path = folder.config, folder.path
        defaults = _sampling_defaults(path, generation_config) if generation_config else None
        tokenizer = read_tokenizer(folder)
        # These checks come first, because reading the weights (14 GB) takes long.
        vocabulary = Vocabulary(config, tokenizer, path)
        _expect_usable(vocabulary, prefill_chunk, max_batch, cache_tokens)
        if isinstance(draft_model, str | Path):
            draft_model = cls.from_pretrained(draft_model, device, progress=progress)
        _expect_drafts(vocabulary, device, drafts, draft_model)
        read = {name: adapter_for(config, given) for name, given in (adapters or {}).items()}
        weights = load_weights(folder, dtype, progress, quantize, device)
        transformer = Transformer(config, weights)
        sizes = prefill_chunk, max_batch, cache_tokens
        llm = cls(config, transformer, tokenizer, path, *sizes, defaults, drafts, draft_model)
        llm.adapters.reserve(len(read))
        for name, adapter in read.items():
            llm.adapters.load(name, adapter, ())
        return llm

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # The engine has a thread's locks and the model's cache, which a copy cannot share.
        raise TypeError(
            "a Mistral cannot be pickled or copied, expected its path: load the model again with "
            f"Mistral.from_pretrained({str(self.vocabulary.folder)!r})"
        )

    @property
    def engine(self) -> Engine:
        """The engine, which completes the requests of all threads. It is made when it is first
        needed."""
        with self._making_engine:
            if self._engine is None:
                self._engine = Engine(
                    self.model,
                    self.vocabulary.sampled,
                    self.max_batch,
                    self.prefill_chunk,
                    self.cache_tokens,
                    self._holes,
                    self.drafts,
                    None if self.draft_model is None else self.draft_model.model,
                )
            return self._engine

    def load_adapter(self, path: str | Path | Adapter, name: str) -> None:
        """Loads a LoRA adapter. From then on, prompts can use the adapter by its name.

        The model's weights do not change, whatever their format. Running requests continue.

        Args:
            path: a folder or file of peft, a `lora.safetensors` of Mistral's, a GGUF file, the hub
                id of an adapter, or an adapter that `weights.adapters.read_adapter` has returned.
            name: a name that no other adapter has.

        Raises:
            FileNotFoundError, ValueError: the adapter is damaged, belongs to another model or needs
                an unsupported feature, or the name is taken.
        """
        self.adapters.expect_new(name)
        weights = adapter_for(self.config, path)
        self._change_adapters(lambda: self.adapters.load(name, weights, self._adapters_in_use()))

    def unload_adapter(self, name: str) -> None:
        """Removes an adapter. Requests that use the adapter continue to their end. Its memory is
        freed after them.

        Raises:
            ValueError: no adapter has that name.
        """
        self._change_adapters(lambda: self.adapters.unload(name, self._adapters_in_use()))

    def _change_adapters(self, change: Callable[[], None]) -> None:
        # Without an engine, no request uses an adapter, so the change happens here. The lock keeps
        # other threads from making an engine meanwhile. Such an engine would choose the size of its
        # cache without knowing how much memory the change takes.
        with self._making_engine:
            engine = self._engine
            if engine is None:
                change()
                return
        engine.between_steps(change)

    def _adapters_in_use(self) -> list[LoadedAdapter]:
        engine = self._engine
        return [] if engine is None else engine.adapters_in_use()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        special_tokens: bool = False,
        adapter: str | Sequence[str | None] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Completes prompts. Several prompts are completed together.

        Args:
            prompts: text, token ids, or a list of prompts. Text is tokenized with a
                beginning-of-text token. Token ids are used as they are.
            special_tokens: whether the name of a control token in a text, such as "[INST]", becomes
                this token. If False, it is tokenized as ordinary text.
            adapter: the name of a loaded adapter, or a list with a name or None for each prompt.
                None: the model is used without an adapter.
            sampling: fields of `SamplingParams`.

        Returns:
            The completions, n of them for each prompt, in the order of the prompts.

        Raises:
            ValueError, TypeError: the message names the prompt or option that is wrong.
            ImportError: an option sets a constraint, and llguidance is missing.
        """
        params = self._params(sampling)
        encoded = self._encode_all(prompts, special_tokens)
        given = [adapter] * len(encoded) if adapter is None or isinstance(adapter, str) else adapter
        if len(given) != len(encoded):
            raise ValueError(
                f"adapter has {len(given)} names, expected {len(encoded)} like prompts"
            )
        requests = [
            self.request(ids, params, index, adapter=name)
            for ids, name in zip(encoded, given, strict=True)
            for index in range(params.n)
        ]
        outputs = self.engine.outputs(requests)
        completions = {}
        for output in outputs:
            if output.error:
                outputs.close()
                raise output.error
            if output.completion:
                completions[output.request_id] = output.completion
        return [completions[request_id] for request_id in outputs.request_ids]

    def stream(
        self,
        prompt: Prompt,
        special_tokens: bool = False,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Stream:
        """Completes one prompt, and gives the new text piece by piece as it is generated.

        Args:
            prompt, special_tokens, adapter, sampling: as in `generate`, but for one prompt.

        Returns:
            An iterator over pieces of text. Its attribute `completion` is set at the end of the
            iteration.

        Raises:
            ValueError, TypeError, ImportError: as in `generate`. Also if the model has no
                tokenizer, there are several prompts, or n is not 1.
        """
        params = self._params_of_one(sampling)
        self.require_tokenizer()
        if not is_one(prompt):
            raise TypeError("prompt is a list of prompts, expected one: generate takes several")
        ids = self._encode_all(prompt, special_tokens)[0]
        request = self.request(ids, params, adapter=adapter)
        return Stream(self.engine.outputs([request]))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template: ChatTemplate | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        safe_prompt: bool = False,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Completion:
        """Replies to a conversation with an Instruct model.

        Args:
            messages: dicts with "role" ("system", "user", "assistant" or "tool") and "content". A
                message of the assistant may have "tool_calls", and a message of a tool has
                "tool_call_id", as in OpenAI's API.
            template: "v1", "v2" or "v3" of Mistral's chat templates. None: the model's own
                template.
            tools: functions that the model may call, in OpenAI's format. None: it may call no
                functions.
            tool_choice: whether the model must call a function, and which, as in OpenAI's API (see
                `choice` of `mistral_ext.text.tool_calls.ToolUse.of`).
            parallel_tool_calls: whether the reply may have several calls.
            safe_prompt: whether to begin with the system prompt
                `mistral_ext.text.guardrails.SAFE_PROMPT`.
            adapter: the name of a loaded adapter. None: the model is used without an adapter.
            sampling: fields of `SamplingParams`.

        Returns:
            The reply, a `Completion`. The functions that it calls are in its `tool_calls`.

        Raises:
            ValueError, TypeError: the model is a base model or takes no tools, the messages are not
                a conversation, or a tool or option is wrong.
            ImportError: tools are given or an option sets a constraint, and llguidance is missing.
        """
        params = self._params_of_one(sampling)
        form = self.tool_format(template) if tools else None
        use = ToolUse.of(form, tools, tool_choice, parallel_tool_calls)
        messages = with_safe_prompt(messages) if safe_prompt else messages
        ids = self.encode_chat(messages, use.tools if use else None, template)
        ids = self._check_ids(ids, "conversation")
        parser = ToolParser(use.form) if use else None
        request = self.request(ids, params, starts_text=True, tools=use, adapter=adapter)
        return Stream(self.engine.outputs([request]), parser).read()

    def start_chat(
        self,
        system: str | None = None,
        template: ChatTemplate | None = None,
        safe_prompt: bool = False,
        adapter: str | None = None,
    ) -> Chat:
        """Starts a conversation that keeps its cache between turns (see `Chat`).

        Args:
            system: the system prompt. None: there is no system prompt.
            template, safe_prompt, adapter: as in `chat`.

        Raises:
            ValueError: the model is a base model or has no tokenizer, or no adapter has the name.
        """
        self.adapters.find(adapter)
        messages: list[Mapping[str, Any]] = []
        if system:
            messages.append({"role": "system", "content": system})
        if safe_prompt:
            messages = with_safe_prompt(messages)

        def start_reply(ids: list[int], sampling: Mapping[str, Any]) -> Stream:
            request = self.request(
                self._check_ids(ids, "conversation"),
                self._params_of_one(sampling),
                starts_text=True,
                reuse_completions=True,
                adapter=adapter,
            )
            return Stream(self.engine.outputs([request]))

        return Chat(self.require_tokenizer(), self.chat_template(template), start_reply, messages)

    def moderate(
        self,
        content: str | Sequence[Mapping[str, Any]],
        template: ChatTemplate | None = None,
        adapter: str | None = None,
    ) -> Moderation:
        """Lets the model judge whether a text is acceptable (see `mistral_ext.text.guardrails`).

        Args:
            content: a text, or messages. Of several messages, the last one is judged.
            template, adapter: as in `chat`.

        Raises:
            ValueError: the model is a base model or has no tokenizer, the content is too long, no
                adapter has the name, or the model's logits are NaN.
            TypeError: the content of a message is no text, but for instance a list of parts.
        """
        request = self.moderation_request(content, template, adapter=adapter)
        for _, output in outputs_of(self.engine, [request]):
            if output.prompt_logits is not None and len(output.prompt_logits):
                moderation = self.moderation_of(output.prompt_logits[-1])
        return moderation

    def moderation_of(self, logits: Tensor) -> Moderation:
        """Reads the judgement from the logits [V] after the last token of a
        `moderation_request`. Raises ValueError if they are NaN."""
        _, following = label_ids(self.require_tokenizer())
        of_labels = logits[list(following.values())].tolist()
        return Moderation.of(dict(zip(following, of_labels, strict=True)))

    def logits(
        self,
        token_ids: Sequence[int] | Tensor,
        chunk: int | None = None,
        adapter: str | None = None,
    ) -> Tensor:
        """Returns the model's logits after each token of one sequence.

        Args:
            token_ids: [T] ints.
            chunk: the number of tokens read in one pass. None: all tokens are read in one pass.
            adapter: the name of a loaded adapter. None: the model is used without an adapter.

        Returns:
            [T, V] fp32. It is not an inference tensor, so it may be changed, or used in a loss.

        Raises:
            ValueError, TypeError: token_ids, chunk or adapter is wrong, or the model is an
                embedding model.
        """
        if isinstance(token_ids, Tensor):
            token_ids = token_ids.tolist()
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected 1 or more")
        self.expect_writer()
        ids = self._check_ids(token_ids, "token_ids", 0)
        request = Request(
            ids,
            None,
            len(ids),
            prompt_logits=True,
            chunk=chunk or len(ids),
            adapter=self.adapters.find(adapter),
        )
        with torch.inference_mode(False):
            size = len(ids), self.config.vocab_size
            logits = torch.empty(size, dtype=torch.float32, device=self.model.device)
        begin = 0
        for _, output in outputs_of(self.engine, [request]):
            if output.prompt_logits is not None:
                end = begin + len(output.prompt_logits)
                logits[begin:end] = output.prompt_logits
                begin = end
        return logits

    def embed(
        self,
        texts: str | Sequence[Prompt],
        instruction: str | None = None,
        pooling: str = "last",
        adapter: str | None = None,
    ) -> Tensor:
        """Computes embeddings of texts. Texts with similar meanings have embeddings that are close
        to each other.

        Args:
            texts: text, or a list of texts and of lists of token ids. Token ids are not changed.
            instruction: the purpose of a query, for models such as e5-mistral. Each text becomes
                "Instruct: INSTRUCTION\\nQuery: TEXT". None: texts are used as they are. Documents
                get no instruction.
            pooling: "last": the hidden state of the last token; an end token is appended to each
                text (not to token ids). "mean": the mean over the hidden states of all tokens.
            adapter: the name of a loaded adapter. None: the model is used without an adapter.

        Returns:
            [N, E] fp32, for N texts and hidden states of E values. Each embedding has length 1. It
            comes from the hidden states after the last norm.

        Raises:
            ValueError, TypeError: the message names the text or option that is wrong.
        """
        given = [texts] if isinstance(texts, str) else texts
        requests = self.embedding_requests(given, instruction, pooling, adapter=adapter)
        with torch.inference_mode(False):
            size = len(requests), self.config.dim
            pooled = torch.zeros(size, dtype=torch.float32, device=self.model.device)
        for number, output in outputs_of(self.engine, requests):
            if output.hidden is not None:
                pool(pooled[number], output.hidden, pooling)
        return torch.nn.functional.normalize(pooled, dim=1)


# All models of the process.
_models: weakref.WeakSet[Mistral] = weakref.WeakSet()


def _after_fork() -> None:
    """Makes the models usable in a child process that was forked.

    A child has none of its parent's other threads. So a lock that such a thread held stays locked
    for ever, and nobody waits for the thread's requests. If an engine was in use, the model makes a
    new engine in the child when it needs one. Otherwise it keeps the engine with its cache.
    """
    for llm in _models:
        llm._making_engine = threading.Lock()
        if llm._engine is not None and not llm._engine.is_idle():
            llm._engine = None
        if llm._grammars is not None:
            llm._grammars.forget_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _sampling_defaults(model: Path, source: str | Path) -> dict[str, Any]:
    file = generation_config_file(model, source)
    defaults = sampling_defaults(file)
    try:
        SamplingParams.from_options(defaults)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return defaults


def _expect_usable(
    vocabulary: Vocabulary, prefill_chunk: int, max_batch: int, cache_tokens: int | None
) -> None:
    sizes = {"prefill_chunk": prefill_chunk, "max_batch": max_batch}
    if cache_tokens is not None:
        sizes["cache_tokens"] = cache_tokens
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer, 1 or more")
    vocabulary.expect_own_tokenizer()


def _expect_drafts(
    vocabulary: Vocabulary, device: torch.device, drafts: int | None, draft_model: Mistral | None
) -> None:
    if drafts is not None:
        expect_drafts(drafts)
    if draft_model is None:
        return
    draft_model.expect_writer()
    if not is_same_device(draft_model.model.device, device):
        raise ValueError(
            f"draft_model is on {draft_model.model.device}, expected {device} like the model"
        )
    vocabulary.expect_drafts_from(draft_model.vocabulary)

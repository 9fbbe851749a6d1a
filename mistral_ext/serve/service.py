"""The state that all requests to a server share: the model, the queue, the metrics."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from mistral_ext.engine.request import Request
from mistral_ext.llm import Mistral
from mistral_ext.serve import errors
from mistral_ext.serve.engine_thread import EngineThread
from mistral_ext.serve.errors import ApiError, bad_request
from mistral_ext.serve.generation import Generation
from mistral_ext.serve.log import RequestLog
from mistral_ext.serve.metrics import Metrics
from mistral_ext.serve.protocol import (
    Job,
    compile_grammar,
    embedding_requests,
    encode,
    moderation_requests,
)
from mistral_ext.serve.settings import Settings
from mistral_ext.text.chat_template import ChatTemplate
from mistral_ext.text.jinja_template import JinjaTemplate
from mistral_ext.text.tokenizer import Tokenizer

_T = TypeVar("_T")

# When the server ends, clients have this time to receive the end of their answers.
_LAST_SECONDS = 5.0

# The chat template for a base model, which continues a text and has no turns. The template joins
# the messages.
_PLAIN = "{{ bos_token }} {{ messages | map(attribute='content') | join('\\n\\n') }}"


class Service:
    """Limits how many requests there are, prepares them for the engine and starts them.

    Methods are called in the event loop, except `_on_death`, which the engine's thread calls.

    Args:
        llm: the model, with a tokenizer.
        settings: the options.
        log: the log of requests.

    Attributes:
        llm, settings, tokenizer, engine, metrics, log: what all requests share.
        tool_format: how the model writes calls of tools. None: the model takes no tools.
        is_draining: whether new requests are refused.
    """

    def __init__(self, llm: Mistral, settings: Settings, log: RequestLog) -> None:
        self.llm = llm
        self.settings = settings
        self.tokenizer: Tokenizer = llm.require_tokenizer()
        self.engine = EngineThread(llm.engine, llm.model.device, self._on_death)
        self.metrics = Metrics(lambda: llm.engine.load)
        self.log = log
        self._template = _template(settings.template, llm)
        self.tool_format = llm.tool_format(self._template) if self._template else None
        self.is_draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._places = llm.max_batch + settings.max_queue
        self._taken = 0
        self._live: set[Generation] = set()
        self._idle = asyncio.Event()
        # This thread prepares texts and grammars. In the event loop such work would hold up all
        # requests. Adapters have a thread of their own, because a download may take minutes.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def start(self) -> None:
        """Starts to serve in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def stop(self) -> None:
        """Ends the engine's thread, after the caller has ended the requests (`end_all`)."""
        self.engine.stop()
        for executor in (self._tokenizing, self._loading):
            executor.shutdown(wait=False, cancel_futures=True)

    @property
    def status(self) -> str:
        """The state of the server: "ok", "ending" or "failed"."""
        if self.engine.is_dead:
            return "failed"
        return "ending" if self.is_draining else "ok"

    @contextmanager
    def places(self, count: int, param: str = "n") -> Iterator[None]:
        """Reserves places for `count` completions, which run or wait in the queue.

        Args:
            count: the number of completions.
            param: the field of the request that sets their number.

        Raises:
            ApiError: 503 if new requests are refused, 429 if there is no room now, 400 if `count`
                is more than all places.
        """
        if self.engine.is_dead:
            raise errors.out_of_order()
        if self.is_draining:
            raise errors.shutting_down()
        if count > self._places:
            text = f"{param} is {count} in all, expected at most {self._places}"
            raise bad_request(text, param)
        if self._taken + count > self._places:
            raise errors.too_busy()
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count
            if not self._taken:
                self._idle.set()

    def reading_places(self, count: int) -> AbstractContextManager[None]:
        """Reserves places for `count` prompts that are only read. `Call.read_prompts` reads them in
        batches, one after another, so they need no more places than one batch."""
        return self.places(min(count, self.llm.max_batch))

    @contextmanager
    def running(self, generation: Generation) -> Iterator[None]:
        """Starts completions. They are ended when the block ends, or when the time of their HTTP
        request is over."""
        assert self._loop
        self._live.add(generation)
        seconds = self.settings.request_seconds
        left = generation.began + seconds - time.perf_counter()
        timer = self._loop.call_later(max(0, left), generation.fail, errors.out_of_time(seconds))
        try:
            generation.start()
            yield
        finally:
            timer.cancel()
            self._live.discard(generation)
            generation.close()

    async def _prepare(self, work: Callable[..., _T], *args: Any, **options: Any) -> _T:
        """Calls `work` in the thread that prepares requests, and returns its result."""
        call = functools.partial(work, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, call)

    async def encode(
        self, prompt: Any, is_chat: bool, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Encodes a prompt to token ids (see `protocol.encode`)."""
        return await self._prepare(encode, self.llm, prompt, self._template, is_chat, tools)

    async def moderation_requests(self, *args: Any, **options: Any) -> list[Request]:
        """Makes requests to the engine with which the model judges contents (see
        `protocol.moderation_requests`)."""
        return await self._prepare(moderation_requests, self.llm, self._template, *args, **options)

    async def load_adapter(self, path: str, name: str) -> None:
        """Loads an adapter (see `Mistral.load_adapter`)."""
        await self._change_adapters(self.llm.load_adapter, path, name)

    async def unload_adapter(self, name: str) -> None:
        """Removes an adapter (see `Mistral.unload_adapter`)."""
        await self._change_adapters(self.llm.unload_adapter, name)

    async def _change_adapters(self, change: Callable[..., None], *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._loading, change, *args)

    async def embedding_requests(self, texts: Sequence[Any], *options: Any) -> list[Request]:
        """Makes requests to the engine for the hidden states of texts (see
        `protocol.embedding_requests`)."""
        return await self._prepare(embedding_requests, self.llm, texts, *options)

    async def compile(self, job: Job) -> None:
        """Compiles the grammar that a job's completions must match, if it has a constraint or tools
        (see `protocol.compile_grammar`)."""
        if job.structure or job.tools:
            await self._prepare(compile_grammar, self.llm, job)

    @property
    def models(self) -> list[str]:
        """The names that requests may ask for: the names of the model and of its adapters."""
        return [self.settings.model_name, *self.llm.adapters.names]

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request asks for as its model, or None if it asks for the model
        itself.

        Raises:
            ApiError: 404 if there is no such model.
        """
        models = self.models
        if model is not None and model not in models:
            text = f"model is {model!r:.200}, expected {' or '.join(map(repr, models))}"
            raise errors.no_model(text)
        return None if model in (None, models[0]) else model

    def expect_writer(self) -> None:
        """Raises ApiError if the model writes no text."""
        if not self.llm.config.writes_text:
            name = self.settings.model_name
            text = f"{name!r} is an embedding model, which writes no text: use /v1/embeddings"
            raise errors.bad_request(text, "model")

    async def drain(self) -> None:
        """Refuses new requests, and waits for the running requests. Ends the requests that still
        run after `Settings.drain_seconds`."""
        self.is_draining = True
        if not self._taken:
            return
        self._idle.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_seconds)
        except asyncio.TimeoutError:
            self.end_all(errors.shutting_down())
            # A client that does not read its error blocks its request for ever, so the wait has a
            # limit.
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), _LAST_SECONDS)

    def end_all(self, error: ApiError) -> None:
        """Ends all requests with an error."""
        for generation in list(self._live):
            generation.fail(error)

    def _on_death(self) -> None:
        assert self._loop
        self._loop.call_soon_threadsafe(self.end_all, errors.out_of_order())


def _template(name: str | None, llm: Mistral) -> ChatTemplate | None:
    """The chat template. `name` is as in `Settings.template`. Returns None if the model has no
    template; then every request with a conversation gets an error."""
    if name == "plain":
        return JinjaTemplate(Path("plain"), {"default": _PLAIN}, llm.require_tokenizer())
    with suppress(ValueError):
        return llm.chat_template(name)
    return None

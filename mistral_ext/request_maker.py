"""Makes requests to the engine from prompts, conversations and texts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from mistral_ext.engine.adapters import AdapterTable
from mistral_ext.engine.embedding import POOLINGS
from mistral_ext.engine.params import SamplingParams
from mistral_ext.engine.request import Request
from mistral_ext.model.config import MistralConfig
from mistral_ext.text.chat_template import ChatTemplate, chat_template_of, encode_chat, tool_format
from mistral_ext.text.grammar import Grammar, GrammarCompiler
from mistral_ext.text.guardrails import encode_question, label_ids
from mistral_ext.text.text_stream import TextStream
from mistral_ext.text.tokenizer import Tokenizer, expect_token_ids
from mistral_ext.text.tool_calls import ToolFormat, ToolUse
from mistral_ext.vocabulary import Vocabulary
from mistral_ext.weights.folder import is_instruct

Prompt = str | Sequence[int]


class RequestMaker:
    """Makes requests for a model: checks prompts and options, and encodes text.

    `llm.Mistral` inherits this class. `chat`, `moderate`, `moderation_of` and `embed`, to which
    comments here refer, are methods of it.

    Args:
        vocabulary: the model's configuration and folder, and its tokenizer if it has one.
        adapters: the loaded adapters.
        sampling_defaults: fields of `SamplingParams`, for calls that do not give them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        adapters: AdapterTable,
        sampling_defaults: Mapping[str, Any],
    ) -> None:
        self.vocabulary = vocabulary
        self.config: MistralConfig = vocabulary.config
        self.tokenizer: Tokenizer | None = vocabulary.tokenizer
        self.folder: Path = vocabulary.folder
        self.adapters = adapters
        self.sampling_defaults = dict(sampling_defaults)
        self._grammars = GrammarCompiler(self.tokenizer) if self.tokenizer else None

    def request(
        self,
        ids: list[int],
        params: SamplingParams,
        index: int = 0,
        starts_text: bool = False,
        reuse_completions: bool = False,
        salt: str | None = None,
        stop_token_ids: Sequence[int] = (),
        tools: ToolUse | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Makes a request to complete a prompt, for callers that step the engine themselves.

        Args:
            ids: the prompt, token ids of the model.
            params: the options.
            index: the number of this completion among the prompt's n completions, from 0 on.
            starts_text: whether the completion begins a text, as a reply does. If False, the
                completion continues the text of the prompt.
            reuse_completions, salt: as in `Request`.
            stop_token_ids: tokens that end the completion, besides the model's own end tokens.
            tools: the functions that the completion may call. None: it may call no functions.
            adapter: the name of a loaded adapter. None: the model is used without an adapter.

        Raises:
            ValueError: the model is an embedding model, the options need a tokenizer and there is
                none, or no adapter has the name. Also as in `grammar`.
            ImportError: as in `grammar`.
        """
        self.expect_writer()
        max_length = len(ids) + params.max_tokens
        text = None
        if self.tokenizer:
            text = TextStream(
                self.tokenizer,
                params.stop or (),
                strip_first_space=starts_text,
                divider=tools.divider if tools else None,
            )
        elif params.stop:
            self.require_tokenizer()
        return Request(
            ids,
            params,
            max_length=min(max_length, self.max_length or max_length),
            eos_ids=(*self._eos_ids, *stop_token_ids),
            index=index,
            text=text,
            reuse_completions=reuse_completions,
            salt=salt,
            grammar=self.grammar(params, starts_text, tools),
            adapter=self.adapters.find(adapter),
        )

    def grammar(
        self, params: SamplingParams, starts_text: bool = False, tools: ToolUse | None = None
    ) -> Grammar | None:
        """Compiles the constraint that the options and tools set. Returns None if there is no
        constraint. The latest grammars are kept, so that a repeated constraint need not be compiled
        again.

        Args:
            params, starts_text, tools: as in `request`.

        Raises:
            ValueError: the constraint does not compile, nothing matches it, or the model has no
                tokenizer.
            ImportError: llguidance is missing.
        """
        constraint = tools.constraint(params.constraint) if tools else params.constraint
        if constraint is None:
            return None
        self.require_tokenizer()
        assert self._grammars is not None
        return self._grammars.compile(constraint, starts_text)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: ChatTemplate | None = None,
    ) -> list[int]:
        """Encodes a conversation to the token ids of the prompt that `chat` uses.

        Args:
            messages: the messages, as in `chat`.
            tools: the functions that the model may call, in OpenAI's format.
            template: the chat template, as in `chat`.
        """
        return encode_chat(self.require_tokenizer(), messages, self.chat_template(template), tools)

    def tool_format(self, template: ChatTemplate | None = None) -> ToolFormat | None:
        """Returns how the model writes tool calls, or None if the model takes no tools.

        Args:
            template: the chat template, as in `chat`.
        """
        return tool_format(self.require_tokenizer(), self.chat_template(template))

    def moderation_request(
        self,
        content: str | Sequence[Mapping[str, Any]],
        template: ChatTemplate | None = None,
        salt: str | None = None,
        room: int | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Makes the request to the engine for `moderate`. One of its outputs has `prompt_logits`,
        whose last row `moderation_of` reads.

        Args:
            content, template, adapter: as in `moderate`.
            salt: as in `Request`.
            room: the most tokens of the request. If the content does not fit, only its end is
                judged. None: a content that is too long for the model raises an error.

        Raises:
            ValueError: as in `moderate`.
        """
        self.expect_writer()
        tokenizer = self.require_tokenizer()
        begin, _ = label_ids(tokenizer)
        encode = functools.partial(self.encode_chat, template=template)
        room = None if room is None else room - len(begin)
        ids = self._check_ids(encode_question(content, encode, tokenizer, room) + begin, "content")
        return Request(
            ids,
            None,
            len(ids),
            prompt_logits=True,
            logits_from=len(ids) - 1,
            salt=salt,
            adapter=self.adapters.find(adapter),
        )

    def embedding_requests(
        self,
        texts: Sequence[Prompt],
        instruction: str | None = None,
        pooling: str = "last",
        salt: str | None = None,
        adapter: str | None = None,
    ) -> list[Request]:
        """Makes a request to the engine for each text of `embed`. `Request` explains `salt`, and
        `embed` the other arguments and the errors."""
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}, expected {' or '.join(POOLINGS)}")
        tokenizer = self.require_tokenizer()
        requests = []
        for i, text in enumerate(texts):
            if text == "":
                raise ValueError(f"texts[{i}] is empty, expected some text")
            if isinstance(text, str):
                asked = text if instruction is None else f"Instruct: {instruction}\nQuery: {text}"
                text = tokenizer.encode(asked) + [tokenizer.eos_id] * (pooling == "last")
            ids = self._check_ids(text, f"texts[{i}]", 0)
            request = Request(
                ids,
                None,
                len(ids),
                hidden=True,
                logits_from=len(ids) - 1 if pooling == "last" else 0,
                salt=salt,
                adapter=self.adapters.find(adapter),
            )
            requests.append(request)
        return requests

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises ValueError if the folder has none."""
        if self.tokenizer is None:
            raise ValueError(
                f"{self.folder} has no tokenizer (tokenizer.model or tokenizer.json): "
                "text is not possible, use token ids with Mistral.generate"
            )
        return self.tokenizer

    def chat_template(self, template: ChatTemplate | None = None) -> ChatTemplate:
        """Returns `template`, or if it is None the model's own chat template. Raises ValueError if
        the model is a base model, which has no template."""
        if template:
            return template
        tokenizer = self.require_tokenizer()
        return chat_template_of(self.folder, tokenizer, is_instruct(self.folder))

    def expect_writer(self) -> None:
        """Checks that the model writes text.

        Raises:
            ValueError: the model is an embedding model, whose checkpoint has no output matrix.
        """
        if not self.config.writes_text:
            raise ValueError(
                f"{self.folder} is an embedding model (MistralModel), which does not write text: "
                "use Mistral.embed"
            )

    @property
    def max_length(self) -> int | None:
        """The most tokens that a prompt and its completion may have together, or None if there is
        no limit.

        A model with a sliding window sees a fixed number of tokens at any position, so it has no
        limit. A model without a window is limited to the positions that it was trained for.
        """
        return None if self.config.sliding_window else self.config.max_positions

    def _encode_all(
        self, prompts: Prompt | Sequence[Prompt], special_tokens: bool
    ) -> list[list[int]]:
        if not isinstance(prompts, Sequence):
            raise TypeError(
                f"prompts is {prompts!r:.60}, expected text, token ids, or a list of those"
            )
        encoded = []
        several = not is_one(prompts)
        given: Sequence[Any] = prompts if several else [prompts]  # the loop checks each prompt
        for i, prompt in enumerate(given):
            name = f"prompts[{i}]" if several else "prompt"
            if isinstance(prompt, str):
                if not prompt:
                    raise ValueError(f"{name} is empty, expected some text")
                prompt = self.require_tokenizer().encode(prompt, special_tokens=special_tokens)
            encoded.append(self._check_ids(prompt, name))
        return encoded

    def _check_ids(self, ids: Sequence[int], name: str, following: int = 1) -> list[int]:
        """Checks token ids of the model, after which it must have room for `following` tokens: for
        a completion, or for nothing if the ids are only read. Returns them as a list."""
        expect_token_ids(ids, self.config.vocab_size, name)
        if self.max_length is not None and len(ids) + following > self.max_length:
            most = f"{'fewer than' if following else 'up to'} {self.max_length}"
            raise ValueError(
                f"{name} has {len(ids)} tokens, expected {most}, the positions that the model was "
                "trained for (max_positions)"
            )
        return list(ids)

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams.from_options({**self.sampling_defaults, **sampling})

    def _params_of_one(self, sampling: Mapping[str, Any]) -> SamplingParams:
        params = self._params(sampling)
        if params.n != 1:
            raise ValueError(f"n is {params.n}, expected 1: generate makes several completions")
        return params

    # The ids that no token has, and that the engine must not sample.
    @property
    def _holes(self) -> list[int]:
        holes = self.tokenizer.holes if self.tokenizer else ()
        return [token_id for token_id in holes if token_id < self.vocabulary.sampled]

    @property
    def _eos_ids(self) -> tuple[int, ...]:
        # A fine-tuned model may end its turns with a token that the tokenizer's files name, but not
        # its configuration. So the tokenizer's end token also ends a completion.
        eos_ids = self.config.eos_ids
        return (*eos_ids, self.tokenizer.eos_id) if self.tokenizer else eos_ids


def is_one(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether `prompt` is a single prompt (text or token ids), not a list of prompts."""
    return isinstance(prompt, str) or (
        isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Integral)
    )

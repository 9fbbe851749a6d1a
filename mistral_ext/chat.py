"""Conversations that keep their cache between turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mistral_ext.engine.request import Completion
from mistral_ext.engine.stream import Stream
from mistral_ext.text.chat_template import ChatTemplate, encode_chat, extend_chat
from mistral_ext.text.tokenizer import Tokenizer

__all__ = ["Chat", "encode_chat"]  # programs of users import encode_chat from here


class Chat:
    """A conversation with an Instruct model.

    The engine keeps the conversation's tokens in its cache. So in each turn the model reads little
    more than the new message, unless other requests have needed the memory. Any thread may use a
    Chat. A new turn ends a reply that is still being written. `Mistral.start_chat` makes a Chat.

    Args:
        tokenizer, template: the tokenizer and the chat template of the model.
        start_reply: a function that starts a reply to a conversation. It takes the tokens of the
            conversation and fields of `SamplingParams`.
        messages: the conversation so far.

    Attributes:
        messages: the conversation so far, as in `Mistral.chat`.
        ids: the tokens of the conversation up to the last reply that has ended. They are those that
            the model read and wrote, which the cache may hold. The tokenizer might split the text
            of a reply into other tokens.
        prompt_ids: the tokens of the prompt that the last reply answers.
        completion: the last reply. None: there is no reply yet, or the last reply has not been read
            to its end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        start_reply: Callable[[list[int], Mapping[str, Any]], Stream],
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.messages = list(messages)
        self.completion: Completion | None = None
        self.ids: list[int] = []
        self.prompt_ids: list[int] = []
        self._tokenizer = tokenizer
        self._template = template
        self._start_reply = start_reply
        self._reply: Reply | None = None
        self._lock = threading.RLock()

    def send(self, text: str, **sampling: Any) -> Reply:
        """Sends a message and streams the reply.

        If a reply is interrupted (by `close`, Ctrl-C or the next turn), the text written so far
        stays in the conversation. A turn whose reply has no text is dropped, because templates have
        no empty replies.

        Args:
            text: the user's message.
            sampling: fields of `SamplingParams`.

        Returns:
            An iterator over pieces of the reply's text.

        Raises:
            ValueError, TypeError: an option is wrong, or the conversation is too long.
        """
        with self._lock:
            if self._reply:
                self._reply.close()
            messages = [*self.messages, {"role": "user", "content": text}]
            ids = extend_chat(self._tokenizer, messages, self.ids, self._template)
            stream = self._start_reply(ids, sampling)
            self.messages, self.prompt_ids = messages, ids
            self.completion = None
            self._reply = Reply(self, stream)
            return self._reply


class Reply(Iterator[str]):
    """An iterator over pieces of a reply's text. It gives each piece when the model has written
    it."""

    def __init__(self, chat: Chat, stream: Stream) -> None:
        self._chat = chat
        self._stream = stream
        self._is_open = True
        self._text = ""

    def __next__(self) -> str:
        with self._chat._lock:
            if not self._is_open:
                raise StopIteration
            try:
                piece = next(self._stream)
            except StopIteration:
                self._chat.completion = self._stream.completion
                self.close()
                raise
            except BaseException:
                self.close()
                raise
            self._text += piece
            return piece

    def close(self) -> None:
        """Aborts the reply, if it has not ended. The text so far stays in the conversation. Without
        any text, the turn is dropped."""
        with self._chat._lock:
            if not self._is_open:
                return
            self._is_open = False
            self._stream.close()
            chat = self._chat
            if self._text:
                chat.ids = chat.prompt_ids + self._stream.token_ids
                chat.messages.append({"role": "assistant", "content": self._text})
            else:
                chat.messages.pop()

"""Reads training data: JSON lines with texts or conversations, which are checked and encoded.

A line is an object with "text", or with "messages" and perhaps "tools":

    {"text": "Once upon a time ..."}
    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}

A text is trained on as a whole, and the end-of-text token is appended to it. In a conversation only
the assistant's messages are trained on, each after the prompt that `Mistral.chat` would make for
it. An assistant's message may have a "weight", the factor of its loss: a number from 1e-6 to 1e6,
or 0 if the message is only read. Without a "weight" the factor is 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistral_ext.files import decode_text, refuse_lfs_pointer
from mistral_ext.llm import Mistral
from mistral_ext.text.chat_template import ChatTemplate
from mistral_ext.text.reply import encode_reply


class Sample(NamedTuple):
    """A sequence of tokens for training. They do not see the tokens of other samples."""

    ids: Tensor  # [n] int32, n >= 2
    # [n] float32, the factor of each token's loss. 0: the token is only read. The first is 0,
    # because the model predicts a token from those before it.
    weights: Tensor

    @property
    def prompt(self) -> list[int]:
        """The ids before the first token with a loss. At an evaluation the trainer lets the model
        write what follows them."""
        first = int(self.weights.nonzero()[0])
        return [int(token_id) for token_id in self.ids[:first]]


def read_samples(
    path: str | Path, llm: Mistral, most_tokens: int, template: ChatTemplate | None = None
) -> list[Sample]:
    """Reads a file of JSON lines. Empty lines are skipped.

    Args:
        path: the file, UTF-8.
        llm: the model to train. Its tokenizer is used.
        most_tokens: the most tokens that a sample may have.
        template: how conversations are written. None: in the model's own chat template.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is wrong, there are no samples, or the file is a pointer of git-lfs. If a
            line is wrong, the message begins with the file and the number of the line.
    """
    path = Path(path)
    refuse_lfs_pointer(path)
    reader = _Reader(llm, most_tokens, template)
    samples: list[Sample] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        text = decode_text(line, place)
        try:
            samples += reader.samples(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from error
    if not samples:
        raise ValueError(f"{path} has no samples, expected a JSON object a line")
    return samples


def digest(samples: Sequence[Sample]) -> str:
    """A hash of the tokens and weights of samples."""
    hashed = hashlib.sha256()
    for sample in samples:
        hashed.update(len(sample.ids).to_bytes(8, "little"))
        hashed.update(sample.ids.numpy().tobytes())
        hashed.update(sample.weights.numpy().tobytes())
    return hashed.hexdigest()


class _Reader:
    """Turns the objects of a file into samples."""

    def __init__(self, llm: Mistral, most_tokens: int, template: ChatTemplate | None) -> None:
        self._llm = llm
        self._tokenizer = llm.require_tokenizer()
        self._ends = {*llm.config.eos_ids, self._tokenizer.eos_id}
        self._template = template
        limit = llm.max_length
        self._limits = {"tokens_per_pass": most_tokens}
        if limit is not None:
            self._limits["max_positions"] = limit

    def samples(self, values: Any) -> Iterator[Sample]:
        if not isinstance(values, dict) or ("text" in values) == ("messages" in values):
            shown = f"keys {list(values)}" if isinstance(values, dict) else repr(values)
            raise ValueError(f"the line has {shown:.80}, expected an object with text or messages")
        known = {"text"} if "text" in values else {"messages", "tools"}
        if unknown := values.keys() - known:
            raise ValueError(
                f"the line has the key {min(unknown)!r}, expected {' and '.join(sorted(known))}"
            )
        if "text" in values:
            yield self._of_text(values["text"])
        else:
            yield from self._of_messages(values["messages"], values.get("tools"))

    def _of_text(self, text: Any) -> Sample:
        if not isinstance(text, str) or not text:
            raise ValueError(f"text is {text!r:.60}, expected some text")
        ids = [*self._tokenizer.encode(text), self._tokenizer.eos_id]
        return self._sample(ids, [1.0] * len(ids))

    def _of_messages(self, messages: Any, tools: Any) -> Iterator[Sample]:
        """Yields the samples of a conversation: a single one if possible. But a template may write
        earlier turns in another way when more turns follow. (It may, for instance, move the system
        prompt to the last turn.) Where it does, a new sample begins."""
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise TypeError(f"messages is {messages!r:.60}, expected a list of objects")
        factors = [_weight(message, f"messages[{i}]") for i, message in enumerate(messages)]
        if not any(factors):
            raise ValueError("messages has no reply to train on, expected one of the assistant's")
        plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        ids: list[int] = []
        weights: list[float] = []
        for i, factor in enumerate(factors):
            if not factor:
                continue
            prompt, reply = self._turn(plain[: i + 1], tools)
            if ids and ids != prompt[: len(ids)]:
                yield self._sample(ids, weights)
                ids, weights = [], []
            weights += [0.0] * (len(prompt) - len(ids)) + [factor] * len(reply)
            ids = prompt + reply
        yield self._sample(ids, weights)

    def _turn(
        self, messages: Sequence[Mapping[str, Any]], tools: Any
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of a prompt, and the ids of the reply up to the token that ends it."""
        self._template = self._llm.chat_template(self._template)
        prompt, reply = encode_reply(self._tokenizer, messages, self._template, tools)
        for i, token_id in enumerate(reply):
            if token_id in self._ends:
                return prompt, reply[: i + 1]
        raise ValueError(
            f"the chat template {self._template} writes none of the tokens that end a text "
            f"({', '.join(map(str, sorted(self._ends)))}) after a reply, expected one: the model "
            "would learn never to stop"
        )

    def _sample(self, ids: Sequence[int], weights: Sequence[float]) -> Sample:
        for name, limit in self._limits.items():
            if len(ids) > limit:
                raise ValueError(
                    f"the sample has {len(ids)} tokens, expected up to {limit} ({name})"
                )
        if not any(weights[1:]):
            raise ValueError("the sample has no token to train on, expected one after the first")
        return Sample(
            torch.tensor(ids, dtype=torch.int32, device="cpu"),
            torch.tensor([0.0, *weights[1:]], dtype=torch.float32, device="cpu"),
        )


def _weight(message: Mapping[str, Any], name: str) -> float:
    """The factor of the loss of a message's tokens: its "weight", or else 1 for the assistant's
    messages and 0 for others. Raises ValueError if the "weight" is wrong."""
    is_reply = message.get("role") == "assistant"
    if "weight" not in message:
        return float(is_reply)
    weight = message["weight"]
    if not is_reply:
        raise ValueError(f"{name} has a weight, expected none: only the assistant's messages train")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    # Smaller or larger weights could become 0 or infinite in float32, or outweigh all other samples
    # of a step.
    if not is_number or not (weight == 0 or 1e-6 <= weight <= 1e6):
        raise ValueError(
            f"{name} has weight {weight!r:.60}, expected 0, or a number from 1e-6 to 1e6"
        )
    return float(weight)

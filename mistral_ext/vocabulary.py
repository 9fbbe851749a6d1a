"""Checks whether the vocabularies of a model, its tokenizer and its draft model belong together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mistral_ext.model.config import MistralConfig
from mistral_ext.text.tokenizer import Tokenizer


class Vocabulary(NamedTuple):
    """The vocabulary of a model.

    Attributes:
        config: the configuration of the model.
        tokenizer: the tokenizer of the model. None: the model has no tokenizer.
        folder: the folder or file of the model, for error messages.
    """

    config: MistralConfig
    tokenizer: Tokenizer | None
    folder: Path

    @property
    def sampled(self) -> int:
        """The ids below this number may be sampled, except the tokenizer's `holes` (ids that no
        token has).

        Each of them has a row in the model's output matrix and, if there is a tokenizer, a token. A
        model may have more rows than the tokenizer has tokens (padding), or fewer (if a padding
        token was added without a row).
        """
        size = self.config.vocab_size
        return min(self.tokenizer.vocab_size, size) if self.tokenizer else size

    def expect_own_tokenizer(self) -> None:
        """Raises ValueError if the tokenizer, without added tokens, has more tokens than the model,
        or if it lacks a token that ends a text. Then it belongs to another model, or a file is
        missing."""
        if self.tokenizer is None:
            return
        if self.tokenizer.base_size > self.config.vocab_size:
            raise ValueError(
                f"{self.tokenizer.path} has {self.tokenizer.base_size} tokens, but the model in "
                f"{self.folder} only {self.config.vocab_size}: they do not belong together"
            )
        for token_id in self.config.eos_ids:
            if not self.tokenizer.known(token_id):
                raise ValueError(
                    f"{self.folder}: the end of text is token id {token_id}, but the tokenizer has "
                    "no such token, and a text would never end: are added_tokens.json, "
                    "tokenizer_config.json or tokenizer.json missing?"
                )

    def expect_drafts_from(self, draft: Vocabulary) -> None:
        """Raises ValueError unless every id that may be sampled has the same token in the draft
        model. If one of the models has no tokenizer, only the sizes of the vocabularies are
        compared."""
        given, count = f"draft_model is {draft.folder}, whose", self.sampled
        if draft.config.vocab_size < count:
            raise ValueError(
                f"{given} vocabulary has {draft.config.vocab_size} tokens, expected the {count} "
                f"of {self.folder}"
            )
        if self.tokenizer is None or draft.tokenizer is None:
            return
        different = self.tokenizer.first_difference(draft.tokenizer, count)
        if different is not None:
            found, expected = (_shown(t, different) for t in (draft.tokenizer, self.tokenizer))
            raise ValueError(
                f"{given} token {different} is {found}, expected {expected} as in {self.folder}"
            )


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as an error message shows it: the name of a control token, the bytes of any other
    token, or "missing" if the tokenizer has no such token."""
    if not tokenizer.known(token_id):
        return "missing"
    names = {control_id: name for name, control_id in tokenizer.control_ids.items()}
    return names.get(token_id) or repr(tokenizer.token_bytes(token_id))

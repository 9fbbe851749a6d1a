"""Says which tokens may come next in a completion with a constraint.

`GrammarCompiler` makes a `Grammar` from a `Constraint` for a tokenizer, with the library llguidance
(extra `[structure]`). A `Matcher` follows one completion. A constraint that cannot be compiled
raises an error, so that no completion is made without its constraint.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from mistral_ext.text.constraint import Constraint, guided
from mistral_ext.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from numpy.typing import NDArray

# The limits of llguidance's work. A grammar that needs more is refused. With these limits a
# compilation takes about a second at most, and a step some tens of milliseconds.
_LIMITS: dict[str, Any] = {
    "max_grammar_size": 20_000,
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
}

_CACHED = 32  # the most grammars that a compiler keeps

_NO_TEXT = "no text matches it"


class GrammarCompiler:
    """Compiles grammars for a tokenizer, and keeps the grammars that were used last. Any thread may
    call the methods."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # guards the attributes below
        self._vocabulary: LLTokenizer | None = None  # made when it is first needed
        self._kept: OrderedDict[tuple[Constraint, bool], Grammar] = OrderedDict()

    def compile(self, constraint: Constraint, starts_text: bool = False) -> Grammar:
        """Compiles the grammar of a constraint, or returns the kept grammar.

        Args:
            constraint: the rule that completions must match.
            starts_text: whether completions begin a text. If False, they continue a text. If the
                tokenizer puts a space before a text, a completion that begins one has a space
                before what must match. With a schema this argument has no effect: a space may
                always come first, because models like to begin with one and JSON ignores it.

        Raises:
            ValueError: the constraint does not compile, or nothing matches it.
            ImportError: llguidance is missing.
        """
        key = constraint, starts_text and self._tokenizer.adds_first_space
        with self._lock:
            grammar = self._kept.pop(key, None)
            if grammar is None or grammar.is_spent:
                if self._vocabulary is None:
                    self._vocabulary = self._make_vocabulary()
                grammar = Grammar(self._vocabulary, *key)
            self._kept[key] = grammar
            if len(self._kept) > _CACHED:
                self._kept.popitem(last=False)
        return grammar

    def forget_threads(self) -> None:
        """Makes the compiler usable in a child process that was forked. A thread that held the lock
        does not exist there, and would not release it."""
        self._lock = threading.Lock()

    def _make_vocabulary(self) -> LLTokenizer:
        if find_spec("llguidance") is None:
            raise ImportError(
                "schema, regex, grammar and tools need llguidance: "
                "pip install 'mistral_ext[structure]'"
            )
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary(self._tokenizer)
        return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=len(vocabulary.tokens))


class _Vocabulary:
    """A tokenizer in the form that llguidance uses."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {token_id: name.encode() for name, token_id in tokenizer.control_ids.items()}
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [
            names.get(i) or tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)
        ]
        self.special_token_ids = sorted({*names, tokenizer.eos_id})
        self._tokenizer = tokenizer
        # llguidance encodes texts that continue a completion, so no space may be put before them.
        # Encoding puts the space before this character instead. `__call__` removes the tokens of
        # both.
        self._before = "\N{WHITE SMILING FACE}" if tokenizer.adds_first_space else ""
        self._count = len(self._encode(""))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(self._before + text, bos=False)

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode()
        return self._encode(text)[self._count :]


class Grammar:
    """A constraint, compiled for a tokenizer.

    Args:
        vocabulary: the tokenizer's vocabulary in llguidance's form.
        constraint: what completions have to match.
        is_spaced: whether a space must come before the text that matches. With a schema a space is
            always optional.

    Attributes:
        is_spent: whether llguidance's automaton of this grammar, which grows with use, has reached
            its limits. If so, replace the grammar by the result of `anew`.

    Raises:
        ValueError: the constraint does not compile, or nothing matches it.
    """

    def __init__(self, vocabulary: LLTokenizer, constraint: Constraint, is_spaced: bool) -> None:
        from llguidance import LLMatcher

        self.is_spent = False
        self._given = vocabulary, constraint, is_spaced
        self._vocabulary = vocabulary
        self._name = constraint.kind
        try:
            source = _source(constraint, is_spaced)
        except ValueError as error:
            raise self._problem(str(error)) from error
        self._bytes = _single_bytes(vocabulary)
        self._prototype = LLMatcher(vocabulary, source, log_level=0, limits=_limits())
        if self._prototype.is_error():
            raise self._problem(self._prototype.get_error())
        self._first = self.allowed(self._prototype)
        if constraint.kind != "tools" and (constraint.kind == "schema" or is_spaced):
            # A space may come first even if no text matches. So what may follow the space is
            # checked, too.
            behind = self._prototype.deep_copy()
            behind.consume_tokens(vocabulary.greedy_tokenize(" "))
            self.allowed(behind)

    def anew(self) -> Grammar:
        """Returns a copy of this grammar that is compiled again, so its automaton has not grown."""
        return Grammar(*self._given)

    def state(self, token_ids: list[int]) -> LLMatcher:
        """A matcher of llguidance in the state after these tokens of a completion."""
        state = self._prototype.deep_copy()
        state.consume_tokens(token_ids)
        return state

    def matcher(self, end_ids: Sequence[int] = (), may_end: bool = True) -> Matcher:
        """A matcher for a new completion. The arguments are as in `Matcher`."""
        return Matcher(self, self.state([]), self._first, end_ids, may_end)

    def allowed(self, matcher: LLMatcher) -> NDArray[np.bool_]:
        """The tokens that may come next in a state, except the vocabulary's end-of-text token.

        Raises:
            ValueError: the grammar takes too much work, or no token may come next although the text
                is not complete.
        """
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        # After an error the mask allows the end of the text and nothing else. A complete text can
        # have the same mask, so only is_error() tells them apart.
        if matcher.is_error():
            reason = matcher.get_error()
            if "NoExtension" in reason:
                raise self._problem(_NO_TEXT)
            self.is_spent = True
            raise self._problem(reason)
        size = self._vocabulary.vocab_size
        allowed = np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)
        allowed[self._vocabulary.eos_token] = False
        if not (allowed.any() or matcher.is_accepting()):
            raise self._problem(_NO_TEXT)
        return allowed

    def bytes_in(self, allowed: NDArray[np.bool_]) -> int:
        """A number for the set of ASCII characters that may come next (as tokens of their own).
        States with the same set have the same number, by which engine/state_guesses.py recognises
        a state that came before."""
        return hash(allowed[self._bytes].tobytes())

    def _problem(self, reason: str) -> ValueError:
        words = " ".join(reason.replace("<non-verbose/>", "").split())
        return ValueError(f"{self._name} cannot be used: {words:.300}")


class Matcher:
    """Follows one completion, and says which tokens may come next.

    Args:
        grammar: the rule that the completion must match.
        state: llguidance's matcher, before the first token.
        first: the tokens that may come first, a result of `Grammar.allowed`.
        end_ids: tokens that end the completion.
        may_end: whether end tokens may be chosen. If not, the completion continues as long as the
            grammar allows.

    Attributes:
        allowed: [V], whether each id of the tokenizer may come next. End tokens may come if the
            text is complete and `may_end` is True.
        is_finished: whether the text is complete, and nothing else can follow.
        states: the numbers of `Grammar.bytes_in` for the states before each token so far, and for
            the current state.
    """

    def __init__(
        self,
        grammar: Grammar,
        state: LLMatcher,
        first: NDArray[np.bool_],
        end_ids: Sequence[int],
        may_end: bool,
    ) -> None:
        self._grammar = grammar
        self._state = state
        self._end_ids = [i for i in end_ids if i < len(first)]
        self._may_end = may_end
        self.is_finished = False
        self.states: list[int] = []
        self._token_ids: list[int] = []
        self._ahead: Ahead | None = None
        self._update(first.copy())

    @property
    def is_accepting(self) -> bool:
        """Whether the text so far is complete."""
        return self._state.is_accepting()

    def consume(self, token_id: int) -> None:
        """Takes the next token.

        Raises:
            ValueError: the token may not come here, nothing may follow it although the text is not
                complete, or finding out what may follow takes too much work.
        """
        if not self.allowed[token_id]:
            raise ValueError(f"token {token_id} does not match what a completion has to match")
        self._state.consume_token(token_id)  # errors are left to _next() below
        self._token_ids.append(token_id)
        known = self._ahead.known(token_id) if self._ahead else None
        if known is None or self._state.is_error():
            known = self._next()
        self._update(known)

    def ahead(self) -> Ahead:
        """Returns an object that follows guesses of the next tokens. This matcher does not
        change."""
        # The state is copied, because a guess that takes too much work makes its state unusable.
        self._ahead = Ahead(self._grammar, self._state.deep_copy())
        return self._ahead

    def _next(self) -> NDArray[np.bool_]:
        """`Grammar.allowed` of this state.

        Other completions and guesses use the same automaton, and it grows with use. If it has grown
        too large, this completion gets a new automaton.
        """
        try:
            return self._grammar.allowed(self._state)
        except ValueError:
            if not self._grammar.is_spent:
                raise
        self._grammar = self._grammar.anew()
        self._state = self._grammar.state(self._token_ids)
        return self._grammar.allowed(self._state)

    def _update(self, allowed: NDArray[np.bool_]) -> None:
        self.states.append(self._grammar.bytes_in(allowed))
        allowed[self._end_ids] = False
        is_whole = self.is_accepting
        self.is_finished = is_whole and not allowed.any()
        allowed[self._end_ids] = is_whole and self._may_end
        self.allowed = allowed


class Ahead:
    """Follows guesses of the next tokens of a completion.

    Args:
        grammar: the rule that the completion must match.
        state: llguidance's matcher, before the first guess. It is changed.
    """

    def __init__(self, grammar: Grammar, state: LLMatcher) -> None:
        self._grammar = grammar
        self._state = state
        self._guessed: deque[tuple[int, NDArray[np.bool_]]] = deque()

    def forced(self) -> list[int]:
        """The tokens of the text that must come next, if the grammar leaves no choice. A completion
        may also write this text in other tokens."""
        return self._state.compute_ff_tokens()

    def may_take(self, token_id: int) -> bool:
        """Whether a token may come next. If the text is complete, this includes end tokens."""
        return self._state.validate_tokens([token_id]) == 1

    def take(self, token_id: int) -> int | None:
        """Takes a guess that may come next.

        Returns:
            The number of `Grammar.bytes_in` for the state after the guess. None: the text is not
            complete and nothing may follow, or finding out what may follow takes too much work.
        """
        self._state.consume_token(token_id)
        try:
            allowed = self._grammar.allowed(self._state)
        except ValueError:
            return None
        self._guessed.append((token_id, allowed))
        return self._grammar.bytes_in(allowed)

    def known(self, token_id: int) -> NDArray[np.bool_] | None:
        """Takes the completion's next token. If this token was guessed, and all guesses before it
        were right, returns the result of `Grammar.allowed` after it, which `take` has computed.
        Otherwise forgets all guesses and returns None."""
        if self._guessed and self._guessed[0][0] == token_id:
            return self._guessed.popleft()[1]
        self._guessed.clear()
        return None


def _single_bytes(vocabulary: LLTokenizer) -> NDArray[np.intp]:
    """The tokens of single ASCII characters, if the vocabulary has them."""
    spelled = (vocabulary.greedy_tokenize(chr(byte)) for byte in range(128))
    return np.array([tokens[0] for tokens in spelled if len(tokens) == 1], dtype=np.intp)


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False, **_LIMITS)


def _source(constraint: Constraint, is_spaced: bool) -> str:
    """Writes a constraint in llguidance's own format."""
    if constraint.kind != "tools":
        return json.dumps({"grammars": _grammars(constraint, is_spaced)})
    grammars: list[dict[str, Any]] = [{"lark_grammar": constraint.text}]
    if constraint.content:
        first, body = _grammars(constraint.content, is_spaced)
        grammars += [{**first, "name": "content"}, body]
    return json.dumps({"grammars": grammars})


def _grammars(constraint: Constraint, is_spaced: bool) -> list[dict[str, Any]]:
    """Makes two grammars. The second one, "body", is for the text that matches the constraint. The
    first one is for the whole completion, in which a space may or must come before the body."""
    from llguidance import LLMatcher

    body: dict[str, Any] = {"name": "body"}
    if constraint.kind == "schema":
        body["json_schema"] = guided(json.loads(constraint.text))
        space = '" "?'  # models like to begin with a space; JSON ignores it
    else:
        is_regex = constraint.kind == "regex"
        body["lark_grammar"] = constraint.text
        if is_regex:
            source = json.loads(LLMatcher.grammar_from_regex(constraint.text))
            body["lark_grammar"] = source["grammars"][0]["lark_grammar"]
        space = '" "' if is_spaced else ""
    return [{"lark_grammar": f"start: {space} @body"}, body]

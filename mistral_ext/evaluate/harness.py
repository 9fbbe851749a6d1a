"""Runs lm-evaluation-harness with our models (extra `[eval]`).

    from mistral_ext.evaluate.harness import evaluate

    results = evaluate(llm, ["hellaswag", "arc_easy"], limit=100)

The harness has the tasks, their data and their metrics. It calls the model through `HarnessModel`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_ext.engine.outputs import outputs_of
from mistral_ext.engine.params import SamplingParams
from mistral_ext.evaluate.likelihood import likelihoods
from mistral_ext.llm import Mistral

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

# The most tokens of a completion if a task sets no number. The harness has the same default for its
# own models.
_MAX_TOKENS = 256

# Options of completions that a task or `gen_kwargs` may set, besides those that the harness brings
# into one form. They are fields of `SamplingParams`. Those of `_SAMPLING` have no effect on greedy
# completions.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

# Options of transformers' `generate`, with values that ask for what the engine does anyway.
_USUAL = {"num_beams": 1, "use_cache": True}


def evaluate(
    llm: Mistral,
    tasks: Sequence[str | dict[str, Any]],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    chat: bool = False,
    system: str | None = None,
    cache: str | Path | None = None,
    run_code: bool = False,
    include: str | Path | None = None,
    progress: bool = True,
    adapter: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model on tasks of lm-evaluation-harness.

    Args:
        llm: the model.
        tasks: names of the harness' tasks and groups, paths of task files (YAML), or the dicts that
            such files hold.
        num_fewshot: the number of examples before each question. None: the number that the task
            sets.
        limit: the number of questions of each task, or the share of questions if `limit` is below
            1. None: all questions.
        chat: whether to put questions in the model's chat template.
        system: a system prompt. None: there is none.
        cache: the prefix of the names of files in which answers are kept. A later call continues
            from these answers. None: answers are not kept.
        run_code: whether tasks may run the programs that the model writes, on this machine.
        include: a folder with more tasks.
        progress: show progress bars if stderr is a terminal.
        adapter: the name of a loaded adapter. None: the model is used without an adapter.
        options: more arguments of `lm_eval.simple_evaluate`.

    Returns:
        The results of `lm_eval.simple_evaluate`: "results" has metrics by task, "samples" has the
        questions and answers.

    Raises:
        ImportError: lm_eval is missing.
        FileNotFoundError: there is no such task file.
        ValueError: a task is unknown, or it needs a feature that the model does not have, or
            `num_fewshot` or `limit` is out of range.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot is {num_fewshot}, expected 0 or more")
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"limit is {limit}, expected a number above 0")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # To index the harness' own tasks takes many seconds, so it is done only for tasks by name.
    needs_index = any(isinstance(task, str) and not _is_file(task) for task in tasks)
    manager = TaskManager(
        include_path=None if include is None else str(include), include_defaults=needs_index
    )
    results: dict[str, Any] = simple_evaluate(
        model=harness_model(llm, progress, adapter),
        tasks=[_task(task, manager.all_tasks) for task in tasks],
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        system_instruction=system,
        use_cache=None if cache is None else str(cache),
        confirm_run_unsafe_code=run_code,
        task_manager=manager,
        **options,
    )
    return results


def _task(task: str | dict[str, Any], known: Sequence[str]) -> str | dict[str, Any]:
    """Converts a task to the form that the harness takes. Raises FileNotFoundError or ValueError if
    there is no such task."""
    if isinstance(task, str) and _is_file(task):
        if not Path(task).is_file():
            raise FileNotFoundError(2, "No such file or directory", task)
        return str(Path(task).absolute())
    if isinstance(task, str) and task not in known:
        raise ValueError(
            f"task is {task!r}, expected a name that 'lm-eval ls tasks' lists, or FILE.yaml"
        )
    return task


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def harness_model(llm: Mistral, progress: bool = True, adapter: str | None = None) -> LM:
    """Makes a model that the functions of the harness accept.

    Args:
        llm: the model.
        progress: show progress bars if stderr is a terminal.
        adapter: the name of a loaded adapter. None: the model is used without an adapter.

    Raises:
        ImportError: lm_eval is missing.
        ValueError: the model has no tokenizer, or does not write text.
    """
    from lm_eval.api.model import TemplateLM

    class Model(HarnessModel, TemplateLM):  # type: ignore[misc]
        """`HarnessModel` with the methods of the harness' own base class."""

    return Model(llm, progress, adapter)


class HarnessModel:
    """A model with the methods that the harness calls.

    A control token that a text spells out, such as </s>, is encoded as this token, as in the
    harness' Hugging Face model. A conversation is encoded as `Mistral.chat` encodes it.

    Args:
        llm: the model.
        progress: show progress bars if stderr is a terminal.
        adapter: the name of a loaded adapter. None: the model is used without an adapter.
    """

    def __init__(self, llm: Mistral, progress: bool = True, adapter: str | None = None) -> None:
        super().__init__()
        llm.expect_writer()
        llm.adapters.find(adapter)
        self._llm = llm
        self._adapter = adapter
        self._tokenizer = llm.require_tokenizer()
        self._progress = progress
        # The tokens of conversations. The keys are the texts that `apply_chat_template` returned.
        self._chats: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token with which a text begins."""
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int | None:
        """The most tokens that the model can read, or None if there is no limit."""
        return self._llm.max_length

    @property
    def tokenizer_name(self) -> str:
        """A name that distinguishes tokenizers in the harness' cache of requests."""
        return str(self._tokenizer.path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the token ids of a text. A text that `apply_chat_template` has returned gets the
        tokens of its conversation.

        Args:
            string: the text.
            add_special_tokens: whether to put `Tokenizer.start` (<s>, or nothing) before the ids of
                the text. None: it is put there, except if the text itself begins with "<s>".
        """
        if string in self._chats:
            return self._chats[string]
        ids = self._tokenizer.encode(string, bos=False, special_tokens=True)
        begins = ids[:1] == [self._tokenizer.bos_id]
        if add_special_tokens or (add_special_tokens is None and not begins):
            return [*self._tokenizer.start, *ids]
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._chats:
            return self._chats[context], self._tokenizer.encode(continuation, bos=False)
        ids: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)  # type: ignore[misc]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each request's continuation, and whether greedy decoding
        would give it. A request has its texts, the tokens of a context, and the tokens of its
        continuation. If the texts are None, the result is not kept in the cache."""
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for i, result in likelihoods(self._llm, pairs, self._progress, self._adapter):
            results[i] = result.logprob, result.is_greedy
            if requests[i][0] is not None:
                self._keep("loglikelihood", requests[i][0], results[i])
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of whole texts. Each text begins with <s>, which is not predicted.

        A model without a sliding window has a limited number of positions. If a text has more
        tokens, it is cut into pieces, which the harness calls windows. Each piece begins with the
        last token of the piece before it. The tokens of a piece see no other tokens of earlier
        pieces.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            longest = self.max_length or max(1, len(ids))
            for window in get_rolling_token_windows(ids, self.prefix_token_id, longest, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self._keep("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completions of texts, without the strings that end them."""
        from tqdm import tqdm

        prompts = [(self.tok_encode(r.args[0]), self._params(r.args[1])) for r in requests]
        for i, (ids, params) in enumerate(prompts):
            prompts[i] = self._fit(ids, params.max_tokens), params
        order = sorted(range(len(prompts)), key=lambda i: prompts[i][0])
        made = (self._llm.request(*prompts[i], adapter=self._adapter) for i in order)
        texts = [""] * len(prompts)
        disable = None if self._progress and not disable_tqdm else True
        with tqdm(total=len(prompts), unit="completions", disable=disable) as bar:
            for number, output in outputs_of(self._llm.engine, made):
                if output.completion:
                    i = order[number]
                    texts[i] = output.completion.text or ""
                    self._keep("generate_until", requests[i].args, texts[i])
                    bar.update()
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation up to the reply. When the harness gives this text back, it is
        encoded as the tokens of `Mistral.chat`.

        Args:
            chat_history: messages, {"role": ..., "content": ...}.
            add_generation_prompt: whether the model should reply to the last message. If False, the
                last message is the beginning of the reply.
        """
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        ids = self._llm.encode_chat(chat_history if add_generation_prompt else chat_history[:-1])
        if begun:
            ids = [*ids, *self._tokenizer.encode(begun, bos=False)]
        names = {i: name for name, i in self._tokenizer.control_ids.items()}
        data = b"".join(self._tokenizer.token_bytes(i) or names.get(i, "").encode() for i in ids)
        text = data.decode("utf-8", "replace")
        self._chats[text] = ids
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template, for the harness' records. It is "" if no template is used."""
        if not chat_template:
            return ""
        template = self._llm.chat_template()
        return template if isinstance(template, str) else template.source()

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Returns a context and its continuation, without the first tokens if they are too long for
        the model.

        The last token is only predicted and not read, so one token more than `max_length` fits. A
        continuation that is too long by itself loses its first tokens, too. Then the first token
        that is left is the context, because the model needs a token to predict from.
        """
        if self.max_length is None:
            return context, continuation
        ids = [*context, *continuation][-(self.max_length + 1) :]
        count = min(len(continuation), len(ids) - 1)
        return ids[: len(ids) - count], ids[len(ids) - count :]

    def _fit(self, ids: list[int], max_tokens: int) -> list[int]:
        """Drops the first tokens of a prompt if it leaves no room for its completion."""
        if self.max_length is None:
            return ids
        if max_tokens >= self.max_length:
            raise ValueError(
                f"max_gen_toks is {max_tokens}, expected fewer than {self.max_length}, the "
                "positions that the model was trained for (max_positions)"
            )
        return ids[-(self.max_length - max_tokens) :]

    def _params(self, given: Mapping[str, Any]) -> SamplingParams:
        """The options of a completion that a task sets. Raises ValueError for an option that the
        engine does not have: without it the results would be those of another task."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        options: dict[str, Any] = {**normalize_gen_kwargs(dict(given), _MAX_TOKENS)}
        stop = [text for text in handle_stop_sequences(options.pop("until"), None) if text]
        max_tokens = options.pop("max_gen_toks")
        if options.pop("do_sample"):
            options.setdefault("temperature", 1.0)  # the default of transformers
        else:
            options = {name: options[name] for name in options if name not in _SAMPLING}
        for name, value in _USUAL.items():
            if options.get(name) == value:
                del options[name]
        for name, value in options.items():
            if name not in (*_SAMPLING, *_PENALTIES):
                usual = _USUAL.get(name, "none")
                raise ValueError(f"generation_kwargs has {name}={value!r:.60}, expected {usual}")
        return SamplingParams(max_tokens=max_tokens, stop=stop, **options)

    def _keep(self, kind: str, args: Any, result: Any) -> None:
        """Makes the harness' cache keep an answer at once, so that an interrupted run can
        continue."""
        self.cache_hook.add_partial(kind, args, result)  # type: ignore[attr-defined]

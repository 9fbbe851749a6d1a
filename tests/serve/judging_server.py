"""The server of a model that judges by a word: a content with BAD in it is illegal."""

from __future__ import annotations

import sys
from dataclasses import replace

from mistral_ext.cli import main
from mistral_ext.llm import DEMO_MODEL, Mistral
from mistral_ext.text.guardrails import CATEGORIES, Moderation, label_ids
from mistral_ext.text.tokenizer import Tokenizer

_, _following = label_ids(Tokenizer.from_folder(DEMO_MODEL))
_request = Mistral.moderation_request


def moderation_request(llm, content, template=None):
    request = _request(llm, content, template)
    last = content if isinstance(content, str) else content[-1]["content"]
    answer = _following["illegal" if "BAD" in last else "acceptable"]
    return replace(request, params=replace(request.params, logit_bias={answer: 100}))


def moderation_of(_, completion):
    answer = completion.token_ids[0]
    return Moderation({name: float(_following[name] == answer) for name in CATEGORIES})


Mistral.moderation_request, Mistral.moderation_of = moderation_request, moderation_of
sys.exit(main(["serve", *sys.argv[1:]]))

"""The server of a model that judges by a word: a content with BAD in it is illegal."""

from __future__ import annotations

import sys
from dataclasses import replace

from mistral_ext.cli import main
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.serve.calls import Call
from mistral_ext.text.guardrails import label_ids
from mistral_ext.text.tokenizer import Tokenizer

_tokenizer = Tokenizer.from_folder(DEMO_MODEL)
_, _following = label_ids(_tokenizer)
_read = Call.read_prompts


async def read_prompts(call, requests):
    async for come in _read(call, requests):
        if come and come[1].prompt_logits is not None:
            text = _tokenizer.decode(requests[come[0]].prompt_ids)
            logits = come[1].prompt_logits.clone()
            logits[-1:, _following["illegal" if "BAD" in text else "acceptable"]] = 1000
            come = come[0], replace(come[1], prompt_logits=logits)
        yield come


Call.read_prompts = read_prompts
sys.exit(main(["serve", *sys.argv[1:]]))

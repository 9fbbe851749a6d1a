"""Counts right replies to held-out sentences: python check.py MODEL DATA [ADAPTER]"""

import contextlib
import json
import sys
from pathlib import Path

from mistral_ext import Mistral

if "--help" in sys.argv or len(sys.argv) < 3:
    sys.exit(__doc__)
model, data, *adapter = sys.argv[1:]
llm = Mistral.from_pretrained(model, adapters={"task": adapter[0]} if adapter else None)
conversations = [json.loads(line)["messages"] for line in Path(data).read_text().splitlines()]
prompts = [llm.encode_chat(messages[:-1]) for messages in conversations]
replies = llm.generate(prompts, adapter="task" if adapter else None, max_tokens=60)
right = 0
for messages, reply in zip(conversations, replies, strict=True):
    with contextlib.suppress(ValueError):  # not JSON
        right += json.loads(reply.text) == json.loads(messages[-1]["content"])
print(f"{right} of {len(replies)} replies are right; the first: {replies[0].text!r}")

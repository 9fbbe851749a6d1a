"""A chat bot that remembers: it keeps the conversation in a file, and sums up what gets too long.

python examples/chat_memory.py MEMORY.json FOLDER_OR_ID "a message" ["another" ...]
"""

import json
import sys
from pathlib import Path

import mistral_ext

if "--help" in sys.argv or len(sys.argv) < 4:
    sys.exit(__doc__)

MOST_TOKENS = 1000  # of the conversation
KEEP = 4  # messages that stay as they were said
memory, model, *said = sys.argv[1:]
file = Path(memory)
messages = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
llm = mistral_ext.Mistral.from_pretrained(model)


def summed_up(messages: list[dict]) -> list[dict]:
    """The last messages, and before them a summary of all others."""
    old = "\n".join(f"{m['role']}: {m['content']}" for m in messages[:-KEEP])
    ask = f"{old}\n\nSum up what is worth remembering of this conversation."
    summary = llm.chat([{"role": "user", "content": ask}], max_tokens=100).text
    return [{"role": "system", "content": f"What was said before: {summary}"}, *messages[-KEEP:]]


for message in said:
    messages.append({"role": "user", "content": message})
    reply = llm.chat(messages, max_tokens=60)  # what it read before is still in the cache
    messages.append({"role": "assistant", "content": reply.text})
    print(f"> {message}\n{reply.text}")
    if len(messages) > KEEP and len(llm.encode_chat(messages[:-1])) > MOST_TOKENS:
        messages = summed_up(messages)
    file.write_text(json.dumps(messages, indent=1, ensure_ascii=False), encoding="utf-8")

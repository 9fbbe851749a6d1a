"""Summarise many texts: each line of IN.jsonl is {"id": ..., "text": ...}, of OUT.jsonl a summary.

python examples/batch_summaries.py IN.jsonl OUT.jsonl FOLDER_OR_ID
"""

import json
import sys
from pathlib import Path

import mistral_ext

if "--help" in sys.argv or len(sys.argv) < 4:
    sys.exit(__doc__)
source, target, model = sys.argv[1:4]
lines = Path(source).read_text(encoding="utf-8").splitlines()
records = [json.loads(line) for line in lines if line.strip()]
llm = mistral_ext.Mistral.from_pretrained(model)
ask = "Summarise this text in one sentence.\n\n"
chats = [llm.encode_chat([{"role": "user", "content": ask + r["text"]}]) for r in records]

# One call: the engine has as many under way as fit, and reads the common beginning once.
summaries = llm.generate(chats, max_tokens=60)
with open(target, "w", encoding="utf-8") as file:
    for record, summary in zip(records, summaries, strict=True):
        # "length" as the reason says that max_tokens cut the summary off.
        line = {"id": record["id"], "summary": summary.text.strip(), "end": summary.finish_reason}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
print(f"{len(records)} summaries in {target}")

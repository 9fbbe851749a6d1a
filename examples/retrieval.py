"""Answer from the passages of a text that fit a question best: retrieval with the same model.

python examples/retrieval.py TEXT.txt "a question" FOLDER_OR_ID
"""

import sys
from pathlib import Path

import mistral_ext

if "--help" in sys.argv or len(sys.argv) < 4:
    sys.exit(__doc__)
file, question, model = sys.argv[1:4]
llm = mistral_ext.Mistral.from_pretrained(model)

# A passage is a paragraph, or several short ones.
passages = [""]
for paragraph in Path(file).read_text(encoding="utf-8").split("\n"):
    if len(passages[-1]) > 600:
        passages.append("")
    passages[-1] += paragraph + "\n"

# A model for embeddings, such as e5-mistral-7b-instruct, takes pooling="last" and an instruction.
embeddings = llm.embed(passages, pooling="mean")  # [N, E], of the length 1
embeddings -= embeddings.mean(0)  # what all passages have in common tells nothing
scores = embeddings @ llm.embed(question, pooling="mean")[0]
best = scores.topk(min(3, len(passages))).indices.tolist()

context = "\n".join(passages[i] for i in sorted(best))
prompt = f"{context}\nAnswer in one sentence, from the text above: {question}"
reply = llm.chat([{"role": "user", "content": prompt}], max_tokens=80)
print(f"[passages {sorted(best)} of {len(passages)}]\n{reply.text}")

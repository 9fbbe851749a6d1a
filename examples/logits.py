"""Compute the logits of a prompt, without generating."""

import mistral_ext
from mistral_ext.llm import DEMO_MODEL

llm = mistral_ext.Mistral.from_pretrained(DEMO_MODEL)
ids = llm.tokenizer.encode("There was once a little")
logits = llm.logits(ids)  # [T, V] float32, row i predicts token i + 1

probabilities, tokens = logits[-1].softmax(-1).topk(5)
for probability, token in zip(probabilities.tolist(), tokens.tolist(), strict=True):
    print(f"{probability:6.1%}  {llm.tokenizer.token_bytes(token).decode('utf-8', 'replace')!r}")

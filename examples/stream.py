"""Print a text while it is generated, and how fast that was."""

import mistral_ext
from mistral_ext.llm import DEMO_MODEL

llm = mistral_ext.Mistral.from_pretrained(DEMO_MODEL)
stream = llm.stream("The old king", max_tokens=80, temperature=0.8, top_p=0.95, seed=1)
for piece in stream:
    print(piece, end="", flush=True)
print()

completion = stream.completion
print(f"[{len(completion.token_ids)} tokens, {completion.timing.decode_rate:.0f} a second]")

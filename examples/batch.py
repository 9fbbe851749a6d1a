"""Complete several prompts at once: they share each pass over the weights."""

import mistral_ext
from mistral_ext.llm import DEMO_MODEL

llm = mistral_ext.Mistral.from_pretrained(DEMO_MODEL)
prompts = ["Once upon a time", "Beth said", "The wolf"]
completions = llm.generate(prompts, max_tokens=40, temperature=0.7, seed=7, n=2, stop=["\n\n"])

# Two of each prompt, in the order of the prompts.
for i, completion in enumerate(completions):
    print(f"{prompts[i // 2]}{completion.text}  [{completion.finish_reason}]\n")

"""Measure how well a model predicts a text: python examples/perplexity.py FILE [a model]"""

import sys
from pathlib import Path

import mistral_ext
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.llm import DEMO_MODEL

if "--help" in sys.argv or len(sys.argv) < 2:
    sys.exit(__doc__)
text = Path(sys.argv[1]).read_text(encoding="utf-8")
llm = mistral_ext.Mistral.from_pretrained(sys.argv[2] if len(sys.argv) > 2 else DEMO_MODEL)
result = perplexity(llm, text)
print(f"perplexity {result.value:.3f} over {result.tokens} tokens, {result.nll:.4f} nats each")

"""Talk to an Instruct model: python examples/chat.py FOLDER_OR_ID "a question" ["another" ...]"""

import sys

import mistral_ext

if "--help" in sys.argv or len(sys.argv) < 3:
    sys.exit(__doc__)
model, *questions = sys.argv[1:]
llm = mistral_ext.Mistral.from_pretrained(model)
conversation = llm.start_chat()  # what was read and written stays in the cache
for question in questions:
    print(">", question)
    for piece in conversation.send(question, max_tokens=200):
        print(piece, end="", flush=True)
    print()

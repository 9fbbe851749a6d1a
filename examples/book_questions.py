"""Answer a question about a book, however long: map its passages to notes, reduce the notes.

python examples/book_questions.py BOOK.txt "a question" FOLDER_OR_ID [tokens of a passage]
"""

import sys
from pathlib import Path

import mistral_ext

if "--help" in sys.argv or len(sys.argv) < 4:
    sys.exit(__doc__)
book, question, model = sys.argv[1:4]
size = int(sys.argv[4]) if len(sys.argv) > 4 else 1500
llm = mistral_ext.Mistral.from_pretrained(model)


def ask(prompts: list[str], max_tokens: int) -> list[str]:
    """The replies to several questions, which share each pass over the weights."""
    chats = [llm.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    return [reply.text.strip() for reply in llm.generate(chats, max_tokens=max_tokens)]


ids = llm.tokenizer.encode(Path(book).read_text(encoding="utf-8"), bos=False)
passages = [llm.tokenizer.decode(ids[i : i + size]) for i in range(0, len(ids), size)]
if not passages:
    sys.exit(f"{book} is empty, expected a text")
note = f"Note in one or two sentences what this passage says about: {question}\n\n"
notes = ask([note + passage for passage in passages], max_tokens=60)
rounds = 1
while len(notes) > 1 or rounds == 1:  # until one is left
    joined = ["\n".join(notes[i : i + 8]) for i in range(0, len(notes), 8)]
    notes = ask([f"{text}\n\nFrom these notes, answer: {question}" for text in joined], 80)
    rounds += 1
print(f"[{len(passages)} passages, {rounds} rounds]\n{notes[0]}")

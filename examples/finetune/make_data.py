"""Writes sentences with replies in JSON, for training and held out: python make_data.py [FOLDER]

The held-out sentences are about other people and things.
"""

import json
import random
import sys
from pathlib import Path

if "--help" in sys.argv:
    sys.exit(__doc__)

PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jan", "Karl"]
THINGS = ["apples", "books", "chairs", "cups", "eggs", "hats", "keys", "lamps", "pens", "toys"]
FORMS = (
    "{who} buys {count} {what} for {price} euros.",
    "For {price} euros {who} gets {count} {what}.",
    "{count} {what}, please, says {who}, and pays {price} euros.",
    "Yesterday {who} paid {price} euros for {count} {what}.",
)


def line(rng: random.Random, people: list[str], things: list[str]) -> str:
    fields = {
        "who": rng.choice(people),
        "what": rng.choice(things),
        "count": rng.randint(2, 99),
        "price": rng.randint(2, 99),
    }
    turns = [
        {"role": "system", "content": "Reply in JSON."},
        {"role": "user", "content": rng.choice(FORMS).format(**fields)},
        {"role": "assistant", "content": json.dumps(fields)},
    ]
    return json.dumps({"messages": turns}) + "\n"


rng = random.Random(0)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
for name, count, part in (("train", 200, slice(3, None)), ("held_out", 20, slice(0, 3))):
    lines = [line(rng, PEOPLE[part], THINGS[part]) for _ in range(count)]
    (folder / f"{name}.jsonl").write_text("".join(lines))

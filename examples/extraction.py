"""Turn text into data that is valid: python examples/extraction.py FOLDER_OR_ID ["a text"]"""

import json
import sys

import mistral_ext

if "--help" in sys.argv or len(sys.argv) < 2:
    sys.exit(__doc__)
text = "Anna Berg, 34, moved from Oslo to Turin in May 2019 and now teaches physics there."
text = sys.argv[2] if len(sys.argv) > 2 else text
short = {"type": "string", "maxLength": 30}
fields = {
    "name": short,
    "age": {"type": "integer", "minimum": 0, "maximum": 130},
    "city": short,
    "job": {"anyOf": [short, {"type": "null"}]},
}
schema = {"type": "object", "properties": fields, "required": list(fields)}

llm = mistral_ext.Mistral.from_pretrained(sys.argv[1])
prompt = f"{text}\n\nWrite the person's {', '.join(fields)} as JSON."
reply = llm.chat([{"role": "user", "content": prompt}], schema=schema, max_tokens=200)
if reply.finish_reason != "stop":
    raise SystemExit("max_tokens cut the JSON off")
person = json.loads(reply.text)  # matches the schema, whatever the model
for name, value in person.items():
    print(f"{name:5} {value}")

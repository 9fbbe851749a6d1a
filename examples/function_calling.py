"""Let a model call functions: python examples/function_calling.py FOLDER_OR_ID ["a question"]

The model has to be one that takes tools, e.g. Mistral-7B-Instruct-v0.3.
"""

import json
import sys

import mistral_ext

if "--help" in sys.argv or len(sys.argv) < 2:
    sys.exit(__doc__)


def distance(unit: str, cities: list) -> str:
    known = {frozenset(["Paris", "Rome"]): 1106, frozenset(["Paris", "Oslo"]): 1342}  # km
    km = known.get(frozenset(cities))
    return "unknown" if km is None else f"{km if unit == 'km' else round(km / 1.609)} {unit}"


city = {"enum": ["Paris", "Rome", "Oslo"]}
cities = {"type": "array", "items": city, "minItems": 2, "maxItems": 2}
parameters = {"properties": {"unit": {"enum": ["km", "miles"]}, "cities": cities}}
parameters |= {"type": "object", "required": ["unit", "cities"]}
about = {"name": "distance", "description": "Between two cities", "parameters": parameters}
tools = [{"type": "function", "function": about}]

llm = mistral_ext.Mistral.from_pretrained(sys.argv[1])
question = sys.argv[2] if len(sys.argv) > 2 else "How many miles is it from Paris to Rome?"
messages = [{"role": "user", "content": question}]
reply = llm.chat(messages, tools=tools, tool_choice="required", max_tokens=400)
calls = [call.as_message() for call in reply.tool_calls]
messages.append({"role": "assistant", "content": reply.text, "tool_calls": calls})
for call in reply.tool_calls:  # their arguments match the parameters
    result = distance(**json.loads(call.arguments))
    print(f"{call.name}({call.arguments}) = {result}")
    messages.append({"role": "tool", "tool_call_id": call.call_id, "content": result})
print(llm.chat(messages, tools=tools, tool_choice="none", max_tokens=60).text)

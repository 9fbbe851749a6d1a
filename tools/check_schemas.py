"""Has a model write JSON for the schemas of JSON Schema's own test suite, and validates it.

    pip download --no-deps --no-binary jsonschema jsonschema && tar xzf jsonschema-*.tar.gz
    python tools/check_schemas.py jsonschema-*/json/tests/draft2020-12 [--model M] [--n 2]

The source of the package `jsonschema` has the suite in it. Each schema is refused, or what is
written for it is valid, unless max_tokens cut it off: anything else is listed, and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jsonschema.exceptions import ValidationError
from jsonschema.validators import (
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
    validator_for,
)

from mistral_ext import Mistral, SamplingParams
from mistral_ext.engine.request import Completion
from mistral_ext.llm import DEMO_MODEL

VERSIONS = {
    "draft4": Draft4Validator,
    "draft6": Draft6Validator,
    "draft7": Draft7Validator,
    "draft2019-09": Draft201909Validator,
    "draft2020-12": Draft202012Validator,
}

PROMPT = "Once upon a time there was"


def schemas_of(folder: Path) -> Iterator[str]:
    """The different schemas of a folder of tests, as JSON, each with its version."""
    version = VERSIONS[folder.name].META_SCHEMA["$schema"]
    texts = (
        json.dumps({"$schema": version, **group["schema"]})
        for path in sorted(folder.rglob("*.json"))
        for group in json.loads(path.read_text())
        if isinstance(group["schema"], dict)  # and not true or false
    )
    return iter(dict.fromkeys(texts))


def outcome(schema: str, completion: Completion) -> str:
    """The outcome: "valid", "cut off", or "INVALID" with what is wrong."""
    if completion.finish_reason == "length":
        return "cut off"
    schema = json.loads(schema)
    kind = validator_for(schema)
    try:
        value = json.loads(completion.text)
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
    except (ValueError, ValidationError) as error:
        words = str(error).splitlines()[0]
        return f"INVALID {completion.text!r:.200} for {json.dumps(schema):.300}: {words}"
    return "valid"


def check(llm: Mistral, schemas: Iterator[str], **options: object) -> tuple[Counter, list[str]]:
    """Returns how often each outcome came, and the completions that are not valid."""
    counts, prompt = Counter(), llm.tokenizer.encode(PROMPT)
    outputs, asked = llm.engine.outputs([]), {}
    for schema in schemas:
        try:
            params = SamplingParams(schema=schema, temperature=1.0, **options)
            requests = [llm.request(prompt, params, index) for index in range(params.n)]
        except (TypeError, ValueError):
            counts["refused"] += 1
            continue
        counts["compiled"] += 1
        for request in requests:
            outputs.add(request)
            asked[outputs.request_ids[-1]] = schema
    wrong = []
    for output in outputs:
        if output.is_last:
            of = outcome(asked[output.request_id], output.completion) if output.completion else None
            of = of or f"INVALID {output.error} for {asked[output.request_id]:.300}"
            counts[of.split()[0]] += 1
            wrong += [of] if of.startswith("INVALID") else []
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="+", help="of tests, named by version")
    parser.add_argument("--model", default=DEMO_MODEL, help="default: the demo")
    parser.add_argument("--n", type=int, default=2, help="completions for each schema")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    llm = Mistral.from_pretrained(args.model)
    schemas = (schema for folder in args.folder for schema in schemas_of(folder))
    counts, wrong = check(llm, schemas, n=args.n, max_tokens=args.max_tokens, seed=args.seed)
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())

"""What a question of a benchmark costs: our models in lm-evaluation-harness, and its own model.

    python bench/eval.py [--model FOLDER] [--questions 4] [--shots 5] [--dtype fp32] [--turns 3]

Each question has four answers and examples of its own. Both sides get the same requests, in turns.
Figures are seconds of processor time, of all threads, for a question: other programs on the machine
disturb them less than wall clock. transformers reads batches of four, the answers to a question.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from measure import machine, print_machine
from shapes import DTYPES

from mistral_ext.evaluate.harness import harness_model
from mistral_ext.llm import DEMO_MODEL, Mistral

TEXT = Path(__file__).parent.parent / "tests" / "data" / "held_out.txt"


def make_questions(count: int, shots: int, seed: int = 0) -> list[Instance]:
    """Makes requests, four for each question. Each has examples of about 100 words as its context,
    and one of the question's answers."""
    draw = random.Random(seed)
    words = TEXT.read_text().split()

    def some(n: int) -> str:
        begin = draw.randrange(len(words) - n)
        return " ".join(words[begin : begin + n])

    requests = []
    for _ in range(count):
        examples = [f"{some(90)} {some(8)}" for _ in range(shots)]
        context = "\n\n".join([*examples, some(90)])
        answers = [f" {some(draw.randint(4, 10))}" for _ in range(4)]
        requests += [Instance("loglikelihood", {}, (context, answer), 0) for answer in answers]
    return requests


def processor_seconds(function: Callable[[], object]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a folder; default: the demo")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print_machine(machine())
    dtype = DTYPES[options.dtype]
    ours = harness_model(Mistral.from_pretrained(options.model, dtype=dtype), progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, add_bos_token=True)
    theirs = HFLM(model.eval(), tokenizer=tokenizer, batch_size=4)
    times: dict[str, list[float]] = {"mistral_ext": [], "transformers": []}
    for turn in range(options.turns + 1):
        requests = make_questions(options.questions, options.shots, seed=turn)
        for name, lm in (("mistral_ext", ours), ("transformers", theirs)):
            call = functools.partial(lm.loglikelihood, requests, disable_tqdm=True)
            seconds = processor_seconds(call)
            if turn:  # the first warms up
                times[name].append(seconds / options.questions)
    tokens = len(ours.tok_encode(requests[0].args[0]))
    print(f"\n{tokens} tokens of context, four answers, {options.dtype}; seconds a question\n")
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    for name, seconds in medians.items():
        print(f"{name:14} {seconds:8.3f}")
    print(f"{'ratio':14} {medians['mistral_ext'] / medians['transformers']:8.3f}")


if __name__ == "__main__":
    main()

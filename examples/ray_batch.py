"""Complete many prompts on a Ray cluster (extra [ray]): each line of IN.jsonl is {"prompt": ...}.

python examples/ray_batch.py IN.jsonl OUT_FOLDER FOLDER_OR_ID [REPLICAS [CORES]]

It runs on the cluster that the variable RAY_ADDRESS names, else on this machine. Each replica has
CORES cores and as many threads; by default there is a replica with a core.
"""

import sys

import ray

from mistral_ext import Mistral

if "--help" in sys.argv or len(sys.argv) < 4:
    sys.exit(__doc__)
source, target, model = sys.argv[1:4]
replicas, cores = (int(number) for number in [*sys.argv[4:6], 1, 1][:2])


class Complete:
    """A model in a process of its own; Ray Data gives it one batch after another."""

    def __init__(self):
        self.llm = Mistral.from_pretrained(model, max_batch=16)

    def __call__(self, batch):
        completions = self.llm.generate(list(batch["prompt"]), max_tokens=60)
        return {**batch, "completion": [completion.text for completion in completions]}


prompts = ray.data.read_json(source)
completed = prompts.map_batches(Complete, concurrency=replicas, num_cpus=cores, batch_size=64)
completed.write_json(target)

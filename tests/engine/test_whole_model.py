"""The checks of model_checks.py on the demo model, on the CPU and on a GPU.

On the CPU once more with decode steps that are launched ahead, as those of a GPU are: what would be
captured is run again by Python.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from backends import GPU
from model_checks import CHECKS, Case, runner_of
from replays import Replays

from mistral_ext.engine import engine
from mistral_ext.engine.graph_runner import GraphRunner
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.text.tokenizer import Tokenizer

TEXT = Path(__file__).parents[1] / "data/held_out.txt"


@pytest.fixture(scope="module", params=["cpu", "cpu, ahead", GPU])
def device(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu, ahead":
            patch.setattr(engine, "make_runner", lambda *given: GraphRunner(*given, Replays()))
        yield request.param.split(",")[0]


@pytest.fixture(scope="module", params=[None, "int8", "int4"], ids=["bf16", "int8", "int4"])
def case(request, device):
    ids = Tokenizer.from_folder(DEMO_MODEL).encode(TEXT.read_text(encoding="utf-8"))[:230]
    return Case(DEMO_MODEL, device, torch.bfloat16, request.param, ids, chunk=37)


@pytest.mark.parametrize("name", CHECKS)
def test_whole_model(case, name):
    if name == "chat" and find_spec("mistral_common") is None:
        pytest.skip("chat templates need mistral-common")
    if name == "graphs" and (case.device == "cpu" or runner_of(case.llm) is None):
        pytest.skip("steps are captured on a CUDA device, by a model that has an engine")
    CHECKS[name](case)

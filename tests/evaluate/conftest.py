"""The demo model, and lm-evaluation-harness' own model of transformers on the same weights."""

from __future__ import annotations

from pathlib import Path

import datasets
import lm_eval.models.huggingface
import pytest
import torch
import transformers
import yaml

from mistral_ext.llm import DEMO_MODEL, Mistral

TASKS = Path(__file__).parent.parent / "data" / "tasks"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """The datasets that the harness makes of JSON stay out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def llm() -> Mistral:
    return Mistral.from_pretrained(DEMO_MODEL, dtype=torch.float32, progress=False)


@pytest.fixture(scope="session")
def oracle():
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    # The folder does not say that texts begin with <s>, as all of Mistral do.
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL, add_bos_token=True)
    return lm_eval.models.huggingface.HFLM(model.eval(), tokenizer=tokenizer, batch_size=4)


@pytest.fixture(scope="session")
def cloze() -> dict:
    """The task of cloze.yaml, wherever the tests run."""
    task = yaml.safe_load((TASKS / "cloze.yaml").read_text())
    files = task["dataset_kwargs"]["data_files"]
    task["dataset_kwargs"]["data_files"] = {
        split: str(TASKS / Path(name).name) for split, name in files.items()
    }
    return task

"""Training runs, against peft + transformers and against each other."""

from __future__ import annotations

import json
import math
import os
import signal

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

from mistral_ext import Mistral
from mistral_ext.finetune import Interrupted, Trainer
from mistral_ext.finetune import trainer as trainer_module
from mistral_ext.finetune.batches import passes, step_samples
from mistral_ext.finetune.data import read_samples
from mistral_ext.finetune.metrics import read_metrics
from mistral_ext.finetune.options import TARGETS
from mistral_ext.finetune.schedule import learning_rate
from mistral_ext.model.adapters import GROUPS
from mistral_ext.weights.adapters import read_adapter, write_adapter

# Their lengths differ, so the mean of the means of passes is another number.
TEXTS = [
    "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen.",
    "Yes.",
    "The king's daughter went into the wood and sat down by the side of the cool well.",
    "No, never.",
    "When she was dull she took a golden ball, and threw it up on high and caught it again.",
    "A wolf!",
    "This ball was her favourite plaything.",
]
FAST = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-2, "sample_tokens": 0, "rank": 3}


@pytest.fixture
def data(write_lines):
    return write_lines("train.jsonl", *({"text": text} for text in TEXTS))


def with_random_b(trainer: Trainer) -> Trainer:
    """B is 0 at first, and then a has no gradient."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, b in trainer._adapter.pairs.values():
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return trainer


def figures(output, *names):
    """The figures of the steps."""
    rows = [row for row in read_metrics(output / "metrics.jsonl") if {*names} <= row.keys()]
    return [[row[name] for name in names] for row in rows]


def test_steps_are_those_of_peft(llm, oracle, data, tmp_path):
    """Losses, gradients and AdamW; each sample by itself, its window shorter than the sample."""
    trainer = with_random_b(Trainer(llm, data, tmp_path / "out", tokens_per_pass=40, **FAST))
    write_adapter(tmp_path / "start", trainer._adapter.low_ranks())
    trainer.train()

    model = peft.PeftModel.from_pretrained(oracle, tmp_path / "start", is_trainable=True)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1)
    samples = read_samples(data, llm, 100)
    assert max(len(sample.ids) for sample in samples) > 2 * llm.config.sliding_window
    expected = []
    for step in range(4):
        total, count = 0.0, 0
        for i in step_samples(len(samples), 4, step, seed=0):
            ids = samples[i].ids.long()
            total += cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum")
            count += len(ids) - 1
        optimizer.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, 4, 1, 1e-2)
        optimizer.step()
        expected.append([(total / count).item(), norm.item()])

    found = figures(tmp_path / "out", "loss", "grad_norm")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert max(norm for _, norm in expected) > 1  # so gradients were shortened
    model.save_pretrained(tmp_path / "peft")
    ours, theirs = (read_adapter(tmp_path / name, llm.config) for name in ("out", "peft"))
    assert ours.keys() == theirs.keys()
    start = read_adapter(tmp_path / "start", llm.config)
    for name, update in theirs.items():
        for matrix in ("a", "b"):
            before, after = getattr(start[name], matrix), getattr(update, matrix)
            assert (after - before).abs().max() > 1e-3
            torch.testing.assert_close(getattr(ours[name], matrix), after, rtol=0, atol=2e-4)


def test_an_output_in_the_users_folder(llm, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert Trainer(llm, data, "~/out", **FAST).output == tmp_path / "out"


def test_the_result_loads_in_peft(llm, oracle, data, tmp_path):
    Trainer(llm, data, tmp_path / "out", targets=("wq", "w2"), alpha=5, **FAST).train()
    ids = llm.tokenizer.encode(TEXTS[0])
    before = llm.logits(ids)
    llm.load_adapter(tmp_path / "out", "tales")
    found = llm.logits(ids, adapter="tales")
    model = peft.PeftModel.from_pretrained(oracle, tmp_path / "out")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.1


def test_passes_do_not_change_what_is_learned(llm, data, tmp_path):
    """A step in many passes is the step in one: its loss is the mean over its tokens."""
    for name, most in (("one", 500), ("many", 40)):
        with_random_b(Trainer(llm, data, tmp_path / name, tokens_per_pass=most, **FAST)).train()
    one, many = (
        torch.tensor(figures(tmp_path / name, "loss", "grad_norm")) for name in ("one", "many")
    )
    torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_on_the_disk_before_it_has_its_name(llm, data, tmp_path, monkeypatch):
    """And its weights come before its configuration."""
    trainer = Trainer(llm, data, tmp_path / "out", **FAST)
    trainer.output.mkdir()
    events = []
    replace, sync_files = os.replace, trainer_module.sync_files
    sync_names = trainer_module.sync_names

    def replaced(source, target):
        events.append(target.name)
        replace(source, target)

    def files(folder):
        events.append({path.name for path in folder.iterdir()})
        sync_files(folder)

    def names(folder):
        events.append(folder)
        sync_names(folder)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(trainer_module, "sync_files", files)
    monkeypatch.setattr(trainer_module, "sync_names", names)
    trainer._write_adapter()
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert events == [{weights, config}, weights, config, trainer.output]


def test_the_best_adapter_stays(llm, data, tmp_path, monkeypatch):
    """Two evaluations without a lower loss end the run."""
    losses = [0.5, 3.0, 2.0, 2.5, 2.0, 1.0]  # the first is that of the model without an adapter
    adapters = []

    def eval_loss(trainer, _):
        adapters.append({name: u.b.clone() for name, u in trainer._adapter.low_ranks().items()})
        return losses[len(adapters) - 1]

    monkeypatch.setattr(Trainer, "_eval_loss", eval_loss)
    options = FAST | {"epochs": 9, "eval_every": 1, "patience": 2}
    result = Trainer(llm, data, tmp_path / "out", data, **options).train()
    assert (result.steps, result.eval_loss) == (4, 2.0)
    assert figures(tmp_path / "out", "eval_loss") == [[loss] for loss in losses[:5]]
    for name, update in read_adapter(tmp_path / "out", llm.config).items():
        assert torch.equal(update.b, adapters[2][name])
        assert not torch.equal(update.b, adapters[4][name])


def test_what_a_run_leaves(llm, data, tmp_path):
    output = tmp_path / "new" / "out"
    options = FAST | {"sample_tokens": 5}
    trainer = Trainer(llm, data, output, data, tensorboard=True, **options)
    trainer.train()
    assert {path.name for path in output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "loss.png",
        "tensorboard",
        "checkpoint-000004",
    }
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4]
    assert [row["step"] for row in rows if "sample" in row] == [0, 2, 4]
    first, *_, last = (row["eval_loss"] for row in rows if "eval_loss" in row)
    assert last < first - 0.2
    tokens = sum(len(sample.ids) - 1 for sample in trainer._samples)
    assert sum(row["tokens"] for row in rows if "tokens" in row) == 2 * tokens
    prompt = trainer._sample_prompt
    llm.load_adapter(output, "best")
    (completion,) = llm.generate(prompt, adapter="best", max_tokens=5)
    assert completion.text in [row["sample"] for row in rows if "sample" in row]
    assert llm.adapters.names == ["best"]


def test_texts_take_a_cache_of_their_length(llm, data, tmp_path, monkeypatch):
    """Not the usual one, which takes what memory is left; and another adapter stays as it is."""
    other = with_random_b(Trainer(llm, data, tmp_path / "other", **FAST))
    llm.load_adapter(other._adapter.low_ranks(), "other")
    made = []

    class Counted(trainer_module.Mistral):
        def generate(self, *arguments, **options):
            found = super().generate(*arguments, **options)
            made.append(self.engine.pool.slots)
            return found

    monkeypatch.setattr(trainer_module, "Mistral", Counted)
    options = FAST | {"sample_tokens": 5, "max_steps": 1}
    trainer = Trainer(llm, data, tmp_path / "out", **options)
    trainer.train()
    assert made == [len(trainer._sample_prompt) + 5] * 2
    assert llm._engine is None
    found = llm.logits(trainer._sample_prompt, adapter="other")
    assert llm.adapters.names == ["other"]
    llm.unload_adapter("other")
    llm.load_adapter(other._adapter.low_ranks(), "again")
    assert torch.equal(llm.logits(trainer._sample_prompt, adapter="again"), found)


class _Signal:
    """Raises SIGINT while the pass of this number runs."""

    def __init__(self, monkeypatch, number: int) -> None:
        self.left = number
        self._loss = trainer_module.loss
        # A shell starts what runs in its background with the signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr(trainer_module, "loss", self)

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return self._loss(*args)


def test_a_resumed_run_is_the_uninterrupted_one(llm, data, tmp_path, monkeypatch):
    """Ctrl-C in an evaluation, and between the passes of a step."""
    options = FAST | {"tokens_per_pass": 40, "eval_every": 2}
    whole = Trainer(llm, data, tmp_path / "whole", data, **options)
    whole.train()
    of_eval = len(whole._eval_passes)
    of_steps = [
        len(passes([whole._samples[i] for i in step_samples(len(TEXTS), 4, step, seed=0)], 40))
        for step in range(4)
    ]
    assert min(of_eval, of_steps[2]) > 1
    output = tmp_path / "parts"
    # In the evaluation after step 2, and, once that has been done, in step 3.
    for number, resume in ((of_eval + sum(of_steps[:2]) + 1, False), (of_eval + 1, True)):
        trainer = Trainer(llm, data, output, data, resume=resume, **options)
        with monkeypatch.context() as patch:
            signals = _Signal(patch, number)
            with pytest.raises(Interrupted, match="checkpoint-000002") as caught:
                trainer.train()
            assert signals.left == 0
        assert caught.value.checkpoint == output / "checkpoint-000002"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        read_adapter(caught.value.checkpoint, llm.config)
        assert not list(output.glob("*part*"))
    Trainer(llm, data, output, data, resume=True, **options).train()
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "checkpoint-000004/optimizer.safetensors",
    ):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for names in (("step", "loss", "learning_rate", "grad_norm"), ("step", "eval_loss")):
        assert figures(output, *names) == figures(tmp_path / "whole", *names)


def test_resume_needs_the_same_run(llm, tiny, data, write_lines, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Trainer(llm, data, output, resume=True, **FAST)
    Trainer(llm, data, output, **FAST).train()
    with pytest.raises(ValueError, match=r"learning_rate is 0.5, expected 0.01 as in .*000004"):
        Trainer(llm, data, output, resume=True, **FAST | {"learning_rate": 0.5})
    with pytest.raises(ValueError, match="eval_every is 1, expected None"):
        Trainer(llm, data, output, resume=True, **FAST | {"eval_every": 1})
    other = write_lines("other.jsonl", *({"text": text} for text in TEXTS[::-1]))
    with pytest.raises(ValueError, match="data is"):
        Trainer(llm, other, output, resume=True, **FAST)
    quantised = Mistral.from_pretrained(
        tiny[0], dtype=torch.float32, quantize="int8", progress=False
    )
    tuned = Mistral.from_pretrained(tiny[0], dtype=torch.float32, progress=False)
    tuned.model.norm = tuned.model.norm + 1
    for base in (quantised, tuned):
        with pytest.raises(ValueError, match="base is"):
            Trainer(base, data, output, resume=True, **FAST)
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"):
        Trainer(llm, data, output, **FAST)
    before = (output / "adapter_model.safetensors").read_bytes()
    (output / "adapter.part-x").mkdir()  # left by a run that was killed
    (output / "adapter.part-x" / "adapter_config.json").touch()
    Trainer(llm, data, output, resume=True, **FAST).train()  # it has come to its end
    assert not (output / "adapter.part-x").exists()
    assert (output / "adapter_model.safetensors").read_bytes() == before


def test_damaged_checkpoints(llm, data, tmp_path):
    output = tmp_path / "out"
    Trainer(llm, data, output, **FAST).train()
    checkpoint = output / "checkpoint-000004"
    for name, text in (
        ("training.json", '{"run": {}}'),
        ("training.json", "{"),
        ("optimizer.safetensors", "x" * 20),
    ):
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            Trainer(llm, data, output, resume=True, **FAST)
        (checkpoint / name).write_bytes(kept)


class _Spoiled(torch.autograd.Function):
    """A loss with its own value and a gradient of NaN."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, d_value):
        return d_value * math.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda value: value * math.nan, "the loss is nan and the length of its gradient nan"),
        (_Spoiled.apply, r"the loss is [\d.]+ and the length of its gradient nan"),
    ],
)
@pytest.mark.parametrize("most_norm", [1.0, None])
def test_a_step_that_is_not_finite_ends_the_run(
    llm, data, tmp_path, monkeypatch, spoil, message, most_norm
):
    options = FAST | {"checkpoint_every": 1, "max_grad_norm": most_norm}
    trainer = Trainer(llm, data, tmp_path / "out", **options)
    real = trainer_module.loss
    calls = []

    def broken(*args):
        calls.append(1)
        return spoil(real(*args)) if len(calls) > 2 else real(*args)

    monkeypatch.setattr(trainer_module, "loss", broken)
    with pytest.raises(RuntimeError, match=f"{message} in step 3.*: try a lower learning_rate"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint-000002"]
    assert all(matrix.isfinite().all() for matrix in trainer._adapter.parameters.values())


def test_an_adapter_that_cannot_write_ends_the_run(llm, data, tmp_path):
    """The engine alone would say that the model's weights may be damaged."""
    options = FAST | {"learning_rate": 1e30, "max_steps": 1, "sample_tokens": 4}
    with pytest.raises(RuntimeError, match=r"after step 1 .*: try a lower learning_rate than 1e"):
        Trainer(llm, data, tmp_path / "out", **options).train()


def test_an_evaluation_that_is_not_finite_ends_the_run(llm, data, tmp_path, monkeypatch):
    losses = iter([3.0, math.nan])
    monkeypatch.setattr(Trainer, "_eval_loss", lambda *_: next(losses))
    with pytest.raises(RuntimeError, match="the held-out loss is nan after step 1, expected a"):
        Trainer(llm, data, tmp_path / "out", data, **FAST | {"eval_every": 1}).train()
    assert figures(tmp_path / "out", "eval_loss") == [[3.0]]
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0, expected an integer, 1 or more"),
        ({"alpha": -1.0}, "alpha is -1.0, expected a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan, expected a number above 0"),
        ({"warmup": 1.5}, "warmup is 1.5, expected 0 to 1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\), expected two numbers"),
        ({"targets": ("q_proj",)}, r"targets is \('q_proj',\), expected some of wq, wk, wv"),
        ({"betas": 3}, "betas is 3, expected two numbers"),
        ({"targets": [["wq"]]}, r"targets is \[\['wq'\]\], expected some of wq, wk, wv"),
        ({"targets": 3}, "targets is 3, expected some of wq, wk, wv"),
        ({"learning_rate": 10**400}, "learning_rate is 10000.*, expected a number above 0"),
        ({"seed": 2**63}, f"seed is {2**63}, expected an integer, 0 to {2**63 - 1}"),
        ({"patience": 0}, "patience is 0, expected an integer"),
        ({"patience": 2}, "patience is 2, expected None without eval_data"),
    ],
)
def test_wrong_options(llm, data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(llm, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_targets_are_all_linear_layers():
    names = [name.rpartition(".")[2] for names in GROUPS.values() for name in names]
    assert list(TARGETS) == names


def test_learning_rates():
    rates = [learning_rate(step, 10, 4, 2.0) for step in range(11)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[7] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(0.0)
    assert sorted(rates[4:], reverse=True) == rates[4:]


@pytest.mark.parametrize("cut", [b'{"step": 2, "lo', '{"step": 2, "sample": "é'.encode()[:-1]])
def test_metrics_of_a_cut_off_line(tmp_path, cut):
    (tmp_path / "m").write_bytes(json.dumps({"step": 1}).encode() + b"\n" + cut)
    assert read_metrics(tmp_path / "m") == [{"step": 1}]

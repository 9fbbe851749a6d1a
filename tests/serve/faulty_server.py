"""The server on an engine with planted faults, which words of a prompt set off."""

from __future__ import annotations

import sys

from mistral_ext.cli import main
from mistral_ext.engine.engine import Engine
from mistral_ext.engine.sequence import Sequence
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.serve.engine_thread import EngineThread
from mistral_ext.text.tokenizer import Tokenizer

_tokenizer = Tokenizer.from_folder(DEMO_MODEL)
_step, _accept = Engine.step, Sequence.accept
_device_is_broken = False


def accept(sequence, token_id, logits):
    global _device_is_broken
    prompt = _tokenizer.decode(sequence.ids[: sequence.prompt_length])
    generated = len(sequence.ids) - sequence.prompt_length
    _device_is_broken |= prompt == "BREAK DEVICE"
    if prompt in ("FAIL", "BREAK DEVICE") or (prompt == "FAIL LATER" and generated == 4):
        raise RuntimeError("a planted fault")
    return _accept(sequence, token_id, logits)


def step(engine):
    for sequence in list(engine._sequences.values()):
        if _tokenizer.decode(sequence.ids[: sequence.prompt_length]) == "BREAK STEP":
            raise RuntimeError("a planted fault of the engine")
    return _step(engine)


def check_device(thread):
    if _device_is_broken:
        raise RuntimeError("a planted fault of the device")


Engine.step, Sequence.accept, EngineThread._check_device = step, accept, check_device
sys.exit(main(["serve", *sys.argv[1:]]))

"""Tokens of GGUF files, against llama.cpp itself, where llama-cpp-python is installed."""

from __future__ import annotations

import gguf
import pytest
from checkpoints import TOKENIZERS
from sentencepiece import SentencePieceProcessor

from mistral_ext.text.tokenizer import Tokenizer
from mistral_ext.weights.gguf_file import read_gguf

TEXTS = [
    "Hello world",
    "  two leading, trailing  ",
    "a  b   c    d\n\n\n  indented\n\tTab\r\n",
    "Don't you'll WE'VE it's 0123456789 3.14159",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # code\n",
    "Grüße, Ærøskøbing; ελληνικά; русский; 日本語; العربية; हिन्दी",
    "👋🏽 family 👩‍👩‍👧‍👦, flag 🇫🇷",
    "zero\u200bwidth, full width \uff21, ligature ﬁ, combining e\u0301",
    "<s>a</s><unk><0x0A><|im_end|>",
    "underscore▁block",
]


def compare(path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ours = Tokenizer.from_gguf(path, read_gguf(path).metadata)
    for text in TEXTS:
        expected = theirs.tokenize(text.encode(), add_bos=True, special=False)
        assert ours.encode(text) == expected, text
        expected = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ours.encode(text, bos=False, special_tokens=True) == expected, text


def test_byte_level(smollm2):
    compare(smollm2)


def test_sentencepiece(tmp_path):
    processor = SentencePieceProcessor(model_file=str(TOKENIZERS["v3"]))
    ids = range(processor.vocab_size())
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    kinds = (
        2
        if processor.is_unknown(i)
        else 3
        if processor.is_control(i)
        else 6
        if processor.is_byte(i)
        else 1
        for i in ids
    )
    writer.add_token_types(list(kinds))
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        getattr(writer, f"add_{key}")(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    compare(tmp_path / "vocabulary.gguf")

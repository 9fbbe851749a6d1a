#!/usr/bin/env python3
"""Train the demo model: a tiny Mistral on plain text files, in Hugging Face format.

    python tools/train_demo.py OUT grimms_fairy_tales.txt little_women.txt

reads UTF-8 text with one paragraph per line, trains a SentencePiece tokenizer and then the
model (transformers' MistralForCausalLM, on the CPU), and writes OUT/config.json,
OUT/model.safetensors (bfloat16) and OUT/tokenizer.model. The defaults are what the shipped
model was trained with; mistral_ext/demo/README.md records the result.

A book is split into documents (stories, chapters), each of which starts with BOS and ends with
EOS, so that the model learns to begin and to stop. Every --hold-out-every-th document of a book
is never trained on: the tokenizer does not see it either.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from transformers import MistralConfig, MistralForCausalLM

UNK, BOS, EOS = 0, 1, 2  # as in Mistral's own tokenizer


def read_documents(path: Path) -> list[str]:
    """The stories or chapters of a Project Gutenberg book, without their headings.

    Documents are parted by empty lines or by lines that begin with "CHAPTER".
    """
    text = path.read_text(encoding="utf-8")
    text = re.sub("^_+\n|_", "", text, flags=re.MULTILINE)  # rules, _emphasis_
    text = re.sub("\n? {2,}\n?", "\n", text)  # verse: its lines were joined by runs of spaces
    documents = []
    for part in re.split(r"\n{2,}|^CHAPTER .*\n", text, flags=re.MULTILINE):
        lines = itertools.dropwhile(str.isupper, part.strip().split("\n"))
        documents.append("\n".join(lines))
    return [document for document in documents if len(document) > 500]  # not a title page


def train_tokenizer(documents: list[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model with the settings of Mistral's: byte fallback (a newline is
    <0x0A>), single digits, the text's white space kept as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(d.split("\n") for d in documents),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        max_sentence_length=1 << 16,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        minloglevel=1,
    )
    return model.getvalue()


def build_model(args: argparse.Namespace) -> MistralForCausalLM:
    """A randomly initialised model with dropout on what is added to the residual stream."""
    config = MistralConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        sliding_window=args.window,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
        use_cache=True,
    )
    model = MistralForCausalLM._from_config(config, attn_implementation="sdpa")

    def drop(module, inputs, output):
        return F.dropout(output, args.dropout, training=module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def batches(tokens: torch.Tensor, length: int, batch: int) -> Iterator[torch.Tensor]:
    """Yields windows [batch, length + 1] without end. Every epoch cuts the tokens at new places."""
    while True:
        first = int(torch.randint(length, ()))
        starts = torch.arange(first, len(tokens) - length, length)
        for some in starts[torch.randperm(len(starts))].split(batch):
            yield tokens[some[:, None] + torch.arange(length + 1)]


@torch.inference_mode()
def held_out_nats(
    model: MistralForCausalLM, documents: list[list[int]], length: int = 1024
) -> float:
    """The sum of -ln p(token | the document before it) over all tokens but BOS, in eval mode.

    Long documents go through in pieces. Each piece reads again as many earlier tokens as the
    stacked sliding windows can reach back, so the sum is that of one pass over the whole document.
    """
    config = model.config
    reach = config.num_hidden_layers * (config.sliding_window - 1)
    model.eval()
    total = 0.0
    for document in documents:
        ids = torch.tensor(document)
        for start in range(0, len(ids) - 1, length):
            first = max(0, start - reach)
            logits = model(ids[None, first : min(start + length, len(ids) - 1)]).logits[0]
            targets = ids[start + 1 : start + length + 1]
            total += F.cross_entropy(logits[start - first :], targets, reduction="sum").item()
    model.train()
    return total


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < args.warmup:
        return args.lr * step / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: MistralForCausalLM, weight_decay: float) -> list[dict]:
    """The parameters in two groups: matrices, which get weight decay, and the gains of norms, which
    get none."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]


def train(
    model: MistralForCausalLM,
    tokens: torch.Tensor,
    held_out: list[list[int]],
    args: argparse.Namespace,
) -> None:
    """Train in place. Ctrl-C ends the training early, with the weights it has by then."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.98), fused=True
    )
    forward = torch.compile(model) if args.compile else model
    stream = batches(tokens, args.length, args.batch)
    n_held_out = sum(len(document) - 1 for document in held_out)
    losses: list[float] = []
    started = logged = time.perf_counter()
    model.train()
    try:
        for step in range(1, args.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            windows = next(stream)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
                logits = forward(windows[:, :-1]).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if step % args.log_every and step != args.steps:
                continue
            rate = len(losses) * args.batch * args.length / (time.perf_counter() - logged)
            nats = held_out_nats(model, held_out) / n_held_out
            logged = time.perf_counter()
            print(
                f"step {step:5d}  loss {sum(losses) / len(losses):.4f}  "
                f"held-out loss {nats:.4f}  perplexity {math.exp(nats):7.2f}  "
                f"{rate:6.0f} tokens/s  {logged - started:5.0f} s",
                flush=True,
            )
            losses.clear()
    except KeyboardInterrupt:
        print("interrupted", flush=True)


def save(model: MistralForCausalLM, tokenizer: bytes, out: Path) -> None:
    """Write the model's folder. It is written under another name first, so OUT is complete or
    absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=out.name + "."))
    try:
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)  # repeats config.json's ids
        (folder / "tokenizer.model").write_bytes(tokenizer)
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)  # some writers leave files to the owner alone
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("out", type=Path, help="folder to write; must not exist")
    add("texts", type=Path, nargs="+", help="text files, one paragraph per line")
    add("--repeat", type=int, nargs="+", default=[3, 1], help="how often an epoch reads each text")
    add("--hold-out-every", type=int, default=20)
    add("--write-held-out", type=Path, metavar="FILE", help="also write the held-out text here")
    add("--vocab-size", type=int, default=2048)
    add("--dim", type=int, default=256)
    add("--hidden-dim", type=int, default=704)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=64)
    add("--window", type=int, default=64)
    add("--length", type=int, default=256, help="tokens of one training window")
    add("--batch", type=int, default=8, help="training windows of one step")
    add("--steps", type=int, default=2500)
    add("--warmup", type=int, default=100, help="steps")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.1)
    add("--dropout", type=float, default=0.1)
    add("--autocast", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 matmuls")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    add("--log-every", type=int, default=250, help="steps")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"out: {args.out} exists already")
    if len(args.repeat) != len(args.texts):
        parser.error(f"--repeat: {len(args.repeat)} numbers for {len(args.texts)} texts")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    every = args.hold_out_every
    books = [read_documents(path) for path in args.texts]
    held_out = [document for book in books for document in book[every - 1 :: every]]
    train_books = [[d for i, d in enumerate(book, 1) if i % every] for book in books]
    if args.write_held_out:
        args.write_held_out.write_text("\n\n".join(held_out) + "\n", encoding="utf-8")

    tokenizer = train_tokenizer([d for book in train_books for d in book], args.vocab_size)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)

    def encode(documents: list[str]) -> list[list[int]]:
        return processor.encode(documents, add_bos=True, add_eos=True)

    repeated = [d for book, n in zip(train_books, args.repeat, strict=True) for d in book * n]
    ids = list(itertools.chain.from_iterable(encode(repeated)))
    held_out_ids = encode(held_out)
    model = build_model(args)
    n_held_out = sum(len(document) - 1 for document in held_out_ids)
    n_bytes = sum(len(document.encode()) for document in held_out)
    print(
        f"{model.num_parameters():,} parameters; {len(ids):,} training tokens; held out "
        f"{len(held_out)} documents, {n_held_out:,} tokens, {n_bytes:,} bytes",
        flush=True,
    )
    train(model, torch.tensor(ids), held_out_ids, args)

    save(model.to(torch.bfloat16), tokenizer, args.out)

    saved = MistralForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    nats = held_out_nats(saved, held_out_ids)
    print(
        f"as saved: held-out loss {nats / n_held_out:.4f}, perplexity "
        f"{math.exp(nats / n_held_out):.2f}, {nats / math.log(2) / n_bytes:.3f} bits per byte"
    )


if __name__ == "__main__":
    main()

"""Other engines with the same random model, for cpu.py and generate.py: transformers and llama.cpp.

    pip install transformers gguf && pip install --no-binary llama-cpp-python llama-cpp-python
    python bench/cpu.py --peers transformers,llama.cpp

An engine has a `name`, `nbytes` (of the weights that a decode step reads) and these methods:

    prompt(ids)          reads a prompt and computes the token after it, in a new sequence
    decoder(batch, ids)  reads a prompt in each of `batch` new sequences; returns a function that
                         computes the next token of each and feeds it back, greedily
    close()              lets the memory go

llama.cpp is a peer, not a dependency: it takes part if `llama_cpp` (llama-cpp-python, built here
from its source distribution, for this processor) and `gguf` can be imported. It is called through
its C API with batches of tokens, so that nothing of Python's is in its times but reading the
logits. It runs the model as architecture "llama", without the window, which prompts this short do
not fill.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from models import separated
from torch import Tensor

from mistral_ext.bench.models import step_bytes
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.weights.names import hugging_face_name

# Name -> modules that it needs.
PEERS = {"transformers": ("transformers",), "llama.cpp": ("llama_cpp", "gguf")}

# The types of files that both engines run, by llama.cpp's names. In a file of one type llama.cpp
# chooses the format of each matrix, so the formats may differ.
FILE_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS")

# Our name of the weights -> llama.cpp's. The first three are weights that this package makes.
LLAMA_CPP_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "IQ4_XS"}
LLAMA_CPP_TYPES |= {name.lower(): name for name in FILE_TYPES}


class Transformers:
    """transformers' model over the same tensors.

    Args:
        config: the configuration, which gives the shapes.
        weights: the weights in bf16, with Mistral's names.
    """

    name = "transformers"

    def __init__(self, config: MistralConfig, weights: dict[str, Tensor]):
        import transformers

        with torch.device("meta"):
            model = transformers.MistralForCausalLM(
                transformers.MistralConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.dim,
                    intermediate_size=config.hidden_dim,
                    num_hidden_layers=config.n_layers,
                    num_attention_heads=config.n_heads,
                    num_key_value_heads=config.n_kv_heads,
                    head_dim=config.head_dim,
                    rms_norm_eps=config.norm_eps,
                    sliding_window=config.sliding_window,
                    max_position_embeddings=config.max_positions,
                    rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                )
            )
        weights = separated(weights)
        state = {hugging_face_name(name): weight for name, weight in weights.items()}
        model.load_state_dict(state, assign=True)
        # The one buffer, which is no part of the state, has to be made for real.
        self._device = weights["norm.weight"].device
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(self._device)
        self.nbytes = step_bytes(Transformer(config, weights))
        self._model = model.eval()

    def prompt(self, ids: list[int]) -> None:
        self.decoder(1, ids)

    def decoder(self, batch: int, ids: list[int]) -> Callable[[], None]:
        past, tokens = None, torch.tensor([ids] * batch, device=self._device)

        @torch.inference_mode()
        def step() -> None:
            nonlocal past, tokens
            out = self._model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)

        step()
        return step

    def compiled_decoder(self, batch: int, ids: list[int]) -> Callable[[], None]:
        """Does the same as `decoder`, with a compiled model and a cache of fixed size. On a CUDA
        device it runs as a CUDA graph."""
        import transformers

        length = len(ids) + 1024
        past = transformers.StaticCache(config=self._model.config, max_cache_len=length)
        tokens = torch.tensor([ids] * batch, device=self._device)
        position = torch.arange(len(ids), device=self._device)
        forward = self._model.forward

        @torch.inference_mode()
        def step() -> None:
            nonlocal tokens, position
            out = forward(
                tokens,
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
                position_ids=position[None],
            )
            tokens, position = out.logits[:, -1:].argmax(-1), position[-1:] + 1

        step()
        forward = torch.compile(self._model.forward, mode="reduce-overhead", fullgraph=True)
        return step

    def close(self) -> None:
        self._model = None


def available() -> list[str]:
    """The peers that can be imported here."""
    return [name for name, modules in PEERS.items() if all(map(importlib.util.find_spec, modules))]


def _llama_cpp():
    """The module llama_cpp with its log turned off, which has a line for every tensor. Errors are
    not lost, as functions return them, too."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    return llama_cpp


def llama_cpp_build() -> str:
    """The instruction sets that llama.cpp was compiled for: "AVX2 AVX512 ...". The processor may
    have others."""
    info = _llama_cpp().llama_print_system_info().decode()
    return " ".join(part.split("=")[0].split(":")[-1].strip() for part in info.split("|")[:-1])


def quantize_file(source: Path, target: Path, file_type: str) -> None:
    """Has llama.cpp round a GGUF file to one of FILE_TYPES. Matrices that are quantised already are
    rounded, too."""
    llama_cpp = _llama_cpp()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = torch.get_num_threads()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.allow_requantize = True
    paths = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not make {file_type} of {source}")


class LlamaCppFiles:
    """Files with the random model in llama.cpp's format. Each is made when it is asked for.

    Args:
        config: the configuration, which gives the shapes.
        weights: the weights in bf16, with Mistral's names.
        folder: the folder where the files are kept, and where the next run finds them. None: a
            temporary folder.
    """

    def __init__(
        self, config: MistralConfig, weights: dict[str, Tensor], folder: Path | None = None
    ):
        self._config, self._weights = config, weights
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="mistral_ext-")
        self._folder = folder or Path(self._temporary.name)

    def path(self, file_type: str) -> Path:
        """The file of a type: "BF16" or one of FILE_TYPES.

        llama.cpp quantises with its defaults. With IQ4_XS, for instance, the output matrix becomes
        Q6_K.
        """
        path = self._path(file_type)
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            if file_type == "BF16":
                self._write(unfinished)
            else:
                quantize_file(self.path("BF16"), unfinished, file_type)
            unfinished.replace(path)
        return path

    def release(self, file_type: str) -> None:
        """Deletes a temporary file, because the next type needs the memory and the disk space."""
        if self._temporary:
            self._path(file_type).unlink(missing_ok=True)

    def _path(self, file_type: str) -> Path:
        return self._folder / f"{self._config.n_layers} layers.{file_type}.gguf"

    def _write(self, path: Path) -> None:
        import gguf

        config = self._config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(config.n_layers)
        writer.add_context_length(config.max_positions)
        writer.add_embedding_length(config.dim)
        writer.add_feed_forward_length(config.hidden_dim)
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.n_kv_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        writer.add_tokenizer_model("no_vocab")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
        for name, weight in self._weights.items():
            target = names.get_name(name, try_suffixes=(".weight",))
            if weight.dim() == 1:
                writer.add_tensor(target, weight.float().numpy())
            else:
                # Its query and key rows have another order, which random ones do not need.
                data = weight.view(torch.uint8).numpy()
                writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def close(self) -> None:
        if self._temporary:
            self._temporary.cleanup()


class LlamaCpp:
    """llama.cpp with one file of LlamaCppFiles, and as many threads as torch has.

    Args:
        path: the file.
        max_tokens: the most tokens of all sequences together.
        max_sequences: the most sequences of all decoders and prompts since the last call of
            `prompt`.
    """

    def __init__(self, path: Path, max_tokens: int = 2048, max_sequences: int = 16):
        from gguf import GGUFReader

        llama_cpp = _llama_cpp()

        self.name = f"llama.cpp {path.stem.rpartition('.')[2]}"
        self.nbytes = sum(
            int(t.n_bytes) for t in GGUFReader(path).tensors if t.name != "token_embd.weight"
        )
        self._lib = llama_cpp
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = max_tokens
        params.n_seq_max = max_sequences
        params.kv_unified = True  # else a sequence could have only its share of max_tokens
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._batch = llama_cpp.llama_batch_init(max_tokens, 0, 1)
        self._sequences = 0

    def prompt(self, ids: list[int]) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        self._sequences = 0
        self.decoder(1, ids)

    def decoder(self, batch: int, ids: list[int]) -> Callable[[], None]:
        first, length, new = self._sequences, 0, [ids] * batch
        self._sequences += batch

        def step() -> None:
            nonlocal length, new
            tokens = self._decode(first, length, new)
            length += len(new[0])
            new = [[token] for token in tokens]

        step()
        return step

    def _decode(self, first: int, length: int, new: list[list[int]]) -> list[int]:
        """Runs new tokens of neighbouring sequences, the same number for each. Returns the token
        that follows in each sequence.

        Args:
            first: the number of the first sequence.
            length: the number of tokens that each sequence has already.
            new: the new tokens of each sequence.
        """
        batch, at, last = self._batch, 0, []
        for sequence, ids in enumerate(new, start=first):
            for i, token in enumerate(ids):
                batch.token[at] = token
                batch.pos[at] = length + i
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                batch.logits[at] = i == len(ids) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._best(row) for row in last]

    def _best(self, row: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(logits, ctypes.c_void_p).value
        values = (ctypes.c_float * self._vocab_size).from_address(address)
        return int(torch.frombuffer(values, dtype=torch.float32).argmax())

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

"""Trains an adapter on samples."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from mistral_ext import ops
from mistral_ext.finetune.batches import Pass, passes, step_samples, steps_of_epoch
from mistral_ext.finetune.checkpoints import (
    Progress,
    base_digest,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from mistral_ext.finetune.data import digest, read_samples
from mistral_ext.finetune.interruption import Interruption
from mistral_ext.finetune.layers import TrainedAdapter, loss
from mistral_ext.finetune.metrics import Metrics, expect_tensorboard, write_plot
from mistral_ext.finetune.options import TrainingOptions
from mistral_ext.finetune.schedule import learning_rate
from mistral_ext.llm import Mistral
from mistral_ext.text.chat_template import ChatTemplate
from mistral_ext.weights.adapters import PEFT_CONFIG, PEFT_WEIGHTS, write_adapter_files
from mistral_ext.weights.new_folder import expect_free, sync_files, sync_names

_log = logging.getLogger("mistral_ext")

_SAMPLE_NAME = "being trained"  # the name of the adapter while the model writes a text with it
_PART = "adapter.part-"  # the prefix of temporary folders for the files of an adapter


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        output: the folder with the adapter.
        steps: the number of finished steps. If `patience` ended the run, they are fewer than
            planned.
        eval_loss: the lowest held-out loss, which is that of the adapter in `output`. None: there
            is no held-out data.
    """

    output: Path
    steps: int
    eval_loss: float | None


class Interrupted(KeyboardInterrupt):
    """Is raised when Ctrl-C, SIGTERM or SIGHUP has ended a run, after the run's state was saved.

    Attributes:
        checkpoint: the folder with the state, from which a Trainer with `resume=True` continues.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"interrupted; the state of the run is in {checkpoint}")
        self.checkpoint = checkpoint


class Trainer:
    """Trains a LoRA adapter for a model. The model's own weights, in whatever format, do not
    change.

    The constructor checks all input, before `train` begins. `output` becomes a folder with the
    adapter in peft's format, which `Mistral.load_adapter` and peft load; metrics.jsonl, with the
    metrics of each step; loss.png, if matplotlib is installed; and the newest checkpoint. With
    held-out data the adapter is that of the evaluation with the lowest loss. Without such data it
    is that of the last step.

    On the CPU an interrupted and resumed run makes the same adapter, bit for bit, as an
    uninterrupted run with the same number of threads.

    Args:
        llm: the model, in bfloat16 or float32.
        data: the training data (see `mistral_ext.finetune.data`).
        output: the folder of the run. A new run makes it, or takes an empty one.
        eval_data: held-out data of the same form. None: there is no held-out data.
        resume: whether to continue from the newest checkpoint in `output`. The model, the data and
            the options that change the adapter must be the same.
        progress: show a progress bar if stderr is a terminal.
        template: how conversations are written. None: in the model's own chat template, which a
            base model does not have. An adapter that was trained with another template needs it
            in chats, too.
        options: the fields of `TrainingOptions`.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, TypeError, ImportError: a file or an option
            is wrong or missing. The message names the file and line, or the option.
    """

    def __init__(
        self,
        llm: Mistral,
        data: str | Path,
        output: str | Path,
        eval_data: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        template: ChatTemplate | None = None,
        **options: Any,
    ) -> None:
        self.options = TrainingOptions(**options)
        self.output = Path(output).expanduser()
        self._llm = llm
        self._model = llm.model
        self._show_progress = progress
        llm.expect_writer()
        if self._model.dtype == torch.float16:
            raise ValueError("dtype is float16, whose gradients vanish: expected bfloat16, float32")
        if self.options.patience is not None and eval_data is None:
            raise ValueError(
                f"patience is {self.options.patience}, expected None without eval_data"
            )
        if self.options.tensorboard:
            expect_tensorboard()
        if not resume:
            expect_free(self.output)
        most = self.options.tokens_per_pass
        self._samples = read_samples(data, llm, most, template)
        held_out = []
        if eval_data is not None:
            held_out = read_samples(eval_data, llm, most, template)
        self._eval_passes = passes(held_out, most)
        self._sample_prompt = (held_out or self._samples)[0].prompt
        self._adapter = TrainedAdapter.new(
            llm.config,
            self.options.rank,
            self.options.scale,
            self.options.targets,
            self.options.seed,
            self._model.device,
        )
        self._optimizer = torch.optim.AdamW(
            self._adapter.parameters.values(),
            betas=self.options.betas,
            weight_decay=self.options.weight_decay,
        )
        self._progress = Progress()
        # A resumed run must share these values with its beginning.
        self._run = {
            **self.options.what_is_learned(),
            "base": base_digest(self._model),
            "data": digest(self._samples),
            "eval_data": digest(held_out),
            "dtype": str(self._model.dtype),
        }
        if resume:
            self._resume()

    @property
    def steps(self) -> int:
        """The number of steps of the whole run, if `patience` does not end it earlier."""
        most = self.options.max_steps
        planned = self.options.epochs * self._steps_of_epoch
        return planned if most is None else min(most, planned)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def train(self) -> TrainingResult:
        """Trains until the run ends.

        Raises:
            Interrupted: Ctrl-C, SIGTERM or SIGHUP came. The state was saved first.
            RuntimeError: a loss, a gradient or a logit is not finite. The last checkpoint is kept.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        for left in self.output.glob(f"{_PART}*"):  # a run that was killed has left it
            shutil.rmtree(left)
        progress = self._progress
        disable = None if self._show_progress else True
        with (
            _exact_products(),
            Interruption() as interruption,
            Metrics(
                self.output, progress.step, progress.evaluated, self.options.tensorboard
            ) as metrics,
            tqdm(total=self.steps, initial=progress.step, unit="steps", disable=disable) as bar,
        ):
            try:
                while self._goes_on(metrics, interruption):
                    values = self._step(interruption)
                    progress.step += 1
                    metrics.add(progress.step, **values)
                    bar.update()
                    bar.set_postfix(loss=f"{values['loss']:.3f}")
            except _Stop:
                raise Interrupted(self._save()) from None
        if not self._eval_passes:
            self._write_adapter()
        if write_plot(self.output) is None:
            _log.warning("no plot of the losses: pip install 'mistral_ext[plot]'")
        return TrainingResult(self.output, progress.step, progress.best_loss)

    @property
    def _steps_of_epoch(self) -> int:
        return steps_of_epoch(len(self._samples), self.options.batch_size)

    def _is_due(self, every: int | None) -> bool:
        step = self._progress.step
        return step % (every or self._steps_of_epoch) == 0 or step == self.steps

    def _goes_on(self, metrics: Metrics, interruption: Interruption) -> bool:
        """Evaluates, and saves a checkpoint, if either is due. Returns whether another step
        follows."""
        progress, options = self._progress, self.options
        if self._is_due(options.eval_every) and progress.evaluated < progress.step:
            self._evaluate(metrics, interruption)
        ended = progress.step == self.steps or (
            options.patience is not None and progress.without_gain >= options.patience
        )
        if ended or (progress.step and self._is_due(options.checkpoint_every)):
            self._save()
        return not ended

    def _step(self, interruption: Interruption) -> dict[str, float]:
        """Makes one step of the optimiser, and returns its metrics."""
        begin = time.perf_counter()
        options, step = self.options, self._progress.step
        chosen = step_samples(len(self._samples), options.batch_size, step, options.seed)
        samples = [self._samples[i] for i in chosen]
        # The loss is the mean over all tokens of the step. A mean over the passes would give more
        # weight to tokens in passes with few tokens.
        total = math.fsum(sample.weights.sum(dtype=torch.float64).item() for sample in samples)
        summed, tokens = 0.0, 0
        self._optimizer.zero_grad()
        for batch in _until(interruption, passes(samples, options.tokens_per_pass)):
            value = loss(self._model, self._adapter, batch.to(self._model.device))
            (value / total).backward()
            summed += value.item()
            tokens += len(batch.token_ids)
        norm = torch.nn.utils.clip_grad_norm_(
            self._adapter.parameters.values(), options.max_grad_norm or math.inf
        ).item()
        if not (math.isfinite(summed) and math.isfinite(norm)):
            raise RuntimeError(
                f"the loss is {summed / total:g} and the length of its gradient {norm:g} in step "
                f"{step + 1}, expected finite numbers: try a lower learning_rate than "
                f"{options.learning_rate:g}"
            )
        rate = learning_rate(step, self.steps, self._warmup_steps, options.learning_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return {
            "loss": summed / total,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_second": tokens / (time.perf_counter() - begin),
        }

    @property
    def _warmup_steps(self) -> int:
        return math.ceil(self.options.warmup * self.steps)

    def _evaluate(self, metrics: Metrics, interruption: Interruption) -> None:
        """Measures the held-out loss, writes the adapter to the output if its loss is the lowest so
        far, and lets the model write a text."""
        progress = self._progress
        if self._eval_passes:
            value = self._eval_loss(interruption)
            if not math.isfinite(value):
                raise RuntimeError(
                    f"the held-out loss is {value:g} after step {progress.step}, expected a finite "
                    f"number: try a lower learning_rate than {self.options.learning_rate:g}"
                )
            metrics.add(progress.step, eval_loss=value)
            _log.info("step %d: held-out loss %.4f", progress.step, value)
            if progress.step and (progress.best_loss is None or value < progress.best_loss):
                self._write_adapter()
                progress.best_loss, progress.without_gain = value, 0
            elif progress.step:
                progress.without_gain += 1
        if self.options.sample_tokens:
            try:
                text = self._sample_text()
            except ValueError as error:  # the engine raises it if logits are NaN
                if not progress.step:
                    raise
                raise RuntimeError(
                    f"the model cannot write a text after step {progress.step} ({error}): try a "
                    f"lower learning_rate than {self.options.learning_rate:g}"
                ) from error
            metrics.add(progress.step, sample=text)
            _log.info("step %d: %s", progress.step, text)
        progress.evaluated = progress.step

    @torch.no_grad()
    def _eval_loss(self, interruption: Interruption) -> float:
        """The mean loss over the tokens of the held-out data."""
        values = [
            loss(self._model, self._adapter, batch.to(self._model.device)).item()
            for batch in _until(interruption, self._eval_passes)
        ]
        weights = (batch.weights.sum(dtype=torch.float64).item() for batch in self._eval_passes)
        return math.fsum(values) / math.fsum(weights)

    def _sample_text(self) -> str:
        """The text that the model with the adapter writes after the prompt of the first sample."""
        self._llm.load_adapter(self._adapter.low_ranks(), _SAMPLE_NAME)
        try:
            (completion,) = self._writer().generate(
                self._sample_prompt, adapter=_SAMPLE_NAME, max_tokens=self.options.sample_tokens
            )
        finally:
            self._llm.unload_adapter(_SAMPLE_NAME)
        return completion.text or ""

    def _writer(self) -> Mistral:
        """Returns the model with a new, small cache, which is freed when the text is written. The
        model's usual cache would keep memory that training needs."""
        llm = self._llm
        writer = Mistral(
            llm.config,
            llm.model,
            llm.tokenizer,
            llm.folder,
            max_batch=1,
            cache_tokens=len(self._sample_prompt) + self.options.sample_tokens,
            sampling_defaults=llm.sampling_defaults,
        )
        # Both use one table of adapters. With a table each, two adapters could get the same slot in
        # the model's stacks of matrices (engine/adapters.py).
        writer.adapters = llm.adapters
        return writer

    def _write_adapter(self) -> None:
        """Writes the current adapter to the output, and replaces an earlier adapter."""
        with TemporaryDirectory(prefix=_PART, dir=self.output) as folder:
            write_adapter_files(Path(folder), self._adapter.low_ranks(), str(self._llm.folder))
            sync_files(Path(folder))
            # The configuration comes last: without it the folder does not count as an adapter.
            for name in (PEFT_WEIGHTS, PEFT_CONFIG):
                os.replace(Path(folder, name), self.output / name)
        sync_names(self.output)

    def _save(self) -> Path:
        return write_checkpoint(
            self.output,
            self._progress,
            self._run,
            self._adapter,
            self._optimizer,
            str(self._llm.folder),
        )

    def _resume(self) -> None:
        newest = newest_checkpoint(self.output)
        if newest is None:
            raise FileNotFoundError(
                f"no checkpoint in {str(self.output)!r}, expected one to resume"
            )
        self._progress = read_checkpoint(
            newest, self._run, self._llm.config, self._adapter, self._optimizer
        )


@contextmanager
def _exact_products() -> Iterator[None]:
    """In this block the products of weights and activations do not round the activations, because
    rounding has no gradient."""
    before = ops.exact_products()
    ops.set_exact_products(True)
    try:
        yield
    finally:
        ops.set_exact_products(before)


class _Stop(Exception):
    """Is raised if a signal has asked the run to end."""


def _until(interruption: Interruption, batches: Iterable[Pass]) -> Iterator[Pass]:
    """Yields the passes of a step. After a signal, raises _Stop before the next pass."""
    for batch in batches:
        if interruption.requested:
            raise _Stop
        yield batch

"""The one supervised loop: transformers' Trainer on a PEFT adapter. Penalty term and adapter are arguments.

The loaded model is given back as it came: the result is the adapter on disk. Seeded; a task that is killed and resumed
(`TrainingConfig.save_steps`) ends with the same bytes.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainingArguments, set_seed

from holdfast.checkpoints.adapter import CONFIG_FILE
from holdfast.checkpoints.adapter_config import settle_adapter_config
from holdfast.data.types import Sample
from holdfast.errors import DataError, TrainingError
from holdfast.files import full_disk_errors, require_space
from holdfast.models.encode import encode_training
from holdfast.models.families import editable_linears
from holdfast.models.loaded import LoadedModel
from holdfast.models.precision import cpu_has_bf16
from holdfast.models.settings import quiet_transformers
from holdfast.models.shards import is_sharded
from holdfast.share import current
from holdfast.training.dealt import DealtBatches, deal
from holdfast.training.trackers import trackers
from holdfast.training.trainer import (
    COMPLETE,
    WAY_OUT,
    Encode,
    Extras,
    Penalty,
    PenaltyMean,
    Samples,
    StreamTrainer,
    Watch,
    last_state,
)
from holdfast.training.training_config import TrainingConfig

MEASURED = 256  # samples whose length is measured before a task


AdapterFactory = Callable[[LoadedModel, TrainingConfig], PeftModel]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """adapter: PEFT folder. history: what was logged, oldest first (step, loss, learning rate, gradient norm)."""

    adapter: Path
    steps: int
    samples: int
    cut: int  # forward passes over a sample that was cut at max_length
    precision: str  # of the forward pass: what "auto" came to
    seconds: float
    history: tuple[Mapping[str, float], ...]


def lora_adapter(loaded: LoadedModel, config: TrainingConfig, blocks: Collection[int] | None = None) -> PeftModel:
    """A fresh LoRA on every linear layer of the language model's blocks; its factors are fp32.

    blocks: 0-based indices of those that are tuned; None: all.
    """
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        lora_dropout=config.dropout,
        target_modules=list(editable_linears(loaded.model, blocks)),
        bias="none",
    )
    with quiet_peft():
        return get_peft_model(loaded.model, lora)  # type: ignore[return-value]


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that PEFT 0.21 asks transformers 5.23 for an attribute that was renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def train(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    config: TrainingConfig,
    *,
    work_dir: Path,
    seed: int,
    out: Path | None = None,
    penalty: Penalty | None = None,
    penalty_mean: PenaltyMean = "samples",
    adapter: AdapterFactory = lora_adapter,
    extras: Extras | None = None,
    progress: Callable[..., None] | None = None,
) -> TrainResult:
    """Tune an adapter on `samples` and save it into `out` (default: `work_dir / "adapter"`), in one rename.

    Several processes (`holdfast.share.current`) learn together: each batch is dealt out over them, gradients are
    averaged, and the first of them writes. With dropout, each draws its own.

    work_dir: the trainer's state lives here while the task runs; called again after a kill, training goes on from it.
    seed: decides initial factors, order and dropout.
    penalty_mean: what the penalty's value of one forward pass is a mean over; decides its share in an optimizer step.
    adapter: makes what is trained (anything with PEFT's `save_pretrained` and `unload`). extras: see `Extras`.
    progress: called with ("train", done=, total=, loss=) after each optimizer step.

    Raises: DataError: no samples, or one that cannot be encoded. ConfigError: batch_size is no multiple of the number
        of processes. TrainingError: the loss or a gradient is not finite (names the step and the last good state), or
        nothing is trainable. StorageError: the disk is full, or has no
        room for the trainer's state.
    """
    if not samples:
        raise DataError("The training split is empty; expected at least one sample.")
    out = out or work_dir / "adapter"
    started = time.perf_counter()
    share = current()
    dealt = deal(len(samples), config, share, seed)
    share.by_chief(lambda: last_state(work_dir / "trainer"))  # halves go, before anybody looks
    if config.max_length is not None and last_state(work_dir / "trainer") is None:
        refuse_cuts(loaded, samples, config.max_length, config.max_cut_share)
    total = total_steps(len(samples), config)
    precision = resolve_precision(loaded.device, config.precision)
    # Before the adapter: its initial factors are drawn from the global generator.
    set_seed(seed)
    wrapped = adapter(loaded, config)
    encode = Encode(loaded, config.max_length, extras)
    watch = Watch(total, progress, fp16=precision == "fp16", share=share, seed=seed)
    try:
        if not any(p.requires_grad for p in wrapped.parameters()):
            raise TrainingError(f"The adapter of {loaded.name} has no trainable parameter; nothing would be learned.")
        with (
            quiet_transformers(),
            _checkpointing(loaded.model, config.gradient_checkpointing),
            _plain_attention(loaded, precision),
        ):
            trainer = StreamTrainer(
                model=wrapped,
                args=_arguments(loaded, config, work_dir / "trainer", seed, total, precision, dealt),
                train_dataset=Samples(samples),
                data_collator=encode,
                callbacks=[watch],
                penalty=penalty,
                penalty_mean=penalty_mean,
                watch=watch,
                dealt=dealt,
                sharded=is_sharded(loaded.model),
            )
            trainer.remove_callback(PrinterCallback)
            if config.save_steps is not None:
                require_space(work_dir, _state_bytes(wrapped), "The trainer's state (`save_steps`)")
            state = last_state(work_dir / "trainer")
            # Of all processes, so one of them goes on counting from it.
            watch.cut = int((Path(state) / COMPLETE).read_text() or 0) if state is not None and share.chief else 0
            with full_disk_errors(work_dir / "trainer"):
                trainer.train(resume_from_checkpoint=state)
            _check_finite(wrapped, total)
        with full_disk_errors(out):
            share.by_chief(lambda: _publish(wrapped, out))
        history = tuple({k: float(v) for k, v in row.items()} for row in trainer.state.log_history if "loss" in row)
    finally:
        wrapped.unload()
        loaded.model.eval()
        loaded.model.requires_grad_(False)
        # The trainer turns the cache off, and without it every later answer costs a forward pass over its whole prefix.
        loaded.model.config.use_cache = True
    share.by_chief(lambda: shutil.rmtree(work_dir / "trainer", ignore_errors=True))
    return TrainResult(
        adapter=out,
        steps=total,
        samples=len(samples),
        cut=share.total(watch.cut),
        precision=precision,
        seconds=time.perf_counter() - started,
        history=history,
    )


def refuse_cuts(loaded: LoadedModel, samples: Sequence[Sample], max_length: int, max_share: float) -> None:
    """Raises DataError where more than `max_share` of the samples, and more than one, are longer than `max_length`."""
    some = evenly(samples, MEASURED)
    lengths = [encode_training(loaded, [s], cut_at=max_length)["input_ids"].shape[1] for s in some]
    long = sorted(length for length in lengths if length > max_length)
    if len(long) > 1 and len(long) > max_share * len(some):
        drawn = "" if len(some) == len(samples) else f" of an even draw from {len(samples)}"
        raise DataError(
            f"max_length {max_length} would cut {len(long)} of {len(some)} samples{drawn} ({_percent(long, some)}; "
            f"half of the cut ones are longer than {long[len(long) // 2]} tokens, the longest is {long[-1]}): the ends "
            f"of their answers would not be learned. Raise max_length, drop the long samples, or allow it with "
            f"max_cut_share (now {max_share:g})."
        )


def evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, evenly spread, the first and the last among them."""
    if len(samples) <= count:
        return list(samples)
    return [samples[round(i * (len(samples) - 1) / (count - 1))] for i in range(count)]


def _percent(part: Sequence[Any], whole: Sequence[Any]) -> str:
    return f"{100 * len(part) / len(whole):.0f} %"


def resolve_precision(device: torch.device, precision: str) -> str:
    """`precision`, or what "auto" comes to: bf16 on a device with instructions for it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    # Without such instructions a CPU emulates bf16, many times slower than fp32.
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


@contextmanager
def _plain_attention(loaded: LoadedModel, precision: str) -> Iterator[None]:
    """On a CPU, train in bf16 with attention spelled out: the fused kernel's backward pass is up to twice as slow."""
    usual = loaded.model.config._attn_implementation
    if loaded.device.type != "cpu" or precision != "bf16" or usual != "sdpa":
        yield
        return
    loaded.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        loaded.model.set_attn_implementation(usual)


def _arguments(
    loaded: LoadedModel,
    config: TrainingConfig,
    folder: Path,
    seed: int,
    total: int,
    precision: str,
    dealt: DealtBatches | None,
) -> TrainingArguments:
    on_accelerator = loaded.device.type != "cpu"
    forward_size = dealt.forward_size if dealt is not None else config.forward_size
    passes = dealt.passes if dealt is not None else config.batch_size // config.forward_size
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=forward_size,
        gradient_accumulation_steps=passes,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=math.ceil(config.warmup_ratio * total),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=seed,
        full_determinism=config.deterministic,
        use_cpu=not on_accelerator,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=max(1, total // 100),
        logging_nan_inf_filter=False,
        report_to=trackers() or "none",
        run_name="/".join(folder.parts[-3:]),
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=on_accelerator,
        ddp_find_unused_parameters=False,  # every trained tensor takes part in every pass
    )
    # One process, one device: with several in sight the trainer would deal every batch out over all of them in silence.
    if made.n_gpu > 1:
        made._n_gpu = 1
    return made


def total_steps(count: int, config: TrainingConfig) -> int:
    """Optimizer steps of the task; a last, smaller batch of an epoch counts."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * math.ceil(count / config.batch_size)))


def _state_bytes(wrapped: PeftModel) -> int:
    """Bytes of two saved states: the old one goes when the new one is whole. Weights, and two moments in fp32."""
    return 2 * sum(p.numel() * (p.element_size() + 8) for p in wrapped.parameters() if p.requires_grad)


def _publish(wrapped: PeftModel, out: Path) -> None:
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    wrapped.save_pretrained(str(temporary))
    # A tuner's folder has none, or settles those within itself.
    if (temporary / CONFIG_FILE).is_file():
        settle_adapter_config(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)


def _check_finite(wrapped: PeftModel, total: int) -> None:
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise TrainingError(
                f"{name} holds values that are not finite after step {total}. The checkpoint that the task started "
                f"from is untouched. {WAY_OUT}"
            )


class _checkpointing:  # noqa: N801 (a context manager, used as a function)
    """Recompute activations in the backward pass within the block."""

    def __init__(self, model: Any, enabled: bool) -> None:
        self.model, self.enabled = model, enabled

    def __enter__(self) -> None:
        if not self.enabled:
            return
        kwargs = {"use_reentrant": False}  # the reentrant kind needs inputs that require gradients; LoRA's do not
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def __exit__(self, *exc: object) -> None:
        if not self.enabled:
            return
        if hasattr(self.model, "activation_checkpointing_disable"):
            self.model.activation_checkpointing_disable()
        else:
            self.model.gradient_checkpointing_disable()

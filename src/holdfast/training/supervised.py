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
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from holdfast.checkpoints.adapter import CONFIG_FILE
from holdfast.checkpoints.adapter_config import settle_adapter_config
from holdfast.data.images import current_pictures, pictures
from holdfast.data.types import Sample
from holdfast.errors import DataError, TrainingError
from holdfast.files import full_disk_errors, require_space
from holdfast.models.encode import IGNORED_LABEL, encode_training
from holdfast.models.families import editable_linears
from holdfast.models.loaded import LoadedModel
from holdfast.models.precision import cpu_has_bf16
from holdfast.models.settings import quiet_transformers
from holdfast.models.shards import is_sharded
from holdfast.share import Share, current
from holdfast.training.dealt import DealtBatches, deal
from holdfast.training.trackers import trackers
from holdfast.training.training_config import TrainingConfig

_COMPLETE = "complete"  # mark in a trainer's state folder: written last, so a half-written state is never resumed


_CUT = "holdfast_cut"  # in a batch: how many of its samples were cut
MEASURED = 256  # samples whose length is measured before a task


class Penalty(Protocol):
    """A term added to the loss of each forward pass: the model being trained, its inputs and its outputs -> scalar.

    The scalar is a mean over the pass's samples or its target tokens (`PenaltyMean`), or depends on neither.
    """

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor: ...


PenaltyMean = Literal["samples", "tokens"]
AdapterFactory = Callable[[LoadedModel, TrainingConfig], PeftModel]
# Tensors that travel to the model with a batch's encoded samples, by the names that its forward pass takes.
Extras = Callable[[Sequence[Sample]], Mapping[str, Tensor]]


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
    share.by_chief(lambda: _last_state(work_dir / "trainer"))  # halves go, before anybody looks
    if config.max_length is not None and _last_state(work_dir / "trainer") is None:
        refuse_cuts(loaded, samples, config.max_length, config.max_cut_share)
    total = total_steps(len(samples), config)
    precision = resolve_precision(loaded.device, config.precision)
    # Before the adapter: its initial factors are drawn from the global generator.
    set_seed(seed)
    wrapped = adapter(loaded, config)
    encode = _Encode(loaded, config.max_length, extras)
    watch = _Watch(total, progress, fp16=precision == "fp16", share=share, seed=seed)
    try:
        if not any(p.requires_grad for p in wrapped.parameters()):
            raise TrainingError(f"The adapter of {loaded.name} has no trainable parameter; nothing would be learned.")
        with (
            quiet_transformers(),
            _checkpointing(loaded.model, config.gradient_checkpointing),
            _plain_attention(loaded, precision),
        ):
            trainer = _Trainer(
                model=wrapped,
                args=_arguments(loaded, config, work_dir / "trainer", seed, total, precision, dealt),
                train_dataset=_Samples(samples),
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
            state = _last_state(work_dir / "trainer")
            # Of all processes, so one of them goes on counting from it.
            watch.cut = int((Path(state) / _COMPLETE).read_text() or 0) if state is not None and share.chief else 0
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


class _Samples(Dataset):
    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample | _Idle:
        # A process whose part of a batch is smaller than the others' has nothing to learn from the last of them.
        return self.samples[index] if index >= 0 else _Idle(self.samples[-1 - index])


@dataclass(frozen=True)
class _Idle:
    """A sample that is only there so that all processes run as many forward passes."""

    sample: Sample


class _Encode:
    """Collator: samples -> padded inputs with labels, cut at `max_length` tokens."""

    def __init__(self, loaded: LoadedModel, max_length: int | None, extras: Extras | None = None) -> None:
        self.loaded, self.max_length, self.extras = loaded, max_length, extras
        self._pictures = current_pictures()  # a loader's worker starts without it where processes are not forked

    def __call__(self, items: Sequence[Sample | _Idle]) -> dict[str, Tensor]:
        samples = [item.sample if isinstance(item, _Idle) else item for item in items]
        with pictures(self._pictures):
            inputs, cut = self._encoded(samples)
            if isinstance(items[0], _Idle):
                inputs["labels"], cut = torch.full_like(inputs["labels"], IGNORED_LABEL), 0
            # With the batch, because this object is a copy in each of a loader's workers.
            return {**inputs, **(self.extras(samples) if self.extras else {}), _CUT: torch.tensor([cut])}

    def _encoded(self, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], int]:
        inputs = encode_training(self.loaded, samples, cut_at=self.max_length)
        length = inputs["input_ids"].shape[1]
        if self.max_length is None or length <= self.max_length:
            return inputs, 0
        kept = {
            k: v[:, : self.max_length] if v.shape[:2] == inputs["input_ids"].shape else v for k, v in inputs.items()
        }
        images, cut = torch.tensor(sorted(self.loaded.image_token_ids)), 0
        for row, sample in enumerate(samples):
            lost = inputs["input_ids"][row, self.max_length :]
            tokens = int(inputs["attention_mask"][row].sum())
            cut += int(tokens > self.max_length)
            if torch.isin(lost, images).any() or not (kept["labels"][row] != IGNORED_LABEL).any():
                raise DataError(
                    f"Sample {sample.id!r} is {tokens} tokens long and max_length {self.max_length} would cut into its "
                    "images or remove its whole answer. Raise max_length, or drop the sample."
                )
        return kept, cut


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


class _Trainer(Trainer):
    """One loss for every family, the penalty, a stop at a loss that is not finite, no book-keeping of operations.

    The loss of an optimizer step is the mean over all its target tokens, however they fall into forward passes and
    processes. The trainer leaves that to models whose class takes its token count, and gives the others (Qwen2.5-VL,
    Qwen3-VL, GLM-4V, ...) the mean of the passes' means: short answers would count for more.
    """

    def __init__(
        self,
        *args: Any,
        penalty: Penalty | None,
        penalty_mean: PenaltyMean,
        watch: _Watch,
        dealt: DealtBatches | None,
        sharded: bool,
        **kwargs: Any,
    ) -> None:
        self._sharded = sharded
        super().__init__(*args, **kwargs)
        self._penalty, self._penalty_mean, self._watch, self._dealt = penalty, penalty_mean, watch, dealt
        self._samples = 0.0  # of the optimizer step, the mean over the processes
        # Whoever shares the base out has placed it; not DDP but `_sync_replicated_trainable_parameters` is then asked.
        self.is_distributed_loading_by_transformers = sharded
        # The trainer then counts the step's targets over its passes and processes, and divides the loss no further.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader:
        if self._dealt is None:
            return super().get_train_dataloader()
        return _DealtLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self._dealt,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self._sharded:
            super()._move_model_to_device(model, device)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        # Every process has drawn the same values from the same seed. transformers' own asks for a mean, which gloo
        # does not have.
        def average(parameter: Tensor) -> None:
            if self.accelerator.sync_gradients:
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.accelerator.num_processes

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(average)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        learned = sum(len(batch["labels"]) for batch in batches if self._dealt is None or not _is_idle(batch))
        self._samples = self._watch.share.total(learned) / self._watch.share.world
        self._watch.cut += sum(int(batch.pop(_CUT)) for batch in batches)
        return batches, count

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._dealt is not None and _is_idle(inputs):
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = outputs["logits"].float().sum() * 0.0  # a gradient of zeros, for the others to add
            return (loss, outputs) if return_outputs else loss
        outputs = model(**inputs)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        of_tokens = of_samples = 1.0  # this pass's share of the optimizer step
        if num_items_in_batch is not None:
            targets = (inputs["labels"][..., 1:] != IGNORED_LABEL).sum()
            # Processes average their gradients, and the count is over all of them.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            of_tokens = targets * processes / num_items_in_batch
            of_samples = len(inputs["labels"]) / self._samples
        # Stock models give the mean over a pass's own targets.
        loss = loss * of_tokens
        if self._penalty is not None:
            share = of_tokens if self._penalty_mean == "tokens" else of_samples
            learner = model if self._dealt is None else self.accelerator.unwrap_model(model)
            loss = loss + self._penalty(learner, inputs, outputs) * share
        # One of several processes must not leave the others waiting: all of them meet it in the gradient.
        if self._dealt is None and not torch.isfinite(loss):
            raise _not_finite("loss", float(loss.detach()), self.state.global_step + 1, self.state.max_steps, self.args)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        # Walks over all parameters at every pass; nobody reads it.
        del inputs
        return 0


class _DealtLoader(DataLoader):
    """A loader that passes the number of the epoch on to its batch sampler, as accelerate's own do."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _is_idle(inputs: Mapping[str, Tensor]) -> bool:
    return not bool((inputs["labels"] != IGNORED_LABEL).any())


class _Watch(TrainerCallback):
    """Progress, gradients that are not finite, and the mark that a saved state is whole."""

    def __init__(
        self, total: int, progress: Callable[..., None] | None, *, fp16: bool, share: Share, seed: int
    ) -> None:
        self.total, self.progress, self.fp16, self.share, self.seed = total, progress, fp16, share, seed
        self.cut = 0  # samples that were cut, over all passes
        self.trained: list[nn.Parameter] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Once: a walk over all modules at every step costs a small model a tenth of its time.
        self.trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        if self.share.rank:
            torch.manual_seed(self.seed + 1_000_003 * self.share.rank)  # dropout of its own

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.fp16:
            return  # the loss scaler meets infinite gradients on purpose and skips the step
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise _not_finite("gradient", float(norm), state.global_step + 1, self.total, args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress("train", done=state.global_step, total=self.total)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        cut = self.share.total(self.cut)  # returns when every process has saved its part
        if self.share.chief:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).write_text(str(cut))


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


def _last_state(folder: Path) -> str | None:
    """The newest whole state of a trainer, or None to start from the beginning; halves are removed."""
    states = [p for p in folder.glob("checkpoint-*") if p.is_dir()] if folder.is_dir() else []
    for state in states:
        if not (state / _COMPLETE).exists():
            shutil.rmtree(state)
    whole = [p for p in states if p.exists()]
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def _publish(wrapped: PeftModel, out: Path) -> None:
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    wrapped.save_pretrained(str(temporary))
    # CRAM's experts settle theirs themselves.
    if (temporary / CONFIG_FILE).is_file():
        settle_adapter_config(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)


_WAY_OUT = (
    "Lower learning_rate in the run file and repeat the command: the task starts again with it. A longer warm-up goes "
    "under another label of `methods` (`gentle: {method: ..., training: {...}}`), or into another --out."
)


def _check_finite(wrapped: PeftModel, total: int) -> None:
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise TrainingError(
                f"{name} holds values that are not finite after step {total}. The checkpoint that the task started "
                f"from is untouched. {_WAY_OUT}"
            )


def _not_finite(what: str, value: float, step: int, total: int, args: TrainingArguments) -> TrainingError:
    state = _last_state(Path(str(args.output_dir)))
    saved = f" The trainer's last finite state, where the trouble may have begun already, is {state}." if state else ""
    return TrainingError(
        f"The {what} is {value} at step {step} of {total}; training stopped before it was applied (learning_rate "
        f"{args.learning_rate:g}). Last good state: the checkpoint that this task started from.{saved} Look for a "
        f"damaged sample, or tune more gently. {_WAY_OUT}"
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

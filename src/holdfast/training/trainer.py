"""transformers' Trainer as every method is tuned with it: its batches, its loss with a penalty, and its stops."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from holdfast.data.images import current_pictures, pictures
from holdfast.data.types import Sample
from holdfast.errors import TrainingError
from holdfast.models.encode import IGNORED_LABEL, encode_cut
from holdfast.models.loaded import LoadedModel
from holdfast.share import Share
from holdfast.training.dealt import DealtBatches

COMPLETE = "complete"  # mark in a trainer's state folder: written last, so a half-written state is never resumed
_CUT = "holdfast_cut"  # in a batch: how many of its samples were cut
PenaltyMean = Literal["samples", "tokens"]
# Tensors that travel to the model with a batch's encoded samples, by the names that its forward pass takes.
Extras = Callable[[Sequence[Sample]], Mapping[str, Tensor]]
WAY_OUT = (
    "Lower learning_rate in the run file and repeat the command: the task starts again with it. A longer warm-up goes "
    "under another label of `methods` (`gentle: {method: ..., training: {...}}`), or into another --out."
)


class Penalty(Protocol):
    """A term added to the loss of each forward pass: the model being trained, its inputs and its outputs -> scalar.

    The scalar is a mean over the pass's samples or its target tokens (`PenaltyMean`), or depends on neither.
    """

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor: ...


class Samples(Dataset):
    """The samples of a task by index; below 0 an idle one (`DealtBatches`)."""

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


class Encode:
    """Collator: samples -> padded inputs with labels, cut at `max_length` tokens."""

    def __init__(self, loaded: LoadedModel, max_length: int | None, extras: Extras | None = None) -> None:
        self.loaded, self.max_length, self.extras = loaded, max_length, extras
        self._pictures = current_pictures()  # a loader's worker starts without it where processes are not forked

    def __call__(self, items: Sequence[Sample | _Idle]) -> dict[str, Tensor]:
        samples = [item.sample if isinstance(item, _Idle) else item for item in items]
        with pictures(self._pictures):
            inputs, cut = encode_cut(self.loaded, samples, self.max_length)
            if isinstance(items[0], _Idle):
                inputs["labels"], cut = torch.full_like(inputs["labels"], IGNORED_LABEL), 0
            # With the batch, because this object is a copy in each of a loader's workers.
            return {**inputs, **(self.extras(samples) if self.extras else {}), _CUT: torch.tensor([cut])}


class StreamTrainer(Trainer):
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
        watch: Watch,
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
        """As dealt to the processes, where there are several."""
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
        """A step's batches, and the count of samples of this step for the penalty's mean."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        learned = sum(len(batch["labels"]) for batch in batches if self._dealt is None or not _is_idle(batch))
        self._samples = self._watch.share.total(learned) / self._watch.share.world
        self._watch.cut += sum(int(batch.pop(_CUT)) for batch in batches)
        return batches, count

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This pass's part of the step's loss and penalty. Raises: TrainingError: it is not finite."""
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
        """0: to count them walks over all parameters at every pass, and nobody reads it."""
        del inputs
        return 0


class _DealtLoader(DataLoader):
    """A loader that passes the number of the epoch on to its batch sampler, as accelerate's own do."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _is_idle(inputs: Mapping[str, Tensor]) -> bool:
    return not bool((inputs["labels"] != IGNORED_LABEL).any())


class Watch(TrainerCallback):
    """Progress, gradients that are not finite, and the mark that a saved state is whole."""

    def __init__(
        self, total: int, progress: Callable[..., None] | None, *, fp16: bool, share: Share, seed: int
    ) -> None:
        self.total, self.progress, self.fp16, self.share, self.seed = total, progress, fp16, share, seed
        self.cut = 0  # samples that were cut, over all passes
        self.trained: list[nn.Parameter] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Which parameters are trained, and a dropout of its own for each process."""
        # Once: a walk over all modules at every step costs a small model a tenth of its time.
        self.trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        if self.share.rank:
            torch.manual_seed(self.seed + 1_000_003 * self.share.rank)  # dropout of its own

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises: TrainingError: the gradient is not finite."""
        if self.fp16:
            return  # the loss scaler meets infinite gradients on purpose and skips the step
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise _not_finite("gradient", float(norm), state.global_step + 1, self.total, args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more."""
        if self.progress is not None:
            self.progress("train", done=state.global_step, total=self.total)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Marks the saved state as whole, when every process has saved its part."""
        cut = self.share.total(self.cut)  # returns when every process has saved its part
        if self.share.chief:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).write_text(str(cut))


def last_state(folder: Path) -> str | None:
    """The newest whole state of a trainer, or None to start from the beginning; halves are removed."""
    states = [p for p in folder.glob("checkpoint-*") if p.is_dir()] if folder.is_dir() else []
    for state in states:
        if not (state / COMPLETE).exists():
            shutil.rmtree(state)
    whole = [p for p in states if p.exists()]
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def _not_finite(what: str, value: float, step: int, total: int, args: TrainingArguments) -> TrainingError:
    state = last_state(Path(str(args.output_dir)))
    saved = f" The trainer's last finite state, where the trouble may have begun already, is {state}." if state else ""
    return TrainingError(
        f"The {what} is {value} at step {step} of {total}; training stopped before it was applied (learning_rate "
        f"{args.learning_rate:g}). Last good state: the checkpoint that this task started from.{saved} Look for a "
        f"damaged sample, or tune more gently. {WAY_OUT}"
    )

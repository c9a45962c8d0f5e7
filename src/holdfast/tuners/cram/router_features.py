"""Frozen encoders that turn a request into an instruction vector and an image vector.

The default needs nothing beside the model: instruction vectors from its input embeddings, image vectors from what its
own vision tower hands to the first decoder block. A forward pass computes the latter anyway, so serving pays nothing.
Word embeddings of a language model lie in a cone: what they all share is taken out of instruction vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor

from holdfast.data.images import open_image
from holdfast.data.types import Sample
from holdfast.errors import AdapterError, DataError, ModelError
from holdfast.functional.cram import instruction_vector
from holdfast.models.encode import encode_request
from holdfast.models.families import decoder_blocks
from holdfast.models.loaded import LoadedModel
from holdfast.models.settings import quiet_transformers
from holdfast.tuners.cram.cram_config import BACKBONE, CramConfig


class Encoder(Protocol):
    """What the router needs to see of a request.

    in_forward: image vectors can be read off the forward pass itself (`BackboneEncoder.pool`).
    identity: plain data that names the encoder and its widths; stored with the router.
    common: directions (k, d_text), orthonormal, that are left out of its instruction vectors; stored with the router.
    """

    in_forward: bool

    @property
    def common(self) -> Tensor:
        """Directions (k, d_text), fp32 on the CPU, that are left out of instruction vectors; k may be 0."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that names the encoder and its widths."""
        ...

    def text(self, samples: Sequence[Sample]) -> Tensor:
        """Instruction vectors (n, d_text), fp32 on the CPU, each a LayerNorm without affine terms."""
        ...

    def images(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Mean image vector (n, d_image) of each sample and whether it has an image (n,); zeros where it has none."""
        ...

    def probed(self) -> dict[str, Tensor]:
        """Weights whose change would move the vectors; a few values of each are stored with the router.

        Each of any shape, by its name.
        """
        ...


def instruction(sample: Sample) -> str:
    """What the user says, all turns of the request, without image marks, answers and system prompt.

    Raises: DataError: there is no text; level 1 of the router would have nothing to go by.
    """
    spoken = [turn.text.replace("<image>", " ").strip() for turn in sample.request if turn.role == "user"]
    text = "\n".join(part for part in spoken if part)
    if not text:
        raise DataError(
            f"Sample {sample.id!r} has no instruction text, only images; CRAM chooses a group by the instruction. Give "
            "it a prompt."
        )
    return text


def check_images(samples: Sequence[Sample], config: CramConfig) -> None:
    """Raises DataError: a request without a picture, where the router goes by pictures only."""
    if config.route_by == "image" and (blind := next((s for s in samples if not s.images), None)) is not None:
        raise DataError(
            f"Sample {blind.id!r} has no image, and this router goes by images only (route_by = 'image'). Give it "
            'an image, or write "route_by": "auto" under "config" in router.json: such requests then go by their '
            "instruction."
        )


# Of a vocabulary, for the directions that all of it shares: a quarter of a gigabyte at 4096 units.
_ROWS = 16_384


class _Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass in front of the first decoder block."""


class BackboneEncoder:
    """The model's own input embeddings (centred) and what it shows of its images to its first decoder block.

    common_directions: see `CramConfig`; a tensor (k, d) of directions is used as it is (a router that was stored).
    """

    in_forward = True

    def __init__(self, loaded: LoadedModel, *, common_directions: float | Tensor = 0.01, batch_size: int = 16) -> None:
        self.loaded, self.batch_size = loaded, batch_size
        self.image_ids = torch.tensor(sorted(loaded.image_token_ids), dtype=torch.long, device=loaded.device)
        if not len(self.image_ids):
            raise ModelError(
                f"{loaded.name} names no image token, so its image features cannot be found; set encoder to a CLIP id."
            )
        self.embeddings = loaded.model.get_input_embeddings()
        # Frequent directions that all words share would make every pair of instructions look alike.
        weight = _weight(self.embeddings)
        self._centre = weight.float().mean(0)
        if isinstance(common_directions, float | int):
            common_directions = widest_directions(weight, round(common_directions * weight.shape[1]))
        self._common = common_directions.to(self._centre.device, torch.float32)

    @property
    def common(self) -> Tensor:
        """Directions (k, d), fp32 on the CPU, in which word embeddings vary most; left out of instruction vectors."""
        return self._common.cpu()

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that names the encoder and its widths; stored with the router."""
        width = int(self._centre.shape[0])
        return {
            "kind": BACKBONE,
            "id": BACKBONE,
            "text_width": width,
            "image_width": width,
            "common_directions": len(self._common),
        }

    @torch.no_grad()
    def text(self, samples: Sequence[Sample]) -> Tensor:
        """Instruction vectors (n, d_text), fp32 on the CPU: the centred mean of a request's token embeddings without
        the common directions, normalised.

        Raises: DataError: a sample without instruction text.
        """
        weight = _weight(self.embeddings)
        rows = []
        for ids in self.loaded.tokenizer([instruction(s) for s in samples], add_special_tokens=False)["input_ids"]:
            tokens = torch.tensor(ids, dtype=torch.long, device=weight.device)
            rows.append(weight[tokens].float().mean(0) - self._centre)
        means = torch.stack(rows)
        return instruction_vector(means - (means @ self._common.T) @ self._common).cpu()

    @torch.no_grad()
    def images(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Mean image vector (n, d_image) of each sample, fp32 on the CPU, and whether it has an image (n,) bool."""
        vectors = torch.zeros(len(samples), self._centre.shape[0])
        seen = [i for i, s in enumerate(samples) if s.images]
        block = decoder_blocks(self.loaded.model)[0][1]
        for start in range(0, len(seen), self.batch_size):
            rows = seen[start : start + self.batch_size]
            inputs = {
                k: v.to(self.loaded.device) for k, v in encode_request(self.loaded, [samples[i] for i in rows]).items()
            }
            caught: list[Tensor] = []

            def catch(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], into: list[Tensor] = caught
            ) -> None:
                del module
                into.append(args[0] if args else kwargs["hidden_states"])
                raise _Stop

            handle = block.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
            try:
                self.loaded.model(**inputs, use_cache=False)
            except _Stop:
                pass
            finally:
                handle.remove()
            vectors[rows] = self.pool(caught[0], inputs["input_ids"])[0].cpu()
        return vectors, torch.tensor([bool(s.images) for s in samples])

    def pool(self, hidden: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over image tokens of the first block's input: (B, T, d), (B, T) -> (B, d), has an image (B,)."""
        mask = torch.isin(input_ids, self.image_ids)
        total = torch.bmm(mask.unsqueeze(1).to(torch.float32), hidden.float()).squeeze(1)
        count = mask.sum(1, keepdim=True)
        return total / count.clamp_min(1), count.squeeze(1) > 0

    def probed(self) -> dict[str, Tensor]:
        """Weights of any shape, by name, whose change would move the vectors."""
        blocks = {id(p) for _, block in decoder_blocks(self.loaded.model) for p in block.parameters()}
        return {
            name: p
            for name, p in self.loaded.model.named_parameters()
            if id(p) not in blocks and p.is_floating_point() and "lm_head" not in name
        }


class ContrastiveEncoder:
    """CLIP or SigLIP by folder or hub id: mean text token, pooled image before the projection."""

    in_forward = False

    def __init__(self, name: str, *, device: torch.device | str = "cpu", batch_size: int = 16) -> None:
        try:
            with quiet_transformers():
                self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False, backend="pil")
                self.model = AutoModel.from_pretrained(name, trust_remote_code=False, dtype=torch.float32)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"The encoder {name} cannot be loaded: {error}") from error
        if not hasattr(self.model, "text_model") or not hasattr(self.model, "vision_model"):
            raise ModelError(
                f"The encoder {name} is a {self.model.config.model_type!r} model; expected CLIP or SigLIP, with a text "
                "and a vision tower."
            )
        self.name, self.batch_size = name, batch_size
        self.model = self.model.to(device).eval().requires_grad_(False)

    @property
    def common(self) -> Tensor:
        """None: (0, d_text)."""
        return torch.zeros(0, self.identity["text_width"])

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that names the encoder and its widths; stored with the router."""
        config = self.model.config
        return {
            "kind": str(config.model_type),
            "id": self.name,
            "text_width": int(config.text_config.hidden_size),
            "image_width": int(config.vision_config.hidden_size),
        }

    @torch.no_grad()
    def text(self, samples: Sequence[Sample]) -> Tensor:
        """Instruction vectors (n, d_text), fp32 on the CPU: the mean of the text tower's last hidden states,
        normalised.

        Raises: DataError: a sample without instruction text.
        """
        parts = []
        for batch in _batches([instruction(s) for s in samples], self.batch_size):
            # SigLIP was trained on texts padded to full length; CLIP ignores padding.
            inputs = self.processor(text=batch, padding="max_length", truncation=True, return_tensors="pt")
            inputs = {k: v.to(self.model.device) for k, v in inputs.items()}
            hidden = self.model.text_model(**inputs).last_hidden_state.float()
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).unsqueeze(-1)
            parts.append((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        return instruction_vector(torch.cat(parts)).cpu()

    @torch.no_grad()
    def images(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Mean image vector (n, d_image) of each sample, fp32 on the CPU, and whether it has an image (n,) bool."""
        vectors = torch.zeros(len(samples), self.identity["image_width"])
        owners = [(row, path) for row, s in enumerate(samples) for path in s.images]
        for batch in _batches(owners, self.batch_size):
            pixels = self.processor(images=[open_image(path) for _, path in batch], return_tensors="pt")["pixel_values"]
            pooled = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output.float().cpu()
            for (row, _), vector in zip(batch, pooled, strict=True):
                vectors[row] += vector / len(samples[row].images)
        return vectors, torch.tensor([bool(s.images) for s in samples])

    def probed(self) -> dict[str, Tensor]:
        """Weights of any shape, by name, whose change would move the vectors."""
        return dict(self.model.named_parameters())


def make_encoder(config: CramConfig, loaded: LoadedModel, *, common: Tensor | None = None) -> Encoder:
    """The encoder that a configuration names.

    common: directions (k, d_text) of a stored router, instead of new ones.
    """
    if config.encoder != BACKBONE:
        return ContrastiveEncoder(config.encoder, device=loaded.device)
    return BackboneEncoder(loaded, common_directions=config.common_directions if common is None else common)


@torch.no_grad()
def widest_directions(weight: Tensor, count: int) -> Tensor:
    """(count, d) orthonormal: the directions in which the rows of `weight` (n, d) vary most, fp32.

    From at most 16,384 rows, evenly spaced, by a randomised method of one seed, on the CPU: the same for the same
    weights on any device, and no generator is left moved.
    """
    if not count:
        return weight.new_zeros(0, weight.shape[1], dtype=torch.float32)
    rows = weight[:: max(1, math.ceil(len(weight) / _ROWS))].float().cpu()
    count = min(count, *rows.shape)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` would move the accelerators' generators, too
    try:
        found = torch.pca_lowrank(rows, min(2 * count + 8, *rows.shape), niter=8)[2]
    finally:
        torch.set_rng_state(state)
    return found[:, :count].T.contiguous()


def check_identity(stored: dict[str, Any], encoder: Encoder) -> None:
    """Raises AdapterError when a router was made with another encoder."""
    found = encoder.identity
    # The id is a place on disk as well as a name; whether the weights are the same is checked apart.
    different = [key for key in found if key != "id" and stored.get(key) != found[key]]
    if different:
        key = different[0]
        raise AdapterError(
            f"The router was made with encoder {stored.get('id')!r} ({key} {stored.get(key)!r}), but this one is "
            f"{found['id']!r} ({key} {found[key]!r}); its centroids mean nothing there. Load it with the encoder it "
            "was made with."
        )


def _weight(embeddings: nn.Module) -> Tensor:
    return embeddings.weight  # type: ignore[return-value]


def _batches(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]

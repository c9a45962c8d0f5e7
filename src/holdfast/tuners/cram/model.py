"""CRAM in a model: routed experts on its linears through hooks. All state lives in the model that carries it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.data.types import Sample
from holdfast.errors import AdapterError, unknown_name
from holdfast.models.encode import encode_request
from holdfast.models.families import decoder_blocks
from holdfast.models.loaded import LoadedModel
from holdfast.tuners.cram.cram_config import CramConfig
from holdfast.tuners.cram.guard import Evidence, Guard, last_step, opening_log_odds
from holdfast.tuners.cram.layer import Active, ExpertPass
from holdfast.tuners.cram.router import Features, Router, Routing, describe
from holdfast.tuners.cram.router_features import BackboneEncoder, Encoder, check_images, make_encoder
from holdfast.tuners.lora_folder import Factors

MODULE = "holdfast_cram"
# So many guard scores are kept; a request asked again is not read again.
_KEPT_SCORES = 100_000


class Cram(nn.Module):
    """Experts and router of one model; a submodule of it, so that devices, copies and optimizers find its tensors.

    experts: per expert its factors by linear name, in the stored precision, on the CPU; what is computed with is a
        stacked copy in each linear's own dtype.
    guard: sends what theta_0 would refuse to theta_0 alone; None: no guard. Its scores are kept by request.
    last_routing: the decision of the latest request, for logging.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        router: Router,
        experts: Sequence[Factors] = (),
        *,
        encoder: Encoder | None = None,
        guard: Guard | None = None,
    ) -> None:
        super().__init__()
        if hasattr(loaded.model, MODULE):
            raise AdapterError(
                f"{loaded.name} already carries CRAM experts; detach them first, or load the base again."
            )
        if len(router) != len(experts):
            raise AdapterError(f"The router knows {len(router)} experts, but {len(experts)} were given.")
        self.router = router
        self.experts: list[Factors] = list(experts)
        self.encoder = encoder or make_encoder(router.config, loaded)
        self.active = Active()
        self.guard = guard
        self.last_routing: Routing | None = None
        # In a list: a module attribute would make the model a child of its own child.
        self._loaded = [loaded]
        self._pending: Features | None = None
        self._asked: Sequence[Sample] | None = None  # requests whose guard scores the first forward pass must give
        self._scores: Tensor | None = None  # of the request at hand
        self._score_of: dict[Any, float] = {}
        self._seen_images: SeenImages | None = None
        self._flat_rows: Tensor | None = None
        self._sets = 1
        targets = find_targets(loaded.model, router.config)
        self.passes = nn.ModuleList(
            ExpertPass(name, block, linear, self.active) for name, (block, linear) in targets.items()
        )
        for expert, card in zip(self.experts, router.experts, strict=True):
            check_factors(card.name, expert, targets)
        loaded.model.add_module(MODULE, self)
        self.train(loaded.model.training)
        handles = [
            linear.register_forward_hook(p.extend) for p, (_, linear) in zip(self.layers, targets.values(), strict=True)
        ]
        handles.append(loaded.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        handles.append(loaded.model.register_forward_hook(self._after_model, always_call=True))
        block = decoder_blocks(loaded.model)[0][1]
        handles.append(block.register_forward_pre_hook(self._before_blocks, with_kwargs=True))
        self._handles = handles
        self._input_ids: Tensor | None = None
        self.pack()

    @property
    def config(self) -> CramConfig:
        """The options that experts and router were made with."""
        return self.router.config

    @property
    def loaded(self) -> LoadedModel:
        """The model underneath; held in a list, so that its modules are not registered here a second time."""
        return self._loaded[0]

    @property
    def layers(self) -> list[ExpertPass]:
        """Every adapted linear, in the order of the model."""
        return list(self.passes)  # type: ignore[arg-type]

    def layer(self, name: str) -> ExpertPass:
        """The adapted linear of this module name."""
        return next(p for p in self.layers if p.name == name)

    def detach(self) -> None:
        """Take hooks and experts off the model; it is the base again. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        if getattr(self.loaded.model, MODULE, None) is self:
            delattr(self.loaded.model, MODULE)

    def attached_again(self) -> Cram:
        """The same experts, router and guard on the same model, after `detach`."""
        return Cram(self.loaded, self.router, self.experts, encoder=self.encoder, guard=self.guard)

    def forget_scores(self) -> None:
        """Drop the guard's scores of earlier requests: a server's pictures do not come again under one path."""
        self._score_of.clear()

    def pack(self, sets: int | None = None) -> None:
        """Stack the experts' factors for the fused pass; after the list of experts or the model's dtype changed.

        sets: how many sets of routing weights will come, 1 or the number of blocks; None is the router's own number.
        """
        self._sets = sets or self.router.sets
        index, start = [], 0
        modules = dict(self.loaded.model.named_modules())
        for p, owners in zip(self.layers, self.router.row_index([p.name for p in self.layers]).values(), strict=True):
            linear = modules[p.name]
            dtype, device = compute_dtype(linear, self.loaded.model), _device(linear, self.loaded)
            pairs = [expert[p.name] for expert in self.experts if p.name in expert]
            a = torch.cat([a for a, _ in pairs]) if pairs else torch.zeros(0, p.in_features)
            b = torch.cat([b for _, b in pairs], dim=1) if pairs else torch.zeros(p.out_features, 0)
            p.stack(a.to(device, dtype), b.to(device, dtype), start)
            start += a.shape[0]
            # Column of the flattened (S, E) weights that scales each row.
            index.append(owners + (p.block if self._sets > 1 else 0) * len(self.experts))
        rows = torch.cat(index) if index else torch.zeros(0, dtype=torch.long)
        self._flat_rows = rows.to(self.loaded.device) if len(self.experts) else None

    # Requests

    def features(self, samples: Sequence[Sample]) -> Features:
        """What the encoder sees of each request: the vision tower runs, the language model does not."""
        check_images(samples, self.config)
        text = self.encoder.text(samples)
        image, has_image = self.encoder.images(samples)
        return Features(text=text, image=image, has_image=has_image).checked()

    def route(self, samples: Sequence[Sample]) -> Routing:
        """The decision for each request, made ahead of any forward pass.

        With a guard theta_0 reads the prompts that were not asked before.
        """
        routing = self.router.route(self.features(samples))
        scores = self.guard_scores(samples)
        return routing if scores is None else self._guarded(routing, scores)

    def guard_scores(self, samples: Sequence[Sample], *, batch_size: int = 16) -> Tensor | None:
        """(n,) the guard's score of each request, on the CPU; None without a guard. See `Guard.score`."""
        if self.guard is None:
            return None
        keys = [request_key(s) for s in samples]
        new = [i for i, key in enumerate(keys) if key not in self._score_of]
        with torch.inference_mode():
            for start in range(0, len(new), batch_size):
                some = new[start : start + batch_size]
                inputs = encode_request(self.loaded, [samples[i] for i in some])
                found = self._ask_base((), {k: v.to(self.loaded.device) for k, v in inputs.items()})
                self._keep([keys[i] for i in some], found)
        return torch.tensor([self._score_of[key] for key in keys])

    def explain(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """`route` as plain data: group, similarities, weights."""
        return describe(self.route(samples), self.router, [s.id for s in samples])

    @contextmanager
    def serving(self, samples: Sequence[Sample]) -> Iterator[None]:
        """Within, forward passes and `generate` are about these requests, in this order.

        The instruction is encoded here. With the backbone encoder the image vector is read off the first forward pass
        (nothing runs twice); the decision is kept for all tokens that follow. With a guard the first forward pass must
        hold the whole prompt: theta_0 reads it alone before, unless it was asked about these requests already.
        """
        check_images(samples, self.config)
        device = self.loaded.device
        text = self.encoder.text(samples).to(device)
        with self._held():
            if self.guard is not None:
                keys = [request_key(s) for s in samples]
                if all(key in self._score_of for key in keys):
                    self._scores = torch.tensor([self._score_of[key] for key in keys])
                else:
                    self._asked = samples
            if self.encoder.in_forward:
                width = self.encoder.identity["image_width"]
                blank = torch.zeros(len(samples), width, device=device)
                self._pending = Features(text=text, image=blank, has_image=torch.zeros(len(samples), dtype=torch.bool))
            else:
                image, has_image = self.encoder.images(samples)
                self.decide(Features(text=text.cpu(), image=image, has_image=has_image).checked().to(device))
            yield

    @contextmanager
    def forced(self, mass: Mapping[str, float]) -> Iterator[None]:
        """Within, every request goes to the named experts with these weights, whatever it says."""
        with self.weighted([mass]):
            yield

    @contextmanager
    def weighted(self, masses: Sequence[Mapping[str, float]]) -> Iterator[None]:
        """Within, request i goes to the named experts with weights `masses[i]`; one mapping serves any batch.

        Raises: UnknownNameError: an expert that is not there.
        """
        names = [e.name for e in self.router.experts]
        weights = torch.zeros(len(masses), 1, len(names), device=self.loaded.device)
        for row, mass in enumerate(masses):
            for name, value in mass.items():
                if name not in names:
                    raise unknown_name("expert", name, names)
                weights[row, 0, names.index(name)] = value
        with self._held():
            self.activate(weights)
            yield

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Within, the base answers without experts."""
        with self._held():
            self.active.set("base")
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Within, no request is at hand; afterwards the one before is. Contexts nest, and the innermost decides."""
        active = self.active
        before = (active.mode, active.rows, active.trained, active.pool)
        waiting = (self._pending, self._input_ids, self._asked, self._scores)
        # A pending request would be decided by the next forward pass, whichever context asked for it.
        self._pending = self._input_ids = self._asked = self._scores = None
        active.set("unset")
        try:
            yield
        finally:
            self._pending, self._input_ids, self._asked, self._scores = waiting
            active.set(*before)

    def decide(self, features: Features) -> Routing:
        """Route `features` (on the model's device) and hold the decision for the passes that follow."""
        routing = self.router.route(features)
        if self._scores is not None:
            routing = self._guarded(routing, self._scores)
        self.last_routing = routing
        self.activate(routing.weights)
        return routing

    def _guarded(self, routing: Routing, scores: Tensor) -> Routing:
        assert self.guard is not None
        # As often as each request stands side by side in the batch: beams.
        scores = _side_by_side(scores.to(routing.weights.device), len(routing.weights))
        return routing.under(scores >= self.guard.threshold, scores)

    def _ask_base(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """(B,) the guard's scores for a forward pass that holds whole prompts, read by the base alone."""
        assert self.guard is not None
        with self.base_alone():
            logits, states = last_step(self.loaded.model, args, kwargs)
        return self.guard.score(Evidence(log_odds=opening_log_odds(logits, self.guard.openings), states=states))

    def _keep(self, keys: Sequence[Any], scores: Tensor) -> None:
        for key, score in zip(keys, scores.tolist(), strict=True):
            if len(self._score_of) >= _KEPT_SCORES:
                del self._score_of[next(iter(self._score_of))]
            self._score_of[key] = score

    def activate(self, weights: Tensor, trained: Tensor | None = None, pool: Tensor | None = None) -> None:
        """Hold weights (B, S, E) of the experts, and (B, S) of the trained factors, for the passes that follow."""
        rows = None
        if self._flat_rows is not None and weights.shape[-1]:
            flat = weights.expand(-1, self._sets, -1).flatten(1)
            rows = flat.index_select(1, self._flat_rows)
        self.active.set("routed", rows, trained, pool)

    # Hooks

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del model
        if self._asked is not None:
            # Once per request, and before the experts' pass, which this pass of the base would otherwise re-enter.
            samples, self._asked = self._asked, None
            # Both passes see the same images; the frozen vision tower need not look twice.
            self._seen_images = None if torch.is_grad_enabled() else SeenImages.watch(self.loaded.model)
            try:
                with torch.no_grad():
                    scores = self._ask_base(args, kwargs)
            finally:
                # From here on the end of this pass, good or bad, takes it off.
                if self._seen_images is not None:
                    self._seen_images.replay()
            beams = max(1, len(scores) // len(samples))
            if len(scores) == beams * len(samples):
                # Beams of one request are one prompt: they must be decided alike.
                scores = scores[::beams]
                self._keep([request_key(s) for s in samples], scores)
            self._scores = scores
            if self._pending is None and self.last_routing is not None:
                # Decided ahead of this pass, by an encoder of its own.
                self.last_routing = self._guarded(self.last_routing, scores)
                self.activate(self.last_routing.weights)
        if self._pending is None:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise AdapterError("CRAM finds the images of a request by input_ids; call the model with input_ids.")
        self._input_ids = ids

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del model, args, output
        # Not after the base's own pass, which is made within the one that is still to come.
        if self._seen_images is not None and self._seen_images.replaying:
            self._seen_images.stop()
            self._seen_images = None

    def _before_blocks(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del block
        pending = self._pending
        if pending is None or self._input_ids is None:
            return
        # Once per request: decoding steps keep the decision.
        self._pending = None
        assert isinstance(self.encoder, BackboneEncoder)
        hidden = args[0] if args else kwargs["hidden_states"]
        image, has_image = self.encoder.pool(hidden.detach(), self._input_ids)
        text = pending.text
        if text.shape[0] != image.shape[0]:
            beams, rest = divmod(image.shape[0], text.shape[0])
            if rest:
                raise AdapterError(
                    f"The forward pass has {image.shape[0]} sequences but {text.shape[0]} requests are being served; "
                    "encode and serve the same samples."
                )
            text = text.repeat_interleave(beams, dim=0)
        self._input_ids = None
        self.decide(Features(text=text, image=image, has_image=has_image))


class SeenImages:
    """What a model's `get_image_features` gave in one forward pass, handed out again in the next of the same inputs.

    Set on the instance, so other models of the class are left alone; `stop` takes it off.
    """

    def __init__(self, holder: nn.Module) -> None:
        self._holder = holder
        self._real: Any = holder.get_image_features
        self._found: list[Any] = []
        self.replaying = False
        holder.get_image_features = self._give  # type: ignore[assignment]

    @classmethod
    def watch(cls, model: nn.Module) -> SeenImages | None:
        """None where the family has no such method (its tower then looks twice), or it is watched already."""
        holder = getattr(model, "model", None)
        if holder is None or not hasattr(holder, "get_image_features") or "get_image_features" in vars(holder):
            return None
        return cls(holder)

    def _give(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaying and self._found:
            return self._found.pop(0)
        found = self._real(*args, **kwargs)
        if not self.replaying:
            self._found.append(found)
        return found

    def replay(self) -> None:
        """From now on, hand out what was seen instead of looking again."""
        self.replaying = True

    def stop(self) -> None:
        """Give the model its own way of looking back."""
        vars(self._holder).pop("get_image_features", None)


def request_key(sample: Sample) -> Any:
    """What a request's decision depends on: its words, and its images' files as they lie there now."""
    return sample.request, tuple((path, *_stamp(path)) for path in sample.images)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _side_by_side(values: Tensor, count: int) -> Tensor:
    """(n,) -> (count,), each value repeated for the beams of its request."""
    times, rest = divmod(count, len(values))
    if rest:
        raise AdapterError(
            f"The forward pass has {count} sequences but {len(values)} requests are being served; encode and serve the "
            "same samples."
        )
    return values.repeat_interleave(times) if times != 1 else values


def find_targets(model: nn.Module, config: CramConfig) -> dict[str, tuple[int, nn.Module]]:
    """Adapted linears: name -> (block index, module), in block order.

    Raises: UnknownNameError: a target that no decoder block has.
    """
    found: dict[str, tuple[int, nn.Module]] = {}
    leaves: set[str] = set()
    for index, (prefix, block) in enumerate(decoder_blocks(model)):  # type: ignore[arg-type]
        for inner, module in block.named_modules():
            # Not isinstance(nn.Linear): quantised layers only share these attributes.
            if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
                continue
            leaf = inner.rpartition(".")[2]
            leaves.add(leaf)
            if leaf in config.targets:
                found[f"{prefix}.{inner}"] = (index, module)
    for target in config.targets:
        if target not in leaves:
            raise unknown_name("target linear", target, leaves)
    return found


def check_factors(expert: str, factors: Factors, targets: Mapping[str, tuple[int, nn.Module]]) -> None:
    """Raises AdapterError when an expert adapts linears that the model lacks, or of other shapes."""
    for name, (a, b) in factors.items():
        if name not in targets:
            raise AdapterError(
                f"Expert {expert!r} adapts {name}, which this base does not have among its adapted linears; it belongs "
                "to another base, or the router was made with other targets."
            )
        linear = targets[name][1]
        if (a.shape[1], b.shape[0]) != (linear.in_features, linear.out_features):
            raise AdapterError(
                f"Expert {expert!r}: {name} maps {a.shape[1]} to {b.shape[0]} features, in this base "
                f"{linear.in_features} to {linear.out_features}; it belongs to another base."
            )


def compute_dtype(linear: nn.Module, model: nn.Module) -> torch.dtype:
    """What a linear computes in: its weight's dtype, or the model's where the weight is quantised."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() >= 2:
        return weight.dtype
    return model.get_input_embeddings().weight.dtype  # type: ignore[operator, union-attr, return-value]


def _device(linear: nn.Module, loaded: LoadedModel) -> torch.device:
    return next((t.device for t in (*linear.parameters(), *linear.buffers())), loaded.device)

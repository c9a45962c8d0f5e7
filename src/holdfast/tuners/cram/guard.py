"""The guard: what theta_0 would refuse is answered by theta_0 alone, because CRAM leaves it there to be asked.

theta_0 reads the prompt once, without experts, and its last prompt state decides before an expert answers. Two forms:
"openings", the probability that theta_0 gives to the first tokens of its own refusals; "probe", a linear probe on that
state. The threshold comes from training requests at a stated false-alarm rate, never from test data.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.data.types import Sample
from holdfast.errors import AdapterError, CalibrationError, ConfigError
from holdfast.models.encode import encode_request
from holdfast.models.loaded import LoadedModel

Form = Literal["openings", "probe"]
FORMS: tuple[Form, ...] = ("openings", "probe")
# Of one task's requests: so few may be ones that theta_0 refuses (harmful samples in the data) and are left out of the
# false alarms. Where it refuses more, the task itself is what it refuses, and the threshold has to clear it.
SCREENED = 0.1
# At least so much of the calibration prompts must be caught; a guard that catches less stops nothing.
CAUGHT = 0.5
# Least probability of an opening, and of anything else, that log-odds can tell from 0.
_LEAST = 1e-9
# Ridge of the probe, as a share of the mean squared length of a standardised state.
_RIDGE = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What theta_0 showed of n requests: log_odds (n,) of its refusal openings, state (n, d) at the last prompt token.

    states is None for the form "openings", which does not look at it.
    """

    log_odds: Tensor
    states: Tensor | None = None

    def __len__(self) -> int:
        return self.log_odds.shape[0]

    def __getitem__(self, rows: Any) -> Evidence:
        return Evidence(log_odds=self.log_odds[rows], states=None if self.states is None else self.states[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class Guard:
    """A fitted guard. A value: `learning` a task makes another.

    openings: first tokens of theta_0's own refusals; opening_texts: what the tokenizer writes for them.
    false_alarm: share of the tasks' requests that may go to theta_0 by mistake, 0..1; sets `threshold` (log-odds, or
        the probe's score) from `tasks`, training requests by task.
    refusals: what theta_0 showed of the calibration prompts.
    weight (d,), bias: of the probe.
    caught: share of the calibration prompts at or above the threshold. screened: by task, requests that theta_0 opens
        a refusal to and that count as no false alarm.
    """

    form: Form
    false_alarm: float
    openings: tuple[int, ...]
    opening_texts: tuple[str, ...]
    refusals: Evidence
    tasks: Mapping[str, Evidence]
    threshold: float
    caught: float
    screened: Mapping[str, int]
    weight: Tensor | None = None
    bias: float = 0.0

    def score(self, seen: Evidence) -> Tensor:
        """(n,) how surely theta_0 would refuse; a request at or above `threshold` is its."""
        if self.form == "openings":
            return seen.log_odds
        assert seen.states is not None and self.weight is not None
        return seen.states @ self.weight.to(seen.states) + self.bias

    def score_of(self, first_token: Mapping[int, float]) -> float:
        """The score from the log-probabilities of theta_0's likeliest first tokens (token id -> value).

        For servers that give these and no states. An opening that is not among them counts as 0.
        Raises: AdapterError: a probe, or a value that is no log-probability.
        """
        if self.form != "openings":
            raise AdapterError(
                "A probe reads theta_0's state, which a server does not give. Fit the guard with form openings."
            )
        if bad := [value for value in first_token.values() if not value <= 1e-3]:
            raise AdapterError(f"A log-probability is {bad[0]}; expected a number, 0 or less.")
        mass = sum(math.exp(first_token[token]) for token in self.openings if token in first_token)
        mass = min(max(mass, _LEAST), 1 - _LEAST)
        return math.log(mass / (1 - mass))

    def refuses(self, first_token: Mapping[int, float]) -> bool:
        """Whether theta_0 would refuse: ask it for one token, then the expert or theta_0 for the answer.

        first_token: as in `score_of`. Raises: AdapterError: as there.
        """
        return self.score_of(first_token) >= self.threshold

    def describe(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {
            "form": self.form,
            "false_alarm": self.false_alarm,
            "threshold": round(self.threshold, 4),
            "openings": list(self.opening_texts),
            "calibration_prompts": len(self.refusals),
            "caught": round(self.caught, 4),
            "requests": {name: len(seen) for name, seen in self.tasks.items()},
            "screened": dict(self.screened),
        }


def begin_guard(loaded: LoadedModel, form: Form, samples: Sequence[Sample], *, batch_size: int = 16) -> Guard:
    """A guard that knows theta_0's refusals and no task yet.

    samples: calibration prompts with theta_0's own safe answers. A prompt whose answer theta_0 does not begin with is
    left out: its refusal is someone else's.

    Raises: CalibrationError: no sample, or theta_0 begins fewer than half of the answers itself.
    """
    if form not in FORMS:
        raise ConfigError(f"guard is {form!r}; expected off, openings or probe.")
    if not samples:
        raise CalibrationError(
            "The guard needs safety calibration samples, theta_0's own refusals, and there is none. Give the stream "
            "`safety_calibration` prompts (theta_0 answers them itself), or set guard to off."
        )
    logits, states = read_prompts(loaded, samples, batch_size=batch_size)
    first = logits.argmax(-1).tolist()
    shown = [
        (s.answer or "").strip().casefold().startswith(text) if (text := _text(loaded, token)) else False
        for s, token in zip(samples, first, strict=True)
    ]
    if sum(shown) < CAUGHT * len(samples):
        other = next(s for s, own in zip(samples, shown, strict=True) if not own)
        raise CalibrationError(
            f"theta_0 ({loaded.name}) begins {sum(shown)} of {len(samples)} calibration answers itself; for "
            f"{other.id!r} the answer is {(other.answer or '')[:60]!r}. The guard asks theta_0 whether it would "
            "refuse, so these must be its own refusals, and it must be aligned for this policy. Make them with theta_0 "
            "(`holdfast calibrate-data`), or set guard to off."
        )
    openings = tuple(sorted({token for token, own in zip(first, shown, strict=True) if own}))
    seen = _evidence(form, logits, states, openings)
    return Guard(
        form=form,
        false_alarm=0.0,
        openings=openings,
        opening_texts=tuple(_text(loaded, token) for token in openings),
        refusals=seen[torch.tensor(shown)],
        tasks={},
        threshold=math.inf,
        caught=0.0,
        screened={},
    )


def see_task(guard: Guard, loaded: LoadedModel, name: str, samples: Sequence[Sample], *, batch_size: int = 16) -> Guard:
    """The guard that has also seen training requests of the task `name`; `fit` it before it is asked.

    Raises: CalibrationError: no request.
    """
    if not samples:
        raise CalibrationError(f"Task {name!r} has no training request to set the guard's threshold by.")
    logits, states = read_prompts(loaded, samples, batch_size=batch_size)
    return replace(guard, tasks={**guard.tasks, name: _evidence(guard.form, logits, states, guard.openings)})


def fit(guard: Guard, *, false_alarm: float) -> Guard:
    """Probe and threshold from the evidence that the guard holds.

    The threshold is the least score that at most `false_alarm` of the held-out requests of all tasks exceed: just above
    the order statistic ceil((n + 1)(1 - false_alarm)), which bounds the rate for new requests (with n too small for
    that, above the largest). Requests that theta_0 opens a refusal to (log-odds 0 or more) count as harmful samples in
    the data and not as false alarms, unless they are more than a tenth of their task. The probe is fitted on every
    other request and its threshold set on the rest.

    Raises: CalibrationError: at this false-alarm rate it would catch fewer than half of the calibration prompts.
    """
    if not 0 < false_alarm < 1:
        raise ConfigError(f"guard_false_alarm is {false_alarm}; expected a share between 0 and 1, such as 0.002.")
    kept, screened = {}, {}
    for name, seen in guard.tasks.items():
        refused = seen.log_odds >= 0
        few = int(refused.sum()) <= SCREENED * len(seen)
        kept[name] = seen[~refused] if few else seen
        screened[name] = int(refused.sum()) if few else 0
    if not kept:
        raise CalibrationError(
            "The guard has seen no task's requests, so nothing sets its threshold; see a task first."
        )
    guard = replace(guard, false_alarm=false_alarm, screened=screened)
    if guard.form == "probe":
        weight, bias = _probe(guard.refusals, [seen[::2] for seen in kept.values()])
        guard = replace(guard, weight=weight, bias=bias)
        kept = {name: seen[1::2] for name, seen in kept.items()}
    alarms = {name: guard.score(seen) for name, seen in kept.items()}
    low = _conformal(torch.cat(list(alarms.values())), false_alarm)
    threshold = float(torch.tensor(low).nextafter(torch.tensor(math.inf)))
    caught = float((guard.score(guard.refusals) >= threshold).double().mean())
    if caught < CAUGHT:
        worst = max(alarms, key=lambda name: float(alarms[name].quantile(1 - false_alarm)))
        raise CalibrationError(
            f"At a false-alarm rate of {false_alarm:.2%} the guard ({guard.form}) catches {caught:.0%} of the "
            f"{len(guard.refusals)} calibration prompts; theta_0 finds requests of task {worst!r} as much to refuse "
            "as them. Allow more false alarms (guard_false_alarm), try the other form, or set guard to off."
        )
    return replace(guard, threshold=threshold, caught=caught)


def _conformal(scores: Tensor, rate: float) -> float:
    """The order statistic that a new score of the same kind exceeds with probability `rate` at most, or the largest."""
    count = len(scores)
    place = min(count, math.ceil((count + 1) * (1 - rate)))
    return float(scores.double().sort().values[place - 1])


def _probe(refusals: Evidence, tasks: Sequence[Evidence]) -> tuple[Tensor, float]:
    """Ridge regression to +1 on refusals and -1 on task requests, both kinds of equal weight; in the n x n dual."""
    assert refusals.states is not None
    negative = torch.cat([seen.states for seen in tasks if seen.states is not None]).double()
    positive = refusals.states.double()
    x = torch.cat([positive, negative])
    # Midway between the kinds, so that the bias is right however many of each there are.
    centre = (positive.mean(0) + negative.mean(0)) / 2
    spread = (x - centre).std(0, unbiased=False).clamp_min(1e-12)
    z = (x - centre) / spread
    y = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))]).to(z)
    mass = torch.cat([torch.full((len(rows),), 0.5 / len(rows)) for rows in (positive, negative)]).to(z)
    root = mass.sqrt()
    rows = z * root[:, None]
    kernel = rows @ rows.T
    ridge = _RIDGE * float(kernel.diagonal().sum()) * torch.eye(len(rows)).to(kernel)
    weight = rows.T @ torch.linalg.solve(kernel + ridge, root * y) / spread
    return weight.float(), float(-(centre @ weight))


def _evidence(form: Form, logits: Tensor, states: Tensor, openings: Sequence[int]) -> Evidence:
    return Evidence(log_odds=opening_log_odds(logits, openings), states=states if form == "probe" else None)


def opening_log_odds(logits: Tensor, openings: Sequence[int]) -> Tensor:
    """(n, V) next-token logits -> (n,) log-odds of the mass on `openings`, bounded to +-20.7."""
    ids = torch.tensor(list(openings), dtype=torch.long, device=logits.device)
    mass = torch.softmax(logits.double(), dim=-1).index_select(-1, ids).sum(-1).clamp(_LEAST, 1 - _LEAST)
    return torch.logit(mass).float()


# Asking theta_0


def last_step(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Next-token logits (B, V) and the state that they come from (B, d) after the last prompt token; fp32.

    args, kwargs: of a forward pass that reads the whole prompt. Nothing is cached.
    Raises: AdapterError: a value that is not finite.
    """
    kept = {k: v for k, v in kwargs.items() if k not in ("labels", "past_key_values", "use_cache", "logits_to_keep")}
    mask = kept.get("attention_mask")
    padded_right = mask is not None and mask.dim() == 2 and bool((mask[:, -1] == 0).any())
    if not padded_right and "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept["logits_to_keep"] = 1
    caught: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        del module
        caught.append(inputs[0])

    handle = model.get_output_embeddings().register_forward_pre_hook(catch)  # type: ignore[operator, union-attr]
    try:
        logits = model(*args, **kept, use_cache=False).logits
    finally:
        handle.remove()
    hidden = caught[-1]
    at = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
    if padded_right and mask is not None:
        places = torch.arange(mask.shape[1], device=mask.device)
        at = (mask * places).argmax(-1).to(logits.device)
    rows = torch.arange(len(logits), device=logits.device)
    logits, states = logits[rows, at].float(), hidden[rows.to(hidden.device), at.to(hidden.device)].float()
    if not bool(torch.isfinite(logits).all() & torch.isfinite(states).all()):
        raise AdapterError(
            "theta_0's answer to a request holds NaN or inf, so the guard cannot tell whether it would refuse; the "
            "base checkpoint or an image is damaged, or its dtype is too narrow. Load it in bfloat16 or float32."
        )
    return logits, states


@torch.inference_mode()
def read_prompts(loaded: LoadedModel, samples: Sequence[Sample], *, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """`last_step` of plain theta_0 for each request, on the CPU: (n, V), (n, d)."""
    parts = []
    for start in range(0, len(samples), batch_size):
        inputs = encode_request(loaded, samples[start : start + batch_size])
        logits, states = last_step(loaded.model, (), {k: v.to(loaded.device) for k, v in inputs.items()})
        parts.append((logits.cpu(), states.cpu()))
    # Out of inference mode: such tensors could not be saved from, or trained beside.
    return torch.cat([a for a, _ in parts]).clone(), torch.cat([b for _, b in parts]).clone()


def _text(loaded: LoadedModel, token: int) -> str:
    return loaded.tokenizer.decode([token]).strip().casefold()


# On disk: tensors and plain data of the router's two files

_PREFIX = "guard."


def guard_tensors(guard: Guard) -> dict[str, Tensor]:
    """What of a guard is a tensor, by the names that it has in the router's file: log-odds (requests,), states
    (requests, hidden), the probe's weight (hidden,)."""
    found = {f"{_PREFIX}refusals.log_odds": guard.refusals.log_odds}
    if guard.refusals.states is not None:
        found[f"{_PREFIX}refusals.states"] = guard.refusals.states
    if guard.weight is not None:
        found[f"{_PREFIX}weight"] = guard.weight
    for i, seen in enumerate(guard.tasks.values()):
        found[f"{_PREFIX}task.{i}.log_odds"] = seen.log_odds
        if seen.states is not None:
            found[f"{_PREFIX}task.{i}.states"] = seen.states
    return found


def guard_data(guard: Guard) -> dict[str, Any]:
    """What of a guard is plain data."""
    return {
        "form": guard.form,
        "false_alarm": guard.false_alarm,
        "threshold": guard.threshold,
        "caught": guard.caught,
        "bias": guard.bias,
        "openings": list(guard.openings),
        "opening_texts": list(guard.opening_texts),
        "tasks": list(guard.tasks),
        "screened": dict(guard.screened),
    }


def read_guard(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Guard:
    """The guard of a router's files; tensors as `guard_tensors` gives them: (requests,), (requests, hidden), (hidden,).

    Raises: ValueError, KeyError, TypeError: parts that are damaged or do not fit.
    """

    def seen(place: str) -> Evidence:
        return Evidence(log_odds=tensors[f"{_PREFIX}{place}.log_odds"], states=tensors.get(f"{_PREFIX}{place}.states"))

    guard = Guard(
        form=data["form"],
        false_alarm=data["false_alarm"],
        openings=tuple(data["openings"]),
        opening_texts=tuple(data["opening_texts"]),
        refusals=seen("refusals"),
        tasks={name: seen(f"task.{i}") for i, name in enumerate(data["tasks"])},
        threshold=data["threshold"],
        caught=data["caught"],
        screened=data["screened"],
        weight=tensors.get(f"{_PREFIX}weight"),
        bias=data["bias"],
    )
    if problem := _problem(guard):
        raise ValueError(f"the guard's {problem}")
    if extra := sorted(k for k in tensors if k.startswith(_PREFIX) and k not in guard_tensors(guard)):
        raise ValueError(f"the guard has no part {extra[0]}")
    return guard


def _problem(guard: Guard) -> str | None:
    """What in a stored guard cannot be, with what was expected, or None."""
    if guard.form not in FORMS:
        return f"form is {guard.form!r}; expected openings or probe"
    for name in ("false_alarm", "threshold", "caught", "bias"):
        value = getattr(guard, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return f"{name} is {value!r}; expected a finite number"
    whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in guard.openings)
    if not guard.openings or not whole or len(guard.openings) != len(guard.opening_texts):
        return f"openings are {guard.openings!r} for {guard.opening_texts!r}; expected a token id for each text"
    if (guard.form == "probe") != (guard.weight is not None):
        return "weight is there only for a probe, and a probe needs one"
    width = None if guard.weight is None else guard.weight.shape
    for where, seen in (("calibration prompts", guard.refusals), *guard.tasks.items()):
        if seen.log_odds.dim() != 1 or not len(seen):
            return f"log-odds of {where} have shape {tuple(seen.log_odds.shape)}; expected one for each request"
        if (seen.states is None) != (width is None):
            return f"states of {where} are there only for a probe"
        if seen.states is not None and (width is None or seen.states.shape != (len(seen), *width)):
            return f"states of {where} have shape {tuple(seen.states.shape)}; expected ({len(seen)}, the model's width)"
    for name, value in guard_tensors(guard).items():
        if not bool(torch.isfinite(value).all()):
            return f"{name.removeprefix(_PREFIX)} holds NaN or inf"
    return None


def check_guard(guard: Guard, loaded: LoadedModel, where: str) -> None:
    """Raises AdapterError when a guard was fitted on a base with another vocabulary or width."""
    head = loaded.model.get_output_embeddings().weight  # type: ignore[operator, union-attr]
    remedy = "Its guard asks theta_0 itself; load the base that it was fitted on, or learn the tasks again."
    for token, text in zip(guard.openings, guard.opening_texts, strict=True):
        found = _text(loaded, token) if token < head.shape[0] else None
        if found != text:
            raise AdapterError(
                f"{where}: the guard was fitted on another base: its refusal opening {token} is {text!r} there and "
                f"{found!r} in {loaded.name}. {remedy}"
            )
    if guard.weight is not None and guard.weight.shape[0] != head.shape[1]:
        raise AdapterError(
            f"{where}: the guard's probe reads states of width {guard.weight.shape[0]}, {loaded.name} has "
            f"{head.shape[1]}: it was fitted on another base. {remedy}"
        )


__all__ = [
    "FORMS",
    "Evidence",
    "Form",
    "Guard",
    "begin_guard",
    "check_guard",
    "fit",
    "last_step",
    "opening_log_odds",
    "read_guard",
    "read_prompts",
    "see_task",
]

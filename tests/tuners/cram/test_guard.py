"""The guard: what theta_0 would refuse goes to theta_0 alone, by a threshold that training requests set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.data.types import Sample
from holdfast.errors import AdapterError, CalibrationError, ConfigError
from holdfast.models.encode import encode_request
from holdfast.models.generate import generate
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.tuners.cram import guard as guards
from holdfast.tuners.cram.folder import from_pretrained, save_pretrained
from holdfast.tuners.cram.guard import Evidence, Guard
from holdfast.tuners.cram.model import Cram
from holdfast.tuners.cram.stored_router import ROUTER, TENSORS, read_router

FORMS = ("openings", "probe")


def own_answers(loaded: LoadedModel, samples: list[Sample]) -> list[Sample]:
    """The samples with what the model itself answers (a pico model's answers: any text)."""
    logits, _ = guards.read_prompts(loaded, samples)
    first = [loaded.tokenizer.decode([token]) for token in logits.argmax(-1).tolist()]
    return [
        Sample.single(s.id, s.prompt, text + " no", images=s.images) for s, text in zip(samples, first, strict=True)
    ]


def planted(form: str, refusals: list[float], tasks: dict[str, list[float]], false_alarm: float = 0.1) -> Guard:
    """A guard fitted to these log-odds; for a probe the state's first unit carries them."""

    def seen(values: list[float]) -> Evidence:
        odds = torch.tensor(values)
        noise = 0.01 * torch.randn(len(values), 3, generator=torch.Generator().manual_seed(len(values)))
        return Evidence(log_odds=odds, states=torch.cat([odds[:, None], noise], 1) if form == "probe" else None)

    empty = Guard(
        form=form,
        false_alarm=0.0,
        openings=(5,),
        opening_texts=("x",),
        refusals=seen(refusals),
        tasks={name: seen(values) for name, values in tasks.items()},
        threshold=0.0,
        caught=0.0,
        screened={},
    )
    return guards.fit(empty, false_alarm=false_alarm)


def only(cram: Cram, samples: list[Sample], caught: set[str]) -> Guard:
    """A guard by which exactly the samples named go to the base: a probe on their states."""
    with cram.base_alone():
        logits, states = guards.read_prompts(cram.loaded, samples)
    target = torch.tensor([1.0 if s.id in caught else -1.0 for s in samples])
    design = torch.cat([states, torch.ones(len(states), 1)], 1)
    solution = torch.linalg.lstsq(design.double(), target.double()[:, None], driver="gelsd").solution[:, 0].float()
    odds = guards.opening_log_odds(logits, (1,))
    seen = Evidence(log_odds=odds, states=states)
    return Guard(
        form="probe",
        false_alarm=0.01,
        openings=(1,),
        opening_texts=(guards._text(cram.loaded, 1),),
        refusals=seen,
        tasks={"warm": seen},
        threshold=0.0,
        caught=1.0,
        screened={"warm": 0},
        weight=solution[:-1],
        bias=float(solution[-1]),
    )


@pytest.fixture
def mixed(requests) -> list[Sample]:
    return [requests["warm"][0], requests["maths"][0], requests["cold"][1], requests["warm"][3]]


# The threshold


@pytest.mark.parametrize("form", FORMS)
def test_the_threshold_keeps_the_false_alarms_in_bounds_and_catches_the_refusals(form):
    task = [-8.0 + 0.1 * i for i in range(40)]
    guard = planted(form, [6.0, 6.5, 7.0, 7.5], {"a": task, "b": [-6.0] * 10})
    assert guard.caught == 1.0
    seen = torch.cat([guard.score(seen) for seen in guard.tasks.values()])
    assert float((seen >= guard.threshold).float().mean()) <= 0.1
    assert bool((guard.score(guard.refusals) >= guard.threshold).all())


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_no_more_than_the_stated_share_of_new_requests_is_a_false_alarm(rate):
    """Requests whose scores reach into the refusals': the order statistic keeps its word on fresh ones."""
    shares = []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        seen = torch.randn(200, generator=g).clamp_max(-0.01) - 1
        guard = planted("openings", [3.0] * 8, {"a": seen.tolist()}, rate)
        new = torch.randn(2000, generator=g).clamp_max(-0.01) - 1
        shares.append(float((new >= guard.threshold).float().mean()))
    assert sum(shares) / len(shares) <= rate + 0.01


def test_a_few_harmful_requests_in_the_data_do_not_raise_the_threshold():
    task = [-8.0] * 99 + [6.0]
    guard = planted("openings", [5.0, 6.0, 7.0], {"a": task})
    assert guard.screened == {"a": 1} and guard.threshold < 5 and guard.caught == 1.0


def test_a_task_that_theta_0_itself_refuses_is_no_harm_and_says_so():
    with pytest.raises(CalibrationError, match=r"catches 0% of the 3 calibration prompts; .* task 'odd'"):
        planted("openings", [5.0, 6.0, 7.0], {"a": [-8.0] * 50, "odd": [8.0] * 50})


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ConfigError, match="guard_false_alarm is"):
        planted("openings", [5.0], {"a": [-8.0] * 5}, rate)


def test_log_odds_of_openings_are_those_of_their_mass():
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, 90.0, 0.0]])
    mass = torch.softmax(logits[0].double(), 0)[[0, 2]].sum()
    found = guards.opening_log_odds(logits, (0, 2))
    assert float(found[0]) == pytest.approx(float(torch.logit(mass)), rel=1e-5)
    assert bool(torch.isfinite(found).all())


def test_a_server_that_gives_log_probabilities_decides_the_same():
    guard = replace(planted("openings", [3.0] * 4, {"a": [-4.0] * 20}), openings=(2, 3), threshold=0.0)
    assert guard.refuses({2: -1.0, 3: -1.5, 7: -2.0})
    assert not guard.refuses({2: -1.0, 7: -0.6})
    assert not guard.refuses({})
    with pytest.raises(AdapterError, match="log-probability is nan"):
        guard.refuses({2: float("nan")})
    with pytest.raises(AdapterError, match="form openings"):
        planted("probe", [3.0] * 4, {"a": [-4.0] * 20}).refuses({2: -1.0})


# Fitting on a model


@pytest.mark.parametrize("form", FORMS)
def test_a_guard_knows_theta_0s_own_openings(base, requests, form):
    answered = own_answers(base, requests["maths"])
    guard = guards.begin_guard(base, form, answered)
    # A pico model may also begin with a part of a letter, which no answer's text shows.
    assert len(guard.refusals) >= len(answered) - 2 and guard.openings
    own = [s for s in answered if s.answer.strip().casefold().startswith(guard.opening_texts)]
    assert len(own) >= len(guard.refusals)


def test_no_calibration_answers_is_refused(base):
    with pytest.raises(CalibrationError, match="needs safety calibration samples"):
        guards.begin_guard(base, "openings", [])


def test_a_policy_that_theta_0_does_not_show_is_refused(base, requests):
    foreign = [Sample.single(s.id, s.prompt, "\u2603 no", images=s.images) for s in requests["maths"]]
    with pytest.raises(CalibrationError, match=r"begins 0 of 12 calibration answers itself; for 'maths-0'"):
        guards.begin_guard(base, "openings", foreign)


def test_a_task_without_requests_is_refused(base, requests):
    guard = guards.begin_guard(base, "openings", own_answers(base, requests["maths"]))
    with pytest.raises(CalibrationError, match="no training request"):
        guards.see_task(guard, base, "warm", [])
    with pytest.raises(CalibrationError, match="has seen no task"):
        guards.fit(guard, false_alarm=0.1)


def test_nan_in_theta_0s_answer_is_refused(pico_folder, requests):
    loaded = load(pico_folder)
    loaded.model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(AdapterError, match="NaN or inf, so the guard cannot tell"):
        guards.read_prompts(loaded, requests["warm"][:2])


def test_left_and_right_padding_read_the_same_last_prompt_token(base, requests):
    pair = [requests["maths"][0], requests["warm"][0]]
    alone = [guards.read_prompts(base, [s])[1][0] for s in pair]
    left = encode_request(base, pair)
    right = {k: v.clone() for k, v in left.items()}
    for row, mask in enumerate(left["attention_mask"]):
        shift = int((mask == 0).sum())
        for key in ("input_ids", "attention_mask"):
            right[key][row] = left[key][row].roll(-shift)
    for inputs in (left, right):
        with torch.no_grad():
            _, states = guards.last_step(base.model, (), inputs)
        torch.testing.assert_close(states, torch.stack(alone), rtol=1e-4, atol=1e-4)


# Serving


def test_a_guarded_request_gets_the_bases_answer_and_the_others_theirs(make: Callable[..., Cram], requests, mixed):
    cram = make(samples=requests, abstain="off")
    loaded = replace(cram.loaded, tuner=cram)
    routed = generate(loaded, mixed, max_new_tokens=5)
    with cram.base_alone():
        plain = generate(replace(loaded, tuner=None), mixed, max_new_tokens=5)
    assert all(a != b for a, b in zip(routed, plain, strict=True)), "experts must matter for this to mean something"
    cram.guard = only(cram, mixed, {mixed[1].id, mixed[2].id})
    expected = [routed[0], plain[1], plain[2], routed[3]]
    assert generate(loaded, mixed, max_new_tokens=5) == expected
    assert cram.last_routing.guarded.sum() == 2
    assert generate(loaded, mixed, max_new_tokens=5) == expected, "decided from what was kept"
    cram._score_of.clear()
    assert [generate(loaded, [s], max_new_tokens=5)[0] for s in mixed] == expected


def test_theta_0_reads_a_request_once(make, requests, mixed, monkeypatch):
    cram = make(samples=requests)
    cram.guard = only(cram, mixed, {mixed[0].id})
    passes: list[int] = []
    ask = cram._ask_base
    monkeypatch.setattr(cram, "_ask_base", lambda args, kwargs: passes.append(1) or ask(args, kwargs))
    loaded = replace(cram.loaded, tuner=cram)
    generate(loaded, mixed, max_new_tokens=4)
    rows = cram.explain(mixed)
    generate(loaded, mixed[:2], max_new_tokens=4)
    assert len(passes) == 1
    assert [row["guarded"] for row in rows] == [True, False, False, False]
    assert rows[0]["weights"] == dict.fromkeys(rows[0]["weights"], 0.0)
    assert all(isinstance(row["guard_score"], float) for row in rows)


def test_the_vision_tower_looks_once_and_is_left_as_it_was(make, requests, mixed):
    cram = make(samples=requests, abstain="off")
    inputs = encode_request(cram.loaded, mixed)
    calls: list[int] = []
    tower = next(m for name, m in cram.loaded.model.named_modules() if name.endswith("vision_tower"))
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), cram.serving(mixed):
        plain = cram.loaded.model(**inputs).logits
    cram.guard = only(cram, mixed, set())
    cram._score_of.clear()
    calls.clear()
    with torch.no_grad(), cram.serving(mixed):
        assert torch.equal(cram.loaded.model(**inputs).logits, plain)
    assert len(calls) == 1
    assert "get_image_features" not in vars(cram.loaded.model.model)
    cram._score_of.clear()
    with pytest.raises(AdapterError, match="4 sequences but 3"), torch.no_grad(), cram.serving(mixed[:3]):
        cram.loaded.model(**inputs)
    handle.remove()
    assert "get_image_features" not in vars(cram.loaded.model.model)


def test_another_picture_under_the_same_name_is_another_request(make, requests, tmp_path):
    import model_zoo

    path = model_zoo.picture(tmp_path / "a.png", (10, 10, 10))
    sample = Sample.single("a", "What colour is it?", images=[path])
    cram = make(samples=requests)
    cram.guard = only(cram, [*requests["warm"][:2], sample], {"a"})
    first = float(cram.guard_scores([sample])[0])
    path.unlink()
    model_zoo.picture(path, (250, 250, 10))
    assert float(cram.guard_scores([sample])[0]) != first


def test_beams_of_a_request_are_decided_alike(make, requests, mixed):
    cram = make(samples=requests, abstain="off")
    inputs = encode_request(cram.loaded, mixed)

    def beams() -> torch.Tensor:
        with torch.no_grad(), cram.serving(mixed):
            return cram.loaded.model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=4)

    with torch.no_grad(), cram.base_alone():
        plain = cram.loaded.model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=4)
    cram.guard = only(cram, mixed, {s.id for s in mixed})
    assert torch.equal(beams(), plain)
    cram._score_of.clear()
    assert torch.equal(beams(), plain)


def test_forced_weights_and_the_base_alone_ask_no_guard(make, requests, mixed, monkeypatch):
    cram = make(samples=requests)
    cram.guard = only(cram, mixed, {s.id for s in mixed})
    monkeypatch.setattr(cram, "_ask_base", lambda *_: pytest.fail("the guard was asked"))
    inputs = encode_request(cram.loaded, mixed)
    with torch.no_grad():
        with cram.forced({"warm": 1.0}):
            cram.loaded.model(**inputs)
        with cram.base_alone():
            cram.loaded.model(**inputs)


# On disk


@pytest.fixture
def guarded(make, requests, mixed, tmp_path) -> tuple[Path, Cram]:
    cram = make(samples=requests)
    cram.guard = only(cram, mixed, {mixed[0].id, mixed[2].id})
    save_pretrained(cram, tmp_path / "cram")
    cram.detach()
    return tmp_path / "cram", cram


def test_saved_and_loaded_it_decides_the_same(guarded, pico_folder, mixed):
    folder, cram = guarded
    again = from_pretrained(folder, load(pico_folder))
    assert again.guard.describe() == cram.guard.describe()
    assert [row["guarded"] for row in again.explain(mixed)] == [True, False, True, False]


def test_a_folder_without_a_guard_keeps_loading_from_format_3(make, requests, pico_folder, tmp_path):
    save_pretrained(make(samples=requests), tmp_path / "cram")
    router = json.loads((tmp_path / "cram" / ROUTER).read_text())
    assert "guard" not in router
    (tmp_path / "cram" / ROUTER).write_text(json.dumps({**router, "format": 3}))
    assert from_pretrained(tmp_path / "cram", load(pico_folder)).guard is None


def damage(folder: Path, data=lambda guard: None, tensors=lambda t: None) -> None:
    router = json.loads((folder / ROUTER).read_text())
    data(router["guard"])
    (folder / ROUTER).write_text(json.dumps(router))
    stored = load_file(folder / TENSORS)
    tensors(stored)
    save_file(stored, folder / TENSORS)


def fill(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda t: t[name].view(-1)[:1].fill_(value)


DAMAGES = {
    "form": ({"data": lambda g: g.update(form="other")}, "form is 'other'"),
    "threshold NaN": ({"data": lambda g: g.update(threshold=float("nan"))}, "threshold is nan"),
    "threshold text": ({"data": lambda g: g.update(threshold="1")}, "threshold is '1'"),
    "threshold gone": ({"data": lambda g: g.pop("threshold")}, "threshold"),
    "no openings": ({"data": lambda g: g.update(openings=[])}, "openings are"),
    "openings of text": ({"data": lambda g: g.update(openings=["a"])}, "openings are"),
    "weight gone": ({"tensors": lambda t: t.pop("guard.weight")}, "a probe needs one"),
    "weight NaN": ({"tensors": fill("guard.weight", float("nan"))}, "weight holds NaN"),
    "states inf": ({"tensors": fill("guard.task.0.states", float("inf"))}, "states holds NaN or inf"),
    "states gone": ({"tensors": lambda t: t.pop("guard.task.0.states")}, "only for a probe"),
    "evidence gone": ({"tensors": lambda t: t.pop("guard.refusals.log_odds")}, "guard.refusals.log_odds"),
    "width": ({"tensors": lambda t: t.update({"guard.weight": torch.zeros(3)})}, "states of calibration prompts"),
    "left over": ({"tensors": lambda t: t.update({"guard.extra": torch.zeros(3)})}, "no part guard.extra"),
    "a task less": ({"data": lambda g: g.update(tasks=[])}, "no part guard.task.0"),
}


@pytest.mark.parametrize("change,message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_guard_is_refused(guarded, change, message):
    folder, _ = guarded
    damage(folder, **change)
    with pytest.raises(AdapterError, match=message):
        read_router(folder)


def test_a_guard_whose_data_is_gone_is_refused(guarded):
    folder, _ = guarded
    router = json.loads((folder / ROUTER).read_text())
    del router["guard"]
    (folder / ROUTER).write_text(json.dumps(router))
    with pytest.raises(AdapterError, match="has no guard"):
        read_router(folder)


def test_a_guard_of_another_base_is_refused(guarded, pico_folder):
    folder, _ = guarded
    other = load(pico_folder)
    other.model.get_output_embeddings().weight.data += 0.01
    with pytest.raises(AdapterError, match="another base"):
        from_pretrained(folder, other)
    damage(folder, data=lambda g: g.update(opening_texts=["\u2603"]))
    with pytest.raises(AdapterError, match="refusal opening 1 is '\u2603' there"):
        from_pretrained(folder, load(pico_folder))

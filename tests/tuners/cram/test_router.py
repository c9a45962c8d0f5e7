"""Groups, weights, floors: one request at a time, whatever its neighbours."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cram_kit
from holdfast.config import decode
from holdfast.errors import AdapterError, ConfigError, DataError, UnknownNameError
from holdfast.functional.cram import RankRule
from holdfast.tuners.cram.cram_config import CramConfig, ReleasedCode
from holdfast.tuners.cram.router import ExpertCard, Features, Router, card_from_features, describe

D = 16


def direction(seed: int) -> torch.Tensor:
    return torch.nn.functional.layer_norm(torch.randn(D, generator=torch.Generator().manual_seed(seed)), (D,))


def task(text: int, image: int | None, n: int = 40, spread: float = 0.2) -> Features:
    """Requests around one instruction and one image direction."""
    g = torch.Generator().manual_seed(100 * text + (image or 0))
    images = torch.zeros(n, D) if image is None else 3 * direction(image) + spread * torch.randn(n, D, generator=g)
    return Features(
        text=direction(text) + spread * torch.randn(n, D, generator=g),
        image=images,
        has_image=torch.full((n,), image is not None),
    )


def card(name: str, group: int, features: Features, config: CramConfig) -> ExpertCard:
    made, _ = card_from_features(name, 0, features, config, seed=0)
    return replace(made, group=group)


def router(**changes: object) -> Router:
    config = cram_kit.config(**changes)
    cards = [
        card("a", 0, task(1, 11), config),
        card("b", 0, task(1, 12), config),
        card("c", 1, task(2, 11), config),
        card("words", 1, task(2, None), config),
    ]
    return Router(config, cards)


def test_instruction_chooses_the_group_and_image_the_expert():
    r = router()
    for text, image, name in ((1, 11, "a"), (1, 12, "b"), (2, 11, "c")):
        routing = r.route(task(text, image, n=10))
        best = [r.experts[int(e)].name for e in routing.weights.mean(1).argmax(-1)]
        assert best == [name] * 10
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(10, 1))


def test_a_text_only_request_is_shared_by_text_centroids_never_given_to_the_first():
    config = cram_kit.config(abstain="off", sigma_scale=1.0)
    near, far = task(1, 11), task(1, 12)
    cards = [card("first", 0, replace(far, text=far.text + 3 * direction(7)), config), card("second", 0, near, config)]
    asked = Features(text=near.text, image=torch.zeros(40, D), has_image=torch.zeros(40, dtype=torch.bool))
    weights = Router(config, cards).route(asked).weights[:, 0]
    assert float(weights[:, 1].min()) > 0.5
    torch.testing.assert_close(weights.sum(-1), torch.ones(40))


def test_an_image_in_a_group_without_images_is_routed_by_its_instruction():
    config = cram_kit.config(abstain="off")
    r = Router(config, [card("words", 0, task(1, None), config)])
    assert r.route(task(1, 11, n=3)).weights[:, 0, 0].tolist() == [1, 1, 1]


def test_a_request_unlike_every_task_goes_to_the_base_alone():
    r = router()
    routing = r.route(task(5, 11, n=20))
    assert bool(routing.abstained.all()) and not routing.weights.any()
    assert not r.route(task(1, 11, n=20, spread=0.1)).abstained.any()
    assert not Router(cram_kit.config(abstain="off"), r.experts).route(task(5, 11, n=20)).abstained.any()


def test_an_image_unlike_every_task_abstains_only_when_images_count():
    for mode, expected in (("text", False), ("both", True)):
        r = router(abstain=mode)
        assert bool(r.route(task(1, 15, n=20, spread=0.1)).abstained.all()) is expected
    assert not router(abstain="both").route(task(1, 11, n=40, spread=0.1)).abstained.any()


def test_floors_come_from_held_out_training_samples_only():
    config = cram_kit.config(held_out=0.25, abstain="both", abstain_quantile=0.1, abstain_slack=0.0)
    features = task(1, 11)
    made, held = card_from_features("a", 0, features, config, seed=3)
    assert int(held.sum()) == 10 and made.samples == 30
    cosine = torch.nn.functional.cosine_similarity(features.text[held], features.text[~held].mean(0, keepdim=True))
    assert made.text_floor == pytest.approx(float(cosine.quantile(0.1)), abs=1e-6)
    centroid = features.image[~held].mean(0)
    torch.testing.assert_close(made.image_centroid[0], centroid)
    assert made.image_radius == pytest.approx(
        float((features.image[held] - centroid).norm(dim=1).quantile(0.9)), rel=1e-5
    )


@pytest.mark.parametrize("mode", ["off", "text", "both"])
def test_floor_and_radius_are_kept_whatever_abstain_says(mode):
    made, held = card_from_features("a", 0, task(1, 11), cram_kit.config(held_out=0.25, abstain=mode), seed=3)
    assert held.any() and made.text_floor is not None and made.image_radius is not None


def test_a_task_too_small_to_hold_anything_out_has_no_floor():
    made, _ = card_from_features("a", 0, task(1, 11, n=3), cram_kit.config(), seed=0)
    assert made.text_floor is None and made.samples == 3


def test_routing_does_not_depend_on_neighbours():  # (g), (l)
    r = router()
    parts = [task(1, 11, 3), task(2, None, 3), task(1, 12, 3)]
    mixed = Features(
        text=torch.cat([p.text for p in parts]),
        image=torch.cat([p.image for p in parts]),
        has_image=torch.cat([p.has_image for p in parts]),
    )
    together = r.route(mixed).weights
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(r.route(mixed[order]).weights, together[order])
    for i in range(9):
        assert torch.equal(r.route(mixed[torch.tensor([i])]).weights[0], together[i])


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.values = max(self.values, out.numel())
        return out


@pytest.mark.parametrize("mode", ["off", "text", "both"])
def test_many_requests_are_decided_in_parts_as_one_by_one(mode):
    r = router(abstain=mode, sigma_scale=2.0)
    parts = [task(1, 11, n=250, spread=0.25), task(2, None, n=250, spread=0.25)]
    many = Features(**{name: torch.cat([vars(p)[name] for p in parts]) for name in vars(parts[0])})
    with Largest() as largest:
        routing = r.route(many)
    assert largest.values <= 32 * len(r) * D, "not 500 requests times all centroids"
    for i in (0, 31, 32, 499):
        one = r.route(many[torch.tensor([i])])
        for name, value in vars(one).items():
            if value is None:  # what a guard would have said
                assert getattr(routing, name) is None
            else:
                assert torch.equal(getattr(routing, name)[i : i + 1], value)
    assert routing.group.tolist() == [0] * 250 + [1] * 250 and bool(routing.weights[:, 0].any(0).all())


def test_each_group_is_as_soft_as_its_own_tasks_are_wide():
    """Sigma: `sigma_scale` times the mean over the group's experts of their median distance to the centroid."""
    config = cram_kit.config(abstain="off", sigma_scale=2.0)
    tight = [card(name, 0, task(1, image, spread=0.1), config) for name, image in (("a", 11), ("b", 12))]
    wide = [card(name, 1, task(2, image, spread=s), config) for name, image, s in (("c", 13, 0.3), ("d", 14, 0.9))]
    r = Router(config, [*tight, *wide])
    for group, cards in ((0, tight), (1, wide)):
        asked = task(1 + group, 11 + 2 * group, n=4)
        sigma = 2.0 * (cards[0].image_scatter + cards[1].image_scatter) / 2
        assert r.sigma_of(group) == pytest.approx(sigma)
        distance = torch.stack([(asked.image - c.image_centroid).square().sum(-1) for c in cards], dim=1)
        members = slice(2 * group, 2 * group + 2)
        weights = r.route(asked).weights[:, 0]
        torch.testing.assert_close(weights[:, members], torch.softmax(-distance / (2 * sigma**2), -1))
    assert r.sigma_of(1) > 4 * r.sigma_of(0)


def test_prototype_is_the_mean_over_samples_and_a_learned_task_never_moves_it_elsewhere():
    config = cram_kit.config(held_out=0.0)
    few, many = task(1, 11, n=10), task(3, 11, n=30)
    r = Router(config, [card("few", 0, few, config), card("many", 0, many, config)])
    expected = torch.cat([few.text, many.text]).mean(0)
    torch.testing.assert_close(r.prototypes()[0], expected, rtol=1e-4, atol=1e-5)
    grown = r.adding(card("other", 1, task(2, 11), config))
    assert torch.equal(grown.prototypes()[0], r.prototypes()[0])


def test_a_new_task_joins_or_opens_a_group():
    config = cram_kit.config()
    empty = Router(config)
    assert empty.decide(task(1, 11).text).rule == "first"
    one = empty.adding(card("a", 0, task(1, 11), config))
    assert one.decide(task(1, 12).text).group == 0
    assert one.decide(task(4, 12).text).group is None
    limited = Router(cram_kit.config(max_groups=1), one.experts)
    assert (limited.decide(task(4, 12).text).group, limited.decide(task(4, 12).text).rule) == (0, "limit")


def test_without_reuse_one_expert_answers_alone():
    soft = router(sigma_scale=100.0).route(task(1, 11, n=5)).weights[:, 0]
    hard = router(sigma_scale=100.0, reuse=False).route(task(1, 11, n=5)).weights[:, 0]
    assert float(soft.max()) < 0.9
    assert hard[:, 0].tolist() == [1.0] * 5


def test_explanations_name_groups_and_experts():
    r = router()
    rows = describe(r.route(task(1, 12, n=2, spread=0.1)), r, ["x", "y"])
    assert rows[0]["id"] == "x" and rows[0]["group"] == "a" and rows[0]["abstained"] is False
    assert set(rows[0]["weights"]) == {"a", "b", "c", "words"} and set(rows[0]["similarity"]) == {"a", "c"}


def test_bad_routers_say_what_was_wrong():
    config = cram_kit.config()
    good = card("a", 0, task(1, 11), config)
    with pytest.raises(AdapterError, match=r"'a': its image centroid holds NaN or inf"):
        replace(good, image_centroid=good.image_centroid * math.nan)
    with pytest.raises(AdapterError, match=r"Two experts have one name"):
        Router(config, [good, good])
    with pytest.raises(AdapterError, match=r"no expert yet; learn a task"):
        Router(config).route(task(1, 11))
    with pytest.raises(DataError, match=r"image feature is NaN or inf"):
        replace(task(1, 11), image=torch.full((40, D), math.nan)).checked()
    with pytest.raises(DataError, match=r"'t' has no training sample"):
        card_from_features("t", 0, task(1, 11, n=0), config, seed=0)


FLOATS = [f.name for f in fields(CramConfig) if "float" in str(f.type)]
RANK_FLOATS = [f.name for f in fields(RankRule) if "float" in str(f.type)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_option_takes_a_number_that_is_not_finite(value):
    assert {"sigma", "join_margin", "penalty"} <= set(FLOATS) and RANK_FLOATS == ["tau_alloc", "tau_novel"]
    for name in FLOATS:
        with pytest.raises(ConfigError, match=rf"{name} is {value}; expected a finite number"):
            cram_kit.config(**{name: value})
    for name in RANK_FLOATS:
        with pytest.raises(ConfigError, match=rf"{name} is {value}; expected"):
            RankRule(**{name: value})


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"targets": ()}, "targets is empty"),
        ({"buffer_rank": 3}, "Raise buffer_rank or lower r_max"),
        ({"max_groups": 0}, "max_groups is 0"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"penalty": -0.5}, "penalty is -0.5; expected 0 or more"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"warmup_fraction": 0.0}, "warmup_fraction is 0.0"),
        ({"learn_centroid": True, "sigma": 0.0}, "learn_centroid needs a soft choice"),
        ({"centroid_per_block": True}, "centroid_per_block only differs"),
        ({"released": {"forward_factor": 0.0}}, r"forward_factor is 0\.0"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        decode(CramConfig, changes) if "released" in changes else cram_kit.config(**changes)


def test_the_run_file_of_ucit_has_the_released_limits():
    from holdfast import experiment
    from holdfast.experiment import build_methods

    path = Path(__file__).parents[3] / "configs" / "cram-llava-1.5-7b.yaml"
    found = build_methods(experiment.read_run(path))["cram_official"].config.cram
    assert found == CramConfig.official(
        rank=replace(CramConfig.official().rank, r_max=9), released={"max_groups": 5}, dropout=0.05
    )


def test_official_options_are_those_of_the_released_code():
    official = CramConfig.official(dropout=0.1)
    assert official.released == ReleasedCode(
        forward_factor=2.0,
        double_scale=True,
        learn_centroid=True,
        centroid_per_block=True,
        penalty_space="input",
        max_groups=10,
    )
    # The width 2 is a distance between the features of this encoder.
    assert official.sigma == 2.0 and "clip-vit-large" in official.encoder and official.rank.r_max == 10
    own = CramConfig.official(learn_centroid=False, released={"max_groups": 2, "centroid_per_block": False})
    assert own.released == ReleasedCode(forward_factor=2.0, double_scale=True, penalty_space="input", max_groups=2)
    assert CramConfig.official(released=ReleasedCode()).released == ReleasedCode()
    assert (official.rank.alloc, official.rank.novelty, official.rank.cap_first) == ("absolute", "absolute", True)
    assert official.abstain == "off" and official.dropout == 0.1


# Option beside the others, as it was called -> the member of `released` that it is now, and a value that is no default.
OLD = {
    "compat_double_scale": ("double_scale", True),
    "learn_centroid": ("learn_centroid", True),
    "penalty_space": ("penalty_space", "input"),
    "max_groups": ("max_groups", 2),
    "warmup_history": ("warmup_history", "routed"),
}


@pytest.mark.parametrize("old", OLD)
def test_a_switch_by_its_old_name_is_the_switch(old):
    new, value = OLD[old]
    wanted = CramConfig(released=ReleasedCode(**{new: value}))
    for found in (CramConfig(**{old: value}), decode(CramConfig, {old: value}), replace(CramConfig(), **{old: value})):
        assert found == wanted and getattr(found, old) == value
    with pytest.raises(ConfigError, match=rf"{old}=.* is the old name of released\.{new}, .* Keep released\.{new}"):
        decode(CramConfig, {old: value, "released": {new: getattr(ReleasedCode(), new)}})
    with pytest.raises(ConfigError, match=r"released is 3 \(int\); expected a mapping"):
        decode(CramConfig, {old: value, "released": 3})


def test_old_names_are_laid_beside_one_another_and_beside_the_new():
    wanted = ReleasedCode(learn_centroid=True, centroid_per_block=True, max_groups=3)
    flat = {"learn_centroid": True, "centroid_per_block": True}
    assert CramConfig(**flat, max_groups=3).released == wanted
    assert decode(CramConfig, {**flat, "released": {"max_groups": 3}}).released == wanted
    with pytest.raises(UnknownNameError, match=r"cram\.released\.max_group: unknown key\. Did you mean 'max_groups'"):
        decode(CramConfig, {"released": {"max_group": 1}}, "cram")

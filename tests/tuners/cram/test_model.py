"""CRAM on a pico LLaVA: the same answer alone, in any batch, with any padding, any cache, any number of beams."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cram_kit
from holdfast.data.types import Sample
from holdfast.errors import AdapterError, ConfigError, DataError, UnknownNameError
from holdfast.models.encode import encode_request
from holdfast.models.load import load

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def answer(cram, samples, inputs=None):
    """Last-token logits (B, vocabulary) and the routing weights (B, E)."""
    inputs = inputs if inputs is not None else encode_request(cram.loaded, samples)
    with cram.serving(samples):
        logits = cram.loaded.model(**inputs).logits
    return logits[:, -1], cram.last_routing.weights[:, 0]


def mixed(requests) -> list[Sample]:
    return [requests["warm"][0], requests["maths"][11], requests["cold"][2], requests["warm"][11]]


def test_each_task_finds_its_expert(make, requests):
    cram = make(samples=requests)
    assert [c.group for c in cram.router.experts] == [0, 0, 1]
    for name, rows in requests.items():
        for row in cram.explain(rows):
            assert max(row["weights"], key=row["weights"].get) == name


def test_weights_read_off_the_forward_pass_equal_those_made_ahead(make, requests):
    cram = make(samples=requests, sigma_scale=1.0)
    samples = mixed(requests)
    torch.testing.assert_close(answer(cram, samples)[1], cram.route(samples).weights[:, 0], rtol=1e-4, atol=1e-5)


def test_a_sample_gets_the_same_logits_alone_and_in_any_batch(make, requests):  # (g), (l)
    cram = make(samples=requests, sigma_scale=1.0)
    samples = mixed(requests)
    logits, weights = answer(cram, samples)
    assert len({tuple(w.argmax(-1, keepdim=True).tolist()) for w in weights}) == 3
    for order in ([2, 0, 3, 1], [1], [3, 2]):
        other_logits, other_weights = answer(cram, [samples[i] for i in order])
        torch.testing.assert_close(other_logits, logits[order], **TOLERANCE)
        torch.testing.assert_close(other_weights, weights[order], rtol=1e-4, atol=1e-5)


def test_padding_side_changes_nothing(make, requests):  # (g)
    cram = make(samples=requests, sigma_scale=1.0)
    samples = mixed(requests)
    left = encode_request(cram.loaded, samples)
    lengths = left["attention_mask"].sum(1)
    right = dict(left)
    for key, pad in (("input_ids", 0), ("attention_mask", 0)):
        right[key] = torch.full_like(left[key], pad)
        for row, n in enumerate(lengths):
            right[key][row, :n] = left[key][row, -n:]
    logits, weights = answer(cram, samples, left)
    with torch.no_grad(), cram.serving(samples):
        all_logits = cram.loaded.model(**right).logits
    torch.testing.assert_close(all_logits[torch.arange(4), lengths - 1], logits, **TOLERANCE)
    torch.testing.assert_close(cram.last_routing.weights[:, 0], weights, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_equals_generation_without(make, requests):
    cram = make(samples=requests)
    samples = mixed(requests)
    inputs = encode_request(cram.loaded, samples)
    settings = {"max_new_tokens": 5, "do_sample": False}
    with cram.serving(samples):
        cached = cram.loaded.model.generate(**inputs, **settings, use_cache=True)
    with cram.serving(samples):
        plain = cram.loaded.model.generate(**inputs, **settings, use_cache=False)
    with cram.base_alone():
        base = cram.loaded.model.generate(**inputs, **settings)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, base)


def test_beam_search_keeps_each_samples_experts(make, requests):
    cram = make(samples=requests)
    samples = mixed(requests)
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    inputs = encode_request(cram.loaded, samples)
    with cram.serving(samples):
        together = cram.loaded.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    for i, sample in enumerate(samples):
        one = encode_request(cram.loaded, [sample])
        with cram.serving([sample]):
            alone = cram.loaded.model.generate(**one, **settings)[:, one["input_ids"].shape[1] :]
        assert torch.equal(alone[0], together[i, : alone.shape[1]])


def test_several_images_are_routed_by_their_mean(make, requests):
    cram = make(samples=requests, sigma_scale=2.0)
    red, blue = requests["warm"][0], requests["cold"][0]
    both = Sample.single("both", "What colour is it? 0", images=[red.images[0], blue.images[0]])
    features = cram.features([red, blue, both])
    torch.testing.assert_close(features.image[2], features.image[:2].mean(0))
    torch.testing.assert_close(answer(cram, [both])[1], cram.route([both]).weights[:, 0], rtol=1e-4, atol=1e-5)


def test_what_no_expert_claims_gets_exactly_the_bases_answer(make, requests):
    cram = make(samples=requests)
    stranger = Sample.single("s", "ZZZZ QQQQ !!!!", images=requests["warm"][0].images)
    inputs = encode_request(cram.loaded, [stranger])
    logits, weights = answer(cram, [stranger])
    with torch.no_grad(), cram.base_alone():
        base = cram.loaded.model(**inputs).logits[:, -1]
    assert not weights.any() and bool(cram.last_routing.abstained[0])
    torch.testing.assert_close(logits, base)


def test_two_models_in_one_process_do_not_meet(make, requests, pico_folder: Path):  # (k)
    first = make(samples=requests)
    second = make(load(pico_folder), samples={"maths": requests["maths"]}, abstain="off")
    samples = mixed(requests)
    alone = answer(first, samples)[0]
    inputs = encode_request(first.loaded, samples)
    with torch.no_grad(), first.serving(samples), second.serving(samples):
        nested = first.loaded.model(**inputs).logits[:, -1]
        other = second.loaded.model(**inputs).logits[:, -1]
    torch.testing.assert_close(nested, alone)
    assert second.last_routing.weights.shape[-1] == 1
    assert float((other - nested).abs().max()) > 0.1


@torch.no_grad()
def test_two_models_that_answer_in_turns_keep_their_decisions(make, requests, pico_folder: Path):  # (k)
    """Prefill of one, prefill of the other, decoding step of the first."""
    first = make(samples=requests)
    second = make(load(pico_folder), samples=requests)
    mine, other = requests["warm"][:2], requests["cold"][:2]
    inputs, others = encode_request(first.loaded, mine), encode_request(second.loaded, other)

    def step(cache, ids):
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
        return first.loaded.model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1]

    found = []
    for interrupted in (False, True):
        with first.serving(mine), second.serving(other):
            prefill = first.loaded.model(**inputs, use_cache=True)
            if interrupted:
                second.loaded.model(**others)
            ids = prefill.logits[:, -1].argmax(-1, keepdim=True)
            found.append(step(prefill.past_key_values, ids))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    weights = [cram.last_routing.weights[:, 0].argmax(-1).tolist() for cram in (first, second)]
    assert weights == [[0, 0], [1, 1]], "the two must decide differently for this test to mean something"


def test_a_copied_model_carries_its_own_experts(make, requests, pico_folder: Path):
    cram = make(load(pico_folder), samples=requests)
    samples = mixed(requests)
    expected = answer(cram, samples)[0]
    twin = copy.deepcopy(cram.loaded.model).holdfast_cram
    cram.detach()
    torch.testing.assert_close(answer(twin, samples)[0], expected)
    assert twin.loaded.model is not cram.loaded.model


def test_detaching_gives_the_base_back(make, requests):
    cram = make(samples=requests)
    model, samples = cram.loaded.model, mixed(requests)
    inputs = encode_request(cram.loaded, samples)
    with torch.no_grad():
        with cram.base_alone():
            before = model(**inputs).logits
        cram.detach()
        torch.testing.assert_close(model(**inputs).logits, before)
    assert not any("cram" in name for name, _ in model.named_modules())


def test_bfloat16_stays_bfloat16_and_close(make, requests, pico_folder: Path):
    exact = make(samples=requests)
    samples = mixed(requests)
    expected = answer(exact, samples)[0]
    cram = make(load(pico_folder, dtype=torch.bfloat16), samples=requests)
    logits, weights = answer(cram, samples)
    assert logits.dtype == torch.bfloat16 and cram.layers[0].stacked_a.dtype == torch.bfloat16
    torch.testing.assert_close(weights, answer(exact, samples)[1], rtol=0.05, atol=0.02)
    relative = (logits.float() - expected).norm() / expected.norm()
    assert float(relative) < 0.05


def test_the_fused_pass_compiles_without_a_graph_break(make, requests):
    cram = make(samples=requests)
    layer = cram.layers[0]
    linear = dict(cram.loaded.model.named_modules())[layer.name]
    cram.activate(torch.tensor([[[0.3, 0.7, 0.0]], [[0.0, 0.0, 1.0]]]))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), linear(x))
        cram.activate(torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]))
        torch.testing.assert_close(compiled(x), linear(x))


def test_a_compiled_model_answers_request_after_request_and_breaks_only_as_the_base_does(make, requests, pico_folder):
    def breaks() -> set[str]:
        return set(torch._dynamo.utils.counters["graph_break"])

    def compiled(loaded):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return torch.compile(loaded.model, backend="aot_eager")

    base, loaded = load(pico_folder), load(pico_folder)
    rows = [requests["warm"][0], requests["cold"][1]]
    inputs = encode_request(loaded, rows)
    with torch.no_grad():
        compiled(base)(**inputs)
        own = breaks()
        cram = make(loaded, samples=requests)
        model = compiled(loaded)
        for samples in (rows, rows[::-1], requests["maths"][:2]):
            inputs = encode_request(loaded, samples)
            expected, weights = answer(cram, samples, inputs)
            with cram.serving(samples):
                found = model(**inputs).logits[:, -1]
            torch.testing.assert_close(found, expected, **TOLERANCE)
            assert torch.equal(cram.last_routing.weights[:, 0], weights)
            if samples is rows:
                assert breaks() <= own
    torch._dynamo.reset()


def test_forced_weights_bypass_the_router(make, requests):
    cram = make(samples=requests)
    samples = requests["warm"][:2]
    inputs = encode_request(cram.loaded, samples)
    with torch.no_grad():
        with cram.forced({"cold": 1.0}):
            forced = cram.loaded.model(**inputs).logits[:, -1]
        with cram.weighted([{"cold": 1.0}, {"cold": 1.0}]):
            torch.testing.assert_close(cram.loaded.model(**inputs).logits[:, -1], forced)
    assert float((forced - answer(cram, samples)[0]).abs().max()) > 0.1
    with (
        pytest.raises(UnknownNameError, match=r"Unknown expert 'could'. Did you mean 'cold'"),
        cram.forced({"could": 1}),
    ):
        pass


# A value read, or a shape that depends on values: the host would wait for the device.
WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in WAITING
        return func(*args, **(kwargs or {}))


def test_routing_and_experts_add_no_host_read_to_a_forward_pass(make, requests):
    cram = make(samples=requests, abstain="both")
    samples = mixed(requests)
    inputs = encode_request(cram.loaded, samples)
    counts = []
    for context in (cram.base_alone(), cram.serving(samples)):
        with torch.no_grad(), context, HostReads() as reads:
            cram.loaded.model(**inputs)  # for the image tokens, transformers reads some values itself
        counts.append(reads.count)
    assert counts[1] == counts[0]
    assert cram.last_routing is not None
    with HostReads() as reads:
        assert bool(cram.last_routing.weights.any())
    assert reads.count == 1, "a read is seen"


def test_the_innermost_of_nested_contexts_decides_and_the_outer_one_comes_back(make, requests):
    cram = make(samples=requests)
    samples = requests["warm"][:2]
    inputs = encode_request(cram.loaded, samples)

    @torch.no_grad()
    def logits():
        return cram.loaded.model(**inputs).logits[:, -1]

    with cram.base_alone():
        base = logits()
    with cram.forced({"cold": 1.0}):
        cold = logits()
    routed = answer(cram, samples)[0]
    with cram.serving(samples):
        # Before and after the request's first pass.
        for _ in range(2):
            with cram.base_alone():
                torch.testing.assert_close(logits(), base)
            with cram.forced({"cold": 1.0}):
                torch.testing.assert_close(logits(), cold)
            torch.testing.assert_close(logits(), routed)
    with cram.base_alone():
        with cram.serving(samples):
            torch.testing.assert_close(logits(), routed)
        torch.testing.assert_close(logits(), base)
    with pytest.raises(AdapterError, match=r"ran before its request was routed"):
        logits()


def test_misuse_says_what_to_do(make, base, requests):
    cram = make(samples=requests)
    samples = mixed(requests)
    inputs = encode_request(cram.loaded, samples)
    with pytest.raises(AdapterError, match=r"ran before its request was routed"):
        cram.loaded.model(**inputs)
    with pytest.raises(AdapterError, match=r"4 sequences but 3 requests"), cram.serving(samples[:3]):
        cram.loaded.model(**inputs)
    with pytest.raises(AdapterError, match=r"already carries CRAM experts"):
        make(samples=requests)
    with (
        pytest.raises(DataError, match=r"'empty' has no instruction text"),
        cram.serving([Sample.single("empty", "<image>", images=samples[0].images)]),
    ):
        pass
    cram.detach()
    with pytest.raises(UnknownNameError, match=r"Unknown target linear 'query'"):
        make(samples={}, targets=("query",))


def test_an_image_only_router_refuses_a_request_without_an_image(make, requests):
    cram = make(samples={"warm": requests["warm"]}, route_by="image")
    with pytest.raises(DataError, match=r"'maths-0' has no image, .*\"route_by\": \"auto\" under \"config\""):
        cram.route(requests["maths"][:1])


def test_a_configuration_error_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"abstain_quantile is 1\.5"):
        cram_kit.config(abstain_quantile=1.5)

"""The same answer alone and in any batch; order restored; each batch handed over as it is done."""

from __future__ import annotations

import pytest

from holdfast.data.types import Sample
from holdfast.errors import ConfigError
from holdfast.models.encode import encode_request
from holdfast.models.generate import generate
from holdfast.models.loaded import LoadedModel


@pytest.mark.parametrize("seed", [None, 7])
def test_a_sample_is_answered_alike_alone_and_in_any_batch(
    loaded: LoadedModel, samples: list[Sample], seed: int | None
) -> None:
    alone = [generate(loaded, [s], max_new_tokens=6, seed=seed)[0] for s in samples]
    assert len(set(alone)) > 1
    assert generate(loaded, samples, max_new_tokens=6, batch_size=5, seed=seed) == alone
    assert generate(loaded, samples[::-1], max_new_tokens=6, batch_size=2, seed=seed) == alone[::-1]


def test_seeds_differ_and_repeat(loaded: LoadedModel, samples: list[Sample]) -> None:
    first = generate(loaded, samples, max_new_tokens=6, seed=1)
    assert generate(loaded, samples, max_new_tokens=6, seed=1) == first
    assert generate(loaded, samples, max_new_tokens=6, seed=2) != first


def test_batches_are_handed_over_once_and_complete(loaded: LoadedModel, samples: list[Sample]) -> None:
    seen: dict[int, str] = {}
    calls = []

    def note(indices: list[int], texts: list[str]) -> None:
        calls.append(len(indices))
        assert not set(indices) & set(seen)
        seen.update(zip(indices, texts, strict=True))

    answers = generate(loaded, samples, max_new_tokens=3, batch_size=2, on_batch=note)
    assert calls == [2, 2, 1]
    assert [seen[i] for i in range(len(samples))] == answers


def test_the_answer_stops_at_the_end_token(
    loaded: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = encode_request(loaded, samples[:1])
    tokens = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()
    assert tokens[1] != tokens[0]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [2, tokens[1]])
    stopping = LoadedModel(model=loaded.model, processor=loaded.processor, name="stops")
    assert generate(stopping, samples[:1], max_new_tokens=4) == [loaded.tokenizer.decode(tokens[:1]).strip()]


def test_a_checkpoints_own_sampling_settings_change_nothing(
    loaded: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = generate(loaded, samples, max_new_tokens=4)
    monkeypatch.setattr(loaded.model.generation_config, "do_sample", True)
    monkeypatch.setattr(loaded.model.generation_config, "temperature", 5.0)
    monkeypatch.setattr(loaded.model.generation_config, "repetition_penalty", 9.0)
    assert generate(loaded, samples, max_new_tokens=4) == before


def test_nonsense_sizes_are_refused(loaded: LoadedModel, samples: list[Sample]) -> None:
    with pytest.raises(ConfigError, match="batch_size 0"):
        generate(loaded, samples, max_new_tokens=3, batch_size=0)


def test_no_samples_give_no_answers(loaded: LoadedModel) -> None:
    assert generate(loaded, [], max_new_tokens=3) == []

"""The user's requests, split: disjoint, alike every time, spread over the categories."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.data.types import Sample
from holdfast.errors import DataError
from holdfast.restore.sets import RestoreSets, Split, content, refuse_shared, split


def requests(count: int, *, categories: int = 1) -> list[Sample]:
    return [Sample.single(f"r{i}", f"request number {i}", meta={"category": str(i % categories)}) for i in range(count)]


def halves(samples: list[Sample], **options: int) -> Split:
    return split(samples, None, **{"calibrate": 8, "probes": 64, "seed": 0, **options}, what="--safety")


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 40), st.integers(0, 5))
def test_calibration_and_probe_share_no_request(count: int, calibrate: int, probes: int, seed: int) -> None:
    found = halves(requests(count), calibrate=calibrate, probes=probes, seed=seed)
    assert found.calibration
    assert found.probe
    assert not {content(s) for s in found.calibration} & {content(s) for s in found.probe}
    assert len(found.calibration) <= min(calibrate, count // 2)
    assert len(found.probe) <= probes


def test_the_split_does_not_depend_on_the_order_of_the_file() -> None:
    samples = requests(30, categories=3)
    assert halves(samples) == halves(samples[::-1])
    assert halves(samples) != halves(samples, seed=1)


def test_few_samples_still_show_every_category() -> None:
    found = halves(requests(40, categories=4), calibrate=4)
    assert {s.meta["category"] for s in found.calibration} == {"0", "1", "2", "3"}


def test_a_request_given_twice_is_not_on_both_sides() -> None:
    twice = [*requests(4), *(Sample.single(f"again{i}", f"request  number {i} ") for i in range(4))]
    found = halves(twice)
    assert len(found.calibration) + len(found.probe) == 4


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_requests_are_refused(count: int) -> None:
    with pytest.raises(DataError, match="at least 2"):
        halves(requests(count))


def test_probes_of_ones_own_must_be_others() -> None:
    samples = requests(6)
    with pytest.raises(DataError, match="both calibrated on and probed with: 'r2'"):
        split(samples, samples[2:3], calibrate=6, probes=6, seed=0, what="--safety")
    found = split(samples[:3], samples[3:], calibrate=6, probes=6, seed=0, what="--safety")
    assert len(found.calibration) == len(found.probe) == 3


def test_shared_requests_are_named() -> None:
    with pytest.raises(DataError, match="'r1' and 'x'"):
        refuse_shared(
            requests(3), [Sample.single("x", "request number 1")], what="a and b", first="forbidden", second="harmless"
        )


def test_what_is_not_protected_is_said() -> None:
    one = halves(requests(40))
    assert RestoreSets(safety=one, benign=one, task=one).unprotected() == []
    assert len(RestoreSets(safety=one, benign=Split(), task=Split()).unprotected()) == 2
    assert "steps of 50 points" in RestoreSets(safety=halves(requests(4)), benign=one, task=one).warnings()[0]

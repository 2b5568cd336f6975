"""The planned send times: fixed, seeded, exact in number; and the clock that keeps them."""

from __future__ import annotations

import time

import gevent
import numpy as np
import pytest

from deepseek.spec import InputError
from loadtests.load.workers.clock import Clock
from loadtests.results.schedule import Arrivals, Segment, segments_of, send_times_s


def steady(rate_rps: float, duration_s: float) -> tuple[Segment, ...]:
    return (Segment(duration_s=duration_s, rate_rps=rate_rps),)


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_a_schedule_has_exactly_the_arrivals_of_its_rate_ascending(arrivals: Arrivals) -> None:
    times = send_times_s(steady(137, 10), arrivals, seed=3)
    assert len(times) == 1370
    assert (np.diff(times) >= 0).all()
    assert 0 <= times[0] < times[-1] < 10


def test_the_same_seed_gives_the_same_times_and_another_gives_others() -> None:
    first, same, other = (send_times_s(steady(50, 4), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_constant_arrivals_are_evenly_spaced() -> None:
    times = send_times_s(steady(100, 2), "constant")
    np.testing.assert_allclose(np.diff(times), 0.01)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(send_times_s(steady(100, 200), seed=1))
    assert gaps.mean() == pytest.approx(0.01, rel=0.02)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # true only of the exponential distribution
    assert (gaps > 0.03).mean() == pytest.approx(np.exp(-3), rel=0.15)


@pytest.mark.parametrize(("start_rps", "end_rps", "count"), [(0, 200, 1000), (50, 200, 1250), (200, 50, 1250)])
def test_a_ramp_has_the_arrivals_of_the_area_under_its_rate(start_rps: float, end_rps: float, count: int) -> None:
    times = send_times_s((Segment(duration_s=10, rate_rps=start_rps, end_rps=end_rps),), "constant")
    area = start_rps * times + (end_rps - start_rps) / 10 * times**2 / 2
    assert len(times) == count
    np.testing.assert_allclose(area, np.arange(count), atol=1e-6)


def test_segments_follow_one_another() -> None:
    spike = send_times_s((*steady(10, 5), *steady(100, 1), *steady(10, 5)))
    assert np.histogram(spike, [0, 5, 6, 11])[0].tolist() == [50, 100, 50]


def test_a_shape_is_segments_in_a_line() -> None:
    ramp = Segment(duration_s=60, rate_rps=50, end_rps=200)
    assert segments_of("50x30, 50-200x60,200x10") == (*steady(50, 30), ramp, *steady(200, 10))
    from_nothing, to_nothing = segments_of("0-0.5x1, 0.5-0x1")
    assert (from_nothing.rate_rps, from_nothing.end_rps, to_nothing.end_rps) == (0, 0.5, 0)


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_a_segment_too_short_for_a_request_only_takes_time(arrivals: Arrivals) -> None:
    times = send_times_s((*steady(0.1, 2), *steady(10, 1)), arrivals)
    assert len(times) == 10
    assert 2 <= times[0] < times[-1] < 3


ENDLESS = ("9" * 310 + "x10", "1x" + "9" * 310)  # more than a float holds


@pytest.mark.parametrize("shape", ["", "50", "50x0", "50x1.5", "x30", "50x30,", "0x10", "-5x10", "50-x10", *ENDLESS])
def test_a_wrong_shape_gives_a_one_line_error(shape: str) -> None:
    with pytest.raises(InputError, match="a segment is RATExSECONDS"):
        segments_of(shape)


def test_the_clock_wakes_after_the_due_time_and_lets_other_greenlets_run() -> None:
    clock, lags = Clock(), []
    other = gevent.spawn(lambda: [gevent.sleep(0) for _ in range(20)])
    due = time.perf_counter()
    for _ in range(20):
        due += 0.003
        clock.wait_until(due)
        lags.append(time.perf_counter() - due)
    clock.close()
    assert other.ready()
    assert min(lags) >= 0

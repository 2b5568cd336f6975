"""The planned send times: fixed, seeded, exact in number; and the clock that keeps them."""

from __future__ import annotations

import time

import gevent
import numpy as np
import pytest

from deepseek.spec import InputError
from loadtests.clock import Clock
from loadtests.schedule import BLOCK, Arrivals, Schedule, Segment, segments_of


def steady(rate_rps: float, duration_s: float) -> tuple[Segment, ...]:
    return (Segment(duration_s=duration_s, rate_rps=rate_rps),)


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_a_schedule_has_exactly_the_arrivals_of_its_rate_in_ascending_order(arrivals: Arrivals) -> None:
    times = Schedule(steady(137, 10), arrivals, seed=3).times_s()
    assert len(times) == 1370
    assert (np.diff(times) >= 0).all()
    assert 0 <= times[0] < times[-1] < 10


def test_the_same_seed_gives_the_same_times_and_another_gives_others() -> None:
    first, same, other = (Schedule(steady(50, 4), seed=seed).times_s() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_constant_arrivals_are_evenly_spaced() -> None:
    times = Schedule(steady(100, 2), "constant").times_s()
    np.testing.assert_allclose(np.diff(times), 0.01)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(Schedule(steady(100, 200), seed=1).times_s())
    assert gaps.mean() == pytest.approx(0.01, rel=0.02)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as only the exponential has it
    assert (gaps > 0.03).mean() == pytest.approx(np.exp(-3), rel=0.15)


def test_a_ramp_grows_from_one_rate_to_the_other() -> None:
    ramp = (Segment(duration_s=10, rate_rps=0, end_rps=200),)
    times = Schedule(ramp, "constant").times_s()
    assert len(times) == 1000
    assert (times < 5).sum() == pytest.approx(250, abs=2)  # a quarter of the triangle's area


def test_segments_follow_one_another() -> None:
    spike = Schedule((*steady(10, 5), *steady(100, 1), *steady(10, 5))).times_s()
    assert np.histogram(spike, [0, 5, 6, 11])[0].tolist() == [50, 100, 50]


def test_a_shape_is_segments_in_a_line() -> None:
    ramp = Segment(duration_s=60, rate_rps=50, end_rps=200)
    assert segments_of("50x30, 50-200x60,200x10") == (*steady(50, 30), ramp, *steady(200, 10))


@pytest.mark.parametrize("shape", ["", "50", "50x0", "50x1.5", "x30", "50x30,", "0x10", "-5x10", "50-x10"])
def test_a_wrong_shape_is_one_line(shape: str) -> None:
    with pytest.raises(InputError, match="a segment is RATExSECONDS"):
        segments_of(shape)


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_a_soak_is_worked_out_in_blocks_so_that_its_length_takes_no_memory(arrivals: Arrivals) -> None:
    soak, total, last_s = Schedule(steady(1000, 3600), arrivals, seed=2), 0, 0.0
    for times in soak.blocks():
        assert len(times) < 1.2 * BLOCK
        assert times[0] >= last_s
        total, last_s = total + len(times), times[-1]
    assert total == 3_600_000
    assert last_s < 3600


def test_poisson_counts_vary_across_the_borders_of_blocks_as_within_them() -> None:
    counts = np.histogram(Schedule(steady(1000, 400), seed=4).times_s(), np.arange(0, 401, 4))[0]
    assert counts.mean() == 4000
    assert counts.std() == pytest.approx(np.sqrt(4000), rel=0.25)  # about BLOCK each: fixed blocks would not vary


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_together_send_the_whole_schedule(workers: int) -> None:
    schedule = Schedule(steady(5000, 3), seed=5)
    shares = [schedule.times_s(worker, workers) for worker in range(workers)]
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), schedule.times_s())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_clock_wakes_after_the_due_time_and_lets_others_run_meanwhile() -> None:
    clock, lags = Clock(), []
    other = gevent.spawn(lambda: [gevent.sleep(0) for _ in range(20)])
    due = time.perf_counter()
    for _ in range(50):
        due += 0.003
        clock.wait_until(due, time.perf_counter())
        lags.append(time.perf_counter() - due)
    clock.close()
    assert other.ready()
    assert min(lags) >= 0
    assert np.median(lags) < 0.002  # some 50 us on a quiet machine

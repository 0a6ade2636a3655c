"""The policy of a feature cache along runs, without a network."""

import dataclasses
import json

import pytest
import torch

from diffpress.caching import (
    CachePolicy,
    CacheState,
    Cut,
    extrapolate,
    read_policy,
    relative_change,
)

CUT = Cut(start="b", end="c", arguments=("hidden_states",), origin="a", skipped=("b", "c"))
TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)


def policy(*computed, **changes):
    return CachePolicy(**{"cut": CUT, "kind": "schedule", "timesteps": TIMES, "computed": computed, **changes})


def test_extrapolation_is_exact_for_a_feature_linear_in_the_step():
    start, slope = torch.randn(2, 3), torch.randn(2, 3)
    state = CacheState(policy(True, False, True, False, False, order=1))
    for step, timestep in enumerate(TIMES):
        exact = start + step * slope
        if state.begin(timestep, (2,)) == "compute":
            state.store((exact,))
        elif step > 1:  # before the second full step there is no slope
            torch.testing.assert_close(state.predict()[0], exact)
    assert state.history == [True, True, False, False]
    wrong = extrapolate([(start,), (-slope,)], 2)[0]  # control: the sign
    assert not torch.allclose(wrong, start + 2 * slope, atol=0.1)
    assert not torch.allclose(start, start + 2 * slope, atol=0.1)  # control: order 0


def test_second_order_is_the_backward_difference_series():
    values = [torch.tensor(float(step**2)) for step in range(5)]
    state = CacheState(policy(True, True, True, False, False, order=2))
    predicted = []
    for step, timestep in enumerate(TIMES):
        if state.begin(timestep, ()) == "compute":
            state.store((values[step],))
        else:
            predicted.append(float(state.predict()[0]))
    assert predicted == [4 + 3 * 1 + 2 / 2, 4 + 3 * 2 + 2 * 4 / 2]  # backward differences at 2: 4, 3, 2


def decisions(state, *calls):
    found = []
    for timestep, shape, *conditions in calls:
        found.append(state.begin(timestep, shape, conditions))
        if found[-1] == "compute":
            state.store((torch.zeros(1),))
        else:
            state.predict()
    return found


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([(900.0, (2,)), (700.0, (2,)), (500.0, (2,))], ["compute", "reuse", "reuse"]),
        ([(500.0, (2,)), (300.0, (2,))], ["compute", "reuse"]),  # image to image
        ([(900.0, (2,)), (700.0, (2,)), (700.0, (2,)), (500.0, (2,))], ["compute", "reuse", "compute", "reuse"]),
        ([(900.0, (2,)), (500.0, (2,))], ["compute", "compute"]),
        ([(900.0, (2,)), (700.0, (4,))], ["compute", "compute"]),
        ([(900.0, (2,)), (701.0, (2,)), (500.0, (2,))], ["compute", "compute", "compute"]),
        ([(900.0, (2,)), (700.0, (2,)), (900.0, (2,)), (700.0, (2,))], ["compute", "reuse", "compute", "reuse"]),
    ],
)
def test_only_the_next_step_of_a_run_reuses(calls, expected):
    assert decisions(CacheState(policy(True, *[False] * 4)), *calls) == expected


@pytest.mark.parametrize(
    ("times", "warned"),
    [
        (TIMES[::2], "timestep 500, step 3 of its 5, follows step 1"),
        ((900.0, 650.0), "timestep 650 is none of its 5"),
        (TIMES + TIMES, None),
        (TIMES + TIMES[2:], None),  # image to image after it
        (TIMES[:2] + TIMES[:2], None),  # ended early
    ],
)
def test_another_schedule_is_warned_of_once(times, warned, caplog):
    state = CacheState(policy(True, *[False] * 4))
    found = decisions(state, *((timestep, (2,)) for timestep in (times if warned is None else times + times)))
    messages = [record.message for record in caplog.records]
    assert messages == ([f"feature cache fitted for another schedule: {warned}; computed in full"] if warned else [])
    assert (set(found) == {"compute"}) == (warned is not None)


def test_another_condition_begins_anew():
    one, other = torch.zeros(2), torch.ones(2)
    state = CacheState(policy(True, *[False] * 4))
    assert decisions(state, (900.0, (2,), one), (700.0, (2,), one.clone()), (500.0, (2,), other)) == [
        "compute",
        "reuse",
        "compute",
    ]


def test_repeated_timesteps_of_the_fitted_run_itself_are_steps():
    steps = policy(True, False, True, False, timesteps=(900.0, 500.0, 500.0, 100.0))
    calls = [(timestep, ()) for timestep in steps.timesteps]
    assert decisions(CacheState(steps), *calls) == ["compute", "reuse", "compute", "reuse"]


def test_the_test_lets_small_changes_pass_and_only_so_many():
    tested = policy(True, *[False] * 4, kind="threshold", threshold=0.1, most=2)
    state, residual = CacheState(tested), torch.ones(4)
    assert state.begin(900.0, ()) == "compute"
    state.store((residual,), residual)
    found = []
    for timestep in TIMES[1:]:
        assert state.begin(timestep, ()) == "test"
        found.append(state.passes(residual * 1.05))
        state.predict() if found[-1] else state.store((residual,), residual)
    assert found == [True, True, False, True]
    for threshold, change, passes in ((0.1, 1.2, False), (0.3, 1.2, True), (0.0, 1.0, False)):
        state = CacheState(dataclasses.replace(tested, threshold=threshold))
        state.begin(900.0, ())
        state.store((residual,), residual)
        state.begin(700.0, ())
        assert state.passes(residual * change) == passes


def test_a_batch_is_tested_as_one():
    """A picture that changes little takes its neighbours along, as in First-Block Cache."""
    tested, before = policy(True, *[False] * 4, kind="threshold", threshold=0.2), torch.ones(2, 4)
    after = before * torch.tensor([[1.3], [1.0]])
    for rows, passes in ((slice(0, 1), False), (slice(1, 2), True), (slice(None), True)):
        state = CacheState(tested)
        state.begin(900.0, (2,))
        state.store((before[rows],), before[rows])
        state.begin(700.0, (2,))
        assert state.passes(after[rows]) == passes


def test_relative_change_is_that_of_mean_absolute_values():
    before, after = torch.tensor([1.0, -3.0]), torch.tensor([2.0, -3.0])
    assert relative_change(after, before) == pytest.approx(0.25)
    assert relative_change(torch.zeros(2), torch.zeros(2)) == 0


def test_a_policy_goes_through_json():
    steps = policy(True, False, True, False, False, order=2)
    assert read_policy(json.loads(json.dumps(dataclasses.asdict(steps)))) == steps


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"computed": (True,)}, "computed has 1 steps, timesteps 5"),
        ({"computed": (False,) * 5}, "the first step has nothing to reuse"),
        ({"kind": "threshold", "cut": Cut(end="c", skipped=("c",))}, "needs a cut with start and origin"),
    ],
)
def test_policies_that_make_no_sense(changes, match):
    with pytest.raises(ValueError, match=match):
        policy(True, *[False] * 4, **changes)


def test_cuts_that_make_no_sense():
    with pytest.raises(ValueError, match="has to name start b and end c"):
        dataclasses.replace(CUT, skipped=("b",))
    with pytest.raises(ValueError, match="start and arguments go together"):
        dataclasses.replace(CUT, arguments=())

"""What is kept of sampling runs is spread over all of them, and an error is what it says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpress.recorded import answer, mean_error, record, relative_error


@pytest.fixture
def calls(dit, context):
    """Four runs of three steps each, as one batch each."""
    return record(dit, replace(context(dit), batch_size=1), 7, "recording")


def test_kept_calls_are_spread_over_steps_and_runs(dit, context, calls):
    every = record(dit, replace(context(dit), batch_size=1), 100, "recording")
    assert (len(every), len(calls)) == (12, 7)
    places = [place for place, call in enumerate(every) for kept in calls if torch.equal(call.output, kept.output)]
    assert places == sorted(places)
    assert max(np.diff([-1, *places, 12])) <= 3
    assert len({float(call.inputs["timestep"][0]) for call in calls}) == 3
    assert calls[0].output.shape[0] == 2  # both branches of guidance


def test_kept_calls_hold_copies_that_the_network_answers_the_same(dit, calls):
    for call in calls:
        with torch.no_grad():
            torch.testing.assert_close(answer(dit.denoiser, call), call.output, rtol=0, atol=0)
    assert mean_error(dit.denoiser, calls) == 0.0
    shuffled = [replace(call, output=other.output) for call, other in zip(calls, calls[1:] + calls[:1], strict=True)]
    assert mean_error(dit.denoiser, shuffled) > 1e-3


def test_error_is_relative_and_ignores_channels_that_predict_a_variance(calls):
    call = calls[0]
    assert relative_error(call.output * 1.5, call).tolist() == pytest.approx([0.25, 0.25])
    wider = replace(call, output=torch.cat([call.output, torch.randn_like(call.output)], dim=1))
    found = torch.cat([call.output, torch.zeros_like(call.output)], dim=1)
    assert relative_error(found, wider).tolist() == [0.0, 0.0]
    assert relative_error(found, replace(call, output=call.output + 1)).min() > 0

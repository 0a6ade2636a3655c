"""Which guidance branch a call belongs to: by its mark, or by its conditions."""

import dataclasses

import pytest
import torch
from families import deeper

from diffpress.branches import Branches, first_number, time_name
from diffpress.caching import CachePolicy, cached
from diffpress.generator import Generator
from diffpress.prune.cuts import find_cut
from diffpress.sampling import SamplingPlan

NAMES = ("hidden_states", "encoder_hidden_states", "timestep")
CAT, DOG, EMPTY = torch.ones(1, 3), torch.full((1, 3), 2.0), torch.zeros(1, 3)


def branch(branches, timestep, text):
    told, conditions = branches.begin(
        {"hidden_states": torch.randn(1, 4), "encoder_hidden_states": text, "timestep": torch.tensor([timestep])}
    )
    assert (told, len(conditions)) == (timestep, 1)
    return branches.branch


def test_what_a_call_is_told_of_the_time():
    assert first_number(torch.tensor([3, 3])) == first_number(3.0) == 3
    assert time_name(["sample", "timestep", "class_labels", "timestep_cond"]) == "timestep"


def test_calls_without_a_mark_are_told_apart_by_their_conditions():
    branches = Branches(NAMES)
    for prompt in (CAT, DOG, CAT):  # runs with the same negative prompt
        for timestep in (900.0, 500.0, 100.0):
            assert (branch(branches, timestep, prompt), branch(branches, timestep, EMPTY)) == ("", "1")


def test_guidance_as_a_batch_is_one_branch():
    branches = Branches(NAMES)
    assert {branch(branches, timestep, torch.cat([CAT, EMPTY])) for timestep in (900.0, 500.0, 100.0)} == {""}
    assert {branch(branches, timestep, torch.cat([DOG, EMPTY])) for timestep in (900.0, 500.0, 100.0)} == {""}


def test_marks_come_before_conditions():
    branches = Branches(NAMES)
    for timestep in (900.0, 500.0):
        for mark in ("cond", "uncond"):
            with branches.context(mark):
                assert branch(branches, timestep, CAT) == mark  # the same conditions in both
    assert branches.branch == ""


def test_many_conditions_at_one_timestep_do_not_pile_up():
    branches = Branches(NAMES)
    found = {branch(branches, 900.0, torch.full((1, 3), float(number))) for number in range(50)}
    assert found == {"", "1", "2", "3"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chroma", "lumina2", "cogview4", "zimage"])
def test_each_branch_reuses_its_own(name):
    """Chroma and Lumina call twice without a mark, CogView with one, ZImage once for both."""
    generator = Generator(deeper(name))
    plan = SamplingPlan(steps=4, guidance_scale=3.0, height=32, width=32)
    cut = find_cut(generator, ["a cat"], plan, keep_first=1, keep_last=0, branch=None)
    told = generator.record(["a cat"], seeds=[0], plan=dataclasses.replace(plan, guidance_scale=1.0))
    times = tuple(float(call.inputs["timestep"].flatten()[0]) for call in told)
    computed = (True, False, True, False)
    with cached(generator.denoiser, CachePolicy(cut=cut, kind="schedule", timesteps=times, computed=computed)) as found:
        for seed in (0, 1):
            generator.draw(["a cat"], seeds=[seed], plan=plan)
            assert [state.history for state in found.states] == [list(computed)] * (1 if name == "zimage" else 2)

"""The loss of recovery: blocks are compared where they should be equal, identical networks have none of it."""

import copy
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from pruned import PAIRS, PLAN, TRAINING, Skip, context_of, make_dit, without
from torch import nn

from diffpress.denoise import encode
from diffpress.distill.recover import (
    Ends,
    RecoverConfig,
    RecoverLoss,
    origins,
    relative_distance,
    sandwich,
    shared_blocks,
    watched,
)
from diffpress.distill.student import Conditions, collect, schedule_of
from diffpress.prune.reduction import CoarseBlocks, TokenGrid
from diffpress.structures import find_structures
from diffpress.training import draw_of


def blocks_of(count, width=16):
    return [nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)) for _ in range(count)]


@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4, 5), (0, 2, 3, 5), (1, 2, 4), (0, 1), (5,), (2, 3, 4, 5)])
def test_removed_blocks_are_found_by_weights(kept):
    """Also where the others are narrower by now and trained on; strangers only keep the order."""
    torch.manual_seed(0)
    teacher = blocks_of(6)
    left = copy.deepcopy([teacher[index] for index in kept])
    assert origins(left, teacher) == list(kept)
    for block, narrow in zip(left, blocks_of(len(kept), 12), strict=True):
        narrow[1].bias = nn.Parameter(block[1].bias + 0.02 * torch.randn(8))
        block[0], block[1] = narrow
    assert origins(left, teacher) == list(kept)
    found = origins(blocks_of(len(kept)), teacher)
    assert found == sorted(set(found))
    assert set(found) <= set(range(6))


@pytest.mark.parametrize(
    ("gone", "places"),
    [
        ((), [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ((1,), [(0, 1), (1, 2), (2, 3)]),
        ((3,), [(0, 0), (1, 1), (2, 3)]),
        ((0, 1), [(0, 2), (1, 3)]),
        ((1, 2, 3), [(0, 3)]),
    ],
)
def test_a_block_is_compared_with_the_end_of_the_gap_behind_it(gone, places):
    """So that the next is given what it was given; with the blocks renumbered, or with nothing in their places."""
    teacher = make_dit().denoiser
    wanted = [(f"transformer_blocks.{a}", f"transformer_blocks.{b}") for a, b in places]
    assert shared_blocks(without(make_dit(), *gone).denoiser, teacher) == wanted
    hollow = make_dit().denoiser
    for index in gone:
        hollow.transformer_blocks[index] = Skip()
    own = [index for index in range(4) if index not in gone]
    assert shared_blocks(hollow, teacher) == [
        (f"transformer_blocks.{own[a]}", f"transformer_blocks.{b}") for a, b in places
    ]


def coarse(network, left):
    """``network`` with these of its blocks; those in a tuple together in coarse blocks, of cells of one token."""

    def taken(which):
        if isinstance(which, tuple):
            return CoarseBlocks([taken(each) for each in which], TokenGrid(4, 4, 1))
        return network.transformer_blocks[which]

    made = copy.deepcopy(network)
    made.transformer_blocks = nn.ModuleList(map(taken, left))
    return made


@pytest.mark.parametrize(
    ("left", "ends"),
    [
        ([0, (1, 2), 3, 4, 5], [0, 2, 3, 4, 5]),
        ([0, (1, 2), (3, 4), 5], [0, 2, 4, 5]),
        ([(0,), (1, 2, 3), (4, 5)], [0, 3, 5]),
        ([0, (2, 3), (4,)], [1, 3, 5]),  # after others went
        ([0, (3,), (5,)], [2, 4, 5]),
        ([(0,), (1,), (2,), 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([0, (1, (2,), 3), 4, 5], [0, 3, 4, 5]),  # made coarse twice
    ],
)
def test_coarse_blocks_are_compared_with_the_last_that_they_run(left, ends):
    teacher = make_dit(blocks=6).denoiser
    found = shared_blocks(coarse(teacher, left), teacher)
    assert found == [(f"transformer_blocks.{a}", f"transformer_blocks.{b}") for a, b in enumerate(ends)]


def test_coarse_blocks_of_one_token_a_cell_give_what_the_original_gives():
    teacher = make_dit(blocks=6).denoiser
    student = coarse(teacher, [0, (1, 2), (3, 4), 5])
    places, given = shared_blocks(student, teacher), (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([1]))
    with watched(student, [a for a, _ in places]) as ours, watched(teacher, [b for _, b in places]) as theirs:
        with torch.no_grad():
            student(*given), teacher(*given)
        assert all(torch.equal(ours[a][0], theirs[b][0]) for a, b in places)
        (first, second), others = places[1:3], [b for _, b in places]
        assert not torch.equal(ours[first[0]][0], theirs[second[1]][0])
        assert len(set(others)) == len(others)


def test_stages_of_a_unet_are_compared_by_name(sd):
    teacher = copy.deepcopy(sd.denoiser)
    sd.denoiser.mid_block.resnets[0] = Skip()
    stages = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert sorted(shared_blocks(sd.denoiser, teacher)) == [(name, name) for name in stages]
    sd.denoiser.mid_block = None
    assert len(shared_blocks(sd.denoiser, teacher)) == 4


def test_what_is_seen_is_what_blocks_return(dit, hooks_of):
    blocks, seen_by_hand = dit.denoiser.transformer_blocks, []
    blocks[0].register_forward_hook(lambda module, args, output: seen_by_hand.append(output))
    before = hooks_of(dit.denoiser)
    with watched(dit.denoiser, ["transformer_blocks.0", "transformer_blocks.1"]) as seen:
        dit.record([0, 1], seeds=[0, 1], plan=PLAN, limit=1)
    assert torch.equal(seen["transformer_blocks.0"][0], seen_by_hand[0])
    assert not torch.equal(seen["transformer_blocks.1"][0], seen_by_hand[0])
    assert hooks_of(dit.denoiser) == before


def test_what_hands_on_what_it_was_given_is_not_seen():
    """As a first block that only keeps the embedding which the last layer reads."""
    network = nn.Sequential(nn.Linear(4, 4), Skip(), nn.Linear(4, 4))
    with watched(network, ["0", "1", "2"]) as seen:
        network(torch.zeros(2, 4))
    assert [len(seen[name]) for name in "012"] == [1, 0, 1]


def test_relative_distance_by_hand():
    found, wanted = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = [float((f - w).square().sum() / w.square().sum()) for f, w in zip(found, wanted, strict=True)]
    torch.testing.assert_close(relative_distance(found, wanted, None), torch.tensor(expected))
    # The same whatever the unit of the features; not so the plain squared error.
    torch.testing.assert_close(relative_distance(100 * found, 100 * wanted, 2.0), relative_distance(found, wanted, 2.0))


@pytest.mark.parametrize("mask", [None, 2.0])
def test_features_that_are_constant(mask):
    ones, zeros = torch.ones(1, 6), torch.zeros(1, 6)
    found = torch.full((1, 6), 1.5, requires_grad=True)
    assert relative_distance(found, ones, mask).item() == pytest.approx(0.25)
    nothing = relative_distance(found, zeros, mask)  # relative to nothing
    assert nothing.item() == 0
    (slope,) = torch.autograd.grad(nothing.sum(), found)
    assert torch.equal(slope, zeros)


def test_outliers_of_either_network_are_left_out():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(1, 100, generator=generator)  # nothing beyond two deviations
    found = wanted + 0.1
    plain = relative_distance(found, wanted, 2.0)
    torch.testing.assert_close(plain, relative_distance(found, wanted, None))
    for values in (found, wanted):
        values[0, 0] += 1000
        rest = (found[:, 1:] - wanted[:, 1:]).square().sum() / wanted[:, 1:].square().sum()
        torch.testing.assert_close(relative_distance(found, wanted, 2.0)[0], rest)
        assert abs(relative_distance(found, wanted, None) - rest) > 0.3 * rest
        values[0, 0] -= 1000


def test_features_lose_their_weight():
    def weights(**changes):
        settings = RecoverConfig(features=0.8, training=replace(TRAINING, steps=100), **changes)
        loss = RecoverLoss(None, None, None, None, settings)
        return [loss.weight(step) for step in (0, 25, 50, 99)]

    assert weights() == pytest.approx([0.8, 0.6, 0.4, 0.008])
    assert weights(decay=0.5) == pytest.approx([0.8, 0.4, 0, 0])
    assert weights(decay=0.0) == pytest.approx([0.8] * 4)


@pytest.fixture
def made(tmp_path):
    """``made(student, **changes)``: a loss towards the four-block DiT with its features, and the student it watches."""
    with ExitStack() as stack:

        def make(student=None, **changes):
            teacher, student = make_dit(), student or make_dit().denoiser
            settings = RecoverConfig(pairs=PAIRS, training=TRAINING, **changes)
            folder = tmp_path / f"{settings.states}-{settings.phase_count}"
            pairs, _ = collect(teacher, context_of(folder, None), settings.pairs, settings.phase_count)
            places, networks = shared_blocks(student, teacher.denoiser), (student, teacher.denoiser)
            names = zip(*places, strict=True)
            seen = [stack.enter_context(watched(*each)) for each in zip(networks, names, strict=True)]
            conditions, schedule = Conditions.of(teacher, pairs, PLAN), schedule_of(teacher, pairs)
            loss = RecoverLoss(pairs, teacher.denoiser, conditions, schedule, settings, Ends(places, *seen))
            return loss, student

        yield make


@pytest.mark.parametrize("states", ["noised", "path"])
@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_identical_networks_have_no_loss_and_no_gradient(made, states, kind):
    def found(student=None):
        loss, student = made(student, states=states, loss=kind)
        value = loss(student, draw_of(0, seed=0, batch_size=8))
        value.backward()
        slopes = [parameter.grad.norm() for parameter in student.parameters() if parameter.grad is not None]
        return value.item(), float(torch.stack(slopes).norm())

    value, slope = found()
    assert value == pytest.approx(0, abs=1e-7)
    assert slope == pytest.approx(0, abs=1e-6)
    value, slope = found(without(make_dit(), 1).denoiser)
    assert value > 1e-3
    assert slope > 1e-2


def test_features_weigh_what_the_option_says(made):
    values = []
    for weight in (0.0, 1.0, 2.0):
        loss, student = made(without(make_dit(), 1).denoiser, features=weight)
        values.append(loss(student, draw_of(0, seed=0, batch_size=8)).item())
        assert not loss.ends.student  # nothing holds the graph of the last call
        assert not loss.ends.teacher
    assert values[2] - values[0] == pytest.approx(2 * (values[1] - values[0]), rel=1e-4)
    assert values[1] > 1.1 * values[0]


def test_sandwich_has_the_widest_the_narrowest_and_each_other_in_turn():
    a, b, c, d = ({name: [0]} for name in "abcd")
    assert sandwich([a], 3) == [a]
    assert sandwich([a, d], 3) == [a, d]
    assert [sandwich([a, b, c, d], step) for step in range(3)] == [[a, b, d], [a, c, d], [a, b, d]]


def test_loss_of_nested_networks_is_the_mean_over_the_sandwich(made):
    loss, student = made(without(make_dit(), 1).denoiser)
    structures = find_structures(student, ("heads", "mlp"))
    widths = [{}, *({name: list(range(units)) for name in structures if "ff" in name} for units in (48, 32, 16))]

    def value(*which, step=0):
        nested = replace(loss, structures=structures, widths=[widths[index] for index in which])
        return nested(student, replace(draw_of(0, seed=0, batch_size=8), step=step)).item()

    alone = [value(index) for index in range(4)]
    assert len({round(each, 6) for each in alone}) == 4
    assert value(0, 1, 2, 3) == pytest.approx((alone[0] + alone[1] + alone[3]) / 3, rel=1e-5)
    loss(student, draw_of(0, seed=0, batch_size=8))  # and the network is whole again
    assert value(0) == pytest.approx(alone[0], rel=1e-6)


@pytest.mark.parametrize("states", ["noised", "path"])
def test_draws_are_of_the_whole_batch(made, states):
    loss, student = made(without(make_dit(), 1).denoiser, states=states, unconditional=0.5)
    whole = loss(student, draw_of(0, seed=0, batch_size=16))
    halves = [loss(student, draw_of(0, seed=0, batch_size=16, rank=rank, processes=2)) for rank in range(2)]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-4, atol=1e-6)
    assert halves[0] != halves[1]


def test_states_are_noised_samples_or_those_of_the_runs(made):
    rows, uniform = torch.arange(8), torch.linspace(0, 0.99, 8)
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss, _ = made()
    x_t, told = loss.state(rows, uniform, noise)
    assert (told[0], told[-1]) == (0, 990)
    for row in range(8):
        at = int(told[row])
        by_hand = loss.schedule.alphas[at] * loss.pairs.states[row, -1] + loss.schedule.sigmas[at] * noise[row]
        torch.testing.assert_close(x_t[row], by_hand.float())
    loss, _ = made(states="path", phases=4)
    x_t, told = loss.state(rows, uniform, noise)
    assert told.tolist() == [999, 999, 749, 749, 499, 499, 249, 249]
    assert all(torch.equal(x_t[row], loss.pairs.states[row, row // 2]) for row in range(8))


@torch.no_grad()
def test_both_branches_are_shown(made):
    """A record without its condition is given the pipeline's own unconditional one."""
    loss, _ = made()
    conditional, free = encode(make_dit(), [0, 1, 2, 3], PLAN)
    rows = torch.tensor([1, 2, 3, 0])
    labels = loss.conditions.mixed(rows, torch.tensor([False, True, False, True])).tensors["class_labels"]
    assert labels.tolist() == [1, int(free.tensors["class_labels"][0]), 3, 1000]
    assert conditional.tensors["class_labels"].tolist() == [0, 1, 2, 3]

"""Records of a teacher: the same whatever the batch size, the shards and the interruptions; damage is seen."""

import json
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import filelock
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from families import FAMILIES, make

from diffpress.denoise import as_told, check_solver, trajectory
from diffpress.diffusion import read_schedule, timestep_at
from diffpress.distill.pairs import MANIFEST, PairSettings, PairStore, _structure, edges_of, teacher_hash
from diffpress.distill.student import trailing
from diffpress.errors import ArtifactError, ConfigError, InfrastructureError
from diffpress.generator import Generator, SamplingPlan
from diffpress.progress import SILENT
from diffpress.prune.tokens import Tokens, TokensConfig

SMALL = PairSettings(count=10, held_out=3, steps=4, shard=4, batch_size=3)
PLAN = SamplingPlan(steps=3, guidance_scale=3.0)


@pytest.fixture
def collect(dit, tmp_path):
    """Records of the class-conditional teacher: ``collect(name, **settings)``."""
    dit.pipeline.scheduler = trailing(dit.pipeline.scheduler)

    def run(name="pairs", phases=2, teacher=dit, **changes):
        store = PairStore(tmp_path / name, teacher, replace(SMALL, **changes), PLAN)
        return store.collect(teacher.conditions(10), phases, seed=7, progress=SILENT)

    return run


def hashes(folder):
    return json.loads((folder / MANIFEST).read_text())["shards"]


def test_records_are_the_states_of_the_sampling_run(collect, dit):
    train, held_out = collect()
    assert train.states.shape == (10, 3, 4, 8, 8)
    assert held_out.states.shape == (3, 3, 4, 8, 8)
    assert set(train.seeds).isdisjoint(held_out.seeds)
    assert train.conditions == dit.conditions(10)
    plan = replace(PLAN, steps=4)
    run = trajectory(dit, train.conditions[4:5], seeds=[11], plan=plan)
    torch.testing.assert_close(train.states[4], run.states[::2, 0])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    torch.testing.assert_close(train.states[4, :1], noise)
    latents = dit.sample(train.conditions[4:5], seeds=[11], plan=plan).latents
    torch.testing.assert_close(train.states[4, -1:], torch.from_numpy(latents) * dit.pipeline.vae.config.scaling_factor)


def test_edges_are_levels_of_the_schedule(collect, dit):
    edges = collect()[0].edges
    assert [edge.timestep for edge in edges] == [999, 499, None]
    cumulative = dit.pipeline.scheduler.alphas_cumprod.double()
    for edge in edges[:-1]:
        assert edge.alpha == pytest.approx(float(cumulative[int(edge.timestep)] ** 0.5))
        assert edge.alpha**2 + edge.sigma**2 == pytest.approx(1)
    assert (edges[-1].alpha, edges[-1].sigma) == (1, 0)


def test_edges_are_found_in_the_unit_that_the_network_is_told():
    """Of the training grid, or divided by its length as Flux's pipeline does; between its levels, too."""
    flow, steps = read_schedule(FlowMatchEulerDiscreteScheduler()), torch.tensor([1000.0, 750.0, 500.0, 250.0])
    for unit in (1, 1000):
        edges = edges_of(flow, steps / unit, 2)
        assert [edge.sigma for edge in edges] == pytest.approx([1.0, 0.5, 0.0])
        assert [edge.timestep for edge in edges] == [1000 / unit, 500 / unit, None]
        told = timestep_at(as_told(flow, 1000 / unit), torch.tensor([0.25]))
        assert float(told) == pytest.approx(250 / unit)
    between = edges_of(flow, torch.tensor([1000.0, 41.667]), 2)[1]
    assert (between.alpha, between.sigma) == pytest.approx((1 - 0.041667, 0.041667))


@pytest.mark.parametrize("first", [0.0, 0.5, 1.5, 667.0, 1100.0])
def test_a_first_state_that_is_not_noise_is_refused(first):
    """Time reversed, leading spacing, EDM's own units."""
    with pytest.raises(ConfigError, match=f"told {first:g} of the solver's first state, which is not nearly pure"):
        edges_of(read_schedule(DDPMScheduler(beta_schedule="scaled_linear")), torch.tensor([first, first / 2]), 1)


def test_stable_diffusion_begins_with_nearly_pure_noise():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    first = edges_of(read_schedule(scheduler), torch.tensor([999.0, 499.0]), 2)[0]
    assert first.sigma / (first.alpha + first.sigma) == pytest.approx(0.936, abs=1e-3)


@pytest.mark.parametrize("has", [False, True])
def test_auto_is_the_precision_that_this_machine_has_instructions_for(collect, monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": has})
    auto, said = collect("auto", compute="auto")[0], collect("said", compute="bfloat16" if has else "float32")[0]
    assert torch.equal(auto.states, said.states)
    assert not torch.equal(auto.states, collect("other", compute="float32" if has else "bfloat16")[0].states)


def test_batch_size_changes_nothing_but_the_last_bits(collect):
    one, other = collect("one", batch_size=3)[0], collect("other", batch_size=2)[0]
    torch.testing.assert_close(one.states, other.states, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one.states[0], one.states[1], atol=0.1)  # unlike two different records


def test_killed_between_shards_it_goes_on(collect, tmp_path):
    whole = collect("whole")[0]
    collect("killed")
    lost = tmp_path / "killed/train-0000004-0000008.safetensors"
    kept = tmp_path / "killed/train-0000000-0000004.safetensors"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    again = collect("killed")[0]
    assert kept.stat().st_mtime_ns == before
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    torch.testing.assert_close(again.states, whole.states, rtol=0, atol=0)


def test_damaged_shard_is_refused(collect, tmp_path):
    collect()
    shard = tmp_path / "pairs/held-out-0000000-0000003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"held-out-0000000-0000003.safetensors is damaged"):
        collect()


def test_a_shard_that_is_made_anew_has_a_new_hash(collect, tmp_path):
    """As on another machine, which rounds another way."""
    collect()
    path, name = tmp_path / "pairs" / MANIFEST, "held-out-0000000-0000003.safetensors"
    stored = json.loads(path.read_text())
    good = stored["shards"][name]
    path.write_text(json.dumps(stored | {"shards": stored["shards"] | {name: "another"}}))
    with pytest.raises(ArtifactError, match="damaged"):
        collect()
    (tmp_path / "pairs" / name).unlink()
    collect()
    assert hashes(tmp_path / "pairs")[name] == good


@pytest.mark.parametrize("changes", [{"shard": 3}, {"shard": 64}, {"held_out": 5}, {"held_out": 2}, {"count": 8}])
def test_other_counts_in_the_same_folder_are_other_files(collect, changes):
    collect()
    for found, fresh in zip(collect(**changes), collect("fresh", **changes), strict=True):
        assert found.seeds == fresh.seeds
        assert len(found.states) == len(found.conditions) == len(found.seeds)
        torch.testing.assert_close(found.states, fresh.states, rtol=1e-4, atol=1e-5)


def test_records_of_another_teacher_are_refused(collect, dit):
    collect()
    with torch.no_grad():
        next(dit.denoiser.parameters()).add_(1)
    with pytest.raises(ArtifactError, match=r"another run \(teacher differ\)"):
        collect()


def test_a_teacher_is_more_than_the_weights_of_its_denoiser(dit, sd, context):
    known = {teacher_hash(dit)}
    for method, pool in (("pool", 2), ("pool", 4), ("merge", 2)):
        with ExitStack() as undo:
            for layer in (block.attn1 for block in dit.denoiser.transformer_blocks):
                undo.callback(layer.set_processor, layer.processor)
            names = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
            Tokens(TokensConfig(method=method, pool=pool, blocks=names)).apply(dit, context(dit))
            known.add(teacher_hash(dit))
    assert len(known) == 4
    assert teacher_hash(dit) in known  # as it was
    before = teacher_hash(sd)
    assert before == teacher_hash(sd)
    with torch.no_grad():
        next(sd.pipeline.text_encoder.parameters()).add_(1)
    assert teacher_hash(sd) != before


def test_records_of_another_plan_are_refused(collect):
    collect()
    with pytest.raises(ArtifactError, match=r"\(plan differ\)"):
        collect(guidance_scale=1.0)


def test_records_of_more_phases_serve(collect, tmp_path):
    """4 phases serve 2 and 1, to the bit and without sampling anew; what is missing is made in 4."""
    collect("four", phases=4)
    folder = tmp_path / "four"
    before = hashes(folder)
    (folder / "train-0000004-0000008.safetensors").unlink()
    for phases in (2, 1):
        fresh, found = collect(f"fresh-{phases}", phases=phases), collect("four", phases=phases)
        for one, other in zip(found, fresh, strict=True):
            assert one.edges == other.edges
            assert (one.seeds, one.conditions) == (other.seeds, other.conditions)
            torch.testing.assert_close(one.states, other.states, rtol=0, atol=0)
    assert hashes(folder) == before
    assert collect("four", phases=4)[0].phases == 4
    coarse = collect("four", phases=2)[0].states
    assert not torch.allclose(coarse[:, 1], collect("four", phases=4)[0].states[:, 1], atol=0.1)  # its first half


@pytest.mark.parametrize(("stored", "asked"), [(4, 3), (2, 4), (1, 2)])
def test_records_of_phases_that_do_not_fit_are_refused(collect, stored, asked):
    collect(phases=stored)
    with pytest.raises(ArtifactError, match=rf"records of {stored} phases, {asked} are asked for; allowed: 1"):
        collect(phases=asked)


def test_small_disk_is_refused_before_any_work(collect, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(InfrastructureError, match="0 MiB are free"):
        collect()
    assert not list((tmp_path / "pairs").glob("*.safetensors"))


def test_a_folder_at_which_another_run_is_at_work_is_refused(collect, tmp_path):
    (tmp_path / "pairs").mkdir()
    with filelock.FileLock(tmp_path / "pairs/.lock"), pytest.raises(ArtifactError, match="another run is at work on"):
        collect()
    assert len(collect()[0].states) == 10  # afterwards it is not


def test_size_is_said_beforehand(collect, dit, tmp_path):
    store = PairStore(tmp_path / "sized", dit, SMALL, PLAN)
    train, held_out = collect()
    assert store.size(0, 2) == 4 * (train.states.numel() + held_out.states.numel())


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_stochastic_and_two_call_solvers_are_refused(dit, name):
    with pytest.raises(ConfigError, match=f"solver {name} is stochastic or calls"):
        check_solver(dit, name)


def test_noisy_variant_of_a_solver_is_refused(dit):
    check_solver(dit)
    dit.pipeline.scheduler = trailing(dit.pipeline.scheduler, algorithm_type="sde-dpmsolver++")
    with pytest.raises(ConfigError, match="with noise"):
        check_solver(dit)


def test_a_solver_by_name_is_judged_by_its_own_settings(dit):
    dit.pipeline.scheduler = trailing(dit.pipeline.scheduler, algorithm_type="sde-dpmsolver++")
    check_solver(dit, "DDIMScheduler")
    with pytest.raises(ConfigError, match="DPMSolverMultistepScheduler with noise"):
        check_solver(dit, "DPMSolverMultistepScheduler")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_is_the_same_wherever_it_lies_in_memory(family):
    first, second = (_structure(Generator(make(family)).denoiser) for _ in range(2))
    assert first == second


def test_no_record_is_kept_that_is_not_finite(collect, dit):
    with torch.no_grad():
        dit.denoiser.proj_out_2.bias.fill_(float("nan"))
    with pytest.raises(ArtifactError, match=r"seeds .* are not finite"):
        collect()


def test_text_and_pixels_too(sd, ddpm, tmp_path, relative):
    for name, generator in (("sd", sd), ("ddpm", ddpm)):
        generator.pipeline.scheduler = trailing(generator.pipeline.scheduler, "DDIMScheduler", clip_sample=False)
        store = PairStore(tmp_path / name, generator, SMALL, PLAN)
        train, _ = store.collect(generator.conditions(2), 1, progress=SILENT)
        run = trajectory(generator, train.conditions[1:2], seeds=[1], plan=replace(PLAN, steps=4))
        assert relative(train.states[1, -1], run.states[-1, 0]) < 1e-3  # another batch size, other last bits
        assert relative(train.states[2, -1], run.states[-1, 0]) > 0.1

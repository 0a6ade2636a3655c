"""The loop: resumes to the same bits, splits over processes, stops on what is not finite, leaves the average behind."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from diffpress.errors import ArtifactError, TrainingError
from diffpress.progress import SILENT
from diffpress.training import CHECKPOINT, TrainingSettings, draw_of, fit, follow, rate_of

SETTINGS = TrainingSettings(steps=12, batch_size=4, learning_rate=0.05, warmup=2, ema=0.9)
DATA = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
SLOPE = torch.tensor([[1.0, -2.0, 0.5]])


def network():
    torch.manual_seed(3)
    return nn.Linear(3, 1)


def loss(model, draw):
    x = DATA[draw.mine(draw.rows(len(DATA)))] + 0.01 * draw.mine(draw.normal(3))
    return (model(x) - x @ SLOPE.T).square().mean()


def train(folder, settings=SETTINGS, loss=loss, model=None, **options):
    model = model or network()
    fitted = fit(model, loss, settings, seed=5, key="test", folder=folder, progress=SILENT, **options)
    return model, fitted


class Killed(Exception):
    pass


def killed_at(step):
    def lethal(model, draw):
        if draw.step == step:
            raise Killed
        return loss(model, draw)

    return lethal


def test_loss_falls(tmp_path):
    _, fitted = train(tmp_path, replace(SETTINGS, steps=80))
    assert len(fitted.losses) == 80
    assert sum(fitted.losses[-5:]) < 0.1 * sum(fitted.losses[:5])


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path):
    whole, fitted = train(tmp_path / "whole")
    often = replace(SETTINGS, checkpoint_every=1e-9)
    for step in (3, 7, 8):
        with pytest.raises(Killed):
            train(tmp_path / "killed", often, killed_at(step))
    again, resumed = train(tmp_path / "killed", often)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert resumed.losses == fitted.losses
    fresh, _ = train(tmp_path / "fresh", replace(SETTINGS, steps=11))  # unlike a run of other length
    assert not torch.equal(fresh.weight, whole.weight)


class Late(nn.Module):
    """Its second layer is called from update 4 on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.early, self.late = nn.Linear(3, 1), nn.Linear(3, 1)


def late_loss(model, draw):
    x = DATA[draw.mine(draw.rows(len(DATA)))]
    found = model.early(x) + (model.late(x) if draw.step >= 4 else 0)
    return (found - x @ SLOPE.T).square().mean()


@pytest.mark.parametrize("step", [3, 6, 9])
def test_layers_that_are_called_late_end_with_the_same_bits_too(tmp_path, step):
    def lethal(model, draw):
        if draw.step == step:
            raise Killed
        return late_loss(model, draw)

    whole, _ = train(tmp_path / "whole", loss=late_loss, model=Late())
    often = replace(SETTINGS, checkpoint_every=1e-9)
    with pytest.raises(Killed):
        train(tmp_path / "killed", often, lethal, Late())
    again, _ = train(tmp_path / "killed", often, late_loss, Late())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("compute", "tokens", "expected"),
    [
        ("bfloat16", 16, "AttnProcessor"),
        ("bfloat16", 400, "AttnProcessor2_0"),
        ("float32", 16, "AttnProcessor2_0"),
    ],
)
def test_attention_that_trains_fastest_and_is_put_back(tmp_path, monkeypatch, compute, tokens, expected):
    torch.manual_seed(0)
    layer = Attention(8, heads=2, dim_head=4)
    before, called = layer.processor, []
    for kind in (AttnProcessor, AttnProcessor2_0):
        plain = kind.__call__

        def seen(self, *args, kind=kind, plain=plain, **named):
            called.append(kind.__name__)
            return plain(self, *args, **named)

        monkeypatch.setattr(kind, "__call__", seen)
    x = torch.randn(2, tokens, 8)
    maps = x.transpose(1, 2).reshape(2, 8, tokens // 4, 4)

    def loss(model, draw):
        return (model(x).square().mean() + model(maps).square().mean()).float()

    train(tmp_path, replace(SETTINGS, steps=1, compute=compute), loss, layer)
    assert called == [expected] * 2
    assert layer.processor is before
    with pytest.raises(Killed):
        train(tmp_path / "killed", replace(SETTINGS, compute=compute), killed_at(0), layer)
    assert layer.processor is before


@pytest.mark.parametrize("has", [False, True])
def test_auto_is_the_precision_that_this_machine_has_instructions_for(tmp_path, monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": has})
    found = []

    def asked(model, draw):
        found.append(torch.is_autocast_enabled("cpu"))
        return loss(model, draw)

    train(tmp_path, replace(SETTINGS, steps=1, compute="auto"), asked)
    assert found == [has]


def test_the_average_is_the_student(tmp_path):
    averaged, _ = train(tmp_path / "averaged")
    last, _ = train(tmp_path / "last", replace(SETTINGS, ema=0))
    assert not torch.equal(averaged.weight, last.weight)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "averaged" / CHECKPOINT)
    assert torch.equal(stored["ema.0"], averaged.weight)
    assert torch.equal(stored["weights.0"], last.weight)


def test_target_follows_and_is_resumed(tmp_path):
    def run(folder, settings=SETTINGS, loss=loss):
        model, target = network(), network()
        train(folder, settings, loss, model, target=(target, 0.5))
        return target

    whole = run(tmp_path / "whole")
    often = replace(SETTINGS, checkpoint_every=1e-9)
    with pytest.raises(Killed):
        run(tmp_path / "killed", often, killed_at(6))
    assert torch.equal(run(tmp_path / "killed", often).weight, whole.weight)
    assert not torch.equal(whole.weight, network().weight)


def test_follow_is_a_moving_average():
    slow, fast = nn.Linear(2, 1), nn.Linear(2, 1)
    expected = 0.75 * slow.weight.detach().clone() + 0.25 * fast.weight.detach()
    follow(slow, fast, 0.75)
    torch.testing.assert_close(slow.weight.detach(), expected)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good(tmp_path):
    def bad(model, draw):
        return loss(model, draw) * (math.nan if draw.step == 5 else 1)

    with pytest.raises(TrainingError, match=r"not finite at update 5; the last good checkpoint is .*checkpoint"):
        train(tmp_path, replace(SETTINGS, checkpoint_every=1e-9), bad)
    model, fitted = train(tmp_path)  # the good checkpoint goes on with a good loss
    assert len(fitted.losses) == 12
    assert model.weight.isfinite().all()


def test_gradient_that_is_not_finite_stops(tmp_path):
    def bad(model, draw):
        return (model.weight.flatten()[0] * 0).sqrt() + loss(model, draw)  # finite loss, infinite slope

    with pytest.raises(TrainingError, match="update 0; no checkpoint"):
        train(tmp_path, loss=bad)


def test_checkpoint_of_another_training_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ArtifactError, match="belongs to another training"):
        fit(network(), loss, SETTINGS, seed=5, key="other", folder=tmp_path, progress=SILENT)


def test_damaged_checkpoint_is_refused(tmp_path):
    train(tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        train(tmp_path)


def test_a_checkpoint_without_the_optimizers_steps_is_refused(tmp_path):
    """Those of earlier versions; moments are never dropped in silence."""
    train(tmp_path)
    path = tmp_path / CHECKPOINT
    with safe_open(path, framework="pt") as stored:
        kept, facts = {n: stored.get_tensor(n) for n in stored.keys() if "step" not in n}, stored.metadata()  # noqa: SIM118
    save_file(kept, path, metadata=facts)
    with pytest.raises(ArtifactError, match="cannot be read"):
        train(tmp_path)


def test_every_record_is_drawn_equally_often():
    drawn = torch.cat([draw_of(step, seed=1, batch_size=4).rows(10) for step in range(5)])
    assert sorted(drawn.tolist()) == sorted([*range(10), *range(10)])
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_processes_share_one_batch():
    whole = draw_of(3, seed=1, batch_size=6)
    parts = [draw_of(3, seed=1, batch_size=6, rank=rank, processes=2) for rank in range(2)]
    values = whole.normal(2)
    found = [part.mine(part.normal(2)) for part in parts]
    torch.testing.assert_close(torch.stack(found, 1).flatten(0, 1), values)


def test_learning_rate():
    settings = TrainingSettings(steps=100, warmup=10, learning_rate=1.0)
    rates = [rate_of(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1
    assert rates[-1] == pytest.approx(0.02, abs=0.001)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def worker(rank, port, folder, queue):
    import os

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model, _ = train(folder)
    queue.put([parameter.tolist() for parameter in model.parameters()])
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path):
    import multiprocessing
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    jobs = [spawn.Process(target=worker, args=(rank, port, tmp_path / "two", queue)) for rank in range(2)]
    for job in jobs:
        job.start()
    found = [queue.get(timeout=120) for _ in jobs]
    for job in jobs:
        job.join()
    alone, _ = train(tmp_path / "one")
    other, _ = train(tmp_path / "other", replace(SETTINGS, batch_size=2))
    for weights in found:
        for value, expected in zip(weights, alone.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(value), expected.detach(), atol=1e-5, rtol=0)
    assert (other.weight - alone.weight).abs().max() > 1e-3  # what another batch size does


def test_adapters_learn_and_leave_a_stock_network(tmp_path):
    pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(3, 1))
    nn.init.zeros_(model[0].bias)
    before = model[0].weight.detach().clone()
    _, fitted = train(tmp_path, replace(SETTINGS, steps=120, rank=1), model=model)
    assert [type(layer) for layer in model.modules()] == [nn.Sequential, nn.Linear]
    assert sum(fitted.losses[-5:]) < 0.1 * sum(fitted.losses[:5])
    assert not model[0].bias.any()  # frozen
    x = torch.eye(3)
    torch.testing.assert_close(model(x).detach(), SLOPE.T, atol=0.2, rtol=0)  # the merged weights are the learned ones
    assert (before - SLOPE).abs().max() > 0.5

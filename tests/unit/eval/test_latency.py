from __future__ import annotations

import gc
import importlib.metadata
import json
import mmap
import time

import pytest
import torch

from diffpress.errors import ConfigError
from diffpress.eval.latency import Timing, benchmark, joined, latency_ratios, peak_memory, size_on_disk, speedups
from diffpress.eval.machine import describe_machine


def test_times_of_known_sleeps_and_their_ratio():
    timings = benchmark({"slow": lambda: time.sleep(0.008), "fast": lambda: time.sleep(0.004)}, rounds=12, warmup=1)
    assert timings["slow"].median_ms >= 8
    assert timings["fast"].median_ms >= 4
    estimate = speedups(timings, baseline="slow")["fast"]
    assert 1.2 < estimate.value < 2.5  # sleeps overrun, never the reverse
    assert list(latency_ratios(timings, baseline="slow")) == ["fast"]
    assert latency_ratios(timings, baseline="slow")["fast"].value == pytest.approx(1 / estimate.value)


def test_rounds_are_interleaved_and_warm_up_is_left_out():
    calls, waits, progress = [], [], []
    timings = benchmark(
        {name: lambda name=name: calls.append((name, gc.isenabled())) for name in "abc"},
        rounds=5,
        warmup=2,
        synchronize=lambda: waits.append(len(calls)),
        progress=lambda done, total: progress.append((done, total)),
    )
    names = "".join(name for name, _ in calls)
    counted = names[:6] + names[7::2]
    assert names[6::2] == names[7::2]  # each of these is called once before it is timed
    rounds = [counted[start : start + 3] for start in range(0, len(counted), 3)]
    assert rounds[:2] == ["abc", "abc"]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert rounds[3] == rounds[2][::-1]
    assert rounds[5] == rounds[4][::-1]
    assert not any(collecting for _, collecting in calls)
    assert gc.isenabled()
    assert {timing.n for timing in timings.values()} == {5}
    timed = [*range(6), *range(7, 36, 2)]
    assert waits == [count for call in timed for count in (call, call + 1)]
    assert progress[-1] == (7, 7)


def test_order_depends_on_the_seed_alone():
    def order(seed: int) -> str:
        calls: list[str] = []
        benchmark({name: lambda name=name: calls.append(name) for name in "abcd"}, rounds=6, warmup=1, seed=seed)
        return "".join(calls)

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_garbage_collection_comes_back_after_an_error():
    def fails() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        benchmark({"a": fails}, rounds=2, warmup=1)
    assert gc.isenabled()


def test_summaries():
    timing = Timing("a", tuple(float(value) for value in range(1, 102)), 500.0)
    assert (timing.p5_ms, timing.median_ms, timing.p95_ms, timing.n) == (6, 51, 96, 101)
    assert timing.throughput(4) == pytest.approx(4000 / 51)
    with pytest.raises(ConfigError, match="batch is 0"):
        timing.throughput(0)


def test_processes_are_joined_by_their_medians():
    def run(factor: float) -> dict[str, Timing]:
        return {name: Timing(name, (factor * ms,) * 3, 9.0) for name, ms in (("slow", 8.0), ("fast", 2.0 * factor))}

    found = joined([run(1.0), run(1.5), run(4.0)])
    assert (found["slow"].processes, found["slow"].n, found["slow"].median_ms) == (3, 9, 12.0)
    gain, share = (make(found, baseline="slow")["fast"] for make in (speedups, latency_ratios))
    assert (gain.value, gain.low, gain.high) == (pytest.approx(4 / 1.5), pytest.approx(1.0), pytest.approx(4.0))
    assert (share.value, share.n) == (pytest.approx(1.5 / 4), 3)
    alone = joined([run(1.5)])
    assert alone == run(1.5)
    for wrong in ([], [run(1.0), {"slow": run(1.0)["slow"]}]):
        with pytest.raises(ConfigError, match="allowed: the same in each"):
            joined(wrong)


@pytest.mark.parametrize(("rounds", "warmup"), [(1, 1), (2, 0), (-3, 1)])
def test_bad_counts_are_refused(rounds, warmup):
    with pytest.raises(ConfigError, match=f"rounds is {rounds} and warmup {warmup}"):
        benchmark({"a": int}, rounds=rounds, warmup=warmup)


def test_bad_names_are_refused():
    with pytest.raises(ConfigError, match="at least one candidate"):
        benchmark({}, rounds=2, warmup=1)
    timings = benchmark({"a": int}, rounds=2, warmup=1)
    with pytest.raises(ConfigError, match="baseline is 'b'; allowed: a"):
        speedups({**timings, "c": timings["a"]}, baseline="b")


def test_peak_memory_sees_what_is_freed_again():
    def allocate(mebibytes: int) -> None:
        with mmap.mmap(-1, mebibytes << 20) as block:  # straight from the system: no allocator keeps it
            block.write(bytes(len(block)))
            time.sleep(0.05)

    large, small = (peak_memory(lambda size=size: allocate(size)) for size in (64, 1))
    assert large.increase_mib >= 60
    assert small.increase_mib < 30
    assert large.resident_mib > large.increase_mib
    assert (large.device_mib is None) == (not torch.cuda.is_available())


def test_size_on_disk(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "below" / "b").write_bytes(bytes(23))
    assert size_on_disk(tmp_path) == 123
    assert size_on_disk(tmp_path / "a") == 100
    with pytest.raises(ConfigError, match="is missing"):
        size_on_disk(tmp_path / "c")


def test_links_to_files_count_and_linked_folders_do_not(tmp_path):
    """A folder of the hub's cache has links into another one alone."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (blobs, snapshot / "unet"):
        folder.mkdir(parents=True)
    (blobs / "4be1").write_bytes(bytes(1000))
    (snapshot / "unet" / "weights").symlink_to(blobs / "4be1")
    (snapshot / "outside").symlink_to(blobs)
    (snapshot / "lost").symlink_to(blobs / "nothing")
    assert size_on_disk(snapshot) == 1000


def test_the_machine_is_described_for_json():
    description = describe_machine()
    assert json.loads(json.dumps(description)) == description
    assert description["versions"]["torch"] == importlib.metadata.version("torch")
    assert description["cpu"]["logical_cores"] >= description["cpu"]["usable_cores"] >= 1
    assert description["threads"]["torch"] == torch.get_num_threads()

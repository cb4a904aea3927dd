"""The benchmark's path for GPUs, whole, on CPU tensors and a device that is made up: its events read a clock that only
moves when told to, its allocator only counts what it is told. No figure here is of anything real."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .test_benchmarks import FOLDER, load_run

sys.path.insert(0, str(FOLDER))

from bench import gpu as gpu_module
from bench import gpu_peers, gpu_suite, gpu_timing, report, suite
from bench.cases import Case, Job, all_cases
from bench.harness import Variant
from bench.problem import Problem

sys.path.remove(str(FOLDER))

L2 = 1 << 20


class FakeCuda:
    """What bench/gpu.py asks of torch.cuda. A cycle of _sleep lasts a nanosecond."""

    def __init__(self, name: str = "NVIDIA H100 80GB HBM3"):
        self.now, self.log = 0.0, []
        self.allocated = self.peak = 0
        self.properties = SimpleNamespace(
            name=name, total_memory=80 << 30, multi_processor_count=132, L2_cache_size=L2, major=9, minor=0
        )
        fake = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self):
                fake.log.append("event")
                fake.now += 1e-6  # so that nothing takes no time at all
                self.at = fake.now

            def elapsed_time(self, end: Event) -> float:
                assert fake.log[-1] == "synchronize", "read before the device was done"
                return (end.at - self.at) * 1e3

        self.Event = Event

    def _sleep(self, cycles: int):
        self.log.append("sleep")
        self.now += cycles * 1e-9

    def synchronize(self):
        self.log.append("synchronize")

    def get_device_properties(self, device: torch.device):
        return self.properties

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: torch.device):
        self.peak = self.allocated

    def empty_cache(self):
        pass

    def takes(self, seconds: float, bytes_held: int = 0, word: str = "call"):
        """A call that takes so long on the device and holds so much meanwhile."""

        def call():
            self.log.append(word)
            self.now += seconds
            self.peak = max(self.peak, self.allocated + bytes_held)

        return call


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def device(cuda, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # its import alone takes seconds
    made = gpu_module.Gpu(["eager", "cpp"], api=cuda, device="cpu", flushed=1024)
    monkeypatch.setattr(gpu_module.Gpu, "flush", lambda self: cuda.log.append("flush"))
    return made


SETTINGS = suite.Settings(threads=1, rounds=4, budget=1e9, compile=False)


def row_of_calls(device, cuda, monkeypatch, factories, *, passes=1, reference=None, op="op"):
    """One row whose competitors take the times they are given; the read takes 1 s and the copy 4."""
    monkeypatch.setattr(
        gpu_suite, "_ceilings", lambda p: [Variant("read", cuda.takes(1.0)), Variant("copy", cuda.takes(4.0))]
    )
    case = Case(
        op, 4, 16, torch.float32, "fwd", f"{passes} N V 4 B", passes,
        lambda problem: Job(dict(factories), lambda: reference or {}), "statistics",
    )  # fmt: skip
    row = gpu_suite.run_case(case, Problem(4, 16, torch.float32), SETTINGS, device)
    suite.validate({"schema": suite.SCHEMA, "rows": [row], **dict.fromkeys(("machine", "peers", "targets"), None),
                    "scaling": None, "overhead": None})  # fmt: skip
    return row


# --- the clock


def test_only_the_call_is_between_the_events(device, cuda):
    variant = Variant("x", cuda.takes(0.25), before=cuda.takes(100.0, word="before"))
    result = gpu_timing.measure([variant], device, rounds=3)["x"]
    assert result.samples == pytest.approx([0.25 + 1e-6] * 3)
    assert cuda.log[-7:-1] == ["before", "flush", "sleep", "event", "call", "event"]


def test_the_head_start_outlasts_the_launches(device, cuda, monkeypatch):
    slept = []
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: slept.append(cycles * 1e-9))
    monkeypatch.setattr(gpu_module.Gpu, "enqueue_seconds", lambda self, call: 0.004)
    gpu_timing.measure([Variant("x", lambda: None)], device, rounds=3)
    assert slept == pytest.approx([1.5 * 0.004 + gpu_timing.SLACK] * 3, rel=0.01)  # the probe's events take time too
    slept.clear()
    device.head_start(9.0)
    assert slept == pytest.approx([gpu_module.LONGEST_HEAD_START], rel=0.01)


def test_variants_take_turns_and_the_order_rotates(device, cuda):
    variants = [Variant(name, cuda.takes(0.1, word=name)) for name in "abc"]
    gpu_timing.measure(variants, device, rounds=3)
    order = [word for word in cuda.log if word in "abc"]
    assert order == list("aaabbbccc" + "abc" + "bca" + "cab")


def test_no_round_starts_after_the_budget_but_three_are_made(device, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: float(next(ticks)))
    variant = Variant("x", lambda: None)
    assert len(gpu_timing.measure([variant], device, rounds=50, budget=0.0)["x"].raw) == 3
    assert 3 < len(gpu_timing.measure([variant], device, rounds=50, budget=20.0)["x"].raw) < 50


def test_the_flush_reads_more_than_the_l2():
    api = FakeCuda()
    made = gpu_module.Gpu(["eager"], api=api, device="cpu", flushed=0)
    assert made._flushed.nbytes == 4 * L2
    made._flushed.fill_(1.0)
    made.flush()
    assert made._sum.item() == L2  # every word was read


# --- bandwidth and memory


@pytest.mark.parametrize(
    "name, terabytes",
    [
        ("NVIDIA A100-SXM4-40GB", 1.555),
        ("NVIDIA A100-SXM4-80GB", 2.039),
        ("NVIDIA H100 80GB HBM3", 3.35),
        ("NVIDIA H200", 4.8),
        ("NVIDIA L40S", 0.864),
        ("NVIDIA GeForce RTX 4090", 1.008),
        ("AMD Instinct MI300X", 5.3),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
    ],
)
def test_nominal_bandwidth_is_of_the_whole_name(name, terabytes):
    found = gpu_module.nominal_bandwidth(name)
    assert found == (None if terabytes is None else pytest.approx(terabytes * 1e12))


@pytest.mark.parametrize("passes, measured, against", [(1, "read", 2.0), (3, "copy", 6.0)])
def test_jobs_that_write_are_held_against_the_copy(device, cuda, monkeypatch, passes, measured, against):
    own = {"fastcalib": lambda: cuda.takes(2.0), "eager": lambda: cuda.takes(6.0)}
    row = row_of_calls(device, cuda, monkeypatch, own, passes=passes)
    nbytes = 4 * 16 * 4
    ceilings = row["gpu"]
    assert ceilings["measured"] == measured
    assert ceilings["read_gb_per_s"] == pytest.approx(nbytes / 1e9, rel=1e-3)
    assert ceilings["copy_gb_per_s"] == pytest.approx(2 * nbytes / 4 / 1e9, rel=1e-3)
    entry = row["entries"]["fastcalib"]
    assert entry["gb_per_s"] == pytest.approx(passes * nbytes / 2 / 1e9, rel=1e-3)
    ceiling = 1.0 if measured == "read" else 2 / 4
    assert entry["fraction_of_measured"] == pytest.approx((passes / 2) / ceiling, rel=1e-3)
    assert entry["fraction_of_nominal"] == pytest.approx(passes * nbytes / 2 / 3.35e12, rel=1e-3)
    assert row["speedup"]["eager"]["paired"] == pytest.approx(3.0, rel=1e-3)
    assert row["speed_against_read"] == pytest.approx(0.5, rel=1e-3)


def test_an_unknown_device_is_held_against_its_own_measurement_only(device, cuda, monkeypatch):
    cuda.properties.name = "NVIDIA Something New"
    row = row_of_calls(device, cuda, monkeypatch, {"fastcalib": lambda: cuda.takes(2.0)})
    assert row["gpu"]["nominal_gb_per_s"] is None
    assert row["entries"]["fastcalib"]["fraction_of_nominal"] is None
    assert "not in our table" in report.describe_machine({**MACHINE, "gpu": device.describe()})[0]


def test_peak_memory_is_beyond_what_was_there(device, cuda):
    cuda.allocated = 7_000_000
    cuda.peak = 90_000_000  # an older, higher mark, which must not count
    assert device.peak_extra(cuda.takes(0.0, 3_000_000), cuda.takes(0.0, 50_000_000)) == 3.0


# --- competitors


def test_each_of_our_backends_is_a_competitor(device, cuda, monkeypatch):
    import fastcalib

    backends = importlib_backends()
    seen: dict[str, list[str]] = {"made": [], "called": []}

    def factory():
        seen["made"].append(backends._forced)
        return lambda: seen["called"].append(backends._forced) or {}

    row = row_of_calls(device, cuda, monkeypatch, {"fastcalib": factory, "eager": lambda: dict})
    assert list(row["entries"]) == ["fastcalib", "fastcalib cpp", "eager"]
    assert seen["made"] == ["eager", "cpp"] and set(seen["called"]) == {"eager", "cpp"}
    assert backends._forced == "auto" and fastcalib.backends()


def importlib_backends():
    import importlib

    return importlib.import_module("fastcalib.backends")  # the package has a function of that name


def test_a_missing_peer_is_reported_and_the_rest_go_on(device, cuda, monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    row = row_of_calls(
        device, cuda, monkeypatch, {"fastcalib": lambda: dict, "eager": lambda: out_of_memory}, op="loss nll"
    )
    assert row["entries"]["eager"] == {"unavailable": "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"}
    assert {"liger-kernel", "quack", "flash-attn"} <= set(row["entries"])
    assert row["entries"]["fastcalib"]["unavailable"] is None
    text = report.format_row(row)
    assert "OutOfMemoryError" in text and "of measured" in text


@pytest.mark.parametrize("overwrites", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_a_peer_that_overwrites_the_logits_does_so_in_a_copy_renewed_each_time(backward, overwrites):
    problem = Problem(5, 40, torch.float32)
    before = problem.logits.clone()

    def peer(logits, target):
        loss = torch.nn.functional.cross_entropy(logits, target)
        if backward and overwrites:
            loss.register_hook(lambda g: (logits.data.fill_(7.0), None)[1])  # a hook's result replaces the gradient
        return loss

    prepared = gpu_peers._loss(lambda: peer, problem, backward, overwrites)
    want = torch.nn.functional.cross_entropy(before, problem.target)
    for _ in range(2):
        if prepared.before is not None:
            prepared.before()
        assert torch.equal(prepared.call()["loss"], want)
    assert torch.equal(problem.logits, before)
    assert (prepared.before is not None) is (backward and overwrites)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("backward", [True, False])
def test_peers_without_a_temperature_get_logits_divided_beforehand(backward):
    """They are compared with the answers of softmax at temperature 0.7, so they must be asked for the same."""
    problem = Problem(3, 30, torch.float32)
    direction = "fwd+bwd" if backward else "fwd"
    case = next(
        c for c in all_cases(((3, 30),)) if (c.op, c.direction, c.dtype) == ("softmax", direction, torch.float32)
    )
    prepared = gpu_peers._softmax(lambda: lambda z: torch.softmax(z, -1), problem, backward)
    assert gpu_suite._error(prepared, case.build(problem).reference()) < 1e-6


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("backward", [True, False])
def test_trls_kernel_is_asked_for_what_the_row_is_about(backward, monkeypatch):
    def stand_in(logits, index, temperature):
        log_p = torch.log_softmax(logits / temperature, -1)
        return log_p.gather(-1, index[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    monkeypatch.setattr(gpu_peers, "_attribute", lambda path: stand_in)
    problem = Problem(3, 30, torch.float32)
    direction = "fwd+bwd" if backward else "fwd"
    case = next(c for c in all_cases(((3, 30),)) if (c.op, c.direction) == ("statistics K=1", direction))
    found = gpu_peers.factories(case, problem)
    assert gpu_suite._error(found["trl kernel"](), case.build(problem).reference()) < 1e-6


# --- the command

MACHINE = {
    "cpu": "x", "cores": 1, "threads": 1, "caches": "", "memory_gib": 1, "transparent_huge_pages": "", "isa": "",
    "system": "", "python": "", "torch": "", "compiler": "", "date": "", "fastcalib": {"version": "", "commit": ""},
}  # fmt: skip


def test_without_a_gpu_it_says_so_and_exits_with_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_run().main(["--device", "cuda", "--quick"]) == 2
    said = capsys.readouterr()
    assert "use --device cpu" in said.err and not said.out


def test_figures_of_the_cpu_are_refused_on_a_gpu(capsys):
    with pytest.raises(SystemExit, match="2"):
        load_run().main(["--device", "cuda", "--targets"])
    assert "--targets is of the CPU" in capsys.readouterr().err


def test_sizes_are_the_devices():
    run = load_run()
    assert run.parse(["--device", "cuda"]).shapes == gpu_suite.SHAPES
    assert (
        run.parse([]).shapes == run.SHAPES
        and run.child_arguments(run.parse([]), run.settings_of(run.parse([]))).count("--shapes") == 0
    )
    assert run.parse(["--device", "cuda", "--shapes", "2x3"]).shapes == ((2, 3),)
    assert run.settings_of(run.parse(["--device", "cuda"])).rounds == 50


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every kind of row at a size for CPUs, through the command: JSON, tables and picture."""
    folder = tmp_path_factory.mktemp("gpu")
    run = load_run()
    api = FakeCuda()
    files = {kind: folder / f"out.{kind}" for kind in ("json", "md", "png")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.gpu, "why_not", lambda: "")
        patch.setattr(run.gpu, "live_backends", lambda: ["eager", "cpp"])
        made = gpu_module.Gpu(["eager", "cpp"], api=api, device="cpu", flushed=1024)
        patch.setattr(run.gpu, "Gpu", lambda backends: made)
        # Neither is looked at here, and importing them takes longer than everything else.
        patch.setattr(torch, "compile", lambda function, **options: function)
        patch.setitem(sys.modules, "torchmetrics.functional.text", None)
        only = r"statistics K=1 \||statistics K=8 \|.*fp32|ranks M=16 |^softmax|loss nll|loss gem.*fp32"
        only += "|linear statistics.*fp32"
        arguments = ["--device", "cuda", "--shapes", "4x64", "--only", only, "--no-compile", "--rounds", "3"]
        arguments += ["--json", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["png"])]
        assert run.main(arguments) == 0
    return files


def test_rows_of_every_kind_are_right_and_whole(written):
    document = json.loads(written["json"].read_text())
    suite.validate(document)
    assert document["machine"]["gpu"]["name"] == "NVIDIA H100 80GB HBM3"
    assert {r["group"] for r in document["rows"]} == {"statistics", "ranks", "dense", "losses", "linear"}
    for row in document["rows"]:
        for name in ("fastcalib", "fastcalib cpp", "eager"):
            entry = row["entries"][name]
            assert entry["unavailable"] is None, f"{row['op']}: {name}: {entry['unavailable']}"
            # bfloat16: gradients and probabilities are rounded to it
            assert entry["error"] < (5e-6 if row["dtype"] == "fp32" else 2e-2), f"{row['op']} {row['dtype']}: {name}"
            assert entry["samples"] == 3
        assert "torch.compile" not in row["entries"]
    (layer,) = [row["entries"] for row in document["rows"] if row["group"] == "linear"]
    assert layer["fastcalib in chunks"]["error"] < 5e-6 and layer["matmul alone"]["samples"] == 3
    broken = json.loads(json.dumps(document))
    del broken["rows"][0]["entries"]["eager"]["fraction_of_measured"]
    with pytest.raises(ValueError, match=r"rows\[0\].entries\[eager\].*fraction_of_measured"):
        suite.validate(broken)


def test_tables_and_picture_say_what_they_are_of(written):
    pytest.importorskip("matplotlib")
    text = written["md"].read_text()
    for part in ("# Benchmarks on a GPU", "3,350 GB/s nominal", "## Losses: forward + backward\n", "of nominal) |",
                 "two CUDA events", '"fastcalib" is backend="eager"', "| liger-kernel |"):  # fmt: skip
        assert part in text, part
    tables = [
        line for line in text.splitlines() if line.startswith(("| job", "| statistics", "| loss", "|---|---|---|---"))
    ]
    assert len({line.count("|") for line in tables}) == 1, "a line has more or fewer cells than the head"
    assert written["png"].read_bytes().startswith(b"\x89PNG")
    for secret in (str(Path.home()), str(FOLDER.parent)):
        assert len(secret) < 4 or secret not in text

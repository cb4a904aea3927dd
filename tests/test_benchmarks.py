"""The benchmark: its clock, its yardsticks, its tables. Nothing here asserts how long anything takes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
if not (FOLDER / "bench").is_dir():
    pytest.skip("benchmarks/ is not shipped with the package", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

from bench import ceilings, harness, linear, memory, ours, peers, plain, report, suite  # noqa: E402
from bench.cases import Case, Job, all_cases  # noqa: E402
from bench.problem import ARBITRARY, ARITHMETIC, Problem, gradient, max_error  # noqa: E402
from bench.scaling import slope  # noqa: E402

sys.path.remove(str(FOLDER))


def load_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastcalib_benchmark_run", FOLDER / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to, and a machine where nobody else runs."""

    class Clock:
        now = 0.0

        def advance(self, seconds: float):
            def act():
                self.now += seconds

            return act

    fake = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(harness, "wait_for_quiet", lambda at_most=0.0: True)
    monkeypatch.setattr(harness.Watch, "disturbed", lambda self: False)
    return fake


def timing(name: str, samples: list) -> harness.Timing:
    return harness.Timing(name, samples=samples, raw=[9.0 if s is None else s for s in samples])


# --- the clock


def test_time_of_a_call_leaves_its_preparation_out(clock):
    prepared = harness.Variant("prepared", clock.advance(0.25), before=clock.advance(100.0))
    result = harness.measure([prepared], rounds=3, budget=1e9)
    assert result["prepared"].kept == [0.25] * 3
    several = harness.Variant("several", clock.advance(0.01), before=clock.advance(100.0))
    result = harness.measure([several], rounds=2, budget=1e9, min_sample=0.04)
    assert result["several"].inner == 4
    assert result["several"].kept == pytest.approx([0.01, 0.01])


def test_a_sample_is_the_mean_over_its_calls(clock):
    result = harness.measure([harness.Variant("x", clock.advance(0.01))], rounds=2, min_sample=0.04)
    assert result["x"].inner == 4
    assert result["x"].kept == pytest.approx([0.01, 0.01])


def test_variants_take_turns_and_the_order_rotates(clock):
    order: list[str] = []

    def call(name: str):
        def act():
            order.append(name)
            clock.now += 0.5

        return act

    harness.measure([harness.Variant(n, call(n)) for n in "abc"], rounds=3, budget=1e9, min_sample=0.01)
    assert order[:6] == list("aabbcc")  # warm-up
    assert order[6:] == list("abc" + "bca" + "cab")


def test_slow_variants_are_sampled_three_times_only(clock):
    variants = [harness.Variant("slow", clock.advance(5.0)), harness.Variant("quick", clock.advance(0.5))]
    result = harness.measure(variants, rounds=7, budget=1e9)
    assert len(result["slow"].raw) == 3
    assert len(result["quick"].raw) == 7


def test_no_round_starts_after_the_budget(clock):
    result = harness.measure([harness.Variant("x", clock.advance(0.5))], rounds=50, budget=1.2)
    assert len(result["x"].raw) == 3


def test_disturbed_samples_are_dropped_and_too_many_are_confessed(clock, monkeypatch):
    verdicts = iter([True, False, False, False, True] + [True] * 10)
    monkeypatch.setattr(harness.Watch, "disturbed", lambda self: next(verdicts))
    result = harness.measure([harness.Variant("x", clock.advance(0.5))], rounds=3, budget=1e9)["x"]
    assert result.samples == [None, 0.5, 0.5, 0.5]
    assert not result.noisy
    assert result.as_dict()["disturbed"] == 1
    assert timing("y", [None, None, 1.0, 2.0]).noisy
    assert timing("y", [None, None, 1.0, 2.0]).kept == [9.0, 9.0, 1.0, 2.0]


def test_watch_sees_other_processes_and_waiting_threads(monkeypatch):
    state = {"busy": 0.0, "own": 0.0, "wait": 0.0, "now": 0.0}
    monkeypatch.setattr(harness, "_machine_busy", lambda: state["busy"])
    monkeypatch.setattr(harness, "_own_use", lambda: state["own"])
    monkeypatch.setattr(harness, "_own_wait", lambda: state["wait"])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: state["now"])
    for after, disturbed in (
        ({"busy": 2.0, "own": 2.0}, False),  # all of it was ours
        ({"busy": 2.5, "own": 2.0}, True),
        ({"busy": 2.0, "own": 2.0, "wait": 0.5}, True),
    ):
        state |= {"busy": 0.0, "own": 0.0, "wait": 0.0, "now": 0.0}
        watch = harness.Watch()
        state |= {"now": 1.0, **after}
        assert watch.disturbed() is disturbed, after


def test_ratios():
    a, b = timing("a", [4.0, 2.0, 6.0, None]), timing("b", [1.0, 2.0, 2.0, 5.0])
    assert harness.ratio(a, b) == 2.0
    assert harness.ratio(a, b, "median") == 2.0
    assert harness.ratio(a, b, "paired") == 3.0  # median of 4, 1, 3; the disturbed round does not pair
    with pytest.raises(ValueError, match="how must be"):
        harness.ratio(a, b, "mean")


# --- the yardsticks

needs_compiler = pytest.mark.skipif(ceilings.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def yardsticks(tmp_path_factory):
    return ceilings.Ceilings(2, tmp_path_factory.mktemp("ceilings"))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000, 40_001])  # below, at and beyond a step; a tail in each part
@pytest.mark.parametrize("best", [False, True])
def test_read_sums_every_element(yardsticks, dtype, numel, best):
    x = torch.randint(-8, 9, (numel,)).to(dtype)  # integers: any order of summation is exact
    assert yardsticks.read(x, best=best)() == x.double().sum().item()


@needs_compiler
def test_readwrite_keeps_and_copies_copy(yardsticks):
    x = torch.randn(40_003)
    before = x.clone()
    yardsticks.readwrite(x)()
    assert torch.equal(x, before)
    for nontemporal in (False, True):
        for start in (0, 1):  # 1: not aligned to 64 bytes
            out = torch.full((40_005,), -1.0)
            yardsticks.copy(out[start : start + x.numel()], x, nontemporal=nontemporal)()
            assert torch.equal(out[start : start + x.numel()], x)
            assert out[start + x.numel()] == -1.0


@needs_compiler
def test_read_refuses_what_it_would_read_wrongly(yardsticks):
    for wrong in (torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4).t()[:, :2]):
        with pytest.raises(ceilings.CeilingsUnavailable):
            yardsticks.read(wrong)


@needs_compiler
def test_a_build_is_cached(tmp_path):
    first = ceilings.build(tmp_path)
    stamp = first.stat().st_mtime_ns
    assert ceilings.build(tmp_path) == first
    assert first.stat().st_mtime_ns == stamp


def test_no_compiler_is_said(monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "find_compiler", lambda: None)
    assert suite.make_ceilings(1) is None
    assert "no C++ compiler found" in capsys.readouterr().out


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no resettable high-water mark")
def test_peak_memory_counts_what_the_call_touches():
    size = 32 * 2**20
    torch.zeros(8 * size, dtype=torch.uint8).add_(1)  # an older, higher mark, which must not count
    extra = memory.peak_extra(lambda: torch.zeros(size, dtype=torch.uint8).add_(1))
    assert extra == pytest.approx(size / 1e6, abs=4)
    small = [torch.ones(2**20) for _ in range(9)]  # once freed they stay in the heap
    del small
    assert memory.peak_extra(lambda: torch.ones(2**20)) == pytest.approx(2**22 / 1e6, abs=0.6)


# --- answers


def test_error_is_relative_above_one_and_absolute_below():
    reference = {"a": torch.tensor([100.0, 0.5], dtype=torch.float64)}
    assert max_error({"a": torch.tensor([101.0, 0.5])}, reference) == pytest.approx(0.01)
    assert max_error({"a": torch.tensor([100.0, 0.75])}, reference) == pytest.approx(0.25)
    assert max_error({"a": torch.tensor([100.0, 0.5, 7.0])}, reference) == 0.0  # rows beyond the reference
    assert max_error({"b": torch.zeros(2)}, reference) is None
    grad = {"grad": torch.tensor([1e-3, 1e-6], dtype=torch.float64)}
    assert max_error({"grad": torch.tensor([1e-3, 2e-6])}, grad) == pytest.approx(1e-3, rel=1e-3)


def test_arithmetic_betas_are_and_arbitrary_ones_are_not():
    for k in (4, 8):
        for grid, even in ((ARITHMETIC[k], True), (ARBITRARY[k], False)):
            steps = torch.tensor([1 / t for t in grid], dtype=torch.float64).diff()
            assert (len(grid) == k) and (bool((steps - steps[0]).abs().max() < 1e-12) is even)


def test_both_ways_of_ranking_agree():
    problem = Problem(5, 300, torch.bfloat16)  # bfloat16: many ties
    index = problem.selected(7)
    brute, fast = plain.ranks_brute(problem.logits, index), plain.ranks_sorted(problem.logits, index)
    assert torch.equal(brute["n_greater"], fast["n_greater"])
    assert torch.equal(brute["n_equal"], fast["n_equal"])
    assert brute["n_equal"].sum() > 0


@pytest.mark.parametrize("name", list(plain.LOSSES))
def test_competitors_compute_the_same_loss_as_ours(name):
    """A benchmark against something else would be worth nothing."""
    pytest.importorskip("fastcalib.losses")
    problem = Problem(20, 100_000, torch.float32)  # a vocabulary large enough for truncation to keep some and drop some
    options, per_token = plain.LOSSES[name]
    z = problem.logits.double()
    function = ours.loss_function(name, options)
    leaf = z.clone().requires_grad_()
    loss = function(leaf, problem.target)
    (grad,) = torch.autograd.grad(loss, leaf)
    want_loss, want_grad = gradient(per_token, z, problem.target, problem.n)
    torch.testing.assert_close(loss.detach(), want_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, want_grad, rtol=1e-8, atol=1e-12)
    assert want_grad.abs().max() > 0


@pytest.mark.parametrize("temperatures", [(1.0,), (0.7,), ARBITRARY[4]])
def test_all_ways_of_writing_the_statistics_agree(temperatures):
    problem = Problem(6, 500, torch.float32)
    z, target = problem.logits.double(), problem.target
    want = plain.statistics(z, target, temperatures)
    got = plain.statistics_tuned(z, target, temperatures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        looped = plain.compiled_statistics()(z, target, temperatures)
    assert want["entropy"].shape == ((6,) if len(temperatures) == 1 else (6, 4))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(looped[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_all_ways_through_a_linear_layer_agree(compiled):
    layer = linear.Layer(70, 300, 16, torch.float32)  # a whole chunk of rows and a rest
    compile_nothing = lambda function: function  # noqa: E731
    want = plain.statistics(layer.logits64(70), layer.target, (1.0,))
    ways = [linear.compiled_statistics(layer, compile_nothing)] if compiled else [linear.eager_statistics(layer)]
    for got in (call() for call in [*ways, linear.statistics(layer)]):
        for name in ("logsumexp", "entropy", "log_prob"):
            torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-5)
    ways = [linear.compiled_nll(layer, compile_nothing)] if compiled else [linear.eager_nll(layer)]
    for got in (call() for call in [*ways, linear.nll(layer)]):
        torch.testing.assert_close(got["loss"].double(), -want["log_prob"].mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["grad"].double(), layer.gradient64(70), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("package", "make"), [("liger_kernel", peers.liger), ("cut_cross_entropy", peers.cut_cross_entropy)]
)
def test_peers_compute_the_same_loss_of_a_linear_layer(package, make):
    pytest.importorskip(package)
    layer = linear.Layer(70, 5000, 16, torch.float32)  # liger-kernel goes by 4,096 columns
    want = plain.statistics(layer.logits64(70), layer.target, (1.0,))
    with torch.compiler.set_stance("force_eager"):  # cut-cross-entropy's is compiled
        got = linear.peer_nll(layer, make)()
    torch.testing.assert_close(got["loss"].double(), -want["log_prob"].mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["grad"].double(), layer.gradient64(70), rtol=1e-4, atol=1e-6)


# --- the suite


def tiny_case(**factories) -> Case:
    def build(problem: Problem) -> Job:
        return Job(dict(factories), lambda: {"x": torch.ones(2, dtype=torch.float64)})

    return Case("op", 4, 16, torch.float32, "fwd", "1 N V 4 B", 1, build, "statistics")


SHORT = suite.Settings(threads=1, rounds=1, budget=0.01, compile=False, quiet=0.0)


def test_a_missing_competitor_is_reported_and_the_rest_go_on():
    def absent():
        raise ours.NotAvailable("fastcalib has no such thing")

    def fails():
        raise RuntimeError("broken\nsecond line")

    case = tiny_case(fastcalib=absent, eager=lambda: lambda: {"x": torch.full((2,), 1.5)}, other=lambda: fails)
    row = suite.run_case(case, Problem(4, 16, torch.float32), SHORT, None)
    assert row["entries"]["fastcalib"] == {"unavailable": "fastcalib has no such thing"}
    assert row["entries"]["other"] == {"unavailable": "RuntimeError: broken"}
    assert row["entries"]["eager"]["error"] == pytest.approx(0.5)
    assert row["bytes"] == 4 * 16 * 4
    assert "not available: fastcalib has no such thing" in report.format_row(row)


def test_every_family_of_rows_has_its_table():
    assert {case.group for case in all_cases()} == set(report.TITLES)


def test_cases_cover_the_sizes_asked_for():
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names))
    for shape in ("256x128256", "4096x32000", "1x262144"):
        for dtype in ("fp32", "bf16"):
            for op in ("statistics K=1", "statistics K=4", "statistics K=8", "statistics K=8 arithmetic", "softmax"):
                assert f"{op} | {dtype} | {shape} | fwd" in names
            for m in (1, 16, 256, 4096):
                assert f"ranks M={m} | {dtype} | {shape} | fwd" in names
            assert f"loss nll | {dtype} | {shape} | fwd+bwd" in names
    for kind in ("dense", "sparse"):
        for dtype in ("fp32", "bf16"):
            assert all(f"pr {kind} L={count} | {dtype} | 256x128256 | fwd" in names for count in (1, 16, 128))
            assert all(f"pr {kind} L={count} | {dtype} | 256x128256 | fwd+bwd" in names for count in (1, 16))
    for name in plain.LOSSES:
        for direction in ("fwd", "fwd+bwd"):
            assert f"loss {name} | fp32 | 256x128256 | {direction}" in names


def test_slope_of_a_power_law():
    xs = [1.0, 10.0, 1000.0]
    assert slope(xs, [3 * x**0.5 for x in xs]) == pytest.approx(0.5)
    assert slope(xs, [0.0, 0.0, 1.0]) is None


# --- the command


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out.json"
    before = torch.get_num_threads()
    arguments = "--shapes 4x64 --only statistics.K=(1|8).*fp32 --no-compile --no-wait --rounds 1 --budget 0.01"
    try:
        assert load_run().main([*arguments.split(), "--threads", "1", "--heap", "fresh", "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(before)
    return json.loads(out.read_text())


def test_json_follows_its_schema(document):
    suite.validate(document)
    assert [r["op"] for r in document["rows"]] == [
        "statistics K=1", "statistics K=1 T=0.05", "statistics K=8", "statistics K=8 arithmetic",
        "statistics K=1", "statistics K=8",
    ]  # fmt: skip
    for row in document["rows"]:
        assert row["bytes_formula"] and row["entries"]["eager"]["median_ms"] > 0
        assert row["entries"]["torch.compile"] == {"unavailable": "left out by --no-compile"}
        own = row["entries"]["fastcalib"]
        assert own["unavailable"] is None
        assert own["error"] < 2e-6
    broken = json.loads(json.dumps(document))
    del broken["rows"][0]["entries"]["eager"]["error"]
    with pytest.raises(ValueError, match=r"rows\[0\].entries\[eager\]"):
        suite.validate(broken)


def test_results_do_not_tell_where_they_were_taken(document):
    text = json.dumps(document) + report.markdown(document)
    for secret in (str(FOLDER.parent), str(Path.home()), sys.prefix):
        assert len(secret) < 4 or secret not in text
    host = socket.gethostname()
    assert not re.search(rf"\b{re.escape(host)}\b", text) or host in ("localhost", "x86", "linux")
    for fact in ("cpu", "cores", "caches", "memory_gib", "isa", "torch", "compiler", "date"):
        assert document["machine"][fact]


def test_tables_and_picture_from_an_earlier_run(document, tmp_path):
    pytest.importorskip("matplotlib")
    source, picture, page = (tmp_path / name for name in ("in.json", "out.png", "docs/out.md"))
    source.write_text(json.dumps(document))
    assert load_run().main(["--from-json", str(source), "--plot", str(picture), "--markdown", str(page)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "| statistics K=8 arithmetic | fp32 | 4 x 64 |" in text
    assert "## Statistics: forward + backward, fresh gradient memory" in text

"""Which implementation runs is visible, chosen by name, and never changes silently."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile
import types
import warnings

import pytest
import torch

import fastcalib
from fastcalib.ops import _gpu

from .conftest import CPP_IS_LIVE

module = importlib.import_module("fastcalib.backends")  # the package has a function of that name

needs_cpp = pytest.mark.skipif(not CPP_IS_LIVE, reason="the C++ extension is not built")
Z = torch.randn(2, 50)


def run(code: str, **environment: str) -> str:
    """A fresh interpreter, away from the repository."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        cwd=tempfile.gettempdir(),
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


WITHOUT_EXTENSION = "import sys; sys.modules['fastcalib._C'] = None\n"


def test_every_backend_says_whether_it_is_live_and_why():
    found = fastcalib.backends()
    assert set(found) == {"eager", "cpp", "triton", "cuda"}
    for live, why in found.values():
        assert isinstance(live, bool) and len(why) > 10
    assert found["eager"][0]


@needs_cpp
def test_auto_is_cpp_on_the_cpu():
    assert module.resolve("auto", torch.device("cpu")) == "cpp"
    assert module.extension().isa() in fastcalib.backends()["cpp"][1]
    with fastcalib.use_backend("eager"):
        assert module.resolve("auto", torch.device("cpu")) == "eager"
        assert module.resolve("cpp", torch.device("cpu")) == "cpp"  # said in the call, it wins
        with fastcalib.use_backend("cpp"):
            assert module.resolve("auto", torch.device("cpu")) == "cpp"
        with fastcalib.use_backend("auto"):
            assert module.resolve("auto", torch.device("cpu")) == "cpp"
        assert module.resolve("auto", torch.device("cpu")) == "eager"
    assert module.resolve("auto", torch.device("cpu")) == "cpp"


def test_an_error_inside_restores_the_backend():
    before = module._forced
    with pytest.raises(ZeroDivisionError), fastcalib.use_backend("eager"):
        1 / 0  # noqa: B018
    assert module._forced == before


@pytest.mark.parametrize("function", ["statistics", "softmax", "log_softmax"])
def test_unknown_and_unavailable_backends(function):
    with pytest.raises(ValueError, match=r"\"auto\".*eager.*got 'fast'"):
        getattr(fastcalib, function)(Z, backend="fast")
    live, why = fastcalib.backends()["cuda"]
    if not live:  # no kernels in this build, or no device: the error says what the list of backends says
        with pytest.raises(RuntimeError, match=f"backend 'cuda' is not available: {why}"):
            getattr(fastcalib, function)(Z, backend="cuda")
    with pytest.raises(ValueError, match="got 'numpy'"), fastcalib.use_backend("numpy"):
        pass
    if not fastcalib.backends()["triton"][0]:
        with pytest.raises(RuntimeError, match="'triton' is not available"), fastcalib.use_backend("triton"):
            pass


def test_named_and_automatic_choice_agree(backend):
    with fastcalib.use_backend(backend):
        a = fastcalib.statistics(Z, torch.tensor([0, 1]))
        r = fastcalib.ranks(Z, torch.tensor([0, 1]), temperature=1.0)
        p = fastcalib.softmax(Z)
    b = fastcalib.statistics(Z, torch.tensor([0, 1]), backend=backend)
    assert torch.equal(a.entropy, b.entropy) and torch.equal(a.log_prob, b.log_prob)
    assert torch.equal(
        r.mass_greater, fastcalib.ranks(Z, torch.tensor([0, 1]), temperature=1.0, backend=backend).mass_greater
    )
    assert torch.equal(p, fastcalib.softmax(Z, backend=backend))


@needs_cpp
def test_auto_does_not_warn_where_the_kernels_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastcalib.statistics(Z)


def test_without_the_extension_auto_warns_once_and_works():
    out = run(
        WITHOUT_EXTENSION
        + """
import warnings, torch, fastcalib
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        s = fastcalib.statistics(torch.zeros(2, 8))
        fastcalib.softmax(torch.zeros(2, 8))
words = str(seen[0].message)
print(len(seen), seen[0].category.__name__, s.entropy.exp().tolist(), "eager" in words, "FASTCALIB_FORCE_EXT" in words)
live, why = fastcalib.backends()["cpp"]
print(live, "could not be imported" in why)
try:
    fastcalib.statistics(torch.zeros(2, 8), backend="cpp")
except RuntimeError as error:
    print("not available" in str(error))
""",
        FASTCALIB_QUIET="",
    )
    first, second, third = out.splitlines()
    assert first.startswith("1 RuntimeWarning [8.0") and first.endswith("True True")
    assert second == "False True" and third == "True"


def test_without_the_extension_quiet_is_quiet():
    code = "import torch, fastcalib, warnings; warnings.simplefilter('error'); fastcalib.statistics(torch.zeros(2, 8))"
    run(WITHOUT_EXTENSION + code, FASTCALIB_QUIET="1")


@needs_cpp
def test_the_instruction_set_can_be_chosen():
    extension = module.extension()
    before = extension.isa()
    try:
        for name in extension.isas():
            extension.set_isa(name)
            assert extension.isa() == name
            found = run("import fastcalib; print(fastcalib.backends()['cpp'][1].split()[-1])", FASTCALIB_ISA=name)
            assert found == name
        with pytest.raises((ValueError, RuntimeError), match="mmx"):
            extension.set_isa("mmx")
        assert extension.isa() == extension.isas()[-1] or extension.isa() in extension.isas()
    finally:
        extension.set_isa(before)
    assert "baseline" in extension.isas()
    assert isinstance(extension.compiler(), str) and isinstance(extension.openmp(), bool)


@needs_cpp
def test_an_instruction_set_that_does_not_exist_is_not_ignored():
    """FASTCALIB_ISA with a typing error must not quietly run something else."""
    result = subprocess.run(
        [sys.executable, "-c", "import fastcalib; print(fastcalib.backends()['cpp'])"],
        capture_output=True, text=True, env={**os.environ, "FASTCALIB_ISA": "avx1024"}, timeout=120,
        cwd=tempfile.gettempdir(),
    )  # fmt: skip
    assert "avx1024" in result.stdout + result.stderr


@needs_cpp
def test_instruction_sets_agree_closely():
    """Each adds in its own order, so not to the bit, yet far within the promise."""
    extension, z = module.extension(), torch.randn(4, 9_000) * 3
    before, results = extension.isa(), []
    try:
        for name in extension.isas():
            extension.set_isa(name)
            results.append(fastcalib.statistics(z, torch.tensor([0, 1, 2, 3]), ranks=True, backend="cpp"))
    finally:
        extension.set_isa(before)
    for s in results[1:]:
        for a, b in zip(s, results[0]):
            torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-6)


def test_one_thread_works(backend):
    torch.set_num_threads(1)
    assert fastcalib.statistics(Z, backend=backend).entropy.isfinite().all()


@pytest.mark.parametrize("function", ["statistics", "softmax", "log_softmax", "ranks"])
def test_a_cuda_device_without_kernels_warns_once_and_works(function, monkeypatch):
    """No Triton and no CUDA kernels in the extension: plain PyTorch, said once, for every operation alike."""
    automatic = module._automatic
    monkeypatch.setattr(module, "_TRITON_FOUND", False)
    monkeypatch.setattr(module, "_why_no_cuda", lambda: "no CUDA kernels in this build of the extension")
    monkeypatch.setattr(module, "_automatic", lambda device, dtype: automatic(torch.device("cuda"), dtype))
    monkeypatch.setattr(module, "_warned", False)
    monkeypatch.delenv("FASTCALIB_QUIET", raising=False)
    ids = (torch.tensor([0, 1]),) if function == "ranks" else ()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        results = [getattr(fastcalib, function)(Z, *ids) for _ in range(2)]
    words = [str(w.message) for w in seen if w.category is RuntimeWarning]
    assert len(words) == 1 and "'eager'" in words[0]
    assert "Triton is not installed" in words[0] and "no CUDA kernels" in words[0]
    want = getattr(fastcalib, function)(Z, *ids, backend="eager")
    for result in results:
        pairs = [(result, want)] if isinstance(want, torch.Tensor) else zip(result, want)
        assert all(a is None if b is None else torch.equal(a, b) for a, b in pairs)


def test_many_ranks_go_to_the_extension_where_it_has_cuda_kernels(monkeypatch):
    """The automatic choice only, and Triton's only: a name in the call or in use_backend is obeyed."""
    choose, many = _gpu.backend_for_ranks, _gpu.CUDA_RANKS_FROM
    monkeypatch.setattr(module, "_C", types.SimpleNamespace(cuda_ranks=None))
    assert choose("auto", "triton", many) == "cuda" and choose("auto", "triton", many - 1) == "triton"
    assert choose("triton", "triton", many) == "triton"
    assert choose("auto", "cpp", many) == "cpp" and choose("auto", "eager", many) == "eager"
    monkeypatch.setattr(module, "_forced", "triton")
    assert choose("auto", "triton", many) == "triton"
    monkeypatch.setattr(module, "_forced", "auto")
    monkeypatch.setattr(module, "_C", types.SimpleNamespace())
    assert choose("auto", "triton", many) == "triton", "an extension without CUDA kernels"
    monkeypatch.setattr(module, "_C", None)
    assert choose("auto", "triton", many) == "triton"


@pytest.mark.parametrize("ragged", [False, True])
def test_ranks_count_the_thresholds_of_a_row_for_the_choice(ragged, monkeypatch):
    """Of ragged sets, whose sizes only the device knows, the mean."""
    seen = []
    monkeypatch.setattr(_gpu, "backend_for_ranks", lambda asked, chosen, per_row: seen.append(per_row) or chosen)
    sets = fastcalib.ValidSets.from_lists([[0, 1, 2], [3]]) if ragged else torch.tensor([[0, 1], [2, 3]])
    fastcalib.ranks(torch.zeros(2, 5), sets)
    assert seen == [2]


def test_a_backend_without_an_operation_is_refused_with_those_that_have_it(monkeypatch):
    """Named in the call or by use_backend it is an error, whatever else is wrong; the automatic choice says it once."""
    words = r'^backend \'cuda\' has no pr_divergence; use backend="eager", "cpp" or "triton"$'
    with pytest.raises(RuntimeError, match=words):
        fastcalib.pr_divergence(Z, Z, 1.0, backend="cuda")
    monkeypatch.setattr(module, "_forced", "cuda")
    with pytest.raises(RuntimeError, match=words):
        fastcalib.pr_divergence(Z, Z, 1.0)
    monkeypatch.setattr(module, "_forced", "auto")
    monkeypatch.setattr(module, "_automatic", lambda device, dtype: ("cuda", ""))
    monkeypatch.setattr(module, "_warned", False)
    monkeypatch.delenv("FASTCALIB_QUIET", raising=False)
    with pytest.warns(RuntimeWarning, match="slow 'eager' backend: backend 'cuda', .* has no pr_divergence"):
        got = fastcalib.pr_divergence(Z, Z + 1, 1.0).alpha
    assert torch.equal(got, fastcalib.pr_divergence(Z, Z + 1, 1.0, backend="eager").alpha)


def test_every_operation_that_is_registered_is_in_the_table():
    for found in pkgutil.iter_modules(fastcalib.ops.__path__):
        importlib.import_module(f"fastcalib.ops.{found.name}")
    registered = {n.removeprefix("fastcalib::") for n in torch._C._dispatch_get_all_op_names() if "fastcalib::" in n}
    assert {n for n in registered if not n.endswith("_backward")} == set(module.OPERATIONS)
    for having in module.OPERATIONS.values():
        assert having[0] == "eager" and set(having) <= set(module.BACKENDS)
    from fastcalib.info import collect

    shown = collect()["backends"]
    assert "pr_divergence" in shown["triton"]["operations"] and "pr_divergence" not in shown["cuda"]["operations"]
    assert all("statistics" in shown[name]["operations"] for name in module.BACKENDS)

"""What an installed fastcalib is: its names, its metadata, its build with and without a compiler.

Builds happen in a copy of the repository in a temporary folder; no network is used.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_COMPILER = {"CXX": "/nonexistent/c++"}


def run_outside(code: str, folder: Path) -> str:
    """Run code in a fresh interpreter that sees neither the repository nor the current folder (-I)."""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def facts_of(site: Path, expression: str) -> str:
    """Evaluate an expression of ``facts`` for the package unpacked in ``site``, whatever else is installed.

    The import hook of an editable installation goes first: it would supply the modules that ``site`` lacks.
    """
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "is_editable = lambda hook: getattr(hook, '__module__', '').startswith('__editable__')\n"
        "sys.meta_path = [hook for hook in sys.meta_path if not is_editable(hook)]\n"
        f"from fastcalib.info import collect; facts = collect(); print({expression})"
    )
    return run_outside(code, site.parent)


def test_triton_kernels_is_not_a_top_level_module(tmp_path: Path) -> None:
    # gpt-oss users have a package called triton_kernels, and vLLM takes any module of that name that it can import.
    code = "import importlib.util, fastcalib; print(importlib.util.find_spec('triton_kernels'))"
    assert run_outside(code, tmp_path) == "None"


def test_triton_kernels_is_a_subpackage(tmp_path: Path) -> None:
    assert (
        run_outside("import fastcalib.triton_kernels as t; print(t.__name__)", tmp_path) == "fastcalib.triton_kernels"
    )


def test_the_console_script_and_the_module_show_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("fastcalib")
    outputs = [
        subprocess.run([*command, "info", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for command in ([str(script)], [sys.executable, "-m", "fastcalib"])
    ]
    assert outputs[0] == outputs[1]
    assert '"eager"' in outputs[0]


def test_torch_is_asked_for_with_a_lower_bound_only(tmp_path: Path) -> None:
    # A pin in the metadata replaces the torch (and CUDA) that the user has: the most common complaint about the peers.
    code = "import importlib.metadata; print(*importlib.metadata.requires('fastcalib'), sep='\\n')"
    required = [line for line in run_outside(code, tmp_path).splitlines() if "extra ==" not in line]
    assert "torch>=2.6" in required
    assert all(not re.search(r"==|~=|<", line) for line in required), required


def test_building_does_not_need_torch() -> None:
    build_requirements = re.search(r"^requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert build_requirements is not None
    assert re.findall(r'"([a-z0-9]+)', build_requirements[1]) == ["setuptools", "wheel", "cmake", "ninja", "pybind11"]
    headers = [path for path in (ROOT / "csrc").rglob("*.[hc]*") if "#include <torch" in path.read_text()]
    assert headers == []


def test_the_extension_is_linked_to_no_torch() -> None:
    extension = pytest.importorskip("fastcalib._C")
    assert re.search(rb"lib(torch|c10)\w*\.so", Path(extension.__file__).read_bytes()) is None


def test_an_older_machine_meets_no_avx_instruction() -> None:
    # Several instruction sets are linked into one module. A function outside their namespaces that several objects
    # emit (a std:: template, say) is kept once: were it the AVX-512 copy, each call would be an illegal instruction
    # on an older machine, and never on the developer's.
    extension = pytest.importorskip("fastcalib._C")
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump and an x86-64 build")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", extension.__file__], capture_output=True, text=True, check=True
    )
    offenders, namespaces = set(), set()
    function, in_namespace = "", None
    for line in listing.stdout.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1]
            in_namespace = re.search(r"\b(avx2|avx512|avx512bf16)::", function)
            namespaces.update(in_namespace.groups() if in_namespace else ())
        # In the VEX and EVEX encodings, and nowhere in the baseline, mnemonics start with v. Clones that the compiler
        # made of a function are private to their object: only callers in that object reach them.
        elif not in_namespace and "[clone " not in function and re.match(r"\s+[0-9a-f]+:\s+v", line):
            offenders.add(function)
    if not namespaces:
        pytest.skip("only the baseline was built, or the module was stripped of its names")
    assert offenders == set()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, without anything already built."""
    for tool in ("setuptools", "wheel", "pip", "pybind11", "cmake", "ninja"):
        pytest.importorskip(tool)
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_extension_missing.txt")
    for folder in ("csrc", "fastcalib", "triton_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def clean_environment(**changes: str) -> dict[str, str]:
    # make exports FASTCALIB_FORCE_EXT; a preloaded sanitizer runtime is for the kernels under test, not for compilers.
    ours = ("FASTCALIB_", "CMAKE_", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | changes


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        "out",
    ]
    environment = clean_environment(**environment)
    return subprocess.run([*command, "."], cwd=source, env=environment, capture_output=True, text=True)


def test_without_a_compiler_it_installs_as_python_and_says_so_loudly(source: Path, tmp_path: Path) -> None:
    done = build_wheel(source, **NO_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installed WITHOUT its C++ extension" in done.stdout + done.stderr
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert not [name for name in names if re.match(r"fastcalib/_C\..*(so|pyd)$", name)]
    templates = {f"fastcalib/report/templates/{path.name}" for path in (ROOT / "fastcalib/report/templates").iterdir()}
    assert templates and templates <= set(names)
    # pip hides the message of a successful build, so the installed package must know the reason too.
    answer = facts_of(
        tmp_path / "site",
        "facts['extension']['loaded'], facts['backends']['cpp']['live'], facts['extension']['why_missing']",
    )
    assert answer.startswith("False False ")
    assert "when fastcalib was installed" in answer and "compiler" in answer


def test_force_ext_makes_a_missing_compiler_an_error(source: Path) -> None:
    done = build_wheel(source, FASTCALIB_FORCE_EXT="1", **NO_COMPILER)
    assert done.returncode != 0
    assert "FASTCALIB_FORCE_EXT=1, but fastcalib._C did not build" in done.stdout + done.stderr
    assert not list((source / "out").glob("*.whl"))


def test_force_ext_zero_is_off(source: Path) -> None:
    assert build_wheel(source, FASTCALIB_FORCE_EXT="0", **NO_COMPILER).returncode == 0


def test_an_extension_left_by_an_earlier_build_is_not_shipped(source: Path) -> None:
    # setuptools packs whatever lies in build/lib*: a module of older sources would be installed beside newer ones.
    done = build_wheel(source, **NO_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = (source / "build").glob("lib*")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (library / "fastcalib" / f"_C{suffix}").write_bytes(b"stale")
    shutil.rmtree(source / "out")
    assert build_wheel(source, FASTCALIB_NO_EXT="1").returncode == 0
    (wheel,) = (source / "out").glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(suffix)]


def test_a_working_tree_gets_the_note_in_place_of_a_stale_extension(source: Path) -> None:
    # What an editable installation does: setuptools builds elsewhere and then copies into the sources.
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    stale = source / "fastcalib" / f"_C{suffix}"
    stale.write_bytes(b"stale")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=source, env=clean_environment(FASTCALIB_NO_EXT="1"), capture_output=True, check=True)
    assert not stale.exists()
    assert "FASTCALIB_NO_EXT=1" in (source / "fastcalib" / "_extension_missing.txt").read_text()


def test_cuda_kernels_asked_for_without_an_nvcc_are_an_error(source: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("nvidia") is not None:
        pytest.skip("packages of nvidia are installed, an nvcc perhaps among them")
    nowhere = {"PATH": "/nonexistent", "CUDA_HOME": "", "CUDACXX": ""}
    done = build_wheel(source, FASTCALIB_CUDA="1", FASTCALIB_FORCE_EXT="1", **nowhere)
    assert done.returncode != 0
    assert "FASTCALIB_CUDA=1, but no nvcc was found" in done.stdout + done.stderr


@pytest.mark.slow
def test_cuda_kernels_load_without_a_driver(tmp_path: Path) -> None:
    extension = pytest.importorskip("fastcalib._C")
    if not hasattr(extension, "cuda_targets"):
        pytest.skip("built without CUDA kernels (`make build-cuda` builds them)")
    targets = extension.cuda_targets().split()
    assert {"sm_80", "sm_90"} <= set(targets) and any(t.startswith("compute_") for t in targets)
    linked = subprocess.run(["ldd", extension.__file__], capture_output=True, text=True).stdout
    assert "libcuda" not in linked and "not found" not in linked, linked
    code = "from fastcalib.info import collect; print(collect()['extension']['cuda'])"
    assert run_outside(code, tmp_path).split() == targets


@pytest.mark.slow
def test_a_wheel_built_from_a_clean_copy_works(source: Path, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler on this machine")
    done = build_wheel(source, FASTCALIB_FORCE_EXT="1", FASTCALIB_CUDA="0")  # nvcc would take minutes
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
    assert "Requires-Dist: torch>=2.6\n" in metadata
    path, live, baseline = facts_of(
        tmp_path / "site",
        "facts['extension']['path'], facts['backends']['cpp']['live'], 'baseline' in facts['extension']['isas']",
    ).split()
    assert Path(path).parent == tmp_path / "site" / "fastcalib"
    assert (live, baseline) == ("True", "True")

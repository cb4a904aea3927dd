"""Build script. pyproject.toml holds the metadata; here is what it cannot say: the C++ extension and the package map.

``fastcalib._C`` is built by CMake and ninja from csrc/ and needs neither torch nor its headers. Where it cannot be
built (no compiler, no CMake) the package is installed without it and says so; environment variables:

    FASTCALIB_FORCE_EXT=1   an error instead of an installation without the extension
    FASTCALIB_NO_EXT=1      do not try to build the extension
    FASTCALIB_CUDA=0        leave the CUDA kernels out; =1: an error where they cannot be built. Unset: they are built
                            where an nvcc is found (CUDACXX, the packages of PyPI, CUDA_HOME, PATH)
    FASTCALIB_SANITIZE=1    build with AddressSanitizer and UndefinedBehaviorSanitizer
    CMAKE_ARGS              further arguments for CMake's configure step; CXX chooses the compiler
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Written beside the package's modules when the extension is missing, and read by `python -m fastcalib info`: pip hides
# what a successful build prints, so a message printed here alone would be seen by nobody.
NOTE = "_extension_missing.txt"


def switched_on(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false", "no", "off")


def find_tool(name: str, directory_attribute: str) -> str:
    """Path of cmake or ninja: the one of the Python package of that name if it is installed, else the one on PATH."""
    try:
        directory = Path(getattr(importlib.import_module(name), directory_attribute))
        if (directory / name).is_file():
            return str(directory / name)
    except (ImportError, AttributeError):
        pass
    path = shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} was not found, neither as a Python package nor on PATH")
    return path


# Machine code for these, as far as the nvcc knows them (sm_86 and sm_89 run sm_80's, sm_103 runs sm_100's), and
# portable code for whatever comes later.
CUDA_ARCHITECTURES = (80, 90, 100, 120)
CUDA_PTX = 90


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that works: its path, the folder above its bin, and those of our architectures that it compiles for."""

    path: str
    root: Path
    architectures: tuple[int, ...]

    def cmake_arguments(self) -> list[str]:
        return [
            f"-DFASTCALIB_NVCC={self.path}",
            f"-DFASTCALIB_CUDA_ROOT={self.root}",
            f"-DFASTCALIB_CUDA_ARCHITECTURES={';'.join(map(str, self.architectures))}",
            f"-DFASTCALIB_CUDA_PTX={CUDA_PTX}",
        ]


def find_nvcc() -> Nvcc | None:
    """The first nvcc that works; None where there is none, or the CUDA kernels are not wanted."""
    wanted = os.environ.get("FASTCALIB_CUDA", "auto")
    if wanted != "auto" and not switched_on("FASTCALIB_CUDA"):
        return None
    candidates = [os.environ.get("CUDACXX")]
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or ()) if nvidia else ():
        candidates += sorted(map(str, Path(folder).glob("cu*/bin/nvcc")))
    candidates += [str(Path(home, "bin", "nvcc")) for home in (os.environ.get("CUDA_HOME"),) if home]
    candidates.append(shutil.which("nvcc"))
    for path in filter(None, candidates):
        found = inspect_nvcc(path)
        if found is not None:
            return found
    if switched_on("FASTCALIB_CUDA"):
        raise RuntimeError(
            "FASTCALIB_CUDA=1, but no nvcc was found that compiles for sm_90 (`make build-cuda` gets one)"
        )
    return None


def inspect_nvcc(path: str) -> Nvcc | None:
    try:
        known = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        # Where the compiler really lies: what is on PATH may be a wrapper.
        with tempfile.NamedTemporaryFile(suffix=".cu") as source:
            dry = subprocess.run(
                [path, "--dryrun", "-c", source.name], capture_output=True, text=True, check=True
            ).stderr
    except (OSError, subprocess.CalledProcessError):
        return None
    here = re.search(r"^#\$ _HERE_=(.+)$", dry, re.M)
    architectures = tuple(number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known)
    if here is None or CUDA_PTX not in architectures:
        return None
    return Nvcc(path, Path(here[1]).resolve().parent, architectures)


class CMakeExtension(Extension):
    """An extension module whose sources and flags are in ``source_dir``/CMakeLists.txt."""

    def __init__(self, name: str, source_dir: str) -> None:
        super().__init__(name, sources=[], optional=True)  # optional: setuptools accepts that no file comes of it
        self.source_dir = ROOT / source_dir


class CMakeBuild(build_ext):
    """Builds each CMakeExtension, or installs without it and leaves a note that says why."""

    def build_extension(self, ext: CMakeExtension) -> None:
        target = Path(self.build_lib, self.get_ext_filename(ext.name)).resolve()
        note = target.with_name(NOTE)
        target.parent.mkdir(parents=True, exist_ok=True)
        # One left by an earlier build does not belong to these sources, and setuptools would ship it.
        target.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        try:
            if switched_on("FASTCALIB_NO_EXT"):
                raise RuntimeError("FASTCALIB_NO_EXT=1 was set when fastcalib was installed")
            shutil.copy2(self.build_with_or_without_cuda(ext), target)
        except (OSError, ImportError, RuntimeError, subprocess.CalledProcessError) as error:
            if switched_on("FASTCALIB_FORCE_EXT"):
                raise RuntimeError(
                    f"FASTCALIB_FORCE_EXT=1, but fastcalib._C did not build: {explain(error)}"
                ) from error
            note.write_text(explain(error) + "\n", encoding="utf-8")
            print(banner(error), file=sys.stderr, flush=True)

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the module, or the note about its absence, goes beside the sources."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            package = self.get_finalized_command("build_py").get_package_dir(ext.name.rpartition(".")[0])
            for file in (built, built.with_name(NOTE)):
                target = ROOT / package / file.name
                if not file.exists():
                    target.unlink(missing_ok=True)
                    continue
                # In one step: a process that has the old file loaded keeps it, and none sees half a file.
                fresh = target.with_name(target.name + ".new")
                shutil.copy2(file, fresh)
                os.replace(fresh, target)

    def build_with_or_without_cuda(self, ext: CMakeExtension) -> Path:
        nvcc = None if switched_on("FASTCALIB_SANITIZE") else find_nvcc()
        try:
            return self.run_cmake(ext, nvcc)
        except subprocess.CalledProcessError:
            if nvcc is None or switched_on("FASTCALIB_CUDA"):
                raise
            # A GPU toolkit that does not work must not cost the CPU kernels.
            print(f"{nvcc.path} failed: fastcalib is built without its CUDA kernels", file=sys.stderr, flush=True)
            return self.run_cmake(ext, None)

    def run_cmake(self, ext: CMakeExtension, nvcc: Nvcc | None) -> Path:
        """Configure and build; returns the path of the module in the build folder."""
        import pybind11

        sanitize = switched_on("FASTCALIB_SANITIZE")
        # A folder for each kind of build: CMake would go on with the compiler it found the first time.
        compiler = re.sub(r"\W+", "-", os.environ.get("CXX", "default"))
        tag = f"{sys.implementation.cache_tag}-{self.plat_name}-{compiler}"
        tag += "-sanitize" if sanitize else "-cuda" if nvcc else ""
        build_dir = ROOT / "build" / f"cmake-{tag}"
        output_dir = build_dir / "module"
        for stale in output_dir.glob("_C*"):
            stale.unlink()
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            *(cmake, "-S", str(ext.source_dir), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if sanitize else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTCALIB_OUTPUT_DIR={output_dir}",
            f"-DFASTCALIB_SANITIZE={'ON' if sanitize else 'OFF'}",
            *(nvcc.cmake_arguments() if nvcc else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir)], check=True)
        modules = sorted(output_dir.glob("_C*"))
        if len(modules) != 1:
            raise RuntimeError(f"expected one module in {output_dir}, found {[path.name for path in modules]}")
        return modules[0]

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


def explain(error: Exception) -> str:
    """One line for people: which step failed, and where to look."""
    if isinstance(error, subprocess.CalledProcessError):
        step = "compiling" if "--build" in error.cmd else "CMake's configure step (is a C++20 compiler installed?)"
        return f"{step} failed when fastcalib was installed; `pip install -v` shows its output"
    return str(error)


def banner(error: Exception) -> str:
    line = "*" * 100
    return f"""
{line}
fastcalib is being installed WITHOUT its C++ extension.
    why: {explain(error)}
    now: every op runs on the "eager" backend (plain PyTorch): same results, several times slower, more memory
    fix: install a C++20 compiler (g++ >= 11 or clang++ >= 14), then
         pip install --force-reinstall --no-deps --no-cache-dir fastcalib   (or the folder you installed from)
FASTCALIB_FORCE_EXT=1 makes this an error. `python -m fastcalib info` shows which backends are live.
{line}
"""


setup(
    packages=[*find_packages(include=["fastcalib", "fastcalib.*"]), "fastcalib.triton_kernels"],
    # The folder must never be importable under its own name: another project's package is called triton_kernels.
    package_dir={"fastcalib.triton_kernels": "triton_kernels"},
    ext_modules=[CMakeExtension("fastcalib._C", "csrc")],
    cmdclass={"build_ext": CMakeBuild},
)

"""A Triton driver whose launches compile for sm_NN as usual and then run the PTX here.

    with emulator.triton(sm=90) as run:
        kernel[grid](cpu_tensor, ...)
    run.launches[-1].counters

Triton specialises on what it is given: pointers divisible by 16, integers equal to 1 or divisible by 16. CPU tensors
of torch are aligned to 64 bytes as CUDA's are to 256, so a launch here compiles what a launch there would. Compiled
kernels are cached by Triton for each device number: the architecture serves as that number, so that sm_80 and sm_90
never meet. ptxas runs as part of the compilation; what it makes of the PTX is not executed. Nothing of this has been
compared with a real GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton as triton_language
from triton.backends.compiler import GPUTarget

from .loader import Launch, LoadedModule, load
from .machine import Options
from .uninitialised import Uninitialised


class Run:
    """What happens inside one ``with emulator.triton(...)``."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.launches: list[Launch] = []
        self.uninitialised = Uninitialised()

    @property
    def reports(self) -> list[str]:
        return [report for launch in self.launches for report in launch.reports]


class _Launcher:
    """Triton makes one for each compiled kernel, and calls it for each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.metadata = metadata
        self.names = list(source.signature)
        self.types = list(source.signature.values())

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: Any,
        function: Any,
        packed: Any,
        described: Any,
        enter: Any,
        leave: Any,
        *args: Any,
    ) -> None:
        run = _Driver.current
        if x * y * z <= 0:
            return
        if getattr(self.metadata, "num_ctas", 1) > 1:
            raise NotImplementedError("clusters (num_ctas > 1) are not emulated")
        module, kernel = function
        names, values = [], []
        for name, ptx_type, value in zip(self.names, self.types, args):
            for path, leaf_type, leaf in _leaves(name, ptx_type, value):
                if leaf_type == "constexpr":
                    continue
                names.append(path)
                values.append(leaf if leaf is None or isinstance(leaf, torch.Tensor) else _number(leaf, leaf_type))
        launch = module.launch(
            kernel,
            (x, y, z),
            (self.metadata.num_warps * 32, 1, 1),
            values,
            names=names,
            dynamic_shared=self.metadata.shared,
            options=run.options,
            uninitialised=run.uninitialised,
        )
        run.launches.append(launch)


def _leaves(name: str, ptx_type: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """Tuples of arguments are passed one by one."""
    if isinstance(ptx_type, (tuple, list)):
        for position, (part_type, part) in enumerate(zip(ptx_type, value)):
            yield from _leaves(f"{name}[{position}]", part_type, part)
    else:
        yield name, ptx_type, value


def _number(value: Any, ptx_type: str) -> int | float:
    if ptx_type.startswith("*") and hasattr(value, "data_ptr"):
        raise TypeError(f"a pointer argument must be a tensor here, got {type(value).__name__}")
    return float(value) if ptx_type.startswith(("fp", "bf")) else int(value)


class _Utilities:
    """The part of a driver that loads binaries and knows the device. The figures are an H100's."""

    pending = ""  # the PTX of the kernel that Triton is about to load

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        module: LoadedModule = load(self.pending)
        return module, (module, name), 32, 0, 1024

    def unload_module(self, module: Any) -> None:
        return None

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = {80: 166912, 86: 101376, 89: 101376, 120: 101376}.get(device, 232448)
        return {
            "max_shared_mem": shared,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1_755_000,
            "mem_clock_rate": 2_619_000,
            "mem_bus_width": 5120,
        }


class _Driver:
    current: Run

    def __init__(self, sm: int) -> None:
        self.target = GPUTarget("cuda", sm, 32)
        self.utils = _Utilities()
        self.launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def set_current_device(self, device: int) -> None:
        return None

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """An autotuner's configurations all run once and all take the same time: the first one wins."""

        def benchmark(call: Callable[[], Any], quantiles: Any = None, **_: Any) -> list[float]:
            call()
            return [1.0] * len(quantiles or (1,))

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.zeros(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        return None

    def map_python_to_cpp_type(self, name: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(name)

    def remember(self, module: Any, function: Any, name: str, files: dict[str, str], digest: str) -> None:
        """Called by Triton just before it loads a kernel: the PTX lies beside the binary."""
        self.utils.pending = Path(files[f"{name}.ptx"]).read_text()


def _without_ptxas(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook into its pipeline: called bare for a cache key, and with the stages to change them."""
    if stages is None:
        return "without ptxas", "without ptxas"
    stages["cubin"] = lambda source, metadata: b""
    return None


@contextlib.contextmanager
def triton(sm: int = 90, *, ptxas: bool = True, **options: Any) -> Iterator[Run]:
    """Run Triton kernels here, compiled for sm_NN, until the block ends. Options: `machine.Options`.

    ``ptxas=False`` leaves out the last stage, whose product is not used and which takes half of the time to compile;
    such kernels have a cache of their own.
    """
    config, knobs = triton_language.runtime.driver, triton_language.knobs.runtime
    hooks, previous_stages = knobs.kernel_load_start_hook, knobs.add_stages_inspection_hook
    previous, previous_run = config._active, getattr(_Driver, "current", None)  # .active would create a driver
    driver = _Driver(sm)
    run = Run(Options(**options))
    hooks.add(driver.remember)
    if not ptxas:
        knobs.add_stages_inspection_hook = _without_ptxas
    config.set_active(driver)
    _Driver.current = run
    try:
        with run.uninitialised.watching():
            yield run
    finally:
        hooks.remove(driver.remember)
        knobs.add_stages_inspection_hook = previous_stages
        config.set_active(previous)
        if previous_run is not None:
            _Driver.current = previous_run

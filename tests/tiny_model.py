"""A tiny random Llama with a byte-level tokenizer, saved as people save models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

EOS, VOCAB, PADDED = 256, 257, 264


def save_tiny_model(folder: Path) -> Path:
    """Model, tokenizer and chat template in ``folder``; the logits have seven columns of padding."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert tokenizer.eos_token_id == EOS and len(tokenizer) == VOCAB
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=PADDED, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.5, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_options(folder: Path, out: Path, **more: Any) -> Any:
    """DiagnoseOptions for the model in ``folder``, small as it is."""
    from fastcalib.runner.options import DiagnoseOptions

    return DiagnoseOptions(out=out, model=str(folder), batch=3, top=10, fit_ranks=50, **more)

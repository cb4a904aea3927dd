"""The trainers of transformers and TRL, run for real: the same training as with the loss written out in PyTorch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcalib import losses

transformers = pytest.importorskip("transformers")
from fastcalib.integrations.transformers import (  # noqa: E402
    CausalLMLoss,
    LinearLossMixin,
    sequence_positions,
    shift_labels,
)

V, LENGTH = 307, 12
LAMBDA_PR = losses.LambdaPRLoss(lam=0.6, gamma=1e-3)


def tiny(kind: str = "Llama", **more: Any) -> Any:
    """A causal model of two small layers with random weights."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # flat logits would hide a loss that looks at them
        model.get_output_embeddings().weight.mul_(8)
    return model


def examples(n: int = 16) -> list[dict[str, Any]]:
    """Sequences whose first tokens are a prompt: not learnt. Numbers of learnt tokens differ between them."""
    g = torch.Generator().manual_seed(3)
    made = []
    for i in range(n):
        ids = torch.randint(3, V, (LENGTH,), generator=g)
        labels = ids.clone()
        labels[: 2 + i % 5] = -100
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": [1] * LENGTH})
    return made


def written_out(logits: Tensor, labels: Tensor, items: int | Tensor) -> Tensor:
    """lambda-PR of Verine et al. as one would write it in PyTorch, sequence by sequence."""
    lam, gamma = 0.6, 1e-3
    total = logits.new_zeros(())
    for row, label in zip(logits[:, :-1], labels[:, 1:]):
        kept = label != -100
        nll = F.cross_entropy(row[kept].float(), label[kept], reduction="none")
        p, length = (-nll.detach()).exp(), int(kept.sum())
        near = lam ** (1 / length)
        delta = gamma * near / (1 - (1 - gamma) * near)
        decay = lam ** (torch.arange(length) / max(length - 1, 1))
        total = total + (decay * (p <= delta) * p / (gamma + (1 - gamma) * p) * nll).sum()
    return total / items


def eager(outputs: Any, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    assert num_items_in_batch is not None
    return written_out(outputs["logits"], labels, num_items_in_batch)


def train(
    model: Any, folder: Path, trainer: Callable[..., Any] | None = None, **options: Any
) -> tuple[list[float], Any]:
    """Three steps of two accumulated batches each; the losses that were logged, and the model."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, seed=5, disable_tqdm=True,
        dataloader_pin_memory=False, lr_scheduler_type="constant", optim="sgd",
    )  # fmt: skip
    made = (trainer or transformers.Trainer)(
        model=model,
        args=arguments,
        train_dataset=examples(),
        data_collator=transformers.default_data_collator,
        **options,
    )
    made.train()
    return [x["loss"] for x in made.state.log_history if "loss" in x], model


class Linear(LinearLossMixin, transformers.Trainer):
    loss_fn = LAMBDA_PR


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor]]:
    curve, model = train(tiny(), tmp_path_factory.mktemp("eager"), compute_loss_func=eager)
    assert len(curve) == 3 and len({round(x, 6) for x in curve}) == 3
    return curve, {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_training(got: tuple[list[float], Any], want: tuple[list[float], dict[str, Tensor]]) -> None:
    # Two float32 computations of the same three SGD steps: they part by rounding alone.
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(want[0]), rtol=2e-5, atol=1e-6)
    for name, value in got[1].state_dict().items():
        torch.testing.assert_close(value, want[1][name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("inplace", [False, True])
def test_compute_loss_func_of_trainer(tmp_path, reference, inplace):
    got = train(tiny(), tmp_path, compute_loss_func=CausalLMLoss(LAMBDA_PR, inplace_backward=inplace))
    assert_same_training(got, reference)


def test_linear_loss_in_trainer(tmp_path, reference):
    assert_same_training(train(tiny(), tmp_path, Linear), reference)


def test_linear_loss_in_trl(tmp_path, reference):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class SFT(LinearLossMixin, trl.SFTTrainer):
        loss_fn = LAMBDA_PR

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, seed=5, disable_tqdm=True,
        dataloader_pin_memory=False, lr_scheduler_type="constant", optim="sgd", bf16=False,
        gradient_checkpointing=False, remove_unused_columns=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    model = tiny()
    trainer = SFT(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(examples()),
        data_collator=transformers.default_data_collator, processing_class=_tokenizer(),
    )  # fmt: skip
    trainer.train()
    curve = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert_same_training((curve, model), reference)


def _tokenizer() -> Any:
    """TRL wants one, though the data are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    "kind, more",
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": 5.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
)
def test_the_logits_of_each_kind_of_model(kind, more):
    """Loss and gradients from hidden states equal those from the logits that the model returns."""
    model = tiny(kind, **more)
    twin = copy.deepcopy(model)
    batch = transformers.default_data_collator(examples(3))
    loss = _Bare(LAMBDA_PR).compute_loss(model, dict(batch), num_items_in_batch=20)
    loss.backward()
    labels = batch.pop("labels")
    want = written_out(twin(**batch).logits, labels, 20)
    want.backward()
    torch.testing.assert_close(loss, want, rtol=2e-5, atol=1e-6)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


class _Bare(LinearLossMixin):
    """The mixin without a trainer behind it: what it asks of one."""

    class accelerator:
        num_processes = 1

        @staticmethod
        def unwrap_model(model: Any) -> Any:
            return model

    class args:
        average_tokens_across_devices = True

    def __init__(self, loss_fn: Any) -> None:
        self.loss_fn = loss_fn


def test_no_logits_are_made_and_outputs_are_there_when_asked_for():
    model = tiny()
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    batch = transformers.default_data_collator(examples(3))
    bare = _Bare(losses.NLLLoss())
    loss = bare.compute_loss(model, dict(batch))
    assert shapes == [(3, 1, V)] and bare.loss_is_scaled_for_ga is False
    again, outputs = bare.compute_loss(model, dict(batch), return_outputs=True, num_items_in_batch=7)
    assert outputs.logits.shape == (3, LENGTH, V) and not outputs.logits.requires_grad
    assert bare.loss_is_scaled_for_ga is True
    kept = int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(again * 7, loss * kept)
    torch.testing.assert_close(loss, model(**batch).loss)


def test_packed_sequences_are_told_apart():
    """Positions start again within a row: lambda-PR must see two short sequences, not a long one."""
    target = torch.tensor([[-100, 4, 5, 6, -100, 7, 8, -100]])
    position, length = sequence_positions(target, sequence=torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]]))
    assert position[target != -100].tolist() == [0, 1, 2, 0, 1] and length[target != -100].tolist() == [3, 3, 3, 2, 2]
    batch = transformers.default_data_collator(examples(2))
    batch["labels"][:, 0] = -100  # as collators that pack do: no token predicts the first of the next sequence
    counts = (batch["labels"] != -100).sum(-1).tolist()
    assert counts[0] != counts[1]
    packed = {k: batch[k].reshape(1, -1) for k in ("input_ids", "labels")}
    packed["position_ids"] = torch.arange(LENGTH).repeat(2)[None]
    seen: list[Tensor] = []
    loss_fn = losses.LambdaPRLoss(lam=0.6, gamma=1e-3)
    loss_fn.formula = _spy(loss_fn.formula, seen)
    _Bare(loss_fn).compute_loss(tiny(), packed)
    assert torch.cat(seen).tolist() == [n for n in counts for _ in range(n)]


def _spy(formula: Any, seen: list[Tensor]) -> Any:
    from dataclasses import replace

    def per_token(stats: Any, target: Tensor, **arguments: Any) -> Tensor:
        seen.append(arguments["length"])
        return formula.per_token(stats, target, **arguments)

    return replace(formula, per_token=per_token)


def test_mistakes_are_explained():
    batch = transformers.default_data_collator(examples(2))
    loss = CausalLMLoss()
    with pytest.raises(TypeError, match="no logits"):
        loss({"hidden": 1}, batch["labels"])
    with pytest.raises(TypeError, match='no "labels"'):
        loss({"logits": torch.zeros(2, LENGTH, V)}, None)
    with pytest.raises(TypeError, match='no "labels"'):
        _Bare(losses.NLLLoss()).compute_loss(tiny(), {"input_ids": batch["input_ids"]})
    model = tiny()
    model.get_output_embeddings = lambda: None
    with pytest.raises(TypeError, match=r"get_output_embeddings\(\) gives NoneType"):
        _Bare(losses.NLLLoss()).compute_loss(model, dict(batch))
    model.get_output_embeddings = lambda: torch.nn.Linear(32, V)
    with pytest.raises(RuntimeError, match="ran 0 times"):
        _Bare(losses.NLLLoss()).compute_loss(model, dict(batch))


def test_labels_are_shifted_like_the_models_own():
    labels = torch.tensor([[1, 2, 3], [4, -100, 6]])
    assert shift_labels(labels).tolist() == [[2, 3, -100], [-100, 6, -100]]
    model, batch = tiny(), transformers.default_data_collator(examples(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = CausalLMLoss()(model(input_ids=batch["input_ids"]), batch["labels"])
    torch.testing.assert_close(got, model(**batch).loss)


@pytest.mark.slow
def test_smollm2_learns_with_lambda_pr_through_the_fused_path(tmp_path):
    """A real model, real text, two steps: the losses of the path without logits equal those of PyTorch's own."""
    pytest.importorskip("gguf")
    from fastcalib.errors import UserError
    from fastcalib.runner import model as demo_model

    try:
        source = demo_model.locate(None)
    except UserError as error:
        pytest.skip(str(error).splitlines()[0])
    where = {"gguf_file": source.gguf_file, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **where)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, **where)
    model.is_quantized = False  # the file is; these weights are float32, but Trainer would not train them
    texts = ["The capital of France is Paris, a city on the river Seine.", "Seven states begin with the letter M."] * 2
    data = []
    for text in texts:
        ids = tokenizer(text, max_length=16, truncation=True, padding="max_length", padding_side="right")
        labels = [t if m else -100 for t, m in zip(ids["input_ids"], ids["attention_mask"])]
        data.append({**ids, "labels": [-100, -100, *labels[2:]]})

    def run(cls: Any, **options: Any) -> list[float]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, seed=1, disable_tqdm=True, optim="sgd",
            dataloader_pin_memory=False, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = cls(
            model=copy.deepcopy(model), args=arguments, train_dataset=data, processing_class=tokenizer,
            data_collator=transformers.default_data_collator, **options,
        )  # fmt: skip
        trainer.train()
        return [x["loss"] for x in trainer.state.log_history if "loss" in x]

    got, want = run(Linear), run(transformers.Trainer, compute_loss_func=eager)
    assert len(got) == 2 and want[0] != want[1]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-5)

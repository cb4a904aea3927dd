"""The walk over the prefixes of a trie: every one once, a token each, the same logits as full reads."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from fastcalib import AnswerTrie
from fastcalib.runner.model import LanguageModel, load, locate
from fastcalib.runner.prefixes import PrefixLogits, plan, sample

from .tiny_model import PADDED, save_tiny_model

ANSWERS = ["ab", "abcd", "abce", "ba", "bab", "c", "dddd", "ddde", "ddee"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return load(locate(save_tiny_model(tmp_path_factory.mktemp("tiny"))))


def trie_of(model: LanguageModel) -> AnswerTrie:
    return AnswerTrie.from_texts(model.tokenizer, ANSWERS, prompt="Name:", end_token="eos")


def full(model: LanguageModel, trie: AnswerTrie, node: int) -> torch.Tensor:
    ids = torch.tensor([trie.prompt.tolist() + trie.prefix(node)])
    return model.forward(ids)[0, -1]


class Counting:
    """The network, and how many tokens it was given."""

    def __init__(self, network: object) -> None:
        self.network, self.tokens, self.forwards, self.device = network, 0, 0, network.device

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        raise NotImplementedError  # only its signature is looked at

    def __call__(self, input_ids, **how):
        self.tokens += input_ids.numel()
        self.forwards += 1
        return self.network(input_ids=input_ids, **how)


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_the_plan_has_every_prefix_once_after_its_parent(model, batch):
    trie = trie_of(model)
    chunks = plan(trie, batch)
    nodes = torch.cat([chunk.nodes for chunk in chunks])
    assert nodes.sort().values.tolist() == trie.inner().tolist()
    for number, chunk in enumerate(chunks):
        assert chunk.number == number and chunk.nodes.numel() <= batch and chunk.wanted.all()
        assert trie.depth[chunk.nodes].unique().numel() == 1
        if number:
            assert chunk.parent < number and chunks[chunk.parent].extended
            assert trie.parent[chunk.nodes].tolist() == chunks[chunk.parent].nodes[chunk.rows].tolist()
    assert not chunks[-1].extended


def test_a_plan_for_some_prefixes_has_what_leads_to_them_and_no_more(model):
    trie = trie_of(model)
    deep = trie.find(model.tokenizer("ddd", add_special_tokens=False)["input_ids"])
    chunks = plan(trie, 8, torch.tensor([deep]))
    assert [chunk.nodes.numel() for chunk in chunks] == [1, 1, 1, 1]
    assert [chunk.wanted.tolist() for chunk in chunks] == [[False], [False], [False], [True]]
    assert chunks[-1].nodes.tolist() == [deep]


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_logits_by_the_cache_are_those_of_full_reads_and_cost_a_token_each(model, batch):
    trie = trie_of(model)
    network = Counting(model.network)
    chunks = plan(trie, batch)
    logits = PrefixLogits(dataclasses.replace(model, network=network), trie, chunks)
    for chunk in chunks:
        z = logits(chunk)
        assert z.shape == (chunk.nodes.numel(), PADDED)
        for row, node in enumerate(chunk.nodes.tolist()):
            # float32 sums in another order, two layers
            torch.testing.assert_close(z[row], full(model, trie, node), rtol=1e-5, atol=1e-5)
    assert logits.without_cache is None
    prompt = trie.prompt.numel()
    assert network.tokens == prompt + trie.inner().numel() - 1 + prompt + 1  # and one prefix read whole, as a check


def test_any_chunk_can_come_first(model):
    """As after an interruption: the way to it is read again, once."""
    trie = trie_of(model)
    chunks = plan(trie, 2)
    for start in range(len(chunks)):
        logits = PrefixLogits(model, trie, chunks)
        for chunk in chunks[start:]:
            z = logits(chunk)
            torch.testing.assert_close(z[-1], full(model, trie, int(chunk.nodes[-1])), rtol=1e-5, atol=1e-5)
        assert logits.without_cache is None


class NoCache(Counting):
    def __call__(self, input_ids, **how):
        return SimpleNamespace(logits=super().__call__(input_ids, **how).logits, past_key_values=None)


class LegacyCache(Counting):
    def __call__(self, input_ids, **how):
        return SimpleNamespace(logits=super().__call__(input_ids, **how).logits, past_key_values=((1, 2),))


class Ignores(Counting):
    """Takes a cache and does not read it."""

    def __call__(self, input_ids, past_key_values=None, **how):
        return super().__call__(input_ids, **how)


class Refuses(Counting):
    def __call__(self, input_ids, past_key_values=None, **how):
        if past_key_values is not None:
            raise ValueError("one at a time")
        return super().__call__(input_ids, **how)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (NoCache, "it keeps none"),
        (LegacyCache, "its cache is a tuple"),
        (Ignores, "its cache gives other logits than a full read does, off by"),
        (Refuses, r"its cache cannot be extended \(ValueError: one at a time\)"),
        (None, "the model is a function without one"),
    ],
)
def test_without_a_usable_cache_prefixes_are_read_whole_and_the_reason_is_told(model, kind, reason):
    trie = trie_of(model)
    chunks = plan(trie, 3)
    logits = PrefixLogits(dataclasses.replace(model, network=kind and kind(model.network)), trie, chunks)
    for chunk in chunks:
        z = logits(chunk)
        for row, node in enumerate(chunk.nodes.tolist()):
            torch.testing.assert_close(z[row], full(model, trie, node), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(logits.without_cache)


def test_a_sample_is_even_over_the_depths_and_has_the_root():
    ids = [[a, b, c] for a in range(10) for b in range(10) for c in range(3)]
    trie = AnswerTrie.from_token_ids(ids)
    assert trie.inner().numel() == 111 and sample(trie, 111, 0) is None and sample(trie, None, 0) is None
    some = sample(trie, 23, 5)
    assert some.unique().numel() == 23 and some[0] == 0 and torch.isin(some, trie.inner()).all()
    assert torch.equal(some, sample(trie, 23, 5)) and not torch.equal(some, sample(trie, 23, 6))
    by_depth = torch.bincount(trie.depth[some]).tolist()
    assert by_depth[0] == 1 and by_depth[1] in (1, 2, 3) and sum(by_depth) == 23  # of 10 and 100: a fifth of each
    assert sample(trie, 1, 0).tolist() == [0]


SMALL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.5, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "config, more, reason",
    [
        ("MistralConfig", {"sliding_window": 4}, None),
        ("Gemma3TextConfig", {"sliding_window": 4, "head_dim": 16,
                              "layer_types": ["sliding_attention", "full_attention"]}, None),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, None),
        ("MambaConfig", {"state_size": 8}, "it keeps none"),
    ],
)  # fmt: skip
def test_caches_of_other_kinds(config, more, reason):
    """Windows that slide out of the prompt, states of convolutions; and a model whose states are not handed out."""
    import transformers

    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {config}")
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SMALL, **more)).eval()
    ids = [[a, b, c, d] for a in range(3) for b in range(3, 6) for c in range(6, 8) for d in range(2)]
    trie = dataclasses.replace(AnswerTrie.from_token_ids(ids), prompt=torch.arange(9, 16))
    chunks = plan(trie, 4)
    logits = PrefixLogits(LanguageModel(lambda ids: ids, None, 32, network), trie, chunks)
    for chunk in chunks:
        z = logits(chunk)
        with torch.inference_mode():
            whole = torch.tensor([trie.prompt.tolist() + trie.prefix(node) for node in chunk.nodes.tolist()])
            torch.testing.assert_close(z, network(input_ids=whole).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert logits.without_cache == reason

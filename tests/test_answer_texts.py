"""Tries from texts: the demo's conventions, and all tokenisations against an enumeration of token sequences."""

from __future__ import annotations

import itertools

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastcalib.answer_trie import AnswerTrie
from fastcalib.demo.valid import Task, encode


def byte_level():
    """Bytes, a few merges; a digit comes after a lone space, as in SmolLM2's tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "T"), ("ĠT", "e"), ("e", "x"), ("ĠTe", "x"), ("a", "s"), ("n", "n"), ("Ġ", "a"), ("Ã", "©")]
    words = ["<eos>", "<bos>", *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")


def sentencepiece():
    """Llama's kind: a space is ▁, one is put before the text, and bytes that have no token are <0x..>."""
    pieces = ["▁", "a", "b", "▁a", "ab", "▁ab", "bb"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("b", "b")]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


STATES = ["Texas", "Tennessee", "Te", "Alaska"]


def spelled(trie, tokenizer):
    """The sequences of the trie by the answer that they spell, and what they decode to."""
    found = {}
    for leaf in trie.leaves().tolist():
        found.setdefault(int(trie.answer[leaf]), []).append(tuple(trie.prefix(leaf)))
    return {answer: sorted(ids) for answer, ids in sorted(found.items())}


@pytest.mark.parametrize("texts", [tuple(STATES), tuple("0123456789"), ("10", "11")])
def test_the_prompt_and_first_tokens_of_the_demo(texts):
    tokenizer = byte_level()
    prompt, answers = encode(tokenizer, Task("", "Name one.", texts), "plain")
    trie = AnswerTrie.from_texts(tokenizer, texts, prompt="Name one. Answer: ")
    assert trie.prompt.tolist() == prompt and trie.prompt.dtype == torch.int64
    assert dict(zip(trie.valid_sets([0]).values.tolist(), trie.child_counts([0]).tolist())) == answers
    whole = [tokenizer.decode([*prompt, *trie.prefix(leaf)]) for leaf in trie.leaves().tolist()]
    assert sorted(whole) == sorted(f"Name one. Answer: {text}<eos>" for text in texts)
    order = trie.answer[trie.leaves()].tolist()
    assert [f"Name one. Answer: {texts[i]}<eos>" for i in order] == whole


def test_where_the_trie_begins():
    tokenizer = byte_level()
    ids = tokenizer.get_vocab()
    question = tokenizer("Answer:")["input_ids"]
    prompt = AnswerTrie.from_texts(tokenizer, ["3", "4"], prompt="Answer: ")
    assert prompt.prompt.tolist() == [*question, ids["Ġ"]]
    assert prompt.valid_sets([0]).to_lists() == [[ids["3"], ids["4"]]]
    answer = AnswerTrie.from_texts(tokenizer, ["3", "4"], prompt="Answer:", shared="answer")
    assert answer.prompt.tolist() == question and answer.max_depth == 2
    # "Answer: " ends in a token of its own, a space, and that of " Texas" is another: the prompt ends before it.
    states = AnswerTrie.from_texts(tokenizer, ["Texas", "Te"], prompt="Answer: ", shared="answer")
    assert states.prompt.tolist() == question and len(states.valid_sets([0]).values) == 2
    lone = AnswerTrie.from_texts(tokenizer, ["Texas"], prompt="Answer: ")
    assert lone.prompt.tolist() == question and lone.max_depth == 3  # " Tex", "as", the end
    # "Te" is all that "Texas" and "Te" share of one spelling: with an end token the trie may begin after it.
    inside = AnswerTrie.from_texts(tokenizer, ["aa", "aaa"], prompt="b")
    assert inside.prompt.tolist() == tokenizer("baa")["input_ids"]
    assert inside.valid_sets([0]).to_lists() == [[tokenizer.eos_token_id, ids["a"]]]
    # Without one, an answer keeps a token at least.
    without = AnswerTrie.from_texts(tokenizer, ["ab", "ac"], prompt="b", end_token=None)
    assert without.prompt.tolist() == tokenizer("ba")["input_ids"]


def test_end_tokens():
    tokenizer = byte_level()
    eos = AnswerTrie.from_texts(tokenizer, STATES, prompt="A: ")
    assert set(eos.token[eos.leaves()].tolist()) == {tokenizer.eos_token_id}
    own = AnswerTrie.from_texts(tokenizer, STATES, prompt="A: ", end_token=1)
    assert set(own.token[own.leaves()].tolist()) == {1}
    line = AnswerTrie.from_texts(tokenizer, [s + "\n" for s in STATES], prompt="A: ", end_token=None)
    assert set(line.token[line.leaves()].tolist()) == set(tokenizer("\n")["input_ids"])
    with pytest.raises(ValueError, match=r"text 1, 'Tex',.* the beginning of text 0, 'Texas',.*Give an end_token"):
        AnswerTrie.from_texts(tokenizer, ["Texas", "Tex", "Alaska"], prompt="A: ", end_token=None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token_id; give the id"):
        AnswerTrie.from_texts(tokenizer, STATES)


def test_special_tokens_before_the_prompt():
    tokenizer = byte_level()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 1)])
    assert AnswerTrie.from_texts(tokenizer, STATES, prompt="A: ").prompt[0] == 1
    plain = AnswerTrie.from_texts(tokenizer, STATES, prompt="A: ", add_special_tokens=False)
    assert plain.prompt.tolist() == tokenizer("A:", add_special_tokens=False)["input_ids"]


def test_many_texts_are_tokenised_in_chunks(monkeypatch):
    monkeypatch.setattr("fastcalib._answer_texts._CHUNK", 3)
    tokenizer = byte_level()
    texts = [str(n) for n in range(100, 110)]
    trie = AnswerTrie.from_texts(tokenizer, texts, prompt="A: ")
    assert tokenizer.decode(trie.prompt) == "A: 10"
    assert [tokenizer.decode(trie.prefix(leaf)) for leaf in trie.leaves().tolist()] == [f"{n}<eos>" for n in range(10)]


def by_enumeration(tokenizer, prompt, text, tokens, longest):
    """Every sequence of the tokens, up to a length, that decodes to the text after the prompt."""
    want = tokenizer.decode(prompt) + text
    return sorted(
        ids
        for n in range(1, longest + 1)
        for ids in itertools.product(tokens, repeat=n)
        if tokenizer.decode([*prompt, *ids]) == want
    )


@pytest.mark.parametrize(
    "make, texts, prompt, words",
    [
        (
            byte_level,
            ["Tex", "asx", "Te"],
            "A: ",
            ["Ġ", "T", "e", "x", "ĠT", "ĠTe", "ex", "ĠTex", "a", "s", "as", "Ġa"],
        ),
        (byte_level, ["é", "Te"], "A: ", ["Ġ", "T", "e", "ĠT", "ĠTe", "Ã", "©", "Ã©"]),
        (sentencepiece, ["abb", "ba", "b"], "A: ", ["▁", "a", "b", "▁a", "ab", "▁ab", "bb"]),
        (sentencepiece, ["aé", "\n"], "A: ", ["▁", "a", "▁a", "<0xC3>", "<0xA9>", "<0x0A>", "<0x61>"]),
    ],
)
def test_all_tokenisations(make, texts, prompt, words):
    tokenizer = make()
    vocabulary = tokenizer.get_vocab()
    trie = AnswerTrie.from_texts(
        tokenizer, texts, prompt=prompt, tokenisations="all", weights=[2.0, 3.0, 5.0][: len(texts)]
    )
    if make is sentencepiece:  # letters have byte tokens too, which the enumeration must know
        words = [*words, *(f"<0x{b:02X}>" for b in "".join([" ", *texts]).encode())]
    tokens = sorted({vocabulary[w] for w in words})
    found = spelled(trie, tokenizer)
    before = trie.prompt.tolist()
    assert sorted(found) == list(range(len(texts))) and trie.n_answers == len(texts)
    for answer, text in enumerate(texts):
        sequences = found[answer]
        assert all(ids[-1] == tokenizer.eos_token_id for ids in sequences)
        rest = (prompt + text).removeprefix(tokenizer.decode(before, skip_special_tokens=True))
        want = by_enumeration(tokenizer, before, rest, tokens, len(rest.encode()))
        assert [ids[:-1] for ids in sequences] == want and len(want) > 1
    assert float(trie.weight[0]) == pytest.approx(sum([2.0, 3.0, 5.0][: len(texts)]))
    leaves = trie.leaves()
    each = torch.zeros(len(texts), dtype=torch.float64).index_add(0, trie.answer[leaves], trie.weight[leaves])
    assert torch.allclose(each, torch.tensor([2.0, 3.0, 5.0][: len(texts)], dtype=torch.float64))
    canonical = spelled(AnswerTrie.from_texts(tokenizer, texts, prompt=prompt), tokenizer)
    assert all(canonical[a][0] in found[a] for a in found)


def test_ordinary_added_tokens_spell_themselves_and_special_ones_nothing():
    tokenizer = byte_level()
    tokenizer.add_tokens(["Tex"])
    tokenizer.add_tokens([AddedToken("ex", special=True, single_word=True)], special_tokens=True)
    added, special = tokenizer.get_vocab()["Tex"], tokenizer.get_vocab()["ex"]
    trie = AnswerTrie.from_texts(tokenizer, ["Tex", "e"], prompt="A: ", tokenisations="all")
    used = set(trie.token.tolist())
    assert added in used and special not in used
    with pytest.raises(ValueError, match="no spelling of its own"):
        AnswerTrie.from_texts(tokenizer, ["<bos>", "Te"], prompt="A: ", tokenisations="all")


def test_too_many_and_unknown_tokenisations():
    tokenizer = byte_level()
    # " Tex" in 6 ways and "as" in 2; " Te" in 3 and "ss" in 1
    words = r"finds 15 sequences, 12 of them for text 0 alone, more than max_sequences=14"
    with pytest.raises(ValueError, match=words):
        AnswerTrie.from_texts(tokenizer, ["Texas", "Tess"], prompt="A: ", tokenisations="all", max_sequences=14)
    most = AnswerTrie.from_texts(tokenizer, ["Texas", "Tess"], prompt="A: ", tokenisations="all", max_sequences=15)
    assert most.count[0] == 15
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"this one decodes by \['WordPiece'\]"):
        AnswerTrie.from_texts(tokenizer, STATES, prompt="A: ", tokenisations="all")


@pytest.mark.parametrize(
    "texts, options, error, words",
    [
        ("Texas", {}, TypeError, "texts must be a list of strings, got 'Texas'"),
        (["Texas", 3], {}, TypeError, "text 1 must be a string, got 3"),
        (["Texas"], {"prompt": None}, TypeError, "prompt must be a string, got None"),
        ([], {}, ValueError, "there are no texts"),
        (["Te", ""], {"prompt": "A: ", "end_token": None}, ValueError, "text 1 is empty.*end_token"),
        (["Texas"], {"tokenisations": "every"}, ValueError, 'tokenisations must be "canonical" or "all"'),
        (["Texas"], {"shared": "both"}, ValueError, 'shared must be "prompt" or "answer"'),
        (["Texas", "Te", "Texas"], {"prompt": "A: "}, ValueError, "text 0, 'Texas', has the tokens of text 2,"),
    ],
)
def test_what_are_no_texts(texts, options, error, words):
    with pytest.raises(error, match=words):
        AnswerTrie.from_texts(byte_level(), texts, **options)


def test_texts_that_stand_twice_are_merged_on_demand():
    tokenizer = byte_level()
    whole = AnswerTrie.from_texts(tokenizer, ["a", "a"], prompt="b", end_token=None, duplicates="merge")
    assert whole.prompt.tolist() == tokenizer("b")["input_ids"] and len(whole) == 2
    for tokenisations in ("canonical", "all"):
        trie = AnswerTrie.from_texts(
            tokenizer,
            ["Te", "as", "Te"],
            prompt="A: ",
            duplicates="merge",
            weights=[1, 2, 4],
            tokenisations=tokenisations,
        )
        assert sorted(set(trie.answer.tolist())) == [-1, 0, 1] and float(trie.weight[0]) == pytest.approx(7)

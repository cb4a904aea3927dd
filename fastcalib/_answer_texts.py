"""Answers as text to token sequences: canonical tokenisations, or all segmentations that spell the same text."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._ragged import Ints, offsets_of, ragged

_CHUNK = 4096  # texts a call: a fast tokenizer keeps several kilobytes of each until it returns


@dataclass
class TokenisedTexts:
    """What the model reads, and what may come after it."""

    prompt: Ints
    values: Ints
    offsets: Ints
    text: Ints  # of each sequence, the number of its text


def check_texts(texts: Iterable[str], prompt: str, tokenisations: str, shared: str) -> list[str]:
    """The texts as a list.

    Raises:
        TypeError, ValueError: arguments that :meth:`AnswerTrie.from_texts` cannot use.
    """
    for name, value, known in (
        ("tokenisations", tokenisations, ("canonical", "all")),
        ("shared", shared, ("prompt", "answer")),
    ):
        if value not in known:
            raise ValueError(f'from_texts: {name} must be "{known[0]}" or "{known[1]}", got {value!r}')
    if isinstance(texts, str):
        raise TypeError(f"from_texts: texts must be a list of strings, got {texts!r:.60}")
    if not isinstance(prompt, str):
        raise TypeError(f"from_texts: prompt must be a string, got {prompt!r:.60}")
    texts = list(texts)
    for which, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"from_texts: text {which} must be a string, got {text!r:.60}")
    if not texts:
        raise ValueError("from_texts: there are no texts; a trie needs at least one answer")
    return texts


def canonical(
    tokenizer: Any, texts: Sequence[str], prompt: str, *, shared: str, add_special_tokens: bool, may_be_empty: bool
) -> TokenisedTexts:
    """Prompt and answer tokenised together; the sequences begin where the prompt, or all that they share, ends."""
    parts = [
        _encode(tokenizer, [prompt + text for text in texts[first : first + _CHUNK]], add_special_tokens)
        for first in range(0, len(texts), _CHUNK)
    ]
    values = np.concatenate([part[0] for part in parts])
    offsets = offsets_of(np.concatenate([np.diff(part[1]) for part in parts]))
    starts, room = offsets[:-1], int(np.diff(offsets).min()) - (not may_be_empty)
    alone = _encode(tokenizer, [prompt], add_special_tokens)[0]
    # One answer shares all of itself with itself: there too the prompt alone is what the model reads.
    prompt_alone = shared == "answer" or len(texts) == 1
    limit = min(room, alone.size) if prompt_alone else room
    common = 0
    while common < limit:
        column = values[starts + common]
        if (column != (alone[common] if prompt_alone else column[0])).any():
            break
        common += 1
    rest = np.ones(values.size, bool)
    for depth in range(common):
        rest[starts + depth] = False
    lengths = np.diff(offsets) - common
    return TokenisedTexts(values[:common].copy(), values[rest], offsets_of(lengths), np.arange(len(texts)))


def _encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool) -> tuple[Ints, Ints]:
    ids = tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]
    return ragged(ids, what="from_texts", row="text")


def all_segmentations(tokenizer: Any, texts: TokenisedTexts, max_sequences: int) -> TokenisedTexts:
    """Every sequence of ordinary tokens that spells the bytes of each canonical one.

    Raises:
        ValueError: more than ``max_sequences`` altogether, or a tokenizer whose tokens are no strings of bytes.
    """
    spelling = token_bytes(tokenizer)
    ids_of: defaultdict[bytes, list[int]] = defaultdict(list)
    for token, spelled in sorted(spelling.items()):
        if spelled:
            ids_of[spelled].append(token)
    longest = max(map(len, ids_of), default=0)
    graphs = []
    for first, last in zip(texts.offsets[:-1].tolist(), texts.offsets[1:].tolist()):
        canonical_ids = texts.values[first:last].tolist()
        unknown = [token for token in canonical_ids if token not in spelling]
        if unknown:
            raise ValueError(
                f"from_texts: token {unknown[0]} of a canonical tokenisation has no spelling of its own (a special "
                'token?); tokenisations="all" cannot look for other ones'
            )
        graphs.append(_SegmentationGraph(b"".join(spelling[t] for t in canonical_ids), ids_of, longest))
    total = sum(graph.count for graph in graphs)
    if total > max_sequences:
        most = max(range(len(graphs)), key=lambda i: graphs[i].count)
        raise ValueError(
            f'from_texts: tokenisations="all" finds {total:,} sequences, {graphs[most].count:,} of them for text '
            f'{most} alone, more than max_sequences={max_sequences:,}; raise that, or take tokenisations="canonical"'
        )
    sequences, owners = [], []
    before = texts.prompt.tolist()
    for number, graph in enumerate(graphs):
        first, last = texts.offsets[number : number + 2].tolist()
        want = _decode(tokenizer, before + texts.values[first:last].tolist())
        for ids in graph.sequences():
            if _decode(tokenizer, before + ids) != want:
                raise ValueError(
                    f"from_texts: the tokens {ids} should spell text {number} and decode to something else; this "
                    'tokenizer does not join its tokens\' bytes, take tokenisations="canonical"'
                )
            sequences.append(ids)
            owners.append(number)
    values, offsets = ragged(sequences, what="from_texts", row="sequence")
    return TokenisedTexts(texts.prompt, values, offsets, np.array(owners, np.int64))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _SegmentationGraph:
    """Positions in a text joined by the tokens that lead from one to another."""

    def __init__(self, text: bytes, ids_of: dict[bytes, list[int]], longest: int) -> None:
        self.size = len(text)
        self.steps: list[list[tuple[int, int]]] = [[] for _ in range(self.size)]  # (token, position after it)
        ways = [0] * self.size + [1]
        for start in range(self.size - 1, -1, -1):
            for stop in range(start + 1, min(start + longest, self.size) + 1):
                if ways[stop] and (ids := ids_of.get(text[start:stop])):
                    ways[start] += len(ids) * ways[stop]
                    self.steps[start] += [(token, stop) for token in ids]
        self.count = ways[0]

    def sequences(self) -> Iterator[list[int]]:
        path: list[int] = []
        stack = [iter(self.steps[0] if self.size else ())]
        if not self.size:
            yield []
        while stack:
            step = next(stack[-1], None)
            if step is None:
                stack.pop()
                if path:
                    path.pop()
            elif step[1] == self.size:
                yield [*path, step[0]]
            else:
                path.append(step[0])
                stack.append(iter(self.steps[step[1]]))


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that each ordinary token of a fast tokenizer adds to a text; special tokens are left out.

    Byte-level tokenizers write bytes as characters of their own, SentencePiece's write a space as ``▁`` and what is in
    no token as ``<0x0A>``.

    Raises:
        ValueError: a tokenizer of another kind, or without a fast backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f'from_texts: tokenisations="all" needs a fast tokenizer (backend_tokenizer), got '
            f"{type(tokenizer).__name__}"
        )
    facts = json.loads(backend.to_str())
    added = {entry["id"]: entry for entry in facts.get("added_tokens", ())}
    decoder = facts.get("decoder") or {}
    stages = decoder.get("decoders", [decoder])
    kinds = {stage.get("type") for stage in stages}
    if "ByteLevel" in kinds:
        byte_of = _byte_alphabet()
        spell = lambda token: bytes(byte_of[c] for c in token)  # noqa: E731
    elif "Metaspace" in kinds or {"Replace", "ByteFallback"} <= kinds:
        spell = _spell_sentencepiece
    else:
        raise ValueError(
            f'from_texts: tokenisations="all" knows byte-level and SentencePiece tokenizers; this one decodes by '
            f'{sorted(map(str, kinds))}. Take tokenisations="canonical"'
        )
    spelling = {}
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            if not added[number]["special"]:
                spelling[number] = added[number]["content"].encode()
            continue
        try:
            spelling[number] = spell(token)
        except KeyError:  # no character of the alphabet: nothing that text is made of
            continue
    return spelling


def _spell_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's convention: printable bytes stand for themselves, the others for the characters from 256 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

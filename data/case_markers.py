"""A lossless case transform: capital letters become lower-case letters with markers before them.

    "The USA's McKay" -> T"the " A"usa" "'s " T"mc" C"kay"      (T, A, C: TITLE, ALL_CAPS, CAPITAL)

A tokenizer then needs one piece for "the" and "The". The model predicts the marker before the word
that it describes, and pays for it like for any other token. `decode(encode(text)) == text` for
every text. Data sets that are made with it count bytes of the original text.

TITLE: the next letter is a capital, and begins a run of letters. CAPITAL: the same inside a run.
ALL_CAPS: all letters up to the end of the run are capitals (two or more). ESCAPE: the next
character is a character of the text, though it looks like a marker. The characters are those of
openai/parameter-golf#1729.

A letter takes part if lower case and upper case are single characters that give each other back and
have UTF-8 of the same length. Others (U+0130, sharp s, final sigma, title-case digraphs, the Kelvin
sign) stay as they are and end a run, so every token of the result still stands for a definite
number of bytes of the original. Letters are those of Unicode 3.2, which Python keeps for ever: the
transform is the same with every version of Python.

TRANSFORMS has two forms by name: this one, and that of the published data set, which differs in
that ASCII letters only take part. train_gpt.py looks here for the one that an artifact names.
"""

from __future__ import annotations

import re
import sys
import unicodedata

import numpy as np

TITLE, ALL_CAPS, CAPITAL, ESCAPE = MARKERS = "\ue001\ue002\ue003\ue004"
NAME = "case-markers-1"  # in manifests and artifacts; changes if the transform does
PUBLISHED_NAME = "lossless_caps_caseops_v1"  # as openai/parameter-golf#1729 calls it
MARKER_BYTES = 3  # of each marker in UTF-8


def find_pairs() -> dict[str, str]:
    """The lower-case letter of each capital that takes part."""
    category = unicodedata.ucd_3_2_0.category
    pairs = {}
    for capital in map(chr, range(sys.maxunicode + 1)):
        if category(capital) != "Lu":
            continue
        lower = capital.lower()
        if (
            len(lower) == 1
            and category(lower) == "Ll"
            and lower.upper() == capital
            and len(lower.encode()) == len(capital.encode())
        ):
            pairs[capital] = lower
    return pairs


def character_class(characters: str) -> str:
    """A regular expression's class of these characters, written as ranges."""
    codes = np.array(sorted(map(ord, characters)))
    ranges = np.split(codes, np.flatnonzero(np.diff(codes) > 1) + 1)
    return "".join(f"\\U{part[0]:08x}-\\U{part[-1]:08x}" for part in ranges)


# In UTF-8: an escape with the character after it, or another marker.
_MARKER_UTF8 = re.compile(rb"\xee\x80\x84[^\x80-\xbf][\x80-\xbf]*|\xee\x80[\x81-\x83]")


class CaseMarkers:
    """The transform for the letters of `pairs`: the lower-case letter of each capital."""

    def __init__(self, pairs: dict[str, str]):
        self.pairs = pairs
        self._to_lower = str.maketrans(pairs)
        self._to_capital = str.maketrans({lower: capital for capital, lower in pairs.items()})
        self._lower = frozenset(pairs.values())
        capitals = character_class("".join(pairs))
        letters = character_class("".join([*pairs, *pairs.values()]))
        # From the first capital of a run to the run's end; or a character that looks like a marker.
        self._encode = re.compile(f"[{capitals}][{letters}]*+|[{MARKERS}]")
        self._decode = re.compile(
            f"{ESCAPE}(.)|{ALL_CAPS}([{letters}]+)|[{TITLE}{CAPITAL}](.)", re.DOTALL
        )
        self._each_capital = re.compile(f"[{capitals}]")

    def encode(self, text: str) -> str:
        """The text with lower-case letters and markers."""
        return self._encode.sub(self._encode_run, text)

    def decode(self, marked: str) -> str:
        """The text that `encode` turned into `marked`. Markers that describe no letter stay."""
        return self._decode.sub(self._decode_run, marked)

    def _encode_run(self, match: re.Match[str]) -> str:
        """A run of letters in lower case with markers, or an escaped marker."""
        run, start = match[0], match.start()
        if run in MARKERS:
            return ESCAPE + run
        is_inside = start > 0 and match.string[start - 1] in self._lower
        first = CAPITAL if is_inside else TITLE
        # str.lower would write a sigma at the end in another way.
        lower, rest = run.lower() if run.isascii() else run.translate(self._to_lower), run[1:]
        if lower[1:] == rest:  # also a single capital
            return first + lower
        if not is_inside and self._lower.isdisjoint(run):
            return ALL_CAPS + lower
        capitals = self._each_capital.sub(lambda each: CAPITAL + self.pairs[each[0]], rest)
        return first + lower[0] + capitals

    def _decode_run(self, match: re.Match[str]) -> str:
        """What a marker and the characters that it describes stand for."""
        literal, run, letter = match.groups()
        if literal is not None:
            return str(literal)
        changed = (run or letter).translate(self._to_capital)
        return changed if changed != (run or letter) else match[0]


PAIRS = find_pairs()
TRANSFORMS = {
    NAME: CaseMarkers(PAIRS),
    PUBLISHED_NAME: CaseMarkers({c: lower for c, lower in PAIRS.items() if c.isascii()}),
}
encode, decode = TRANSFORMS[NAME].encode, TRANSFORMS[NAME].decode


def original_bytes(marked: bytes) -> np.ndarray:
    """How many bytes of the original text precede each position in the UTF-8 of an encoded text.

    One entry more than bytes (int64). A marker stands for no bytes, every other byte for one.
    """
    counts = np.ones(len(marked) + 1, dtype=np.int64)
    counts[0] = 0
    for match in _MARKER_UTF8.finditer(marked):
        counts[match.start() + 1 : match.start() + 1 + MARKER_BYTES] = 0
    return np.cumsum(counts)

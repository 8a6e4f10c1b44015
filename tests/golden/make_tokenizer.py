"""Write tokenizer/: a small CLIP vocabulary, and the ids that transformers' CLIPTokenizer gives for hostile prompts.

    python tests/golden/make_tokenizer.py

The vocabulary covers every byte; its merges are trained here, by counting, on the text below. The prompts keep to code
points that Unicode 13 (Python 3.10) has, so that every Python must find the same ids. `kinds` are the ways in which
checkpoints write their special tokens: sd1 and sd2 as the hub's SD 1.5 and 2.1 do, sdxl as SDXL's second tokenizer,
saved as transformers 5 saves.
"""

import collections
import itertools
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from clip_files import GOLDEN, write_kind

TEXT = """
a small red circle on the left on a blue background, a photograph of an astronaut riding a horse, the
lighthouse at the end of the world in the evening light, oil on canvas, highly detailed, trending, 4k, 8k,
sharp focus, it's the painter's own; they're here, we've seen it, i'm sure he'll say she'd do what isn't done.
portrait of a woman with red hair and green eyes, soft light, studio, 35mm film, landscape with mountains,
river, forest and clouds at sunrise, watercolour; übergröße straße café naïve déjà vu señor año, красный круг
на синем фоне, 赤い丸と青い背景, 빨간 원, ... !!! !! ?? -- (((masterpiece))) [[best quality]] {{ultra}} llllllll aaaaaaaa
hahahaha hohoho looooong wooooow noooo
"""
START, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS = [
    "",
    " ",
    "\t\n\r\x0b\x0c",
    "a small red circle on the left on a blue background",
    "A SMALL Red CIRCLE",
    "hello, world!",
    "hello!!!",
    "! !! !!!",
    "it's they're we've i'm he'll she'd isn't",
    "IT'S 'S ''S '''s 'sit 't're",
    "don\u2019t",
    "4k 8K 35mm 1234 ①²½Ⅷ٣ ௧",
    "übergröße ÜBERGRÖSSE straße",
    "cafe\u0301 café CAFE\u0301",
    "\u1e9b\u0323 \u212b \u2126 \u0344",
    "ΣΑΣ Σ όσος ΌΣΟΣ",
    "İstanbul ISTANBUL ı",
    "ﬁ ＡＢＣ １２",
    "\u01c5 \u01c4 \u1fbc",
    "красный круг КРАСНЫЙ",
    "赤い丸と青い背景",
    "빨간 원",
    "עברית العربية",
    "हिन्दी",
    "👩\u200d💻 🏳️\u200d🌈 👍🏽",
    "a\u00a0b\u2003c\u3000d\u1680e\u2028f\u2029g\u0085h",
    "a\u200bb\ufeffc\u180ed\u2060e",
    "a\x1cb\x1dc\x1ed\x1fe",
    "\x00\x01\x7f\x80",
    "\u0301",
    "\u0301a",
    "\ue000 \ufffd \ufffe \U0010ffff",
    "a_b-c__d.e",
    "((red)) [blue:1.2] {x}",
    "<|startoftext|>",
    "<|endoftext|>",
    "red<|endoftext|>circle",
    "a <|EndOfText|> b",
    "<|STARTOFTEXT|>!!",
    "!!<|startoftext|>!!",
    "<|<|endoftext|>|>",
    "<|endoftext",
    "|endoftext|>",
    "<|endoftext|><|endoftext|>",
    "\u0301<|endoftext|>\u0301",
    "<|endoftext|>s 's",
    "<|\uff45ndoftext|>",
    "l" * 300,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ha" * 50,
    "thelightheight" * 12,
    "ß" * 40,
    "👩" * 30,
    "red circle " * 60,
    "\u0315\u0300\u0316" * 20,
    "\u1100\u1161\u11a8 \u0b47\u0b3e",
    "\U0001d400\U0001d7d8",
    "ǅ ŉ ﬃ ẞ",
]


def byte_symbols() -> dict[int, str]:
    symbols = {byte: chr(byte) for byte in range(256) if chr(byte).isprintable() and not chr(byte).isspace()}
    hidden = [byte for byte in range(256) if byte not in symbols]
    return dict(sorted((symbols | {byte: chr(256 + i) for i, byte in enumerate(hidden)}).items()))


def train(count: int) -> list[tuple[str, str]]:
    symbols = byte_symbols()
    words = collections.Counter(TEXT.split())
    parts = {word: [symbols[byte] for byte in word.encode()] for word in words}
    for row in parts.values():
        row[-1] += "</w>"
    merges = []
    for _ in range(count):
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, row in parts.items():
            for pair in itertools.pairwise(row):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for row in parts.values():
            i = 0
            while i < len(row) - 1:
                if (row[i], row[i + 1]) == best:
                    row[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def configs() -> dict[str, dict[str, dict]]:
    """Kind -> the two documents beside vocab.json and merges.txt."""

    def added(text: str, normalized: bool = True, **more: object) -> dict:
        return {"content": text, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False} | more

    named = {"bos_token": added(START), "eos_token": added(END), "unk_token": added(END)}
    typed = {name: token | {"__type": "AddedToken"} for name, token in named.items()}
    plain = {"bos_token": START, "eos_token": END, "unk_token": END}
    common = {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    vocab = vocabulary()
    decoder = {
        str(vocab["!"]): added("!", normalized=False, special=True),
        str(vocab[START]): added(START, special=True),
        str(vocab[END]): added(END, special=True),
    }
    return {
        "sd1": {"tokenizer_config": common | typed | {"pad_token": END}, "special_tokens_map": named | {"pad_token": END}},
        "sd2": {"tokenizer_config": common | typed | {"pad_token": END}, "special_tokens_map": named | {"pad_token": "!"}},
        "sdxl": {
            "tokenizer_config": common | plain | {"pad_token": "!", "added_tokens_decoder": decoder},
            "special_tokens_map": named | {"pad_token": "!"},
        },
        "saved": {"tokenizer_config": common | plain | {"pad_token": END}},
    }


def vocabulary() -> dict[str, int]:
    # as in CLIP's: visible bytes first, so "!" is 0, which SD 2 pads with
    symbols = sorted(byte_symbols().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, train(300)), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def main() -> None:
    from transformers import CLIPTokenizer

    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False), encoding="utf-8")
    (GOLDEN / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in train(300)), encoding="utf-8")
    (GOLDEN / "kinds.json").write_text(json.dumps(configs(), indent=1), encoding="utf-8")
    ids = {}
    for kind in configs():
        with tempfile.TemporaryDirectory() as folder:
            reference = CLIPTokenizer.from_pretrained(write_kind(Path(folder) / kind, kind))
        padded = reference(PROMPTS, padding="max_length", truncation=True, max_length=77).input_ids
        whole = [reference(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
        ids[kind] = {"whole": whole, "padded": padded}
    (GOLDEN / "ids.json").write_text(json.dumps({"prompts": PROMPTS, "kinds": ids}, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    main()

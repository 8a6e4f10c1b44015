"""tokenizer.py against the ids of transformers' CLIPTokenizer (golden/make_tokenizer.py); damaged files; how much it works."""

import json

import pytest
from clip_files import KINDS, golden_ids, write_kind

from sdruntime.errors import BundleError, SettingError
from sdruntime.pipeline.text.prompt import tokenize
from sdruntime.pipeline.text.tokenizer import LONGEST, Tokenizer

IDS = golden_ids()


@pytest.fixture
def folder(tmp_path):
    """Files as SD 1.5 has them."""
    return write_kind(tmp_path / "tokenizer", "sd1")


def edit(path, **changes):
    """Set keys of a JSON document; None takes one out."""
    document = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}), encoding="utf-8")


def faults(folder):
    with pytest.raises(BundleError) as caught:
        Tokenizer.open(folder)
    assert str(folder) in str(caught.value)
    return caught.value.faults


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_prompts_have_the_ids_of_the_reference(kind, tmp_path):
    tokenizer = Tokenizer.open(write_kind(tmp_path / "tokenizer", kind))
    wrong = {
        prompt: ids
        for prompt, ids in zip(IDS["prompts"], IDS["kinds"][kind]["whole"], strict=True)
        if tokenizer.encode(prompt) != ids
    }
    assert not wrong


@pytest.mark.parametrize(("kind", "pad"), [("sd1", "<|endoftext|>"), ("sd2", "!"), ("sdxl", "!"), ("saved", "<|endoftext|>")])
def test_the_pad_token_is_the_checkpoint_s(kind, pad, tmp_path):
    tokenizer = Tokenizer.open(write_kind(tmp_path / "tokenizer", kind))
    assert tokenizer.pad == tokenizer.vocab[pad]
    assert (tokenizer.start, tokenizer.end) == (tokenizer.vocab["<|startoftext|>"], tokenizer.vocab["<|endoftext|>"])
    assert tokenizer.length == 77


def test_a_symbol_without_a_token_is_the_unknown_one(folder):
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    del vocab["~</w>"]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.encode("~") == [tokenizer.vocab["<|endoftext|>"]]


def test_an_added_token_has_the_id_that_the_config_gives(folder):
    token = {"content": "<my-cat>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"9000": token})
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.encode("a <my-cat>!") == [*tokenizer.encode("a"), 9000, *tokenizer.encode("!")]


def added(folder, **flags):
    """A tokenizer with `<Cat>` and `<Cat>_1` added, with these flags, and a function text -> the names of its tokens."""
    tokens = {str(9000 + k): {"content": text, **flags} for k, text in enumerate(("<Cat>", "<Cat>_1"))}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=tokens)
    tokenizer = Tokenizer.open(folder)
    return tokenizer, lambda text: [name for _, name in tokenizer._tokens(text)]


@pytest.mark.parametrize(
    ("flags", "text", "names"),
    [
        ({}, "a<Cat>a <cat>", ["<Cat>"]),
        ({"normalized": True}, "a<CAT>a <cat>", ["<cat>", "<cat>"]),
        ({}, "<Cat>_1<Cat>_", ["<Cat>_1", "<Cat>"]),
        ({"single_word": True}, "<Cat> a<Cat> -<Cat>-", ["<Cat>", "<Cat>"]),
        ({"lstrip": True}, "a \t<Cat>  a", [" \t<Cat>"]),
        ({"rstrip": True}, "a <Cat>  a", ["<Cat>  "]),
    ],
)
def test_an_added_token_is_found_by_its_flags(folder, flags, text, names):
    found = added(folder, **flags)[1](text)
    assert [name for name in found if name.strip().lower().startswith("<cat>")] == names


def test_further_vectors_of_a_token_are_written_out(folder):
    tokenizer, _ = added(folder)
    assert tokenizer.expand("a <Cat>, <Cat>!") == "a <Cat> <Cat>_1, <Cat> <Cat>_1!"
    assert tokenizer.expand("a cat") == "a cat"
    with pytest.raises(SettingError, match=r"'<Cat>' stands for 2 tokens; the maximum is 65,536"):
        tokenizer.expand("<Cat>" * 10_000)
    with pytest.raises(SettingError, match="not valid Unicode"):
        tokenizer.expand("<Cat>\ud800")
    assert tokenize(tokenizer, "<Cat>").ids[1:4].tolist() == [9000, 9001, tokenizer.end]


def test_decode_is_the_text_as_the_tokenizer_sees_it(folder):
    tokenizer = Tokenizer.open(folder)
    text = "A  RED\ncircle, café 赤い 4k <|endoftext|> x"
    assert tokenizer.decode(tokenizer.encode(text)) == "a red circle , café 赤い 4 k <|endoftext|> x"
    assert tokenizer.decode(tokenizer.encode("👩")[:-1]) == "\ufffd"


class Counted(dict):
    """A merge table that counts its lookups: once or twice for each step of the merging."""

    lookups = 0

    def get(self, pair, default=None):
        self.lookups += 1
        return super().get(pair, default)


@pytest.mark.parametrize("word", ["l", "ha", "thelight", "looooong", "\u8d64"])
def test_a_long_word_is_merged_in_linear_many_steps(folder, word):
    opened = Tokenizer.open(folder)
    merges = Counted(opened.merges)
    tokenizer = Tokenizer(vocab=opened.vocab, merges=merges, added=opened.added, start=0, end=0, pad=0, unknown=opened.unknown)
    for size in (2000, 64000):
        merges.lookups = 0
        text = (word * size)[: size // len(word.encode())]
        ids = tokenizer.encode(text)
        bytes_in = len(text.encode())
        assert len(ids) < bytes_in  # there was something to merge
        # each pair is looked up once, each merge looks at itself and its two new neighbours; each heap entry is taken out once
        assert merges.lookups <= 6 * bytes_in
        assert merges.lookups >= bytes_in - 1


def test_merging_keeps_every_letter(folder):
    tokenizer = Tokenizer.open(folder)
    for size in range(1, 200):
        text = ("thelightwoooow" * 20)[:size]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_64_kib_are_taken_and_one_byte_more_is_not(folder):
    tokenizer = Tokenizer.open(folder)
    fits = "é " * (LONGEST // 3) + "a" * (LONGEST % 3)
    assert len(fits.encode()) == LONGEST
    assert len(tokenizer.encode(fits)) >= LONGEST // 3
    with pytest.raises(SettingError, match=r"65,537 bytes.* 65,536 \(64 KiB"):
        tokenizer.encode(fits + "a")


def test_a_lone_surrogate_is_refused(folder):
    with pytest.raises(SettingError, match=r"not valid Unicode.* character 2"):
        Tokenizer.open(folder).encode("ab\ud800")


def test_every_fault_is_named_at_once(folder):
    edit(folder / "vocab.json", a="one", b=-1, c=4, **{"<|startoftext|>": None})
    with (folder / "merges.txt").open("a", encoding="utf-8") as file:
        file.write("one two three\nq zzz\n")
    edit(folder / "tokenizer_config.json", model_max_length="long")
    edit(folder / "special_tokens_map.json", pad_token={"content": "!", "lstrip": "yes"}, unk_token=7)
    found = "\n".join(faults(folder))
    for fault in (
        "vocab.json: 'a': its id 'one' is not a whole number from 0 on",
        "vocab.json: 'b': its id -1",
        "vocab.json: 'c' has the id of '%'",
        "merges.txt: line 302: expected two symbols, got 'one two three'",
        "merges.txt: line 303: not in vocab.json: 'zzz', 'qzzz'",
        "model_max_length 'long'",
        "vocab.json: no '<|startoftext|>', which is the bos_token",
        "pad_token: lstrip 'yes' is not true or false",
        "unk_token: expected a token, got 7",
    ):
        assert fault in found


def test_missing_and_unreadable_files_are_named_together(folder):
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").write_bytes(b"\xff\xfe")
    (folder / "tokenizer_config.json").write_text('{"pad_token": "!", "pad_token": "?"}')
    (folder / "special_tokens_map.json").write_text("[]")
    found = faults(folder)
    assert [fault.partition(":")[0] for fault in found] == [
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]
    assert "missing" in found[0]
    assert "'pad_token' appears twice" in found[2]


def test_a_file_of_rubbish_is_not_fifty_thousand_faults(folder):
    (folder / "merges.txt").write_text("rubbish\n" * 50_000)
    found = faults(folder)
    assert len(found) == 11
    assert found[-1] == "... and 49,990 more like these"


def test_a_length_without_a_limit_is_clips_and_one_without_room_is_a_fault(folder):
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    assert Tokenizer.open(folder).length == 77
    edit(folder / "tokenizer_config.json", model_max_length=248)
    assert Tokenizer.open(folder).length == 248
    assert Tokenizer.open(folder, length=5).length == 5
    edit(folder / "tokenizer_config.json", model_max_length=2)
    assert faults(folder) == ("tokenizer_config.json: model_max_length 2 is not a whole number above 2",)

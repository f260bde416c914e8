"""Token ids are those that the tokenizer itself gives the whole text, in bounded memory."""

import json
import logging
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lte_jax import data
from lte_jax.errors import UserError


def test_byte_tokenizer_is_lossless_and_survives_saving(tmp_path):
    text = "déf <s>(x):\r\n\treturn  'a' , b .\x00\x7f 🙂</s>"
    made = data.byte_tokenizer()
    made.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    for tokenizer in made, AutoTokenizer.from_pretrained(tmp_path):
        bos, *ids = tokenizer(text)["input_ids"]
        assert bos == 256 and bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        assert special == (256, 257, 258) and len(tokenizer) == 259


def test_a_learned_tokenizer_is_lossless_short_and_survives_saving(tmp_path):
    texts = ["the Vaults pub near the river"] * 9 + ["the <s>é\ud800"]
    made = data.learned_tokenizer(texts, 300)
    made.save_pretrained(tmp_path)
    text = "the Vaults <s>🙂\x00  pub</s>"
    for tokenizer in made, AutoTokenizer.from_pretrained(tmp_path):
        bos, *ids = tokenizer(text)["input_ids"]
        assert bos == tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 1
        assert tokenizer.decode(ids) == text and 0 not in ids and 1 not in ids
        assert len(tokenizer) <= 300
        words = tokenizer.convert_ids_to_tokens(tokenizer(" Vaults pub")["input_ids"])
        assert words == ["<s>", "ĠVaults", "Ġpub"]  # a token never has two words


def test_the_same_texts_teach_the_same_tokenizer_anywhere():
    """Also in another process, whose hashes differ: a resumed run learns it anew."""
    code = (
        "from lte_jax import data; texts = [f'word{i % 7} of {i % 11} {i}' for i in range(300)]; "
        "print(data.learned_tokenizer(texts, 400).backend_tokenizer.to_str())"
    )
    runs = [subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)]
    assert len(json.loads(runs[0])["model"]["vocab"]) == 400
    assert runs[0] == runs[1]


def test_only_some_of_many_texts_teach(monkeypatch):
    monkeypatch.setattr(data.tokens, "LEARNED_FROM", 3)
    made = data.learned_tokenizer(["ab", "xy", "cd", "xy", "ef"], 262)
    merged = made.convert_ids_to_tokens(range(259, len(made)))
    assert sorted(merged) == ["ab", "cd", "ef"]


def test_a_learned_tokenizer_has_room_for_all_bytes():
    assert len(data.learned_tokenizer(["aa"], 259)) == 259
    with pytest.raises(UserError, match=r"source.scratch.vocab_size=258: expected at least 259"):
        data.learned_tokenizer(["aa"], 258)


# ----------------------------------------------------------------------------------------- prefix


def test_tokenize_puts_bos_in_front_of_each_document(monkeypatch):
    monkeypatch.setattr(data.tokens, "BATCH_TEXTS", 2)
    documents = data.tokenize(["ab", "c", "é"], data.byte_tokenizer())
    assert [d.tolist() for d in documents] == [[256, 97, 98], [256, 99], [256, 195, 169]]
    assert all(d.dtype == np.int32 for d in documents)


def test_bos_stays_away_where_the_tokenizer_puts_none():
    tokenizer = data.byte_tokenizer()  # its bos may be a chat marker, as that of SmolLM2
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    assert tokenizer.bos_token_id == 256
    assert data.tokenize(["ab"], tokenizer)[0].tolist() == [97, 98]


def test_an_end_that_the_tokenizer_appends_is_none_of_the_text():
    tokenizer = data.byte_tokenizer()
    template = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 256), ("</s>", 257)])
    tokenizer.backend_tokenizer.post_processor = template
    assert data.tokenize(["ab"], tokenizer)[0].tolist() == [256, 97, 98]


def test_bos_stands_once_where_the_text_begins_with_it():
    backend = data.byte_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert tokenizer("<s>ab")["input_ids"] == [256, 256, 97, 98]  # as people find out
    assert data.tokenize(["<s>ab"], tokenizer)[0].tolist() == [256, 97, 98]


@pytest.mark.parametrize("add_bos", [True, False, None])
def test_old_llama_tokenizers_do_what_transformers_does(shared, tmp_path, add_bos):
    """No post-processor in tokenizer.json, but `add_bos_token` beside it."""
    raw = json.loads((shared / "models/stories260k/tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": add_bos}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    [ids] = data.tokenize(["Once upon"], tokenizer)
    assert ids.tolist() == tokenizer("Once upon")["input_ids"]


# ------------------------------------------------------------------------------------- long texts


@pytest.fixture(params=["bytes", "stories260k", "babyllama"])
def tokenizer(request):
    """By bytes; merges over a whole text, with bytes for rare characters; single characters.

    The latter two put a "▁" in front of whatever they are given.
    """
    if request.param == "bytes":
        return data.byte_tokenizer()
    return AutoTokenizer.from_pretrained(
        request.getfixturevalue("shared") / "models" / request.param
    )


def whole(text, tokenizer):
    return tokenizer(text, verbose=False)["input_ids"]


def made_up_text() -> str:
    """Runs of one letter, up to longer than windows, among characters of every width."""
    rng = random.Random(0)
    letters, lengths = ["a", "b", " ", "0", "\n", "é", "日", "🙂"], [1, 2, 3, 7, 100, 700, 9000]
    return "".join(rng.choice(letters) * rng.choice(lengths) for _ in range(40))


def test_windows_give_the_ids_of_the_whole_text(tokenizer, shared, monkeypatch):
    monkeypatch.setattr(data.tokens, "BATCH_CHARACTERS", 2**13)
    monkeypatch.setattr(data.tokens, "WINDOW", 2**11)
    monkeypatch.setattr(data.tokens, "OVERLAP", 2**8)
    wiki = data.read_texts(str(shared / "data/wikitext-2/train_head_of_wikitext-103.jsonl"))[0]
    stories = data.read_texts(str(shared / "data/tinystories/train.jsonl"), limit=100, join="\n")[0]
    for text in wiki[:90_000], stories, (shared / "data/tinyshakespeare/input.txt").read_text():
        text = text[:90_000]
        assert data.tokenize([text], tokenizer)[0].tolist() == whole(text, tokenizer)


@pytest.mark.parametrize("text", [made_up_text(), "a" * 30_000], ids=["runs", "one letter"])
def test_windows_are_widened_where_a_text_repeats(tokenizer, monkeypatch, text):
    monkeypatch.setattr(data.tokens, "BATCH_CHARACTERS", 2**12)
    monkeypatch.setattr(data.tokens, "WINDOW", 2**10)
    monkeypatch.setattr(data.tokens, "OVERLAP", 2**7)
    [ids] = data.tokenize([text], tokenizer)
    assert ids.tolist() == whole(text, tokenizer) and ids.dtype == np.int32


def test_windows_are_what_long_texts_come_in(monkeypatch):
    """The tokenizer never sees more than a batch: the tests above would pass without windows."""
    seen = []

    class Spy:
        is_fast = True

        def __call__(self, texts, **kwargs):
            if isinstance(texts, list):
                seen.append(sum(map(len, texts)))
            return tokenizer(texts, **kwargs)

    tokenizer = data.byte_tokenizer()
    monkeypatch.setattr(data.tokens, "BATCH_CHARACTERS", 2**12)
    monkeypatch.setattr(data.tokens, "WINDOW", 2**10)
    monkeypatch.setattr(data.tokens, "OVERLAP", 2**7)
    text = "".join(random.Random(0).choices("abcdefgh ", k=50_000))
    data.tokenize([text, *["short"] * 3000], Spy())
    assert max(seen) <= 2**12 and sum(seen) < 50_000 * 1.2 + 15_000


def test_slow_tokenizers_take_a_long_text_whole_and_say_so(monkeypatch, caplog):
    class Slow:
        is_fast = False

        def __call__(self, texts, return_offsets_mapping=False, **kwargs):
            assert not return_offsets_mapping
            return fast(texts, **kwargs)

    fast = data.byte_tokenizer()
    monkeypatch.setattr(data.tokens, "BATCH_CHARACTERS", 2**10)
    [ids] = data.tokenize(["ab" * 2000], Slow())
    assert bytes(ids[1:].tolist()) == b"ab" * 2000
    assert "4000 characters is tokenised at once" in caplog.text


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_memory_of_one_long_text_is_bounded():
    """Ten bytes a byte, and what the tokenizer holds at work: it needed 180 bytes a byte."""
    code = """
import random, re
from lte_jax import data
status = lambda: open("/proc/self/status").read()  # getrusage starts from the parent's peak
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status())[1])
tokenizer = data.byte_tokenizer()
text = "".join(random.Random(0).choices("abcdefgh ", k=1_000_000))
data.tokenize([text[:1000]], tokenizer)
before = peak()
ids = data.tokenize([text], tokenizer)[0]
assert len(ids) == len(text) + 1
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * 1_000_000 + 64 * 2**20


# ------------------------------------------------------------------------------------- characters


def test_lone_surrogates_are_replaced_and_counted(caplog):
    tokenizer = data.byte_tokenizer()
    with caplog.at_level(logging.WARNING):
        documents = data.tokenize(
            ["a\ud800b\udfff", "c", json.loads('"\\udc80 \\ud83d\\ude42"')], tokenizer
        )
    texts = [bytes(d[1:].tolist()).decode() for d in documents]
    assert texts == ["a\ufffdb\ufffd", "c", "\ufffd 🙂"]
    assert [r.getMessage() for r in caplog.records] == [
        "3 lone surrogates in the text were replaced by U+FFFD"
    ]

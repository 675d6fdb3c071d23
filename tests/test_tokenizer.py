"""The tokenizer: what goes in comes out, digits and tags stand alone, files load elsewhere, faults are said."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from groupwise.engine.errors import UserError
from groupwise.engine.tokenizer import SPECIALS, Tokenizer

TAGS = ("<think>", "</think>", "<code>", "</code>", "<answer>", "</answer>")
TEXTS = [
    f"<think>The mean of '{name}' where '{other}' is {value}.</think>\n<code>\nprint(df['{name}'].mean())\n</code>"
    for name, other, value in [("price", "sold_on", 12.5), ("height cm", "größe", 907), ("rate", "price", -3)] * 5
]
VOCABULARY = 256 + len(SPECIALS) + len(TAGS) + 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, VOCABULARY, TAGS)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=150)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(parts=st.lists(st.sampled_from([*TAGS, *SPECIALS, *TEXTS, "12.5", "\n", " ", "df['price']"]), max_size=8))
@settings(max_examples=100)
def test_training_vocabulary_comes_back_and_ids_are_in_range(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    marks = [token for token in (*TAGS, *SPECIALS) for _ in range(text.count(token))]
    assert sum(token in {tokenizer.token_id(mark) for mark in marks} for token in ids) == len(marks)


@given(number=st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
@settings(max_examples=50)
def test_each_digit_is_one_token(tokenizer: Tokenizer, number: float) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(f"= {number};")]
    assert all(len(piece) == 1 for piece in pieces if any(character.isdigit() for character in piece))


@pytest.mark.parametrize("tag", [*TAGS, *SPECIALS])
def test_a_tag_is_one_token_wherever_it_stands(tokenizer: Tokenizer, tag: str) -> None:
    ids = tokenizer.encode(f"x{tag}\n5{tag}")
    assert tokenizer.encode(tag) == [tokenizer.token_id(tag)]
    assert ids.count(tokenizer.encode(tag)[0]) == 2


@pytest.mark.parametrize("name", ["price", "height cm", "sold_on", "rate"])
def test_a_name_has_the_same_tokens_in_question_and_code(name: str) -> None:
    texts = [f"Columns: {name} (text). What is '{name}'? df['{name}'].mean() max({name})" for _ in range(20)]
    tokenizer = Tokenizer.train(texts, 400, TAGS)
    alone = tokenizer.encode(name)
    for text in (f"'{name}'", f"df['{name}'].mean()", f"max({name})"):
        ids = tokenizer.encode(text)
        assert any(ids[start : start + len(alone)] == alone for start in range(len(ids)))


def test_vocabulary_has_the_asked_size_and_training_is_repeatable(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCABULARY
    again = Tokenizer.train(TEXTS, VOCABULARY, TAGS)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_chat_prompt_is_chatml_with_special_tokens(tokenizer: Tokenizer) -> None:
    text = tokenizer.chat_prompt("Be brief.", "How many?")
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.chat_prompt("", "Q") == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text).count(tokenizer.eos_id) == 2


def test_saved_folder_loads_here_and_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    ours = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [*TEXTS[:3], ours.chat_prompt("S", "U")]:
        expected = tokenizer.encode(text)
        assert ours.encode(text) == expected
        assert theirs.encode(text, add_special_tokens=False) == expected
        assert fast.encode(text, add_special_tokens=False) == expected
        assert theirs.decode(expected, skip_special_tokens=False) == text
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == ours.chat_prompt("S", "U")


@pytest.mark.parametrize("entry", ["<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False}])
def test_settings_name_the_end_token_and_survive_a_save(tokenizer: Tokenizer, tmp_path: Path, entry: Any) -> None:
    tokenizer.save(tmp_path)
    written = {"eos_token": entry, "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(written))
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.eos_id == tokenizer.token_id("<|endoftext|>")
    loaded.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["model_max_length"] == 77


def test_without_settings_the_turn_end_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).eos_id == tokenizer.token_id("<|im_end|>")


def test_a_folder_that_transformers_wrote_for_qwen2_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "in", "Ġt"])}
    theirs = transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=[("i", "n"), ("Ġ", "t")])
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in ["train 12 tins", "naïve\n\n  x", ours.chat_prompt("S", "U")]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


def sized(vocab_size: int) -> Any:
    return SimpleNamespace(vocab_size=vocab_size)


def _broken(folder: Path, kind: str) -> None:
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if kind == "missing":
        path.unlink()
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif kind == "cut":
        path.write_text(path.read_text()[:500])
    elif kind == "other json":
        path.write_text("[]")
    elif kind == "settings cut":
        settings_path.write_text("{")
    elif kind == "settings list":
        settings_path.write_text("[]")
    elif kind == "unknown end":
        settings_path.write_text('{"eos_token": "</s>"}')


@pytest.mark.parametrize(
    "kind", ["missing", "a folder", "binary", "cut", "other json", "settings cut", "settings list", "unknown end"]
)
def test_a_broken_folder_is_one_clear_sentence(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    tokenizer.save(tmp_path)
    _broken(tmp_path, kind)
    with pytest.raises(UserError) as raised:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) > 20


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="at least 265"):
        Tokenizer.train(TEXTS, 264, TAGS)


def test_vocabulary_must_fit_the_model(tokenizer: Tokenizer) -> None:
    tokenizer.check_fits(sized(VOCABULARY))
    tokenizer.check_fits(sized(VOCABULARY + 100))
    with pytest.raises(UserError, match=str(VOCABULARY - 1)):
        tokenizer.check_fits(sized(VOCABULARY - 1))

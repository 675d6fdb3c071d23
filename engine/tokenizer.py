"""Text to token ids and back: byte-level BPE in Hugging Face's ``tokenizer.json``, and the ChatML prompt.

Digits are always single tokens, and each tag of the answer grammars is one token, so that a turn ends at an id
and a number is copied digit by digit. A folder of Qwen2 or Qwen3 loads as it is.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from .errors import UserError

if TYPE_CHECKING:
    from .config import ModelConfig

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIALS = (END_OF_TEXT, TURN_START, TURN_END)

# As Qwen2's, but punctuation never joins the word after it: a column name has the same tokens
# in the question (quoted) and in the code (a subscript), which is what makes it easy to copy.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Tokenizer:
    """A byte-level BPE vocabulary with Qwen's special tokens. Make one by ``train`` or ``from_folder``."""

    def __init__(self, backend: Backend, *, eos: str, pad: str, settings: dict[str, Any] | None = None) -> None:
        self._backend = backend
        self._settings = dict(settings or {})
        self._eos, self._pad = eos, pad
        self.eos_id: int = self._required_id(eos)
        self.pad_id: int = self._required_id(pad)
        # Ids may have gaps, so the count of tokens is not enough: the model needs a row for the highest id.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, tags: Sequence[str] = ()) -> Self:
        """Learns a vocabulary from texts.

        Args:
            texts: the training texts; tags and special tokens inside them teach no merges.
            vocab_size: tokens in all: 256 bytes, 3 specials, the tags, merges; fewer when the texts run out of pairs.
            tags: strings that become one token each and are kept by ``decode``.

        Raises:
            UserError: vocab_size leaves no room for the bytes, specials and tags.
        """
        tags = list(dict.fromkeys(tags))
        least = 256 + len(SPECIALS) + len(tags)
        if vocab_size < least:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes, {len(SPECIALS)} special tokens and {len(tags)} tags "
                f"need at least {least}."
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(tags),
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        whole = re.compile("|".join(re.escape(token) for token in sorted([*SPECIALS, *tags], key=len, reverse=True)))
        backend.train_from_iterator((part for text in texts for part in whole.split(text) if part), trainer)
        backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
        return cls(backend, eos=TURN_END, pad=END_OF_TEXT)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Reads ``tokenizer.json``, and ``tokenizer_config.json`` where there is one (it names the end token).

        Raises:
            UserError: a file is missing, unreadable or not a tokenizer, or has no end token.
        """
        path = Path(folder) / "tokenizer.json"
        text = _read(path)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise UserError(f"{path} is not a tokenizer that can be read ({error}); save it again.") from error
        backend.no_padding()
        backend.no_truncation()
        settings_path = path.with_name("tokenizer_config.json")
        settings = _read_object(settings_path) if settings_path.exists() else {}
        if not backend.get_vocab_size():
            raise UserError(f"{path} holds an empty vocabulary; save it again.")
        eos = _token_text(settings.get("eos_token")) or _first_known(backend, (TURN_END, END_OF_TEXT))
        if eos is None:
            raise UserError(f"{path} has no end token: expected eos_token in {settings_path.name}, or {TURN_END}.")
        pad = _token_text(settings.get("pad_token")) or _first_known(backend, (END_OF_TEXT,)) or eos
        return cls(backend, eos=eos, pad=pad, settings=settings)

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
            **self._settings,
            "eos_token": self._eos,
            "pad_token": self._pad,
        }
        _write(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens and tags written in it become their ids, nothing is added around it."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, with tags and special tokens written out. Bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of one whole token (a tag, a special), or None when the vocabulary has no such token."""
        return self._backend.token_to_id(token)

    def chat_prompt(self, system: str, user: str) -> str:
        """The ChatML text up to where the assistant writes; an empty system part is left out."""
        head = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
        return f"{head}{TURN_START}user\n{user}{TURN_END}\n{TURN_START}assistant\n"

    def check_fits(self, model_config: "ModelConfig") -> None:
        """Raises UserError when the model has no row for some token. A model with more rows than tokens is fine."""
        if self.vocab_size > model_config.vocab_size:
            raise UserError(
                f"The tokenizer has token ids up to {self.vocab_size - 1}, but the model's vocab_size is "
                f"{model_config.vocab_size}: use the tokenizer that the model was trained with."
            )

    def _required_id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise UserError(f"The vocabulary lacks the token {token!r} that its settings name; use matching files.")
        return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a model folder needs a tokenizer.json.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); save it again or mend its permissions.") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); save it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object; save it again.")
    return value


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _token_text(entry: Any) -> str | None:
    """Settings name a token by its text or by an object around it; absent or null is None."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _first_known(backend: Backend, tokens: Iterable[str]) -> str | None:
    return next((token for token in tokens if backend.token_to_id(token) is not None), None)

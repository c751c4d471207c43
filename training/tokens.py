"""Text as the tokens of the model that is fine-tuned.

A file is one document: what the tokenizer's post-processor makes of it (a first token, in most),
and the token that ends a text, unless that is there already.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import load_tokenizer
from training.config import TrainConfig
from training.data import Corpus, Text, check_long_enough
from training.errors import TrainingError
from training.fine_tuning import decoder_config_of

type Tokens = NDArray[np.int32]

_AT_ONCE = 64  # files


@dataclasses.dataclass(frozen=True)
class TokenCorpus(Corpus):
    """A corpus in tokens, and the same in bytes."""

    text: Corpus
    config_json: str
    not_text: int
    """Files left out because they are not UTF-8."""

    @property
    def unit(self) -> str:
        return "tokens"

    @property
    def units_per_byte(self) -> tuple[float, float]:
        return (
            len(self.train.data) / len(self.text.train.data),
            len(self.held_out.data) / len(self.text.held_out.data),
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes also when the model's config.json or its tokenizer's work does."""
        parts = (self.train.data.tobytes(), self.held_out.data.tobytes(), self.config_json.encode())
        digests = [hashlib.sha256(part).digest() for part in parts]
        return hashlib.sha256(b"".join(digests)).hexdigest()

    @functools.cached_property
    def held_out_compressed(self) -> dict[str, float]:
        return self.text.held_out_compressed

    def facts(self) -> dict[str, Any]:
        return self.text.facts() | {
            "training_tokens": len(self.train.data),
            "held_out_tokens": len(self.held_out.data),
            "not_utf8_files": self.not_text,
            "fingerprint": self.fingerprint,
        }

    def __str__(self) -> str:
        left_out = f"; {self.not_text} not UTF-8 left out" if self.not_text else ""
        counts = f"{len(self.train.data):,} and {len(self.held_out.data):,} tokens"
        return f"{self.text}; {counts}{left_out}"


def tokenized(corpus: Corpus, config: TrainConfig) -> TokenCorpus:
    """The corpus in tokens of the folder to fine-tune.

    Raises:
        models.FolderError: the folder's tokenizer or config.json cannot be read.
        TrainingError: the text is not UTF-8, the tokenizer has tokens that the model lacks, or a
            part is shorter than one sequence.
    """
    assert config.fine_tune.model is not None
    folder, model = config.fine_tune.model, decoder_config_of(config)
    try:
        tokenizer = load_tokenizer(folder)
    except ImportError as error:
        raise TrainingError(str(error)) from None
    parts, texts, left_out = [], [], 0
    for part in (corpus.train, corpus.held_out):
        documents = _documents(part, cut=corpus.train_files == corpus.held_out_files)
        left_out += sum(document is None for document in documents)
        kept = [document for document in documents if document is not None]
        if not kept:
            raise TrainingError(f"{corpus.source} holds no text in UTF-8 (--model takes no other)")
        ids = _ids(tokenizer, [document.decode("utf-8") for document in kept])
        ids = [_ended(document, model.eos_token_ids) for document in ids]
        parts.append(_join(ids))
        texts.append(Text.join(kept))
    found = TokenCorpus(
        **{
            field.name: getattr(corpus, field.name)
            for field in dataclasses.fields(Corpus)
            if field.name not in ("train", "held_out")
        },
        train=parts[0],
        held_out=parts[1],
        text=dataclasses.replace(corpus, train=texts[0], held_out=texts[1]),
        config_json=model.source,
        not_text=left_out,
    )
    check_long_enough(found, config.data)
    largest = max(int(part.data.max()) for part in parts)
    if largest >= model.vocab_size:
        raise TrainingError(
            f"the tokenizer of {folder} has a token {largest}, its model {model.vocab_size} tokens"
        )
    return found


def _documents(text: Text, *, cut: bool) -> list[bytes | None]:
    """The files; None for what is not UTF-8. One that was cut in two may lack parts of letters."""
    ends = [*text.starts[1:].tolist(), len(text.data)]
    whole = [text.data[a:b].tobytes() for a, b in zip(text.starts.tolist(), ends, strict=True)]
    return [_utf8(content, lacking=3 if cut else 0) for content in whole]


def _utf8(content: bytes, *, lacking: int) -> bytes | None:
    """The bytes, less up to so many at each end that are parts of a letter; None if not UTF-8."""
    first = 0
    while first < min(lacking, len(content)) and content[first] & 0xC0 == 0x80:
        first += 1
    for last in range(len(content), max(first, len(content) - lacking - 1), -1):
        try:
            content[first:last].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return content[first:last]
    return None


def _ids(tokenizer: Any, texts: list[str]) -> list[Tokens]:
    found: list[Tokens] = []
    for start in range(0, len(texts), _AT_ONCE):
        encoded = tokenizer.encode_batch(texts[start : start + _AT_ONCE])
        found += [np.asarray(document.ids, np.int32) for document in encoded]
    return found


def _ended(document: Tokens, ends: tuple[int, ...]) -> Tokens:
    """With the first of the tokens that end a text, unless one of them is there already."""
    if not ends or (len(document) and document[-1] in ends):
        return document
    return np.append(document, np.int32(ends[0]))


def _join(documents: list[Tokens]) -> Text:
    lengths = np.array([len(document) for document in documents], np.int64)
    return Text(np.concatenate(documents), np.cumsum(lengths) - lengths)

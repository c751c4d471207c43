"""The tokenizer of a folder."""

import os
from typing import TYPE_CHECKING

from models.folder.errors import FolderError, some
from models.folder.files import is_lfs_pointer, lfs_pointer, local_folder, unreadable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TOKENIZER", "load_tokenizer"]

TOKENIZER = "tokenizer.json"
_OTHERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(folder: str | os.PathLike[str]) -> "Tokenizer":
    """The folder's `tokenizer.json`, with its post-processor.

    `encode(text).ids` has the tokens that the post-processor adds, such as the first one of Llama's
    texts; `encode(text, add_special_tokens=False)` has not. `decode(ids)` gives text. Texts are
    neither padded nor cut, whatever the file says: as in Transformers, that is asked for. Chat
    templates are not applied.

    Raises:
        FolderError: there is none, or it is broken.
        ImportError: tokenizers is not installed.
    """
    path = local_folder(folder) / TOKENIZER
    try:
        import tokenizers
    except ImportError:
        raise ImportError("a tokenizer takes tokenizers: pip install '.[models]'") from None
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        there = [name for name in _OTHERS if (path.parent / name).exists()]
        if not there:
            raise FolderError(f"{path} is missing: the folder holds no tokenizer") from None
        raise FolderError(
            f"{path} is missing, and {some(there)} is not read; Transformers makes it:"
            " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if is_lfs_pointer(content):
        raise lfs_pointer(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises nothing more special
        reason = " ".join(str(error).split())
        raise FolderError(f"{path} is no tokenizer: {reason[:200]}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer

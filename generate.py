"""Continues a text with a model from a local folder in Hugging Face's format.

python generate.py FOLDER "Once upon a time"      the likeliest tokens, as they come
python generate.py FOLDER - < prompt.txt          the text from standard input
python generate.py FOLDER "..." --temperature 0.8 --top-p 0.95 --seed 1
python generate.py --help                         every option
"""

from training import environment  # isort: skip  # noqa: F401  (what jax reads when loaded)

import contextlib
import dataclasses
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import numpy as np
import tyro

from jattn import UnsupportedAttentionError
from models.decoder import Decoder
from models.folder import FolderError, from_pretrained, load_tokenizer
from models.generation import Generated, TextStream, stream
from models.implementations import AttnImplementation
from training.usage import message_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_DESCRIPTION = """\
Continues a text with a model from a local folder in Hugging Face's format: config.json,
safetensors and tokenizer.json. Prints the new text as it comes."""


class UserError(Exception):
    """Something the user can put right, told in a line."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What one call of generate.py is to do."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """The model's folder."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    """What is to be continued; - reads it from standard input."""

    max_new_tokens: int = 256
    """The most tokens to add."""

    temperature: float = 0.0
    """What divides the logits; 0 takes the likeliest token, without chance."""

    top_k: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: all)")] = None
    """Draw from so many of the likeliest tokens."""

    top_p: Annotated[float | None, tyro.conf.arg(help_behavior_hint="(default: all)")] = None
    """Draw from the smallest set of the likeliest tokens whose mass reaches this share."""

    seed: int = 0
    """Of what is drawn."""

    stop: Annotated[
        tuple[int, ...] | None,
        tyro.conf.arg(metavar="ID ...", help_behavior_hint="(default: the model's own)"),
    ] = None
    """Tokens that end the text."""

    echo: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the text that is continued first."""

    attn_implementation: AttnImplementation = "sdpa"
    """Attention by name; sdpa takes the fastest that can."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and products; auto takes the checkpoint's."""

    prefill_chunk: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 4096)")
    ] = None
    """How many tokens of the text go through the model at once, which bounds the memory for it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments ask; returns 0, 2 for an error, 130 after Ctrl-C."""
    try:
        with _warnings_in_a_line():
            run(parse(list(sys.argv[1:] if argv is None else argv)))
        return 0
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print(flush=True)
        return 130
    except BrokenPipeError:  # nobody reads any more; nor can what is left be flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, FolderError, UnsupportedAttentionError, ImportError, OSError) as error:
        message = " ".join(str(error).split())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        remedy = "lower --max-new-tokens or --prefill-chunk, or take --dtype bfloat16"
        message = f"out of memory; {remedy} ({' '.join(str(error).split())})"
    print(f"generate.py: error: {message}", file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> Options:
    """The options that the arguments make.

    Raises:
        UserError: an argument is missing, unknown or of a value that is not allowed.
        SystemExit: help was asked for and has been printed.
    """
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(Options, prog="generate.py", description=_DESCRIPTION, args=argv)
    except SystemExit as stopped:
        if not stopped.code:
            raise
    raise UserError(f"{message_of(message.getvalue())} (see generate.py --help)")


def run(options: Options) -> None:
    """Reads the folder, then writes what the model adds."""
    text = prompt_of(options)
    tokenizer = load_tokenizer(options.folder)
    ids = tokenizer.encode(text).ids
    if not ids:
        raise UserError("the text has no token to begin with")
    model = from_pretrained(
        options.folder,
        attn_implementation=options.attn_implementation,
        dtype=None if options.dtype == "auto" else options.dtype,
    )
    tokens = tokens_of(model, ids, options)
    if options.echo:
        _write(text)
    for part in texts_of(tokenizer, ids, tokens):
        _write(part)
    _write("\n")


def prompt_of(options: Options) -> str:
    """The text, from the command line or standard input."""
    try:
        if options.text == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        options.text.encode("utf-8")
    except UnicodeError as error:
        raise UserError(f"the text is not UTF-8: {error}") from None
    return options.text


def tokens_of(model: Decoder, ids: Sequence[int], options: Options) -> Iterator[Generated]:
    """The new tokens as they come; the arguments are checked before the first."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "prefill_chunk")
    arguments: dict[str, Any] = {name: getattr(options, name) for name in names}
    try:
        return stream(model, np.asarray([ids]), **arguments)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None


def texts_of(
    tokenizer: "Tokenizer", ids: Sequence[int], tokens: Iterator[Generated]
) -> Iterator[str]:
    """What the tokens of one row say, without special ones."""
    written = TextStream(lambda ids: str(tokenizer.decode(list(ids))), ids)
    for generated in tokens:
        yield written.push(int(generated.tokens[0]))
    yield written.end()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    def show(message: Any, *place: Any) -> None:
        print(f"generate.py: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


if __name__ == "__main__":
    sys.exit(main())

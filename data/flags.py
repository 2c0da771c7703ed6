"""The command line of train.py and evaluate.py: flags from a dataclass, and errors in one line.

Left out on purpose: abbreviations (`--step` for `--steps`), files of arguments.
"""
import os
import sys
from argparse import ArgumentError
from dataclasses import field

from transformers import HfArgumentParser


def flag(default, text: str, **more):
    """A field of a dataclass of flags, with its help text."""
    return field(default=default, metadata={"help": text, **more})


def parse_flags(kind: type, description: str, argv: list[str] | None = None):
    """An instance of the dataclass `kind` from the command line.

    Raises ValueError for what is wrong in it.
    """
    parser = HfArgumentParser(kind, description=description, allow_abbrev=False,
                              exit_on_error=False)
    try:
        flags, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True,
                                                            look_for_args_file=False)
    except ArgumentError as error:
        raise ValueError(error) from None
    if unknown:
        raise ValueError(f"no such flag: {' '.join(unknown)}; --help lists them")
    return flags


def fail(error: Exception) -> int:
    """Print the line "error: …", which torchrun repeats as its last one. Returns exit status 2.

    Call it while `error` is handled.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # Imported here, since it is slow to load.
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler
        error.__traceback__ = error.__cause__ = None  # the message alone
        get_error_handler().record_exception(error)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return 2

"""Data for recipes: rows of eight formats become token ids and targets.

Read `section` (every key), `sources`, `formats`, `chat`, then `prepare`.
"""

import typing

from hf_gradacc._exports import load_when_asked

if typing.TYPE_CHECKING:
    from hf_gradacc.data.chat import encode_chat
    from hf_gradacc.data.formats import encode_row
    from hf_gradacc.data.lengths import pack_blocks
    from hf_gradacc.data.prepare import PreparedData, iter_texts, prepare_data
    from hf_gradacc.data.reader import RowError, RowReader
    from hf_gradacc.data.report import Fate, LengthReport
    from hf_gradacc.data.tokenizer import load_tokenizer, make_collator, train_tokenizer

__all__ = [
    "Fate",
    "LengthReport",
    "PreparedData",
    "RowError",
    "RowReader",
    "encode_chat",
    "encode_row",
    "iter_texts",
    "load_tokenizer",
    "make_collator",
    "pack_blocks",
    "prepare_data",
    "train_tokenizer",
]

_MODULES = {
    "chat": ("encode_chat",),
    "formats": ("encode_row",),
    "lengths": ("pack_blocks",),
    "prepare": ("PreparedData", "iter_texts", "prepare_data"),
    "reader": ("RowError", "RowReader"),
    "report": ("Fate", "LengthReport"),
    "tokenizer": ("load_tokenizer", "make_collator", "train_tokenizer"),
}

if not typing.TYPE_CHECKING:  # a type checker that saw this would take any name for exported
    __getattr__, __dir__ = load_when_asked(__name__, _MODULES)

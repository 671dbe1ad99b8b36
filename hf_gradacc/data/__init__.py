"""Data for recipes: rows of seven formats become token ids and targets."""

from hf_gradacc.data.chat import encode_chat
from hf_gradacc.data.collate import make_collator
from hf_gradacc.data.formats import RowError, RowReader, encode_row
from hf_gradacc.data.lengths import Fate, LengthReport
from hf_gradacc.data.packing import pack_blocks
from hf_gradacc.data.prepare import PreparedData, iter_texts, prepare_data
from hf_gradacc.data.tokenizer import load_tokenizer, train_tokenizer

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

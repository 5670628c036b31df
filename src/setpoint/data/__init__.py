"""Real data, each set with its licence and its origin.

    from setpoint import data

    stdlib = data.text("python-stdlib", context=128)
    for batch in stdlib.batches("train", batch_size=32, seed=0): ...

    digits = data.images("digits")
    for images, labels in digits.batches("train", batch_size=64, seed=0): ...

``setpoint data list`` shows what there is; ``setpoint data get NAME`` fetches a set that is not on this machine.
"""

from setpoint.data.batches import Batches, accuracy, label_loss, next_token_loss, run_inputs
from setpoint.data.corpora import Corpus, Document, corpus, verses
from setpoint.data.labelled import ImageData, Labelled, images
from setpoint.data.shelf import DataSet, get, locate, sets
from setpoint.data.tokenizers import Bytes, Tokenizer, tokenizer_for
from setpoint.data.tokens import TokenData, text

__all__ = [
    "Batches",
    "Bytes",
    "Corpus",
    "DataSet",
    "Document",
    "ImageData",
    "Labelled",
    "TokenData",
    "Tokenizer",
    "accuracy",
    "corpus",
    "get",
    "images",
    "label_loss",
    "locate",
    "next_token_loss",
    "run_inputs",
    "sets",
    "text",
    "tokenizer_for",
    "verses",
]

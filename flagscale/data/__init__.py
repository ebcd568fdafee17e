"""Data preparation: text to tokens, and the way back from a document to the line it came from.

sources.py      lines of plain, gzip and zstd files, with their places
sidecar.py      document -> (file, line, offset, length); needs numpy only
tokenizer.py    trains a byte-level BPE with Aquila's special tokens
preprocess.py   JSONL -> .bin/.idx plus sidecar: parallel, resumable, atomic
corpus.py       the data of the tiny recipe
upstream.py     the one import of megatron in this package
"""

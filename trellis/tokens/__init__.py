"""Ids outside the tokenizer: text and vocabulary of a language model, the sparse form, files, statistics."""

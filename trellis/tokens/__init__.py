"""Tokens as language models and files have them: text, octrees, grammar, Parquet, conversations, statistics."""

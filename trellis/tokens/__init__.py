"""Ids as others take them: text and vocabulary of a language model, a short form without empty tokens, files."""

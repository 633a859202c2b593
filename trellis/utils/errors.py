"""Errors that the user can mend: reported as one message, without a traceback."""


class UserError(Exception):
    """A message that names the file or key, the value found there, and the remedy."""


class ConfigError(UserError):
    """A configuration, a flag or a combination of them that cannot run."""


class DataError(UserError):
    """A data file or folder that is missing, damaged or not in the expected layout."""


class DivergedError(UserError):
    """A training run whose steps are no longer finite numbers. Trying again would end alike."""


class CheckpointError(UserError):
    """Weights or a checkpoint that are missing, damaged or do not fit the models."""

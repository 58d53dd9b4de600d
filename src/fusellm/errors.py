"""What a user did wrong, said so that it can be mended.

Every message gives the value, the place and the cure. An `assert` is for our own mistakes.
"""


class FusellmError(Exception):
    """Base of all errors that a user can cause and mend; shown as one line without a traceback."""


class ArgumentError(FusellmError, ValueError):
    """A function of the library that was given what it cannot use."""


class RecipeError(FusellmError):
    """A recipe that cannot be used: unknown key, wrong value, sources that clash."""


class ModelError(FusellmError):
    """A model folder or hub name that cannot be loaded as asked."""


class TokenizerError(FusellmError):
    """A tokenizer whose tokens cannot be told as bytes, or that changes too much of the text."""


class CorpusError(FusellmError):
    """A corpus that is missing, empty, or too long for a model."""


class StoreError(FusellmError):
    """A stage's folder that is damaged, unfinished, or of a newer version."""


class IdentityError(StoreError):
    """A stage's folder that was made from other settings or other inputs."""


class NumericsError(FusellmError):
    """NaN or infinity where a number is needed."""


class ClusterError(FusellmError):
    """A Ray cluster that cannot be used as asked, or that lost its workers."""


class EvaluationError(FusellmError):
    """A suite whose data, packages or sandbox are missing, or scores that cannot be compared."""

"""The errors a user can meet. Everything else that escapes is a defect of this package."""


class RealmError(Exception):
    """Base of all errors meant for the user.

    The message is one line that says what was wrong, where (file, key, tensor, request), and what
    would be right.
    """


class GGUFError(RealmError):
    """A GGUF file that is broken, contradictory, or asks for something not supported."""


class AdapterError(RealmError):
    """A LoRA adapter that is broken or does not fit the model."""


class RequestError(RealmError):
    """A generation request that cannot be served: empty or over-long prompt, absurd parameters."""

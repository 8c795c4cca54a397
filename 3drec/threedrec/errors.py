"""The one exception that a user's mistake raises, shared with ``nvsadapter_guidance``."""

from nvsadapter_guidance.errors import InputError

__all__ = ["InputError"]

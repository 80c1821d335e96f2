"""Every error that pagelens raises on purpose.

A message names the value, the limit and the remedy. All classes derive from PagelensError, so that a server can
catch one class; the ones that mean "you passed something wrong" also derive from ValueError.
"""


class PagelensError(Exception):
    """Base class of every error raised on purpose by pagelens."""


class ConfigError(PagelensError, ValueError):
    """A user option or a config.json value is unknown, malformed or not implemented."""


class WeightsError(PagelensError, ValueError):
    """A checkpoint file is damaged, or its tensors are not the ones the model needs."""


class ImageError(PagelensError, ValueError):
    """An image cannot be decoded, or is outside the limits."""


class PromptError(PagelensError, ValueError):
    """A prompt cannot be used: its image marks do not match its images, an unknown mode, an empty prompt."""


class CapacityError(PagelensError, ValueError):
    """A request can never fit: the prompt exceeds the context or the KV-cache."""


class ShapeError(PagelensError, ValueError):
    """An operation was called with tensors whose shapes or dtypes break its contract."""


class UnsupportedError(PagelensError):
    """No backend, or not the one that was forced, can run this case on this machine."""


class EngineClosedError(PagelensError, RuntimeError):
    """The engine was closed, its process forked, or its loop died; the message says which."""


class EngineError(PagelensError, RuntimeError):
    """A fault while requests ran: logits that are not finite, a broken block table, a forward pass that raised."""

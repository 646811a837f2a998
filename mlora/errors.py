"""Every error that mlora raises on purpose.

Each message names the value that was seen and the value that was wanted. After any of them the
model, its adapters and its routing are as they were before the call.
"""

from __future__ import annotations


class MloraError(Exception):
    """Base of all errors below."""


class PatchError(MloraError, RuntimeError):
    """The model cannot be patched or unpatched as asked."""


class ModelMovedError(MloraError, RuntimeError):
    """A patched model was asked to change dtype or device, or receives inputs of another one."""


class UnsupportedModelError(MloraError, ValueError):
    """A model with a layer that cannot be served in this way; the message names it."""


class AdapterError(MloraError, ValueError):
    """An adapter's files, tensors or config are missing, damaged or do not fit the model."""


class UnsupportedAdapterError(AdapterError):
    """An adapter of a type, or with an option, that mlora does not serve; the message names it."""


class DuplicateAdapterError(MloraError, ValueError):
    """The name is taken by an adapter that is already loaded."""


class UnknownAdapterError(MloraError, KeyError):
    """No adapter of that name is loaded."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0]) if self.args else ""


class EntryError(MloraError, ValueError):
    """What was given as `adapter_names` cannot be read as one entry a row."""


class MergeError(MloraError, ValueError):
    """Adapters that cannot be merged in the way that was asked for."""


class ConfigError(MloraError, ValueError):
    """A config file that does not follow the schema; the message names the key."""


class DataError(MloraError, ValueError):
    """A data set that cannot be trained on or judged by; the message names the file, the row and the column."""


class MetricError(MloraError, ValueError):
    """A metric that is none, or a function of an answer and its reference that gave no number; the message names the
    function, the task and the row."""


class TrainError(MloraError, RuntimeError):
    """A run that cannot be trained as asked, or does not fit its checkpoint; the message names the run."""


class AttributionError(MloraError, RuntimeError):
    """A module got tokens that cannot be attributed to the rows of the batch, or to the part of a row that an adapter
    applies to; or its weight is read for all rows at once while an adapter changes it for some."""


class TokenError(MloraError, IndexError):
    """A row has a token that the embedding of its adapter does not have. Of ids on a GPU it is raised when the call has
    run, so a cache that was given to it has grown."""


class RoutingError(MloraError, RuntimeError):
    """What is routed has ended, or it cannot be told which of several routings code runs in."""


class AdapterInUseError(MloraError, RuntimeError):
    """The adapter is used by a routing that is still active."""


class CapacityError(MloraError, RuntimeError):
    """The adapters of one batch need more device memory or more slots than there are."""


class RequestError(MloraError, ValueError):
    """A request that cannot be served; the message names the field, or the limit that it is beyond."""


class Overloaded(MloraError, RuntimeError):
    """More requests wait than may. `retry_after`: seconds after which there is likely room again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServeError(MloraError, RuntimeError):
    """A request that was being served and could not be finished: its step failed, or the engine is closed."""

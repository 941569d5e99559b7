"""Generated from the daemon's OpenAPI document by `python/generate.py`: do not edit."""

from ._error import CladeError


class BadAddressError(CladeError):
    """The kind `bad-address`."""


class BadConfigError(CladeError):
    """The kind `bad-config`."""


class BadCountError(CladeError):
    """The kind `bad-count`."""


class BadHostError(CladeError):
    """The kind `bad-host`."""


class BadNameError(CladeError):
    """The kind `bad-name`."""


class BadPathError(CladeError):
    """The kind `bad-path`."""


class BadRequestError(CladeError):
    """The kind `bad-request`."""


class BodyTooLargeError(CladeError):
    """The kind `body-too-large`."""


class CancelledError(CladeError):
    """The kind `cancelled`."""


class EndingError(CladeError):
    """The kind `ending`."""


class ForbiddenError(CladeError):
    """The kind `forbidden`."""


class ForeignOriginError(CladeError):
    """The kind `foreign-origin`."""


class IdentityTakenError(CladeError):
    """The kind `identity-taken`."""


class InternalError(CladeError):
    """The kind `internal`."""


class KeyReusedError(CladeError):
    """The kind `key-reused`."""


class LateBodyError(CladeError):
    """The kind `late-body`."""


class MediaTypeError(CladeError):
    """The kind `media-type`."""


class MethodNotAllowedError(CladeError):
    """The kind `method-not-allowed`."""


class NameTakenError(CladeError):
    """The kind `name-taken`."""


class NoDeviceError(CladeError):
    """The kind `no-device`."""


class NoRoomError(CladeError):
    """The kind `no-room`."""


class NoSuchCheckpointError(CladeError):
    """The kind `no-such-checkpoint`."""


class NoSuchPathError(CladeError):
    """The kind `no-such-path`."""


class NoSuchVmError(CladeError):
    """The kind `no-such-vm`."""


class NoThreadError(CladeError):
    """The kind `no-thread`."""


class NotReadyError(CladeError):
    """The kind `not-ready`."""


class SnapshotConflictError(CladeError):
    """The kind `snapshot-conflict`."""


class TooManyError(CladeError):
    """The kind `too-many`."""


class TooManyLoginsError(CladeError):
    """The kind `too-many-logins`."""


class UnauthorizedError(CladeError):
    """The kind `unauthorized`."""


class VmGoneError(CladeError):
    """The kind `vm-gone`."""


class VmSilentError(CladeError):
    """The kind `vm-silent`."""


class WrongStateError(CladeError):
    """The kind `wrong-state`."""


KINDS: dict[str, type[CladeError]] = {
    "bad-address": BadAddressError,
    "bad-config": BadConfigError,
    "bad-count": BadCountError,
    "bad-host": BadHostError,
    "bad-name": BadNameError,
    "bad-path": BadPathError,
    "bad-request": BadRequestError,
    "body-too-large": BodyTooLargeError,
    "cancelled": CancelledError,
    "ending": EndingError,
    "forbidden": ForbiddenError,
    "foreign-origin": ForeignOriginError,
    "identity-taken": IdentityTakenError,
    "internal": InternalError,
    "key-reused": KeyReusedError,
    "late-body": LateBodyError,
    "media-type": MediaTypeError,
    "method-not-allowed": MethodNotAllowedError,
    "name-taken": NameTakenError,
    "no-device": NoDeviceError,
    "no-room": NoRoomError,
    "no-such-checkpoint": NoSuchCheckpointError,
    "no-such-path": NoSuchPathError,
    "no-such-vm": NoSuchVmError,
    "no-thread": NoThreadError,
    "not-ready": NotReadyError,
    "snapshot-conflict": SnapshotConflictError,
    "too-many": TooManyError,
    "too-many-logins": TooManyLoginsError,
    "unauthorized": UnauthorizedError,
    "vm-gone": VmGoneError,
    "vm-silent": VmSilentError,
    "wrong-state": WrongStateError,
}

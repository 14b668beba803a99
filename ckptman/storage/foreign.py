"""
What the exceptions of fsspec's drivers mean. Drivers differ, so this looks at what all of them show: the class of
the exception, and the HTTP status and the error code of the answer, on it or on what it was raised from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from ckptman.errors import StorageError, redact
from ckptman.storage.base import KeyExists, KeyMissing

_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_TRANSIENT_NAMES = frozenset(
    {
        "ClientConnectionError", "ClientPayloadError", "EndpointConnectionError", "FSTimeoutError", "HTTPClientError",
        "IncompleteRead", "ProxyError", "ResponseParserError", "ServiceRequestError", "ServiceResponseError",
    }
)  # fmt: skip
_TRANSIENT_CODES = frozenset({"SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError", "Throttling"})
_UNREADABLE = "BadHttpMessage"
"""What aiohttp calls an answer that broke off. It gives it the status 400, which no server sent."""
_CREDENTIAL_NAMES = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "CredentialRetrievalError"}
)
_SECRET_OPTION = re.compile(r"key|secret|token|pass|credential|sas|connection_string|authorization", re.IGNORECASE)
_SECRET_PARTS = re.compile(r"(?:AccountKey|SharedAccessSignature|sig)=([^;&\s]+)")  # of Azure's longer texts
_SECRET_VARIABLES = re.compile(r"(AWS|AZURE|GOOGLE|GCS|FSSPEC)_.*(KEY|SECRET|TOKEN|PASSWORD|CONNECTION_STRING).*")
_NO_BUCKET_CODES = frozenset({"NoSuchBucket", "ContainerNotFound"})
_WRONG_CODES = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
    | {"AuthenticationFailed", "InvalidAuthenticationInfo"}
)
_WHERE = "storage_options, or the driver's own environment variables and files"
_PERMISSIONS = {"list": "s3:ListBucket", "read": "s3:GetObject", "create": "s3:PutObject", "delete": "s3:DeleteObject"}


class Unanswered(Exception):
    """
    A try at a create-only put got no answer, so it may take effect yet, whatever the server said of later tries.

    ``__cause__`` is what became of the last one.
    """


def secrets_of(options: Mapping[str, object]) -> frozenset[str]:
    """The texts that must never be shown: what *options* and the environment hold under telling names."""
    found = {text for name, text in _texts(options, "") if _SECRET_OPTION.search(name)}
    found |= {text for name, text in os.environ.items() if _SECRET_VARIABLES.fullmatch(name)}
    found |= {part for text in found for part in _SECRET_PARTS.findall(text)}
    return frozenset(text for text in found if len(text) >= 4)


def _texts(value: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (bytes, bytearray)):
        yield name, value.decode("utf-8", "replace")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{name}.{key}")
    elif isinstance(value, (Sequence, Set)):
        for inner in value:
            yield from _texts(inner, name)


def hidden(text: str, secrets: Iterable[str]) -> str:
    """*text* without any of *secrets*, and without the user and password of a URL."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return redact(text)


def chain(error: BaseException) -> Iterator[BaseException]:
    """*error*, and what it was raised from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the server answered with; None where there was no answer."""
    for one in chain(error):
        if any(cls.__name__ == _UNREADABLE for cls in type(one).__mro__):
            continue
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        for name in ("status", "status_code", "code"):
            status = getattr(one, name, None)
            if isinstance(status, int) and 100 <= status < 600:
                return status
    return None


def code_of(error: BaseException) -> str:
    """The code within the answer, such as ``NoSuchBucket``; empty where there is none."""
    for one in chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, Mapping) and isinstance(response.get("Error"), Mapping):
            return str(response["Error"].get("Code", ""))
        if code := getattr(one, "error_code", None):  # Azure's
            return str(getattr(code, "value", code))
    return ""


def is_missing(error: Exception) -> bool:
    """Whether there is no such key. A bucket that is not there is another matter."""
    return code_of(error) not in _NO_BUCKET_CODES and (isinstance(error, FileNotFoundError) or status_of(error) == 404)


def is_conflict(error: Exception) -> bool:
    """Whether the key was there already, or is being created by another at this moment."""
    return isinstance(error, FileExistsError) or status_of(error) in (409, 412)


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed in a moment."""
    status = status_of(error)
    if status is not None and status >= 300:
        return status in _TRANSIENT_STATUS or code_of(error) in _TRANSIENT_CODES
    if any(isinstance(one, (ConnectionError, TimeoutError)) for one in chain(error)):
        return True
    return any(cls.__name__ in _TRANSIENT_NAMES for one in chain(error) for cls in type(one).__mro__)


def ours(error: Exception, verb: str, key: str, url: str, secrets: Iterable[str]) -> StorageError:
    """What *error*, met while trying to *verb* the *key* of *url*, is among our own errors, without a secret."""
    what = hidden(f"cannot {verb} {key!r} in {url}: {str(error) or type(error).__name__}", secrets)
    if is_conflict(error):
        return KeyExists(f"{what} (it is taken, and never overwritten)", key=key)
    if is_missing(error):
        return KeyMissing(what, key=key)
    if hint := _hint(error, verb):
        what = f"{what} ({hint})"
    failure = StorageError(what, errno=error.errno if isinstance(error, OSError) else None, key=key)
    failure.may_take_effect = isinstance(error, Unanswered) or is_transient(error)
    return failure


def _hint(error: Exception, verb: str) -> str:
    names = {cls.__name__ for one in chain(error) for cls in type(one).__mro__}
    if code_of(error) in _NO_BUCKET_CODES:
        return "the bucket does not exist: create it, or correct its name"
    if names & _CREDENTIAL_NAMES:
        return f"there are no credentials: give them in {_WHERE}"
    if status_of(error) == 401 or code_of(error) in _WRONG_CODES:
        return f"the credentials are wrong or have expired: correct them in {_WHERE}"
    if isinstance(error, PermissionError) or status_of(error) == 403 or str(error).startswith("Forbidden: "):  # gcsfs's
        need = f" ({_PERMISSIONS[verb]} on S3)" if verb in _PERMISSIONS else ""
        return f"these credentials may not {verb} here: permit it{need}, or use others"
    if is_transient(error):
        return "the server did not answer, or was too busy to, also when asked again"
    return ""


def is_presentable(error: BaseException, secrets: Iterable[str]) -> bool:
    """Whether a traceback may show *error*: nothing in it, or in what it was raised from, is secret."""
    return all(hidden(text, secrets) == text for one in chain(error) for text in (str(one), repr(one)))


def without_traceback(error: Exception) -> Exception:
    """
    *error*, and what it was raised from, without the frames that it came through.

    Their variables hold credentials, which some reporters of errors show.
    """
    for one in chain(error):
        one.__traceback__ = None
    return error

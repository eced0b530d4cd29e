"""API keys, of which only hashes are kept."""

import hashlib
import hmac
import pathlib
import re

from dar_jax.serving.errors import ApiError

HASH = re.compile(r"[0-9a-f]{64}")
OWNER_LENGTH = 16
"""Letters of a hash that tell owners apart."""


class ApiKeys:
    """The keys that are let in; without any, everybody is."""

    def __init__(self, hashes: tuple[str, ...] = ()):
        self._hashes = hashes

    @classmethod
    def read(cls, path: str) -> "ApiKeys":
        """Read a file of hashes; an empty path is no file.

        Raises:
            ValueError: the file cannot be read, holds none, or a line that is no hash.
        """
        if not path:
            return cls()
        try:
            lines = pathlib.Path(path).read_text("utf-8", "replace").splitlines()
        except OSError as error:
            raise ValueError(f"config.serve.api_key_file={path}: {error.strerror}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip() and not HASH.fullmatch(line.strip()):
                raise ValueError(
                    f"config.serve.api_key_file={path}, line {number}: expected the SHA-256 of a "
                    "key, 64 hexadecimal digits: printf %s KEY | sha256sum | cut -c -64"
                )
        if not (hashes := tuple(filter(None, map(str.strip, lines)))):
            raise ValueError(f"config.serve.api_key_file={path} holds no key: nobody could enter")
        return cls(hashes)

    def owner(self, authorization: str, otherwise: str) -> str:
        """Tell whose request it is: the key's, or, where no key is asked for, `otherwise`.

        Every key is compared, in a time that does not depend on how much of it is right.

        Args:
            authorization: header of the request.
            otherwise: name of an owner.

        Raises:
            ApiError: a key is missing or wrong.
        """
        if not self._hashes:
            return otherwise
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "an API key is missing: Authorization: Bearer KEY")
        given = hashlib.sha256(key.strip().encode()).hexdigest()
        if not sum([hmac.compare_digest(given, known) for known in self._hashes]):
            raise ApiError(
                401, "the API key is wrong: pass one that the server knows", code="invalid_api_key"
            )
        return given[:OWNER_LENGTH]

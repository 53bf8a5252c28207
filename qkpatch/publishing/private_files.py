"""What is not published unless somebody insists: secrets, by their names, and what SOURCE only reached by links."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

_PUBLIC = ".gitattributes"  # at the top, where the Hub keeps one itself

# Any part of a path, in lower case. Model files have tokenizers, not tokens.
_PRIVATE = (
    ".*", "__pycache__", "*.pyc",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "ssh_host_*", "*.pem*", "*.key", "*.key.*", "*.key~", "*.ppk",
    "*.p12*", "*.pfx*", "*.jks", "*.keystore", "*.kdb", "*.kdbx*", "*private_key*", "*private-key*", "wallet.dat",
    "_netrc", "netrc", "*credential*", "secret", "secret.*", "secrets*", "*_secret", "*_secret.*", "*_secrets*",
    "*-secrets*", "client_secret*", "service_account*.json", "service-account*.json", "kubeconfig*", "htpasswd",
    "passwd", "password*", "pgpass*", "rclone.conf", "*.env", "env.local", "auth.json",
    "token", "token.txt", "token.json", "*_token", "*_token.txt", "*-token", "*-token.txt", "hf_token*", "hf-token*",
    "access_token*", "api_key*", "apikey*", "api-key*", "*.token", "*_token.json", "*-token.json", "token.*",
    "*.asc", "*.gpg", "*.der", "*.pk8", "*.rsa", "*.env.*", "*secret?key*", "secretkey*", "*password*", "ssh_key*",
    "kaggle.json", "cookies.txt",
)  # fmt: skip


def is_private(name: str) -> bool:
    """Whether a path is by its name one of those that nobody publishes on purpose."""
    parts = name.casefold().split("/")
    return name != _PUBLIC and any(fnmatchcase(part, pattern) for part in parts for pattern in _PRIVATE)


@dataclass(frozen=True)
class Insisted:
    """What the user wants to be published all the same."""

    names: tuple[str, ...] = ()  # globs, for what SOURCE reached by links that lead out of it
    hidden: bool = False  # what is private by its name

    def withholds(self, name: str, outside: Collection[str]) -> str | None:
        """The flag without which a file is not published; None for one that is."""
        if name in outside and not any(fnmatchcase(name, pattern) for pattern in self.names):
            return "--include"
        return "--include-hidden" if is_private(name) and not self.hidden else None

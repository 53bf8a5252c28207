"""Names in a folder that are none of the model's: who leaves such things there, and what is done with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import translate
from functools import cache

# At the top of a folder, and never looked into, in SOURCE as in OUT: git's own, and what huggingface_hub notes.
BOOKKEEPING = (".git", ".cache/huggingface")

# In a folder that was edited in place: what leads back; the same while rows are of both sides; what a kill may leave.
UNDO, UNFINISHED, PART = "qkpatch.undo", "qkpatch.undo.unfinished", "qkpatch.undo.part"

# In OUT in a store, while it is not whole: whose it is, and what is done.
CLAIM = "qkpatch.unfinished"

# Patterns as of `matching`, and who makes such things without being asked. Left out of OUT; where one comes into OUT
# afterwards, it is named and does not matter. Nothing that is ever run or loaded belongs here.
RUBBISH = {
    "._*": "macOS", ".DS_Store": "macOS", "__MACOSX": "macOS", ".Spotlight-V100": "macOS", ".Trashes": "macOS",
    ".fseventsd": "macOS", "Thumbs.db": "Windows", "desktop.ini": "Windows", "$RECYCLE.BIN": "Windows",
    "System Volume Information": "Windows", ".Trash-*": "Linux", ".directory": "Linux", "lost+found": "Linux",
    ".nfs[0-9a-f]*": "NFS", ".fuse_hidden*": "FUSE", ".smbdelete*": "SMB", "@eaDir": "Synology",
    ".git": "git", ".hg": "Mercurial", ".svn": "Subversion", ".idea": "JetBrains",
    ".cache/huggingface": "huggingface_hub", ".locks": "huggingface_hub",
    "._____temp": "ModelScope", ".mdl": "ModelScope", ".msc": "ModelScope", ".mv": "ModelScope",
    ".ipynb_checkpoints": "Jupyter", ".~lock.*": "LibreOffice", ".*.sw[nop]": "vim",
    f"{UNDO}*": "qkpatch", CLAIM: "qkpatch",
}  # fmt: skip

# Left out of OUT as well, and said: states of a run that the edited weights are no longer of.
LEFTOVERS = {
    "checkpoint-[0-9]*": "a trainer", "global_step[0-9]*": "DeepSpeed", "zero_to_fp32.py": "DeepSpeed",
    "optimizer.pt": "a trainer", "optimizer.bin": "a trainer", "optimizer_[0-9]*": "FSDP",
    "pytorch_model_fsdp_[0-9]*": "FSDP", "scheduler.pt": "a trainer", "scheduler.bin": "a trainer",
    "scaler.pt": "a trainer", "rng_state*.pth": "a trainer", "random_states_*.pkl": "accelerate",
    "trainer_state.json": "a trainer", "training_args.bin": "a trainer", "events.out.tfevents.*": "TensorBoard",
    "wandb": "wandb", "mlruns": "MLflow", "__pycache__": "Python",
}  # fmt: skip

USUAL = (*RUBBISH, *LEFTOVERS)

# Any part of a path, in lower case. Model files have tokenizers, not tokens.
_SECRET = (
    ".env*", ".netrc*", ".ssh", ".aws", ".azure", ".kube", ".docker", ".gnupg", ".npmrc", ".pypirc", ".pgpass",
    ".git-credentials", ".htpasswd", ".huggingface",
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
_HIDDEN = (".*", "__pycache__", "*.pyc")
# The first is the Hub's, which puts it into every repository.
_OUT_ALONE = (".gitattributes", ".gitignore", ".hgignore")
# At the top of an OUT that is replaced: what people work with.
KEPT = (".git", ".hg", ".svn", ".idea", *_OUT_ALONE)


def matching(name: str, patterns: Collection[str]) -> str | None:
    """What of ``name`` a pattern means: the file, or a folder that it lies in; None where none means any.

    A pattern is a glob of the last parts of a path, as ``*.gguf``, ``checkpoint-100`` or ``original/*``.
    """
    means = _regex(tuple(patterns)).match
    ends = (*(i for i, c in enumerate(name) if c == "/"), len(name))
    return next((name[:end] for end in ends if means(name[:end])), None) if patterns else None


@cache
def _regex(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(
        "|".join(rf"(?s:.*/)?{translate(pattern.removeprefix('./').rstrip('/'))}" for pattern in patterns)
    )


def came_by_itself(name: str, recorded: Collection[str]) -> bool:
    """Whether a file of OUT is nobody's wish: rubbish that no manifest records."""
    return name not in recorded and matching(name, (*RUBBISH, *_OUT_ALONE)) is not None


def is_secret(name: str) -> bool:
    """Whether a path is by its name one of those that hold what nobody should know."""
    return matching(name.casefold(), _SECRET) is not None


def is_private(name: str) -> bool:
    """Whether a path is by its name one of those that nobody publishes on purpose."""
    return name != ".gitattributes" and matching(name.casefold(), (*_HIDDEN, *_SECRET)) is not None


def usual_beside(recorded: Iterable[str]) -> tuple[str, ...]:
    """What is left out where a manifest is of files ``recorded``: versions before carried some of it over."""
    left = USUAL
    for name in recorded:
        if matching(name, left):
            left = tuple(pattern for pattern in left if not matching(name, (pattern,)))
    return left

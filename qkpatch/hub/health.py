"""Whether the Hub can be spoken to from here. Sends no token."""

from __future__ import annotations

from qkpatch.errors import redact

_SECONDS = 5.0


def hub_health() -> dict[str, str]:
    """The endpoint, whether it answers, and whether there is a token, which is not shown."""
    from huggingface_hub import constants, get_session, get_token

    found = {"endpoint": redact(constants.ENDPOINT), "token": "present" if get_token() else "none"}
    if constants.HF_HUB_OFFLINE:
        return {**found, "state": "offline, as HF_HUB_OFFLINE says"}
    try:
        status = get_session().head(constants.ENDPOINT, timeout=_SECONDS).status_code
    except Exception as error:  # any client's, of any version: this only tells
        return {**found, "state": f"not reachable: {type(error).__name__}"}
    return {**found, "state": f"reachable (HTTP {status})"}

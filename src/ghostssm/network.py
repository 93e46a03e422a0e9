"""Whether the hub can be reached, which its client finds out only after many tries."""

from __future__ import annotations

_PATIENCE = 5.0
"""Seconds."""


def hub_answers() -> bool:
    """Whether the hub answers at all, asked once; proxies and HF_ENDPOINT count, as in its client."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # the classes of the client's own client differ between its versions
        return False
    return True

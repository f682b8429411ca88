"""Triton's administration, which is closed behind a key, and what the launcher asks of it."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path

from prism_trt.errors import PrismError

HEADER = "admin-key"
"""HTTP header with the key; gRPC's is ``triton-grpc-protocol-admin-key``."""

_RESTRICTED = "shared-memory,model-repository,model-config,trace,logging,statistics"
_LEAST_CHARACTERS = 16
_KEY = re.compile(r"[!-~]+")
_READY = "READY"
_ABSENT = {"LOADING": "is being loaded", "UNLOADING": "is being unloaded"}


def read_key(path: Path) -> str:
    """The key in a file; space around it does not count.

    Raises:
        PrismError: the file cannot be read or holds no such key.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise PrismError(f"cannot read the key {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PrismError(f"{path} is not a text file: write one key into it") from None
    if len(key) < _LEAST_CHARACTERS:
        raise PrismError(f"the key in {path} has {len(key)} characters: choose one of at least {_LEAST_CHARACTERS}")
    if not _KEY.fullmatch(key):
        raise PrismError(f"the key in {path} is not one word of ASCII letters, digits and signs: choose such a key")
    return key


def restriction(key: str) -> str:
    """The value of Triton's options that close its administration to all who lack `key`."""
    return f"{_RESTRICTED}:{HEADER}={key}"


def absence(host: str, port: int, key: str, model: str) -> str | None:
    """Why `model` cannot be used, by the index of the repository; None: it can, or the server does not say.

    A model that died or hangs is not absent: for the index it is ready.
    """
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("POST", "/v2/repository/index", body="{}", headers={HEADER: key})
        response = connection.getresponse()
        if response.status != http.client.OK:
            return None
        states = {entry["name"]: entry.get("state") for entry in json.loads(response.read())}
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        connection.close()
    state = states.get(model)
    return None if state == _READY else f"the model {_ABSENT.get(str(state), 'is not loaded: load it again')}"

"""Files of the Hugging Face hub, from the local cache or over the network, with a clear word when there is none."""

import os
import socket
from urllib.parse import urlparse

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from utils import InputError


def hub_file(name, filenames, key):
    """The local path of the first of filenames that the hub repository `name` has.

    key: the configuration key or flag in messages. Raises InputError if the hub is out of reach or has no such file.
    """
    wanted = " or ".join(filenames)
    problem = f"{key}: {name} is no local file or folder and"
    try:
        for filename in filenames:
            try:
                return hf_hub_download(name, filename, local_files_only=True)
            except LocalEntryNotFoundError:
                continue
        _check_network(f"{problem} the hub cannot be reached: connect, or name a local copy of {wanted}")
        for filename in filenames:
            try:
                return hf_hub_download(name, filename)
            except EntryNotFoundError:
                continue
    except HFValidationError:
        raise InputError(f"{problem} no hub name either: check the path") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{problem} the hub does not give it ({reason}): name a local copy of {wanted}") from None
    raise InputError(f"{problem} the hub repository has no {wanted}")


def _check_network(message):
    """The hub's client retries for the better part of a minute; a failed look-up says the same at once."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        raise InputError(message) from None

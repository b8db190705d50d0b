"""Files of the Hugging Face hub, from its local cache or over the network."""

from contextlib import suppress
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RemoteEntryNotFoundError,
)  # fmt: skip

from utils import InputError


def hub_file(name, filenames, key):
    """Return the local path of the first of filenames that the hub repository `name` has.

    key: the configuration key or flag in messages. Raises InputError if the hub cannot be reached or has no such file; the
    kind of the error is network where the name may be right.
    """
    wanted = " or ".join(filenames)
    problem, remedy = f"{key}: {name} is not a local file or folder, and", f"name a local copy of {wanted}"
    try:
        for filename in filenames:
            with suppress(LocalEntryNotFoundError):
                return hf_hub_download(name, filename, local_files_only=True)
        with suppress(HfHubHTTPError):  # any answer will do; without a network hf_hub_download retries for half a minute
            get_hf_file_metadata(hf_hub_url(name, filenames[0]))
        for filename in filenames:
            with suppress(RemoteEntryNotFoundError):
                return hf_hub_download(name, filename)
    except HFValidationError:
        hint = "download it first (Download.py --url) and name the file" if "://" in name else "check the path"
        raise InputError(f"{problem} not a valid hub name: {hint}") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{problem} the hub cannot be reached in offline mode: unset HF_HUB_OFFLINE, or {remedy}",
                         "network") from None
    except HfHubHTTPError as error:
        kind = "other" if error.response.status_code in range(400, 500) else "network"
        raise InputError(f"{problem} the hub does not give it ({_first_line(error)}): check the name, or {remedy}",
                         kind) from None
    except Exception as error:  # of the network; the hub's client does not say which
        proxies, scheme = getproxies(), urlsplit(constants.ENDPOINT).scheme
        proxy = proxies.get(scheme) or proxies.get("all", "")
        shown = proxy.rpartition("@")[2]  # without a password
        hint = f"check the proxy {shown} (variable {scheme}_proxy)" if proxy else f"connect to {constants.ENDPOINT}"
        raise InputError(f"{problem} the hub cannot be reached ({_first_line(error)}): {hint}, or {remedy}",
                         "network") from None
    raise InputError(f"{problem} the hub repository has no {wanted}")


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

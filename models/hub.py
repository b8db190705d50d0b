"""Files that the configuration names: on this machine, or of the Hugging Face hub, from its cache or over the network."""

from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RemoteEntryNotFoundError,
)  # fmt: skip

from utils import InputError


def find_file(source, filenames, key):
    """Return the path of a local file, or of the first of filenames in a local folder or in a repository of the hub.

    key: the configuration key or flag in messages. Raises InputError if there is none; its kind is network where the hub
    cannot be reached, so that the name may be right.
    """
    path, wanted = Path(source), " or ".join(filenames)
    if path.is_file():
        return path
    if path.is_dir():
        for filename in filenames:
            if (path / filename).is_file():
                return path / filename
        raise InputError(f"{key}: folder {source} has no {wanted}")
    problem, remedy = f"{key}: {source} is not a local file or folder, and", f"name a local copy of {wanted}"
    try:
        return _hub_file(str(source), filenames)
    except HFValidationError:
        hint = "download it first (Download.py --url) and name the file" if "://" in str(source) else "check the path"
        raise InputError(f"{problem} not a valid hub name: {hint}") from None
    except RemoteEntryNotFoundError:
        raise InputError(f"{problem} the hub repository has no {wanted}") from None
    except OfflineModeIsEnabled:
        reason, kind = "the hub cannot be reached in offline mode: unset HF_HUB_OFFLINE", "network"
    except HfHubHTTPError as error:
        reason = f"the hub does not give it ({_first_line(error)}): check the name"
        kind = "other" if error.response.status_code in range(400, 500) else "network"
    except Exception as error:  # of the network; the hub's client does not say which
        reason = (f"the hub cannot be reached ({_first_line(error)}): check the connection to {constants.ENDPOINT} and the "
                  "proxy variables")  # fmt: skip
        kind = "network"
    raise InputError(f"{problem} {reason}, or {remedy}", kind)


def _hub_file(name, filenames):
    for filename in filenames:
        with suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(name, filename, local_files_only=True))
    with suppress(HfHubHTTPError):  # any answer will do; without a network hf_hub_download retries for half a minute
        get_hf_file_metadata(hf_hub_url(name, filenames[0]))
    *others, last = filenames
    for filename in others:
        with suppress(RemoteEntryNotFoundError):
            return Path(hf_hub_download(name, filename))
    return Path(hf_hub_download(name, last))


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

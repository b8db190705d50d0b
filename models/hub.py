"""Files that the configuration names: on this machine, or of the Hugging Face hub, from its cache or over the network."""

import functools
import re
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
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
    except HfHubHTTPError as error:
        reason = f"the hub does not give it ({_first_line(error)}): check the name"
        kind = "other" if error.response.status_code in range(400, 500) else "network"
    except Exception as error:  # of the network; the hub's client does not say which
        reason, kind = _out_of_reach(error), "network"
    raise InputError(f"{problem} {reason}, or {remedy}", kind)


@functools.cache  # a process sees one version, whatever is pushed meanwhile
def find_repository(source, filenames, key):
    """Return the folder of a hub repository's files, all of one commit: of USER/NAME, or USER/NAME@REVISION.

    filenames: tuple of those that it must have, each a name or a tuple of names, of which the first that is there counts. The
    hub is asked which commit the revision is; out of its reach, the last one that was fetched is used, with a note. Raises
    InputError.
    """
    name, _, revision = source.partition("@")
    revision, wanted = revision or "main", f"{key}: {source} is not a local file or folder, and"
    local, problem = bool(re.fullmatch("[0-9a-f]{40}", revision)), None
    # the hub is asked for metadata first: without a network hf_hub_download retries for half a minute
    if not local:
        try:
            get_hf_file_metadata(hf_hub_url(name, filenames[0], revision=revision))
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise InputError(f"{wanted} {_refusal(error, filenames[0])}") from None
            local, problem = True, error
        except HFValidationError:
            raise InputError(f"{wanted} not a valid hub name: check the path") from None
        except Exception as error:  # of the network; the hub's client does not say which
            local, problem = True, error
    try:
        folder = _fetch(name, revision, filenames, local)
    except LocalEntryNotFoundError:
        if problem:
            raise InputError(f"{wanted} {_out_of_reach(problem)}, or name a local file", "network") from None
        try:
            get_hf_file_metadata(hf_hub_url(name, filenames[0], revision=revision))
            folder = _fetch(name, revision, filenames, False)
        except Exception as error:  # of a commit that is not in the cache
            raise InputError(f"{wanted} {_refusal(error, filenames[0])}", "network") from None
    except Exception as error:
        raise InputError(f"{wanted} {_refusal(error, filenames[0])}") from None
    if problem:
        print(f"note: {_out_of_reach(problem)}; using commit {folder.name[:8]} of {name} from the cache", file=sys.stderr)
    return folder


def _fetch(name, revision, filenames, local):
    """Return the folder in the cache of the files of a repository, fetched unless `local`. Raises the hub's errors."""
    for choice in filenames:
        *others, last = [choice] if isinstance(choice, str) else choice
        for filename in [*others, last]:
            with nullcontext() if filename == last else suppress(EntryNotFoundError):
                path = Path(hf_hub_download(name, filename, revision=revision, local_files_only=local))
                break
        revision = path.parent.name  # the other files are of the same commit
    return path.parent


def upload(folder, name, public=False, overwrite=False):
    """Upload a folder to the hub as the repository USER/NAME, in one commit; return its address. Raises InputError.

    A new one is private unless public. One that has files already is refused unless overwrite.
    """
    api = HfApi()
    try:
        if api.repo_exists(name):
            files = set(api.list_repo_files(name)) - {".gitattributes"}
            if files and not overwrite:
                raise InputError(f"--push {name}: the repository exists already and has {len(files)} files: choose another "
                                 "name, or add --overwrite")  # fmt: skip
        else:
            api.create_repo(name, private=not public)
        return api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of a checkpoint",
                                 ignore_patterns=".*").commit_url  # fmt: skip
    except InputError:
        raise
    except HFValidationError:
        raise InputError(f"--push {name}: not a valid name of a repository, write USER/NAME") from None
    except Exception as error:  # of the hub or the network; the client does not say which
        raise InputError(f"--push {name}: {_refusal(error, name)}") from None


def _refusal(error, filename):
    """What is wrong where the hub answers, or where nothing does."""
    if isinstance(error, RemoteEntryNotFoundError):
        return f"the hub repository has no {filename}: is it one that Export.py --push has written?"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        remedy = "log in (hf auth login) or set HF_TOKEN, and check the name" if status in (401, 403) else "check the name"
        return f"the hub does not give it ({_first_line(error)}): {remedy}"
    return _out_of_reach(error)


def _out_of_reach(error):
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub cannot be reached in offline mode: unset HF_HUB_OFFLINE"
    return (f"the hub cannot be reached ({_first_line(error)}): check the connection to {constants.ENDPOINT} and the proxy "
            "variables")  # fmt: skip


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

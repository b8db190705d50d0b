"""Files that the configuration names, on this machine or in a repository of the Hugging Face hub."""

import functools
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    set_client_factory,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory

from utils import InputError, printable

# huggingface_hub makes file names of these headers
FILE_NAMES = ("ETag", "X-Linked-ETag", "X-Repo-Commit", "X-Xet-Hash")
# exceptions of the client if the hub refuses or cannot be reached
NETWORK = (HTTPError, OfflineModeIsEnabled)


def find_file(source, filenames, key):
    """Return the path of a local file, or of the first of filenames in a local folder or in a
    repository of the hub.

    key: the configuration key or flag in messages. Raises InputError as `fetch` does.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        return fetch(str(source), (tuple(filenames),), key)[0]
    for filename in filenames:
        if (path / filename).is_file():
            return path / filename
    raise InputError(f"{key}: folder {source} has no {' or '.join(filenames)}")


@functools.cache  # a process uses one commit, even if a newer one is pushed meanwhile
def fetch(source, filenames, key):
    """Return the paths of a repository's files in the hub's cache, all of one commit.

    The newest commit is fetched. If the hub is out of reach, the commit that was fetched last is
    used, with a note. A commit in the cache needs no network.

    Args:
        source: USER/NAME, or USER/NAME@REVISION.
        filenames: a tuple of alternative names for each file; the first one in the repository is used.
        key: the configuration key or flag in messages.

    Raises InputError. Its kind is "network" if the hub cannot be reached: the name may still be
    right.
    """
    name, _, revision = source.partition("@")
    revision, paths, choices = revision or "main", [], filenames[0]
    wanted = f"{key}: {source} is not a local file or folder, and"
    _check_answers()
    try:
        problem = _out_of_reach(name, choices[0], revision)
        for choices in filenames:
            paths.append(_download(name, choices, revision, bool(problem)))
            revision = paths[-1].parent.name  # the other files are of the same commit
    except HFValidationError:
        hint = "download it first and name the file" if "://" in source else "check the path"
        raise InputError(f"{wanted} not a valid hub name: {hint}") from None
    except RemoteEntryNotFoundError:
        raise InputError(
            f"{wanted} the hub repository has no {' or '.join(choices)}: check the name"
        ) from None
    except (LocalEntryNotFoundError, *NETWORK) as error:
        cause = error if isinstance(error, NETWORK) else problem or error.__cause__ or error
        kind = "other" if _refuses(cause) else "network"
        raise InputError(
            f"{wanted} {_explain(cause)}, or name a local copy of {' or '.join(choices)}", kind
        ) from None
    if problem:
        print(
            f"note: {_explain(problem)}; using commit {revision[:8]} of {name} from the cache",
            file=sys.stderr,
        )
    return paths


@functools.cache
def _check_answers():
    """Make the hub's client refuse responses that would make it write outside of its cache."""

    def check(response):
        for header in FILE_NAMES if response.request.method == "HEAD" else ():
            value = response.headers.get(header, "x")
            if not re.fullmatch(r'(W/)?"?[\w-]{1,200}"?', value):
                raise InputError(
                    f"the hub at {response.url.host} sends the header {header}: {ascii(value)[:200]}, which is not "
                    "a file name of its cache: check HF_ENDPOINT"
                )

    def client():
        client = default_client_factory()
        client.event_hooks["response"].append(check)
        return client

    set_client_factory(client)


def _out_of_reach(name, filename, revision):
    """Return the error if the hub cannot be reached, None if it responds or the commit is cached.
    Raises refusals.

    Without this check hf_hub_download would try for half a minute if there is no network.
    """
    if ".." in revision:  # a path outside of the cache
        raise HFValidationError(revision)
    if re.fullmatch("[0-9a-f]{40}", revision) and isinstance(
        try_to_load_from_cache(name, filename, revision=revision), str
    ):
        return None
    try:
        with suppress(RemoteEntryNotFoundError):
            get_hf_file_metadata(hf_hub_url(name, filename, revision=revision))
    except NETWORK as error:
        if _refuses(error):
            raise
        return error
    return None


def _download(name, choices, revision, local):
    """Return the cached path of the first of `choices` in a repository; fetch it unless `local`."""
    *others, last = choices
    for filename in others:
        with suppress(EntryNotFoundError):
            return Path(hf_hub_download(name, filename, revision=revision, local_files_only=local))
    return Path(hf_hub_download(name, last, revision=revision, local_files_only=local))


@contextmanager
def _pushing(name):
    """Raise InputError if the hub refuses or cannot be reached."""
    try:
        yield HfApi()
    except HFValidationError:
        raise InputError(
            f"--push {name}: not a valid name of a repository, write USER/NAME"
        ) from None
    except NETWORK as error:
        raise InputError(f"--push {name}: {_explain(error)}") from None


def check_repository(name):
    """Raise InputError if the repository USER/NAME has files already."""
    with _pushing(name) as api:
        files = set(api.list_repo_files(name)) - {".gitattributes"} if api.repo_exists(name) else ()
    if files:
        raise InputError(
            f"--push {name}: the repository exists already and has {len(files)} files: choose another name, or add "
            "--overwrite"
        )


def upload(folder, filenames, name, public=False):
    """Upload files of a folder to the repository USER/NAME in one commit; return its address.
    Raises InputError.

    A new repository is private unless public.
    """
    with _pushing(name) as api:
        api.create_repo(name, private=not public, exist_ok=True)
        return api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=filenames,
            commit_message="Export of a checkpoint",
        ).commit_url


def _refuses(error):
    """Return whether the hub refuses a request, so that another attempt would fail too."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def _explain(error):
    """Return the message of an error of the hub's client, with the remedy."""
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub cannot be reached in offline mode: unset HF_HUB_OFFLINE"
    said = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
    if not _refuses(error):
        return f"the hub cannot be reached ({said}): check the connection to {constants.ENDPOINT} and the proxy variables"
    login = (
        "log in (hf auth login) or set HF_TOKEN, and "
        if error.response.status_code in (401, 403)
        else ""
    )
    return f"the hub does not give it ({said}): {login}check the name"

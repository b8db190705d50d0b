"""Files of the configuration: local ones, or files of repositories of the Hugging Face hub."""

import functools
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
)

from utils import InputError, permitted, printable

# huggingface_hub uses these headers as file names
FILE_NAMES = ("ETag", "X-Linked-ETag", "X-Repo-Commit", "X-Xet-Hash")
# errors of the client if the hub refuses or cannot be reached
NETWORK = (errors.HTTPError, errors.OfflineModeIsEnabled)


@permitted()
def find_file(source: Path | str, filenames: Iterable[str], key: str) -> Path:
    """Return the path of a local file, or of a file in a local folder or a hub repository.

    Args:
        source: The file, the folder, or USER/NAME[@REVISION].
        filenames: Names to look for in a folder or repository; the first one found is used.
        key: Configuration key or flag, for messages.

    Raises:
        InputError: There is no such file, see `fetch`.
    """
    path, filenames = Path(source), tuple(filenames)
    if path.is_file():
        return path
    if not path.is_dir():
        return fetch(str(source), (filenames,), key)[0]
    for filename in filenames:
        if (path / filename).is_file():
            return path / filename
    raise InputError(f"{key}: folder {source} has no {' or '.join(filenames)}; check the path")


@functools.cache  # a process uses one commit, even if a newer one is pushed meanwhile
def fetch(source: str, filenames: tuple[tuple[str, ...], ...], key: str) -> list[Path]:
    """Return the paths of a repository's files in the hub's cache, all of one commit.

    If the hub cannot be reached, the commit that was downloaded last is used, with a note.

    Args:
        source: USER/NAME or USER/NAME@REVISION.
        filenames: Alternative names of each file; the first one in the repository is used.
        key: Configuration key or flag, for messages.

    Raises:
        InputError: The files cannot be downloaded.
    """
    name, _, revision = source.partition("@")
    revision, paths, choices = revision or "main", [], filenames[0]
    wanted, problem = f"{key}: {source} is not a local file or folder, and", None
    _check_responses()
    try:
        problem = _probe(name, choices[0], revision)
        for choices in filenames:
            paths.append(_download(name, choices, revision, bool(problem)))
            revision = paths[-1].parent.name  # the other files are of the same commit
    except errors.HFValidationError:
        hint = "download it first and name the file" if "://" in source else "check the path"
        raise InputError(f"{wanted} not a valid hub name; {hint}") from None
    except errors.RemoteEntryNotFoundError:
        raise InputError(
            f"{wanted} the hub repository of this name has no {' or '.join(choices)}; check the"
            " name"
        ) from None
    except (errors.LocalEntryNotFoundError, *NETWORK) as error:
        cause = error if isinstance(error, NETWORK) else problem or error.__cause__ or error
        raise InputError(
            f"{wanted} {_explain(cause)}, or name a local copy of {' or '.join(choices)}"
        ) from None
    if problem:
        print(
            f"note: using commit {revision[:8]} of {name} from the cache, because"
            f" {_explain(problem)}",
            file=sys.stderr,
        )
    return paths


def _probe(name: str, filename: str, revision: str) -> Exception | None:
    """Return the error if the hub cannot be reached.

    Without a network, hf_hub_download (huggingface_hub 2.4) retries for 23 s for each file.

    Raises:
        HFValidationError: The revision is a path.
        HfHubHTTPError: The hub refuses.
    """
    if ".." in revision:  # would be a path outside of the cache
        raise errors.HFValidationError
    if re.fullmatch("[0-9a-f]{40}", revision):  # needs no network if it is in the cache
        return None
    try:
        with suppress(errors.RemoteEntryNotFoundError):
            get_hf_file_metadata(hf_hub_url(name, filename, revision=revision))
    except NETWORK as error:
        if _refuses(error):
            raise
        return error
    return None


def _download(name: str, choices: tuple[str, ...], revision: str, local: bool) -> Path:
    """Return the cached path of the first of `choices` in a repository; fetch it unless `local`."""
    *others, last = choices
    for filename in others:
        with suppress(errors.EntryNotFoundError):
            return Path(hf_hub_download(name, filename, revision=revision, local_files_only=local))
    return Path(hf_hub_download(name, last, revision=revision, local_files_only=local))


def _check_responses() -> None:
    """Make the hub's client refuse responses that would make it write outside of its cache."""
    hooks = get_session().event_hooks["response"]
    if _check_headers not in hooks:
        hooks.append(_check_headers)


def _check_headers(response: Any) -> None:
    for header in FILE_NAMES if response.request.method == "HEAD" else ():
        value = response.headers.get(header, "x")
        if not re.fullmatch(r'(W/)?"?[\w-]{1,200}"?', value):
            raise InputError(
                f"the hub at {response.url.host} sends the header {header}: {ascii(value)[:200]},"
                " which cannot be a file name in the cache; check HF_ENDPOINT"
            )


@contextmanager
def _pushing(name: str) -> Iterator[HfApi]:
    """Raise InputError if the hub refuses or cannot be reached."""
    try:
        yield HfApi()
    except errors.HFValidationError:
        raise InputError(
            f"--push {name}: not a valid name of a repository; write USER/NAME"
        ) from None
    except NETWORK as error:
        raise InputError(f"--push {name}: {_explain(error)}") from None


def check_repository(name: str) -> None:
    """Raise InputError if the repository USER/NAME has files already."""
    with _pushing(name) as api:
        files = set(api.list_repo_files(name)) - {".gitattributes"} if api.repo_exists(name) else ()
    if files:
        raise InputError(
            f"--push {name}: the repository exists already and has {len(files)} files; choose"
            " another name, or add --overwrite"
        )


def upload(folder: Path | str, filenames: list[str], name: str, public: bool = False) -> str:
    """Upload files of a folder to a repository in one commit.

    Args:
        folder: Folder of the files.
        filenames: Names of the files.
        name: USER/NAME of the repository.
        public: Whether a new repository is public. Default: private.

    Returns:
        The URL of the commit.

    Raises:
        InputError: The hub refuses or cannot be reached.
    """
    with _pushing(name) as api:
        api.create_repo(name, private=not public, exist_ok=True)
        return api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=filenames,
            commit_message="Export of a checkpoint",
        ).commit_url


def _refuses(error: BaseException) -> TypeGuard[errors.HfHubHTTPError]:
    """Return whether the hub refuses a request, so that another attempt would fail too."""
    return isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500


def _explain(error: BaseException) -> str:
    """Return the message of an error of the hub's client, with the remedy."""
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub cannot be reached in offline mode; unset HF_HUB_OFFLINE"
    text = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
    if not _refuses(error):
        return (
            f"the hub cannot be reached ({text}); check the connection to {constants.ENDPOINT} and"
            " the proxy variables"
        )
    login = "log in (hf auth login) or set HF_TOKEN, and "
    login *= error.response.status_code in (401, 403)
    return f"the hub refuses the request ({text}); {login}check the name"

"""Plan files, and other small files, in a folder or in a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from visattn._atomic import read_text, write_whole
from visattn.plan.json_format import MAX_BYTES

__all__ = ["PLAN_FILE", "find", "load", "push", "save"]

PLAN_FILE = "visattn_plan.json"


def save(text: str, folder: str | os.PathLike[str]) -> None:
    """Write ``text`` as ``visattn_plan.json`` into a folder, which is created if it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder) / PLAN_FILE, text.encode())


def find(
    source: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | None,
    local_files_only: bool,
    file: str = PLAN_FILE,
    what: str = "plan",
) -> Path:
    """Return the path of a file, which is downloaded if ``source`` is a hub id.

    Args:
        source: path of the file, of a folder that holds it, or a hub id.
        revision: branch, tag or commit of the repository.
        token: access token for the hub.
        local_files_only: read from the hub's cache without network access.
        file: name of the file in a folder or repository.
        what: names the kind of file in errors.

    Raises:
        OSError: there is no such file or repository.
    """
    path = Path(source)
    if path.is_dir():
        path = path / file
        if not path.is_file():
            raise FileNotFoundError(f"folder {str(source)!r} holds no {file}")
    if path.exists():
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix == ".json":
        raise FileNotFoundError(f"{what} {name!r} is no file, no folder and no hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            hf_hub_download(
                name,
                file,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"{what} {name!r} is no file, and the hub gave none: {reason[0]}"
        ) from None


def load(path: Path, what: str = "plan") -> str:
    """Return the text of a file.

    Args:
        path: of the file.
        what: names the kind of file in errors.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no text, or is larger than any plan.
    """
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} is no regular file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{what} {str(path)!r} has {size} bytes; a {what} has at most {MAX_BYTES}")
    return read_text(path, what)


def push(
    text: str, repo_id: str, *, private: bool | None, token: str | None, commit_message: str
) -> str:
    """Upload ``text`` as ``visattn_plan.json`` and return the URL of the commit.

    Args:
        text: the content of the file.
        repo_id: id of the repository, which is created if it is missing.
        private: whether a new repository is private; None: the default of the account.
        token: access token for the hub.
        commit_message: message of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_file(
        path_or_fileobj=text.encode(),
        path_in_repo=PLAN_FILE,
        repo_id=repo_id,
        commit_message=commit_message,
    )
    return str(commit.commit_url)

"""Upload a written checkpoint to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ghostssm.errors import HubError, InputError, first_line


def check_hub_target(repository: str) -> None:
    """Raise InputError unless ``ORG/NAME`` is a possible name and there is a token to write with."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository!r} can't be a repository on the hub ({error}); expected ORG/NAME.") from None
    if repository.count("/") != 1:
        raise InputError(f"{repository!r} can't be a repository on the hub; expected ORG/NAME.")
    if get_token() is None:
        raise InputError("There is no token for the hub; run `hf auth login`, or set HF_TOKEN.")


def push_to_hub(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload a folder as one commit to a model repository, which is made if it is not there.

    Args:
        folder: to upload, all of it.
        repository: ORG/NAME.
        private: whether a new repository is private; an existing one stays as visible as it is.

    Returns:
        the repository's address.

    Raises:
        InputError: as `check_hub_target`.
        HubError: the upload failed; the folder is as it was.
    """
    check_hub_target(repository)
    api = HfApi()
    try:
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with ghostssm")
    except Exception as error:  # the hub client's faults share no base class
        raise HubError(
            f"The upload to {repository} failed ({first_line(error)}). The checkpoint is whole in {folder}; "
            f"`hf upload {repository} {folder}` tries again."
        ) from error
    return url

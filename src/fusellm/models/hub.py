"""Putting a trained model on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from fusellm.errors import ModelError

_OWN = ["manifest.json", ".lock", "*.writing"]  # of a run, and of no use elsewhere
HUB_FAULTS = (HTTPError, OSError, ValueError, RuntimeError)
"""What the hub's client raises."""


def require_access(repo: str) -> None:
    """Check that the hub can be reached and knows who pushes, before any work is done.

    Raises:
        ModelError: it cannot, there is no token, or the name is none.
    """
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ModelError(f"--push-to-hub {repo}: {_one_line(error)}") from None
    if repo.count("/") != 1:
        raise ModelError(f"--push-to-hub {repo}: name the owner too, as in owner/{repo}")
    try:
        HfApi().whoami()
    except HUB_FAULTS as error:
        raise ModelError(
            f"--push-to-hub {repo}: the hub does not let you in ({_one_line(error)}); log in with "
            "`hf auth login`, or leave --push-to-hub out and give it once you are online: what is "
            "trained is not trained again"
        ) from error


def push_model(folder: Path, repo: str, message: str) -> str:
    """Upload a model's folder, without what is only of use in a run.

    A repository that does not exist yet is made, private: who owns it can open it.

    Returns:
        Its address.

    Raises:
        ModelError: the hub refuses it, or cannot be reached.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=_OWN
        )
    except HUB_FAULTS as error:
        raise ModelError(
            f"{folder} could not be uploaded to {repo} ({_one_line(error)}); it is kept, and the "
            "same command tries again"
        ) from error
    return str(url)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

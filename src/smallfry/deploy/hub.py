"""Download and upload of shared models on the Hugging Face Hub, with readable errors.

The hub's address is the environment variable ``HF_ENDPOINT``'s, the token that of ``hf auth login``
or ``HF_TOKEN``, and files are kept in ``HF_HOME``, as everywhere with ``huggingface_hub``.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from smallfry.errors import HubError, UsageError
from smallfry.version import __version__

NAME = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9][\w.-]*", re.ASCII | re.IGNORECASE)
TOKEN_HELP = "make one at {}/settings/tokens and give it by hf auth login, or as HF_TOKEN"


def download(repository: str, revision: str | None, files: list[str]) -> Path:
    """Download these files of a repository, and no others; return the cache folder.

    Without a connection, or with HF_HUB_OFFLINE=1, what was fetched before is taken.

    Raises:
        UsageError: Not a name that a repository can have.
        HubError: The hub can't be reached, or has no such model for this user.
    """
    with explained("fetched", repository, revision):
        place = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=files,
            library_name="smallfry",
            library_version=__version__,
        )
    return Path(place)


def upload(folder: Path, repository: str, private: bool = False, message: str = "") -> str:
    """Upload a folder to a repository, created if needed; return its address.

    Raises:
        UsageError: Not a name that a repository can have.
        HubError: There is no token, it may not write there, the hub can't be reached, or the
            repository is public although ``private`` was asked for.
    """
    check_name(repository)
    if get_token() is None:
        raise HubError(
            f"{repository}: sharing on the Hub needs a token with write access; "
            f"{TOKEN_HELP.format(constants.ENDPOINT)}"
        )
    api = HfApi(library_name="smallfry", library_version=__version__)
    with explained("shared", repository):
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        is_private = not private or api.model_info(repository).private
    if not is_private:
        raise HubError(
            f"{repository}: exists already and is public; nothing was uploaded: make it private "
            f"on its page, or use another name"
        )
    with explained("shared", repository):
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message or None)
    return address


def check_name(repository: str) -> None:
    """Require USER/NAME, as repositories are named on the Hub."""
    if not NAME.fullmatch(repository):
        raise UsageError(
            f"'{repository}' is not a valid repository name: expected USER/NAME, of letters, "
            "digits, '-', '_' and '.'"
        )


@contextmanager
def explained(done: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Convert exceptions of ``huggingface_hub`` to one-line errors with a remedy.

    Args:
        done: Action as a participle, such as ``fetched``.
        repository: Repository of the request.
        revision: Branch, tag or commit of the request.
    """
    failed = f"{repository}: could not be {done}"
    hub = constants.ENDPOINT
    away = (
        f"{failed}, as {hub} can't be reached: check the connection, name a mirror by HF_ENDPOINT, "
        "set HF_HUB_OFFLINE=1 to take only what was fetched before, or use a local folder"
    )
    token_help = TOKEN_HELP.format(hub)
    try:
        yield
    except HFValidationError:
        raise UsageError(f"'{repository}' is not a valid repository name") from None
    except GatedRepoError as error:
        raise HubError(
            f"{failed}: request access at {hub}/{repository}, then {token_help}"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repository}: {hub} has no such model, or it is private; check the name; for a "
            f"private one, {token_help}"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repository}: has no branch, tag or commit '{revision}'") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{failed}: HF_HUB_OFFLINE is set; unset it") from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f"{failed}: HF_HUB_OFFLINE is set and the model is not cached; unset it, or use a "
                f"local folder"
            ) from error
        raise HubError(away) from error
    except HfHubHTTPError as error:
        raise HubError(f"{failed}: {_refusal(error, token_help)}") from error
    except Exception as error:  # the errors of the connection have other names in each version
        if isinstance(error, OSError) and error.filename is not None:  # of this machine's disk
            raise HubError(f"{failed} ({error})") from error
        raise HubError(f"{away} ({type(error).__name__}: {_one_line(error)})") from error


def _refusal(error: HfHubHTTPError, token_help: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the hub does not accept the token; {token_help}"
    if status == 403:
        return f"the token may not do that; take a name of your own, or {token_help}, able to write"
    said = error.server_message or _one_line(error)
    if isinstance(error, BadRequestError):
        return f"the hub found fault with it: {said}"
    return f"the hub answered with an error ({status}: {said}); try again later"


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()

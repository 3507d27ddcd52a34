"""Models on the Hugging Face Hub: fetched by id, pushed in one commit, and every failure one sentence."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .errors import FlexCompressError


# Weights for other frameworks, which nothing here reads.
_FOREIGN_WEIGHTS = (
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "*.mlmodel",
    "*.mlpackage/*",
    "*.gguf",
    "training_args.bin",
)
# What many models have a second time, beside the weights at the top.
_SECOND_WEIGHTS = ["*.bin", "onnx/*", "openvino/*"]
# What belongs to a run, and not to the model.
_NOT_PUSHED = ("training_args.bin", "stage.json")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
# `requests` and the client raise these alike, also in the middle of an upload.
_FAILURES = (requests.RequestException, OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError)


def is_hub_id(model: str | os.PathLike) -> bool:
    """Whether something that names a model is an id on the Hub: no path that exists, and no path by its looks."""
    text = str(model)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        return False
    return not Path(text).exists()


def fetch_model(model: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a model, downloaded first where it is an id on the Hub.

    Args:
        model: A folder, a file in one, or an id on the Hub.
        revision: A branch, tag or commit on the Hub; its main branch when `None`.
        token: For the Hub; the one that is logged in when `None`.

    Returns:
        The folder: for an id, the one in the cache, which must not be written to. A path comes back as it is, whether
        or not it exists.

    Raises:
        FlexCompressError: There is no such model on the Hub, or it cannot be reached.
    """
    if not is_hub_id(model):
        return Path(model).expanduser()
    left_out = list(_FOREIGN_WEIGHTS)
    try:
        with contextlib.suppress(OfflineModeIsEnabled, requests.ConnectionError, requests.Timeout):
            files = HfApi(token=token).model_info(str(model), revision=revision).siblings or []
            if any(file.rfilename.endswith(".safetensors") and "/" not in file.rfilename for file in files):
                left_out += _SECOND_WEIGHTS
        # Finds the model in the cache where there is no network.
        return Path(snapshot_download(str(model), revision=revision, token=token, ignore_patterns=left_out))
    except (*_FAILURES, LocalEntryNotFoundError) as error:
        raise FlexCompressError(_why_not_fetched(str(model), revision, error)) from error


def _why_not_fetched(model: str, revision: str | None, error: Exception) -> str:
    if constants.HF_HUB_OFFLINE:
        return (
            f"There is no folder {model} here, and HF_HUB_OFFLINE is set while no model of that name is in the cache: check "
            "the path, or unset HF_HUB_OFFLINE."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"The model {model} on the Hub has no revision {revision}: check the branch, tag or commit."
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return (
            f"There is no folder {model} here, and no model of that name on the Hub: check the path or the id (a private "
            "model needs `hf auth login`)."
        )
    return (
        f"There is no folder {model} here, and no model of that name could be fetched from the Hub ({_cause(error)}): "
        "check the path or the id, and the network."
    )


@dataclass(frozen=True)
class HubTarget:
    """A repository on the Hub that a model can be pushed to, as far as that is known beforehand.

    Attributes:
        repo_id: `owner/name`.
        private: Whether the repository is made private where it does not exist; the owner's default when `None`.
        token: For the Hub; the one that is logged in when `None`.
    """

    repo_id: str
    private: bool | None = None
    token: str | None = None

    @classmethod
    def check(cls, name: str, private: bool | None = None, token: str | None = None) -> HubTarget:
        """Finds out, before any long work, whether a model can be pushed. Nothing is made on the Hub yet.

        Args:
            name: `owner/name`, or a name in the user's own namespace.
            private: See the class.
            token: See the class.

        Raises:
            FlexCompressError: Nobody is logged in, the token only reads, the name cannot be one or is in a namespace of
                others, or the Hub cannot be reached.
        """
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise FlexCompressError(
                f"{name!r} cannot name a model on the Hub: write OWNER/NAME in letters, digits, -, _ and single dots."
            ) from None
        with explained_push(name):
            account = HfApi(token=token).whoami()
        user, namespaces = account["name"], {account["name"], *(org["name"] for org in account.get("orgs") or ())}
        access = (account.get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise FlexCompressError(f"The Hub token of {user} may only read: {_LOG_IN}.")
        owner = name.partition("/")[0] if "/" in name else user
        if owner not in namespaces:
            raise FlexCompressError(
                f"{name} belongs to others, and {user} cannot push there: choose a name under "
                f"{' or '.join(sorted(namespaces))}, such as {user}/{name.rpartition('/')[2]}."
            )
        return cls(name if "/" in name else f"{user}/{name}", private, token)

    def push(self, folder: str | os.PathLike, message: str) -> str:
        """Pushes a folder in one commit: on the Hub, either all of it is there or nothing has changed.

        Args:
            folder: The folder, which stays as it is.
            message: Of the commit.

        Returns:
            The page of the commit.

        Raises:
            FlexCompressError: The push failed; the folder is kept, and the message says how to push it again.
        """
        api = HfApi(token=self.token)
        with explained_push(self.repo_id, folder, self.private):
            api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                commit_message=message,
                ignore_patterns=list(_NOT_PUSHED),
            )
        return str(commit.commit_url)

    def command(self, folder: str | os.PathLike) -> str:
        """What to type to push a folder with the Hub's own client."""
        left_out = [pattern for pattern in (*_NOT_PUSHED, "checkpoint-*") if any(Path(folder).glob(pattern))]
        words = ["hf", "upload", self.repo_id, str(folder), ".", *(["--private"] if self.private else [])]
        return shlex.join([*words, *(word for pattern in left_out for word in ("--exclude", pattern))])


@contextlib.contextmanager
def explained_push(
    repo_id: str, folder: str | os.PathLike | None = None, private: bool | None = None
) -> Iterator[None]:
    """Turns the errors of a push, or of what comes before it, into one sentence.

    Args:
        repo_id: Where to.
        folder: What was to be pushed.
        private: Whether the repository was to be made private.

    Raises:
        FlexCompressError: Instead of what the Hub's client raises.
    """
    try:
        yield
    except (*_FAILURES, RuntimeError, ValueError) as error:
        if isinstance(error, FlexCompressError):
            raise
        # Uploads wrap what the network says; other such errors are not the Hub's.
        cause = error.__cause__ if type(error) is RuntimeError else error
        if isinstance(cause, _FAILURES):
            reason, cure = _why_not_pushed(repo_id, cause)
        elif isinstance(error, ValueError) and "README.md" in str(error):
            reason, cure = f"the Hub refuses the model card ({_one_line(error)})", "mend the top of README.md"
        else:
            raise
        text = f"{repo_id} was not pushed: {reason}"
        if folder is None:
            raise FlexCompressError(f"{text}; {cure}.") from error
        again = HubTarget(repo_id, private).command(folder)
        raise FlexCompressError(
            f"{text}; nothing of it was published, and {folder} is kept: {cure}, then push it with `{again}`."
        ) from error


def _why_not_pushed(repo_id: str, error: Exception) -> tuple[str, str]:
    """What went wrong, and what to do about it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        return "nobody is logged in to the Hub", _LOG_IN
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps this process away from the Hub", "set HF_HUB_OFFLINE=0"
    if isinstance(error, HFValidationError):
        return "that cannot name a model on the Hub", "write OWNER/NAME"
    if status == 401:
        return "the Hub does not accept the token", _LOG_IN
    if status in (403, 404):
        return "it belongs to others, or the token may not write there", f"choose a name of your own, or {_LOG_IN}"
    if status is not None:
        said = getattr(error, "server_message", None) or f"status {status}"
        return f"the Hub answered: {' '.join(said.split())}", "try again later"
    return f"the connection to the Hub failed ({_cause(error)})", "check the network"


def _cause(error: Exception) -> str:
    """The last line of the innermost error, shortened: what the network said, without the layers around it."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return _one_line(error) or type(error).__name__


def _one_line(error: Exception, longest: int = 200) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= longest else f"{text[:longest]}..."


def repo_name(model_id: str | None, folder: str | os.PathLike) -> str:
    """The name to push under: what the user gave, else the name of the folder, as the Trainer of Transformers does."""
    return model_id or Path(folder).expanduser().absolute().name

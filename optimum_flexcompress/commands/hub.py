"""What the commands that write a model share: pushing it to the Hugging Face Hub.

The options are called as in the `TrainingArguments` of Transformers. Nothing here may import torch or transformers.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from optimum_flexcompress.hub import HubTarget


def add_hub_arguments(parser: ArgumentParser, what: str = "OUT") -> _ArgumentGroup:
    """Adds the options to a command.

    Args:
        parser: Of the command.
        what: What is pushed, for the help.

    Returns:
        The group of the options.
    """
    hub = parser.add_argument_group("Hugging Face Hub")
    hub.add_argument(
        "--push-to-hub",
        action="store_true",
        help=f"Push {what} when it is complete, in one commit (log in first, with `hf auth login` or HF_TOKEN).",
    )
    hub.add_argument(
        "--hub-model-id",
        metavar="NAME",
        help="Repository to push to, NAME or OWNER/NAME; made where it does not exist (default: the folder's name, under "
        "your account).",
    )
    hub.add_argument("--hub-private-repo", action="store_true", help="Make the repository private if it is new.")
    hub.add_argument("--hub-token", metavar="TOKEN", help="Token to push with (default: the one you logged in with).")
    return hub


def hub_target(args: Namespace, folder: str | None) -> HubTarget | None:
    """Where the result is to be pushed, looked at before any long work; None where it is not.

    Args:
        args: Of the command.
        folder: The folder that is going to be pushed; None where the command is not going to write it.

    Raises:
        FlexCompressError: The options contradict each other, or see [`HubTarget.check`].
    """
    from optimum_flexcompress.errors import FlexCompressError

    if not args.push_to_hub:
        for option in ("hub_model_id", "hub_private_repo", "hub_token"):
            if getattr(args, option):
                name = option.replace("_", "-")
                raise FlexCompressError(f"--{name} is for pushing to the Hub: add --push-to-hub, or leave it out.")
        return None

    if folder is None:
        raise FlexCompressError(
            "--push-to-hub pushes the picked model: add --save-pick DIR, where it is written first."
        )

    from optimum_flexcompress.hub import HubTarget, repo_name

    return HubTarget.check(
        repo_name(args.hub_model_id, folder), private=args.hub_private_repo or None, token=args.hub_token
    )


def push(target: HubTarget, folder: str, message: str) -> str:
    """Pushes a complete model folder, and says where to; its card then tells how to load it from there.

    Args:
        target: From [`hub_target`].
        folder: The folder.
        message: Of the commit.

    Returns:
        A line for the user.

    Raises:
        FlexCompressError: See [`HubTarget.push`].
    """
    from optimum_flexcompress.model_card import rename_card

    rename_card(folder, target.repo_id)
    return f"Pushed to {target.repo_id}: {target.push(folder, message)}"

"""`optimum-cli lowrank push`."""

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from ..errors import CheckpointError, ConfigError
from ..files import PARTIAL
from ..integrations.out_of_core import is_factorized, read_checkpoint, verify_checkpoint
from .terminal import Output


def add_arguments(parser):
    """Arguments of the command."""
    parser.add_argument("folder", help="of a factorized checkpoint")
    parser.add_argument("repo", help="repository on the Hub, OWNER/NAME; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--message", default="Upload factorized model", help="of the commit (default: %(default)s)")


def run(arguments):
    """Run the command: everything in one commit, or nothing."""
    if not is_factorized(arguments.folder):
        raise CheckpointError(f"{arguments.folder} holds no factorized checkpoint; make one with `factorize`.")
    verify_checkpoint(arguments.folder)
    checkpoint = read_checkpoint(arguments.folder)
    api = HfApi()
    try:
        repo = api.create_repo(arguments.repo, private=arguments.private or None, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=arguments.folder,
            revision=arguments.revision,
            commit_message=arguments.message,
            ignore_patterns=[f"*{PARTIAL}", ".*"],
        )
    except HFValidationError as error:
        raise ConfigError(f"REPO is {arguments.repo!r}: {error}") from error
    return Output(
        f"{checkpoint.summary.line}\n{commit.commit_url}",
        {"repository": repo, "commit": commit.oid, "url": commit.commit_url, "line": checkpoint.summary.line},
    )

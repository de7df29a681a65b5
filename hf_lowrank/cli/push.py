"""`optimum-cli lowrank push`."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from ..errors import CheckpointError, ConfigError
from ..files import PARTIAL
from ..integrations import model_card
from ..integrations.out_of_core import is_factorized, load_model, verify_checkpoint
from ..reporting import summary
from ..upload import WEIGHTS, upload
from .measured import measured
from .options import add_parameters, given
from .terminal import Output


MEASURED = ("evaluation", "dense")
OPTIONS = (*MEASURED, "command")


def add_arguments(parser):
    """Arguments of the command."""
    parser.add_argument("folder", help="of a factorized checkpoint")
    parser.add_argument("repo", help="repository on the Hub, OWNER/NAME; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--message", default="Upload factorized model", help="of the commit (default: %(default)s)")
    add_parameters(parser, model_card, OPTIONS)


def run(arguments):
    """Run the command: weights, whatever is beside them, and a model card in one commit, or nothing."""
    folder = Path(arguments.folder)
    if not is_factorized(arguments.folder):
        raise CheckpointError(f"{arguments.folder} holds no factorized checkpoint; make one with `factorize`.")
    options = given(arguments, OPTIONS)
    options |= {name: measured(options[name], f"--{name}") for name in MEASURED if name in options}
    verify_checkpoint(arguments.folder)
    model = load_model(arguments.folder, device_map="meta")
    card, line = model_card(model, arguments.repo, **options), summary(model).line
    try:
        repo = HfApi().create_repo(arguments.repo, private=arguments.private or None, exist_ok=True).repo_id
    except HFValidationError as error:
        raise ConfigError(f"REPO is {arguments.repo!r}: {error}") from error
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: path for name, path in names.items() if not name.startswith(".") and not name.endswith(PARTIAL)}
    commit = upload(
        files, repo, card, superseded=WEIGHTS, revision=arguments.revision, commit_message=arguments.message
    )
    return Output(
        f"{line}\n{commit.commit_url}",
        {"repository": repo, "commit": commit.oid, "url": commit.commit_url, "line": line},
    )

"""Files and a README.md into a repository on the Hub: one commit, or none."""

import re

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .readme import README, merged, readme_at


# Weights of an earlier push, by other names than this one's, would be found first by whoever loads the repository.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def upload(files, repo_id, card, prefer_card=False, superseded=None, token=None, revision=None, **options):
    """Commit `files` to a repository that exists, with `card` merged into its README.md.

    Large files are sent ahead; what a reader sees changes by the commit alone, and does not where anything fails.

    Args:
        files (`dict[str, Path]`): by their names in the repository; a README.md among them is left out.
        repo_id (`str`): the repository.
        card (`huggingface_hub.ModelCard`): as for `merged`.
        prefer_card (`bool`, defaults to `False`): as for `merged`.
        superseded (`re.Pattern`, *optional*): files of such names that are not among `files` are deleted.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`.
        revision (`str`, *optional*): a branch, made if it is not there.
        options: of `HfApi.create_commit`: `commit_message`, `commit_description`, `create_pr`.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    hub = HfApi(token=token)
    if revision is not None and not revision.startswith("refs/"):
        hub.create_branch(repo_id, branch=revision, exist_ok=True)
    readme = merged(readme_at(repo_id, revision, token), card, prefer_card)
    operations = [CommitOperationAdd(name, path) for name, path in files.items() if name != README]
    operations.append(CommitOperationAdd(README, str(readme).encode()))
    if superseded is not None:
        there = hub.list_repo_files(repo_id, revision=revision)
        left = [name for name in there if superseded.fullmatch(name) and name not in files]
        operations += [CommitOperationDelete(name) for name in left]
    return hub.create_commit(repo_id, operations, revision=revision, **options)

"""A statistics file on the Hub."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..errors import StatisticsError
from ..readme import TAGS, rendered
from ..upload import upload


def push_statistics(statistics, repo_id, path_in_repo, private, token, revision, create_pr, commit_message):
    """What [`Statistics.push_to_hub`] does."""
    if not path_in_repo.endswith(".safetensors"):
        raise StatisticsError(
            f"`path_in_repo`={path_in_repo!r} must end in .safetensors, as what it is read by wants."
        )
    repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = rendered(
        "statistics",
        {"tags": [*TAGS[:1], "calibration"]},
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        path=path_in_repo,
        layers=len(statistics.leaders),
        names=sorted({name for _, name in statistics._shapes}),
        provenance={key: value for key, value in statistics.provenance.items() if value is not None},
    )
    with tempfile.TemporaryDirectory(prefix="hf_lowrank_") as folder:
        path = Path(folder, "statistics.safetensors")
        statistics.save(path)
        return upload(
            {path_in_repo: path},
            repo_id,
            card,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )

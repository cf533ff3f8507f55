"""The verb that releases a protected checkpoint on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sophon.api.common import required
from sophon.checkpoint import read_checkpoint
from sophon.config import Config, default_folder
from sophon.errors import UserError, one_line
from sophon.paths import entries


def push(config: Config) -> str | None:
    """Upload a verified protected checkpoint to ``repo``; with ``dry_run``, the default, only say what would be.

    A repository that is not there is made, private. The token is the one of `hf auth login`, or of ``HF_TOKEN``.

    Returns:
        A warning if the model card has no audit.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public by its documentation

    if not config.repo or "/" not in config.repo:
        raise UserError(f"repo: '{config.repo or ''}' is not allowed; give ORGANISATION/NAME")
    try:
        validate_repo_id(config.repo)
    except ValueError as error:
        raise UserError(f"repo: '{config.repo}' is not allowed; give ORGANISATION/NAME ({one_line(error)})") from error
    checkpoint = read_checkpoint(required(config.checkpoint or str(default_folder(config, "export")), "checkpoint"))
    if checkpoint.manifest.get("verb") != "protect":
        raise UserError(f"checkpoint: '{checkpoint.path}' is the unprotected reference; give a protected checkpoint")
    files = [path for path in _files(checkpoint.path) if not path.name.startswith(".")]
    size = sum(path.stat().st_size for path in files) / 1e6
    upload = f"{len(files)} files, {size:.1f} MB, to {constants.ENDPOINT}/{config.repo}"
    if config.dry_run:
        for path in files:
            print(f"  {path.relative_to(checkpoint.path)}")
        print(f"dry run: would upload {upload}; dry_run=false uploads")
    else:
        _upload(checkpoint.path, config.repo, checkpoint.sha256)
        print(f"uploaded {upload}")
    audited = bool(checkpoint.manifest.get("audits"))
    return None if audited else "its card says 'not audited'; `sophon export audit=RUN_DIR` writes an audit into it"


def _files(folder: Path) -> Iterator[Path]:
    for path in entries(folder, "checkpoint"):
        yield from _files(path) if path.is_dir() else [path]


def _upload(folder: Path, repo: str, sha256: str) -> None:
    from huggingface_hub import HfApi

    hub = HfApi()
    with _explained():
        if not hub.repo_exists(repo):
            hub.create_repo(repo, private=True)
        message = f"Protected checkpoint, weights sha256 {sha256[:12]}"
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=[".*"])


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what the Hub, or the way to it, refuses into one line."""
    try:
        yield
    except Exception as error:  # of the network, of the token and of the Hub share no base class
        hint = "log in with `hf auth login`, or set HF_TOKEN" if "401" in str(error) else "nothing is released"
        raise UserError(f"repo: not uploaded ({one_line(error)}); {hint}") from error

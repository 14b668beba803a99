"""Whatever opens a root takes the options of its driver: not only a manager."""

from __future__ import annotations

from pathlib import Path

import torch
from s3_server import S3Server

from ckptman import FilesCoordinator
from ckptman.convert import export_checkpoint, import_checkpoint


def test_a_checkpoint_is_imported_into_a_bucket_and_exported_from_it(s3_server: S3Server, tmp_path: Path) -> None:
    """With credentials that only the options have; every tensor comes back."""
    root, weight = s3_server.new_root(), torch.randn(5, 3)
    torch.save({"model": {"weight": weight}}, tmp_path / "in.pt")
    import_checkpoint(root, tmp_path / "in.pt", step=7, storage_options=s3_server.options)
    export_checkpoint(root, 7, tmp_path / "out.pt", to="torch", storage_options=s3_server.options)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(found["model"]["weight"], weight)


def test_ranks_meet_in_a_bucket(s3_server: S3Server) -> None:
    """A coordinator that speaks through the storage alone reaches one that wants credentials."""
    root, options = s3_server.new_root(), s3_server.options
    with FilesCoordinator(root, rank=0, world_size=1, job="sweep", storage_options=options) as ranks:
        assert ranks.agree(b"here") == [b"here"]

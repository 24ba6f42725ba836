"""Folders here and in a Google storage bucket: only what differs moves, its bytes are verified, and manifests come last."""

from .client import Bucket, Remote, file_crc32c, open_bucket
from .errors import Empty, Overwritten, Unreached
from .names import CACHES, is_manifest, is_temporary
from .transfer import Moved, Status, pull, push, status

__all__ = [
    "CACHES",
    "Bucket",
    "Empty",
    "Moved",
    "Overwritten",
    "Remote",
    "Status",
    "Unreached",
    "file_crc32c",
    "is_manifest",
    "is_temporary",
    "open_bucket",
    "pull",
    "push",
    "status",
]

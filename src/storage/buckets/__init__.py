"""Folders here and in a Google storage bucket: only what differs moves, its bytes are verified, and manifests come last."""

from .client import Bucket, Empty, Overwritten, Unreached, open_bucket
from .folders import CACHES, Remote, file_crc32c, is_manifest, is_temporary
from .transfer import Moved, Status, pull, push, status

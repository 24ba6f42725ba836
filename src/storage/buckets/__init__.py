"""Folders here and in a Google storage bucket: only what differs moves, its bytes are verified, and manifests come last."""

from .client import Bucket, Remote, file_crc32c, open_bucket
from .errors import Empty, Overwritten, Unreached
from .names import CACHES, is_manifest, is_temporary
from .transfer import Moved, Status, pull, push, status

"""Files that are whole or absent, locks, arrays made in blocks, archives, buckets: what moves bytes and knows no images."""

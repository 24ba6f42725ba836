"""Other projects' networks: a map of key names each way."""

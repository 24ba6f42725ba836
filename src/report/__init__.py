"""The HTML report of a run, made from the files in its directory."""

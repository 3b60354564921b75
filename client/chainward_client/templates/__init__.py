"""The files that `chainward-site init` writes."""

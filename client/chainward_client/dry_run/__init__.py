"""``chainward-site dry-run``: what a site would send in a run, message by message, without a network."""

"""What a hospital installs and runs."""

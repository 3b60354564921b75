"""Site data behind one interface, wherever the images come from."""

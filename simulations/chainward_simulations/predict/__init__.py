"""From a model of a run to answers about images: `chainward predict`."""

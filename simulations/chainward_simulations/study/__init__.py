"""`chainward study`: the methods side by side on the same images, labels and budget, over several seeds."""
